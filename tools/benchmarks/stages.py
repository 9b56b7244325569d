"""What each stage costs when it runs alone: reading, drawing, decoding, the parts of the views, the hand-over.

    read          bytes of the images (data.threads at a time, as the loader reads), headers checked (one thread)
    draw          which samples, and the parameters of their views (one thread)
    decode        the back end with views of 8 px and nothing else to do
    crop + resize views of full size, nothing else drawn, minus decode: with flip, normalisation and writing the result
    colour        the same with jitter and grey as drawn, minus the line above
    blur          likewise
    solarize      likewise: the whole back end minus the line above
    hand-over     the finished batch to the step's device, dtype and memory layout

A back end makes both views in one go, so its parts cannot be timed one by one: they are differences between calls on
the same images, in turn, of which each has one more operation switched on. Normalisation cannot be switched off. On a
busy machine a small difference may come out negative.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from byolt.configs.schema import Config
from byolt.pipelines import order
from byolt.pipelines.backends import make_backend
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.sources import ParallelReader, Source
from byolt.pipelines.views import ViewParams, draw_both

SMALL = 8  # side in pixels of views that cost next to nothing; the smallest that augment.size allows
OPERATIONS = ("jitter", "gray", "blur", "solarize")
PARTS = {
    "crop + resize": (),
    "colour": ("jitter", "gray"),
    "blur": ("jitter", "gray", "blur"),
    "solarize": OPERATIONS,
}
STAGES = ("read", "draw", "decode", *PARTS, "hand-over")


@dataclass(frozen=True)
class Cost:
    """What an image (both its views) takes."""

    wall_ms: float
    cpu_ms: float  # of all threads of the process
    # Between two events on the current stream, waits included; None without a GPU.
    gpu_us: float | None = None

    def __sub__(self, other: "Cost") -> "Cost":
        gpu = None if self.gpu_us is None or other.gpu_us is None else self.gpu_us - other.gpu_us
        return Cost(self.wall_ms - other.wall_ms, self.cpu_ms - other.cpu_ms, gpu)

    @property
    def images_per_s(self) -> float | None:
        """None where a difference is not positive."""
        return 1000 / self.wall_ms if self.wall_ms > 0 else None


def rate(images_per_s: float | None) -> str:
    """As it is printed; a dash for a difference that is not positive."""
    if images_per_s is None:
        return "-"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


class Clock:
    """Adds up what happens inside `measure`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.wall = self.cpu = self.gpu = 0.0  # seconds
        self.images = 0

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        """Times the block, which handles so many images; waits for the GPU before and after."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self._on_gpu:
            end.record()
            torch.cuda.synchronize()
            self.gpu += begin.elapsed_time(end) / 1000
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.images += images

    def cost(self) -> Cost:
        gpu_us = 1e6 * self.gpu / self.images if self._on_gpu else None
        return Cost(1000 * self.wall / self.images, 1000 * self.cpu / self.images, gpu_us)


def only(params: ViewParams, operations: tuple[str, ...]) -> ViewParams:
    """The same windows and flips, and of OPERATIONS only these."""
    off = {name: np.zeros_like(getattr(params, name)) for name in OPERATIONS if name not in operations}
    return replace(params, **off)


def measure_stages(
    config: Config, source: Source, device: torch.device, dtype: torch.dtype, batches: int
) -> dict[str, Cost]:
    """Every stage of STAGES on the first batches of the run.

    Args:
        config: the run.
        source: its images.
        device: where the step is.
        dtype: in which the step wants the views.
        batches: that many, after one more that builds and compiles.

    Raises:
        ValueError: an image is unsound; names it.
    """
    augment, seed, size = config.augment, config.run.seed, config.train.batch_size
    small = config.model_copy(update={"augment": augment.model_copy(update={"size": SMALL})})
    backend, _ = make_backend(config, device, dtype)
    decode, _ = make_backend(small, device, dtype)
    reader = ParallelReader(source, config.data.threads)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    for number in range(batches + 1):
        if number <= 1:  # the first batch is not counted
            clocks = {name: Clock(device) for name in STAGES}
        with clocks["draw"].measure(size):
            epoch, step = order.position(number, len(source), size)
            ids = order.global_batch(seed, epoch, step, len(source), size, config.data.order)
            sides = source.heights[ids], source.widths[ids]
            drawn = draw_both(augment, seed, epoch, ids, *sides)
        with clocks["read"].measure(size):
            encoded = list(reader(ids.tolist()))
            for i, data in zip(ids.tolist(), encoded, strict=True):
                _inspect(source, i, data)
        bare = [only(params, ()) for params in drawn]
        decode(encoded, *bare)  # not counted: finding the caches cold costs 0.2 ms an image
        with clocks["decode"].measure(size):
            decode(encoded, *bare)
        made = backend(encoded, *bare)  # likewise
        for name, operations in PARTS.items():
            del made  # lets the back end use that memory again, as it does for batches that are done with
            params = [only(view, operations) for view in drawn]
            with clocks[name].measure(size):
                made = backend(encoded, *params)
        with clocks["hand-over"].measure(size):
            handed = [view.to(device, dtype).contiguous(memory_format=layout) for view in made]
        del made, handed
    reader.close()
    costs = {name: clock.cost() for name, clock in clocks.items()}
    return costs | differences({name: costs[name] for name in ("decode", *PARTS)})


def differences(cumulative: dict[str, Cost]) -> dict[str, Cost]:
    """Each cost minus the one before it; the first as it is."""
    names, costs = list(cumulative), list(cumulative.values())
    parts = [costs[0], *(later - earlier for earlier, later in pairwise(costs))]
    return dict(zip(names, parts, strict=True))


def _inspect(source: Source, i: int, data: bytes) -> None:
    try:
        inspect(data)
    except ValueError as error:
        raise ValueError(
            f"{source.describe(i)}: {error}; find all such with tools/verify_shards.py"
        ) from None
