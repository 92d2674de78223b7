"""How far a stage is: one line drawn again on a terminal, few lines in a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from support.running import ROOT

CODE = """
import time
from pipeline.node.screen import Screen
screen = Screen()
for step in range(1, 101):
    screen.show(f"  phase1: step {step}/100", step / 100)
    time.sleep(0.001)
screen.show("  phase1: done")
"""


def test_a_pipe_gets_a_line_now_and_then_and_the_last():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"  phase1: {words}" for words in ("step 1/100", "step 100/100", "done")]


def test_a_terminal_gets_one_line_with_the_time_that_is_left():
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdout=slave, env={**os.environ, "COLUMNS": "60"}
    )
    os.close(slave)
    said = b""
    try:
        while part := os.read(master, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = said.decode()
    os.close(master)
    assert text.count("\n") == 2  # after the last step, and after what is no progress
    drawn = text.split("\r\x1b[K")
    assert max(map(len, (line.strip() for line in drawn))) < 60
    assert re.fullmatch(r"  █{10}░{10}  50%  ETA 0 s  phase1: step 50/100", drawn[50])
    assert drawn[-1].strip() == "phase1: done"
