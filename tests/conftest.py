"""What several test files share: where the reference numbers and the real images are."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

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
