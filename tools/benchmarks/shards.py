"""How fast make_shards is, against plain decoding of the same files by as many processes.

    python tools/benchmarks/shards.py FOLDER [--workers N] [--repeats 5] [--json]

Both start their processes anew, read the same files and are repeated in turn. The ratio is
the median of the ratios of neighbours, which a machine shared with others changes less than either rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from multiprocessing import get_context
from pathlib import Path

import simplejpeg

from byolt.pipelines.formats.encoded import inspect

MAKE_SHARDS = Path(__file__).resolve().parent.parent / "make_shards.py"


def decode_files(paths: list[str]) -> int:
    """Full RGB decoding with libjpeg-turbo, the pixels thrown away; returns the number of files."""
    for path in paths:
        with open(path, "rb") as file:
            simplejpeg.decode_jpeg(file.read())
    return len(paths)


def plain_decoding(paths: list[str], workers: int) -> float:
    """Seconds for all files, in chunks of 256, start of the processes included."""
    start = time.perf_counter()
    chunks = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    with futures.ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        assert sum(pool.map(decode_files, chunks)) == len(paths)
    return time.perf_counter() - start


def making_shards(source: Path, scratch: Path, workers: int) -> float:
    """Seconds for the whole command, start of Python included."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch) as target:
        command = [sys.executable, str(MAKE_SHARDS), str(source), f"{target}/out", "--workers", str(workers)]
        subprocess.run([*command, "--shard-size", "32"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Prints images/s of both and the ratio."""
    parser = argparse.ArgumentParser(prog="bench_shards", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder with JPEG files")
    parser.add_argument(
        "--images", type=int, default=4000, help="files are repeated (as links) up to this many"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    files = []
    for path in sorted(args.folder.rglob("*")) if args.folder.is_dir() else []:
        if path.is_file():
            try:
                if inspect(path.read_bytes()).format == "jpeg":
                    files.append(path.resolve())
            except ValueError:
                continue
    if not files or min(args.images, args.repeats, args.workers) < 1:
        print(f"bench_shards: {args.folder}: no JPEG files, or a number below 1 was given", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        links = [source / f"{i:06d}.jpg" for i in range(args.images)]
        for i, link in enumerate(links):
            link.symlink_to(files[i % len(files)])
        paths = [str(link) for link in links]
        plain, shards = [], []
        for _ in range(args.repeats):
            plain.append(args.images / plain_decoding(paths, args.workers))
            shards.append(args.images / making_shards(source, Path(scratch), args.workers))
    ratios = [round(ours / theirs, 3) for ours, theirs in zip(shards, plain, strict=True)]
    result = {
        "images": args.images,
        "files": len(files),
        "workers": args.workers,
        "plain_images_per_s": round(statistics.median(plain), 1),
        "make_shards_images_per_s": round(statistics.median(shards), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": ratios,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"plain libjpeg-turbo  {result['plain_images_per_s']:>9,} images/s")
        print(f"make_shards          {result['make_shards_images_per_s']:>9,} images/s")
        print(
            f"ratio                {result['ratio']:.1%}, {args.workers} processes, each {result['ratios']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
