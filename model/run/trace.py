"""Writes a Chrome trace of a few training steps: host, loader thread and GPU on one time line (torch.profiler)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile, record_function, schedule

WARM_UP = 5  # steps before the first traced one, for choosing and compiling kernels and allocating memory


def check_length(steps: int, left: int) -> None:
    """Raises ValueError if `steps` steps and the warm-up are more than the run has left; 0 steps always fit."""
    if steps and WARM_UP + steps > left:
        raise ValueError(
            f"--trace {steps} needs {WARM_UP + steps} steps with its warm-up, but the run has {left} left: trace "
            "fewer steps, or train longer"
        )


class Trace:
    """Traces `steps` steps after WARM_UP. A context manager around the loop, which calls `step` after each step.

    With 0 steps it does nothing. Profiling slows the steps down: use the trace for their order and shares, not for
    images/s. Open FOLDER/trace.json in chrome://tracing or ui.perfetto.dev.
    """

    def __init__(self, steps: int, folder: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = folder / "trace.json", say
        self._last = 0
        self._profile: profile | None = None
        if steps:
            self._profile = profile(
                schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
                experimental_config=_ExperimentalConfig(profile_all_threads=True),  # the loader's as well
            )

    def __enter__(self) -> "Trace":
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile:
            self._profile.__exit__(None, None, None)

    def range(self, name: str) -> AbstractContextManager[object]:
        """Names the block in the trace."""
        return record_function(name) if self._profile else nullcontext()

    def step(self, number: int) -> None:
        """Ends step `number` of the run."""
        self._last = number
        if self._profile:
            self._profile.step()

    def _write(self, profiled: profile) -> None:
        profiled.export_chrome_trace(str(self._path))
        self._say(f"trace up to step {self._last}: {self._path}")
