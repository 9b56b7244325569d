"""Paths as people type them."""

from pathlib import Path

import pytest

from byolt.files.paths import home_path
from byolt.tools import make_shards


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path("~/x") == Path("/home/me/x")
    assert home_path("~nobody-has-this-name") == Path("~nobody-has-this-name")
    args = make_shards.parse(["~/photos", "~/sets/photos"])
    assert (args.src, args.dst) == (Path("/home/me/photos"), Path("/home/me/sets/photos"))


def test_every_tool_expands_the_home() -> None:
    tools = Path(__file__).resolve().parent.parent / "tools"
    assert [path.name for path in tools.rglob("*.py") if "type=Path" in path.read_text()] == []
