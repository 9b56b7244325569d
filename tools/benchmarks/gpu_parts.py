"""Parts of `tools/gpu_report.py`: each runs in a process of its own and yields a row as soon as it has one."""

import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from byolt.configs import schema
from byolt.files.console import say
from byolt.files.rows import read_rows
from byolt.model import distributed
from byolt.model.kernels import norm
from byolt.model.step import make_step
from byolt.pipelines.backends import make_backend
from byolt.pipelines.sources import open_source
from byolt.tools.benchmarks.stages import Clock
from byolt.tools.benchmarks.together import choose_precision, measure_together, stall
from byolt.tools.benchmarks.traffic import copy_bandwidth, counted

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.backbone=resnet8 model.projector_hidden=64 model.projector_size=32 model.predictor_hidden=64 "
    "augment.size=32 train.batch_size=8 data.threads=1 run.log_every=1 train.stop_at_step=4"
)


class Row(NamedTuple):
    """One figure, or without a value why there is none."""

    value: float | None
    unit: str
    note: str = ""


class Job(NamedTuple):
    """The command line's request to every part, and this part's limit in seconds."""

    device: str  # "cuda" or "cpu"
    quick: bool  # TINY
    data: str  # data.path where the images are large
    seconds: float

    def config(self, name: str, settings: str) -> tuple[Path, list[str]]:
        """A file of configs/ and its overrides."""
        data = self.data if name == "throughput" else "synthetic:20000:32x32"
        shared = f"data.path={data} train.device={self.device} eval.path=null"
        return ROOT / "configs" / f"{name}.yaml", f"{shared} {settings} {TINY * self.quick}".split()


class Part(NamedTuple):
    """`run` takes a job and the arguments, for `seconds` at most."""

    name: str
    run: Callable[..., Iterator[Row]]
    arguments: tuple[str, ...] = ()
    seconds: float = 45


def step(job: Job, settings: str, fused: str = "fused") -> Iterator[Row]:
    """The step alone, on noise: speed, the host's share, memory, and its bytes beside the speed of copying."""
    config = schema.load(*job.config("throughput", settings))
    world = distributed.init(job.device)
    device, precision, dtype = world.device, *choose_precision(config, world)
    if not fused:
        norm.FUSED_DEVICES.clear()
    bandwidth = copy_bandwidth(device, 2**23 if job.quick else 2**29)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_step = make_step(config, world, precision)
    batch, size = config.train.batch_size, config.augment.size
    noise = (torch.randn(batch, 3, size, size, device=device).to(dtype) for _ in range(2))
    view1, view2 = (view.to(memory_format=torch.channels_last) for view in noise)

    def timed(steps: int) -> tuple[float, float]:
        """Seconds a step, and seconds until the host has launched one."""
        clock = Clock(device)
        with clock.measure(batch):
            begun = time.perf_counter()
            for _ in range(steps):
                train_step([(view1, view2)], lr=0.0, tau=config.optimizer.base_tau)
            host = time.perf_counter() - begun
        return clock.wall / steps, host / steps

    timed(1)  # compiles and allocates
    with counted() as sizes:
        timed(1)
    single = [timed(1) for _ in range(9)][4:]  # by then a CUDA graph is captured
    whole, host = (statistics.median(times) for times in zip(*single, strict=True))
    seconds, _ = timed(max(3, min(100, int(2 / whole))))
    yield Row(batch / seconds, "images/s", f"{config.model.backbone}, {size} px, batch {batch}, {precision}")
    yield Row(1000 * host, "host ms a step", "until the call returns, on an idle device")
    if device.type == "cuda":
        yield Row(torch.cuda.max_memory_allocated() / 2**30, "GiB at most", "memory of tensors")
    moved, share = sum(sizes), 100 * sum(sizes) / bandwidth / seconds
    yield Row(moved / 1e9, "GB moved a step", "tensors of all operations and Triton kernels")
    yield Row(share, "% of the step", f"to copy as many bytes, at {bandwidth / 1e9:,.0f} GB/s")


def fed(job: Job, settings: str = "") -> Iterator[Row]:
    """Loader, step, and the step fed by the loader, in turns."""
    config = schema.load(*job.config("throughput", f"data.backend=dali {settings}"))
    world = distributed.init(job.device)
    make_backend(config, world.device, torch.float32)  # raises now if DALI is missing
    source, batches = open_source(config.data.path), 2 if job.quick else 10
    costs = measure_together(config, source, world, batches, torchvision=False)
    for name, cost in costs.items():
        yield Row(cost.images_per_s, "images/s", f"{name}: {cost.cpu_ms:.2f} CPU ms an image")
    yield Row(100 * stall(costs), "% stall", "1 - both / slower of the two")


def trained(job: Job, name: str, settings: str) -> Iterator[Row]:
    """train.py, interrupted if it is slow; medians of the later half of its rows."""
    file, overrides = job.config(name, settings)
    with tempfile.TemporaryDirectory() as out:
        command = [str(ROOT / "train.py"), "--config", str(file), *overrides, f"run.out={out}"]
        said = _python(command, 0.6 * job.seconds)
        rows = read_rows(Path(out, "metrics.jsonl"))
    if len(rows) < 2:
        raise RuntimeError(f"train.py: {said[-1]}")
    for key, unit in (("images_per_second", "images/s"), ("data_wait_percent", "% waiting for data")):
        yield Row(statistics.median(row[key] for row in rows[len(rows) // 2 :]), unit, f"{len(rows)} rows")


def tests(job: Job) -> Iterator[Row]:
    """The tests marked gpu."""
    if not (ROOT / "tests").is_dir() or not importlib.util.find_spec("pytest"):
        raise RuntimeError("needs the repository's tests, and pytest: pip install -e '.[test]'")
    command = ["-m", "pytest", "-m", "gpu", "-v", "-rN", str(ROOT / "tests" / ("test_graph.py" * job.quick))]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(1 if job.quick else min(8, len(os.sched_getaffinity(0))))]
    said = _python(command, job.seconds - 15)
    outcomes: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for line in said:
        if (outcome := re.search("|".join(outcomes), line)) and (test := re.search(r"\w+\.py::\S+", line)):
            outcomes[outcome[0]].append(test[0])
    if not any(outcomes.values()):
        raise RuntimeError(f"pytest: {said[-1]}")
    wrong = outcomes["FAILED"] + outcomes["ERROR"]
    yield Row(
        len(outcomes["PASSED"]), "passed", f"{len(outcomes['SKIPPED'])} skipped; {said[-1].strip(' =')}"
    )
    yield Row(len(wrong), "failed", ", ".join(wrong[:4]))


def _python(arguments: list[str], seconds: float) -> list[str]:
    """The lines that Python says; after these seconds it is interrupted, as by Ctrl-C."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = ["timeout", "--foreground", "--signal=INT", "--kill-after=12", f"{max(1, seconds):.0f}"]
    command += ["env", "PYTHONUNBUFFERED=1", f"PYTHONPATH={path}", sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    say(done.stdout)
    return done.stdout.splitlines() or [f"exit code {done.returncode}"]


FOREACH, TRITON = "optimizer.backend=foreach", "optimizer.backend=triton train.cuda_graph=false"
GRAPH = "optimizer.backend=triton train.cuda_graph=true"
SMALL = "ResNet-18, 32 px, train.py"
PARTS = (
    Part("step, torch's batch norm", step, (FOREACH, "")),
    Part("step, foreach", step, (FOREACH,)),
    Part("step, triton", step, (TRITON,)),
    Part("step, CUDA graph", step, (GRAPH,)),
    Part("loader and step", fed, (), 60),
    Part(SMALL, trained, ("r18_cifar10", "train.stop_at_step=600")),
    Part("tests marked gpu", tests, (), 100),
    Part("loader and step, CUDA graph", fed, (GRAPH,), 60),
    Part(f"{SMALL}, CUDA graph", trained, ("r18_cifar10", f"train.stop_at_step=600 {GRAPH}")),
    Part("ResNet-50, train.py", trained, ("throughput", "data.backend=dali train.stop_at_step=60")),
)
