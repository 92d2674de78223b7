"""Calls of NVIDIA's BERT scripts, run_squad.sh, run_glue.sh and run_pretraining.sh: what they are here, and run it.

A call is translated argument by argument, by position; what has no counterpart is named. It is a translator of calls,
not of batch scripts.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigError, run_command

PRECISIONS = ("fp16", "fp32", "tf32")
# The positions of each script with their defaults; the page leaves out the one in OMITTED, which came later.
POSITIONS = {
    "run_squad.sh": {
        "init_checkpoint": "/workspace/checkpoints/bert_uncased.pt",
        "epochs": "2.0",
        "batch": "4",
        "learning_rate": "3e-5",
        "warmup": "0.1",
        "precision": "fp16",
        "gpus": "8",
        "seed": "1",
        "data": "squad/v1.1",
        "vocab": "vocab/vocab",
        "out": "results/SQuAD",
        "mode": "train eval",
        "config": "bert_configs/large.json",
        "max_steps": "-1",
    },
    "run_glue.sh": {
        "init_checkpoint": "/workspace/checkpoints/bert_uncased.pt",
        "data": "glue/MRPC",
        "vocab": "vocab/vocab",
        "config": "bert_configs/large.json",
        "out": "results/MRPC",
        "task": "mrpc",
        "gpus": "8",
        "batch": "16",
        "accumulation": "1",
        "learning_rate": "2.4e-5",
        "warmup": "0.1",
        "epochs": "3",
        "max_steps": "-1.0",
        "precision": "fp16",
        "seed": "2",
        "mode": "train eval",
    },
    "run_pretraining.sh": {
        "phase1_batch": "8192",
        "phase1_learning_rate": "6e-3",
        "precision": "fp16",
        "gpus": "1",
        "phase1_warmup": "0.2843",
        "phase1_steps": "7038",
        "checkpoint_every": "200",
        "resume": "false",
        "log_file": "true",
        "accumulate": "true",
        "phase1_accumulation": "128",
        "seed": "12439",
        "job_name": "bert_lamb_pretraining",
        "allreduce_post_accumulation": "true",
        "allreduce_post_accumulation_fp16": "true",
        "phase2_batch": "4096",
        "phase2_learning_rate": "4e-3",
        "phase2_warmup": "0.128",
        "phase2_steps": "1563",
        "phase2_accumulation": "512",
        "phase1_data": "",
        "phase2_data": "",
        "code": "",
        "init_checkpoint": "None",
        "wikipedia": "",
        "dask_workers": "",
        "shards_per_worker": "128",
        "loader_workers": "4",
        "sample_ratio": "0.9",
        "phase2_bin_size": "64",
        "masking": "static",
        "config": "bert_configs/large.json",
    },
}
OMITTED = {"run_squad.sh": "warmup", "run_glue.sh": "max_steps"}
WITHOUT_COUNTERPART = {
    "resume": "a run continues by itself",
    "log_file": "every rank has its log in the run",
    "accumulate": "the accumulation follows from the batch, the micro-batch and the ranks",
    "job_name": "the run's folder is its name",
    "allreduce_post_accumulation": "gradients are always summed once a step",
    "allreduce_post_accumulation_fp16": "gradients are summed in fp32",
    "phase1_data": "samples are made from --data by the chain",
    "phase2_data": "samples are made from --data by the chain",
    "code": "the code is this package",
    "wikipedia": "the corpora are named by the recipe, below --data",
    "dask_workers": "data stages use --processes",
    "shards_per_worker": "the recipe says data.train_shards",
    "loader_workers": "one thread of each rank reads",
    "sample_ratio": "every text is used: data.dupe_factor and data.seed say how",
    "phase2_bin_size": "samples of any length are packed without padding",
}


def arguments_of(script: str, given: Sequence[str]) -> dict[str, str]:
    """The script's arguments by name: by position, with its defaults for a missing tail.

    The page's shorter list is told by where the word for the precision stands. ConfigError with one line else.
    """
    if script not in POSITIONS:
        raise ConfigError(f"{script}: choose from {', '.join(POSITIONS)}")
    defaults = POSITIONS[script]
    names = list(defaults)
    at = names.index("precision")
    here, before = ({*given[place : place + 1]} & {*PRECISIONS} for place in (at, at - 1))
    if script in OMITTED and before and not here:
        names.remove(OMITTED[script])
        at -= 1
    if len(given) > len(names):
        raise ConfigError(f"{script} takes {len(names)} arguments ({', '.join(names)}), not {len(given)}")
    arguments = defaults | dict(zip(names, given, strict=False))
    if arguments["precision"] not in PRECISIONS:
        raise ConfigError(
            f"{script}: argument {at + 1} is the precision, {' or '.join(PRECISIONS)}, not {arguments['precision']!r}"
        )
    return arguments


def finetune_command(script: str, arguments: dict[str, str]) -> list[str]:
    """``python -m pipeline.finetune …`` for a call of run_squad.sh or run_glue.sh."""
    squad = script == "run_squad.sh"
    task, data = "squad" if squad else arguments["task"].lower().replace("-", ""), Path(arguments["data"])
    dev = "dev_matched.tsv" if task == "mnli" else "dev.tsv"
    files = (data / "train-v1.1.json", data / "dev-v1.1.json") if squad else (data / "train.tsv", data / dev)
    modes = {"prediction" if word == "predict" else word for word in arguments["mode"].split()}
    mode = ",".join(word for word in ("train", "eval", "prediction") if word in modes) or "train,eval"
    gpus, batch = whole(arguments, "gpus"), whole(arguments, "batch")
    micro_batch = batch // whole(arguments, "accumulation") if not squad else batch
    options: dict[str, object] = {
        "model": arguments["init_checkpoint"],
        "config": arguments["config"],
        "vocab": arguments["vocab"],
        "train": files[0] if "train" in mode else None,
        "eval": files[1] if mode != "train" else None,
        "out": arguments["out"],
        "mode": mode,
        "precision": arguments["precision"],
        "processes": gpus,
        "seed": whole(arguments, "seed"),
    }
    if "train" in mode:
        steps = whole(arguments, "max_steps")
        options |= {
            "epochs": whole(arguments, "epochs"),
            "batch": batch * gpus,
            "learning-rate": number(arguments, "learning_rate"),
            "warmup": number(arguments, "warmup"),
            "max-steps": steps if steps > 0 else None,
        }
    options["micro-batch"] = micro_batch
    if Path(arguments["init_checkpoint"]).is_dir():  # a Hugging Face folder knows its own
        options |= {"config": None, "vocab": None}
    return ["pipeline.finetune", task, *flags_of(options)]


def pretraining_command(arguments: dict[str, str], run: Path, data: Path | None, recipe: str) -> list[str]:
    """``python -m pipeline.submit …`` for a call of run_pretraining.sh."""
    gpus = whole(arguments, "gpus")
    settings: dict[str, object] = {
        "train.precision": arguments["precision"],
        "train.seed": whole(arguments, "seed"),
        "train.masking": arguments["masking"],
        "train.checkpoint_every": whole(arguments, "checkpoint_every"),
    }
    for phase in ("phase1", "phase2"):
        rank_batch = whole(arguments, f"{phase}_batch")
        settings |= {
            f"{phase}.global_batch": rank_batch * gpus,
            f"{phase}.micro_batch": max(1, rank_batch // whole(arguments, f"{phase}_accumulation")),
            f"{phase}.learning_rate": number(arguments, f"{phase}_learning_rate"),
            f"{phase}.warmup": number(arguments, f"{phase}_warmup"),
            f"{phase}.steps": whole(arguments, f"{phase}_steps"),
        }
    if arguments["init_checkpoint"] not in ("None", ""):
        settings["phase1.start"] = arguments["init_checkpoint"]
    options = {"recipe": recipe, "cluster": "local", "processes": gpus, "run": run, "data": data}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["pipeline.submit", *flags_of(options), *sets]


def flags_of(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def number(arguments: dict[str, str], name: str) -> float:
    try:
        return float(arguments[name])
    except ValueError:
        raise ConfigError(f"{name} = {arguments[name]!r} is no number") from None


def whole(arguments: dict[str, str], name: str) -> int:
    value = number(arguments, name)
    if value != int(value):
        raise ConfigError(f"{name} = {arguments[name]}: a whole number is needed here")
    return int(value)


def main() -> int:
    """Print the command that a call means, say what it leaves out, and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.nvidia",
        description=__doc__,
        usage="%(prog)s [--dry-run] [--run DIR] [--data DIR] [--recipe NAME] SCRIPT [ARGUMENT …]",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    parser.add_argument("--run", type=Path, default=Path("results"), help="run_pretraining.sh: the run's folder")
    parser.add_argument("--data", type=Path, help="run_pretraining.sh: folder of the corpora")
    parser.add_argument("--recipe", default="bert_large", help="run_pretraining.sh: what its model config stands for")
    parser.add_argument("script", help=", ".join(POSITIONS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as that script takes them, by position")
    options = parser.parse_args()
    script = Path(options.script).name
    arguments = arguments_of(script, options.arguments)
    if script == "run_pretraining.sh":
        command = pretraining_command(arguments, options.run, options.data, options.recipe)
    else:
        command = finetune_command(script, arguments)
    for name in list(POSITIONS[script])[: len(options.arguments)]:
        if name in WITHOUT_COUNTERPART and arguments[name] not in ("", POSITIONS[script][name]):
            print(f"{name} = {arguments[name]} has no counterpart: {WITHOUT_COUNTERPART[name]}", file=sys.stderr)
    print(f"python -m {shlex.join(command)}", flush=True)
    return 0 if options.dry_run else subprocess.run([sys.executable, "-m", *command], check=False).returncode


if __name__ == "__main__":
    run_command(main)
