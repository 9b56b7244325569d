"""Trains the paper's ablations with one recipe, and compares their results with the paper's.

    python tools/ablate.py --config configs/r18_cifar10.yaml --out runs/ablation --only baseline tau_0 --seeds 0 1

Each ablation is a run of train.py in OUT/NAME-SEED with one or two settings changed. To continue after a stop,
start the same command again. The table and the curves go to OUT/ablation.json, .md and .png; they show all finished
runs of this recipe in OUT, including those of earlier commands.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from byolt.configs import schema
from byolt.configs.command_line import SettingsParser
from byolt.files.console import say
from byolt.files.paths import home_path
from byolt.files.rows import read_metrics
from byolt.tools.ablation.recipes import ABLATIONS, fitting, overrides_of
from byolt.tools.ablation.results import Rows, finished_runs, save_results

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
Runs = dict[tuple[str, int], tuple[Path, list[str]]]  # by ablation and seed: run.out, overrides


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 invalid request, 130 interrupted, otherwise that of the run that failed."""
    parser = SettingsParser(
        prog="ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the recipe; see configs/")
    parser.add_argument("--out", type=home_path, required=True, help="folder of all runs")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"ablations to run: {', '.join(ABLATIONS)} (default: all that fit the batch size)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="one run for each (default: the recipe's seed)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args(argv)
    common = [*args.overrides, *(word for word in args.only if "=" in word)]
    names = [word for word in args.only if "=" not in word]
    try:
        recipe = schema.load(args.config, common)
        batch_size = recipe.train.batch_size
        runs = plan(args, common, names or fitting(batch_size), args.seeds or [recipe.run.seed], batch_size)
    except (ValueError, OSError) as error:
        say(f"ablate: {error}", file=sys.stderr)
        return 2
    try:
        finished, _ = finished_runs(args.config, common, args.out, batch_size)
        for (name, seed), (_, overrides) in runs.items():
            if (name, seed) in finished:
                continue
            say(f"── {name}, seed {seed}: {' '.join(overrides)}")
            code = train(["--config", args.config, "--resume", "auto", *common, *overrides])
            if code:
                say(f"ablate: {name} ended with code {code}; the same command continues", file=sys.stderr)
                return code
        report(args, common, runs, batch_size)
    except KeyboardInterrupt:
        say("ablate: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def plan(
    args: argparse.Namespace, common: list[str], names: list[str], seeds: list[int], batch_size: int
) -> Runs:
    """All runs of the command.

    Raises:
        ValueError: an ablation or its settings are invalid.
    """
    runs: Runs = {}
    for name, seed in itertools.product(names, seeds):
        out = args.out / f"{name}-{seed}"
        overrides = [*overrides_of(name, batch_size), f"run.seed={seed}", f"run.out={out}"]
        schema.load(args.config, [*common, *overrides])
        runs[name, seed] = (out, overrides)
    return runs


def train(arguments: list[str]) -> int:
    """Runs train.py; returns its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C, after train.py has saved and ended.
    """
    process = subprocess.Popen([sys.executable, str(TRAIN), *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Usually the terminal has sent SIGINT to train.py, too. A second SIGINT would end it before it has saved;
        # SIGTERM does not.
        process.terminate()
        process.wait()
        raise


def report(args: argparse.Namespace, common: list[str], runs: Runs, batch_size: int) -> None:
    """Prints and writes the results of this command's runs and of earlier ones."""
    same, others = finished_runs(args.config, common, args.out, batch_size)
    same |= {key: out for key, (out, _) in runs.items()}
    curves: dict[str, list[Rows]] = {}
    seeds: dict[str, list[int]] = {}
    for name, seed in sorted(same, key=lambda key: (list(ABLATIONS).index(key[0]), key[1])):
        curves.setdefault(name, []).append(read_metrics(same[name, seed] / "metrics.jsonl"))
        seeds.setdefault(name, []).append(seed)
    save_results(args.out, curves, {"config": args.config, "overrides": common, "seeds": seeds})
    if left_out := sorted(set(others) - {out.name for out, _ in runs.values()}):
        say(f"not in the table, because their settings differ: {', '.join(left_out)}")


if __name__ == "__main__":
    sys.exit(main())
