"""Fine-tune a BERT on SQuAD, MRPC, SST-2, CoLA or MNLI files, score it, and predict with it."""

from __future__ import annotations

import argparse
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import PRECISIONS, FinetuneConfig, restore
from pipeline.errors import ConfigError, run_command
from pipeline.finetune.options import DEFAULTS, MODES

if TYPE_CHECKING:
    from pipeline.run.rundir import Attempt

HELP = {
    "epochs": "passes over the training file",
    "batch": "sequences per optimizer step",
    "micro_batch": "sequences computed at a time; lower it when memory is short",
    "learning_rate": "highest learning rate",
    "warmup": "share of all steps over which it rises; then it falls to 0",
    "weight_decay": "of all weights but biases and LayerNorm",
    "max_seq_len": "tokens; longer inputs are cut (squad: into windows)",
    "doc_stride": "squad: tokens from one window to the next",
    "max_query_length": "squad: tokens of the question that are kept",
    "n_best": "squad: answers listed per question",
    "max_answer_length": "squad: tokens",
    "null_threshold": "squad with --version-2: lead that no answer needs over the best answer",
}


@dataclass(frozen=True)
class CommandJob:
    """A stage's job when there is no run: everything goes to the folder ``out`` and to standard output."""

    out: Path
    stage: str
    threads: int
    attempt: Attempt
    workers: int = field(default=1)

    def say(self, line: str) -> None:
        """One progress line."""
        print(f"{self.stage}: {line}", flush=True)


def main() -> int:
    """Parse the command line, fine-tune, print the scores."""
    arguments = _parser().parse_args()
    config = _config(arguments)
    modes = tuple(arguments.mode.split(","))
    for mode, name in (("train", "train"), ("eval", "eval"), ("prediction", "eval")):
        if mode in modes and getattr(arguments, name) is None:
            raise ConfigError(f"--mode {arguments.mode} needs --{name} FILE")

    if arguments.eval_mismatched and arguments.task != "mnli":
        raise ConfigError(f"--eval-mismatched belongs to mnli, not {arguments.task}")

    from pipeline.finetune.loop import finetune
    from pipeline.run.rundir import StageDir

    arguments.out.mkdir(parents=True, exist_ok=True)
    attempt = StageDir(arguments.out).new_attempt(f"{os.getpid()}")
    job = CommandJob(arguments.out, arguments.task, arguments.threads, attempt)
    result = finetune(
        job,
        task=arguments.task,
        config=config,
        model=arguments.model,
        train=arguments.train,
        eval=arguments.eval,
        modes=modes,
        mismatched=arguments.eval_mismatched,
    )
    scores = ", ".join(f"{name} {value:.2f} %" for name, value in result["scores"].items())
    seeds = result.get("seeds", [])
    several = f" (seed {result['best_seed']}, the best of {len(seeds)})" if len(seeds) > 1 else ""
    print(f"{result['dataset']}: {scores or 'not scored'}{several}; {arguments.out}/scores.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.finetune",
        description=__doc__,
        epilog="Writes scores.json, predictions.json (squad: nbest_predictions.json) and the fine-tuned model "
        "as a Hugging Face folder, model, into --out.",
    )
    parser.add_argument("task", choices=DEFAULTS, help="which file format and head")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder to start from")
    parser.add_argument("--train", type=Path, metavar="FILE", help="labelled file to train on")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="file to score on or to predict")
    parser.add_argument("--eval-mismatched", type=Path, metavar="FILE", help="mnli: a second file to score on, apart")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--dataset", metavar="NAME", help="name shown in scores.json (default: name of --eval)")
    parser.add_argument(
        "--mode",
        default="train,eval",
        metavar="MODES",
        help=f"comma-separated, of {', '.join(MODES)} (default: %(default)s); prediction needs no labels",
    )
    parser.add_argument("--seed", type=int, nargs="+", metavar="N", help="one or more; every one is trained")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads")
    parser.add_argument("--version-2", action="store_true", help="squad: questions may have no answer")
    shown = {f.name: f.default for f in fields(FinetuneConfig) if f.default is not MISSING}
    for name, text in HELP.items():
        kind = {"int": int, "float": float}[str(FinetuneConfig.__annotations__[name])]
        values = [shown.get(name)] if name in shown else [f"{t} {v[name]}" for t, v in DEFAULTS.items()]
        listed = ", ".join(map(str, values))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} (default: {listed})")
    return parser


def _config(arguments: argparse.Namespace) -> FinetuneConfig:
    """The task's defaults with what the command line changed; ConfigError with a line for each bad value."""
    source = arguments.eval or arguments.train
    given = {key: getattr(arguments, key) for key in (*HELP, "precision", "version_2")}
    given["dataset"] = arguments.dataset or (source.name if source else arguments.task)
    given["seeds"] = arguments.seed
    changed = {key: value for key, value in given.items() if value is not None}
    if arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads}: must be at least 1")
    return restore(FinetuneConfig, DEFAULTS[arguments.task] | changed, "command line")


if __name__ == "__main__":
    run_command(main)
