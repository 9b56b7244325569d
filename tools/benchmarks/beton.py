"""Compares writing and reading .beton files with ffcv, in one run.

    PYTHONPATH=FFCV python tools/benchmarks/beton.py FOLDER [--images 2000] [--repeats 5] [--threads 1] [--json]

FFCV is the folder of tools/install_ffcv.sh. Writing: FOLDER's JPEGs become a .beton, by one process each; ours with and
without decoding each image to check it, while ffcv encodes PIL's pixels anew. Reading: one randomly resized crop of
224 x 224 of every sample, all stored raw; ours float32, bicubic and normalized, ffcv's uint8. All take turns; a ratio
is the median over neighboring rounds.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from byolt.configs.schema import AugmentConfig, ViewConfig
from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.pipelines import order
from byolt.pipelines.convert import ffcv_engine
from byolt.pipelines.convert.make import make
from byolt.pipelines.convert.plan import ConversionOptions
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.sources import open_source
from byolt.pipelines.views import draw
from byolt.tools.benchmarks.shards import Rounds, find_jpegs, link_files

SIZE, BATCH = 224, 64
CROP = ViewConfig(flip=0.0, jitter=0.0, gray=0.0, blur=0.0, solarize=0.0)


class Photos:
    """A data set for ffcv's writer: decoded pixels and a label, as torchvision's ImageFolder gives them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        with Image.open(self.paths[i]) as image:
            return np.array(image.convert("RGB")), 0


def writing(source: Path, target: Path, **options: Any) -> None:
    """Ours, by one process."""
    make(ConversionOptions(source, target, format="beton", **options), print)


def writing_with_ffcv(source: Path, target: Path) -> None:
    """ffcv's, by one process, JPEG at its own quality (90)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    target.mkdir()
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    writer = DatasetWriter(str(target / "a.beton"), fields, num_workers=1)
    with redirect_stderr(StringIO()):
        writer.from_indexed_dataset(Photos(sorted(source.iterdir())))
    for child in multiprocessing.active_children():
        child.join()  # only then does its CPU time count


def epochs(path: Path, threads: int) -> Iterator[int]:
    """Our crops; yields after each epoch the number of images."""
    from byolt.pipelines.dali_backend import DaliBackend
    from byolt.pipelines.kernels.cpu import make_views

    source, augment = open_source(path), AugmentConfig(size=SIZE, view1=CROP, view2=CROP)
    backend = DaliBackend(augment, torch.device("cpu"), torch.float32, threads)
    view = np.empty((BATCH, SIZE, SIZE, 3), np.float32)
    epoch = 0
    while True:
        for step in range(len(source) // BATCH):
            ids = order.global_batch(0, epoch, step, len(source), BATCH)
            encoded = [source.read(i) for i in ids.tolist()]
            for data in encoded:
                inspect(data)
            params = draw(CROP, 0, epoch, ids, 0, source.heights[ids], source.widths[ids])
            make_views(backend.decode(encoded, params, params), [params], augment, [view], backend.pool)
        yield len(source) // BATCH * BATCH
        epoch += 1


def epochs_of_ffcv(path: Path, threads: int) -> Iterator[int]:
    """ffcv's crops, with its Loader."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE))], "label": None, "key": None}
    options = {"batch_size": BATCH, "num_workers": threads, "order": OrderOption.RANDOM, "os_cache": True}
    loader = Loader(str(path), **options, pipelines=pipelines)
    while True:
        yield sum(len(images) for (images,) in loader)


def bench_writing(source: Path, images: int, repeats: int, scratch: Path) -> dict[str, Rounds]:
    """Rounds of our writer, with and without proof, and of ffcv's, in turn."""
    ways: dict[str, Callable[[Path, Path], None]] = {
        "ours": writing,
        "ours, --no-decode": partial(writing, decode=False),
        "ffcv": writing_with_ffcv,
    }
    rounds = {name: Rounds() for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=scratch) as target, rounds[name].measure(images):
                way(source, Path(target) / "out")
    return rounds


def bench_reading(path: Path, threads: int, repeats: int) -> dict[str, Rounds]:
    """Rounds of an epoch each, in turn; the first, which compiles, does not count."""
    ways = {"ours": epochs(path, threads), "ffcv": epochs_of_ffcv(path, threads)}
    rounds = {name: Rounds() for name in ways}
    images = {name: next(way) for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            with rounds[name].measure(images[name]):
                next(way)
    return rounds


def main(argv: list[str] | None = None) -> int:
    """Prints both comparisons."""
    parser = Parser(prog="benchmarks/beton", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=home_path, help="folder with JPEG files")
    parser.add_argument("--images", type=int, default=2000, help="files are repeated up to this number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="for reading (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    files = find_jpegs(args.folder)
    try:
        ffcv_engine.require()
        if not files or args.images < BATCH or min(args.repeats, args.threads) < 1:
            raise ValueError(f"{args.folder}: no JPEG files, or a number is too small")
    except ValueError as error:
        say(f"benchmarks/beton: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"images": args.images, "repeats": args.repeats, "threads": args.threads}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        link_files(files, scratch / "source", args.images)
        written = bench_writing(scratch / "source", args.images, args.repeats, scratch)
        link_files(files, scratch / "few", min(len(files), 512))
        writing(scratch / "few", scratch / "raw", raw_fraction=1, shard_size=100_000)
        read = bench_reading(scratch / "raw/shard-000000.beton", args.threads, args.repeats)
    for work, rounds in (("writing", written), ("reading raw", read)):
        ratios = {name: rounds[name].ratio(rounds["ffcv"]) for name in rounds if name != "ffcv"}
        result[work] = {**{name: vars(found) for name, found in rounds.items()}, "ratio to ffcv": ratios}
        for name, found in rounds.items() if not args.json else ():
            times = "  {wall:.2f} x ffcv ({cpu:.2f} x by CPU time)" if name in ratios else ""
            say(f"{work:12} {name:18}{found.line()}{times.format(**ratios.get(name, {}))}")
    if args.json:
        say(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
