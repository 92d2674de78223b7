"""The real pynvml against a libnvidia-ml.so.1 of ours (fake_nvml.c), loaded by its name in child processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.monitor import health

FIELDS = {
    "time", "stage", "begun", "attempt", "gpu", "name", "utilization_pct", "memory_used_mb",
    "memory_total_mb", "power_w", "energy_j", "temperature_c", "sm_clock_mhz", "memory_clock_mhz", "throttle",
    "ecc_corrected", "ecc_uncorrected", "xid",
}  # fmt: skip
UUIDS = [f"GPU-0000abc{index}-0000-4000-8000-000000000000" for index in range(2)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compile the fake; the folder to put into LD_LIBRARY_PATH."""
    if shutil.which("gcc") is None:
        pytest.skip(
            "gcc is not installed: the watch over GPUs is not tested, it needs a stand-in for the driver's library"
        )

    def build(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("nvml")
        source = Path(__file__).with_name("fake_nvml.c")
        words = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", *flags]
        subprocess.run([*words, "-o", folder / "libnvidia-ml.so.1", source, "-lpthread"], check=True)
        return folder

    return build


@pytest.fixture(scope="module")
def driver(library: Callable[..., Path]) -> Path:
    return library()


def python(driver: Path | None, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    hidden = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "LD_LIBRARY_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PYTHONPATH": f"{root}:{root / 'tests'}", "LD_LIBRARY_PATH": str(driver or ""), **more}
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, cwd=root, capture_output=True, text=True, timeout=60
    )


def child(driver: Path | None, work: str, folder: Path, **more: str) -> Any:
    """What the function returns in a process of its own whose NVIDIA driver is the fake."""
    done = python(driver, Path(__file__).with_name("nvml_child.py"), work, folder / "gpu", **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


QUIET: dict[str, Any] = {"said": [], "warned": [], "fatal": []}


def told(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in QUIET}


def test_a_line_has_the_fields_of_the_contract(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "contract", tmp_path)
    assert told(found) == QUIET
    assert not found["torch"]
    for line in found["lines"]:
        assert set(line) - {"uuid"} == FIELDS
    uuids = {gpu: [line.get("uuid") for line in found["lines"] if line["gpu"] == gpu] for gpu in (0, 1)}
    assert [(known[0], set(known[1:])) for known in uuids.values()] == [(uuid, {None}) for uuid in UUIDS]
    first = {key: value for key, value in found["lines"][0].items() if key not in ("time", "begun")}
    assert first == {
        "stage": "phase1", "attempt": 3, "gpu": 0, "uuid": UUIDS[0],
        "name": "NVIDIA Fake 100", "utilization_pct": 97, "memory_used_mb": 40960, "memory_total_mb": 81920,
        "power_w": 412.5, "energy_j": 1234567.0, "temperature_c": 61, "sm_clock_mhz": 1980, "memory_clock_mhz": 2619,
        "throttle": ["power cap"], "ecc_corrected": 3, "ecc_uncorrected": 0, "xid": [],
    }  # fmt: skip
    times = [line["time"] for line in found["lines"] if line["gpu"] == 0]
    assert abs(times[0] - time.time()) < 60
    assert all(later - earlier > 0.015 for earlier, later in itertools.pairwise(times))


def test_a_line_that_an_attempt_before_left_half_costs_itself_only(driver: Path, tmp_path: Path) -> None:
    half, *lines = child(driver, "after_a_cut", tmp_path)
    assert half == '{"time":1,"attempt":2,"gp'
    assert all(json.loads(line)["attempt"] == 3 for line in lines)


def test_every_return_code_at_every_moment(driver: Path, tmp_path: Path) -> None:
    for code, moment, found, lines, folder in child(driver, "codes", tmp_path):
        verdict, meaning = health.RETURN_CODES[code]
        case = f"code {code} at {moment}"
        warned = [(facts["gpu"], facts["verdict"]) for facts in found["warned"]]
        if moment == "init":  # nothing is known of any GPU
            assert (len(found["said"]), warned, found["fatal"], folder) == (1, [], [], False), case
            assert meaning in found["said"][0], case
            continue
        assert found["said"] == [], case
        assert len(found["fatal"]) == (verdict == "fatal"), case
        if moment == "handle":
            assert warned == ([] if verdict == "fatal" else [(0, "warn")]), case
            assert not folder, case
            continue
        assert warned == ([(0, "warn")] if verdict == "warn" else []), case
        assert all(meaning in line for line in found["fatal"]), case
        full = [line for line in lines if set(line) - {"uuid"} == FIELDS]
        assert len(full) == (2 if moment == "later" else 0), case
        assert code == health.GPU_IS_LOST or "power_w" not in lines[-1], case


def test_a_gpu_that_vanishes_is_named_once_and_the_others_go_on(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "vanish", tmp_path)
    (line,) = found["fatal"]
    assert line.startswith(f"n01: GPU 1 ({UUIDS[1]}): the GPU is lost")
    assert found["facts"] == {
        "stage": "phase1", "attempt": 3, "node": "n01", "gpu": 1, "uuid": UUIDS[1], "verdict": "fatal", "line": line
    }  # fmt: skip
    assert (found["said"], found["warned"], found["after"]) == ([], [], 0)


def test_a_call_that_blocks_delays_nobody(driver: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    found = child(driver, "blocked", tmp_path)
    assert time.monotonic() - started < 15  # the process ends too
    stopped, begun, again = found["seconds"]
    assert max(stopped, again) < 3
    assert begun < 0.5
    (warning,) = found["warned"]
    assert warning["told"] == warning["line"]
    assert re.match(rf"n01: GPU 0 \({UUIDS[0]}\): the driver has not answered", warning["line"])
    assert (found["fatal"], found["said"], found["before"]) == ([], [], 3)
    assert found["last"] > 2  # what GPU 1 said just before the end is written all the same
    assert told(found["again"]) == QUIET


def test_a_query_that_was_slow_once_is_not_asked_again(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "slow", tmp_path)
    lines = found["lines"]
    assert told(found) == QUIET
    assert ["power_w" in line for line in lines] == [True] * 3 + [False] * (len(lines) - 3)
    assert all(FIELDS - set(line) <= {"power_w"} for line in lines)
    gaps = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(lines)]
    assert sum(gap > 1.2 for gap in gaps) == 1


def test_xids_are_recorded_and_judged_by_the_table(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "xids", tmp_path)
    for number, said in found["found"]:
        verdict = health.XIDS.get(number, ("warn", ""))[0]
        lines = [facts["line"] for facts in said["warned"]] + said["fatal"]
        assert [len(said["warned"]), len(said["fatal"])] == [verdict == "warn", verdict == "fatal"], number
        assert all(f"GPU 0 ({UUIDS[0]}): Xid {number}:" in line for line in lines), number
    assert len(found["two"]["fatal"]) == 1
    assert "Xid 79" in found["two"]["fatal"][0]


def test_what_is_refused_or_unknown_is_left_out(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "events_refused", tmp_path)
    assert found["missing"] == [["xid"], ["ecc_corrected", "ecc_uncorrected"]]
    assert told(found) == QUIET


def test_an_old_driver_says_what_it_can(library: Callable[..., Path], tmp_path: Path) -> None:
    found = child(library("-DOLD"), "contract", tmp_path)
    assert told(found) == QUIET
    assert all(set(line) - {"uuid"} == FIELDS - {"energy_j", "xid"} for line in found["lines"])
    assert found["lines"][0]["throttle"] == ["power cap"]


def test_functions_that_pynvml_lacks_are_done_without(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "shrunk_package", tmp_path)
    assert told(found) == QUIET
    assert all(set(line) - {"uuid"} == FIELDS - {"power_w"} for line in found["lines"])


def test_states_are_told_once_and_only_new_ones_are_fatal(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "states", tmp_path)
    assert ["power cap"] in found["throttle"]
    assert ["hardware thermal slowdown"] in found["throttle"]
    meanings = sorted(facts["line"].split("): ")[1] for facts in found["old"]["warned"])
    assert meanings == [
        "2 uncorrectable memory errors since the driver was loaded",
        "3 uncorrectable memory errors while training",
        "bad memory rows could not be replaced; have the GPU tested",
        "hardware thermal slowdown",
    ]
    assert found["old"]["fatal"] == []
    assert [line.split("): ")[1] for line in found["new"]["fatal"]] == ["the node must be rebooted"]


def test_a_full_disk_and_a_failing_listener_do_not_end_the_watch(driver: Path, tmp_path: Path) -> None:
    found = child(driver, "storage", tmp_path)
    full, failed = found["said"]
    assert re.fullmatch(r"GPU samples of n01 end here: No space left on device: .*/n01\.jsonl", full)
    assert "hardware thermal slowdown" in failed
    assert "ZeroDivisionError" in failed
    assert "Xid 79" in found["fatal"][0]


def test_only_gpus_of_this_job_are_sampled(driver: Path, tmp_path: Path) -> None:
    every = [0, 1, 2, 3]
    assert child(driver, "visible", tmp_path) == {
        "nothing set": every, "indices": [3, 1], "uuids": [1, 0], "none": [], "none of Slurm": [], "minus one": [],
        "step": [2], "job": [1, 2], "step in a cgroup": every, "partitioned": every, "unknown uuid": every,
    }  # fmt: skip
    found = child(driver, "one_of_two", tmp_path, CUDA_VISIBLE_DEVICES=UUIDS[1])
    assert found == [0, True]


@pytest.mark.parametrize(
    ("work", "reason"), [("no_driver", "libnvidia-ml.so.1"), ("no_package", "pip install nvidia-ml-py")]
)
def test_without_a_driver_it_says_so_once(work: str, reason: str, tmp_path: Path) -> None:
    found = child(None, work, tmp_path)
    (line,) = found["said"]
    assert line.startswith("no GPU monitoring on n01: ")
    assert reason in line
    assert (found["warned"], found["fatal"], found["folder"]) == ([], [], False)


def test_the_command_shows_every_gpu_and_its_state(driver: Path) -> None:
    script = "set 1 pending 1;fail nvmlDeviceGetHandleByIndex_v2 2 0 15;gpus 3"
    done = python(driver, "-m", "pipeline.monitor", FAKE_NVML=script)
    assert done.returncode == 0, done.stderr
    head, first, second, third, *verdicts = done.stdout.splitlines()
    assert head.split()[:3] == ["gpu", "name", "utilization_pct"]
    assert first.split()[-6:] == ["40960", "412.5", "61", "1980", "power", "cap"]
    assert second.startswith("1")
    assert third.split() == ["2", *"-------"]
    assert [line.split(": ")[0] for line in verdicts] == ["warn", "fatal"]
    assert UUIDS[1] in verdicts[0]
    found = json.loads(python(driver, "-m", "pipeline.monitor", "--json", FAKE_NVML=script).stdout)
    assert [[each["verdict"] for each in gpu["findings"]] for gpu in found["gpus"]] == [[], ["warn"], ["fatal"]]
    assert found["gpus"][0]["power_w"] == 412.5


def test_the_command_without_a_driver_is_one_line_and_code_7() -> None:
    done = python(None, "-m", "pipeline.monitor")
    assert (done.returncode, done.stdout) == (7, "")
    assert re.fullmatch(r".*: cannot read any GPU: there is no NVIDIA driver .*\n", done.stderr)


def measured(driver: Path, folder: Path, wall_s: float) -> dict[str, float]:
    found: dict[str, float] = child(driver, "cost", folder, WALL_S=str(wall_s))
    print(
        f"\n8 GPUs once a second: {found['cpu_per_s'] * 100:.2f} % of one core; "
        f"a reading takes {found['reading_us']:.0f} microseconds beside the driver's own time"
    )
    return found


def test_the_cost_is_small(driver: Path, tmp_path: Path) -> None:
    assert measured(driver, tmp_path, 2.0)["cpu_per_s"] < 0.1


@pytest.mark.chaos
def test_the_cost_over_ten_seconds(driver: Path, tmp_path: Path) -> None:
    assert measured(driver, tmp_path, 10.0)["cpu_per_s"] < 0.05
