"""Finds the machine's processor, memory and first GPU without importing torch."""

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from byolt.files.console import count


class Device(NamedTuple):
    """The device of one rank, with its memory and its cores."""

    kind: str  # "cpu" or "cuda"
    name: str  # "NVIDIA H200", "AMD EPYC 9005"
    memory: int  # bytes: all of a GPU's; this rank's share of the main memory that is available
    cores: int  # CPU cores of this rank

    def __str__(self) -> str:
        cores = f"{count(self.cores, 'CPU core')} ({self.name})"
        return cores if self.kind == "cpu" else f"{self.name} with {self.memory / 2**30:.0f} GiB"


def find_device(wanted: str = "auto") -> Device:
    """The device that train.device={wanted} chooses, as well as it can be known without torch.

    Raises:
        ValueError: it is a GPU, and there is none.
    """
    gpu = None if wanted == "cpu" or _torch_is_for_cpus() else _first_gpu()
    if wanted == "cuda" and gpu is None:
        raise ValueError(too_few_gpus("train.device=cuda", int(os.environ.get("LOCAL_RANK", "0")), 0))
    return Device("cuda", *gpu, cores_per_rank()) if gpu else cpu()


def cpu() -> Device:
    """This rank's share of the processor and the memory."""
    return Device("cpu", processor(), _available_memory() // ranks_here(), cores_per_rank())


def too_few_gpus(setting: str, local_rank: int, gpus: int) -> str:
    """Why a rank has no GPU, with the remedy; `setting` is the one that asks for it, with its value."""
    return (
        f"{setting}: process {local_rank} of this machine finds {count(gpus, 'GPU')}: set it to cpu"
        + ", or start fewer (torchrun's --nproc-per-node, srun's --ntasks-per-node)" * (gpus > 0)
    )


def cores_per_rank() -> int:
    """CPU cores that this process may use, divided by the ranks on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def ranks_here() -> int:
    """Ranks on this machine, by torchrun's LOCAL_WORLD_SIZE; 1 where that is not a number."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def processor() -> str:
    """The processor's name in /proc/cpuinfo, or else the architecture."""
    return _field("/proc/cpuinfo", "model name") or platform.machine()


def _available_memory() -> int:
    """Bytes of main memory that are available, or that the container's limit allows."""
    available = int((_field("/proc/meminfo", "MemAvailable") or "0").partition(" ")[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return available
    return min(available, int(limit)) if limit.isdecimal() else available


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _torch_is_for_cpus() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _first_gpu(library: str = "libcuda.so.1") -> tuple[str, int] | None:
    """Name and bytes of memory of the first GPU in CUDA_VISIBLE_DEVICES; None without one. Allocates nothing on it."""
    try:
        cuda: Any = ctypes.CDLL(library)
    except OSError:
        return None
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    return None if failed else (name.value.decode(errors="replace"), memory.value)
