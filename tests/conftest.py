"""What several test files share: where the reference numbers and the real images are."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels are then interpreted; it asks when it is first imported, which torchvision does.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import interpreter  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


torch.set_num_threads(1)  # two test processes on two cores; and sums in one fixed order


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tool that a test ran may have changed the number of threads: the next test's sums must not depend on it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the reference implementation's own numbers."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def reference(fixtures: Path) -> dict[str, np.ndarray]:
    """The reference implementation's augmentations of one image, by operation."""
    with np.load(fixtures / "augment.npz") as data:
        return dict(data)


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], list[list[Any]]]:
    """Runs a script that compiles Triton kernels, which needs no GPU, and returns the rows of JSON that it prints.

    A row ends with the size of a kernel and its PTX: without atomics, whose sums in any order would differ from run to
    run, and without float64.
    """

    def run(script: str) -> list[list[Any]]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads(done.stdout)
        for name, *_, size, ptx in rows:
            assert size > 1000, name
            assert "atom." not in ptx and "red." not in ptx.replace(".shared", "") and ".f64" not in ptx, name
        return rows

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images (`imagenet-sample/`, `cifar10.tar.xz`); skips the test where it is missing.

    Set BYOLT_TEST_DATA to keep it elsewhere than in ../shared/data beside the repository.
    """
    folder = Path(os.environ.get("BYOLT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real images are not at {folder} (set BYOLT_TEST_DATA)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu or ffcv are skipped where there is none."""
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "no CUDA device"
    if importlib.util.find_spec("ffcv") is None:
        absent["ffcv"] = "ffcv is not installed (tools/install_ffcv.sh)"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
