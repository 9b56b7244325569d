"""What make_shards will do: which input file becomes which sample of which shard, under which settings.

Pure functions of the source's listing and the command line, so that a run that was killed can be continued and ends in
the same bytes.
"""

import argparse
import re
from typing import Any

import numpy as np

from byolt.pipelines.convert.from_files import Entry, Listing
from byolt.pipelines.convert.from_shards import KIND
from byolt.pipelines.convert.shard_writer import Job
from byolt.pipelines.order import global_batch

WORK = ".make_shards"  # in DST until it is finished
SUFFIXES = {"webdataset": ".tar", "beton": ".beton"}  # by --format


def parse_split(text: str | None) -> dict[str, float]:
    """ "train=.9,val=.1" -> {"train": .9, "val": .1}; no split is one part without a name."""
    if text is None:
        return {"": 1.0}
    parts = [re.fullmatch(r"([A-Za-z0-9_-]+)=(\d*\.?\d+)", part.strip()) for part in text.split(",")]
    split = {part[1]: float(part[2]) for part in parts if part}
    if len(split) != len(parts) or abs(sum(split.values()) - 1) > 1e-6:
        raise ValueError(
            f"--split {text!r}: write distinct names with shares that sum to 1, as train=.9,val=.1"
        )
    return split


def plan(listing: Listing, args: argparse.Namespace, split: dict[str, float]) -> dict[str, list[Job]]:
    """Which entry goes to which shard: a pure function of the source's names and sizes and the settings.

    Files are shuffled; the samples of a data set stay in its order, also those of a part of it, which is drawn.
    """
    number = len(listing.entries)
    order = global_batch(args.seed, 0, 0, number, number)  # the same with every release of numpy
    suffix = SUFFIXES[args.format]
    bounds = np.rint(np.cumsum([0.0, *split.values()]) * len(order)).astype(int)
    bounds[-1] = len(order)  # the shares may sum to 1 - 1e-6
    jobs: dict[str, list[Job]] = {}
    for (name, share), start, stop in zip(split.items(), bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            raise ValueError(f"--split {name}={share}: no image is left for it, SRC has {len(order)} files")
        part = order[start:stop] if listing.kind != KIND else np.sort(order[start:stop])
        entries = [listing.entries[i] for i in part]
        jobs[name] = []
        for number, chunk in enumerate(_chunks(entries, args.shard_size * 1_000_000)):
            stem = f"{name or 'shard'}-{number:06d}"
            jobs[name].append(
                Job(
                    source=(listing.path, listing.kind, listing.prefix),
                    entries=chunk,
                    digits=max(6, len(str(len(entries)))),
                    shard=args.dst / name / f"{stem}{suffix}",
                    note=args.dst / WORK / f"{stem}.json",
                    rules={
                        "max_size": args.max_size,
                        "max_pixels": args.max_pixels,
                        "decode": args.decode and not listing.proven,
                    },
                    quality=args.quality,
                    strict=args.strict,
                    seed=args.seed,
                    raw_fraction=args.raw_fraction,
                    engine=args.engine,
                )
            )
    return jobs


def _chunks(entries: list[Entry], shard_bytes: int) -> list[list[tuple[int, Entry]]]:
    chunks: list[list[tuple[int, Entry]]] = [[]]
    size = 0
    for numbered in enumerate(entries):
        if size >= shard_bytes:
            chunks.append([])
            size = 0
        chunks[-1].append(numbered)
        size += numbered[1].length + 2048  # headers, .cls and .json
    return chunks


def settings_of(listing: Listing, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    return {
        "format": args.format,
        "engine": args.engine,
        "raw_fraction": args.raw_fraction,
        "decode": args.decode or listing.proven,
        "source_files": len(listing.entries),
        "source_bytes": sum(entry.length for entry in listing.entries),
        "source_sha256": listing.sha256(),
        "max_size": args.max_size,
        "quality": args.quality,
        "max_pixels": args.max_pixels,
        "seed": args.seed,
        "shard_size": args.shard_size,
        "split": args.split,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names what two settings disagree in, or ""."""
    keys = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in keys)
