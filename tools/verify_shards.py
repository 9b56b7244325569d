"""Reads a whole data set and lists everything in it that differs from its manifest.

    python tools/verify_shards.py DATASET [--no-decode]
    python tools/verify_shards.py a.beton,b.beton --index

DATASET is a folder with a manifest, or .beton files separated by commas (and "?image=FIELD&label=FIELD"). A .beton is
compared with the manifest beside it; without one, as ffcv writes it, its structure and every image are checked, and
--index writes the checksum of each image to FILE.index, with which the loader compares every image that it reads.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import os
import sys
import time
from concurrent import futures

from byolt.files.console import Parser, count, say, shown
from byolt.pipelines.convert.verify import verify


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 there are problems, 2 the data set cannot be opened, 130 interrupted."""
    parser = Parser(prog="verify_shards", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("dataset", help="folder with manifest.json, or .beton files separated by commas")
    add("--no-decode", action="store_true", help="check hashes and headers only")
    add("--index", action="store_true", help="write FILE.index for .beton files without manifest")
    add("--limit", type=int, default=20, help="number of problems to print (default 20)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (default: one per CPU)")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.limit < 1:
        parser.error("--workers and --limit must be at least 1")
    if args.index and args.no_decode:
        parser.error("--index is only for images that were decoded: leave --no-decode out")
    start = time.perf_counter()
    try:
        found = verify(args.dataset, not args.no_decode, args.workers, args.index)
    except (ValueError, OSError, futures.BrokenExecutor) as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    samples, problems, unlisted, indexes = found
    if unlisted:
        _say(f"note: not part of the data set, so that nothing reads it: {shown(unlisted)}")
    for problem in problems[: args.limit]:
        say(problem, file=sys.stderr)
    if problems:
        return _say(f"{args.dataset}: {count(len(problems), 'problem')} in {count(samples, 'sample')}", 1)
    seconds = time.perf_counter() - start
    how = f"{'not ' * args.no_decode}decoded, {seconds:.1f} s, {samples / seconds:,.0f} images/s"
    say(f"{args.dataset}: {count(samples, 'sample')} {'is' if samples == 1 else 'are'} whole ({how})")
    for path in indexes:
        say(f"{path}: the checksum of each image")
    return 0


def _say(text: str, code: int = 0) -> int:
    say(f"verify_shards: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
