"""The lock of a folder that a run or a conversion writes to."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from byolt.files.lock import Lock

HOLD = "import sys; from pathlib import Path; from byolt.files.lock import Lock; lock = Lock(Path(sys.argv[1]), 'DST'); print(repr(lock.take()), flush=True); sys.stdin.read()"
ROOT = Path(__file__).resolve().parent.parent
NAME = "run.lock"


def lock_of(folder: Path) -> Lock:
    return Lock(folder / NAME, f"run.out={folder}")


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / NAME)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "''\n"
    return process


def test_second_run_is_refused_and_a_dead_one_s_lock_is_taken_over(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        with pytest.raises(ValueError, match=rf"in use by pid {process.pid} on {socket.gethostname()}: wait"):
            lock_of(tmp_path).take()
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lock_of(tmp_path) as lock:
        assert f"took over {tmp_path / NAME} from pid {process.pid} on {socket.gethostname()}" in lock.take()


def test_released_lock_is_free_without_a_word(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_of(tmp_path) as lock:
            assert lock.take() == ""
            with pytest.raises(ValueError, match=f"in use by pid {os.getpid()} on"):
                lock_of(tmp_path).take()
    assert (tmp_path / NAME).read_bytes() == b""


def test_lock_of_another_machine_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"host": "node7", "pid": 12}))
    with lock_of(tmp_path) as lock:
        assert "from pid 12 on node7, which ended without releasing it (or still runs" in lock.take()


@pytest.mark.parametrize("text", ["", "junk", "[]", '{"host": 1}', '{"host": "x", "pid": "y"}', "\0\0"])
def test_file_that_says_nothing_is_no_obstacle(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with lock_of(tmp_path) as lock:
        assert lock.take() == ""


def test_without_locks_the_pid_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    host = socket.gethostname()
    with lock_of(tmp_path) as lock:
        assert "this file system has no locks" in lock.take()
        with pytest.raises(ValueError, match=f"in use by pid {os.getpid()} on {host}"):
            lock_of(tmp_path).take()
    (tmp_path / NAME).write_text(json.dumps({"host": host, "pid": 2**22 + 1}))  # above the kernel's largest
    with lock_of(tmp_path) as lock:
        assert lock.take()


def test_lock_that_fails_leaves_the_holder_s_file_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "broken")

    with lock_of(tmp_path) as first:
        assert first.take() == ""
        text = (tmp_path / NAME).read_text()
        assert str(os.getpid()) in text
        monkeypatch.setattr(fcntl, "flock", broken)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="broken"), lock_of(tmp_path) as second:
            second.take()
        assert os.listdir("/proc/self/fd") == before
        assert (tmp_path / NAME).read_text() == text


def test_folder_is_made_or_named(tmp_path: Path) -> None:
    with lock_of(tmp_path / "a" / "b") as lock:
        assert lock.take() == ""
    with pytest.raises(
        ValueError, match=r"run\.out=.*run\.lock cannot be written: File exists; choose another"
    ):
        lock_of(tmp_path / "a" / "b" / NAME).take()


def test_a_symbolic_link_or_a_fifo_is_refused_and_its_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "thesis.tex"
    target.write_text("years of work")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / NAME).symlink_to(target)
    with (
        pytest.raises(ValueError, match=r"run\.lock is a symbolic link; choose"),
        lock_of(tmp_path / "link") as lock,
    ):
        lock.take()
    assert target.read_text() == "years of work"
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / NAME)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=r"run\.lock is not a regular file; choose"):  # and does not wait
        lock_of(tmp_path / "fifo").take()
    assert os.listdir("/proc/self/fd") == before
