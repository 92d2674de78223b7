"""The page of figures: what is measured stands beside its goal, and what is not is called arithmetic."""

from __future__ import annotations

import json

import pytest

from pipeline.bench.performance import goals, main, page, read
from pipeline.errors import ConfigError

BLOCKS = {
    "env": {
        "ok": True, "gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "cuda": "13.0", "driver": "580.95.05",
        "cpus": 16,
    },
    "alive": {"ok": True, "weights_differ": {"value": 0.0, "at_most": 0.0, "ok": True}},
    "correctness": {"ok": False, "lamb_update": {"value": 0.1, "at_most": 1e-4, "ok": False}},
    "phase1": {
        "ok": True,
        "all_on": {
            "micro_batch": 256, "sequences_per_s": 1912.5, "tokens_per_s": 208462.5, "tflops": 401.2,
            "memory_gib": 21.5, "power_w": None,
        },
    },
    "transformers": {"ok": True, "phase1": {"micro_batch": 128, "sequences_per_s": 637.5, "memory_gib": 60.0}},
    "lamb": {"ok": True, "torch": {"ms": 7.9, "gb_per_s": 1190.0}},
}  # fmt: skip


def test_without_a_file_the_page_says_that_nothing_is_measured():
    lines = list(page([]))
    assert "Nothing is measured yet" in lines[-1]
    assert [line.split(" | ")[-1] for line in lines if line.startswith("| H100")] == ["- |", "- |"]


def test_what_was_measured_stands_beside_its_goal(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"format": 1, "tiny": False, "blocks": BLOCKS}))
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "| H100 | phase1, 128 tokens | 1,870 | 1,850 to 2,200 | 1,912 |" in text
    assert "| H100 | phase2, 512 tokens | 800 | 690 to 860 | - |" in text
    assert "torch 2.11.0+cu130, CUDA 13.0, driver 580.95.05, 16 CPU cores." in text
    assert "1 of 2 checks hold; blocks that failed: correctness." in text
    assert "| phase1 | transformers | 128 | 637.5 |" in text
    assert "**lamb**: torch 7.9 ms, 1,190 gb per s" in text
    assert "Nothing is measured" not in text


@pytest.mark.parametrize("content", ["{}", "[]", "x", json.dumps({"tiny": True, "blocks": BLOCKS})])
def test_what_is_no_full_measurement_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ConfigError, match=r"gpu\.json: ") as refusal:
        read(tmp_path / "gpu.json")
    assert "\n" not in str(refusal.value)


def test_every_gpu_model_has_goals():
    assert {row["gpu"] for row in goals()} == {"A100", "H100", "H200"}
    assert all(float(row[f"phase{number}_goal"]) > 0 for row in goals() for number in (1, 2))
