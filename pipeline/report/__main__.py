"""``python -m pipeline.report RUN``."""

from pipeline.errors import run_command
from pipeline.report.render import main

run_command(main)
