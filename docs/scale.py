"""Computes the tables of docs/scale.md, which it rewrites in place; --measure measures the index and the orders.

python docs/scale.py
python docs/scale.py --measure 100000000
"""

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from byolt.files.console import say
from byolt.pipelines.formats.index import SAMPLE
from byolt.pipelines.manifest import Manifest, Shard
from byolt.pipelines.order import BLOCK, LANE_WINDOW, LANES, WINDOW, RankOrder, global_batch, lanes

PAGE = Path(__file__).with_name("scale.md")

# A node. An H200 took 1,591 images/s with commit 20cdd17 (benchmarks/h200) and 2,900 with a prototype of the fused
# step: the larger figure counts, because the data must not be the limit.
GPUS, RATE = 8, 2_900
IMAGE = 110e3  # bytes of an ImageNet JPEG
NETWORK = 6.25e9  # bytes/s: 50 Gbit/s
# A store, measured on loopback with 30 ms a request and 70 MB/s a connection; CPU seconds an image with obstore.
LATENCY, CONNECTION = 0.030, 70e6
CPU = {"one image": 0.35e-3, "up to 8 MB": 0.095e-3}
# Mean bytes of a request: a block of 256 images is read in equal parts of at most 8 MB (remote/source.extents).
PART = BLOCK * IMAGE / np.ceil(BLOCK * IMAGE / 8e6)
# S3 Standard in us-east-1, aws.amazon.com/s3/pricing as of 2025, in dollars; 5,500 GET/s are stated for a prefix.
GET, PREFIX = 0.0004 / 1000, 5_500
MONTH = ((50e12, 0.023e-9), (450e12, 0.022e-9), (np.inf, 0.021e-9))  # bytes stored: dollars a byte
OTHER_REGION = 0.02e-9  # a byte; nothing within the region
# By --measure 100000000 on two idle cores of an EPYC 9005: opening in seconds with two threads, orders in CPU seconds.
OPENING, ORDER, FULL, FULL_BYTES = 1.8 / 100e6, 0.06 / 100e6, 23 / 100e6, 32
# A checkpoint of ResNet-50 with momentum, model/run.
CHECKPOINT, CHECKPOINT_CPU = 413e6, 0.6
EPOCHS = 100


def number(x: float) -> str:
    """Three digits, with commas: 20,400 or 0.0461."""
    if x >= 1000:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.3g}"


def table(*rows: tuple[object, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [[number(x) if isinstance(x, int | float) else str(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def orders() -> str:
    """The mixing and the traffic of each order, for ImageNet sorted by class."""
    n, batch, classes = 1_281_167, 4096, 1000
    rows: list[tuple[object, ...]] = [
        ("`data.order`", "shuffled together", "blocks in a batch", "others of its block", "bits of the classes",
         "read by 1 node", "8 nodes", "64 nodes")
    ]  # fmt: skip
    windows = {"full": n, "block": WINDOW * BLOCK, "lanes": lanes(batch) * LANE_WINDOW * BLOCK}
    for mode, window in windows.items():
        epoch = np.stack([global_batch(0, 0, step, n, batch, mode) for step in range(n // batch)])
        blocks, labels = epoch // BLOCK, epoch * classes // n
        counts = [np.unique(row, return_counts=True)[1] for row in blocks]
        of_block = np.mean([(c * (c - 1)).sum() / batch for c in counts])
        shares = [np.unique(row, return_counts=True)[1] / batch for row in labels]
        bits = np.mean([-(share * np.log2(share)).sum() for share in shares])
        total = -(-n // BLOCK)
        traffic = [
            len(np.unique(np.arange(batch) * nodes // batch * total + blocks)) / total for nodes in (1, 8, 64)
        ]
        name = f"`{mode}`"
        mean = float(np.mean([len(c) for c in counts]))
        rows.append(
            (name, f"{window:,}", mean, float(of_block), f"{bits:.2f}", *(f"{x:.2f} x" for x in traffic))
        )
    return table(*rows)


def requests() -> str:
    """The load of training on a store, for each size of a request."""
    rows: list[tuple[object, ...]] = [
        ("nodes", "a request reads", "GB/s", "GET/s", "prefixes", "in flight", "$ an hour", "cores that read")
    ]
    for nodes in (1, 8, 64):
        for what, size in (("one image", IMAGE), ("up to 8 MB", float(PART))):
            images = nodes * GPUS * RATE
            gets = images * IMAGE / size
            flight = gets * (LATENCY + size / CONNECTION)
            row = images * IMAGE / 1e9, gets, int(np.ceil(gets / PREFIX)), flight, gets * 3600 * GET
            rows.append((nodes, what, *row, images * CPU[what]))
    return table(*rows)


def storage(size: float) -> float:
    """Dollars a month."""
    dollars = 0.0
    for tier, price in MONTH:
        dollars += min(size, tier) * price
        size = max(0.0, size - tier)
    return dollars


def run(nodes: int, size: float) -> list[tuple[str, str]]:
    """Name and value of each row for a data set of `size` bytes on these nodes."""
    images, block = size / IMAGE, BLOCK * IMAGE
    of_node = max(1, LANES // nodes)
    kept = 1 - (1 - 1 / nodes) ** EPOCHS  # of the data set, that a node has read after all epochs
    index = images * SAMPLE.itemsize
    first = of_node * (LANE_WINDOW + 1) / 2 * block
    # bytes: two epochs' blocks, and windows
    order = 8 * (4 * images / BLOCK + 4 * LANES * LANE_WINDOW * BLOCK)
    rows = {
        "images": f"{number(images / 1e6)} M",
        "an epoch": f"{number(images / (nodes * GPUS * RATE))} s",
        "GETs of an epoch": f"{number(size / PART)}, {number(size / PART * GET)} $",
        "stored for a month": f"{number(storage(size))} $",
        f"{EPOCHS} epochs from another region": f"{number(EPOCHS * size * OTHER_REGION)} $",
        f"read in {EPOCHS} epochs, nothing kept": f"{number(EPOCHS * size / 1e12)} TB",
        "the same, everything kept": f"{number(nodes * kept * size / 1e12)} TB",
        "disk of a node for that": f"{number(kept * size / 1e12)} TB",
        "`full`: staged on each node": f"{number(size / NETWORK)} s, {number(nodes * size / 1e12)} TB in all",
        "`full`: the order": f"{number(images * FULL)} CPU s, {number(images * FULL_BYTES / 1e9)} GB",
        "`lanes`: the order": f"{number(images * ORDER)} CPU s, {number(order / 1e6)} MB",
        "`lanes`: cache of a node": f"{number(2 * of_node * LANE_WINDOW * block / 1e9)} GB",
        "start: index, fetched": f"{number(index / 1e9)} GB, {number(index / NETWORK)} s",
        "start: index, checked": f"{number(images * OPENING)} s on two threads",
        "start: first batch of a node, `lanes`": f"{number(first / 1e9)} GB, {number(first / NETWORK + LATENCY)} s",
        "index in the memory of a node": f"{number(index / 1e9)} GB",
        "labels, where there are any": f"{number(8 * GPUS * images / 1e9)} GB",
    }
    return list(rows.items())


def runs() -> str:
    """ImageNet, 1.3 TB and 100 TB."""
    cases = {
        "140 GB, 8 nodes": (8, 140e9),
        "1.3 TB, 64 nodes": (64, 1.3e12),
        "100 TB, 64 nodes": (64, 100e12),
    }
    columns = [run(*case) for case in cases.values()]
    rows = [(row[0][0], *(cell for _, cell in row)) for row in zip(*columns, strict=True)]
    return table(("", *cases), *rows)


def checkpoints() -> str:
    """Writing and reading a checkpoint of ResNet-50."""
    rows: list[tuple[object, ...]] = [
        ("disk", "written, hashed meanwhile", "of 15 minutes", "read by 8 ranks", "by 512")
    ]
    for name, speed in (("local NVMe, 3 GB/s", 3e9), ("shared, 1 GB/s", 1e9), ("shared, 10 GB/s", 10e9)):
        wait = max(CHECKPOINT_CPU, CHECKPOINT / speed)
        shared = [ranks * CHECKPOINT / speed for ranks in (8, 512)]
        many = "not shared" if "local" in name else f"{number(shared[1])} s"
        rows.append((name, f"{number(wait)} s", f"{wait / 900:.2%}", f"{number(shared[0])} s", many))
    return table(*rows)


def limits() -> str:
    """Where the design ends."""
    ranks, share = GPUS * 64, GPUS * 64 // LANES
    billion = (
        f"{number(1e9 * OPENING)} s and {number(1e9 * SAMPLE.itemsize / 1e9)} GB of page cache at 1,000 M"
    )
    rows = (
        ("requests of a prefix", f"{int(PREFIX / (GPUS * RATE * IMAGE / PART))} nodes",
         "spread the shards over prefixes; until S3 has split them it answers 503"),
        ("lanes", f"{LANES} ranks",
         f"at {ranks} ranks {share} read each lane: {share} x the traffic, unless they share their node's cache"),
        ("index opened in 2 s", f"{number(2 / OPENING / 1e6)} M images", billion),
        ("open files", f"{number(2**20 * 256e6 / IMAGE / 1e6)} M images with a limit of 1,048,576",
         "local shards of 256 MB are an open file each: make larger ones (--shard-size)"),
        ("order `full`", f"{number(10 / FULL / 1e6)} M images",
         "10 CPU s at the start of each epoch: take `lanes`"),
        ("window of `lanes`", f"{LANES * LANE_WINDOW * BLOCK:,} images",
         "images stored together are seen together: make_shards stores them shuffled, --index leaves them as they are"),
        ("global batch", f"{2 * ranks:,} images on {ranks} ranks",
         f"batch norm needs 2 of each rank; the paper's 4,096 are {4096 // ranks}, the images/s above require 64"),
    )  # fmt: skip
    return table(("limit", "reached at", "beyond it"), *rows)


def fill(page: str) -> str:
    """The page with every table computed anew."""
    for compute in (orders, requests, runs, checkpoints, limits):
        start = f"<!-- {compute.__name__} -->\n"
        before, rest = page.split(start)
        page = before + start + compute() + "\n" + rest[rest.index("<!-- end -->") :]
    return page


def measure(images: int) -> None:
    """Prints what opening an index of synthetic samples costs, then the first batch of an epoch in each order."""
    of_shard, length = 2400, int(IMAGE)
    i = np.arange(images)
    samples = np.zeros(images, SAMPLE)
    samples["shard"], samples["offset"], samples["label"] = i // of_shard, i % of_shard * length, -1
    samples["length"], samples["height"], samples["width"] = length, 375, 500
    counts = np.bincount(samples["shard"]).tolist()
    shards = [Shard(f"{k:06d}.tar", of_shard * length, "", count) for k, count in enumerate(counts)]
    with tempfile.TemporaryDirectory() as folder:
        Manifest(shards, samples).save(folder)
        del i, samples
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            Manifest.load(folder)
            say(f"opened in {time.perf_counter() - wall:.2f} s, {time.process_time() - cpu:.2f} CPU s")
    for mode in ("lanes", "full"):  # block permutes as many blocks as lanes
        tracemalloc.start()
        cpu = time.process_time()
        RankOrder(0, images, 4096, mode, rank=0, world_size=64).batches(0)
        cpu = time.process_time() - cpu
        held, peak = (size / 1e6 for size in tracemalloc.get_traced_memory())
        tracemalloc.stop()
        say(f"{mode}: {cpu:.2f} CPU s, {held:.0f} MB held, {peak:.0f} MB at most")


def main() -> None:
    """Rewrites the tables, or measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--measure", type=int, metavar="IMAGES", help="time an index and the orders of this many images"
    )
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
    else:
        PAGE.write_text(fill(PAGE.read_text()))


if __name__ == "__main__":
    main()
