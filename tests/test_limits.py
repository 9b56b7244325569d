"""A limit of the shell or the container that a run meets is named in one line."""

import errno
import functools
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import Run, write_images

from byolt.files.limits import limit_behind
from byolt.tools.make_shards import main as make_shards


def test_limit_behind_an_error() -> None:
    wrapped = OSError("the checkpoint cannot be written")
    wrapped.__cause__ = OSError(errno.EFBIG, "File too large")
    for error, name, option in (
        (OSError(errno.EMFILE, "x"), "NOFILE", "-n"),
        (wrapped, "FSIZE", "-f"),
        (RuntimeError("can't start new thread"), "NPROC", "-u"),
    ):
        assert re.fullmatch(
            rf"; RLIMIT_{name} is -?[0-9,]+: raise it \(ulimit {option}\)", limit_behind(error)
        )
    assert limit_behind(OSError(errno.ENOSPC, "x")) == limit_behind(ValueError("x")) == ""


@pytest.mark.faults
def test_small_limit_of_file_sizes_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, write_images(tmp_path / "images"))
    process = run(before=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert process.wait() == 1
    errors = [line for line in process.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith("; RLIMIT_FSIZE is 20,000: raise it (ulimit -f)")
    assert "Traceback" not in process.text


def _no_threads() -> None:
    """As RLIMIT_NPROC does, which root is exempt from."""
    import threading

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = start  # type: ignore[method-assign]


@pytest.mark.faults
def test_limit_of_threads_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, write_images(tmp_path / "images"))
    process = run(before=_no_threads)
    assert process.wait() in (1, 2)
    assert re.search(r"^error: .*; RLIMIT_NPROC is -?[0-9,]+: raise it \(ulimit -u\)$", process.text, re.M)
    assert "Traceback" not in process.text


def test_more_shards_than_open_files_are_refused_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    assert make_shards([str(tmp_path / "images"), str(tmp_path / "dst"), "--workers", "1"]) == 0
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60));"
        f"from byolt.pipelines.sources import open_source; open_source({str(tmp_path / 'dst')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has 1 shards, each an open file, and RLIMIT_NOFILE is 60: raise it (ulimit -Hn)" in done.stderr
