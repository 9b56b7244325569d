"""The loader's speed on remote shards against local ones, for a step of a given speed; see README.md.

    python benchmarks/remote/measure.py --json remote.json

The data set is raw pixels, so that bytes limit the loader, not decoding. Its shards are hard links to one file. A
server in a process of its own sends them, with a delay for each request and a limit for each connection. The step
sleeps, as the host does while a GPU computes. Every case is a fresh process with an empty cache.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byolt.configs.schema import Config, ViewConfig, from_settings
from byolt.files.atomic import sha256_of
from byolt.files.console import say
from byolt.model.run import provenance
from byolt.pipelines import order
from byolt.pipelines.backends import make_backend
from byolt.pipelines.convert.beton_writer import BetonWriter
from byolt.pipelines.formats.encoded import ppm_header
from byolt.pipelines.formats.index import index_beton
from byolt.pipelines.loader import Loader
from byolt.pipelines.manifest import Manifest, Shard
from byolt.pipelines.remote.dataset import PIECE
from byolt.pipelines.sources import open_source

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from range_server import RangeServer

SHARD = 1024  # images
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Case:
    """One measurement: a loader that feeds a step of `batch_size / rate` seconds."""

    name: str
    path: str
    local: str  # the same data
    order: order.Mode
    connections: int
    cache: str
    batch_size: int
    size: int  # pixels of a view
    rate: float  # images/s of the step
    seconds: float
    settle: float  # seconds until `settled` begins


def write_data(folder: Path, images: int, pixels: int) -> None:
    """Writes one .beton of SHARD raw images of noise, the links to it, and the manifest of `images` images."""
    rng, first = np.random.default_rng(0), folder / "000000.beton"
    with first.open("w+b") as file:
        beton = BetonWriter(file, SHARD)
        for number in range(SHARD):
            beton.add(str(number), ppm_header(pixels, pixels) + rng.bytes(3 * pixels**2), 0, {})
        beton.finish()
    records, count = index_beton(first), math.ceil(images / SHARD)
    shard = Shard(first.name, first.stat().st_size, sha256_of(first), SHARD)
    shards = [shard._replace(name=f"{number:06d}.beton") for number in range(count)]
    for link in shards[1:]:
        os.link(first, folder / link.name)
    samples = np.tile(records, count)
    samples["shard"] = np.repeat(np.arange(count), SHARD)
    Manifest(shards, samples, settings={"decode": True}).save(folder)


def connections(rate: float, image_bytes: int, latency: float, bandwidth: float) -> int:
    """The requests that must be in flight (Little's law): their number per second times the seconds of one."""
    return math.ceil(rate * image_bytes / PIECE * (latency + PIECE / bandwidth))


def serve(folder: Path, latency: float, bandwidth: float, pipe: Connection) -> None:
    """Serves the folder; sends the URL, then for every message the counts since the last one."""
    with RangeServer(folder) as server:
        server.latency, server.bandwidth = latency, bandwidth
        pipe.send(server.url)
        cpu = time.process_time()
        with contextlib.suppress(EOFError):
            while pipe.recv():
                counts = {"requests": server.counts["GET"], "most_at_once": server.most_at_once}
                counts |= {"sent_mb": server.bytes_sent / 1e6, "server_cpu_s": time.process_time() - cpu}
                pipe.send(counts)
                cpu, server.most_at_once, server.bytes_sent = time.process_time(), 0, 0
                server.counts.clear()


def config_of(case: Case) -> Config:
    """A run's config; the part that a loader reads."""
    return from_settings(
        {
            "data": {
                "path": case.path,
                "order": case.order,
                "cache": case.cache,
                "connections": case.connections,
                "resident": "never",
            },
            "augment": {
                "size": case.size,
                "view1": ViewConfig(blur=1.0, solarize=0.0),
                "view2": ViewConfig(blur=0.1, solarize=0.2),
            },
            "train": {"batch_size": case.batch_size, "epochs": 1},
            "run": {"out": ""},
            "model": {},
            "optimizer": {"base_lr": 0, "warmup_epochs": 0, "weight_decay": 0, "base_tau": 1},
        }
    )


def run_case(case: Case) -> dict[str, Any]:
    """Feeds the step for `seconds`; images/s, the share of the time that it waited, and the CPU time of an image."""
    config = config_of(case)
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    with Loader(config, open_source(case.local), backend) as loader:
        next(iter(loader))  # compiles the views' kernels
    source = open_source(case.path, config.data)
    step, marks = (case.batch_size / case.rate if case.rate else 0.0), []
    with Loader(config, source, backend) as loader:
        began, images = time.perf_counter(), 0
        for _ in loader:
            now = time.perf_counter() - began
            if not marks and now >= case.settle:
                marks.append((now, images, loader.waited, time.process_time()))
            if now >= case.seconds and images > marks[0][1]:  # a slow machine needs longer
                break
            images += case.batch_size
            time.sleep(step)
        end = now, images, loader.waited, time.process_time()
    seconds, count, waited, cpu = (b - a for a, b in zip(marks[0], end, strict=True))
    return {
        "images": images,
        "images_per_s": images / now,
        "wait": loader.waited / now,
        "settled": {
            "seconds": seconds,
            "images_per_s": count / seconds,
            "wait": waited / seconds,
            "cpu_ms": 1000 * cpu / max(count, 1),
        },
    }


def measure(case: Case, pipe: Connection | None = None) -> dict[str, Any]:
    """Runs a case in a fresh process and with an empty cache; adds what the server counted."""
    shutil.rmtree(case.cache, ignore_errors=True)
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        row = {"case": case.name, "order": case.order} | pool.submit(run_case, case).result()
    shutil.rmtree(case.cache, ignore_errors=True)
    if pipe and case.path.startswith("http"):
        pipe.send(True)
        row |= {"connections": case.connections} | pipe.recv()
    return row


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures and prints all cases; returns the document for --json."""
    data, image_bytes = folder / "data", 3 * args.pixels**2
    data.mkdir()
    window = max(order.window(mode, args.batch_size) for mode in args.orders)
    write_data(data, max(2 * window, int(1.5 * args.rate * args.seconds)), args.pixels)
    computed = connections(args.rate, image_bytes, args.latency / 1000, args.bandwidth * 1e6)
    base = Case(
        "local", str(data), str(data), args.orders[0], computed, str(folder / "cache"), args.batch_size, args.size,
        args.rate, args.local_seconds, args.local_seconds / 4,
    )  # fmt: skip
    load = os.getloadavg()[0]
    hardware = provenance.hardware(torch.device("cpu"))
    say(
        f"{hardware}, load {load:.1f}; step {args.rate:g} images/s of {image_bytes / 1e3:,.0f} kB "
        f"({args.rate * image_bytes / 1e6:.0f} MB/s); {args.latency:g} ms a request, {args.bandwidth:g} MB/s a "
        f"connection: {computed} computed"
    )
    free = measure(replace(base, name="local, no step", rate=0.0))
    say(f"local loader without a step: {free['settled']['images_per_s']:,.0f} images/s")
    say(f"{'order':6} {'case':20} {'images/s':>8} {'of local':>8} {'wait':>7} {'CPU ms':>7} {'at once':>7}")
    ours, theirs = SPAWN.Pipe()
    server = SPAWN.Process(
        target=serve, args=(data, args.latency / 1000, args.bandwidth * 1e6, theirs), daemon=True
    )
    server.start()
    rows, url = [], ours.recv()
    for mode in args.orders:
        local = replace(base, order=mode)
        remote = replace(local, path=url, seconds=args.seconds, settle=args.settle)
        cases = [local]
        for factor in (1, 2):
            number = factor * computed
            cases.append(replace(remote, name=f"remote, {number} connections", connections=number))
        reference = 0.0
        for case in cases:
            row = measure(case, ours)
            settled = row["settled"]
            reference = reference or settled["images_per_s"]
            row["share_of_local"] = settled["images_per_s"] / reference
            rows.append(row)
            say(
                f"{mode:6} {case.name:20} {settled['images_per_s']:8,.0f} {row['share_of_local']:8.1%} "
                f"{settled['wait']:7.2%} {settled['cpu_ms']:7.2f} {row.get('most_at_once', ''):>7}"
            )
    ours.close()
    server.join(5)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": hardware,
        "load": [load, os.getloadavg()[0]],
        "versions": provenance.versions(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "folder")},
        "image_bytes": image_bytes,
        "computed_connections": computed,
        "local_without_step": free["settled"],
        "case": asdict(base) | {"path": "", "local": "", "cache": ""},
        "results": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option("--seconds", type=float, default=70, help="of each remote case (default 70)")
    option("--settle", type=float, default=60, help="seconds of them before the numbers begin (default 60)")
    option("--local-seconds", type=float, default=10, help="of each local case (default 10)")
    option("--rate", type=float, default=500, help="images/s of the step (default 500)")
    option("--batch-size", type=int, default=16, help="images of a step; order lanes has as many lanes (16)")
    option("--pixels", type=int, default=256, help="side of an image (default 256: 197 kB)")
    option("--size", type=int, default=32, help="side of a view (default 32)")
    option("--latency", type=float, default=30, help="ms before each response (default 30)")
    option("--bandwidth", type=float, default=70, help="MB/s of a connection (default 70)")
    option("--orders", nargs="+", choices=("block", "lanes"), default=["block", "lanes"])
    option("--folder", type=Path, help="where the data and the cache go (default: the temporary folder)")
    option("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="remote-", dir=args.folder) as folder:
        report = run(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
