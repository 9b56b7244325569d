"""Measures the cost of the online linear probe beside that of a training step, on noise.

python tools/benchmarks/probe.py [--backbone resnet18] [--stem cifar] [--size 32] [--batch 64] [--classes 10]
"""

import statistics
import sys
import time

import torch

from byolt.configs.schema import ModelConfig, OptimizerConfig
from byolt.files.console import Parser, say
from byolt.model import distributed
from byolt.model.byol import make_byol
from byolt.model.optim import LARS
from byolt.model.quality.probe import OnlineProbe
from byolt.model.resnet import BACKBONES, STEMS
from byolt.model.step import TrainStep


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 measured, 2 invalid request."""
    parser = Parser(prog="benchmarks/probe", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backbone", default="resnet18", choices=BACKBONES)
    parser.add_argument("--stem", default="cifar", choices=STEMS)
    # Batch norm needs two images.
    options = {"size": (32, 8), "batch": (64, 2), "classes": (10, 2), "rounds": (10, 1)}
    for option, (default, _) in options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    for option, (_, lowest) in options.items():
        if (value := getattr(args, option)) < lowest:
            say(f"benchmarks/probe: --{option} {value} must be at least {lowest}", file=sys.stderr)
            return 2
    world = distributed.init()
    on_gpu = world.device.type == "cuda"
    torch.manual_seed(0)
    model = make_byol(ModelConfig(backbone=args.backbone, stem=args.stem))
    step = TrainStep(model, LARS(model.online.parameters(), 0.0), world, "bf16" if on_gpu else "fp32")
    settings = OptimizerConfig(base_lr=0.1, weight_decay=1e-6, base_tau=0.99)
    probe = OnlineProbe(int(model.online.encoder.num_features), args.classes, world, settings)  # type: ignore[arg-type]
    views = [torch.randn(args.batch, 3, args.size, args.size, device=world.device) for _ in range(2)]
    labels = torch.arange(args.batch) % args.classes
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3 + args.rounds):
        marks = [time.perf_counter()]
        result = step([(views[0], views[1])], lr=0.1, tau=0.99)
        for last in (False, True):
            if last:
                probe(torch.cat(result.features1), labels, lr=0.1, finite=result.finite)
            if on_gpu:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        times[0].append(marks[1] - marks[0])
        times[1].append(marks[2] - marks[1])
    alone, added = (1000 * statistics.median(part[3:]) for part in times)  # the first three warm up
    say(
        f"{args.backbone} ({args.stem} stem), {args.size} px, batch {args.batch}, {args.classes} classes, "
        f"{world.device}: step {alone:.2f} ms, probe {added:.3f} ms = {100 * added / alone:.2f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
