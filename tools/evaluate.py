"""Measures a trained encoder: kNN, linear probe, fine-tuning on few labels, or transfer to another data set.

python tools/evaluate.py runs/quickstart/encoder.safetensors --protocol knn
torchrun --nproc-per-node=8 tools/evaluate.py CHECKPOINT --data SHARDS --train SHARDS --protocol linear

CHECKPOINT is a run's checkpoint-*.pt or encoder.safetensors; the online encoder is measured, or with --untrained the
same network with fresh weights: the baseline, and with --protocol finetune --labels 1.0 the supervised ceiling.
--data is what is tested on, --train what is learned from; without them the run's own eval.path and data.path. Images
are their central square, 7/8 of the short side, as the reference's. Prints top-1, top-5 and the mean per class; writes
evaluate-PROTOCOL-STEP.json and a picture of the confusions (.png) beside the checkpoint, or to --out.
"""

import argparse
import itertools
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from byolt.configs.schema import Config
from byolt.model import distributed
from byolt.model.quality import linear, scores
from byolt.model.resnet import make_encoder
from byolt.model.run import failure
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import Trained, load_trained
from byolt.model.step import PRECISIONS
from byolt.pipelines.loader import CorruptBudgetError
from byolt.pipelines.sources import Source, open_source
from byolt.pipelines.subset import Subset, drawn, listed_ids
from byolt.tools.evaluation import frozen, protocols, result
from byolt.tools.evaluation.frozen import Bench
from byolt.tools.evaluation.protocols import Outcome

LINEAR_LRS = (0.4, 0.3, 0.2, 0.1, 0.05)  # paper, App. C.1
FINETUNE_LRS = (0.01, 0.02, 0.05, 0.1, 0.005)  # paper, App. C.2
FINETUNE_EPOCHS = (30.0, 50.0)  # paper, App. C.2
OPTIONS = {  # of each protocol, beside those of all
    "knn": ("k", "temperature"),
    "linear": ("lr", "epochs", "batch_size", "fast"),
    "finetune": ("lr", "epochs", "batch_size", "labels", "subset"),
    "transfer": ("l2", "max_iterations"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint-*.pt or encoder.safetensors of a run")
    parser.add_argument("--protocol", required=True, choices=tuple(OPTIONS))
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="measure the same network with fresh weights by --seed; frozen batch norms are calibrated first",
    )
    parser.add_argument("--data", help="labelled images to test on (default: the run's eval.path)")
    parser.add_argument("--train", help="labelled images to learn from (default: the run's data.path)")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture (default: the checkpoint's)")
    parser.add_argument("--max-images", type=int, metavar="N", help="at most N of each split, drawn")
    parser.add_argument("--seed", type=int, default=0, help="of classifiers, held-out part, subset and crops")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the encoder")
    parser.add_argument("--threads", type=int, help="CPU threads per rank (default: its share of the CPUs)")
    knn = parser.add_argument_group("knn")
    knn.add_argument("--k", type=int, nargs="+", help="neighbours (default 200 and 20)")
    knn.add_argument("--temperature", type=float, help="a vote is exp(cosine / it) (default .1)")
    trained = parser.add_argument_group("linear and finetune")
    trained.add_argument("--lr", type=float, nargs="+", help="learning rates at batch 256 (default: paper's)")
    trained.add_argument(
        "--epochs", type=float, nargs="+", help="default: 80 (linear); 30 and 50, both tried (finetune)"
    )
    trained.add_argument("--batch-size", type=int, help="over all ranks (default 1024, less for few images)")
    trained.add_argument(
        "--fast",
        action="store_true",
        default=None,
        help="linear: features of unaugmented images, taken once",
    )
    finetune = parser.add_argument_group("finetune")
    finetune.add_argument("--labels", type=float, help="share of every class: 0.01, 0.1 or 1.0")
    finetune.add_argument(
        "--subset", type=Path, metavar="FILE", help="or a list of sample ids or names, one a line"
    )
    transfer = parser.add_argument_group("transfer")
    transfer.add_argument("--l2", type=int, metavar="N", help="penalties between 1e-6 and 1e5 (default 45)")
    transfer.add_argument("--max-iterations", type=int, help="of L-BFGS, for each penalty (default 1000)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together, before anything is read.

    Raises:
        ValueError: names the option and the remedy.
    """
    for option in dict.fromkeys(itertools.chain(*OPTIONS.values())):
        having = [protocol for protocol, options in OPTIONS.items() if option in options]
        if getattr(args, option) is not None and args.protocol not in having:
            name = option.replace("_", "-")
            raise ValueError(
                f"--{name} is an option of --protocol {' and '.join(having)}, not {args.protocol}"
            )
    positive: dict[str, Any] = {
        "--max-images": [args.max_images], "--threads": [args.threads], "--k": args.k, "--l2": [args.l2],
        "--temperature": [args.temperature], "--lr": args.lr, "--epochs": args.epochs,
        "--max-iterations": [args.max_iterations], "--batch-size": [args.batch_size],
    }  # fmt: skip
    for option, values in positive.items():
        for value in values or []:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{option} {value}: it must be a number more than 0")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: it must be 0 or more, and below 2**63")
    for option, value, most in (("--threads", args.threads, 1024), ("--l2", args.l2, 10_000)):
        if value and value > most:
            raise ValueError(f"{option} {value}: it must be {most} or less")
    if args.protocol == "finetune" and (args.labels is None) == (args.subset is None):
        raise ValueError("--protocol finetune needs --labels 0.01, 0.1 or 1.0, or --subset FILE")
    if args.protocol == "linear" and len(args.epochs or [80]) > 1:
        raise ValueError("--epochs: the linear protocol takes one number")
    if args.subset and args.max_images:
        raise ValueError(
            "--subset with --max-images: ids would be those of the thinned images; leave one out"
        )


def open_labelled(option: str, path: str | None, limit: int | None) -> Source:
    """A data set, all of whose images have labels."""
    if path is None:
        raise ValueError(f"{option} is needed: the run that made this encoder names no labelled data")
    try:
        source = open_source(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if (source.labels < 0).any():
        raise ValueError(f"{option} {path} holds unlabelled images: give a data set with classes")
    if limit and limit < len(source):
        return Subset(source, drawn(len(source), limit))
    return source


def run(
    args: argparse.Namespace, trained: Trained, train: Source, test: Source, world: distributed.World
) -> None:
    """Measures, and on rank 0 shows and writes."""
    threads = args.threads or max(
        1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    torch.set_num_threads(threads)
    # What does not decode is left out and counted, as by every protocol: the run's budget is not for this.
    data = trained.config.data.model_copy(
        update={"threads": min(threads, 256), "path": args.train, "max_corrupt": len(train)}
    )
    config: Config = trained.config.model_copy(update={"data": data})
    console = Console(stderr=True)
    started = time.monotonic()
    with Progress(console=console, disable=not world.is_main) as progress:
        encoder = trained.encoder.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        bench = Bench(config, encoder, world, train, test, args.seed, PRECISIONS[args.precision], progress)
        if args.untrained and args.protocol != "finetune":
            frozen.calibrate(bench)
        outcomes, labels = measure(args, bench)
    if world.is_main:
        seconds = time.monotonic() - started
        result.report(args, trained, bench, outcomes, labels, seconds)


def untrained(trained: Trained, seed: int) -> Trained:
    """The same network before any training; its weights are no run's and have no digest."""
    model = trained.config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder(model.backbone, model.stem)
    return trained._replace(encoder=encoder.eval(), step=0, digest="")


def measure(args: argparse.Namespace, bench: Bench) -> tuple[list[Outcome], Tensor]:
    """Runs the protocol that was asked for."""
    if args.protocol == "knn":
        return protocols.knn(bench, args.k or (200, 20), args.temperature or 0.1)
    if args.protocol == "linear":
        epochs = (args.epochs or [80.0])[0]
        return protocols.linear(bench, args.lr or LINEAR_LRS, epochs, args.batch_size, bool(args.fast))
    if args.protocol == "finetune":
        chosen = args.labels if args.subset is None else listed_ids(bench.train, args.subset)
        lrs, epochs = args.lr or FINETUNE_LRS, args.epochs or FINETUNE_EPOCHS
        return protocols.finetune(bench, chosen, lrs, epochs, args.batch_size)
    return protocols.transfer(bench, linear.l2_values(args.l2 or 45), args.max_iterations or 1000)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 failed on the way, 2 it cannot be done as asked, 130 interrupted."""
    args = make_parser().parse_args(argv)
    try:
        return _main(args)
    except KeyboardInterrupt:
        print("evaluate: interrupted, nothing was written", file=sys.stderr)
        return 130


def _main(args: argparse.Namespace) -> int:
    try:
        check(args)
        trained = load_trained(args.checkpoint)
        if args.untrained:
            trained = untrained(trained, args.seed)
        args.data = args.data or trained.config.eval.path
        args.train = args.train or trained.config.data.path
        test = open_labelled("--data", args.data, args.max_images)
        train = open_labelled("--train", args.train, args.max_images)
        if train.classes and test.classes and train.classes != test.classes:
            raise ValueError(
                f"--train {args.train} has other classes than --data {args.data}: {train.classes} and {test.classes}"
            )
        scores.num_classes(train.labels, test.labels)
        if train.labels.min() == train.labels.max():
            raise ValueError(
                f"--train {args.train}: all {len(train)} images are of one class: needs two classes or more"
                + " (raise --max-images)" * bool(args.max_images)
            )
        if train.fingerprint == test.fingerprint:
            raise ValueError(
                f"--train {args.train} and --data {args.data} hold the same images, and an encoder would be tested on "
                "what it has learned: name another data set (tools/make_shards.py --split train=.9,val=.1 makes two)"
            )
        world = distributed.init(args.device)
        distributed.on_main(lambda: result.check_writable(result.folder(args, trained)), world)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"evaluate: {error}".replace("train.device=", "--device "), file=sys.stderr)
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
        print(f"evaluate: {failure.explain(failed, None, world)}", file=sys.stderr)
        return 2 if isinstance(failed, ValueError) else 1
    distributed.shutdown(world)  # only now: after a failure NCCL would wait for the ranks that failed
    return 0


if __name__ == "__main__":
    sys.exit(main())
