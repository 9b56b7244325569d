"""2,000 steps of a tiny run, watched from outside: memory, file descriptors and threads must stay flat.

python tests/soak.py [--steps 2000] [--backend dali] [--to benchmarks/cpu]

The run reads shards, takes checkpoints every two seconds, measures kNN every 200 steps and writes a row every 10; it is
killed (-9) half-way and goes on. Writes soak.json and soak.png; exit code 1 where something grew.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from whole_runs import ROOT, Run, write_images

from byolt.tools.make_shards import main as make_shards
from byolt.tools.reporting.figures import MARKS

Row = dict[str, float]
WHAT = {"memory_mb": "resident memory (MB)", "descriptors": "file descriptors", "threads": "threads"}
SETTLED = 200  # steps after a start until which pools and caches fill
MAY_GROW = {
    "memory_mb": 0.05,
    "descriptors": 0.0,
    "threads": 0.0,
}  # from the first to the last quarter after that


def look(pid: int, step: int, life: int) -> Row:
    """What the kernel says about a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "step": step,
        "life": life,
        "memory_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def watch(command: list[str], life: int, kill_at: int) -> list[Row]:
    """Starts a run and looks at it whenever it shows a row; kills it at step `kill_at`, if that is not 0."""
    rows: list[Row] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step ") and "/" in line.split()[1]:
                rows.append(look(process.pid, int(line.split()[1].split("/")[0]), life))
                if kill_at and rows[-1]["step"] >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
            elif line.startswith(("error", "warning", "Traceback")):
                print(line, end="", file=sys.stderr)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run ended with {process.returncode}")
    return rows


def growth(rows: list[Row], name: str) -> float:
    """Relative difference of the means of the last and the first quarter of a life, its start left out."""
    settled = [row[name] for row in rows if row["step"] >= rows[0]["step"] + SETTLED]
    quarter = max(1, len(settled) // 4)
    first, last = settled[:quarter], settled[-quarter:]
    return sum(last) / len(last) / (sum(first) / len(first)) - 1


def draw(lives: list[list[Row]], path: Path) -> None:
    """A picture of each quantity over the steps, one color and marker for each life."""
    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True)
    figure.suptitle("A run that is killed half-way and resumed, seen by the kernel")
    for axis, (name, label) in zip(axes, WHAT.items(), strict=True):
        for life, mark, when in zip(lives, MARKS, ("until it is killed", "resumed"), strict=False):
            steps, values = [row["step"] for row in life], [row[name] for row in life]
            every = max(1, len(life) // 10)
            axis.plot(steps, values, color=mark.color, marker=mark.marker, markevery=every, label=when)
        axis.set(ylabel=label)
        axis.set_ylim(0, 1.15 * max(row[name] for life in lives for row in life))
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", default="dali", choices=("dali", "torch"))
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "cpu")
    args = parser.parse_args()
    # two threads that wait for each other crawl on a busy machine
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", 64)
        for split in ("train", "val"):
            make_shards([str(folder / "images"), str(folder / split), "--workers", "1"])
        run = Run(folder, folder / "train")
        command = [sys.executable, *run.arguments("--resume", "auto")]
        command += [f"data.backend={args.backend}", "data.resident=never", "run.log_every=10"]
        command += ["run.checkpoint_minutes=0.033", f"train.epochs={args.steps / 8}", "optimizer.base_lr=0.1"]
        command += [f"eval.path={folder / 'val'}", "eval.every_epochs=25", "eval.k=5"]
        rows = watch(command, 0, args.steps // 2)
        rows += watch(command, 1, 0)
    lives = [[row for row in rows if row["life"] == life] for life in (0, 1)]
    grown = {name: [round(growth(life, name), 4) for life in lives] for name in WHAT}
    result = {"command": " ".join(["python", *sys.argv]), "steps": args.steps, "growth": grown, "rows": rows}
    args.to.mkdir(parents=True, exist_ok=True)
    (args.to / "soak.json").write_text(json.dumps(result) + "\n")
    draw(lives, args.to / "soak.png")
    print(json.dumps(grown))
    return int(any(rate > MAY_GROW[name] for name, rates in grown.items() for rate in rates))


if __name__ == "__main__":
    sys.exit(main())
