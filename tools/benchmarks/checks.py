"""Measures a run's kNN check and a linear probe beside the bare network on ready images, in one process."""

import copy
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import numpy as np
from torch import Tensor, nn

from byolt.configs.schema import Config
from byolt.model.distributed import World
from byolt.model.quality.features import calibrate_batch_norm, extract_features
from byolt.model.quality.monitor import KnnMonitor
from byolt.model.step import make_step
from byolt.pipelines.backends import make_resident
from byolt.pipelines.plain import plain_images
from byolt.pipelines.sources import Source, open_split
from byolt.pipelines.subset import spaced
from byolt.tools.benchmarks.stages import Clock, Cost
from byolt.tools.benchmarks.together import choose_precision, median

_READY = 4  # batches that the bare network gets again and again


def measure_checks(
    config: Config, world: World, probe: Callable[[nn.Module, Source, Source], object], rounds: int = 3
) -> tuple[dict[str, Cost], float]:
    """The kNN check before training, as train.py makes it, a linear probe, and the network alone, in turns.

    Args:
        config: of the run: data.path has the bank, eval.path the queries.
        world: a single process.
        probe: fits a linear classifier to the features of the first data set and tests it on the second.
        rounds: turns of each, of which the median counts.

    Returns:
        The costs of "kNN", "linear" and "network" per image, and the accuracy in percent.

    Raises:
        ValueError: eval.path is not set, or kNN cannot compare the data sets.
    """
    if config.eval.path is None:
        raise ValueError("eval.path must name labeled images: the check compares them with data.path")
    source = open_split("data.path", config.data.path, config.data)
    queries = open_split("eval.path", config.eval.path, config.data)
    precision, dtype = choose_precision(config, world)
    kept = make_resident(config, source, world.device, dtype)  # the check uses these pixels
    encoder = make_step(config, world, precision).model.online.encoder
    check = KnnMonitor(config, source, queries, world, plain_images, spaced)
    ready = list(islice(plain_images(source, np.arange(min(len(source), 256 * _READY)), config), _READY))
    calibration = min(2048, len(source))
    counts = [min(config.eval.max_images, len(split)) for split in (source, queries)]
    turns: dict[str, list[Cost]] = {"kNN": [], "linear": [], "network": []}
    accuracy = 0.0
    for _ in range(rounds):
        for name, costs in turns.items():
            clock, network = Clock(world.device), copy.deepcopy(encoder)
            with clock.measure(len(source) + len(queries) if name == "linear" else calibration + sum(counts)):
                if name == "kNN":
                    accuracy = check(network, calibrate=True)
                elif name == "linear":
                    probe(network, source, queries)
                else:
                    calibrate_batch_norm(network, _take(ready, calibration))
                    for count in counts:
                        extract_features(network, _take(ready, count))
            costs.append(clock.cost())
    del kept
    return {name: median(costs) for name, costs in turns.items()}, accuracy


def _take(ready: list[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` images in batches, the same ones again and again."""
    for images, labels in cycle(ready):
        yield images[:count], labels[:count]
        count -= len(images)
        if count <= 0:
            return
