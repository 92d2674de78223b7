"""Fine-tune a BERT on files of SQuAD, MRPC, SST-2, CoLA, MNLI or of classes of your own; score it; predict with it."""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.fanout import die_with_parent
from data_prep.liveness import keep_freed_memory
from data_prep.publish import publish_json
from pipeline.config import PRECISIONS, ClassifyConfig, FinetuneConfig, restore
from pipeline.errors import ConfigError, PeerLost, run_command
from pipeline.finetune.options import CLASSIFY, DEFAULTS, MODES
from pipeline.node.bell import ring, until
from pipeline.node.job import Job, Topology
from pipeline.node.preempt import StopRequest
from pipeline.run.rundir import RunDir
from pipeline.words import absent_model

if TYPE_CHECKING:
    from pipeline.finetune.task import Spec

LAUNCH, PARENT = "PIPELINE_LAUNCH", "PIPELINE_PARENT"  # set: this process is one of the ranks that the command started

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


def main() -> int:
    """Parse the command line, fine-tune every seed, print the scores."""
    arguments = _parser().parse_args()
    if parent := os.environ.get(PARENT):
        die_with_parent(int(parent))
    config = _config(arguments)
    modes = tuple(arguments.mode.split(","))
    keep_freed_memory()
    _check(arguments, config, modes)
    if arguments.processes > 1 and LAUNCH not in os.environ:
        return _start_ranks(arguments.processes)

    from pipeline.finetune.scores import collect
    from pipeline.finetune.task import Spec, finetune

    every_seed = Spec(
        task=arguments.task,
        config=config,
        model=_model_folder(arguments),
        train=arguments.train,
        eval=arguments.eval,
        mismatched=arguments.eval_mismatched,
        modes=modes,
        max_steps=arguments.max_steps,
    )
    run = RunDir(arguments.out)
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.processes)
    for seed in config.seeds:
        spec = replace(every_seed, config=replace(config, seeds=(seed,)))
        finetune(_job(run, f"{arguments.task}-{seed}", threads, spec), spec)
    if Topology.of(os.environ).rank > 0:
        return 0
    scores = collect(arguments.out, [run.stage(f"{arguments.task}-{seed}").path for seed in config.seeds])
    line = ", ".join(f"{name} {value:.2f} %" for name, value in scores["scores"].items())
    seeds = scores.get("seeds", [])
    several = f" (seed {scores['best_seed']}, the best of {len(seeds)})" if len(seeds) > 1 else ""
    print(f"{scores['dataset']}: {line or 'not scored'}{several}; {arguments.out}/scores.json")
    return 0


def _check(arguments: argparse.Namespace, config: FinetuneConfig, modes: tuple[str, ...]) -> None:
    """Refuse what cannot work together, before anything heavy is imported or written."""
    if not arguments.model.exists():
        raise ConfigError(absent_model(arguments.model, "--model"))
    for mode, name in (("train", "train"), ("eval", "eval"), ("prediction", "eval")):
        if mode in modes and getattr(arguments, name) is None:
            raise ConfigError(f"--mode {arguments.mode} needs --{name} FILE")
    if arguments.eval_mismatched and arguments.task != "mnli":
        raise ConfigError(f"--eval-mismatched belongs to mnli, not {arguments.task}")
    if arguments.task != CLASSIFY and (arguments.text or arguments.label):
        raise ConfigError(f"--text and --label belong to classify; {arguments.task} has its own columns")
    if isinstance(config, ClassifyConfig) and not len(config.text) == len({*config.text, config.label}) - 1 <= 2:
        raise ConfigError(
            f"--text {arguments.text}: name one or two columns, each once, and not {config.label!r} (--label)"
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"--seed {' '.join(map(str, config.seeds))}: give at least one, none twice")
    if "train" in modes and "eval" not in modes and len(config.seeds) > 1:
        raise ConfigError(f"{len(config.seeds)} seeds cannot be compared without mode eval; give one seed")
    if (arguments.out / "model").is_dir() and not (arguments.out / "model").is_symlink():
        raise ConfigError(f"{arguments.out / 'model'} was not made by this command; choose another output folder")


def _job(run: RunDir, stage: str, threads: int, spec: Spec) -> Job:
    """This process's part of the next attempt at one seed; the attempts of another training are dropped."""
    topology = Topology.of(os.environ)
    topology = replace(topology, launch=f"{topology.launch}/{stage}")
    folder = run.stage(stage)
    if topology.rank > 0:
        wait = functools.partial(until, topology, "attempt", timeout_s=60.0, opens=2)
        attempt = folder.join_attempt(topology.launch, wait)
        if attempt is None:
            raise PeerLost(f"{stage}: rank {topology.rank} waited for rank 0, which began no attempt")
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        trained = replace(spec, task=stage, eval=None, mismatched=None, modes=("train",), max_steps=None)
        made_from = {"training": trained.identity}
        if folder.begun != made_from:
            shutil.rmtree(folder.path / "attempts", ignore_errors=True)
            publish_json(folder.path / "stage.json", made_from)
        attempt = folder.new_attempt(topology.launch)
        ring(topology, "attempt")
    stop = StopRequest()
    stop.listen()
    return Job(run, stage, attempt, topology, workers=1, threads=threads, stop=stop)


def _start_ranks(processes: int) -> int:
    """This command once more in so many processes, one per GPU where there are GPUs; the code of the first failure."""
    environment = {**os.environ, LAUNCH: secrets.token_hex(8), PARENT: str(os.getpid()), "WORLD_SIZE": str(processes)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pipeline.finetune", *sys.argv[1:]]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def stop(*_: object) -> None:
        for rank in ranks:
            rank.terminate()  # they save and end with 75

    signal.signal(signal.SIGTERM, stop)
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.05)
        killed = next((rank for rank, code in enumerate(codes) if code and code < 0), None)
        if killed is not None and not any(code and code > 0 for code in codes):
            raise PeerLost(
                f"rank {killed} of {processes} was killed by signal {-(codes[killed] or 0)}; the same command goes on; "
                "where memory was short, lower --micro-batch or --processes"
            )
        return next((code for code in codes if code and code > 0), 0)
    finally:  # one failed, or Ctrl-C: the others would wait for it
        stop()
        for rank in ranks:
            rank.wait()


def _model_folder(arguments: argparse.Namespace) -> Path:
    """``--model``; an NVIDIA checkpoint with its --config and --vocab becomes a folder in --out first."""
    if arguments.model.is_dir() or not (arguments.config or arguments.vocab):
        return Path(arguments.model)
    if not (arguments.config and arguments.vocab):
        raise ConfigError(f"--model {arguments.model} is a single file: give its --config FILE and --vocab FILE, both")

    from pipeline.export import folder_of_nvidia

    return folder_of_nvidia(arguments.model, arguments.config, arguments.vocab, arguments.out / "start")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.finetune",
        description=__doc__,
        epilog="Writes scores.json, predictions.json (squad: nbest_predictions.json) and the fine-tuned model "
        "as a Hugging Face folder, model, into --out.",
    )
    add = parser.add_argument
    add("task", choices=DEFAULTS, help="which file format and head")
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, or NVIDIA's .pt, to start from")
    add("--config", type=Path, metavar="FILE", help="of a .pt: its bert_config.json")
    add("--vocab", type=Path, metavar="FILE", help="of a .pt: its vocab.txt")
    add("--train", type=Path, metavar="FILE", help="labelled file to train on")
    add("--eval", type=Path, metavar="FILE", help="file to score on or to predict")
    add("--eval-mismatched", type=Path, metavar="FILE", help="mnli: a second file to score on, apart")
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--text", metavar="COLUMN[,COLUMN]", help="classify: one or two (default: text, sentence)")
    add("--label", metavar="COLUMN", help="classify: of the classes (default: label)")
    add("--dataset", metavar="NAME", help="name shown in scores.json (default: name of --eval)")
    add(
        "--mode",
        default="train,eval",
        metavar="MODES",
        help=f"comma-separated, of {', '.join(MODES)} (default: %(default)s); prediction needs no labels",
    )
    add("--seed", type=int, nargs="+", metavar="N", help="one or more; every one is trained")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    add("--processes", type=int, default=1, metavar="N", help="ranks that train together (default: 1)")
    add("--max-steps", type=int, metavar="N", help="end after so many steps, whatever --epochs says")
    add("--threads", type=int, metavar="N", help="CPU threads of each process (default: the cores, shared)")
    add("--version-2", action="store_true", help="squad: questions may have no answer")
    defaults = {f.name: f.default for f in fields(FinetuneConfig) if f.default is not MISSING}
    for name, text in HELP.items():
        kind = {"int": int, "float": float}[str(FinetuneConfig.__annotations__[name])]
        values = [defaults.get(name)] if name in defaults else [f"{t} {v[name]}" for t, v in DEFAULTS.items()]
        listed = ", ".join(map(str, values))
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} (default: {listed})")
    return parser


def _config(arguments: argparse.Namespace) -> FinetuneConfig:
    """The task's defaults with what the command line changed; ConfigError with a line for each bad value."""
    source = arguments.eval or arguments.train
    given = {key: getattr(arguments, key) for key in (*HELP, "precision", "version_2")}
    given["dataset"] = arguments.dataset or (source.name if source else arguments.task)
    given["seeds"] = arguments.seed
    kind = ClassifyConfig if arguments.task == CLASSIFY else FinetuneConfig
    if kind is ClassifyConfig:
        given |= {"text": arguments.text.split(",") if arguments.text else None, "label": arguments.label}
    changed = {key: value for key, value in given.items() if value is not None}
    for name in ("threads", "processes", "max_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return restore(kind, DEFAULTS[arguments.task] | changed, "command line")


if __name__ == "__main__":
    run_command(main)
