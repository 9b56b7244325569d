"""Writes a report about a run: settings, curves, pictures, and its features. One HTML file that opens offline.

    python tools/report.py RUN_FOLDER [--data SHARDS] [--images 2000] [--out report.html]

The features are those of --data, else of the run's eval.path, else of its training images. The run need not be finished
and the images need no labels: the report names what is missing.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import sys
from pathlib import Path

from byolt.files.atomic import replacing
from byolt.files.console import say
from byolt.files.paths import home_path
from byolt.pipelines.sources import check_paths, open_source

_OF_RUNS = {".jsonl", ".pt", ".safetensors"}  # endings of what train.py writes


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 invalid request, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=home_path, help="run.out of a run of train.py")
    parser.add_argument("--data", help="images for the features (default: the run's eval.path)")
    parser.add_argument(
        "--images", type=int, default=2000, help="number of images at most, evenly spaced (default 2000)"
    )
    parser.add_argument("--out", type=home_path, help="HTML file (default: RUN_FOLDER/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        if args.images < 2:
            raise ValueError(f"--images {args.images} must be at least 2, which a spectrum needs")
        if not args.run.is_dir():
            raise ValueError(f"{args.run} is not a folder; give the run.out of a run")
        if not any(path.suffix in _OF_RUNS for path in args.run.iterdir()):
            raise ValueError(
                f"{args.run} holds neither metrics.jsonl nor a checkpoint; give the run.out of a run"
            )
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: its folder does not exist; make it first")
        check_paths({"--data": args.data})
        from byolt.tools.reporting.run import read_run  # these import torch, which takes seconds
        from byolt.tools.reporting.sections import render_report

        run = read_run(args.run)
        if out.exists() and not _is_report(out):
            raise ValueError(f"{out} exists and is not a report: remove it, or give another file by --out")
        if args.data:
            open_source(args.data)  # requested data must exist; the run's own may be gone
        html = render_report(run, args.data, args.images)
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
