"""Reads the samples of tools/show_views.py, draws their augmentation parameters and makes their views.

All of it is the code of the training: bytes from a source, parameters from `pipelines.views`, pixels from a back end.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from byolt.configs.schema import Config
from byolt.files.console import shown
from byolt.pipelines import order
from byolt.pipelines.backends import Backend
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.sources import Source, read_sound
from byolt.pipelines.subset import file_names
from byolt.pipelines.views import ViewParams, draw, draw_both

Pixels = npt.NDArray[np.float32]  # (..., size, size, 3) in [0, 1]
Row = tuple[str, tuple[str, ...]]  # name, values side by side
Strip = tuple[str, list[tuple[str, ViewParams]]]  # name; labels with the parameters of one view

JITTER = ("brightness", "contrast", "saturation", "hue")  # in the numbering of pipelines.views
PLAIN = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0} | dict.fromkeys(JITTER, 0.0)


@dataclass(frozen=True)
class DrawnSamples:
    """Samples of a data set and the parameters of their views."""

    ids: npt.NDArray[np.int64]  # (N,)
    places: list[str]  # file or shard of each
    files: list[str]  # name of the file of each
    classes: list[str]  # "" if unknown
    encoded: list[bytes]
    params: tuple[ViewParams, ViewParams]


def choose(config: Config, source: Source, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The ids of the first `count` samples of an epoch in the order of training; all if there are fewer."""
    total = len(source)
    return order.global_batch(config.run.seed, epoch, 0, total, min(count, total), config.data.order)


def read(config: Config, source: Source, epoch: int, ids: npt.NDArray[np.int64]) -> DrawnSamples:
    """Reads samples and draws the parameters of both views, as the loader does.

    Raises:
        ValueError: an id is unknown, or a sample is not a whole image of the size that the index states.
    """
    unknown = [number for number in ids.tolist() if not 0 <= number < len(source)]
    if unknown:
        raise ValueError(f"--ids {' '.join(map(str, unknown))}: the data set has ids 0 to {len(source) - 1}")
    encoded = []
    for number in ids.tolist():
        try:
            encoded.append(read_sound(source, number))
        except ValueError as error:
            raise ValueError(
                f"{source.describe(number)}: {error}: show others with --ids, and run tools/verify_shards.py"
            ) from None
    params = draw_both(config.augment, config.run.seed, epoch, ids, source.heights[ids], source.widths[ids])
    labels = source.labels[ids].tolist()
    classes = [source.classes[label] if source.classes and label >= 0 else "" for label in labels]
    places, name_of = [source.describe(i) for i in ids.tolist()], file_names(source)
    return DrawnSamples(ids, places, list(map(name_of, ids.tolist())), classes, encoded, params)


def neutral_jitter(config: Config) -> dict[str, float]:
    """The value of each color operation that changes nothing."""
    plain, one = config.augment.view1.model_copy(update=PLAIN), np.ones(1, np.int64)
    drawn = draw(plain, config.run.seed, 0, one, 0, one, one, config.augment.profile)
    return {name: float(getattr(drawn, name)[0]) for name in JITTER}


def make_views(
    config: Config,
    backend: Backend,
    samples: DrawnSamples,
    params: tuple[ViewParams, ViewParams] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views of every sample as training gets them: (N, 3, size, size), normalized, on the CPU.

    Raises:
        ValueError: a sample does not decode.
    """
    try:
        first, second = backend(samples.encoded, *(params or samples.params))
    except UndecodableError as error:
        lines = [f"{samples.places[place]}: {reason}" for place, reason in error.reasons.items()]
        raise ValueError(f"{shown(lines, '; ')}: show others with --ids") from None
    return first.cpu(), second.cpu()


def to_pixels(config: Config, view: torch.Tensor) -> Pixels:
    """Undoes the normalization: (N, size, size, 3)."""
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
    pixels: Pixels = (view.float().permute(0, 2, 3, 1) * std + mean).numpy()
    return pixels


def signed(value: float, neutral: float) -> str:
    """An offset with its sign, a factor with a multiplication sign."""
    return f"×{value:.2f}" if neutral == 1 else f"{value:+.2f}".replace("-", "−")


def table(view: ViewParams, i: int, height: int, width: int, neutral: dict[str, float]) -> list[Row]:
    """The parameters of sample i, an image of this size, as rows of a table."""
    rows, columns = int(view.height[i]), int(view.width[i])
    share, jitter = 100 * rows * columns / (height * width), bool(view.jitter[i])
    steps = [
        f"{place} {JITTER[j]} {signed(float(getattr(view, JITTER[j])[i]), neutral[JITTER[j]])}"
        for place, j in enumerate(view.order[i], start=1)
    ]

    def switch(name: str, value: str = "yes") -> Row:
        return name, (value if getattr(view, name)[i] else "no",)

    return [
        ("crop", (f"{share:.1f} % of the area, ratio {columns / rows:.2f}",)),
        ("", (f"{columns} × {rows} px at ({view.left[i]}, {view.top[i]})",)),
        switch("flip"),
        ("jitter", (steps[0], steps[1]) if jitter else ("no",)),
        ("", (steps[2], steps[3]) if jitter else ()),
        switch("gray"),
        switch("blur", f"sigma {view.sigma[i]:.2f} px"),
        switch("solarize"),
    ]


def operations(config: Config, samples: DrawnSamples, height: int, width: int) -> list[Strip]:
    """One strip per operation, with parameters that apply it alone to the central square of the first sample."""
    views = config.augment.view1, config.augment.view2
    side = min(height, width)
    shape = np.array([height]), np.array([width])

    def alone(**settings: object) -> ViewParams:
        view = views[0].model_copy(update=PLAIN | settings)
        drawn = draw(view, config.run.seed, 0, samples.ids[:1], 0, *shape, config.augment.profile)
        if "crop_area" not in settings:
            drawn = replace(drawn, height=np.full(1, side, np.int32), width=np.full(1, side, np.int32))
        top, left = (height - drawn.height) // 2, (width - drawn.width) // 2
        return replace(drawn, top=top.astype(np.int32), left=left.astype(np.int32))

    def crop(area: float, ratio: float) -> ViewParams:
        return alone(crop_area=(area, area), crop_ratio=(ratio, ratio))

    def jittered(name: str, value: float) -> ViewParams:
        changed: dict[str, Any] = {name: np.array([value], np.float32)}
        return replace(alone(jitter=1.0), **changed)

    def limits(name: str) -> tuple[float, float]:
        """The lowest and the highest value that either view can draw."""
        low, high = zip(*(getattr(view, name) for view in views), strict=True)
        return min(low), max(high)

    def three(low: float, high: float) -> list[float]:
        return [low, (low + high) / 2, high]

    areas = three(*limits("crop_area"))
    low, high = limits("crop_ratio")
    ratios = [low, (low * high) ** 0.5, high]
    by_area = [(f"{100 * area:.0f} %", crop(area, ratios[1])) for area in areas]
    by_ratio = [(f"{ratio:.2f}", crop(areas[1], ratio)) for ratio in ratios]
    strips: list[Strip] = [
        ("crop: share of the area, at the middle ratio", by_area),
        ("crop: width / height, at the middle area", by_ratio),
    ]
    for name, neutral in neutral_jitter(config).items():
        reach = max(getattr(view, name) for view in views)
        values = three(neutral - reach, neutral + reach)
        title = "hue: share of a turn" if name == "hue" else name
        strips.append((title, [(signed(value, neutral), jittered(name, value)) for value in values]))
    sigmas = three(*limits("blur_sigma"))
    strips.append(("blur: sigma", [(f"{s:.2f} px", alone(blur=1.0, blur_sigma=(s, s))) for s in sigmas]))
    strips.append(("switches", [(name, alone(**{name: 1.0})) for name in ("flip", "gray", "solarize")]))
    return strips
