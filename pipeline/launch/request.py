"""What a call of ``pipeline.submit`` asks for, made once out of its words and of the run that may be there already."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline import batch
from pipeline.config import TASKS, PhaseConfig, Recipe, TaskConfig, load_profile, load_recipe, restore
from pipeline.errors import ConfigError
from pipeline.launch import code, foreign
from pipeline.launch.jobs import Asked, asked_by, no_longer
from pipeline.launch.own import write_recipe
from pipeline.run.rundir import RunDir
from pipeline.stages import Command, recipe_of
from pipeline.strict_toml import homes
from pipeline.words import whole_numbers
from slurm import flags
from slurm.profile import SECTIONS, Profile
from slurm.resources import parse_nodes

SLURM_ONLY = ("chunk", "one-job", "test-only", "write-scripts", "max-gpu-hours", "allow-mixed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of submit. ``stored`` is run.json as it was, empty for a run that is yet to begin.

    ``nodes`` are those of pretraining, least and most; ``asked`` is what jobs of each section ask Slurm for, empty
    without Slurm; ``extra`` goes to sbatch untouched; ``code`` is the digest of the code that the jobs will run.
    """

    run: RunDir
    stored: Mapping[str, Any]
    recipe: Recipe | Command
    profile: Profile
    data_dir: Path
    nodes: tuple[int, int]
    asked: Mapping[str, Asked]
    extra: tuple[str, ...]
    code: str
    settings: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()  # another run makes these
    remake: tuple[str, ...] = ()
    verify: bool = False
    max_gpu_hours: float = 0.0
    allow_mixed: bool = False
    split: bool = False
    split_seeds: bool = False
    one_job: bool = False
    dry_run: str = ""  # plan, sbatch
    write_scripts: Path | None = None
    test_only: bool = False
    replace: bool = False
    upgrade: bool = False
    own: bool = False  # the recipe was written for --text

    @property
    def command(self) -> tuple[str, ...]:
        """The words of a run that is a command's; empty otherwise."""
        return self.recipe.command if isinstance(self.recipe, Command) else ()

    @property
    def local(self) -> bool:
        return self.profile.runner == "local"


def of(words: Sequence[str], command: Sequence[str] | None = None) -> Request:
    """The request of a command line: recipe and profile from it, else from the run. ConfigError, FlagError.

    ``command``: the words behind guard's ``--``, none of them to go on with the run's; None is a call of submit.
    """
    options = parser() if command is None else guard_parser()
    line, given = _given(words, options)
    run = RunDir(given.run)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"--run {run.path}: is a file; name a folder, which may be new")
    stored, own, origin = foreign.read(run)
    # What is to be trained, and where: from the call, from the run, or written for one's own text.
    if given.text or given.start or given.language or given.replay:
        take_own(run, given)
    if not stored and (not (given.recipe or command) or given.cluster is None):
        raise ConfigError(f"{run.path} is not a run yet: name {options.needed}")
    profile = load_profile(given.cluster) if given.cluster is not None else restore(Profile, stored["profile"], origin)
    recipe: Recipe | Command
    if command:
        recipe = Command(command=tuple(command), saves=_saves(run, stored, given.saves))
    elif given.recipe is not None:
        recipe = load_recipe(given.recipe, given.settings, gpus=profile.gpus_per_node > 0)
    else:
        recipe = recipe_of(stored, origin, given.settings)
    foreign.refuse(origin, own, given.cluster is None, profile, isinstance(recipe, Command) and not command)
    if not given.replace:
        refuse_other(run, stored, recipe.name)
    if isinstance(recipe, Command):
        given.data = run.data_dir if command is None else Path.cwd()
    elif command is not None:
        raise ConfigError(f"{run.path} is a run of recipe {recipe.name!r}: go on with python -m pipeline.submit")
    # On how many ranks.
    if given.processes is not None:
        if given.processes < 1:
            raise ConfigError(f"--processes {given.processes}: must be at least 1")
        profile = dataclasses.replace(profile, processes=given.processes)
    nodes = _nodes(line, stored, profile)
    asked: dict[str, Asked] = {}
    if profile.runner == "local":
        _refuse_slurms(profile, given, line)
        ranks = tuners = profile.ranks(1)
    else:
        asked = {section: asked_by(profile, section, nodes, line.flags, os.environ) for section in SECTIONS}
        asked = {section: no_longer(ask, given.chunk) for section, ask in asked.items()} if given.chunk else asked
        ranks, nodes = asked["pretrain"].resources.most_tasks, asked["pretrain"].resources.nodes
        tuners = asked["finetune"].resources.most_tasks
    for name, otherwise in (("max_gpu_hours", 0.0), ("allow_mixed", False)):
        if getattr(given, name) is None:
            setattr(given, name, stored.get(name, otherwise))
    return Request(
        run=run,
        stored=stored,
        recipe=choose_micro_batches(recipe, profile, ranks, tuners, stored, given.settings),
        profile=profile,
        data_dir=_data_dir(run, stored, profile, given),
        nodes=nodes,
        asked=asked,
        extra=line.passthrough,
        code=code.digest() if given.upgrade else code.of_run(stored),
        settings=tuple(given.settings),
        stages=_names(given.stages),
        own=bool(given.text),
        remake=_names(given.remake),
        verify=given.verify,
        **{name: getattr(given, name) for name in (*SWITCHES, *VALUES)},
    )


def _given(words: Sequence[str], options: Options) -> tuple[flags.CommandLine, argparse.Namespace]:
    """Slurm's flags and the command's own options, with what --seeds stands for."""
    line = flags.split(words, sections=SECTIONS)
    given, unknown = options.parse_known_args(line.rest)
    if unknown:
        odd = [_unknown(word, options) for word in unknown if word.startswith("-")]
        raise ConfigError("\n".join(odd) or f"{' '.join(unknown)}: belongs to no option; --help lists them")
    if given.seeds:
        task, seeds = given.seeds
        if task not in TASKS:
            raise ConfigError(f"--seeds {task}=…: repeats pretraining as pipeline.submit, or {', '.join(TASKS)}")
        given.settings.append(f"{task}.seeds={seeds}")
    keys = [setting.partition("=")[0].strip() for setting in given.settings]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        print(f"--set {key}: given {keys.count(key)} times, the last one counts", file=sys.stderr)
    return line, given


def _nodes(line: flags.CommandLine, stored: Mapping[str, Any], profile: Profile) -> tuple[int, int]:
    """Least and most nodes of pretraining: those of the call, else the run's."""
    wanted = [flag.value for flag in line.flags if flag.name == "nodes" and flag.section in ("", "pretrain")]
    nodes = parse_nodes(wanted[-1] if wanted else str(stored.get("node_range", "1")))
    if wanted and profile.runner == "local" and nodes != (1, 1):
        raise ConfigError(
            f"--nodes {wanted[-1]}: cluster profile {profile.name!r} is this machine alone; --processes N says how "
            "many ranks it has, --cluster names a profile of a site with nodes"
        )
    return nodes


def seeds_of(text: str) -> tuple[str, list[int]]:
    """``mrpc=0-4,7``: what to repeat, and the seeds, for argparse."""
    what, _, numbers = text.partition("=")
    seeds = whole_numbers(numbers, 0, 2**63 - 1)
    if what not in ("pretrain", *TASKS) or not 0 < len(seeds) == len(set(seeds)):
        raise argparse.ArgumentTypeError(f"{text}: as in pretrain=0-4 or mrpc=0-9,20, and none twice")
    return what, seeds


SWITCHES = {
    "split": "one job for each stage",
    "split_seeds": "one job for each seed of a fine-tuning task",
    "one_job": "the whole chain in one job, stage after stage, where a site lets wait only one or two",
    "test_only": "ask Slurm when the jobs would start, on each of --nodes 1,2,4; send nothing",
    "replace": "cancel jobs of this run that are at work; let another recipe take it over",
    "upgrade": "go on with the code of this checkout instead of the code with which the run began",
}
VALUES = ("dry_run", "write_scripts", "max_gpu_hours", "allow_mixed")  # taken over as they were given
OF_CHAIN = ("split", "split_seeds", "one_job")  # what guard has not


class Options(argparse.ArgumentParser):
    """Refuses in one line; ``needed`` is what a run must be told at least."""

    needed, example = "a --recipe and a --cluster, or your own --text", "--text FOLDER --run runs/mine"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; as in {self.prog} {self.example}, --help lists the options")


def _unknown(word: str, options: Options) -> str:
    """What to do about an option that is none of the command's."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if keys := homes(Recipe, name, ("phase1",)):
        return f"{word}: a value of the recipe; change it with --set {keys[0]}=VALUE{_also(keys[1:])}"
    return f"{word}: no option of {options.prog.rpartition('.')[2]}; --help lists them"


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _also(keys: Sequence[str]) -> str:
    return f" (there are {', '.join(keys)}, too)" if keys else ""


def refuse_other(run: RunDir, stored: Mapping[str, Any], name: str) -> None:
    """ConfigError where a run with finished stages is another recipe's."""
    whose = (stored.get("recipe") or {}).get("name", name)
    done = sorted(path.parent.name for path in run.path.glob("stages/*/done.json"))
    if whose != name and done:
        raise ConfigError(
            f"{run.path} is a run of recipe {whose!r}, not {name!r}, and has finished {', '.join(done)}: name "
            f"another --run; or give --replace, and what {name!r} makes anew goes to {run.path / 'old'}"
        )


def parser() -> Options:
    """Submit's own options; Slurm's are taken out before."""
    options = Options(
        prog="python -m pipeline.submit",
        description="Make or continue a run and send its chain to this machine or to Slurm.",
        epilog="Slurm's options keep their names and letters (-p gpu -A project -t 2-00:00:00) and mean pretraining; "
        "-p data=cpu addresses the jobs of one kind (data, pretrain, finetune), --no-qos removes what the profile "
        "says, and words after -- go to sbatch untouched.",
    )
    options.set_defaults(saves=None)
    add = options.add_argument
    add("--recipe", help="what to train: a name in pipeline/recipes or a .toml file (default: the run's)")
    text_help = "your own text: a folder, or files; the recipe is written for it, to RUN/recipe.toml"
    add("--text", type=Path, nargs="+", default=[], metavar="PATH", help=text_help)
    add("--language", metavar="CODE", help="of --text (default: en)")
    replay_help = "with --text: general text to mix in a tenth of, against forgetting (see data.replay_share)"
    add("--replay", type=Path, nargs="+", default=[], metavar="PATH", help=replay_help)
    start_help = "with --text: go on from this model, a Hugging Face folder or NVIDIA's .pt"
    add("--start", type=Path, metavar="PATH", help=start_help)
    add("--data", type=Path, help="folder of the corpora that the recipe names (default: the profile's)")
    add("--stages", help="run only these, separated by commas")
    seeds_help = "pretrain=0-4: all training in RUN/seed-N, on the data of RUN/data; mrpc=0-99: this task with each"
    add("--seeds", type=seeds_of, metavar="WHAT=N-M", help=seeds_help)
    set_help = "change a recipe value, such as phase1.steps=100"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=set_help)
    chunk_help = "no job runs longer, as 90m or 2h: it is queued again and goes on, let in between larger ones"
    add("--chunk", metavar="TIME", help=chunk_help)
    add("--verify", action="store_true", help="read all samples again to check them, also those checked last week")
    return _sent(options, tuple(SWITCHES))


def guard_parser() -> Options:
    """Guard's own options; Slurm's and the command are taken out before."""
    options = Options(
        prog="python -m pipeline.guard",
        usage="python -m pipeline.guard [options, also Slurm's] -- COMMAND [WORD ...]",
        description="Run a command that goes on by itself when it is started again, as the stages of a chain are run.",
        epilog="Slurm's options keep their names and letters (-p gpu -A project -t 2-00:00:00 --ntasks-per-node=1).",
    )
    options.needed = "a --cluster, --saves PATH and, behind --, the command"
    options.example = "--run runs/mine --cluster generic --saves checkpoints -- python train.py"
    absent = dict.fromkeys(("recipe", "language", "start", "data", "stages", "seeds", "chunk"))
    options.set_defaults(**absent, **dict.fromkeys(OF_CHAIN, False), text=[], replay=[], settings=[], verify=False)
    saves_help = "file or folder that holds what the command saves: changed, the attempt made progress"
    options.add_argument("--saves", type=Path, metavar="PATH", help=saves_help)
    return _sent(options, tuple(name for name in SWITCHES if name not in OF_CHAIN))


def _sent(options: Options, switches: Sequence[str]) -> Options:
    """``options`` with those on the run and on how it is sent."""
    add = options.add_argument
    add("--run", type=Path, required=True, help="run directory: everything of this training")
    add("--cluster", help="how the site runs jobs: a name in slurm/profiles or a .toml file (default: the run's)")
    # taken out with Slurm's flags; named here to be explained
    nodes_help = "nodes for pretraining, as 32 or 16-32; the global batch stays the same (default: the run's, else 1)"
    add("--nodes", "-N", help=nodes_help)
    add("--processes", type=int, help="local runner: ranks in training and data workers")
    remake_help = "make these again with all that follows, though they are done; what is there goes to RUN/old"
    add("--remake", metavar="STAGES", help=remake_help)
    add = options.add_argument_group("Slurm").add_argument
    for name in switches:
        add(f"--{name.replace('_', '-')}", action="store_true", help=SWITCHES[name])
    dry_help = "show the jobs and where each setting comes from; =sbatch: begin the run, print its first job's file"
    add("--dry-run", nargs="?", const="plan", default="", choices=("plan", "sbatch"), help=dry_help)
    add("--write-scripts", type=Path, metavar="DIR", help="write batch files and submit.sh; send nothing")
    hours_help = "stop when all attempts of all jobs of the run have spent so much; 0: no limit (default: the run's)"
    add("--max-gpu-hours", type=hours, metavar="H", help=hours_help)
    add("--allow-mixed", action="store_true", default=None, help="let GPUs of different models share a job")
    options.add_argument("--share", choices=["group"], help="the group may write the run, what is made later included")
    return options


def _saves(run: RunDir, stored: Mapping[str, Any], given: Path | None) -> str:
    """--saves relative to the run, or the run's own."""
    known = stored.get("recipe", {}).get("saves")
    if given is None and not known:
        raise ConfigError("--saves PATH is missing: what the command saves, to tell progress from starting in vain")
    return str(known) if given is None else os.path.relpath(given.resolve(), run.path.resolve())


def take_own(run: RunDir, given: argparse.Namespace) -> None:
    """Write the recipe for ``--text`` and put it, its data and the cluster into ``given``."""
    if given.recipe is not None or given.data is not None:
        raise ConfigError("--text writes a recipe and knows its data: give no --recipe and no --data with it")
    given.cluster = given.cluster or "local"
    profile = load_profile(given.cluster)
    given.recipe, given.data = write_recipe(run, given.text, given.language, given.start, profile, given.replay)
    given.recipe = str(given.recipe)


def hours(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours")
    return value


def _refuse_slurms(profile: Profile, given: argparse.Namespace, line: flags.CommandLine) -> None:
    """ConfigError for Slurm's options where there is no Slurm."""
    names = [flag.name for flag in line.flags if flag.name != "nodes"]
    names += [name for name in SLURM_ONLY if getattr(given, name.replace("-", "_"))]
    names += ["dry-run=sbatch"] if given.dry_run == "sbatch" else []
    if names or line.passthrough:
        named = ", ".join(f"--{name}" for name in names) or " ".join(line.passthrough)
        raise ConfigError(f"{named}: means nothing to cluster profile {profile.name!r}, which has no Slurm")


def _data_dir(run: RunDir, stored: Mapping[str, Any], profile: Profile, given: argparse.Namespace) -> Path:
    """--data, else where the run found its corpora, else (a copy from another site) the folder of the profile."""
    if given.data is not None:
        return Path(given.data)
    known = stored and (given.cluster is None or run.data_dir.is_dir())
    return run.data_dir if known else Path(profile.data_dir)


def choose_micro_batches(
    recipe: Recipe | Command,
    profile: Profile,
    ranks: int,
    tuners: int,
    stored: Mapping[str, Any],
    settings: Sequence[str],
) -> Recipe | Command:
    """The recipe with the micro_batch of each phase and task fixed: chosen when the run is created, kept afterwards.

    ``ranks`` train the phases, ``tuners`` the tasks. A command stays as it is.
    """
    if isinstance(recipe, Command):
        return recipe

    def chosen(name: str, global_batch: int, ranks: int) -> int:
        kept = (stored.get("recipe", {}).get(name) or {}).get("micro_batch")
        if kept and not any(s.partition("=")[0].strip() == f"{name}.micro_batch" for s in settings):
            return min(int(kept), global_batch)
        return batch.plan(global_batch, micro_batch_limit(recipe, profile, name), ranks).micro_batch

    phases, tasks = {}, {}
    for name, phase in recipe.phases.items():
        phases[name] = dataclasses.replace(phase, micro_batch=chosen(name, phase.global_batch, ranks))
    for name in TASKS:
        if (task := getattr(recipe, name)) is not None:
            tasks[name] = dataclasses.replace(task, micro_batch=chosen(name, task.batch, tuners))
    return dataclasses.replace(recipe, phases=phases, **tasks)


def micro_batch_limit(recipe: Recipe, profile: Profile, name: str) -> int:
    """A phase's or task's micro_batch limited by the profile's, which is said; ConfigError when neither names one."""
    part: PhaseConfig | TaskConfig = recipe.phases.get(name) or getattr(recipe, name)
    key = f"{recipe.name}.{name}.{part.precision if isinstance(part, TaskConfig) else recipe.train.precision}"
    wanted, allowed = part.micro_batch, profile.micro_batch.get(key)
    if wanted and allowed and allowed < wanted:
        print(f"{key}: micro_batch = {wanted} is more than cluster profile {profile.name!r} allows in [micro_batch]: "
              f"{allowed} is taken", file=sys.stderr)  # fmt: skip
    given = [value for value in (wanted, allowed) if value]
    if not given:
        raise ConfigError(
            f"no micro_batch for {key}: cluster profile {profile.name!r} has no such key in "
            f"[micro_batch]; add it, or give --set {name}.micro_batch=N"
        )
    return min(given)
