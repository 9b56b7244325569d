"""Measures the speed of the data path and the training step, stage by stage and together, and names the bottleneck.

    python tools/bench.py SHARDS --threads 1 2 --torchvision
    python tools/bench.py --config configs/r50_100ep.yaml data.path=SHARDS --json runs/b.json --picture runs/b.png
    python tools/bench.py FOLDER_OF_JPEGS --peers mocov3 lightly
    python tools/bench.py --startup --config configs/r18_cifar10.yaml
    python tools/bench.py --check --config configs/r8_cifar10.yaml

Numbers are per image, which means both its views. CPU ms are summed over threads and hardly change when other programs
use the machine; images/s do. GPU µs are the time between two events on the step's stream, including waits for the host.
tools/benchmarks/ defines the stages (stages.py), loader, step and both (together.py), peers (peers.py), --startup
(startup.py) and --check (checks.py), which measure the settings as they are.

The stall is 1 - both / slower of the two alone, in images/s. Without a GPU, loader and step share the cores: the stall
then shows how much they compete, not how long the step waits, and the step uses a small encoder (SMALL_STEP) unless the
command line sets another, so that the benchmark takes a minute or two.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from byolt.configs import derived, schema
from byolt.configs.command_line import SettingsParser
from byolt.files.console import count, say
from byolt.files.paths import home_path
from byolt.model import distributed
from byolt.model.run import provenance
from byolt.pipelines.backends import make_backend
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.loader import CorruptBudgetError
from byolt.pipelines.sources import Source, open_source
from byolt.tools.benchmarks import startup
from byolt.tools.benchmarks.checks import measure_checks
from byolt.tools.benchmarks.peers import check_harness, run_harness
from byolt.tools.benchmarks.picture import save_picture
from byolt.tools.benchmarks.stages import table
from byolt.tools.benchmarks.together import ROUNDS, bottleneck, measure, stall
from byolt.tools.evaluation.frozen import Setup
from byolt.tools.evaluation.program import LINEAR_LRS
from byolt.tools.evaluation.protocols import evaluate_linear

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "throughput.yaml"
SMALL_STEP = [
    "model.backbone=resnet8",
    "model.projector_hidden=256",
    "model.projector_size=64",
    "model.predictor_hidden=256",
    "train.batch_size=64",
]
JSON_KEYS = {"color": "colour"}  # keys on disk keep the spelling of earlier versions


def settings(path: Path, overrides: list[str]) -> tuple[schema.Config, distributed.World]:
    """The config and the device; DALI unless data.backend=torch, and without a GPU a small step.

    Raises:
        ValueError: a setting is invalid, or DALI is not installed.
    """
    config = schema.load(path, overrides)
    world = distributed.init(config.train.device, deterministic=config.train.deterministic)
    if world.size > 1:
        raise ValueError("the benchmark measures one process: start it without torchrun")
    first = [] if world.device.type == "cuda" else SMALL_STEP
    if config.data.backend == "auto":
        first = [*first, "data.backend=dali"]
    config = decided(schema.load(path, [*first, *overrides]), world)
    make_backend(config, world.device, torch.float32)  # raises now if DALI is missing
    return config, world


def decided(config: schema.Config, world: distributed.World) -> schema.Config:
    """The config with values in the place of "auto"."""
    if not config.undecided:
        return config
    images = len(open_source(config.data.path, config.data.on_demand))
    return derived.decide(config, images, provenance.device_of(world.device), world.size)


def measure_run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures a run's start or its checks (--startup, --check) and prints; returns the document for --json."""
    config = schema.load(args.config, args.overrides)
    world = distributed.init(config.train.device, deterministic=config.train.deterministic)
    found: dict[str, Any] = {}
    if args.startup:
        found["startup"] = startup.measure(["--config", str(args.config), *args.overrides])
        say(startup.table(found["startup"]))
    if args.check:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # as in train.py
        config = decided(config, world)
        costs, found["accuracy"] = measure_checks(config, world, partial(fit_linear, config, world))
        say(f"{table(costs)}\nkNN top-1 {found['accuracy']:.1f} %")
        found["check"] = {name: asdict(cost) for name, cost in costs.items()}
        on_gpu = world.device.type == "cuda"
        knn, linear, network = (cost.wall_ms if on_gpu else cost.cpu_ms for cost in costs.values())
        found["ratios"] = {"kNN": knn / network, "linear": linear / network}
        unit = "time" if on_gpu else "CPU time"
        say(
            "in units of the network's {}: kNN {kNN:.2f}, linear {linear:.2f}".format(unit, **found["ratios"])
        )
    return document(args, world, config) | found


def fit_linear(
    config: schema.Config, world: distributed.World, encoder: nn.Module, train: Source, test: Source
) -> None:
    """The work of `evaluate --protocol linear --fast`."""
    with Progress(disable=True) as progress:
        setup = Setup(config, encoder, world, train, test, 0, torch.float32, progress)
        evaluate_linear(setup, LINEAR_LRS, 80.0, None, fast=True)


def document(args: argparse.Namespace, world: distributed.World, config: schema.Config) -> dict[str, Any]:
    """The conditions of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": provenance.hardware(world.device),
        "versions": provenance.versions(),
        "command": " ".join(["bench.py", *args.command]),
        "config": config.model_dump(mode="json"),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the document for --json."""
    config, world = settings(args.config, args.overrides)
    source, hardware = open_source(config.data.path, config.data), provenance.hardware(world.device)
    source.proven = True  # as after the first epoch, in which images of a folder are proven
    on_gpu, cores = world.device.type == "cuda", len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)  # for the step, as in train.py
    say(
        f"{config.data.path}: {len(source)} images, {config.augment.size} px, {config.model.backbone}, "
        f"batch {config.train.batch_size}; {hardware}"
    )
    results, peers = [], []
    for threads in args.threads or [min(config.data.threads, cores)]:
        data = config.data.model_copy(update={"threads": threads})
        costs = measure(
            config.model_copy(update={"data": data}), source, world, args.batches, args.torchvision
        )
        stalled = stall(costs)
        sentence = bottleneck(costs, on_gpu)
        say(f"\n{count(threads, 'thread')}\n{table(costs)}")
        say(f"{'stall':14} {100 * stalled:>8.1f} %\n{sentence}")
        row: dict[str, Any] = {"threads": threads, "stall": stalled, "bottleneck": sentence}
        if args.torchvision:
            row["torchvision_ratio"] = costs["torchvision"].cpu_ms / costs["loader"].cpu_ms
            say(f"torchvision takes {row['torchvision_ratio']:.1f} times the loader's CPU time")
        row["costs"] = {
            JSON_KEYS.get(name, name): asdict(cost) | {"images_per_s": cost.images_per_s}
            for name, cost in costs.items()
        }
        results.append(row)
    if args.peers is not None:
        peers = run_harness(args.peers, config, threads, args.batches, ROUNDS)
        say(f"\n{'peer':14} {'images/s':>9} {'CPU ms':>8} {'ratio':>8}")
        for peer in peers:
            numbers = "{images_per_s:>9,.0f} {cpu_ms:>8.3f} {ratio:>8.1f}"
            say(f"{peer['peer']:14} {peer.get('error') or numbers.format_map(peer)}")
    if args.picture:
        comparisons = {}
        if args.torchvision:
            compared = {name: costs[name].cpu_ms for name in ("loader", "torchvision")}
            comparisons["Loader and a plain torchvision v2 pipeline"] = compared
        if peers:
            compared = {peer["peer"]: peer["cpu_ms"] for peer in peers if "cpu_ms" in peer}
            comparisons["Peers, each in a process of its own"] = compared
        title = f"{hardware}, {count(threads, 'thread')}, {config.augment.size} px"
        save_picture(args.picture, title, costs, stalled, comparisons, on_gpu)
    return document(args, world, config) | {
        "images": len(source),
        "batches": args.batches,
        "results": results,
        "peers": peers,
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 measured, 2 invalid request, 130 interrupted."""
    parser = SettingsParser(prog="bench", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DATASET | section.key=value",
        help="a data.path (shards, a folder of images, synthetic:COUNT:HxW) and overrides of the config",
    )
    parser.add_argument(
        "--config", type=home_path, default=DEFAULT_CONFIG, help="default: configs/throughput.yaml"
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="numbers of threads to measure (default: data.threads, at most one per core)",
    )
    parser.add_argument(
        "--batches", type=int, default=16, help="number of batches of each measurement (default 16)"
    )
    parser.add_argument(
        "--torchvision", action="store_true", help="also measure a plain torchvision v2 pipeline"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="other pipelines on the same JPEGs (benchmarks/peers), by name; default: all that are installed",
    )
    parser.add_argument(
        "--startup",
        action="store_true",
        help="only: a run's time from the command to its first step, by parts",
    )
    parser.add_argument(
        "--check", action="store_true", help="only: kNN and a linear probe of eval.path beside the network"
    )
    parser.add_argument("--json", type=home_path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--picture", type=home_path, metavar="FILE.png", help="also draw a bar chart")
    args = parser.parse_intermixed_args(argv)
    args.command = sys.argv[1:] if argv is None else argv
    args.overrides = [word if "=" in word else f"data.path={word}" for word in args.words]
    try:
        if min(args.batches, *(args.threads or [1])) < 1:
            raise ValueError("--batches and --threads must be at least 1")
        if args.peers is not None:
            check_harness()
        for path in filter(None, (args.json, args.picture)):
            path.parent.mkdir(parents=True, exist_ok=True)
        report = measure_run(args) if args.startup or args.check else run(args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    except (OSError, ValueError, UndecodableError, CorruptBudgetError) as error:
        say(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
