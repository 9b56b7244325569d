"""docs/scale.md has the numbers that docs/scale.py computes, from the constants at its head and the orders."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", DOCS / "scale.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_page_has_the_numbers_of_its_script(scale: ModuleType) -> None:
    page = (DOCS / "scale.md").read_text()
    assert scale.fill(page) == page
    assert page.count("<!-- end -->") == 5


def test_numbers_agree_with_a_calculation_by_hand(scale: ModuleType) -> None:
    """A node of 8 GPUs: 23,200 images/s of 110 kB are 362.5 parts of 7.04 MB, each of 30 + 101 ms."""
    rows = [line.strip("| ").split(" | ") for line in scale.requests().splitlines()]
    assert rows[3] == ["1", "up to 8 MB", "2.55", "362", "1", "47.3", "0.522", "2.2"]
    assert scale.storage(100e12) == pytest.approx(50_000 * 0.023 + 50_000 * 0.022)


def test_measures(scale: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scale.measure(5000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("opened in 0.") and lines[-1].startswith("full: 0.")
