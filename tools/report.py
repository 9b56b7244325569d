"""Writes a report about a run, or compares runs. One HTML file that opens offline.

    python tools/report.py RUN [--data SHARDS] [--images 2000] [--out report.html]
    python tools/report.py RUN1 RUN2 ... [--out comparison.html]

The report shows settings, accuracies (also those of tools/evaluate.py), curves, pictures, and the features. The
comparison shows the settings that differ, and the curves of all runs together.

The features are those of --data, else of the run's eval.path, else of its training images. The run need not be finished
and the images need no labels: the report names what is missing.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import sys
from itertools import combinations
from pathlib import Path

from byolt.files.atomic import replacing
from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.pipelines.sources import check_paths, open_source

_MOST = 10  # runs of a comparison: each has a color and a marker of its own
_OF_RUNS = {".jsonl", ".pt", ".safetensors"}  # endings of what train.py writes


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 invalid request, 130 interrupted."""
    parser = Parser(prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=home_path, help="run.out of a run of train.py")
    add("--data", help="images for the features (default: the run's eval.path)")
    add("--images", type=int, default=2000, help="number of images at most, evenly spaced (default 2000)")
    add("--out", type=home_path, help="HTML file (default: report.html or comparison.html in the first RUN)")
    args = parser.parse_args(argv)
    several = len(args.runs) > 1
    out = args.out or args.runs[0] / ("comparison.html" if several else "report.html")
    try:
        if args.images < 2:
            raise ValueError(f"--images {args.images} must be at least 2, which a spectrum needs")
        for run in args.runs:
            if not run.is_dir():
                raise ValueError(f"{run} is not a folder; give the run.out of a run")
            if not any(path.suffix in _OF_RUNS for path in run.iterdir()):
                raise ValueError(
                    f"{run} holds neither metrics.jsonl nor a checkpoint; give the run.out of a run"
                )
        if several and args.data:
            raise ValueError("--data is for the report of one run: a comparison shows no features")
        if len(args.runs) > _MOST:
            raise ValueError(f"{len(args.runs)} runs: compare 2 to {_MOST}")
        for run, other in combinations(args.runs, 2):
            if run.resolve() == other.resolve():
                raise ValueError(f"{run} is named twice{f', also as {other}' * (run != other)}")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: its folder does not exist; make it first")
        check_paths({"--data": args.data})
        # These import torch, which takes seconds.
        from byolt.tools.reporting.comparison import render_comparison
        from byolt.tools.reporting.run import read_run
        from byolt.tools.reporting.sections import render_report

        runs = [read_run(folder) for folder in args.runs]
        for found in runs:
            for problem in found.problems:
                say(f"report: warning: {found.folder}: {problem}", file=sys.stderr)
        if out.exists() and not _is_report(out):
            raise ValueError(f"{out} exists and is not a report: remove it, or give another file by --out")
        if args.data:
            open_source(args.data)  # requested data must exist; the run's own may be gone
        html = render_comparison(runs) if several else render_report(runs[0], args.data, args.images)
        with replacing(out.absolute()) as temporary:
            temporary.write_text(html, encoding="utf-8", errors="replace")  # file names need not be UTF-8
        size = out.stat().st_size
    except (ValueError, OSError) as error:
        say(f"report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("report: interrupted, nothing was written", file=sys.stderr)
        return 130
    say(f"{out}: {size / 1e6:.1f} MB")
    return 0


def _is_report(path: Path) -> bool:
    """Whether the file is an earlier report, which may be replaced: a page of ours begins with our name."""
    from byolt.tools.reporting.page import GENERATOR

    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1024)


if __name__ == "__main__":
    sys.exit(main())
