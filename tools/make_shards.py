"""Makes shards of images: SRC (folder, tar, zip, data set) -> DST (WebDataset tars or .beton files, with a manifest).

    python tools/make_shards.py SRC DST [--format beton] [--split train=.9,val=.1] [--max-size 512] ...
    python tools/make_shards.py --index FOLDER      a manifest for WebDataset tars made elsewhere

What becomes of which input is written in `pipelines/convert/rules.py`. Files that cannot be used are listed in
DST/quarantine.jsonl. Killed and started again it continues, and the result is the same to the byte.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent import futures
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from byolt.files.atomic import sha256_of, writing
from byolt.files.lock import Lock
from byolt.files.progress import Meter
from byolt.pipelines.convert import ffcv_engine
from byolt.pipelines.convert.destination import QUARANTINE, claim, is_finished, not_strict
from byolt.pipelines.convert.from_files import Listing, list_originals
from byolt.pipelines.convert.from_shards import is_data_set, list_data_set
from byolt.pipelines.convert.plan import SUFFIXES, WORK, parse_split, plan, settings_of
from byolt.pipelines.convert.shard_writer import Done, Job, Unusable, make_shard, read_note, start_worker
from byolt.pipelines.convert.workers import spread
from byolt.pipelines.formats.encoded import MAX_PIXELS
from byolt.pipelines.formats.index import Index, index_tar
from byolt.pipelines.manifest import MANIFEST, Manifest, Shard, join

# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────


def make(args: argparse.Namespace) -> str:
    """Makes the data set(s); returns the line that says what was made."""
    split = parse_split(args.split)
    for folder in (args.dst, *(args.dst / name for name in split)):
        if args.src.is_dir() and folder.resolve().is_relative_to(args.src.resolve()):
            raise ValueError(f"DST {folder} is or lies inside SRC {args.src}: name another folder")
    if args.engine == "ffcv":
        ffcv_engine.require()
    is_made = is_data_set(args.src)
    if is_made and args.inside:
        raise ValueError(f"--inside {args.inside}: SRC {args.src} is a data set, which has no folders")
    if not is_made and not args.src.exists():
        raise ValueError(f"SRC {args.src} does not exist")
    work = args.dst / WORK
    is_new = not args.dst.exists()
    work.mkdir(parents=True, exist_ok=True)
    with Lock(work / "lock", f"DST {args.dst}") as lock:
        if note := lock.take():
            print(f"make_shards: note: {note}", file=sys.stderr)
        try:
            listing = list_data_set(args.src) if is_made else list_originals(args.src, args.inside, work)
            settings = settings_of(listing, args)
            if args.strict and listing.refused:
                raise Unusable(f"{listing.refused[0].file}: {listing.refused[0].reason} (--strict)")
            jobs = plan(listing, args, split)
            if is_finished(args.dst, split, settings, args.strict):
                shutil.rmtree(work)
                return f"{args.dst}: already done"
            claim(work, args.dst, split, {**settings, "source_modified": listing.modified()})
        except BaseException:
            if not (work / "settings.json").exists():
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    if is_new:
                        args.dst.rmdir()
            raise
        if listing.left_out:
            print(f"make_shards: note: left out: {', '.join(listing.left_out)}", file=sys.stderr)
        start = time.perf_counter()
        planned = [job for part in jobs.values() for job in part]
        todo = [job for job in planned if read_note(job) is None]
        run(todo, args.workers, len(listing.entries))
        notes = {job.shard: read_note(job) for job in planned}
        done = {path: note for path, note in notes.items() if note is not None}
        line = commit(args.dst, jobs, done, listing, settings, args.strict)
        seconds = time.perf_counter() - start
        shutil.rmtree(work)
    made = sum(len(job.entries) for job in todo)
    return f"{line}, {seconds:.1f} s, {made / seconds:,.0f} images/s"


def run(jobs: list[Job], workers: int, num_images: int) -> None:
    """Makes the shards of these jobs; `num_images` counts those of finished shards as well."""
    counters = get_context("spawn").Array("q", 3)
    kept = num_images - sum(len(job.entries) for job in jobs)
    with spread(make_shard, jobs, workers, start_worker, (counters,)) as pending:
        try:
            start = time.perf_counter()
            with Meter("image", num_images, kept, line_every=5.0) as meter:
                waiting = set(pending)
                while waiting:
                    finished, waiting = futures.wait(waiting, 0.2, futures.FIRST_COMPLETED)
                    seconds, (images, size) = time.perf_counter() - start, counters[:2]
                    rate = f"{images / seconds:,.0f} images/s, {size / seconds / 1e6:,.1f} MB/s"
                    meter.update(kept + images, rate)
                    for future in finished:
                        future.result()
        except BaseException:
            counters[2] = 1  # each worker ends at its next image
            raise


def commit(
    dst: Path,
    jobs: dict[str, list[Job]],
    done: dict[Path, Done],
    listing: Listing,
    settings: dict[str, Any],
    strict: bool,
) -> str:
    """Writes the quarantine list, then each part's manifest."""
    parts = {name: [done[job.shard] for job in part] for name, part in jobs.items()}
    rows = [item._asdict() for item in listing.refused]
    rows += [row for part in parts.values() for item in part for row in item.quarantine]
    if strict and rows:  # of shards that an earlier start made, without --strict
        raise not_strict(rows[0])
    _write_quarantine(dst, rows)
    manifests = {}
    for name, part in parts.items():
        shards = [item.shard for item in part if item.shard is not None]
        if not shards:
            shutil.rmtree(dst / WORK)  # another SRC may be tried
            raise Unusable(
                f"SRC: no file{f' for {name}' if name else ''} is an image, see {dst / QUARANTINE}"
            )
        records = join(item.records for item in part if item.shard is not None)
        manifests[name] = Manifest(shards, records, listing.classes, settings)
    for name, manifest in manifests.items():
        manifest.save(dst / name)
    samples = " + ".join(f"{len(manifest.samples):,}" for manifest in manifests.values())
    number = sum(len(manifest.shards) for manifest in manifests.values())
    classes = f"{len(listing.classes)} classes" if listing.classes else "no labels"
    return f"{dst}: {samples} samples in {number} shards, {classes}, {len(rows)} in quarantine"


def _write_quarantine(folder: Path, rows: list[dict[str, str]]) -> None:
    with writing(folder / QUARANTINE) as file:
        for row in sorted(rows, key=lambda row: row["file"]):
            file.write(json.dumps(row).encode() + b"\n")


# ── tars made elsewhere ─────────────────────────────────────────────────────────────────────────────────────


def index(folder: Path, workers: int, strict: bool) -> str:
    """Writes a manifest and the quarantine list beside the WebDataset tars of a folder; these are only read."""
    if not folder.is_dir():
        raise ValueError(f"--index {folder}: not a folder")
    if (folder / MANIFEST).exists():
        raise ValueError(f"--index {folder}: it has {MANIFEST} already: remove that to index again")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(
            f"--index {folder}: no .tar in it (compressed ones have no random access: unpack them)"
        )
    with spread(_index_one, paths, workers) as pending:
        results = [future.result() for future in pending]
    rows = [
        {"file": f"{shard.name}: {key}", "reason": reason}
        for shard, found in results
        for key, reason in found.refused
    ]
    if strict and rows:
        raise not_strict(rows[0])
    records = join(found.records for _, found in results)
    imageless = sum(found.imageless for _, found in results)
    counts = f"{len(rows)} in quarantine, {imageless} names without an image (.jpg, .jpeg or .png)"
    if not len(records):
        example = f", as {rows[0]['file']}: {rows[0]['reason']}" if rows else ""
        raise ValueError(f"--index {folder}: no sample can be used: {counts}{example}")
    _write_quarantine(folder, rows)
    Manifest([shard for shard, _ in results], records, None, {"indexed": True}).save(folder)
    labelled = int((records["label"] >= 0).sum())
    return f"{folder}: {len(records):,} samples in {len(paths)} shards, {labelled:,} labelled, {counts}"


def _index_one(path: Path) -> tuple[Shard, Index]:
    found = index_tar(path)
    return Shard(path.name, path.stat().st_size, sha256_of(path), len(found.records)), found


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; exits 2 with one line where it makes no sense."""
    parser = argparse.ArgumentParser(prog="make_shards", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "src",
        type=Path,
        help="folder (class sub-folders or flat), tar or zip of images; data set; .beton files with commas between; "
        "with --index: the folder",
    )
    parser.add_argument("dst", type=Path, nargs="?", help="folder to make")
    parser.add_argument("--format", choices=list(SUFFIXES), default="webdataset")
    parser.add_argument(
        "--raw-fraction",
        type=float,
        default=0.0,
        metavar="P",
        help="of a .beton: probability of an image to be stored as pixels (default 0)",
    )
    parser.add_argument(
        "--engine",
        choices=["own", "ffcv"],
        default="own",
        help="of a .beton: ffcv's library re-encodes all images",
    )
    parser.add_argument(
        "--index", action="store_true", help="write a manifest for WebDataset tars made elsewhere"
    )
    parser.add_argument("--inside", default="", metavar="FOLDER", help="folder within SRC to take, as train")
    parser.add_argument(
        "--max-size", type=int, default=0, metavar="PX", help="re-encode what has a longer side"
    )
    parser.add_argument(
        "--quality", type=int, default=95, help="JPEG quality of what is re-encoded (default 95)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger ones before decoding"
    )
    parser.add_argument(
        "--no-decode",
        dest="decode",
        action="store_false",
        help="check JPEGs by header and end alone: for files that are known to be whole",
    )
    parser.add_argument(
        "--split", metavar="NAME=SHARE,...", help="as train=.9,val=.1: one data set each, in DST/NAME"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled order (default 0)")
    parser.add_argument("--shard-size", type=int, default=256, metavar="MB", help="default 256")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all CPUs)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be used")
    args = parser.parse_args(argv)
    if args.index != (args.dst is None):
        parser.error("--index takes one folder" if args.index else "DST is missing")
    if args.format != "beton" and (args.raw_fraction or args.engine != "own"):
        parser.error("--raw-fraction and --engine are for --format beton")
    bounds = {"quality": (1, 100), "workers": (1, 1024), "shard_size": (1, 100_000), "seed": (0, 2**63)}
    bounds |= {"max_size": (0, 65500), "max_pixels": (1, 2**32), "raw_fraction": (0, 1)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {low} to {high}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed on the way, 2 a mistake in what was asked for, 130 interrupted."""
    args = parse(argv)
    try:
        print(index(args.src, args.workers, args.strict) if args.index else make(args))
        return 0
    except ValueError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except (Unusable, futures.BrokenExecutor) as error:
        print(f"make_shards: {error}", file=sys.stderr)
    except MemoryError:
        print(
            "make_shards: out of memory: use fewer --workers, or start it again to continue", file=sys.stderr
        )
    except OSError as error:
        where = error.filename or args.dst or args.src
        print(
            f"make_shards: {where}: {error.strerror or error}: nothing unfinished was kept under its name",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("make_shards: interrupted; start it again to continue", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
