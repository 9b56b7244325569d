"""Exports a trained encoder for other libraries: safetensors, a config if the library needs one, and a model card.

python tools/export.py runs/r50_100ep --to timm

RUN is the folder of a run, of which the newest encoder is exported, or one of its checkpoint-*.pt, or an
encoder.safetensors. The result goes to exported-LIBRARY in the run's folder or to --out. Before the folder gets its
name, the written files are loaded again, by torchvision and by the library if it is installed, and compared with the
encoder on random images.
Nothing is pickled. tools/evaluate.py also reads model.safetensors. timm cannot build the CIFAR stem: export such an
encoder --to torchvision.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import sys

from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import load_trained
from byolt.tools.exporting.libraries import LIBRARIES, export


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 written, 1 the check failed, 2 invalid request, 130 interrupted."""
    parser = Parser(prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=home_path, help="folder of a run, or its checkpoint-*.pt or encoder.safetensors")
    add("--to", required=True, choices=tuple(LIBRARIES), help="library that will load the encoder")
    add("--out", type=home_path, help="folder to create (default: exported-LIBRARY in the run's folder)")
    args = parser.parse_args(argv)
    try:
        trained = load_trained(args.run)
        args.out = args.out or trained.path.parent / f"exported-{args.to}"
        checks = export(trained, args.to, args.out)
    except (CheckpointError, ValueError, OSError) as error:
        say(f"export: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        say(f"export: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("export: interrupted, nothing was written", file=sys.stderr)
        return 130
    say("\n".join([*checks, f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
