"""One evaluation from its options to its result; `tools/evaluate.py` parses them before torch is imported."""

import argparse
import sys
import time
import traceback

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from byolt.files.console import say
from byolt.files.machine import cores_per_rank
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


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates as the options say; returns the exit code."""
    try:
        trained = load_trained(args.run)
        if args.untrained:
            trained = inputs.untrained(trained, args.seed)
        args.data = args.data or trained.config.eval.path
        args.train = args.train or trained.config.data.path
        args.out = args.out or trained.path.parent
        test = inputs.open_labeled("--data", args.data, args.max_images, trained.config.data)
        train = inputs.open_labeled("--train", args.train, args.max_images, trained.config.data)
        warning = inputs.check_splits(args.train, train, args.data, test)
        inputs.number_classes(train, test)
        world = distributed.init(args.device, setting="--device")
        distributed.on_main(lambda: result.check_writable(args.out), world)
        if warning and world.is_main:
            say(warning, file=sys.stderr)
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
    threads = args.threads or cores_per_rank()
    torch.set_num_threads(threads)
    # Every protocol leaves out and counts images that do not decode: the run's own limit does not apply.
    changed = {"threads": min(threads, 256), "path": args.train, "max_corrupt": len(train)}
    config = trained.config.model_copy(update={"data": trained.config.data.model_copy(update=changed)})
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
        given = setup.config.eval
        ks, temperature = args.k or (given.k, 200, 20), args.temperature or given.temperature
        return protocols.evaluate_knn(setup, ks, temperature)
    if args.protocol == "linear" and not args.lbfgs:
        lrs, epochs = args.lr or LINEAR_LRS, (args.epochs or [80.0])[0]
        return protocols.evaluate_linear(setup, lrs, epochs, args.batch_size, bool(args.fast))
    if args.protocol == "finetune":
        labeled = args.labels if args.subset is None else listed_ids(setup.train, args.subset)
        lrs, lengths = args.lr or FINETUNE_LRS, args.epochs or FINETUNE_EPOCHS
        return protocols.evaluate_finetuning(setup, labeled, lrs, lengths, args.batch_size)
    l2_values = linear.l2_values(args.l2 or (12 if args.lbfgs else 45))
    iterations = args.max_iterations or 1000
    return protocols.evaluate_transfer(setup, l2_values, iterations, standardize=bool(args.lbfgs))
