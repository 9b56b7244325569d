"""Compares make_shards with plain decoding of the same files by as many processes.

    python tools/benchmarks/shards.py FOLDER [--workers N] [--repeats 5] [--json]

Both start their processes anew, read the same files and take turns. The ratio is the median over neighboring
rounds; other programs on the machine change it less than either speed.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import simplejpeg

from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.pipelines.formats.encoded import inspect

MAKE_SHARDS = Path(__file__).resolve().parent.parent / "make_shards.py"


class Rounds:
    """Speed and CPU time of repeated work."""

    def __init__(self) -> None:
        self.images_per_s: list[float] = []
        self.cpu_ms: list[float] = []  # an image

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu()
        yield
        self.images_per_s.append(images / (time.perf_counter() - wall))
        self.cpu_ms.append(1000 * (_cpu() - cpu) / images)

    def line(self) -> str:
        """The medians, as text."""
        speed, cpu = statistics.median(self.images_per_s), statistics.median(self.cpu_ms)
        return f"{speed:>8,.0f} images/s {cpu:>7.2f} CPU ms an image"

    def ratio(self, other: "Rounds") -> dict[str, float]:
        """How many times faster this is than the other: by the clock, and by CPU time."""
        walls = zip(self.images_per_s, other.images_per_s, strict=True)
        cpus = zip(self.cpu_ms, other.cpu_ms, strict=True)
        wall, cpu = statistics.median(a / b for a, b in walls), statistics.median(b / a for a, b in cpus)
        return {"wall": round(wall, 2), "cpu": round(cpu, 2)}


def _cpu() -> float:
    """Seconds of CPU time of this process and of its children that have ended."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(part.ru_utime + part.ru_stime for part in used)


def find_jpegs(folder: Path) -> list[Path]:
    """All JPEG files below a folder, sorted."""
    return [path.resolve() for path in sorted(folder.rglob("*")) if path.is_file() and _is_jpeg(path)]


def _is_jpeg(path: Path) -> bool:
    try:
        return inspect(path.read_bytes()).format == "jpeg"
    except ValueError:
        return False


def link_files(files: list[Path], folder: Path, number: int) -> list[str]:
    """Fills a new folder with links to the files, repeated up to `number`; returns the links."""
    folder.mkdir()
    links = [folder / f"{i:06d}.jpg" for i in range(number)]
    for i, link in enumerate(links):
        link.symlink_to(files[i % len(files)])
    return [str(link) for link in links]


def decode_files(paths: list[str]) -> None:
    """Decodes to RGB with libjpeg-turbo."""
    for path in paths:
        simplejpeg.decode_jpeg(Path(path).read_bytes())


def decode_all(paths: list[str], workers: int) -> None:
    """Decodes the files in new processes, 256 a task."""
    chunks = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    with futures.ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(decode_files, chunks))


def make_shards(source: Path, scratch: Path, workers: int) -> None:
    """Runs the whole command."""
    with tempfile.TemporaryDirectory(dir=scratch) as target:
        command = [sys.executable, str(MAKE_SHARDS), str(source), f"{target}/out", "--workers", str(workers)]
        subprocess.run([*command, "--shard-size", "32"], check=True, capture_output=True)


def main(argv: list[str] | None = None) -> int:
    """Prints images/s of both and the ratio."""
    parser = Parser(prog="benchmarks/shards", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=home_path, help="folder with JPEG files")
    parser.add_argument("--images", type=int, default=4000, help="files are repeated up to this number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    files = find_jpegs(args.folder)
    if not files or min(args.images, args.repeats, args.workers) < 1:
        say(f"benchmarks/shards: {args.folder}: no JPEG files, or a number is below 1", file=sys.stderr)
        return 2
    plain, ours = Rounds(), Rounds()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        links = link_files(files, scratch / "source", args.images)
        for _ in range(args.repeats):
            with plain.measure(args.images):
                decode_all(links, args.workers)
            with ours.measure(args.images):
                make_shards(scratch / "source", scratch, args.workers)
    numbers = {"images": args.images, "files": len(files), "workers": args.workers}
    ratio = ours.ratio(plain)
    if args.json:
        say(json.dumps({**numbers, "plain": vars(plain), "make_shards": vars(ours), "ratio": ratio}))
    else:
        say(f"plain libjpeg-turbo {plain.line()}")
        say(f"make_shards         {ours.line()}")
        say(f"ratio               {ratio['wall']:.1%} by the clock, {ratio['cpu']:.1%} by CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
