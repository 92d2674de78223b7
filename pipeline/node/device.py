"""This rank's GPU: which one, whether this torch can use it, and what its errors mean.

Nothing here imports torch before a device is asked for, so that `set_defaults` can come first.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, DeviceFault, EnvironmentFault, NodeFault, PipelineError
from pipeline.monitor.cpu import processor
from pipeline.node.job import Job
from slurm.environment import this_node

if TYPE_CHECKING:
    import torch

DEFAULTS = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's order, so that the watcher and torch mean the same GPU
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits from run to run
    "TORCHINDUCTOR_DETERMINISTIC": "1",  # no choice of kernels by timing
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # every micro-batch has other shapes: less is lost in between
}
DRIVERS = {13: 580, 12: 525}  # by CUDA's major version: the oldest Linux driver that runs it (CUDA compatibility guide)
WHEELS = {13: "cu130", 12: "cu126"}  # https://download.pytorch.org/whl/…; cu126 is the last with sm_70 (V100)
# In CUDA's error texts (cudaError_t): a GPU, link or driver that will not do the next job either.
BROKEN = (
    *("ECC error", "launch failure", "NVLink error", "hardware stack error", "fallen off the bus", "device lost"),
    *("busy or unavailable", "system not yet initialized", "hardware error"),
)


def set_defaults(environment: MutableMapping[str, str]) -> None:
    """What CUDA and torch read from the environment when they start; what the user has set stays."""
    for name, value in DEFAULTS.items():
        if name != "PYTORCH_ALLOC_CONF" or "PYTORCH_CUDA_ALLOC_CONF" not in environment:
            environment.setdefault(name, value)


def device_of(job: Job) -> torch.device:
    """The GPU of this rank, made the current one, or the CPU where the job has no GPU.

    Raises EnvironmentFault when GPUs were given and torch sees none, none is left for this rank, or this torch has
    no code for it.
    """
    import torch

    given = gpus_given(os.environ)
    if not torch.cuda.is_available():
        profile = job.run.settings.get("profile", {}) if job.run.exists else {}
        if given or (given is None and profile.get("runner") == "slurm" and profile.get("gpus_per_node")):
            raise EnvironmentFault(f"{socket.gethostname()}: {why_no_gpu(torch.version.cuda, driver_version())}")
        return torch.device("cpu")
    visible, local_rank = torch.cuda.device_count(), job.topology.local_rank
    if local_rank >= max(visible, given or 0):
        raise EnvironmentFault(
            f"{socket.gethostname()}: rank {job.rank} is number {local_rank + 1} on its node, which has {visible} GPUs "
            f"for this job; start one rank for each GPU"
        )
    device = torch.device("cuda", local_rank % visible)  # a rank that is bound to one GPU sees that alone
    return claimed(device)


def chosen_device() -> torch.device:
    """The GPU where there is one: for what runs outside a stage."""
    import torch

    return claimed(torch.device("cuda", 0)) if torch.cuda.is_available() else torch.device("cpu")


def claimed(device: torch.device) -> torch.device:
    """``device``, a GPU, as this process's current one, with everything on it repeatable bit for bit.

    Raises EnvironmentFault when this torch has no code for it.
    """
    import torch

    capability, compiled = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not runs_on(capability, compiled):
        raise EnvironmentFault(
            f"{socket.gethostname()}: {torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}, torch "
            f"{torch.__version__} has code for {', '.join(compiled)} (driver {driver_version() or 'unknown'}); "
            f"{_install(12 if capability < (7, 5) else 13)}"
        )
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)  # rounds dropout to 1/16 in some versions, builds a plan per shape
    return device


def gpus_given(environment: MutableMapping[str, str]) -> int | None:
    """GPUs of this job on this node by what Slurm and the user say; 0 where they say none, None where nothing."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count.isdecimal():
        return int(count)
    return None if visible is None or visible == "NoDevFiles" else len(visible.split(","))


def runs_on(capability: tuple[int, int], compiled: Iterable[str]) -> bool:
    """Whether code for one of the ``compiled`` architectures (sm_80, sm_90a, compute_90, …) runs on a capability.

    Machine code runs on the same major version from its minor one on, PTX (compute_…) on everything newer.
    """
    for name in compiled:
        kind, _, digits = name.partition("_")
        major, minor = divmod(int("".join(filter(str.isdigit, digits)) or 0), 10)
        if not digits.isdecimal():  # sm_90a: that one alone
            fits = (major, minor) == capability
        elif kind == "sm":
            fits = major == capability[0] and minor <= capability[1]
        else:
            fits = (major, minor) <= capability
        if fits:
            return True
    return False


def why_no_gpu(cuda: str | None, driver: str) -> str:
    """Why torch, built for ``cuda`` (None: for the CPU), sees no GPU beside ``driver`` ("" for none), what to do."""
    fitting = next((major for major, oldest in DRIVERS.items() if _major(driver) >= oldest), 12)
    if cuda is None:
        return f"GPUs are allocated (driver {driver or 'unknown'}), but this torch is a CPU build; {_install(fitting)}"
    if not driver:
        return (
            f"GPUs are allocated, but no NVIDIA driver answers to torch for CUDA {cuda}: a container needs --nv "
            f"(apptainer) or the NVIDIA hook (pyxis), a node its driver"
        )
    least = DRIVERS.get(_major(cuda), 0)
    if _major(driver) < least:
        return f"torch for CUDA {cuda} needs driver {least} or newer, this node has {driver}; {_install(fitting)}"
    return (
        f"GPUs are allocated, but torch for CUDA {cuda} sees none with driver {driver}; look at CUDA_VISIBLE_DEVICES "
        f"({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) and nvidia-smi"
    )


def machine() -> dict[str, str]:
    """What this process works on: ``device``, and of a GPU ``cuda`` and ``driver``. Starts no GPU."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "driver": driver_version()}
    return {"device": processor()}


def driver_version() -> str:
    """The NVIDIA driver's version by NVML, "" where there is none."""
    try:
        from pipeline.monitor import nvml
    except ImportError:
        return ""
    try:
        nvml.ask("nvmlInit")
        return str(nvml.ask("nvmlSystemGetDriverVersion"))
    except nvml.NvmlFault:
        return ""


def fault_of(error: Exception, job: Job, micro_batch: int | None) -> PipelineError | None:
    """What one of CUDA's own errors, or a lack of memory, means, as an error with an exit code; None for any other."""
    import torch

    where, line = f"rank {job.rank} on {socket.gethostname()}", str(error).strip().split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError(f"{where}: {too_large(job, micro_batch, 'GPU')} ({line.split('. GPU')[0]})")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in line:
        return ConfigError(f"{where}: {too_large(job, micro_batch, 'machine')} ({line or 'no memory left'})")
    if type(error).__name__ != "AcceleratorError" and not line.lower().startswith("cuda"):
        return None
    if any(word.lower() in line.lower() for word in BROKEN):
        return NodeFault(
            f"{where}: {line}; {job.stage} goes on from its last checkpoint without {this_node()}", (this_node(),)
        )
    return DeviceFault(f"{where}: {line}; {job.stage} goes on from its last checkpoint")


def too_large(job: Job, micro_batch: int | None, what: str) -> str:
    """What to do where ``what``, a GPU or a machine, has too little memory for a job's stage."""
    if micro_batch is None or micro_batch < 2:
        return f"this {what} is too small for the model"
    return (
        f"a micro-batch of {micro_batch} samples does not fit this {what}; "
        f"{job.option('micro_batch', micro_batch // 2)} needs about half of the memory that grows with it and changes "
        f"no result but for its last bits"
    )


def _install(major: int) -> str:
    return f"pip install torch --index-url https://download.pytorch.org/whl/{WHEELS[major]}"


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else 0
