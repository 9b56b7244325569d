"""Whole runs of train.py on a tiny network and tiny images, for the tests that break them.

Each process is forked from a server that has imported torch already, so it starts in a tenth of a second instead of five.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from byolt.files.atomic import replacing
from byolt.model.run import checkpoint
from byolt.model.run.digest import digest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # of a whole run: 3 epochs of 32 images in batches of 8
CONFIG = """
run: {out: OUT, log_every: 1, checkpoint_minutes: 0, keep_checkpoints: 2}
data: {path: DATA, backend: torch, threads: 1}
augment:
  size: 16
  view1: {blur: 1.0, solarize: 0.0}
  view2: {blur: 0.1, solarize: 0.2}
model: {backbone: resnet8, stem: cifar, projector_hidden: 16, projector_size: 8, predictor_hidden: 16}
optimizer: {base_lr: 1.0, warmup_epochs: 0.5, weight_decay: 1.0e-6, base_tau: 0.9}
train: {epochs: 3, batch_size: 8, device: cpu, timeout_minutes: 1}
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "whole_runs",
        "train",
        "torch.nn.parallel",
        "byolt.model.run.run",
        "byolt.model.run.pictures",
        "byolt.pipelines.loader",
    ]
)


def write_images(folder: Path, count: int = 32) -> Path:
    """JPEGs of noise in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return folder


@contextlib.contextmanager
def not_drawn() -> Iterator[None]:
    """A run's pictures have one pixel: drawing them takes longer than the other work of a tiny run."""

    def save(path: Path, *_: object) -> None:
        with replacing(path) as temporary:
            Image.new("RGB", (1, 1)).save(temporary, "png")

    with patch.multiple("byolt.model.run.pictures", save_view_pairs=save, save_loss_curve=save):
        yield


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def on_two_ranks(function: Callable, *arguments: Any) -> None:
    """Calls function(rank, *arguments) in two processes, each with the environment of a rank."""
    torch.multiprocessing.start_processes(
        _on_a_rank, (function, free_port(), arguments), nprocs=2, start_method="forkserver"
    )


def _on_a_rank(rank: int, function: Callable, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    function(rank, *arguments)


class Run:
    """A config in a folder of its own, and the processes started on it."""

    def __init__(self, folder: Path, data: Path | str) -> None:
        self.folder, self.out, self.config = folder, folder / "run", folder / "tiny.yaml"
        self.config.write_text(CONFIG.replace("OUT", str(self.out)).replace("DATA", str(data)))
        self._count = 0

    def arguments(self, *arguments: str) -> list[str]:
        return [str(ROOT / "train.py"), "--config", str(self.config), *arguments]

    def start(
        self, *arguments: str, before: Callable[[], None] | None = None, **environment: str
    ) -> "Process":
        """Starts one process; `before` is called in it first, to break something."""
        self._count += 1
        text = self.folder / f"output-{self._count}"
        text.touch()
        process = SERVER.Process(
            target=_train, args=(self.arguments(*arguments), environment, text, before), daemon=True
        )
        process.start()
        return Process(process, text)

    def start_ranks(
        self, size: int, *arguments: str, before: Callable[[], None] | None = None, **environment: str
    ) -> list["Process"]:
        """Starts the ranks of one run, without torchrun."""
        port = free_port()
        return [
            self.start(*arguments, before=before, **rank_environment(rank, size, port), **environment)
            for rank in range(size)
        ]

    def __call__(
        self, *arguments: str, before: Callable[[], None] | None = None, **environment: str
    ) -> "Process":
        """Runs one process to its end."""
        process = self.start(*arguments, before=before, **environment)
        process.wait()
        return process

    def newest(self) -> tuple[Path, dict]:
        path, state, damaged = checkpoint.load_newest(self.out)
        assert path is not None and not damaged
        return path, state

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def leftovers(self) -> list[str]:
        """Temporary files of the run's folder."""
        return [path.name for path in self.out.rglob("*.byolt-tmp")]


class Process:
    """A started process and its output, stdout and stderr together."""

    def __init__(self, process: BaseProcess, text: Path) -> None:
        self._process, self._text = process, text
        assert process.pid is not None
        self.pid = process.pid

    def __enter__(self) -> "Process":
        return self

    @property
    def text(self) -> str:
        return self._text.read_text(errors="replace")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Returns the first line that matches; fails if the process ends without one or time is up."""
        with self._text.open() as file:
            for line in _follow(file, self._process, seconds):
                if re.search(pattern, line):
                    return line
        raise AssertionError(f"no line matched {pattern!r}, exit code {self._process.exitcode}:\n{self.text}")

    def wait(self, seconds: float = 60) -> int:
        """Returns the exit code, -number for a signal; kills a process that does not end, and fails the test."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"did not end within {seconds} s:\n{self.text}")
        return self._process.exitcode

    @property
    def digest(self) -> str:
        """The run's last line."""
        found = re.search(r"^digest: step (\d+) sha256 ([0-9a-f]{64})$\s*\Z", self.text, re.M)
        assert found, self.text
        return f"{found[1]} {found[2]}"


def _follow(file: object, process: BaseProcess, seconds: float) -> Iterator[str]:
    """Yields whole lines as they are written, until the process ends or time is up."""
    line = ""
    waited = 0.0
    while waited < seconds:
        ended = process.exitcode is not None
        line += file.readline()  # type: ignore[attr-defined]
        if line.endswith("\n"):
            yield line
            line = ""
        elif ended:
            return
        else:
            process.join(0.01)
            waited += 0.01


def _train(
    arguments: list[str], environment: dict[str, str], text: Path, before: Callable[[], None] | None
) -> None:
    """In the new process."""
    from byolt import train

    descriptor = os.open(text, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= environment
    sys.argv = arguments
    os.sched_getaffinity = lambda _: {0}  # one thread: two that wait for each other crawl on a busy machine
    if before:
        before()
    code = 1
    with contextlib.suppress(SystemExit), not_drawn():
        code = train.main()
    sys.stdout.flush()
    os._exit(code)


def slow(place: str) -> None:
    """Makes a function take half a second longer; its first call prints the line "slow". For `Run.start`'s `before`."""
    module, name = place.rsplit(".", 1)
    owner = importlib.import_module(module)
    function, said = getattr(owner, name), itertools.chain(["slow\n"], itertools.repeat(""))

    def slowly(*args: object) -> object:
        print(end=next(said), flush=True)
        time.sleep(0.5)
        return function(*args)

    setattr(owner, name, slowly)


def digest_of(state: dict) -> str:
    return f"{state['step']} {digest(state)}"
