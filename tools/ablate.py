"""Trains the paper's ablations with one recipe, or a list of one's own, and compares the results.

    python tools/ablate.py --config configs/r18_cifar10.yaml --out runs/ablation --only baseline tau_0 --seeds 0 1
    python tools/ablate.py --config r18_cifar10 --out runs/list --list configs/lists/r18_cifar10.yaml --minutes 60

Each ablation is a run of train.py in OUT/NAME-SEED with some settings changed; one process makes all runs, one after
the other. To continue after a stop or a time limit, start the same command again. The table and the curves go to
OUT/ablation.json, .md and .png; they show all finished runs of this recipe in OUT, including those of earlier commands.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import gc
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from byolt.configs import schema
from byolt.configs.command_line import SettingsParser, world_size
from byolt.files import stop
from byolt.files.console import say
from byolt.files.paths import home_path
from byolt.files.rows import read_metrics
from byolt.tools.ablation.recipes import ABLATIONS, Request, fitting, read_list
from byolt.tools.ablation.results import Rows, finished_runs, save_results

Runs = dict[tuple[str, int], tuple[Path, list[str]]]  # by ablation and seed: run.out, all overrides
OUT_OF_TIME = 3  # exit code
_MOST_MINUTES = 366 * 24 * 60


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code.

    0 done, 2 invalid request, 3 the time limit is over and runs are left, 130 interrupted, otherwise that of the run
    that failed.
    """
    args = make_parser().parse_intermixed_args(argv)
    common = [*args.overrides, *(word for word in args.only if "=" in word)]
    names = [word for word in args.only if "=" not in word]
    try:
        if args.minutes is not None and not 0 < args.minutes <= _MOST_MINUTES:
            raise ValueError(f"--minutes {args.minutes:g} must be above 0 and at most {_MOST_MINUTES:,}")
        ablations = read_list(args.list) if args.list else ABLATIONS
        world_size()  # refuses tasks that cannot be ranks once, not in each run
        recipe = schema.load(args.config, common)
        _check_several(recipe)
        request = Request(args.config, common, args.out, recipe.train.batch_size, ablations)
        names = names or fitting(request.batch_size, ablations)
        if not names:
            raise ValueError(
                f"--list {args.list}: its batches do not divide the recipe's of {request.batch_size}"
            )
        runs = plan(request, names, args.seeds or [recipe.run.seed])
    except (ValueError, OSError) as error:
        say(f"ablate: {error}", file=sys.stderr)
        return 2
    done, code = {}, 0
    finished, _ = finished_runs(request)
    with deadline(args.minutes) as is_over:
        for (name, seed), (out, settings) in runs.items():
            if (name, seed) not in finished:
                if is_over():
                    code = OUT_OF_TIME
                    break
                say(f"── {name}, seed {seed}: {' '.join(settings[len(common) :])}")
                code = train(["--config", args.config, "--resume", "auto", *settings])
                if code == 128 + signal.SIGUSR1 and is_over():
                    code = OUT_OF_TIME
                if code:
                    break
            done[name, seed] = out
    if code not in (0, OUT_OF_TIME):
        interrupted = code == 128 + signal.SIGINT
        what = "interrupted" if interrupted else f"{name} ended with code {code}"
        remedy = "; the same command continues" * (code == 1 or code >= 128)  # 2: it would be refused again
        say(f"ablate: {what}{remedy}", file=sys.stderr)
        return code
    report(request, done)
    if code:
        left = f"{len(runs) - len(done)} of {len(runs)} runs are left"
        say(f"ablate: {args.minutes:g} minutes are over, {left}; the same command continues", file=sys.stderr)
    return code


def make_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="the recipe; see configs/")
    add("--out", type=home_path, required=True, help="folder of all runs")
    add("--list", type=home_path, metavar="FILE",
        help="YAML of NAME: [section.key=value, ...] instead of the paper's ablations; see configs/lists")  # fmt: skip
    names = f"ablations to run: {', '.join(ABLATIONS)}, or names in FILE (default: all that fit the batch)"
    add("--only", nargs="+", default=[], metavar="NAME", help=names)
    add("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each (default: the recipe's seed)")
    add("--minutes", type=float, help="time limit of this command; the run that it stops saves a checkpoint")
    add("overrides", nargs="*", metavar="section.key=value", help="settings for all runs")
    return parser


def plan(request: Request, names: list[str], seeds: list[int]) -> Runs:
    """All runs of the command: all ablations with the first seed, then with the next.

    Raises:
        ValueError: an ablation or its settings are invalid.
    """
    runs: Runs = {}
    for seed, name in itertools.product(seeds, names):
        out = request.out / f"{name}-{seed}"
        settings = [*request.settings(name, seed), f"run.out={out}"]
        try:
            _check_several(schema.load(request.config, settings))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        runs[name, seed] = (out, settings)
    return runs


def _check_several(config: schema.Config) -> None:
    """Refuses settings that only a single run may have."""
    if config.undecided:
        raise ValueError(f"{', '.join(config.undecided)}: auto is for single runs: set values")
    if config.run.mirror:
        raise ValueError(f"run.mirror={config.run.mirror}: all runs would share it: remove it")


@contextmanager
def deadline(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Sends this process SIGUSR1 after some minutes, on which train.py saves and ends; yields whether they are over.

    The signal is repeated every five seconds, because a run that is just starting does not yet listen.
    """
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.getsignal(signal.SIGALRM)
    if minutes:
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGUSR1))
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 5)
    try:
        yield lambda: time.monotonic() >= end
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[1])
        signal.signal(signal.SIGUSR1, before[0])


def train(arguments: list[str]) -> int:
    """Runs train.py's `main` in this process; returns its exit code, 128 + N after signal N, on which it has saved."""
    import torch  # not before the request is checked

    from byolt.train import main as run

    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        return run(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()  # of the finished run: threads, decoded images, memory of the GPU
        torch.cuda.empty_cache()


def report(request: Request, done: dict[tuple[str, int], Path]) -> None:
    """Prints and writes the results of this command's finished runs and of earlier ones."""
    same, others = finished_runs(request)
    same |= done
    curves: dict[str, list[Rows]] = {}
    seeds: dict[str, list[int]] = {}
    for name, seed in sorted(same, key=lambda key: (list(request.ablations).index(key[0]), key[1])):
        curves.setdefault(name, []).append(read_metrics(same[name, seed] / "metrics.jsonl"))
        seeds.setdefault(name, []).append(seed)
    if curves:
        save_results(request, seeds, curves)
    if left_out := sorted(set(others) - {out.name for out in done.values()}):
        say(f"not in the table, because their settings differ: {', '.join(left_out)}")


if __name__ == "__main__":
    sys.exit(main())
