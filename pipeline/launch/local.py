"""The chain on this machine: stages as child processes, as many at once as there are process slots.

Restarts a stage whose attempt ended with 75 to 77 or by a signal, as Slurm would requeue it; Ctrl-C and
``pipeline.cancel`` stop it cleanly. All children die with this process, however it dies.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.errors import RESTART_CODES, unheard
from pipeline.run.chain import Chain
from pipeline.run.files import patiently
from pipeline.run.rundir import RunDir
from slurm.environment import clean
from slurm.verdict import TRIES, begin_try, may_try_again

STOP_GRACE_S = 120.0


@dataclass
class Running:
    """The processes of one attempt of one stage."""

    name: str
    slots: int
    processes: list[subprocess.Popen[bytes]]
    stopping_since: float | None = None

    def stop(self) -> None:
        """Ask all processes to stop; they save first."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            for process in self.processes:
                process.terminate()

    def poll(self) -> int | None:
        """Exit code when all processes have ended: that of the first one that failed."""
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            return next((code for code in codes if code), 0)
        if any(codes):
            self.stop()  # a rank failed: its peers notice by themselves, this makes it quick
        if self.stopping_since is not None and time.monotonic() - self.stopping_since > STOP_GRACE_S:
            for process in self.processes:
                process.kill()
        return None


class LocalRunner:
    """Runs the stages of ``todo`` in the foreground."""

    def __init__(
        self, chain: Chain, todo: Mapping[str, str], processes: int, threads: int, command: Sequence[str] = ()
    ) -> None:
        self.chain, self.run, self.slots, self.threads = chain, chain.run, processes, threads
        self.waiting = list(todo)
        self.command = command  # as it was given: what stands in run.json may have been changed since
        self.running: list[Running] = []
        self.failed: dict[str, int] = {}
        (self.run.path / "jobs").mkdir(exist_ok=True)
        for name in todo:  # whoever starts the chain may try again
            self._tries(name).unlink(missing_ok=True)
        self.interrupted = False

    def loop(self) -> int:
        """Run until nothing is left or a stop is asked for; returns the exit code."""
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while self.running or (self.waiting and not self._stopping()):
                self._patiently(self._start_ready)
                for running in list(self.running):
                    if self._stopping():
                        running.stop()
                    code = running.poll()
                    if code is not None:
                        self.running.remove(running)
                        self._patiently(functools.partial(self._ended, running.name, code))
                time.sleep(0.05)
        finally:
            signal.signal(signal.SIGINT, previous)
            for running in self.running:
                for process in running.processes:
                    process.kill()
        if self.interrupted:
            print("stopped by Ctrl-C; run the same command again to continue", file=sys.stderr)
            return 130
        if self.run.cancel_request.exists():
            self.run.cancel_request.unlink()
            self.run.event("cancelled")
            print("cancelled; run the same command again to continue", file=sys.stderr)
            return 75
        return next(iter(self.failed.values()), 0)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def _patiently(self, work: Callable[[], None]) -> None:
        patiently(work, functools.partial(print, file=sys.stderr, flush=True), lambda: self.interrupted)

    def _stopping(self) -> bool:
        try:
            return self.interrupted or self.run.cancel_request.exists()
        except OSError:  # a file server that is away: the stages wait for it
            return False

    def _start_ready(self) -> None:
        for name in list(self.waiting):
            if self._stopping():
                return
            stage = self.chain.stages[name]
            pending = {*self.waiting, *(running.name for running in self.running)} - {name}
            if pending.intersection(stage.needs):
                continue
            if not stage.always and any(not self.chain.is_done(need) for need in stage.needs):
                self.waiting.remove(name)  # a need failed: this stage cannot run now
                continue
            slots = 1 if stage.width == "one" else self.slots
            if sum(running.slots for running in self.running) + slots <= self.slots:
                self.running.append(self._start(name, slots))
                self.waiting.remove(name)

    def _start(self, name: str, slots: int) -> Running:
        world = slots if self.chain.stages[name].width == "ranks" else 1
        environment = {
            **clean(),
            "PIPELINE_PARENT": str(os.getpid()),
            "PIPELINE_LAUNCH": secrets.token_hex(8),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
            TRIES: str(self._tries(name)),
        }
        command = [sys.executable, "-m", "pipeline.worker", str(self.run.path.absolute()), name]
        if self.command:
            command += ["--", *self.command]
        begin_try(environment["PIPELINE_LAUNCH"], self._tries(name))
        say(name)
        return Running(
            name,
            slots,
            [
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                )
                for rank in range(world)
            ],
        )

    def _ended(self, name: str, code: int) -> None:
        if code == 0 and (self.chain.is_done(name)):
            done = self.run.stage(name).done or {}
            say(f"{name} done in {done.get('duration_s', 0):.1f} s")
            return
        attempts = self.run.stage(name).attempts
        verdict = attempts[-1].verdict if attempts else None
        silent = "killed" if code <= 0 or code > 128 else "it left no verdict; its words are in the output of submit"
        code = int(verdict["code"]) if verdict else (76 if code <= 0 or code > 128 else code)
        line = (verdict or {}).get("line", silent)
        if self._stopping():
            return
        if code in RESTART_CODES and may_try_again(self._tries(name)):
            print(f"{name}: attempt ended with {code} ({line}); starting it again", file=sys.stderr)
            self.waiting.insert(0, name)
            return
        self.failed[name] = code
        self.run.event("failed", stage=name, code=code, line=line)

    def _tries(self, name: str) -> Path:
        """Where attempts since the last progress are noted; the rule is that of the batch scripts."""
        return self.run.path / "jobs" / f"local-{name}.tries"


def say(line: str) -> None:
    """Print a line; the work goes on where who read our output went away (`| head`)."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        unheard()


def run_chain(run: RunDir, todo: Mapping[str, str], processes: int, threads: int, command: Sequence[str] = ()) -> int:
    """Run ``todo`` of a held run; returns the exit code of the first failed stage, or 0."""
    run.cancel_request.unlink(missing_ok=True)
    return LocalRunner(Chain.of(run), todo, processes, threads, command).loop()
