"""Paths as people type them."""

from pathlib import Path

import pytest

from byolt.files.paths import expand_pattern, home_path, without_secrets
from byolt.tools import make_shards


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path("~/x") == Path("/home/me/x")
    assert home_path("~nobody-has-this-name") == Path("~nobody-has-this-name")
    args = make_shards.parse(["~/photos", "~/sets/photos"])
    assert (args.src, args.dst) == ("/home/me/photos", Path("/home/me/sets/photos"))


def test_every_tool_expands_the_home() -> None:
    tools = Path(__file__).resolve().parent.parent / "tools"
    assert [path.name for path in tools.rglob("*.py") if "type=Path" in path.read_text()] == []


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..10}.tar", ["a08.tar", "a09.tar", "a10.tar"]),
        ("a{8..10}", ["a8", "a9", "a10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,b{1..2}}", ["a", "b1", "b2"]),
        ("a{b}c{}", ["a{b}c{}"]),
    ],
)
def test_braces_expand_as_in_bash(pattern: str, names: list[str]) -> None:
    assert list(dict.fromkeys(expand_pattern(pattern))) == names


def test_wildcards_match_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b2", "a1", "a10", "x[1]", "x1"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert expand_pattern("a*") == ["a1", "a10"]
    assert expand_pattern("{b,a}?") == ["b2", "a1"]
    assert expand_pattern("x[1]") == ["x[1]"]  # it exists
    with pytest.raises(ValueError, match=rf"'c\*' matches no file in {tmp_path}"):
        expand_pattern("{a,c}*")
    with pytest.raises(ValueError, match="more than 100,000 names"):
        expand_pattern("{1..99999999999999999999}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/set", "s3://***@bucket/set"),
        ("https://a/1?token=x,https://b:p@c/2?token=y z", "https://a/1?***,https://***@c/2?***"),
        ("path 'https://a/1?t=x \"y'z w': name it", "path 'https://a/1?***': name it"),
        ("https://a/1?t=x y: no answer, ftp://b?t 'z", "https://a/1?***: no answer, ftp://b?***"),
        ("https://a/1?*** must be local", "https://a/1?*** must be local"),
        ("s3://b/a.beton?image=i&*** and more", "s3://b/a.beton?image=i&*** and more"),
        ("s3://b/a.beton?image=i&label=l,s3://b/c", "s3://b/a.beton?image=i&label=l,s3://b/c"),
        ("s3://b/a.beton?image=i&token=x", "s3://b/a.beton?image=i&***"),
        ("train.beton?image=img&label=cls", "train.beton?image=img&label=cls"),
        ("/data/me@home", "/data/me@home"),
    ],
)
def test_addresses_lose_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
