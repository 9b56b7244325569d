"""How fast the data path is: images/s and CPU ms an image, stage by stage and through the whole loader.

    python tools/bench.py DATASET [--size 224] [--threads 1 2] [--batches 16]
        [--profile byol] [--torchvision] [--json FILE]

An image is both its views, by BYOL's recipe, in float32 on the CPU; with --profile torchvision by torchvision's
definitions of the operations. CPU ms hardly move when others use the machine; images/s do. --torchvision runs a plain
torchvision v2 pipeline (one thread) between the rounds of the loader.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from configs.schema import Config, Profile
from pipelines import dali_backend, order
from pipelines.encoded import inspect
from pipelines.kernels import make_views
from pipelines.loader import Loader
from pipelines.sources import Source, open_source
from pipelines.views import draw_both

ROUNDS = 3  # of each whole pipeline, in turn; the median counts


class Clock:
    """Adds up wall and CPU seconds of all threads of this process."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.images = 0

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.images += images

    def result(self) -> dict[str, float]:
        return {"images_per_s": self.images / self.wall, "cpu_ms": 1000 * self.cpu / self.images}


def make_config(path: str, size: int, threads: int, batch_size: int, profile: Profile = "byol") -> Config:
    """The paper's views; what concerns training is filled in and not used."""
    return Config.model_validate(
        {
            "run": {"out": "unused", "seed": 0},
            "data": {"path": path, "threads": threads, "backend": "dali"},
            "augment": {
                "profile": profile,
                "size": size,
                "view1": {"blur": 1.0, "solarize": 0.0},
                "view2": {"blur": 0.1, "solarize": 0.2},
            },
            "model": {},
            "optimizer": {"base_lr": 0.1, "weight_decay": 0, "base_tau": 0.99, "warmup_epochs": 0},
            "train": {"epochs": 1000, "batch_size": batch_size},
        }
    )


def make_backend(config: Config) -> dali_backend.DaliBackend:
    """DALI on the CPU, float32."""
    return dali_backend.DaliBackend(config.augment, torch.device("cpu"), torch.float32, config.data.threads)


def bench_stages(config: Config, source: Source, batches: int) -> dict[str, dict[str, float]]:
    """Reading (with the check of the header), decoding, making both views: the same batches as the loader's."""
    clocks = {"read": Clock(), "decode": Clock(), "views": Clock()}
    backend, augment, size = make_backend(config), config.augment, config.train.batch_size
    outs = [np.empty((size, augment.size, augment.size, 3), np.float32) for _ in range(2)]
    for number in range(batches + 1):
        if number == 1:  # the first compiles and builds
            clocks = {name: Clock() for name in clocks}
        epoch, step = order.position(number, len(source), size)
        ids = order.global_batch(0, epoch, step, len(source), size)
        with clocks["read"].measure(size):
            encoded = [source.read(i) for i in ids.tolist()]
            for data in encoded:
                inspect(data)
        params = draw_both(augment, 0, epoch, ids, source.heights[ids], source.widths[ids])
        for start in range(0, size, dali_backend.TOGETHER):
            rows = slice(start, start + dali_backend.TOGETHER)
            part = [drawn[rows] for drawn in params]
            with clocks["decode"].measure(len(part[0])):
                pixels = backend.decode(encoded[rows], part[0], part[1])
            with clocks["views"].measure(len(part[0])):
                make_views(pixels, part, augment, [out[rows] for out in outs], backend.pool)
    return {name: clock.result() for name, clock in clocks.items()}


def bench_whole(
    config: Config, source: Source, batches: int, peer: Callable[[bytes], Any] | None
) -> dict[str, Any]:
    """The loader, and between its rounds the peer on the same images."""
    size = config.train.batch_size
    rounds: dict[str, list[dict[str, float]]] = {"loader": [], "torchvision": []}
    with Loader(config, source, make_backend(config)) as loader:
        steps = iter(loader)
        for _ in range(ROUNDS):
            for _ in range(
                config.data.prefetch + 2
            ):  # made ahead while the peer was measured; the first compiles
                next(steps)
            clock = Clock()
            with clock.measure(batches * size):
                for _ in range(batches):
                    (batch,) = next(steps)
            rounds["loader"].append(clock.result())
            if peer:
                wait_until_idle()
                clock = Clock()
                encoded = [source.read(i) for i in batch.id.tolist()]
                with clock.measure(len(encoded)):
                    torch.stack([torch.stack(peer(data)) for data in encoded])
                rounds["torchvision"].append(clock.result())
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
        if rows
    }


def wait_until_idle() -> None:
    """Until the loader has made its batches ahead: no thread of this process works any more."""
    before = -1.0
    while time.process_time() - before > 0.005:
        before = time.process_time()
        time.sleep(0.1)


def torchvision_views(config: Config) -> Callable[[bytes], list[torch.Tensor]]:
    """The recipe as torchvision's documentation would have it: PIL decodes, transforms.v2 on uint8 tensors."""
    from torchvision.transforms import InterpolationMode, v2

    augment = config.augment

    def view(blur: float, solarize: float) -> Any:
        return v2.Compose(
            [
                v2.RandomResizedCrop(augment.size, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(augment.blur_taps, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment.mean, augment.std),
            ]
        )

    views = view(1.0, 0.0), view(0.1, 0.2)

    def make(encoded: bytes) -> list[torch.Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(encoded)).convert("RGB"))
        return [view(image) for view in views]

    return make


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "dataset", help="what data.path takes: shards, a folder of images, synthetic:COUNT:HxW"
    )
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels (default 224)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="each in turn (default 1)")
    parser.add_argument("--batches", type=int, default=16, help="of each measurement (default 16)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--profile", choices=get_args(Profile), default="byol", help="augment.profile")
    parser.add_argument(
        "--torchvision", action="store_true", help="a plain torchvision v2 pipeline beside it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    try:
        if min(args.batches, args.batch_size, *args.threads) < 1:
            raise ValueError("--batches, --batch-size and --threads must be at least 1")
        source = open_source(args.dataset)
        print(f"{'threads':>7}  {'stage':14} {'images/s':>9} {'CPU ms/image':>13}")
        for threads in args.threads:
            config = make_config(args.dataset, args.size, threads, args.batch_size, args.profile)
            peer = torchvision_views(config) if args.torchvision else None
            stages = bench_stages(config, source, args.batches)
            stages |= bench_whole(config, source, args.batches, peer)
            for name, row in stages.items():
                print(
                    f"{threads:>7}  {name:14} {row['images_per_s']:>9,.0f} {row['cpu_ms']:>13.3f}", flush=True
                )
            if peer:
                ratio = stages["torchvision"]["cpu_ms"] / stages["loader"]["cpu_ms"]
                print(f"{threads:>7}  torchvision takes {ratio:.1f} times the loader's CPU time")
            results.append({"threads": threads, "profile": args.profile, "size": args.size, "stages": stages})
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
