"""A run's figures in Weights & Biases, with its own package in offline mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault
from pipeline.run.files import append_jsonl
from pipeline.track import main, send
from support.reporting import Chain, finished_run

wandb = pytest.importorskip("wandb", reason="wandb is not installed: figures are sent nowhere")


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return finished_run(tmp_path / "run")


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (folder / "wandb").glob("offline-run-*/*.wandb"))


def test_every_stage_is_written_by_the_package_itself(chain, tmp_path, monkeypatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.run.path.rglob("*")}
    monkeypatch.setattr("sys.argv", ["track", str(chain.run.path), "--wandb", "bert"])
    assert main() == 0
    assert "phase1 to step 400, phase2 to step 30" in capsys.readouterr().out
    for words in (b"train/mlm_loss", b"heldout/mask_gain", b"optimizer/learning_rate", b"run/phase2"):
        assert words in files(tmp_path), words
    assert before == {path: path.stat().st_mtime_ns for path in chain.run.path.rglob("*")}


def test_each_step_is_sent_once_and_the_newest_when_it_is_whole(chain, monkeypatch) -> None:
    logged: list[int] = []
    real = wandb.init

    def init(**words):
        sink = real(**words)
        log = sink.log
        monkeypatch.setattr(sink, "log", lambda values, step: logged.append(step) or log(values, step=step))
        return sink

    monkeypatch.setattr(wandb, "init", init)
    steps = [line["step"] for line in chain.run.stage("phase2").metrics()]
    last = send(wandb, "bert", chain.run, "phase2", after=-1, ended=False)
    assert logged == sorted(set(steps))[:-1]
    assert last == logged[-1]
    append_jsonl(chain.run.stage("phase2").attempts[-1].metrics, {"step": 31, "loss": 1.0})
    assert send(wandb, "bert", chain.run, "phase2", after=last, ended=True) == 31
    assert logged == [*sorted(set(steps)), 31]
    assert send(wandb, "bert", chain.run, "phase2", after=31, ended=True) == 31
    assert logged[-1] == 31


def test_a_service_that_fails_is_told_in_a_line(chain, monkeypatch) -> None:
    def init(**words):
        raise wandb.Error("no route to host")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("sys.argv", ["track", str(chain.run.path), "--wandb", "bert"])
    with pytest.raises(EnvironmentFault, match="no route to host; the same command again"):
        main()
