"""CPU time and images/s of several data pipelines on the same JPEGs, each turn in a fresh process, one after the other.

    python benchmarks/peers/measure.py IMAGES --peers mocov3 lightly wds-pil
    python benchmarks/peers/measure.py IMAGES --peers mocov3 mine --extra mine=my_loader.py:make

An image is both of its views. CPU ms are those of the process and of all its workers; they hardly move when something
else runs on the machine, images/s do. Turns are interleaved, so that a slow minute of the machine meets all pipelines
alike; the median of the turns is shown. tools/bench.py --peers adds byolt's own loader.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import PEERS, Job

JPEG = {".jpg", ".jpeg"}


def lay_out(images: Path, folder: Path, most: int) -> tuple[Path, Path]:
    """Links all JPEGs below `images`, at most `most`, into class folders, and writes the same into one tar.

    Raises:
        ValueError: there is no JPEG.
    """
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in JPEG)[:most]
    if not files:
        raise ValueError(f"{images} holds no .jpg or .jpeg")
    classes, shard = folder / "classes", folder / "images.tar"
    with tarfile.open(shard, "w") as tar:
        for number, path in enumerate(files):
            link = classes / str(number % 10) / f"{number:07d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
            tar.add(path.resolve(), f"{number:07d}.jpg")
    return classes, shard


def session_seconds() -> float:
    """CPU seconds of all processes of this session: a turn is a session of its own."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == os.getsid(0):
            ticks += sum(map(int, fields[11:15]))  # user, system, and those of children waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def run_turn(function: str, job: Job, warmup: int, batches: int) -> dict[str, float]:
    """Builds one pipeline in this process and times it."""
    if function in PEERS:
        make = PEERS[function]
    else:
        path, _, name = function.rpartition(":")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        make = getattr(module, name)
    views = make(job)
    for _ in range(warmup):
        next(views)
    cpu, start = session_seconds(), time.perf_counter()
    for _ in range(batches):
        first, second = next(views)
        expected = (job.batch_size, 3, job.size, job.size)
        if not tuple(first.shape) == tuple(second.shape) == expected:
            raise ValueError(f"views of shape {tuple(first.shape)}, {tuple(second.shape)}, not {expected}")
    wall, images = time.perf_counter() - start, batches * job.batch_size
    return {"cpu_ms": 1000 * (session_seconds() - cpu) / images, "images_per_s": images / wall}


def child(words: list[str]) -> None:
    """Entry of a turn's process: prints the result as one JSON line, and ends without waiting for workers."""
    function, job, warmup, batches = json.loads(words[0])
    out = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not mix with the result
    try:
        result: dict[str, Any] = dict(run_turn(function, Job(**job), warmup, batches))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[-1]}"[:300]}
    os.write(out, json.dumps(result).encode())
    os._exit(0)


def start_turn(function: str, job: Job, warmup: int, batches: int, timeout: float) -> dict[str, Any]:
    """One turn in a process and session of its own, whose workers end with it."""
    arguments = json.dumps([function, asdict(job), warmup, batches])
    command = [sys.executable, __file__, "--turn", arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
        return json.loads(output) if output else {"error": f"its process ended with {process.returncode}"}
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:g} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarize(turns: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a pipeline: the median of its turns, or its first error."""
    rows: list[dict[str, Any]] = []
    for peer, results in turns.items():
        errors = [result["error"] for result in results if "error" in result]
        keys = () if errors else ("cpu_ms", "images_per_s")
        medians = {key: statistics.median(result[key] for result in results) for key in keys}
        rows.append({"peer": peer, **({"error": errors[0]} if errors else medians)})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 2 a mistake in the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder with JPEGs, at any depth")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help=f"of {', '.join(PEERS)}; default: all")
    parser.add_argument(
        "--extra", nargs="+", default=[], metavar="NAME=FILE.py:FUNCTION", help="pipelines of your own"
    )
    parser.add_argument("--solo-learn", default="", metavar="CHECKOUT", help="a clone of solo-learn")
    parser.add_argument("--batches", type=int, default=6, help="timed batches of a turn (default 6)")
    parser.add_argument("--warmup", type=int, default=6, help="batches before them (default 6)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each pipeline (default 3)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a batch (default 64)")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels (default 224)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads (default 2)")
    parser.add_argument("--most", type=int, default=2000, help="images taken from the folder (default 2000)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a turn (default 600)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows there too")
    args = parser.parse_args(argv)
    functions = {name: name for name in PEERS if name != "solo-learn" or args.solo_learn}
    for spec in args.extra:
        name, _, function = spec.partition("=")
        functions[name] = str(Path(function.rpartition(":")[0]).resolve()) + ":" + function.rpartition(":")[2]
    if unknown := set(args.peers or []) - functions.keys() - PEERS.keys():
        parser.error(f"--peers {' '.join(sorted(unknown))}: choose from {', '.join(functions)}")
    peers = args.peers or list(functions)
    turns: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            classes, shard = lay_out(args.images, Path(scratch), args.most)
        except ValueError as error:
            parser.error(str(error))
        solo = args.solo_learn and str(Path(args.solo_learn).resolve())
        job = Job(str(classes), str(shard), args.batch_size, args.size, args.workers, solo)
        for turn in range(args.repeats):
            for peer in peers:
                function = functions.get(peer, peer)
                result = start_turn(function, job, args.warmup, args.batches, args.timeout)
                turns[peer].append(result)
                print(f"turn {turn + 1} of {args.repeats}, {peer}: {result}", file=sys.stderr, flush=True)
    rows = summarize(turns)
    print(f"{'pipeline':14} {'CPU ms':>8} {'images/s':>9}   an image, both views")
    for row in rows:
        print(f"{row['peer']:14}", row.get("error") or "{cpu_ms:>8.2f} {images_per_s:>9.0f}".format_map(row))
    if args.out:
        args.out.write_text(json.dumps({"peers": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turn"]:
        child(sys.argv[2:])
    sys.exit(main())
