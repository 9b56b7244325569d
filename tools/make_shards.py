"""Makes shards of images: SRC (folder, tar, zip, data set) -> DST (WebDataset tars or .beton files, with a manifest).

    python tools/make_shards.py SRC DST [--format beton] [--split train=.9,val=.1] [--max-size 512] ...
    python tools/make_shards.py --index FOLDER      a manifest for WebDataset tars made elsewhere

DST and FOLDER can be URLs (docs/remote.md).

`pipelines/convert/rules.py` states which input becomes what. DST/quarantine.jsonl lists the files that cannot be used.
A killed conversion continues when it is started again, and its result is the same to the byte.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import os
import sys
from concurrent import futures
from pathlib import Path
from typing import NoReturn

from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.files.storage.retry import RemoteError
from byolt.pipelines.convert.destination import Upload, scratch_of
from byolt.pipelines.convert.from_files import expand_source
from byolt.pipelines.convert.make import index, index_url, make
from byolt.pipelines.convert.plan import SUFFIXES, ConversionOptions, parse_split
from byolt.pipelines.convert.shard_writer import UnusableInputError
from byolt.pipelines.formats.encoded import MAX_PIXELS, MAX_SIDE
from byolt.pipelines.remote.urls import is_remote
from byolt.pipelines.remote.urls import parse as parse_url

_BOUNDS = {
    "raw_fraction": (0, 1), "max_size": (0, MAX_SIDE), "quality": (1, 100), "max_pixels": (1, 2**32),
    "seed": (0, 2**63), "shard_size": (1, 100_000), "workers": (1, 1024),
}  # fmt: skip


class _Arguments(Parser):
    def error(self, message: str) -> NoReturn:
        """A shell that expands tars/*.tar gives more arguments than SRC and DST."""
        if message.startswith("unrecognized") and ".tar" in message:
            message = f"{message[:100]}: write the pattern of tars in quotes"
        super().error(message)


def _destination(text: str) -> Path | str:
    return text if is_remote(text) else home_path(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with 2 and one line if it makes no sense."""
    parser = _Arguments(prog="make_shards", description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option(
        "src",
        type=os.path.expanduser,
        metavar="SRC",
        help="folder (class sub-folders or flat), tar or zip of images; tar or folder of class tars; WebDataset tar or "
        "folder of them; tars of a folder by a quoted pattern ('tars/*.tar', 'tars/{00..09}.tar'); data set; .beton "
        "files separated by commas; with --index: the folder",
    )
    option(
        "dst",
        type=_destination,
        nargs="?",
        metavar="DST",
        help="folder to make, or a URL (s3://bucket/folder)",
    )
    option("--index", action="store_true", help="write a manifest for WebDataset tars made elsewhere")
    option(
        "--manifest",
        type=home_path,
        metavar="FOLDER",
        help="with --index, for read-only tars: write it there",
    )
    option("--format", choices=list(SUFFIXES), default="webdataset", help="default: webdataset")
    option("--raw-fraction", type=float, default=0.0, metavar="P", help="share of raw images in a .beton")
    option("--engine", choices=["own", "ffcv"], default="own", help="ffcv: the library re-encodes all images")
    option("--inside", default="", metavar="FOLDER", help="take only this folder of SRC, for example train")
    option(
        "--labels",
        type=home_path,
        metavar="FILE",
        help="take labels from its lines: name,label or name label",
    )
    option("--max-size", type=int, default=0, metavar="PX", help="shrink larger images to this longer side")
    option("--quality", type=int, default=95, metavar="Q", help="of re-encoded JPEGs, 1 to 100 (default 95)")
    option("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="refuse images with more pixels")
    option("--no-decode", dest="decode", action="store_false", help="trust JPEGs with a valid header and end")
    option("--split", metavar="NAME=SHARE,...", help="make several data sets in DST/NAME: train=.9,val=.1")
    option("--seed", type=int, default=0, help="of the shuffled order (default 0)")
    option("--shard-size", type=int, default=256, metavar="MB", help="size of a shard (default 256)")
    option("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all CPUs)")
    option("--strict", action="store_true", help="stop at the first file that cannot be used")
    args = parser.parse_args(argv)
    if args.index != (args.dst is None):
        parser.error("--index takes one folder" if args.index else "DST is missing")
    if args.manifest and not args.index:
        parser.error("--manifest is for --index")
    if args.index and args.labels:
        parser.error("--labels is for a conversion: --index keeps the labels of the tars")
    if args.format != "beton" and (args.raw_fraction or args.engine != "own"):
        parser.error("--raw-fraction and --engine are for --format beton")
    for name, (low, high) in _BOUNDS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {low} to {high}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed on the way, 2 a mistake in the request, 130 interrupted."""
    args = parse(argv)
    options = vars(args)
    manifest = options.pop("manifest")
    try:
        is_index = options.pop("index")
        if is_index and is_remote(args.src):
            say(index_url(parse_url(args.src), args.workers, args.strict, manifest))
            return 0
        args.src, options["only"] = expand_source(args.src)
        url = parse_url(args.dst) if isinstance(args.dst, str) else None
        if url:
            args.dst = scratch_of(url, parse_split(args.split))
        if is_index:
            if options["only"]:
                raise ValueError(f"--index {args.src}: name the folder of the tars")
            say(index(args.src, args.workers, args.strict, manifest))
        else:
            upload = Upload(args.dst, url, _say) if url else None
            made = make(ConversionOptions(**options), _say, upload)
            if upload:
                upload.finish()
                made = made.replace(str(args.dst), upload.url)
            say(made)
        return 0
    except ValueError as error:
        return _fail(str(error), 2)
    except (UnusableInputError, futures.BrokenExecutor, RemoteError) as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory: use fewer --workers, or start it again to continue")
    except OSError as error:
        where = error.filename or args.dst or args.src
        return _fail(f"{where}: {error.strerror or error}: no unfinished file was kept under its final name")
    except KeyboardInterrupt:
        return _fail("interrupted; start it again to continue", 130)


def _say(note: str) -> None:
    say(f"make_shards: note: {note}", file=sys.stderr)


def _fail(text: str, code: int = 1) -> int:
    say(f"make_shards: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
