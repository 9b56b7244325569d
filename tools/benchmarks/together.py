"""What the stages do together: the whole loader, the training step on resident data, and the one feeding the other.

They run in turns in one process, so that a slow spell of the machine hits all alike; the median of the rounds counts.
Between the turns nothing works ahead unseen: the loader's queue is emptied before it is measured, and everything else
waits until the loader has filled it again.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from byolt.configs.schema import Config, ViewConfig
from byolt.model.distributed import World
from byolt.model.step import StepResult, make_step
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.loader import Batch, Loader
from byolt.pipelines.sources import Source
from byolt.tools.benchmarks.stages import STAGES, Clock, Cost, rate

ROUNDS = 3
LONGEST_WAIT = 10.0  # seconds; on one CPU thread two batches of 256 images, made ahead, take less than one
LONGEST = 3.0  # seconds after which a turn ends early: a step can take that long on a CPU


def measure_together(
    config: Config, source: Source, world: World, precision: str, dtype: torch.dtype, batches: int, peer: bool
) -> dict[str, Cost]:
    """Costs of "loader", "step", "both" and, if asked, "torchvision".

    Args:
        config: the run.
        source: its images.
        world: a single process.
        precision: of the step, "fp32", "bf16" or "fp16".
        dtype: of the views.
        batches: of a turn, unless they take longer than LONGEST.
        peer: also a plain torchvision pipeline, one thread, on the images of the loader's last batch.
    """
    size = config.train.batch_size
    train_step = make_step(config, world, precision)
    views = torchvision_views(config) if peer else None
    turns: dict[str, list[Cost]] = {}

    def step(batch: list[Batch]) -> StepResult:
        pairs = [(part.view1, part.view2) for part in batch]
        # At 0 the weights stay, and the work is the same.
        return train_step(pairs, lr=0.0, tau=config.optimizer.base_tau)

    def turn(name: str, work: Iterator[object]) -> None:
        clock, begun = Clock(world.device), time.perf_counter()
        with clock.measure(0):  # as a whole: a step need not wait for the one before it
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
            """The loader's batches from now on, without those made ahead while others were measured."""
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
    """Until the loader has made its batches ahead: no thread of this process works any more.

    Or LONGEST_WAIT is over: a library's thread may spin for ever (on a GPU, one of the driver's or DALI's), and then
    its work is part of whatever is measured.
    """
    before, begun = -1.0, time.monotonic()
    while time.process_time() - before > 0.005 and time.monotonic() - begun < LONGEST_WAIT:
        before = time.process_time()
        time.sleep(0.1)


def stall(loader: float, step: float, both: float) -> float:
    """Share of the speed that is lost when the loader feeds the step: 1 - both / slower of the two alone.

    Args:
        loader: images/s of the loader alone.
        step: images/s of the step alone.
        both: images/s of the step fed by the loader.
    """
    return 1 - both / min(loader, step)


def bottleneck(costs: dict[str, Cost], on_gpu: bool) -> str:
    """One sentence: which of loader and step is slower, and where the loader's time goes."""
    loader, step = 1000 / costs["loader"].wall_ms, 1000 / costs["step"].wall_ms
    unit = "ms" if on_gpu else "CPU ms"
    spent = {name: costs[name].wall_ms if on_gpu else costs[name].cpu_ms for name in STAGES}
    dearest = max(spent, key=lambda name: spent[name])
    of_it = f"{dearest} takes {spent[dearest]:.2f} of its {sum(spent.values()):.2f} {unit} an image"
    if step <= loader:
        return f"The step is the bottleneck: {rate(step)} images/s, where the loader makes {rate(loader)} ({of_it})."
    return (
        f"The loader is the bottleneck: {rate(loader)} images/s, where the step takes {rate(step)}; {of_it}."
    )


def torchvision_views(config: Config) -> Callable[[bytes], list[Tensor]]:
    """The recipe as torchvision's documentation would have it: PIL decodes, transforms.v2 on uint8 tensors."""
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
    """Cost of both views of every image, stacked, in one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = Clock(torch.device("cpu"))
    with clock.measure(len(encoded)):
        torch.stack([torch.stack(views(data)) for data in encoded])
    torch.set_num_threads(threads)
    return clock.cost()
