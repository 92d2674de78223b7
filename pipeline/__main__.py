"""``python -m pipeline``, ``bert-pipeline``: the commands, one line each; or one of them."""

from __future__ import annotations

import runpy
import sys

from pipeline.errors import ConfigError, run_command
from pipeline.words import columns

COMMANDS = {
    "pipeline.submit": "make or continue a run: on this machine, or as a chain of Slurm jobs",
    "pipeline.guard": "any command that goes on by itself, run with the same care",
    "pipeline.status": "every stage's state, reason and progress; a stage's log",
    "pipeline.cancel": "stop a run, or a stage and what waits for it; it saves first",
    "pipeline.report": "everything about a run in one HTML file",
    "pipeline.track": "a run's figures in Weights & Biases, from a machine with a network",
    "pipeline.compare": "runs beside each other: what differs, and which differences are noise",
    "pipeline.prove": "what others need to check a training, and the check",
    "pipeline.plan": "what any number of nodes means in micro-batches, and how often to save",
    "pipeline.checkpoints": "list a run's checkpoints, verify them",
    "pipeline.export": "trained weights as a folder for transformers, or as NVIDIA's file",
    "pipeline.finetune": "fine-tune, score and predict: SQuAD, GLUE, your own classes",
    "pipeline.nvidia": "calls of NVIDIA's run_*.sh, translated and run",
    "pipeline.tables": "NVIDIA's published tables with one's own figures beside them",
    "pipeline.bench": "how fast: data, training, inference, a GPU, the host; beside others",
    "pipeline.monitor": "one reading of every GPU of this node, and what it means",
    "pipeline.worker": "one process of a stage, as srun starts it",
    "slurm.probe": "draft a cluster profile from what this site's Slurm says",
    "pipeline.doctor": "a job of a few minutes that proves a cluster's profile, and what to change",
    "data_prep.download": "Wikipedia's dumps and the files of the tasks, whole or not at all",
    "data_prep.inspect": "one sample in words: what is masked, and which text it is from",
    "data_prep.nvidia_hdf5": "shards from and to NVIDIA's HDF5 schema",
}


def main() -> int:
    """List the commands; or run one, by the last part of its name, as ``python -m`` does."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("\n".join(["python -m …   (--help says more)", *columns(COMMANDS.items())]))
        return 0
    names = {module.rpartition(".")[2]: module for module in COMMANDS}
    word = sys.argv.pop(1)
    if word not in names:
        raise ConfigError(f"no command {word!r}: the commands are {', '.join(names)}")
    runpy.run_module(names[word], run_name="__main__", alter_sys=True)
    return 0


def command() -> None:
    """``bert-pipeline``, which `pip install` puts in place."""
    run_command(main)


if __name__ == "__main__":
    command()
