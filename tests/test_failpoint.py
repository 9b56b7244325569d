"""Fail-points: nothing without the variable, and the wanted fault at the wanted place only."""

import errno
import signal

import pytest

from byolt.files import failpoint


def reach_all() -> None:
    for count in range(3):
        for point in ("step", "log"):
            failpoint.reach(point, count)


def test_nothing_fails_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYOLT_FAIL", raising=False)
    reach_all()


@pytest.mark.parametrize(("action", "kind"), [("raise", RuntimeError), ("ENOSPC", OSError)])
def test_it_fails_there_and_only_there(
    action: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYOLT_FAIL", f"log:2:{action}:1")
    reach_all()  # this is rank 0
    monkeypatch.setenv("RANK", "1")
    failpoint.reach("step", 2)
    failpoint.reach("log", 1)
    with pytest.raises(kind) as caught:
        failpoint.reach("log", 2)
    assert getattr(caught.value, "errno", errno.ENOSPC) == errno.ENOSPC
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    reach_all()


def test_a_signal_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    old = signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    monkeypatch.setenv("BYOLT_FAIL", "step:1:SIGUSR2")
    reach_all()
    signal.signal(signal.SIGUSR2, old)
    assert received == [signal.SIGUSR2]
