"""Twenty kinds of harm in every file of a run folder: status and report say it in a line or leave it out, at once."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import SampleSet, ShardFile, verify_share
from data_prep.publish import file_sha256, publish_json
from pipeline.errors import describe
from pipeline.monitor.sampler import Sampler
from pipeline.node.job import Job, Topology
from pipeline.node.supervise import Watch
from pipeline.report.facts import gather
from pipeline.report.render import render
from pipeline.run.chain import Chain
from pipeline.run.rundir import Attempt, RunDir
from pipeline.run.state import Sent, events_of
from pipeline.status import account_of, look
from pipeline.watch import print_log
from slurm.verdict import begin_try
from support.reporting import HOSTILE, SCORES, begin, finish, start, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(20)]  # nothing is waited for

PHASE = "stages/phase1"
FILES = (
    *("run.json", "events.jsonl", "jobs.json", "lock", f"{PHASE}/stage.json", f"{PHASE}/done.json"),
    *(f"{PHASE}/attempts/0001/{name}" for name in ("owner.json", "attempt.json", "verdict.json", "metrics.jsonl")),
    *("gpu/n1.jsonl", "stages/phase2/attempts/0001/verdict.json", "stages/squad/scores.json"),
    *("stages/squad/done.json", "stages/phase2/attempts/0001/metrics.jsonl", "cancel"),
)
TALL = 200_000


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return change


def values(*odd: Any, keys: bool = False) -> Callable[[Path], object]:
    """Every value of the file's objects, however deep, is one of ``odd`` in turn; or every key is."""

    def odd_one(value: Any, name: str, at: Iterator[Any]) -> Any:
        if isinstance(value, dict):
            return {(f"{next(at)}" if keys else key): odd_one(inner, key, at) for key, inner in value.items()}
        if name in ("fingerprint", "event", "stage", "format") or keys:
            return value  # else the rest of the file would not be looked at
        return [odd_one(inner, "", at) for inner in value] if isinstance(value, list) else next(at)

    def change(path: Path) -> None:
        turns = (value for _ in range(10_000) for value in odd)
        if path.name == "run.json":  # its recipe is refused as a whole: see test_hostile_input.py
            record = json.loads(path.read_text())
            kept = {key: record[key] for key in ("format", "recipe", "profile")}
            texts = [json.dumps({**{key: next(turns) for key in record}, **kept})]
        else:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            texts = [json.dumps(odd_one(json.loads(line), "", turns)) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))

    return change


def more(text: bytes) -> Callable[[Path], object]:
    """A line behind those of a JSON-lines file, or in the place of any other."""
    return lambda path: path.write_bytes((path.read_bytes() if path.suffix == ".jsonl" else b"") + text + b"\n")


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": instead(os.mkfifo),
    "an endless device": instead(lambda path: path.symlink_to("/dev/zero")),
    "a terminal": instead(lambda path: path.symlink_to("/dev/tty")),
    "a folder": instead(Path.mkdir),
    "a loop": instead(lambda path: path.symlink_to(path.name)),
    "a link to nothing": instead(lambda path: path.symlink_to("/nothing/here")),
    "empty": more(b""),
    "a terabyte": lambda path: os.truncate(path, 1 << 40),
    "a line of 40 MB": more(b'{"step": 701, "loss": 1.0, "x": "' + b"A" * 40_000_000 + b'"}'),
    "deep": more(b"[" * TALL + b"]" * TALL),
    "deep objects": more(b'{"a":' * TALL),
    "not UTF-8": more(b"\xff\xfe\x00\x80"),
    "5,000 digits": more(b'{"step": ' + b"9" * 5000 + b', "time": 1e400}'),
    "no object": more(b'[1, 2]\n"s"\n5\nnull\n{"a": 1}'),
    "null": values(None),
    "texts": values("x", HOSTILE),
    "lists and objects": values([], {}, [[1]], {"a": {}}),
    "beyond numbers": values(float("nan"), float("inf"), -float("inf"), 10**4000, 1e308),
    "large and negative": values(1e18, -1, 1e300, -1e300, 10**30),
    "truths": values(True, False),
    "names": values("__class__", HOSTILE, "../../etc", "²", "", keys=True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has all the files, its second phase ended by a fault."""
    chain = begin(tmp_path_factory.mktemp("hostile") / "run")
    for name in ("extract", "shard", "vocab", "samples_128", "samples_512"):
        start(chain, name)
        finish(chain, name, {})
    first = start(chain, "phase1")
    train(first, "phase1", 1, 50, None, 400)
    first.write_verdict(75, "asked to stop", 0)
    samples = chain.run.path / "gpu"
    samples.mkdir()
    sample = {"job": "1", "stage": "phase1", "attempt": 1, "node": "n1", "gpu": 0, "uuid": "u", "name": "H100"}
    figures = {"utilization_pct": 50, "power_w": 100.5, "energy_j": 1.0, "throttle": ["power"], "xid": [79]}
    lines = [json.dumps({"time": 1.7e9 + second, **sample, **figures}) for second in range(20)]
    (samples / "n1.jsonl").write_text("\n".join(lines) + "\n")
    finish(chain, "phase1", {"checkpoint": "attempts/0001/step-00000400", "step": 400, "samples": 25600})
    train(start(chain, "phase2"), "phase2", 1, 25, None, 30)
    chain.run.stage("phase2").attempts[0].write_verdict(5, "loss is not finite", 0)
    dataset, scores, examples = SCORES["squad"]
    finish(chain, "squad", {"scores": scores, "examples": examples})
    record = {"task": "squad", "dataset": dataset, "scores": scores, "seeds": [{"seed": 1, "scores": scores}]}
    (chain.run.stage("squad").path / "scores.json").write_text(json.dumps(record))
    for event in ("slow_rank", "rolled_back", "gpu_health"):
        chain.run.event(
            event, stage="phase1", attempt=1, step=4, rank=3, host="h", ratio=1.6, line="l", node="n1", gpu=0
        )
    with chain.run.held():
        pass
    chain.run.cancel_request.write_text("{}")
    job = {"name": "phase1", "stages": ["phase1"], "needs": [], "held_by_us": False, "id": ""}
    (chain.run.path / "jobs.json").write_text(json.dumps({"submission": "a", "state": "released", "jobs": [job]}))
    return chain.run.path


def told(run: RunDir) -> Iterator[str]:
    """What the commands say, or why they do not."""
    rows = []
    for say in (
        lambda: "\n".join(look(run, short=False)[0]),
        lambda: rows.append(Sent.of(run)) or str(look(run, short=True)[0]),
        lambda: json.dumps(times.to_dict()) if (times := account_of(Chain.of(run), events_of(run), [])) else "",
        lambda: render(gather(run, held=False)),
        lambda: " ".join(Chain.of(run).older()),
    ):
        try:
            yield say()
        except Exception as error:
            line, code = describe(error)
            if code == 1:
                raise
            yield line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_harm_in_a_file_costs_its_own_figures_at_most(kind: str, name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    KINDS[kind](tmp_path / "run" / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in told(RunDir(tmp_path / "run")):
        assert all(character.isprintable() or character in "\n\xa0" for character in text)
        assert not (text.startswith("<!") and "<script" in text)
        assert len(text) < 2_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("name", ["²", "٣", "0001 ", "-1", "9" * 200, "\x1b[31m", "\udcff"])
def test_folders_of_odd_names_are_no_attempts(name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / PHASE / "attempts" / name).mkdir()
    assert len(RunDir(tmp_path / "run").stage("phase1").attempts) == 1
    assert len(list(told(RunDir(tmp_path / "run")))) == 5


@pytest.mark.parametrize("place", [f"{PHASE}/attempts", PHASE, "stages"])
@pytest.mark.parametrize("kind", ["a pipe", "a loop", "a terminal", "a link to nothing"])
def test_harm_in_place_of_a_folder(kind: str, place: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / place)
    KINDS[kind](tmp_path / "run" / place)
    assert len(list(told(RunDir(tmp_path / "run")))) == 5


def test_nothing_is_written_into_a_pipe(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    for name in ("lock", "events.jsonl"):
        KINDS["a pipe"](tmp_path / "run" / name)
    run = RunDir(tmp_path / "run")
    for write in (lambda: run.held().__enter__(), lambda: run.event("submitted")):
        with pytest.raises(OSError, match="no plain file") as caught:
            write()
        assert describe(caught.value)[1] == 6


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which whoever may write into the run could plant: the file behind it is another of the user's own."""
    run, precious = begin(tmp_path / "run").run, tmp_path / "precious"
    precious.write_text("precious\n")
    attempt = run.stage("phase1").new_attempt("1-0-0")
    job = Job(run, "phase1", attempt, Topology(0, 1, 0, "1-0-0"), workers=1, threads=1)
    stacks = open(precious, "rb")  # noqa: SIM115
    watch = Watch(job, os.getpid(), stacks, [])
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    sampler = Sampler(run.path / "gpu", {"node": "n"}, say=print, on_warning=print, on_fatal=print, begun=0.0)
    sampler._lines.append("{}\n")
    samples = SampleSet(8, 9, "", 1, {}, (ShardFile(precious, 1, 1, 9, file_sha256(precious)),), "")
    writers: dict[str, Callable[[], object]] = {
        "lock": lambda: run.held().__enter__(),
        "begin.lock": lambda: run.stage("phase1").beginning().__enter__(),
        "events.jsonl": lambda: run.event("submitted"),
        f"{PHASE}/attempts/0001/log.txt": lambda: job.say("$(touch x)"),
        f"{PHASE}/attempts/0001/stacks.txt": watch._keep_stacks,
        f"{PHASE}/attempts/0001/verdict.json": lambda: attempt.write_verdict(1, "x", 0),
        "gpu/n.jsonl": sampler._write,
        f"{PHASE}/attempts/0001/precious.json": lambda: verify_share(samples, attempt.path),
        "jobs/local-x.tries": lambda: begin_try("x", run.path / "jobs/local-x.tries"),
        "run.json": lambda: publish_json(run.path / "run.json", {}),
    }
    for name in ("jobs", "gpu"):
        (run.path / name).mkdir()
    for name, write in writers.items():
        for target in (precious, tmp_path / "new"):
            (run.path / name).unlink(missing_ok=True)
            (run.path / name).symlink_to(target)
            with contextlib.suppress(OSError):
                write()
            assert precious.read_text() == "precious\n", name
            assert not (tmp_path / "new").exists(), name
    watch.bell.close()
    stacks.close()


def test_a_log_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = Attempt(tmp_path)
    attempt.log.write_bytes(b"one\n\x1b[2J\xfftwo\nhalf")
    assert print_log(attempt) == attempt.log.stat().st_size
    assert capsys.readouterr().out == "one\n\\x1b[2J\\xfftwo\nhalf"
    KINDS["a pipe"](attempt.log)
    with pytest.raises(OSError, match="no plain file"):
        print_log(attempt)


def test_looking_at_a_run_opens_nothing_for_writing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is all that `status` and the report need of a run of somebody else."""
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *more, **words: opened.append(flags) or real(path, flags, *more)
    )
    plain = open

    def other_open(path: Any, *more: Any, **words: Any) -> Any:
        assert str(whole) not in str(path)
        return plain(path, *more, **words)

    monkeypatch.setattr("builtins.open", other_open)
    with RunDir(whole).held():
        opened.clear()
        assert RunDir(whole).is_held()
        assert len(list(told(RunDir(whole)))) == 5
    assert len(opened) > 20
    assert not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flags in opened)
