"""`[phase1] samples = "FOLDER"`: training from shards that were made before, ours or NVIDIA's, and no text is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from data_prep.nvidia_hdf5 import to_nvidia
from pipeline.engine import checkpoint
from pipeline.run.rundir import RunDir
from support.running import call, one_line, states, submit

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def data(small_run: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody has who comes with samples: shards of both kinds, the vocabulary, NVIDIA's checkpoint."""
    folder = tmp_path_factory.mktemp("ready")
    for path in small_data.iterdir():
        if path.name.startswith(("qa", "pairs", "sentiment")):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "vocab.txt").write_bytes((small_run / "stages" / "vocab" / "vocab.txt").read_bytes())
    to_nvidia(small_run / "stages" / "samples_64", folder / "theirs")
    os.symlink(small_run / "stages" / "samples_128", folder / "ours")
    done = call("export", small_run / "model", "--to", "nvidia", folder / "ckpt_30.pt")
    assert done.returncode == 0, done.stderr
    return folder


def trained(run: Path, data: Path, stages: str, *settings: str):
    """A run on these samples; a phase of 64 tokens reads NVIDIA's unless told otherwise."""
    own = ['data.vocab="vocab.txt"', "data.wikipedia=[]", "data.jsonl=[]", 'phase1.samples="theirs"', *settings]
    given = {setting.partition("=")[0]: setting for setting in own}  # the last one counts
    return submit(run, data, "--stages", stages, *(word for setting in given.values() for word in ("--set", setting)))


def losses(run: Path, phase: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in RunDir(run).stage(phase).metrics() if "loss" in line]


def test_the_same_training_as_from_text(small_run, data, tmp_path) -> None:
    """Both lengths, one of NVIDIA's shards and one of ours: every loss is that of the run that made them."""
    run = tmp_path / "run"
    done = trained(run, data, "samples_64,samples_128,phase1,phase2", 'phase2.samples="ours"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "extract" not in states(run)
    for phase in ("phase1", "phase2"):
        assert losses(run, phase) == losses(small_run, phase)
    assert "nothing to do" in call("submit", "--run", run, "--stages", "phase2").stdout


def test_nvidias_run_goes_on_from_its_shards_and_its_checkpoint(data, tmp_path) -> None:
    one, stages = ('phases=["phase1"]', "phase1.steps=1"), "samples_64,phase1"
    done = trained(tmp_path / "run", data, stages, *one, 'phase1.start="ckpt_30.pt"')
    assert done.returncode == 0, done.stdout + done.stderr
    begun = next(line for line in RunDir(tmp_path / "run").stage("phase1").metrics() if line["step"] == 0)
    fresh = trained(tmp_path / "fresh", data, stages, *one)
    assert fresh.returncode == 0, fresh.stderr
    control = (RunDir(tmp_path / "fresh").stage("phase1").done or {})["result"]["eval_mlm_loss"]
    assert begun["eval_mlm_loss"] < control - 0.2


@pytest.mark.parametrize("halves", [False, True])
def test_the_middle_of_nvidias_phase_goes_on_as_if_it_had_never_stopped(data, tmp_path, halves) -> None:
    """LAMB's moments, rate and data: every later loss is that of the run which was not interrupted, bit for bit."""
    one, stages = ('phases=["phase1"]', "train.keep_checkpoints=9"), "samples_64,phase1"
    done = trained(tmp_path / "whole", data, stages, *one)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = checkpoint.read(RunDir(tmp_path / "whole").stage("phase1").attempts[0].path / "step-00000012")
    write_middle(data / "ckpt_12.pt", saved, halves)
    half = ('phase1.start="ckpt_12.pt"', "phase1.start_step=12")
    done = trained(tmp_path / "half", data, stages, *one, *half)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "half", "phase1") == losses(tmp_path / "whole", "phase1")[12:]
    if not halves:  # the control: weights alone train otherwise
        done = trained(tmp_path / "control", data, stages, *one, half[0], "phase1.steps=12")
        assert losses(tmp_path / "control", "phase1")[1:] != losses(tmp_path / "whole", "phase1")[13:]
        (data / "bare.pt").write_bytes((data / "ckpt_30.pt").read_bytes())
        done = trained(tmp_path / "bare", data, stages, *one, 'phase1.start="bare.pt"', "phase1.start_step=12")
        one_line(done, 4, "bare.pt holds no optimizer", "leave start_step out")


def write_middle(path: Path, saved: checkpoint.Checkpoint, halves: bool) -> None:
    """The file that run_pretraining.py saves: apex's FusedLAMB numbers what decays before what does not."""
    model = {name: torch.from_numpy(value.copy()) for name, value in saved.weights.items()}
    exempt = {name for name in model if any(part in name for part in ("bias", "gamma", "beta", "LayerNorm"))}
    names = [*(name for name in model if name not in exempt), *(name for name in model if name in exempt)]
    moments = [
        {key: torch.from_numpy(saved.optimizer[f"{key}.{name}"].copy()) for key in ("exp_avg", "exp_avg_sq")}
        for name in names
    ]
    numbers, border = list(range(len(names))), len(names) - len(exempt)
    groups = [{"lr": 0.0, "step": saved.step, "params": part} for part in (numbers[:border], numbers[border:])]
    content = {"model": model, "optimizer": {"state": dict(enumerate(moments)), "param_groups": groups}, "epoch": 0}
    if halves:
        content |= {"model": {name: value.half() for name, value in model.items()}}
        content |= {"master params": [model[name] for name in names]}
    torch.save(content, path)


def test_samples_that_do_not_fit_are_told_in_a_line(data, tmp_path) -> None:
    one, stages = 'phases=["phase1"]', "samples_64,phase1"
    done = trained(tmp_path / "a", data, stages, one, 'phase1.samples="ours"')
    one_line(done, 3, "samples of 128 tokens, the phase wants 64")
    (data / "other.txt").write_text((data / "vocab.txt").read_text() + "zzz\n")
    ours = (one, 'phase1.samples="ours"', "phase1.seq_len=128", 'data.vocab="other.txt"')
    one_line(trained(tmp_path / "b", data, "samples_128", *ours), 3, "another vocabulary")
    two = trained(tmp_path / "c", data, "phase1", "phase2.seq_len=64")
    one_line(two, 2, "phases of one seq_len read the same samples")
