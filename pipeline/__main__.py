"""``python -m pipeline``: the commands, one line each."""

from __future__ import annotations

from pipeline.errors import run_command
from pipeline.words import columns

COMMANDS = {
    "pipeline.submit": "make or continue a run: on this machine, or as a chain of Slurm jobs",
    "pipeline.status": "every stage's state, reason and progress; a stage's log",
    "pipeline.cancel": "stop a run, or a stage and what waits for it; it saves first",
    "pipeline.report": "everything about a run in one HTML file",
    "pipeline.compare": "runs beside each other: what differs, and which differences are noise",
    "pipeline.plan": "what any number of nodes means in micro-batches, and how often to save",
    "pipeline.checkpoints": "list a run's checkpoints, verify them",
    "pipeline.export": "trained weights as a folder for transformers, or as NVIDIA's file",
    "pipeline.finetune": "fine-tune, score and predict: SQuAD, MRPC, SST-2, CoLA, MNLI",
    "pipeline.nvidia": "calls of NVIDIA's run_*.sh, translated and run",
    "pipeline.tables": "NVIDIA's published tables with one's own figures beside them",
    "pipeline.bench": "how fast a model answers",
    "pipeline.monitor": "one reading of every GPU of this node, and what it means",
    "pipeline.worker": "one process of a stage, as srun starts it",
    "slurm.probe": "draft a cluster profile from what this site's Slurm says",
    "data_prep.nvidia_hdf5": "shards from and to NVIDIA's HDF5 schema",
}


def main() -> int:
    print("\n".join(["python -m …   (--help says more)", *columns(COMMANDS.items())]))
    return 0


if __name__ == "__main__":
    run_command(main)
