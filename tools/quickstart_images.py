"""Draws a small labelled image set, so that the quickstart needs no download.

    python tools/quickstart_images.py datasets/quickstart

writes `DST/train/<class>/NNNN.jpg` and `DST/val/<class>/NNNN.jpg`: ten classes of shapes and textures, drawn
with random place, size, rotation and colours over a textured, noisy background, sometimes with a distractor.

Two rules keep the task honest. The mean colour of an image is drawn without looking at its class and the
finished drawing is shifted to it, so mean colour says nothing about the class. Every image has a random
generator of its own, keyed by (seed, split, class, index), so image 7 of a class is the same whatever else is
drawn: a larger set contains the smaller one, byte for byte.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
OVERSAMPLING = 3  # each pixel is the mean of 3 x 3 points: smooth edges at 32 px
JPEG_QUALITY = 92

Mask = np.ndarray  # bool (S, S): True where the figure is drawn


def _polar(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(u, v), np.arctan2(v, u)


def _polygon(u: np.ndarray, v: np.ndarray, corners: int) -> Mask:
    """Regular polygon with circumradius 1: inside of all its edges."""
    radius, angle = _polar(u, v)
    sector = 2 * np.pi / corners
    return radius * np.cos((angle % sector) - sector / 2) < np.cos(sector / 2)


def disc(u: np.ndarray, v: np.ndarray) -> Mask:
    return u**2 + v**2 < 0.85**2


def ring(u: np.ndarray, v: np.ndarray) -> Mask:
    return np.abs(np.hypot(u, v) - 0.75) < 0.2


def square(u: np.ndarray, v: np.ndarray) -> Mask:
    return _polygon(u, v, corners=4)


def triangle(u: np.ndarray, v: np.ndarray) -> Mask:
    return _polygon(u, v, corners=3)


def star(u: np.ndarray, v: np.ndarray) -> Mask:
    """Five-pointed star: between an inner corner and a tip the edge is a straight line."""
    radius, angle = _polar(u, v)
    to_tip = np.abs((angle % (2 * np.pi / 5)) - np.pi / 5)  # 0 at a tip, pi/5 at an inner corner
    inner = 0.38
    along, across = radius * np.cos(to_tip), radius * np.sin(to_tip)
    corner_along, corner_across = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    return (along - 1) * corner_across + across * (1 - corner_along) < 0


def cross(u: np.ndarray, v: np.ndarray) -> Mask:
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (near < 0.27) & (far < 0.95)


def stripes(u: np.ndarray, v: np.ndarray) -> Mask:
    return np.sin(4.5 * u) > 0


def checker(u: np.ndarray, v: np.ndarray) -> Mask:
    return np.sin(4.5 * u) * np.sin(4.5 * v) > 0


def dots(u: np.ndarray, v: np.ndarray) -> Mask:
    return np.hypot((u / 0.85) % 1 - 0.5, (v / 0.85) % 1 - 0.5) < 0.3


def spiral(u: np.ndarray, v: np.ndarray) -> Mask:
    radius, angle = _polar(u, v)
    return np.sin(angle - 6.0 * radius) > 0


CLASSES: dict[str, Callable[[np.ndarray, np.ndarray], Mask]] = {
    figure.__name__: figure
    for figure in (disc, ring, square, triangle, star, cross, stripes, checker, dots, spiral)
}


def _plane(
    rng: np.random.Generator, size: int, radius: tuple[float, float], reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the points of an image in a figure's own frame, whose unit is the figure's radius.

    Args:
        rng: the image's generator.
        size: pixels a side.
        radius: smallest and largest radius of the figure, as fractions of the side.
        reach: largest offset of the figure's centre from the image's, in x and in y, likewise.

    Returns:
        (u, v), each float64 (size * OVERSAMPLING, size * OVERSAMPLING).
    """
    points = (np.arange(size * OVERSAMPLING) + 0.5) / (size * OVERSAMPLING) - 0.5
    x0, y0 = rng.uniform(-reach, reach, 2)
    turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(*radius)
    mirror = rng.choice((-1, 1))  # spirals turn either way
    x, y = (points - x0)[None, :] / scale, (points - y0)[:, None] / scale
    return np.cos(turn) * x + np.sin(turn) * y, mirror * (np.cos(turn) * y - np.sin(turn) * x)


def _coverage(mask: Mask) -> np.ndarray:
    """Part of each pixel that the figure covers: float64 (size, size, 1) in [0, 1]."""
    size = mask.shape[0] // OVERSAMPLING
    return mask.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))[..., None]


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth random texture: a coarse grid of standard normal numbers, enlarged. Float64 (size, size, 1)."""
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)[..., None]


def _step(rng: np.random.Generator) -> np.ndarray:
    """Difference between a figure's colour and the background's: (3,), length .5 to .9.

    The figure is the lighter of the two, of any hue: one thing fewer, beside shape, that both views share.
    """
    direction = 1 + 0.7 * rng.standard_normal(3)
    direction *= np.sign(direction.sum())
    return direction / np.linalg.norm(direction) * rng.uniform(0.5, 0.9)


def draw(class_name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one image.

    Args:
        class_name: key of CLASSES.
        size: pixels a side.
        rng: the image's generator; its first draw is the mean colour, before the class is looked at.

    Returns:
        uint8 (size, size, 3).
    """
    mean_colour = rng.uniform(0.3, 0.7, 3)
    figure = _coverage(CLASSES[class_name](*_plane(rng, size, radius=(0.24, 0.42), reach=0.18)))
    image = figure * _step(rng)
    if rng.random() < 0.4:  # a distractor: a small bar, in a colour of its own
        u, v = _plane(rng, size, radius=(0.1, 0.2), reach=0.45)
        bar = _coverage((np.abs(u) < 1) & (np.abs(v) < 0.3))
        image = image * (1 - bar) + bar * _step(rng)
    image = image + 0.04 * _clouds(rng, size) + rng.normal(0, 0.03, image.shape)
    image = image - image.mean(axis=(0, 1)) + mean_colour
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def image_rng(seed: int, split: str, class_name: str, index: int) -> np.random.Generator:
    """The random generator of one image, a function of its four coordinates alone."""
    return np.random.default_rng([seed, SPLITS.index(split), list(CLASSES).index(class_name), index])


def write_set(folder: Path, per_class: dict[str, int], size: int, seed: int) -> int:
    """Writes the set so that it appears under its name complete or not at all.

    Args:
        folder: the final folder; must not exist.
        per_class: images of each class, by split.
        size: pixels a side.
        seed: of the whole set.

    Returns:
        Number of images written.

    Raises:
        FileExistsError: `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for split, count in per_class.items():
            for class_name in CLASSES:
                target = unfinished / split / class_name
                target.mkdir(parents=True)
                for index in range(count):
                    image = draw(class_name, size, image_rng(seed, split, class_name, index))
                    Image.fromarray(image).save(
                        target / f"{index:04d}.jpg", quality=JPEG_QUALITY, subsampling=0
                    )
        unfinished.chmod(0o755)  # mkdtemp makes it private
        unfinished.rename(folder)
    except BaseException:  # Ctrl-C and a full disk too: leave nothing behind
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return len(CLASSES) * sum(per_class.values())


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, writes the set, says what was written. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Draw a small labelled image set: ten classes of shapes and textures."
    )
    parser.add_argument("folder", metavar="DST", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--per-class", type=int, default=400, metavar="N", help="training images a class (default 400)"
    )
    parser.add_argument(
        "--val-per-class", type=int, default=100, metavar="N", help="validation images (default 100)"
    )
    parser.add_argument(
        "--size", type=int, default=32, metavar="PX", help="pixels a side, 16 to 512 (default 32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the whole set, 0 or more (default 0)")
    args = parser.parse_args(arguments)
    for name, value, low, high in (
        ("--per-class", args.per_class, 1, 10_000),
        ("--val-per-class", args.val_per_class, 1, 10_000),
        ("--size", args.size, 16, 512),
        ("--seed", args.seed, 0, 2**63),
    ):
        if not low <= value <= high:
            parser.error(f"{name} {value}: must be between {low} and {high}")
    per_class = {"train": args.per_class, "val": args.val_per_class}
    try:
        count = write_set(args.folder, per_class, args.size, args.seed)
    except OSError as error:
        print(f"quickstart_images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"quickstart_images: interrupted, nothing left at {args.folder}", file=sys.stderr)
        return 130
    print(f"{count} images of {len(CLASSES)} classes in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
