"""Which GPU a rank takes, why it refuses, and what CUDA's errors mean; without a GPU, by what torch says of one."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.engine.peers import introduction
from pipeline.errors import ConfigError, DeviceFault, EnvironmentFault, NodeFault, PeerLost, describe
from pipeline.node import device
from pipeline.node.device import DEFAULTS, fault_of, gpus_given, runs_on, set_defaults, why_no_gpu
from pipeline.node.distributed import peers_named
from support.running import ROOT

HOST = os.uname().nodename
PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def job(local_rank: int = 0, **profile: object) -> SimpleNamespace:
    run = SimpleNamespace(exists=True, settings={"profile": profile})
    return SimpleNamespace(
        rank=8 + local_rank,
        topology=SimpleNamespace(local_rank=local_rank),
        run=run,
        stage="phase1",
        option=lambda key, value: f"--set phase1.{key}={value}",
    )


@pytest.fixture
def gpus(monkeypatch):
    """Have torch say that there are GPUs, as it does where there are."""

    def given(count: int, capability: tuple[int, int] = (9, 0), compiled: list[str] = PYPI) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device))

    taken: list[torch.device] = []
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield given
    torch.use_deterministic_algorithms(before)


def test_the_environment_is_set_before_torch_is_there_and_leaves_what_the_user_set():
    code = "import pipeline.worker, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    environment = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    set_defaults(environment)
    assert environment["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert environment.keys() >= DEFAULTS.keys() - {"PYTORCH_ALLOC_CONF"}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, 8),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "-1"}, 0),  # the user wants none
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
    ],
)
def test_gpus_given(environment, count):
    assert gpus_given(environment) == count


@pytest.mark.parametrize("environment", [{"SLURM_GPUS_ON_NODE": "8"}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_gpus_that_torch_does_not_see_are_no_reason_to_train_on_the_cpu(gpus, monkeypatch, environment):
    gpus(0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=rf"{HOST}: GPUs are allocated"):
        device.device_of(job())


def test_a_site_with_gpus_does_not_train_on_the_cpu_because_slurm_gave_none(gpus, monkeypatch):
    gpus(0)
    with pytest.raises(EnvironmentFault):
        device.device_of(job(runner="slurm", gpus_per_node=8))
    assert device.device_of(job(runner="slurm", gpus_per_node=0)).type == "cpu"
    assert device.device_of(job(runner="local", gpus_per_node=8)).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.device_of(job(runner="slurm", gpus_per_node=8)).type == "cpu"  # asked for


@pytest.mark.parametrize(
    ("cuda", "driver", "words"),
    [
        (None, "", "CPU build; pip install torch --index-url https://download.pytorch.org/whl/cu126"),
        (None, "580.95.05", "CPU build; pip install torch --index-url https://download.pytorch.org/whl/cu130"),
        ("13.0", "570.124.06", "needs driver 580 or newer, this node has 570.124.06; pip install torch --index-url"),
        ("13.0", "", "no NVIDIA driver answers to torch for CUDA 13.0: a container needs --nv"),
        ("12.6", "580.95.05", "sees none with driver 580.95.05; look at CUDA_VISIBLE_DEVICES"),
    ],
)
def test_the_reason_names_versions_and_what_to_install(cuda, driver, words):
    line = why_no_gpu(cuda, driver)
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("capability", "compiled", "fits"),
    [
        ((7, 0), PYPI, False),  # V100 and the wheels for CUDA 13
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_80", "sm_90"], True),
        ((8, 9), PYPI, True),  # L40S runs sm_86
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((12, 1), ["sm_120"], True),
        ((13, 0), PYPI, True),  # by PTX
        ((13, 0), PYPI[:-1], False),
        ((8, 0), [], False),
    ],
)
def test_which_architectures_run_where(capability, compiled, fits):
    assert runs_on(capability, compiled) is fits


def test_a_wheel_without_the_gpus_architecture_is_refused_with_the_one_to_install(gpus):
    gpus(8, (7, 0))
    with pytest.raises(EnvironmentFault, match=r"Some GPU is sm_70, torch .* has code for sm_75, .*whl/cu126"):
        device.device_of(job())


def test_each_rank_of_a_node_gets_its_own_gpu_or_none(gpus, monkeypatch):
    gpus(4)
    assert [device.device_of(job(rank)).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(EnvironmentFault, match="rank 12 is number 5 on its node, which has 4 GPUs"):
        device.device_of(job(4))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")  # each task is bound to one and sees that alone
    gpus(1)
    assert device.device_of(job(3)).index == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), NodeFault, f"goes on .* without {HOST}"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCompile with"),
            NodeFault,
            "unspecified launch failure;",
        ),
        (RuntimeError("CUDA error: GPU has fallen off the bus"), NodeFault, "rank 8 on"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), NodeFault, "busy"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFault, "goes on from its last"),
        (
            RuntimeError("CUDA error: peer access is not supported between these two devices"),
            DeviceFault,
            "peer access",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79"),
            ConfigError,
            r"micro-batch of 256 samples does not fit this GPU; --set phase1.micro_batch=128 .*allocate 2.00 GiB\)",
        ),
        (RuntimeError("NCCL error: remote process exited"), PeerLost, "lost a peer"),
    ],
)
def test_the_errors_of_cuda_get_their_codes(error, kind, words):
    with pytest.raises(kind, match=words) as raised, peers_named(job(), 256):
        raise error
    line, code = describe(raised.value)
    assert code == {NodeFault: 77, DeviceFault: 76, PeerLost: 76, ConfigError: 2}[kind]
    assert "\n" not in line
    assert getattr(raised.value, "nodes", ()) == ((HOST,) if kind is NodeFault else ())


def test_a_model_that_does_not_fit_gets_no_advice_that_cannot_help():
    fault = fault_of(torch.OutOfMemoryError("CUDA out of memory. Tried"), job(), 1)
    assert "this GPU is too small for the model" in str(fault)


@pytest.mark.parametrize("use_up", [lambda: torch.empty(1 << 60), lambda: bytearray(1 << 62)])
def test_a_machine_without_memory_is_told_what_would_fit(use_up):
    with pytest.raises(ConfigError, match=r"does not fit this machine; --set phase1.micro_batch=128 "):  # noqa: SIM117
        with peers_named(job(), 256):
            use_up()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a defect of ours"), peers_named(job(), 256):
        raise RuntimeError("a defect of ours")
    assert fault_of(RuntimeError("shape mismatch"), job(), 4) is None


def test_a_bad_node_has_the_name_that_slurm_knows(monkeypatch):
    """Hosts may be called NODE.DOMAIN; the batch script looks for Slurm's names."""
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    fault = fault_of(RuntimeError("CUDA error: uncorrectable ECC error encountered"), job(), 4)
    assert fault.nodes == ("n7",)
    assert introduction({}, 1, torch.device("cpu"), "pipeline.pretrain.task")["host"] == "n7"
