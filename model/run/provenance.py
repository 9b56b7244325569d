"""Records how a run was started: each start appends command, hardware and versions to starts.jsonl."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from byolt.configs.schema import Config
from byolt.files import machine
from byolt.files.rows import append_row
from byolt.model.distributed import World
from byolt.model.optim import resolve_backend

FILE = "starts.jsonl"
_LIBRARIES = ("byolt", "torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numba", "numpy")


def record_start(out: Path, step: int, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Appends this start, after `step` steps, to OUT/starts.jsonl, with more facts; step 0 begins the file anew.

    Raises:
        OSError: the file cannot be written.
    """
    row = {
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "hardware": hardware(device),
        "versions": versions(),
        **facts,
    }
    if not step:
        (out / FILE).unlink(missing_ok=True)
    append_row(out / FILE, row)


def rounding_of(config: Config, world: World, precision: str, backend: str) -> dict[str, str | int | bool]:
    """The settings that decide how a run's sums are rounded, besides the machine and its libraries.

    Args:
        config: the settings.
        world: the processes.
        precision: "fp32", "bf16" or "fp16": train.precision=auto resolved.
        backend: name of the class that makes the views: data.backend=auto resolved.
    """
    found: dict[str, str | int | bool] = {
        "number of ranks": world.size,
        "train.device": world.device.type,
        "train.precision": precision,
        "train.channels_last": config.train.channels_last,
        "train.compile": config.train.compile,
        "data.backend": backend,
        "optimizer.backend": resolve_backend(config.optimizer.backend, world.device),
    }
    return found if world.device.type == "cuda" else found | {"OMP_NUM_THREADS": torch.get_num_threads()}


def hardware(device: torch.device) -> str:
    """Names the GPU, if the device is one, the processor, and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    host = f"{machine.processor()}, {cores} core{'s' * (cores > 1)}"
    if device.type != "cuda":
        return host
    _, name, memory, _ = device_of(device)
    return f"{name} ({memory / 2**30:.0f} GiB); {host}"


def device_of(device: torch.device) -> machine.Device:
    """This rank's device, for estimates."""
    if device.type != "cuda":
        return machine.cpu()
    found = torch.cuda.get_device_properties(device)
    return machine.Device("cuda", found.name, found.total_memory, machine.cores_per_rank())


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with the CUDA it was built for
