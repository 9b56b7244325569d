"""Pictures of what the network sees: crop windows, both views and the numbers that were drawn for them.

    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml [--images 8 | --ids 3 17] [--epoch 0] ...
    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml --operations     each operation alone
    python tools/show_views.py DATASET --config configs/r50_1000ep.yaml --compare        back end beside torch

The seed is run.seed, and bytes, draws and back end are those of pipelines/loader.py: the views are, to the bit, the ones
that training sees of these samples in that epoch (in float32; a GPU run may deliver bf16). Without --ids they are the
first samples of the epoch. An image that does not decode is an error here; training would replace it.
"""

import argparse
import io
import sys
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from configs import schema
from configs.schema import Config, ViewConfig
from pipelines import order
from pipelines.encoded import inspect
from pipelines.loader import Backend, make_backend
from pipelines.sources import Source, open_source
from pipelines.torch_backend import TorchBackend, UndecodableError, decode
from pipelines.views import ViewParams, draw

Pixels = npt.NDArray[np.float32]  # (..., size, size, 3) in [0, 1]
Row = tuple[str, str, bool]  # name, value, whether the operation is applied

MAX_IMAGES = 64
DPI = 200
CELL = 448  # pixels of a picture's side: a whole multiple of views of 224, 112, 64 and 32 px
GAP = 28
MARGIN = 56
LINE = 28  # pixels from one line of text to the next
LABEL = 92  # pixels that the names take in a table of parameters
TEXT = 7.0  # points
INK, FAINT = "#212529", "#868e96"
COLOURS = ("#e8590c", "#1c7ed6")  # view 1, view 2
JITTER = ("brightness", "contrast", "saturation", "hue")  # as pipelines.views numbers them
PLAIN = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0} | dict.fromkeys(JITTER, 0.0)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Samples:
    """Some samples of a data set with what is drawn for them."""

    ids: npt.NDArray[np.int64]  # (N,)
    places: list[str]  # where each is
    classes: list[str]  # "" where it has none
    encoded: list[bytes]
    params: tuple[ViewParams, ViewParams]


def choose(config: Config, source: Source, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The first `count` sample ids of an epoch, in training's order; fewer where the data set has fewer."""
    total = len(source)
    return order.global_batch(config.run.seed, epoch, 0, total, min(count, total), config.data.order)


def read(config: Config, source: Source, epoch: int, ids: npt.NDArray[np.int64]) -> Samples:
    """Reads samples and draws both views of each, as the loader does.

    Raises:
        ValueError: an id is unknown, or a sample is no whole image of the size that the index states.
    """
    unknown = [number for number in ids.tolist() if not 0 <= number < len(source)]
    if unknown:
        raise ValueError(f"--ids {' '.join(map(str, unknown))}: the data set has ids 0 to {len(source) - 1}")
    encoded = []
    for number in ids.tolist():
        data = source.read(number)
        try:
            header = inspect(data)
        except ValueError as error:
            raise ValueError(f"{source.describe(number)}: {error}: show others with --ids") from None
        expected = int(source.heights[number]), int(source.widths[number])
        if (header.height, header.width) != expected:
            raise ValueError(
                f"{source.describe(number)}: is {header.height} x {header.width} pixels, and {expected[0]} x "
                f"{expected[1]} by the index: run tools/verify_shards.py on the data set"
            )
        encoded.append(data)
    sides = source.heights[ids], source.widths[ids]
    views = config.augment.view1, config.augment.view2
    first, second = (draw_view(config, view, i, epoch, ids, *sides) for i, view in enumerate(views))
    labels = source.labels[ids].tolist()
    classes = [source.classes[label] if source.classes and label >= 0 else "" for label in labels]
    return Samples(ids, [source.describe(i) for i in ids.tolist()], classes, encoded, (first, second))


def draw_view(
    config: Config,
    view: ViewConfig,
    index: int,
    epoch: int,
    ids: npt.NDArray[np.int64],
    heights: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
) -> ViewParams:
    """`pipelines.views.draw` with a run's seed: the one place of this file that draws."""
    return draw(view, config.run.seed, epoch, ids, index, heights, widths)


def neutral_jitter(config: Config) -> dict[str, float]:
    """The value of each colour operation that changes nothing: the middle of its range."""
    none, one = config.augment.view1.model_copy(update=PLAIN), np.ones(1, np.int64)
    drawn = draw_view(config, none, 0, 0, one, one, one)
    return {name: float(getattr(drawn, name)[0]) for name in JITTER}


def make_views(
    config: Config, backend: Backend, samples: Samples, params: tuple[ViewParams, ViewParams] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views of every sample as training gets them: (N, 3, size, size), normalised, on the CPU.

    Raises:
        ValueError: a sample does not decode.
    """
    try:
        first, second = backend(samples.encoded, *(params or samples.params))
    except UndecodableError as error:
        lines = [f"{samples.places[place]}: {reason}" for place, reason in error.reasons.items()]
        raise ValueError(f"{'; '.join(lines)}: show others with --ids") from None
    return first.cpu(), second.cpu()


def to_pixels(config: Config, view: torch.Tensor) -> Pixels:
    """(N, size, size, 3), not normalised any more."""
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
    pixels: Pixels = (view.float().permute(0, 2, 3, 1) * std + mean).numpy()
    return pixels


def signed(value: float, neutral: float) -> str:
    """An offset with its sign, a factor with a multiplication sign."""
    return f"×{value:.2f}" if neutral == 1 else f"{value:+.2f}".replace("-", "−")


def table(view: ViewParams, i: int, height: int, width: int, neutral: dict[str, float]) -> list[Row]:
    """Parameters of sample i, of an image of this size, as rows of a table."""
    rows, columns = int(view.height[i]), int(view.width[i])
    share, jitter = 100 * rows * columns / (height * width), bool(view.jitter[i])
    steps = [
        f"{place} {JITTER[j]} {signed(float(getattr(view, JITTER[j])[i]), neutral[JITTER[j]])}"
        for place, j in enumerate(view.order[i], start=1)
    ]

    def switch(name: str, on: bool, value: str = "yes") -> Row:
        return name, value if on else "no", on

    return [
        ("crop", f"{share:.1f} % of the area, ratio {columns / rows:.2f}", True),
        ("", f"{columns} × {rows} px at ({view.left[i]}, {view.top[i]})", True),
        switch("flip", bool(view.flip[i])),
        switch("jitter", jitter, f"{steps[0]}, {steps[1]},"),
        ("", f"{steps[2]}, {steps[3]}" if jitter else "", jitter),
        switch("grey", bool(view.gray[i])),
        switch("blur", bool(view.blur[i]), f"sigma {view.sigma[i]:.2f} px"),
        switch("solarize", bool(view.solarize[i])),
    ]


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────


class Page:
    """A figure that is laid out in pixels, from its top left corner."""

    def __init__(self, width: int, height: int, title: str, notes: list[str]) -> None:
        """
        Args:
            width: pixels.
            height: pixels below the heading, which is added above.
            title: first line of the heading.
            notes: its further lines; long ones are wrapped.
        """
        wrapped = [line for note in notes for line in textwrap.wrap(note, (width - 2 * MARGIN) // 12)]
        self.top = MARGIN + 46 + LINE * len(wrapped) + GAP  # pixels above which the heading is
        self.width, self.height = width, self.top + height
        self.figure = Figure(figsize=(width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.text(MARGIN, MARGIN, title, size=11, weight="bold")
        for number, line in enumerate(wrapped):
            self.text(MARGIN, MARGIN + 46 + LINE * number, line, colour=FAINT)

    def text(
        self, x: float, y: float, text: str, *, size: float = TEXT, colour: str = INK, weight: str = "normal"
    ) -> None:
        """Text whose first line's top is at y."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontsize=size, color=colour, weight=weight, va="top", parse_math=False)

    def picture(
        self, x: int, y: int, pixels: npt.NDArray[np.generic], side: int = CELL, frame: str | None = None
    ) -> Axes:
        """An image in the middle of a square cell; its axes count the image's own pixels from its corner."""
        height, width = pixels.shape[:2]
        scale = side / max(height, width)
        box_height, box_width = max(1, round(height * scale)), max(1, round(width * scale))
        left, top = x + (side - box_width) // 2, y + (side - box_height) // 2
        place = left / self.width, 1 - (top + box_height) / self.height
        axes = self.figure.add_axes((*place, box_width / self.width, box_height / self.height))
        axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=frame is not None, edgecolor=frame, linewidth=1.2)
        return axes

    def table(self, x: int, y: int, rows: list[Row]) -> None:
        """Names and values in two columns; what is not applied is faint."""
        for number, (name, value, is_on) in enumerate(rows):
            self.text(x, y + number * LINE, name, colour=FAINT)
            self.text(x + LABEL, y + number * LINE, value, colour=INK if is_on else FAINT)

    def save(self, path: Path) -> None:
        """Writes a PNG file, whole or not at all."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI)
        path.write_bytes(buffer.getvalue())


def contact_sheet(config: Config, samples: Samples, backend: Backend, title: str, notes: list[str]) -> Page:
    """A row per image (two rows beside one another from six images on): original with windows, view 1, view 2."""
    pixels = [to_pixels(config, view).clip(0, 1) for view in make_views(config, backend, samples)]
    neutral, count = neutral_jitter(config), len(samples.ids)
    blocks = 1 if count < 6 else 2
    block, step = 3 * CELL + 2 * GAP, CELL + 8 * LINE + 2 * GAP
    width = 2 * MARGIN + blocks * block + (blocks - 1) * 2 * MARGIN
    page = Page(width, LINE + GAP // 2 + -(-count // blocks) * step, title, notes)
    for column in range(blocks):
        left = MARGIN + column * (block + 2 * MARGIN)
        page.text(left, page.top, "original, with the window of each view", weight="bold")
        for index, colour in enumerate(COLOURS):
            label = f"view {index + 1} " + ("━━━" if index == 0 else "╍╍╍")
            page.text(left + (index + 1) * (CELL + GAP), page.top, label, colour=colour, weight="bold")
    for i in range(count):
        row, column = divmod(i, blocks)
        x, y = MARGIN + column * (block + 2 * MARGIN), page.top + LINE + GAP // 2 + row * step
        original = decode(samples.encoded[i]).numpy()
        height, width = original.shape[:2]
        axes = page.picture(x, y, original)
        for index, (params, colour) in enumerate(zip(samples.params, COLOURS, strict=True)):
            window(axes, params, i, colour, dashed=index == 1)
            left = x + (index + 1) * (CELL + GAP)
            page.picture(left, y, pixels[index][i], frame=colour)
            page.table(left, y + CELL + GAP // 2, table(params, i, height, width, neutral))
        about = [f"id {samples.ids[i]}", f"{width} × {height} px", samples.classes[i], samples.places[i]]
        lines = [line for text in about for line in textwrap.wrap(text, 36)[:3]]
        for number, line in enumerate(lines):
            page.text(x, y + CELL + GAP // 2 + number * LINE, line, weight="normal" if number else "bold")
    return page


def window(axes: Axes, view: ViewParams, i: int, colour: str, dashed: bool) -> None:
    """Draws the crop window of sample i into its image; dashes leave another window's line visible below."""
    axes.add_patch(
        Rectangle(
            (int(view.left[i]), int(view.top[i])),
            int(view.width[i]),
            int(view.height[i]),
            fill=False,
            edgecolor=colour,
            linewidth=1.4,
            linestyle=(0, (4, 3)) if dashed else "solid",
            clip_on=False,
            path_effects=None if dashed else [withStroke(linewidth=2.6, foreground="white")],
        )
    )


# ── each operation alone ────────────────────────────────────────────────────────────────────────────────────


def operation_strips(
    config: Config, samples: Samples, backend: Backend, title: str, notes: list[str]
) -> Page:
    """The first sample, each operation alone: lowest, middle and highest value that the views can draw."""
    height, width = decode(samples.encoded[0]).shape[:2]
    strips = operations(config, samples, height, width)
    flat = [params for _, strip in strips for _, params in strip]
    joined = ViewParams(
        **{f.name: np.concatenate([getattr(p, f.name) for p in flat]) for f in fields(ViewParams)}
    )
    many = replace(samples, places=samples.places[:1] * len(flat), encoded=samples.encoded[:1] * len(flat))
    views, _ = make_views(config, backend, many, (joined, joined))
    pixels = iter(to_pixels(config, views).clip(0, 1))
    strip_width, step = 3 * CELL + 2 * (GAP // 2), CELL + 3 * LINE + 2 * GAP
    rows = -(-len(strips) // 2)
    page = Page(2 * MARGIN + 2 * strip_width + MARGIN, rows * step, title, notes)
    for number, (name, strip) in enumerate(strips):
        x = MARGIN + number % 2 * (strip_width + MARGIN)
        y = page.top + number // 2 * step
        page.text(x, y, name, weight="bold")
        for place, (label, _) in enumerate(strip):
            left = x + place * (CELL + GAP // 2)
            page.picture(left, y + LINE + 8, next(pixels))
            page.text(left, y + LINE + CELL + 16, label)
    return page


def operations(
    config: Config, samples: Samples, height: int, width: int
) -> list[tuple[str, list[tuple[str, ViewParams]]]]:
    """Name of each strip and, in it, labels with the parameters of one view, on the image's central square."""
    views = config.augment.view1, config.augment.view2
    side = min(height, width)
    shape = np.array([height]), np.array([width])

    def alone(**update: object) -> ViewParams:
        view = views[0].model_copy(update=PLAIN | update)
        drawn = draw_view(config, view, 0, 0, samples.ids[:1], *shape)
        if "crop_area" not in update:
            drawn = replace(drawn, height=np.full(1, side, np.int32), width=np.full(1, side, np.int32))
        top, left = (height - drawn.height) // 2, (width - drawn.width) // 2
        return replace(drawn, top=top.astype(np.int32), left=left.astype(np.int32))

    def crop(area: float, ratio: float) -> ViewParams:
        return alone(crop_area=(area, area), crop_ratio=(ratio, ratio))

    def spread(low: float, high: float) -> list[float]:
        return [low, (low + high) / 2, high]

    areas = spread(*widest(config, "crop_area"))
    low_ratio, high_ratio = widest(config, "crop_ratio")
    ratios = [low_ratio, (low_ratio * high_ratio) ** 0.5, high_ratio]
    strips = [
        ("crop: area, at the middle ratio", [(f"{100 * a:.0f} %", crop(a, ratios[1])) for a in areas]),
        ("crop: width / height, at the middle area", [(f"{r:.2f}", crop(areas[1], r)) for r in ratios]),
    ]
    for name, neutral in neutral_jitter(config).items():
        reach = max(getattr(view, name) for view in views)
        values = spread(neutral - reach, neutral + reach)
        strips.append(
            (
                name,
                [
                    (signed(value, neutral), replace(alone(jitter=1.0), **{name: np.float32([value])}))
                    for value in values
                ],
            )
        )
    sigmas = spread(*widest(config, "blur_sigma"))
    strips.append(("blur: sigma", [(f"{s:.2f} px", alone(blur=1.0, blur_sigma=(s, s))) for s in sigmas]))
    switches = [("flip", "flip"), ("grey", "gray"), ("solarize", "solarize")]
    strips.append(("on or off", [(label, alone(**{name: 1.0})) for label, name in switches]))
    return strips


def widest(config: Config, name: str) -> tuple[float, float]:
    """From the lower of both views' lower bounds to the higher of their upper ones."""
    low, high = zip(
        *(getattr(view, name) for view in (config.augment.view1, config.augment.view2)), strict=True
    )
    return min(low), max(high)


# ── two back ends ───────────────────────────────────────────────────────────────────────────────────────────


def comparison(
    config: Config, samples: Samples, backend: Backend, name: str, title: str, notes: list[str]
) -> tuple[Page, list[str]]:
    """A row per image: either view by the back end, by torch, and how far apart they are.

    Returns:
        The page, and a line for each view of each sample with the numbers.
    """
    plain = TorchBackend(config.augment, torch.device("cpu"), torch.float32, config.data.threads)
    ours, theirs = (
        [to_pixels(config, view) for view in make_views(config, each, samples)] for each in (backend, plain)
    )
    apart = [np.abs(a - b) * 255 for a, b in zip(ours, theirs, strict=True)]
    largest = max(float(difference.max()) for difference in apart)
    factor = 10 ** int(np.floor(np.log10(255 / largest))) if 0 < largest < 255 else 1
    side, gap = CELL // 2, GAP // 2
    block, step = 3 * side + 2 * gap, side + 2 * LINE + GAP
    overall = f"all views: max {largest:.4f}, mean {np.mean(apart):.5f} of 255"
    notes = [*notes, f"difference: |{name} − torch| × {factor:,} (black: equal), numbers in 1/255; {overall}"]
    page = Page(3 * MARGIN + 2 * block, LINE + gap + len(samples.ids) * step, title, notes)
    lines = []
    for index, colour in enumerate(COLOURS):
        left = MARGIN + index * (block + MARGIN)
        for place, heading in enumerate((f"view {index + 1}: {name}", "torch", f"difference × {factor:,}")):
            page.text(left + place * (side + gap), page.top, heading, colour=colour, weight="bold", size=6)
        for i, number in enumerate(samples.ids.tolist()):
            y, difference = page.top + LINE + gap + i * step, apart[index][i]
            shown = ours[index][i].clip(0, 1), theirs[index][i].clip(0, 1), difference * factor / 255
            for place, pixels in enumerate(shown):
                page.picture(left + place * (side + gap), y, pixels.clip(0, 1), side)
            numbers = f"max {difference.max():.4f}", f"mean {difference.mean():.5f}"
            page.text(left, y + side + 8, f"id {number}", size=6)
            for place, text in enumerate(numbers):
                page.text(left + 2 * (side + gap), y + side + 8 + place * (LINE - 4), text, size=6)
            lines.append(f"id {number} view {index + 1}: {', '.join(numbers)} of 255")
    return page, [*lines, overall]


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────


def run(args: argparse.Namespace) -> None:
    """Makes the picture that was asked for, writes it and says so.

    Raises:
        ValueError: something that was asked for is not possible.
    """
    words = args.ids or []
    config = schema.load(args.config, [*args.overrides, *(word for word in words if "=" in word)])
    ids = [word for word in words if "=" not in word]
    if not all(word.isdecimal() for word in ids):
        raise ValueError(f"--ids {' '.join(ids)}: ids are whole numbers from 0")
    if not 1 <= args.images <= MAX_IMAGES or len(ids) > MAX_IMAGES:
        raise ValueError(f"--images and --ids show 1 to {MAX_IMAGES} images, not {len(ids) or args.images}")
    if args.epoch < 0:
        raise ValueError(f"--epoch {args.epoch}: epochs count from 0")
    kind = "compare" if args.compare else "operations" if args.operations else "views"
    out = args.out or Path(f"{kind}.png")
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: name a .png file in a folder that exists")
    source = open_source(args.dataset)
    if not len(source):
        raise ValueError(f"data path {args.dataset!r} holds no images")
    device = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    backend, reason = make_backend(config, torch.device(device), torch.float32)
    if args.compare and isinstance(backend, TorchBackend):
        raise ValueError(f"--compare needs another back end beside torch; {reason}")
    count = 1 if args.operations else args.images
    chosen = np.array(ids, np.int64) if ids else choose(config, source, args.epoch, count)
    samples = read(config, source, args.epoch, chosen)

    run_line = f"{args.config}, seed {config.run.seed}, epoch {args.epoch}"
    notes = [f"{args.dataset}; views of {config.augment.size} px", reason]
    if args.compare:
        name = reason.partition(": ")[2].partition(",")[0]
        page, lines = comparison(config, samples, backend, name, f"Two back ends: {run_line}", notes)
        print("\n".join(lines))
    elif args.operations:
        title = f"Each operation alone, on sample {samples.ids[0]}: {args.config}"
        page = operation_strips(config, samples, backend, title, notes)
    else:
        page = contact_sheet(config, samples, backend, f"What the network sees: {run_line}", notes)
    page.save(out)
    print(f"{out}: {page.width} x {page.height} pixels")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="show_views", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "dataset", help="what data.path takes: shards, a folder of images, .beton, synthetic:…"
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", type=int, default=8, help="the first so many of the epoch (default 8)")
    which.add_argument("--ids", nargs="+", metavar="ID", help="these samples instead")
    parser.add_argument("--epoch", type=int, default=0, help="each has its own draws (default 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: views|operations|compare.png")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--operations", action="store_true", help="each operation alone, on one image")
    mode.add_argument("--compare", action="store_true", help="data.backend beside torch, and the difference")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override settings")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f"show_views: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
