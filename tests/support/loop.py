"""A training loop of somebody else: saves a number, goes on from it, stops at TERM. ``loop.py STEPS FILE``."""

import os
import signal
import sys
import time
from pathlib import Path

steps, file = int(sys.argv[1]), Path(f"{sys.argv[2]}-{os.environ['RANK']}")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
step = int(file.read_text()) if file.exists() else 0
place = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
print(f"rank {place} goes on at {step}, meets at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
while step < steps:
    time.sleep(0.1)
    step += 1
    if stop or step % 10 == 0:
        new = file.with_suffix(".new")
        new.write_text(str(step))
        new.rename(file)
    if stop:
        sys.exit(f"rank {place} stopped at {step}")
print(f"rank {place} finished at {step}")
