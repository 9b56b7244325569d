"""Lines of text where there is no terminal, and a bar where there is one."""

import re
import time

import pytest
from rich.console import Console

from byolt.files import progress
from byolt.files.progress import Meter


def test_lines_say_what_is_left_of_this_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with Meter("step", 7000, 10, line_every=5.0) as meter:
        clock[0] += 4
        meter.update(12, "too early")
        clock[0] += 6
        meter.update(20, "loss 3.5 [a]")
        meter.update(21)
        meter.say("warning: [b]")
    assert capsys.readouterr().err == "step 20/7000  loss 3.5 [a]  ETA 1:56:20\nwarning: [b]\n"
    with Meter("step", 7, enabled=False) as meter:
        meter.update(1, "nothing")
        meter.say("nothing")
    assert capsys.readouterr().err == ""


def test_terminal_has_a_bar_below_the_last_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **more: Console(force_terminal=True, width=80, **more))
    with Meter("image", 8, line_every=5.0) as meter:
        meter.update(2, "50 images/s")
        meter.say("note")
        meter.update(8)
    shown = capsys.readouterr().err
    assert "50 images/s" in shown and "note" in shown and "8/8" in shown
    assert shown.index("note") < shown.rindex("50 images/s") < shown.rindex("8/8")


def test_rows_stay_above_a_bar_of_the_terminal_s_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **more: Console(force_terminal=True, width=80, **more))
    with Meter("step", 312784) as meter:
        meter.update(1, "loss 3.5")
        meter.update(2, "loss 3.4")
        meter.update(312784)
    lines = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip()
        for line in re.split(r"[\r\n]+", capsys.readouterr().err)
    ]
    assert lines.count("step 1  loss 3.5") == lines.count("step 2  loss 3.4") == 1
    bars = [line for line in lines if "/312784" in line]
    assert bars[-1].startswith("━" * 30) and "312784/312784" in bars[-1]
    assert {len(line) for line in bars} <= {79, 80} and max(map(len, lines)) <= 80
