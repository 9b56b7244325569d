"""Draws a small labeled image set, so that the quickstart needs no download.

    python tools/quickstart_images.py datasets/quickstart

writes `DST/train/<class>/NNNN.jpg` and `DST/val/<class>/NNNN.jpg`: ten classes of shapes and textures with random
place, size, rotation and colors over a textured, noisy background, sometimes with a distractor.

Two rules keep the task honest. The mean color of an image is sampled independently of its class, and the finished
drawing is shifted to it, so the mean color does not tell the class. Every image has its own random generator,
keyed by (seed, split, class, index), so a larger set contains the smaller one, byte for byte.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from byolt.files.console import Parser, say
from byolt.files.paths import home_path

SPLITS = ("train", "val")
OVERSAMPLING = 3  # a pixel is the mean of 3 x 3 points: smooth edges at 32 px


def _polygon(u: np.ndarray, v: np.ndarray, corners: int) -> np.ndarray:
    """Regular polygon with circumradius 1: inside of all its edges."""
    sector = 2 * np.pi / corners
    return np.hypot(u, v) * np.cos((np.arctan2(v, u) % sector) - sector / 2) < np.cos(sector / 2)


def _star(u: np.ndarray, v: np.ndarray, inner: float = 0.38) -> np.ndarray:
    """Five-pointed star: the edge between a tip and an inner corner, at radius `inner`, is a straight line."""
    radius = np.hypot(u, v)
    to_tip = np.abs((np.arctan2(v, u) % (2 * np.pi / 5)) - np.pi / 5)  # 0 at a tip, pi/5 at an inner corner
    along, across = radius * np.cos(to_tip), radius * np.sin(to_tip)
    return (along - 1) * (inner * np.sin(np.pi / 5)) + across * (1 - inner * np.cos(np.pi / 5)) < 0


# A figure's mask, bool (S, S), from the coordinates of the points in its own frame, where its radius is 1.
CLASSES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u**2 + v**2 < 0.85**2,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) < 0.2,
    "square": lambda u, v: _polygon(u, v, corners=4),
    "triangle": lambda u, v: _polygon(u, v, corners=3),
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 0.95),
    "stripes": lambda u, v: np.sin(4.5 * u) > 0,
    "checker": lambda u, v: np.sin(4.5 * u) * np.sin(4.5 * v) > 0,
    "dots": lambda u, v: np.hypot((u / 0.85) % 1 - 0.5, (v / 0.85) % 1 - 0.5) < 0.3,
    "spiral": lambda u, v: np.sin(np.arctan2(v, u) - 6.0 * np.hypot(u, v)) > 0,
}


def _frame(
    rng: np.random.Generator, size: int, radius: tuple[float, float], reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a figure's place and returns the coordinates of an image's points in its frame.

    Args:
        rng: the image's generator.
        size: pixels a side.
        radius: smallest and largest radius of the figure, as fractions of the side.
        reach: largest offset of the figure's center from the image's, in x and in y, likewise.

    Returns:
        (u, v), each float64 (size * OVERSAMPLING, size * OVERSAMPLING).
    """
    points = (np.arange(size * OVERSAMPLING) + 0.5) / (size * OVERSAMPLING) - 0.5
    x0, y0 = rng.uniform(-reach, reach, 2)
    turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(*radius)
    mirror = rng.choice((-1, 1))  # spirals turn either way
    x, y = (points - x0)[None, :] / scale, (points - y0)[:, None] / scale
    return np.cos(turn) * x + np.sin(turn) * y, mirror * (np.cos(turn) * y - np.sin(turn) * x)


def _coverage(mask: np.ndarray) -> np.ndarray:
    """Share of each pixel that the figure covers: float64 (size, size, 1) in [0, 1]."""
    size = mask.shape[0] // OVERSAMPLING
    return mask.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))[..., None]


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth random texture: a coarse grid of standard normal numbers, enlarged. Float64 (size, size, 1)."""
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)[..., None]


def _contrast(rng: np.random.Generator) -> np.ndarray:
    """Color of a figure minus the background's: (3,), length .5 to .9, of any hue.

    The figure is always the lighter of the two.
    """
    direction = 1 + 0.7 * rng.standard_normal(3)
    direction *= np.sign(direction.sum())
    return direction / np.linalg.norm(direction) * rng.uniform(0.5, 0.9)


def draw(class_name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one image, uint8 (size, size, 3)."""
    mean_color = rng.uniform(0.3, 0.7, 3)  # independent of the class
    figure = _coverage(CLASSES[class_name](*_frame(rng, size, radius=(0.24, 0.42), reach=0.18)))
    image = figure * _contrast(rng)
    if rng.random() < 0.4:  # a distractor: a small bar, in a color of its own
        u, v = _frame(rng, size, radius=(0.1, 0.2), reach=0.45)
        bar = _coverage((np.abs(u) < 1) & (np.abs(v) < 0.3))
        image = image * (1 - bar) + bar * _contrast(rng)
    image = image + 0.04 * _clouds(rng, size) + rng.normal(0, 0.03, image.shape)
    image = image - image.mean(axis=(0, 1)) + mean_color
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def image_rng(seed: int, split: str, class_name: str, index: int) -> np.random.Generator:
    """The random generator of one image, a function of its four coordinates alone."""
    return np.random.default_rng([seed, SPLITS.index(split), list(CLASSES).index(class_name), index])


def write_set(folder: Path, per_class: dict[str, int], size: int, seed: int) -> int:
    """Writes the set to a new folder, which appears complete or not at all; returns the number of images.

    `per_class` is the number of images of each class, by split.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        for split, count in per_class.items():
            for class_name in CLASSES:
                target = unfinished / split / class_name
                target.mkdir(parents=True)
                for index in range(count):
                    image = Image.fromarray(draw(class_name, size, image_rng(seed, split, class_name, index)))
                    image.save(target / f"{index:04d}.jpg", quality=92, subsampling=0)
        unfinished.rename(folder)
    return len(CLASSES) * sum(per_class.values())


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 a value is out of range, 130 interrupted."""
    parser = Parser(prog="quickstart_images", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", metavar="DST", type=home_path, help="folder to write; must not exist")
    options = [
        ("per-class", 400, 1, 10_000, "training images per class"),
        ("val-per-class", 100, 1, 10_000, "validation images per class"),
        ("size", 32, 16, 512, "side of an image in pixels"),
        ("seed", 0, 0, 2**63, "seed of the whole set"),
    ]
    for name, default, low, high, text in options:
        text += f", {low} to {high} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    args = parser.parse_args(arguments)
    for name, _, low, high, _ in options:
        if not low <= (value := getattr(args, name.replace("-", "_"))) <= high:
            parser.error(f"--{name} {value}: must be between {low} and {high}")
    try:
        per_class = {"train": args.per_class, "val": args.val_per_class}
        count = write_set(args.folder, per_class, args.size, args.seed)
    except OSError as error:
        say(f"quickstart_images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"quickstart_images: interrupted, nothing left at {args.folder}", file=sys.stderr)
        return 130
    say(f"{count} images of {len(CLASSES)} classes in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
