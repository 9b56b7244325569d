"""Names of files and classes hold any byte; a terminal gets none that it would obey."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from byolt import train
from byolt.files.console import difference, printable, say_table
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


@pytest.mark.parametrize(
    "main", [report.main, evaluate.main, make_shards.main, ablate.main, verify_shards.main]
)
def test_wrong_arguments_are_escaped(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["x", f"--nope={HOSTILE}", "--nope=https://u:p@h/s"])
    told = capsys.readouterr().err
    assert not set(told) & set("\x1b\x07\r\udcff\x9b\u202e") and "u:p" not in told


def test_train_and_its_progress_escape_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / HOSTILE)])
    assert train.main() == 2
    Meter("step", 1).say(HOSTILE)
    told = capsys.readouterr().err
    assert told.count(SHOWN) == 2 and not set(told) & set("\x1b\x07\r")


def test_a_command_whose_reader_has_gone_ends_like_others() -> None:
    """As `command 2>&1 | head -1` does. A thread is not ended, since others may wait for it."""
    program = """if True:
        import os, threading
        from rich.table import Table
        from byolt.files.console import say_table
        from byolt.files.progress import Meter
        input()
        went_on = []
        thread = threading.Thread(target=lambda: (say_table(Table("x")), went_on.append(True)))
        thread.start()
        thread.join()
        if went_on:
            Meter("x", 1).say("x")"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
    assert process.returncode == 128 + signal.SIGPIPE


def test_no_line_shows_what_a_url_hides(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("https://u:p@h/s", "[/x]")
    table.add_row("https://h/s?sig=1", HOSTILE)
    say_table(table)
    Meter("step", 1).say("https://u:p@h/s")
    out, err = capsys.readouterr()
    assert (
        "https://***@h/s" in out and "https://h/s?***" in out and "[/x]" in out and err == "https://***@h/s\n"
    )
    assert not set(out) & set("\x1b\x07\r")


def test_only_the_difference_is_listed() -> None:
    names = [f"n{i:08d}" for i in range(1000)]
    assert difference("data.path", names, "eval.path", names[:-1]) == "only in data.path: n00000999"
    said = difference("data.path", names, "eval.path", ["n", *names[20:]])
    assert said.startswith("only in data.path: n00000000, ") and said.endswith(
        "and 15 more; only in eval.path: n"
    )
    assert difference("a", ["x", "y"], "b", ["y", "x"]) == "the same names in another order, or repeated"
