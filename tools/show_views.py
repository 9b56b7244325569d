"""Shows what the network sees: crop windows, both views of each image and their augmentation parameters.

    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml [--images 8 | --ids 3 17] [--epoch 0] ...
    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml --operations     each operation alone
    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml --compare        back end and torch

Seed (run.seed), parameters and back end are those of the training: the views are, to the bit, the views of these
samples in that epoch in float32; a GPU run may convert them to bf16. By default the first samples of the epoch are
shown. An image that does not decode is an error here; training would replace it.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from byolt.configs import derived, schema
from byolt.configs.command_line import SettingsParser
from byolt.files.console import say
from byolt.files.paths import home_path
from byolt.model.run import provenance
from byolt.model.run.pictures import dark_frame
from byolt.pipelines.backends import make_backend
from byolt.pipelines.sources import open_source
from byolt.pipelines.torch_backend import TorchBackend
from byolt.tools.viewing.samples import choose, read
from byolt.tools.viewing.sheets import comparison, contact_sheet, operation_strips

MAX_IMAGES = 64


def run(args: argparse.Namespace) -> None:
    """Draws and writes the requested picture.

    Raises:
        ValueError: the request is invalid.
    """
    words = args.ids or []
    overrides = [*args.overrides, *(word for word in words if "=" in word)]
    config = schema.load(args.config, overrides)
    ids = [word for word in words if "=" not in word]
    if not all(word.isdecimal() for word in ids):
        raise ValueError(f"--ids {' '.join(ids)}: ids are whole numbers from 0")
    if not 1 <= args.images <= MAX_IMAGES or len(ids) > MAX_IMAGES:
        raise ValueError(f"--images and --ids show 1 to {MAX_IMAGES} images, not {len(ids) or args.images}")
    if args.epoch < 0:
        raise ValueError(f"--epoch {args.epoch}: epochs count from 0")
    kind = "compare" if args.compare else "operations" if args.operations else "views"
    out = args.out or Path(config.run.out, f"show_{kind}.png")
    if args.out and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise ValueError(f"--out {out}: name a .png file in a folder that exists")
    source = open_source(args.dataset, config.data.on_demand)
    if not len(source):
        raise ValueError(f"data path {args.dataset!r} holds no images")
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = derived.decide(config, len(source), provenance.device_of(device), 1)
    backend, reason = make_backend(config, device, torch.float32)
    if args.compare and isinstance(backend, TorchBackend):
        raise ValueError(f"--compare needs a back end other than torch; {reason}")
    count = 1 if args.operations else args.images
    chosen = np.array(ids, np.int64) if ids else choose(config, source, args.epoch, count)
    samples = read(config, source, args.epoch, chosen)

    notes = [
        f"{args.config}, {' '.join(overrides)}".rstrip(", "),
        f"{args.dataset}; epoch {args.epoch}, seed {config.run.seed}, views of {config.augment.size} px",
        reason,
        *filter(None, [dark_frame(config.augment)]),
    ]
    if args.compare:
        name = reason.partition(": ")[2].partition(",")[0]
        page, lines = comparison(config, samples, backend, name, notes)
        say("\n".join(lines))
    elif args.operations:
        page = operation_strips(config, samples, backend, notes)
    else:
        page = contact_sheet(config, samples, backend, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    say(f"{out}: {page.width} x {page.height} pixels")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 invalid request."""
    parser = SettingsParser(prog="show_views", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add(
        "dataset",
        type=lambda text: text.removeprefix("data.path="),
        help="data set: shards, a folder of images, .beton or synthetic:COUNT:HxW",
    )
    add("--config", required=True, help="YAML file; see configs/")
    add("--epoch", type=int, default=0, help="epoch whose parameters are shown (default 0)")
    add(
        "--out",
        type=home_path,
        metavar="FILE.png",
        help="default: show_views|operations|compare.png in run.out",
    )
    add("overrides", nargs="*", metavar="section.key=value", help="override settings")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--images", type=int, default=8, help="number of images, from the first of the epoch (default 8)")
    add("--ids", nargs="+", metavar="ID", help="ids of samples to show instead")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--operations", action="store_true", help="show each operation alone, on one image")
    add(
        "--compare",
        action="store_true",
        help="show the views of data.backend and torch, and their difference",
    )
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    try:
        run(args)
    except (OSError, ValueError) as error:
        say(f"show_views: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
