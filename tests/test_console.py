"""Names of files and classes hold any byte; a terminal gets none that it would obey."""

from collections.abc import Callable
from pathlib import Path

import pytest

from byolt import train
from byolt.files.console import difference, printable
from byolt.files.progress import Meter
from byolt.tools import ablate, evaluate, export, make_shards, report, show_views, verify_shards

HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\udcff\x9b31m\u202eb"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\r\udcff\x9b31m\u202eb"


def test_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("Grüße, 猫 🐈\n\tindented") == "Grüße, 猫 🐈\n\tindented"
    assert printable(ValueError("\x1b")) == r"\x1b"


COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "evaluate": (evaluate.main, ["PATH.pt", "--protocol", "knn"]),
    "export": (export.main, ["PATH.pt", "--to", "timm", "--out", "x"]),
    "make_shards": (make_shards.main, ["PATH", "PATH2"]),
    "report": (report.main, ["PATH"]),
    "show_views": (show_views.main, ["--config", "configs/quickstart.yaml", "data.path=PATH", "--out", "x.png"]),
    "verify_shards": (verify_shards.main, ["PATH"]),
    "ablate": (ablate.main, ["--config", "PATH", "--out", "PATH"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_escape_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, arguments = COMMANDS[name]
    assert main([argument.replace("PATH", str(tmp_path / HOSTILE)) for argument in arguments])
    told = "".join(capsys.readouterr())
    assert not set(told) & set("\x1b\x07\r\udcff\x9b\u202e")
    assert r"\x1b]0;title\x07" in told


def test_train_and_its_progress_escape_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / HOSTILE)])
    assert train.main() == 2
    Meter("step", 1).say(HOSTILE)
    told = capsys.readouterr().err
    assert told.count(SHOWN) == 2 and not set(told) & set("\x1b\x07\r")


def test_only_the_difference_is_listed() -> None:
    names = [f"n{i:08d}" for i in range(1000)]
    assert difference("data.path", names, "eval.path", names[:-1]) == "only in data.path: n00000999"
    said = difference("data.path", names, "eval.path", ["n", *names[20:]])
    assert said.startswith("only in data.path: n00000000, ") and said.endswith(
        "and 15 more; only in eval.path: n"
    )
    assert difference("a", ["x", "y"], "b", ["y", "x"]) == "the same names in another order, or repeated"
