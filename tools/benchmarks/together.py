"""Measures the whole loader, the training step on resident data, and the step fed by the loader.

They run in turns in one process, so that a slow phase of the machine affects all alike; the median over the rounds is
reported. Batches that the loader made ahead do not count: its queue is emptied before the loader is measured, and
other measurements wait until the queue is full again.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, repeat
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from byolt.configs.schema import Config, ViewConfig
from byolt.model.distributed import World
from byolt.model.step import PRECISIONS, StepResult, make_step
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.loader import Batch, Loader
from byolt.pipelines.sources import Source
from byolt.tools.benchmarks.stages import STAGES, Clock, Cost, measure_stages, rate

ROUNDS = 3
LONGEST_WAIT = 10.0  # seconds; two batches of 256 images on one CPU thread take less than 1 s
LONGEST = 3.0  # seconds after which a turn ends early; one step can take that long on a CPU


def measure(config: Config, source: Source, world: World, batches: int, torchvision: bool) -> dict[str, Cost]:
    """Costs of STAGES, "loader", "step", "both" and, if requested, "torchvision"; arguments as `measure_together`."""
    stages = measure_stages(config, source, world.device, choose_precision(config, world)[1], batches)
    return stages | measure_together(config, source, world, batches, torchvision)


def choose_precision(config: Config, world: World) -> tuple[str, torch.dtype]:
    """The step's precision, which train.precision or the device decides, and the views' dtype."""
    precision = config.train.precision_on(world.device.type)
    return precision, PRECISIONS[precision] if world.device.type == "cuda" else torch.float32


def measure_together(
    config: Config, source: Source, world: World, batches: int, torchvision: bool
) -> dict[str, Cost]:
    """Costs of "loader", "step", "both" and, if requested, "torchvision".

    Args:
        config: of the run.
        source: its images.
        world: a single process.
        batches: number of batches of a turn, unless they take longer than LONGEST.
        torchvision: also measures a plain torchvision pipeline in one thread, on the images of the first batch.
    """
    (precision, dtype), size = choose_precision(config, world), config.train.batch_size
    train_step = make_step(config, world, precision)
    views = torchvision_views(config) if torchvision else None
    turns: dict[str, list[Cost]] = {}

    def step(batch: list[Batch]) -> StepResult:
        pairs = [(part.view1, part.view2) for part in batch]
        return train_step(pairs, lr=0.0, tau=config.optimizer.base_tau)  # at lr 0 the weights do not change

    def turn(name: str, work: Iterator[object]) -> None:
        clock, begun = Clock(world.device), time.perf_counter()
        with clock.measure(0):  # one measurement, because steps overlap
            for _ in range(batches):
                next(work)
                clock.images += size
                if time.perf_counter() - begun > LONGEST:
                    break
        turns.setdefault(name, []).append(clock.cost())

    kept = make_resident(config, source, world.device, dtype)
    backend, _ = kept or make_backend(config, world.device, dtype)
    with Loader(config, source, backend, device=world.device) as loader:
        steps = iter(loader)

        def fresh() -> Iterator[list[Batch]]:
            """The loader's next batches, without those that it made ahead during other measurements."""
            for _ in islice(steps, config.data.prefetch // config.train.accumulation + 2):
                pass
            return steps

        resident = next(steps)
        step(resident)  # the first compiles and allocates
        for _ in range(ROUNDS):
            turn("loader", fresh())
            wait_until_idle()
            turn("step", (step(resident) for _ in repeat(None)))
            turn("both", (step(batch) for batch in fresh()))
            if views:
                wait_until_idle()
                encoded = [source.read(i) for i in resident[0].id.tolist()]
                turns.setdefault("torchvision", []).append(one_by_one(views, encoded))
    return {name: median(costs) for name, costs in turns.items()}


def median(costs: list[Cost]) -> Cost:
    """The median of each number."""
    gpu = [cost.gpu_us for cost in costs if cost.gpu_us is not None]
    return Cost(
        statistics.median(cost.wall_ms for cost in costs),
        statistics.median(cost.cpu_ms for cost in costs),
        statistics.median(gpu) if gpu else None,
    )


def wait_until_idle() -> None:
    """Waits until no thread of this process works, because the loader has filled its queue.

    Returns after LONGEST_WAIT at the latest: a thread of a library may spin forever (on a GPU, one of the driver's or
    DALI's). Its work is then part of every measurement.
    """
    before, begun = -1.0, time.monotonic()
    while time.process_time() - before > 0.005 and time.monotonic() - begun < LONGEST_WAIT:
        before = time.process_time()
        time.sleep(0.1)


def stall(costs: Mapping[str, Cost]) -> float:
    """Share of the speed that is lost when the loader feeds the step: 1 - both / slower of the two, in images/s."""
    return 1 - max(costs["loader"].wall_ms, costs["step"].wall_ms) / costs["both"].wall_ms


def bottleneck(costs: dict[str, Cost], on_gpu: bool) -> str:
    """One sentence: whether the loader or the step is slower, and which stage takes most of the loader's time."""
    loader, step = 1000 / costs["loader"].wall_ms, 1000 / costs["step"].wall_ms
    unit = "ms" if on_gpu else "CPU ms"
    spent = {name: costs[name].wall_ms if on_gpu else costs[name].cpu_ms for name in STAGES}
    longest = max(spent, key=lambda name: spent[name])
    share = f"{longest} takes {spent[longest]:.2f} of its {sum(spent.values()):.2f} {unit} per image"
    if step <= loader:
        return (
            f"The step is the bottleneck: {rate(step)} images/s; the loader makes {rate(loader)} ({share})."
        )
    return f"The loader is the bottleneck: {rate(loader)} images/s; the step takes {rate(step)}. In the loader {share}."


def torchvision_views(config: Config) -> Callable[[bytes], list[Tensor]]:
    """The recipe as in torchvision's documentation: PIL decodes, transforms.v2 work on uint8 tensors."""
    from torchvision.transforms import InterpolationMode, v2

    augment = config.augment

    def compose(view: ViewConfig) -> Any:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        bicubic = InterpolationMode.BICUBIC
        return v2.Compose(
            [
                v2.RandomResizedCrop(augment.size, view.crop_area, view.crop_ratio, bicubic),
                v2.RandomHorizontalFlip(view.flip),
                v2.RandomApply([jitter], view.jitter),
                v2.RandomGrayscale(view.gray),
                v2.RandomApply([v2.GaussianBlur(augment.blur_taps, view.blur_sigma)], view.blur),
                v2.RandomSolarize(128, view.solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment.mean, augment.std),
            ]
        )

    views = compose(augment.view1), compose(augment.view2)

    def make(encoded: bytes) -> list[Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(encoded)).convert("RGB"))
        return [view(image) for view in views]

    return make


def one_by_one(views: Callable[[bytes], list[Tensor]], encoded: list[bytes]) -> Cost:
    """Cost of both views of every image, stacked, in one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = Clock(torch.device("cpu"))
    with clock.measure(len(encoded)):
        torch.stack([torch.stack(views(data)) for data in encoded])
    torch.set_num_threads(threads)
    return clock.cost()
