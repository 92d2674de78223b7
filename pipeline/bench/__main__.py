"""``python -m pipeline.bench``."""

from pipeline.bench.infer import main
from pipeline.errors import run_command

run_command(main)
