"""The machine's devices, found without torch."""

import ctypes
from types import SimpleNamespace

import pytest

from byolt.files import machine


def fake_cuda(devices: int) -> SimpleNamespace:
    """libcuda of a machine with an H200, or without a GPU."""

    def get_name(name: ctypes.Array, size: int, device: object) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def total_memory(pointer: object, device: object) -> int:
        pointer._obj.value = 140 * 2**30  # type: ignore[attr-defined]
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: 0 if devices else 100,
        cuDeviceGet=lambda pointer, number: 0,
        cuDeviceGetName=get_name,
        cuDeviceTotalMem_v2=total_memory,
    )


def test_device_is_the_first_gpu_or_else_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_is_for_cpus", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_cuda(1))
    found = machine.find_device()
    assert (found.kind, found.name, found.memory) == ("cuda", "NVIDIA H200", 140 * 2**30)
    assert str(found) == "NVIDIA H200 with 140 GiB"
    assert machine.find_device("cpu").kind == "cpu"
    monkeypatch.setattr(machine, "_torch_is_for_cpus", lambda: True)
    assert machine.find_device().kind == "cpu"
    monkeypatch.setattr(machine, "_torch_is_for_cpus", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_cuda(0))
    assert machine.find_device().kind == "cpu"
    with pytest.raises(
        ValueError, match=r"^train\.device=cuda: process 0 of this machine finds 0 GPUs: set it to cpu$"
    ):
        machine.find_device("cuda")


def test_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    found = machine.cpu()
    assert found.memory > 2**20 and found.name and found.cores == 1
    assert str(found) == f"1 CPU core ({found.name})"
    assert machine._first_gpu("libnothing.so.1") is None


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_available_memory", lambda: 2**35)
    assert machine.cpu().memory == 2**35
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.cpu().memory == 2**33
