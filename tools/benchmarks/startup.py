"""Measures a run of train.py from its command to the end of its first step, part by part.

Each time train.py runs in a new process, in which the functions of PARTS are timed; all modules are imported first. CPU
seconds are summed over all threads. Imports no torch: the new process begins here.
"""

import contextlib
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byolt
from byolt.files.console import say

PARTS = {
    "opening the data": ("byolt.pipelines.sources", "open_split"),
    "decoding into memory": ("byolt.pipelines.backends", "make_resident"),
    "network and optimizer": ("byolt.model.step", "make_step"),
    "kNN before training": ("byolt.model.quality.monitor", "KnnMonitor.__call__"),
    "waiting for the first batch": ("byolt.pipelines.loader", "Loader._take"),
    "first step": ("byolt.model.step", "TrainStep.__call__"),
}
RUNS = 3
_OTHERS = (
    "byolt.model.run.run",
    "byolt.model.quality.probe",
    "byolt.pipelines.plain",
    "byolt.pipelines.subset",
)
Seconds = dict[str, tuple[float, float]]  # wall and CPU, by part


def measure(arguments: list[str]) -> Seconds:
    """The median over RUNS processes; one before them, with cold caches, does not count.

    Args:
        arguments: of train.py; run.out is a temporary folder.

    Raises:
        ValueError: the run ends before its first step.
    """
    found = [_start(arguments) for _ in range(RUNS + 1)][1:]
    return {
        name: (statistics.median(f[name][0] for f in found), statistics.median(f[name][1] for f in found))
        for name in found[0]
    }


def table(seconds: Seconds) -> str:
    """A heading, one line for each part, the sum, and how often it was measured."""
    lines = [f"{'part':28} {'seconds':>8} {'CPU s':>8}"]
    whole = tuple(sum(part[k] for part in seconds.values()) for k in (0, 1))
    for name, (wall, cpu) in {**seconds, "command to first step": whole}.items():
        lines.append(f"{name:28} {wall:8.2f} {cpu:8.2f}")
    return "\n".join([*lines, f"medians of {RUNS} processes; one before them does not count"])


def _start(arguments: list[str]) -> Seconds:
    path = os.pathsep.join(
        filter(None, [str(Path(byolt.__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, repr(time.time()), *arguments, f"run.out={folder}/run"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    with contextlib.suppress(ValueError, IndexError):
        seconds: Seconds = json.loads(done.stdout.splitlines()[-1])
        return seconds
    raise ValueError(f"train.py ended before its first step: {(done.stderr.strip() or 'no output')[-2000:]}")


def _run(began: float, arguments: list[str]) -> None:
    """In the new process: prints the parts as JSON at the end of the first step."""
    from byolt import train

    seconds: dict[str, list[float]] = {}
    last = [began, 0.0]

    def mark(name: str) -> None:
        now = [time.time(), time.process_time()]
        seconds[name] = [b - a for a, b in zip(last, now, strict=True)]
        last[:] = now

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.time(), time.process_time()
            result = function(*args, **kwargs)
            spent = seconds.setdefault(name, [0.0, 0.0])
            spent[0] += time.time() - wall
            spent[1] += time.process_time() - cpu
            if name == "first step":
                result.loss.item()  # waits for a GPU
                _print(seconds, began)
            return result

        return run

    def start(*args: Any) -> int:
        mark("Python and the settings")
        for module in {*(module for module, _ in PARTS.values()), *_OTHERS}:
            importlib.import_module(module)
        mark("importing torch and byolt")
        for name, (module, attribute) in PARTS.items():
            owner, _, method = attribute.rpartition(".")
            place = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            setattr(place, method, timed(name, getattr(place, method)))
        return run(*args)

    run, train.train = train.train, start  # type: ignore[assignment]
    sys.exit(train.main(arguments))


def _print(seconds: dict[str, list[float]], began: float) -> None:
    whole = [time.time() - began, time.process_time()]
    seconds["the rest"] = [whole[k] - sum(part[k] for part in seconds.values()) for k in (0, 1)]
    say(json.dumps(seconds))
    os._exit(0)


if __name__ == "__main__":
    _run(float(sys.argv[1]), sys.argv[2:])
