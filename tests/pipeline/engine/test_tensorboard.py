"""Event files, as tensorboard's own reader and its data server see them."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

from pipeline.engine.tensorboard import Board

LINE = {
    "stage": "phase1",
    "attempt": 1,
    "time": 1.7e9,
    "since": 1.6e9,
    "samples": "abcd",
    "loss": 6.5,
    "learning_rate": 1e-3,
    "sequences_per_s": 60.0,
    "spent_s": {"data": 0.25, "compute": 1.5},
    "eval_mlm_loss": 7.25,
    "new_figure": 3,
}


def curve(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def attempt(folder: Path, first: int, last: int, value: float) -> None:
    board = Board(folder, after_step=first - 1)
    for step in range(first, last + 1):
        board.add(step, {"loss": value}, 1e9 + step)
    board.close()


def test_a_metric_line_becomes_grouped_scalars(tmp_path):
    board = Board(tmp_path)
    assert list(tmp_path.iterdir()) == []  # an attempt that never logs leaves nothing
    board.add(5, LINE, 1.7e9)
    found = EventAccumulator(str(tmp_path)).Reload()  # written at once, also before close
    assert sorted(found.Tags()["scalars"]) == [
        "heldout/mlm_loss",
        "optimizer/learning_rate",
        "other/new_figure",
        "speed/sequences_per_s",
        "spent_s/compute",
        "spent_s/data",
        "train/loss",
    ]
    (event,) = found.Scalars("train/loss")
    assert (event.step, event.value, event.wall_time) == (5, 6.5, 1.7e9)
    board.close()


@settings(deadline=None, max_examples=25)
@given(starts=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=5))
def test_curves_go_on_over_attempts_and_show_each_step_once(tmp_path_factory, starts):
    folder = tmp_path_factory.mktemp("phase1")
    expected: dict[int, float] = {}
    for number, (back, steps) in enumerate(starts):
        first = max(0, max(expected, default=0) - back) + 1
        expected = {step: value for step, value in expected.items() if step < first}
        expected |= {step: float(number) for step in range(first, first + steps)}
        attempt(folder, first, first + steps - 1, float(number))
    assert curve(folder) == sorted(expected.items())


def test_a_run_shows_each_phase_as_one_run(tmp_path):
    for phase in ("phase1", "phase2"):
        attempt(tmp_path / "run" / "stages" / phase, 1, 3, 1.0)
    (tmp_path / "run" / "stages" / "phase1" / "attempts" / "0001").mkdir(parents=True)
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run")).Reload()
    assert sorted(found.Runs()) == ["stages/phase1", "stages/phase2"]


def test_hyper_parameters_are_there_as_tensorboards_own_table_reads_them(tmp_path):
    board = Board(tmp_path, settings={"learning_rate": 1e-3, "optimizer": {"name": "lamb"}, "eval_every": None})
    board.add(1, {"loss": 1.0, "scores": {"accuracy": 71.0}}, 1.0)
    board.close()
    found = EventMultiplexer().AddRun(str(tmp_path), "run").Reload()
    content = found.SummaryMetadata("run", metadata.SESSION_START_INFO_TAG).plugin_data.content
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    assert told["learning_rate"].number_value == 1e-3
    assert told["optimizer.name"].string_value == "lamb"
    assert sorted(told) == ["learning_rate", "optimizer.name"]
    assert curve(tmp_path, "scores/accuracy") == [(1, 71.0)]


def test_a_record_cut_by_a_kill_costs_nothing_else(tmp_path):
    attempt(tmp_path, 1, 9, 1.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert curve(tmp_path) == [(step, 1.0) for step in range(1, 9)]


def test_a_failing_disk_only_warns_and_only_once(tmp_path, monkeypatch):
    said: list[str] = []
    board = Board(tmp_path, warn=said.append)
    board.add(1, {"loss": 1.0}, 1.0)
    board.close()
    board = Board(tmp_path, warn=said.append)
    monkeypatch.setattr("io.FileIO", lambda path, mode, open=io.FileIO: open("/dev/full", mode))
    board.add(2, {"loss": 1.0}, 2.0)
    board.add(3, {"loss": 1.0}, 3.0)
    monkeypatch.undo()
    (line,) = said
    assert f"[Errno {errno.ENOSPC}]" in line
    assert "metrics.jsonl is not affected" in line
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "below", warn=said.append)
    board.add(1, {"loss": 1.0}, 1.0)
    assert "NotADirectoryError" in said[1]


def test_without_tensorboard_training_goes_on(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from pathlib import Path; from pipeline.engine.tensorboard import Board\n"
        f"board = Board(Path({str(tmp_path)!r})); board.add(1, {{'loss': 1.0}}, 1.0); board.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "no more TensorBoard curves" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    board = Board(tmp_path)
    board.add(1, {"loss": math.nan, "grad_norm": math.inf, "stop": True}, 1.0)
    board.close()
    assert math.isnan(curve(tmp_path)[0][1])
    assert curve(tmp_path, "optimizer/grad_norm") == [(1, math.inf)]
    with pytest.raises(KeyError):
        curve(tmp_path, "other/stop")


def test_a_line_costs_a_millisecond_at_most(tmp_path):
    """Rank 0 writes one line a step beside metrics.jsonl; the pure-Python checksum is the larger part."""
    board = Board(tmp_path)
    board.add(0, LINE, 1.0)
    began = time.perf_counter()
    for step in range(200):
        board.add(step, LINE, 1.0)
    took = (time.perf_counter() - began) / 200
    board.close()
    print(f"{1e6 * took:.0f} us a line, {len(json.dumps(LINE))} bytes as JSON")
    assert took < 5e-3
