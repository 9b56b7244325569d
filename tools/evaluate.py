"""Evaluates a trained encoder: kNN, linear probe, fine-tuning on few labels, or transfer to another data set.

python tools/evaluate.py runs/quickstart/encoder.safetensors --protocol knn
torchrun --nproc-per-node=8 tools/evaluate.py CHECKPOINT --data SHARDS --train SHARDS --protocol linear

CHECKPOINT is a run's checkpoint-*.pt or encoder.safetensors. The online encoder is evaluated; with --untrained the same
network with fresh weights, which is the baseline, and with --protocol finetune --labels 1.0 the supervised ceiling.
--train is learned from and --data is tested on; the defaults are the run's data.path and eval.path. Images are cropped
to the central 7/8 of their short side, as in the reference. Prints top-1, top-5 and the mean per class; writes
evaluate-PROTOCOL-STEP.json and a picture of the confusions (.png) beside the checkpoint, or to --out.
"""

import argparse
import os
import sys
import time
import traceback

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from byolt.files.console import say
from byolt.files.paths import home_path
from byolt.model import distributed
from byolt.model.quality import linear
from byolt.model.run import failure
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import Trained, load_trained
from byolt.model.step import PRECISIONS
from byolt.pipelines.loader import CorruptBudgetError
from byolt.pipelines.sources import Source
from byolt.pipelines.subset import listed_ids
from byolt.tools.evaluation import frozen, inputs, protocols, result
from byolt.tools.evaluation.frozen import Setup
from byolt.tools.evaluation.protocols import Outcome

LINEAR_LRS = (0.4, 0.3, 0.2, 0.1, 0.05)  # paper, App. C.1
FINETUNE_LRS = (0.01, 0.02, 0.05, 0.1, 0.005)  # paper, App. C.2
FINETUNE_EPOCHS = (30.0, 50.0)  # paper, App. C.2


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 evaluated, 1 failed on the way, 2 invalid request, 130 interrupted."""
    args = make_parser().parse_args(argv)
    try:
        return _main(args)
    except KeyboardInterrupt:
        say("evaluate: interrupted, nothing was written", file=sys.stderr)
        return 130


def _main(args: argparse.Namespace) -> int:
    try:
        inputs.check_options(args)
        trained = load_trained(args.checkpoint)
        if args.untrained:
            trained = inputs.untrained(trained, args.seed)
        args.data = args.data or trained.config.eval.path
        args.train = args.train or trained.config.data.path
        args.out = args.out or trained.path.parent
        test = inputs.open_labeled("--data", args.data, args.max_images)
        train = inputs.open_labeled("--train", args.train, args.max_images)
        inputs.check_splits(args.train, train, args.data, test)
        inputs.number_classes(train, test)
        world = distributed.init(args.device)
        distributed.on_main(lambda: result.check_writable(args.out), world)
    except (CheckpointError, ValueError, OSError) as error:
        say(f"evaluate: {error}", file=sys.stderr)
        return 2
    try:
        run(args, trained, train, test, world)
    except Exception as error:
        failed = error
        if isinstance(error, CorruptBudgetError):  # its remedy is an option of train.py
            failed = ValueError(f"--train {args.train}: no image decodes; run tools/verify_shards.py on it")
        foreseen = (ValueError, FloatingPointError, OSError)
        if not isinstance(failed, foreseen) and not distributed.is_lost_peer(failed):
            traceback.print_exc()
        say(f"evaluate: {failure.explain(failed, None, world)}", file=sys.stderr)
        return 2 if isinstance(failed, ValueError) else 1
    distributed.shutdown(world)  # not after a failure: NCCL would wait for the ranks that failed
    return 0


def run(
    args: argparse.Namespace, trained: Trained, train: Source, test: Source, world: distributed.World
) -> None:
    """Evaluates on all ranks; rank 0 prints and writes the result."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)
    torch.set_num_threads(threads)
    # Every protocol leaves out and counts images that do not decode: the run's own limit does not apply.
    data = trained.config.data.model_copy(
        update={"threads": min(threads, 256), "path": args.train, "max_corrupt": len(train)}
    )
    config = trained.config.model_copy(update={"data": data})
    started = time.monotonic()
    with Progress(console=Console(stderr=True), disable=not world.is_main) as progress:
        encoder = trained.encoder.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        setup = Setup(config, encoder, world, train, test, args.seed, PRECISIONS[args.precision], progress)
        if args.untrained and args.protocol != "finetune":
            frozen.calibrate(setup)
        outcomes, labels = measure(args, setup)
    if world.is_main:
        result.report(args, trained, setup, outcomes, labels, time.monotonic() - started)


def measure(args: argparse.Namespace, setup: Setup) -> tuple[list[Outcome], Tensor]:
    """Runs the requested protocol."""
    if args.protocol == "knn":
        return protocols.evaluate_knn(setup, args.k or (200, 20), args.temperature or 0.1)
    if args.protocol == "linear":
        lrs, epochs = args.lr or LINEAR_LRS, (args.epochs or [80.0])[0]
        return protocols.evaluate_linear(setup, lrs, epochs, args.batch_size, bool(args.fast))
    if args.protocol == "finetune":
        labeled = args.labels if args.subset is None else listed_ids(setup.train, args.subset)
        lrs, lengths = args.lr or FINETUNE_LRS, args.epochs or FINETUNE_EPOCHS
        return protocols.evaluate_finetuning(setup, labeled, lrs, lengths, args.batch_size)
    l2_values = linear.l2_values(args.l2 or 45)
    return protocols.evaluate_transfer(setup, l2_values, args.max_iterations or 1000)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=home_path, help="checkpoint-*.pt or encoder.safetensors of a run")
    add("--protocol", required=True, choices=tuple(inputs.OPTIONS))
    add("--untrained", action="store_true", help="fresh weights by --seed instead of the trained ones")
    add("--data", help="labeled images to test on (default: the run's eval.path)")
    add("--train", help="labeled images to learn from (default: the run's data.path)")
    add("--out", type=home_path, help="folder for JSON and picture (default: the checkpoint's folder)")
    add("--max-images", type=int, metavar="N", help="a random part of each data set, at most N images")
    add("--seed", type=int, default=0, help="of classifiers, held-out images, subset and crops (default 0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the encoder (default fp32)")
    add("--threads", type=int, help="CPU threads per rank (default: its share of the CPUs)")
    add = parser.add_argument_group("knn").add_argument
    add("--k", type=int, nargs="+", help="number of neighbors (default 200 and 20)")
    add("--temperature", type=float, help="a vote counts exp(cosine / temperature) (default 0.1)")
    add = parser.add_argument_group("linear and finetune").add_argument
    add("--lr", type=float, nargs="+", help="learning rates at batch 256 (default: the paper's)")
    add("--epochs", type=float, nargs="+", help="default: 80 (linear); 30 and 50, both tried (finetune)")
    add("--batch-size", type=int, help="over all ranks (default 1024, less for few images)")
    add("--fast", action="store_true", default=None, help="linear: cache features of unaugmented images")
    add = parser.add_argument_group("finetune").add_argument
    add("--labels", type=float, help="share of every class: 0.01, 0.1 or 1.0")
    add("--subset", type=home_path, metavar="FILE", help="or a list of sample ids or names, one a line")
    add = parser.add_argument_group("transfer").add_argument
    add("--l2", type=int, metavar="N", help="number of penalties between 1e-6 and 1e5 (default 45)")
    add("--max-iterations", type=int, help="of L-BFGS, for each penalty (default 1000)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
