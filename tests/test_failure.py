"""A lack of memory is answered with batch, size and remedy, in at most three lines."""

import functools
import re
import resource
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from whole_runs import Run, write_images

from byolt.configs import schema
from byolt.files.machine import Device
from byolt.model.distributed import World
from byolt.model.run import failure, provenance

ROOT = Path(__file__).resolve().parent.parent
WORLD = World(0, 0, 1, torch.device("cpu"), "none")
# Messages of torch 2.7 to 2.14 and of DALI.
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: str(error)[:20])
def test_out_of_memory_is_recognized(error: Exception) -> None:
    assert failure.is_out_of_memory(error)


def test_other_errors_are_not_out_of_memory() -> None:
    assert not failure.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not failure.is_out_of_memory(ValueError("out of memory"))


def test_message_names_batch_size_and_remedy() -> None:
    config = schema.load(ROOT / "configs" / "throughput.yaml", ["train.precision=fp32"])
    device = Device("cuda", "NVIDIA A10", 24 * 2**30, 8)
    with patch.object(provenance, "device_of", lambda _: device):
        said = failure.explain(LACKS[0], 7, WORLD, config)
        assert said.splitlines() == [
            "rank 0, step 7: out of memory on NVIDIA A10 with 24 GiB: train.batch_size=256 train.accumulation=1 "
            "augment.size=224",
            "  256 images per rank and micro-batch need about 45.2 GiB: set train.accumulation=2 --allow-change "
            "train.accumulation, a smaller train.batch_size or augment.size, or train.precision=bf16",
        ]
        fits = schema.load(ROOT / "configs" / "throughput.yaml", ["train.batch_size=64"])
        assert "set train.accumulation=2, a smaller" in failure.explain(LACKS[0], None, WORLD, fits)


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["augment.size=256"], "train.accumulation=2, a smaller train.batch_size"),
        (["model.projector_hidden=65536", "model.projector_size=16384"], "a smaller network (model.backbone"),
    ],
    ids=["in a step", "before the loop"],
)
def test_out_of_memory_ends_a_run_like_a_refused_setting(
    settings: list[str], remedy: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, write_images(tmp_path / "images"))
    process = run(
        "train.batch_size=32",
        *settings,
        before=functools.partial(_limit_memory, 400 << 20),
        OMP_NUM_THREADS="1",
    )
    assert process.wait() == 2, process.text
    lines = process.text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if "error:" in line]
    assert "Traceback" not in process.text and len(lines) - at <= 3
    assert re.search(
        r"error: .*out of memory on \d+ CPU cores? .*: train\.batch_size=32 train\.acc", lines[at]
    )
    assert "images per rank and micro-batch need about" in lines[at + 1]
    assert lines[at + 1].split(": set ")[1].startswith(remedy)
    assert re.search(r"; RLIMIT_AS is [0-9,]+: raise it \(ulimit -v\)$", lines[at + 1])
