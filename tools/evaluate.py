"""Evaluates a trained encoder: kNN, linear probe, fine-tuning on few labels, or transfer to another data set.

python tools/evaluate.py runs/quickstart
torchrun --nproc-per-node=8 tools/evaluate.py RUN --data SHARDS --train SHARDS --protocol linear

RUN is the folder of a run, of which the newest encoder is evaluated, or one of its checkpoint-*.pt, or an
encoder.safetensors. --untrained evaluates the same network with fresh weights: the baseline or, with --protocol
finetune --labels 1.0, the supervised upper bound. The classifier learns from --train and is tested on --data. Images
are cropped to the central 7/8 of their short side, as in the reference. The tool prints top-1, top-5 and the mean per
class, and writes evaluate-PROTOCOL-STEP.json and the confusion matrix (.png) to the run's folder or to --out. The
report of the run (tools/report.py) shows them.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import argparse
import sys

from byolt.configs import command_line
from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.pipelines.sources import check_paths
from byolt.tools.evaluation import options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 evaluated, 1 failed on the way, 2 invalid request, 130 interrupted."""
    args = make_parser().parse_args(argv)
    try:
        options.check_options(args)
        if not args.run.exists():
            raise ValueError(
                f"{args.run} cannot be read: no such file; give a run's folder, or a checkpoint-*.pt or "
                "encoder.safetensors"
            )
        if args.run.is_dir() and not any(
            path.suffix in (".pt", ".safetensors") for path in args.run.iterdir()
        ):
            raise ValueError(
                f"{args.run} has no encoder: it holds neither encoder.safetensors nor a checkpoint-*.pt"
            )
        if command_line.world_size() == 1:  # several ranks first connect, so that a mistake of one ends all
            check_paths({"--data": args.data, "--train": args.train})
    except (ValueError, OSError) as error:
        say(f"evaluate: {error}", file=sys.stderr)
        return 2
    try:
        from byolt.tools.evaluation.program import evaluate

        return evaluate(args)
    except KeyboardInterrupt:
        say("evaluate: interrupted, nothing was written", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=home_path, help="folder of a run, or its checkpoint-*.pt or encoder.safetensors")
    add("--protocol", default="knn", choices=tuple(options.OPTIONS), help="how to evaluate (default knn)")
    add("--untrained", action="store_true", help="replace the weights by fresh ones (by --seed)")
    add("--data", help="labeled images to test on (default: the run's eval.path)")
    add("--train", help="labeled images to learn from (default: the run's data.path)")
    add("--out", type=home_path, help="folder for JSON and picture (default: the run's folder)")
    add("--max-images", type=int, metavar="N", help="use at most N random images of each data set")
    add("--seed", type=int, default=0, help="of classifiers, held-out images, --labels and crops (default 0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if there is one")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the encoder (default fp32)")
    add("--threads", type=int, help="CPU threads per rank (default: CPUs divided by ranks)")
    add = parser.add_argument_group("knn").add_argument
    add("--k", type=int, nargs="+", help="number of neighbors (default: the run's eval.k, 200 and 20)")
    add("--temperature", type=float, help="of a vote, exp(cosine / temperature) (default: the run's)")
    add = parser.add_argument_group("linear and finetune").add_argument
    add("--lr", type=float, nargs="+", help="learning rates at batch 256 (default: the paper's)")
    add("--epochs", type=float, nargs="+", help="default: 80 (linear); 30 and 50, both tried (finetune)")
    add("--batch-size", type=int, help="over all ranks (default 1024, or less if there are fewer images)")
    add("--fast", action="store_true", default=None, help="linear: cache features of unaugmented images")
    add("--lbfgs", action="store_true", default=None, help="linear: L-BFGS on standardized, cached features")
    add = parser.add_argument_group("finetune").add_argument
    add("--labels", type=float, help="fraction of each class to train on: 0.01, 0.1 or 1.0")
    add("--subset", type=home_path, metavar="FILE", help="or a file with one sample id or name per line")
    add = parser.add_argument_group("transfer and linear --lbfgs").add_argument
    add("--l2", type=int, metavar="N", help="penalties between 1e-6 and 1e5 (default 45; linear: 12)")
    add("--max-iterations", type=int, help="L-BFGS iterations per penalty (default 1000)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
