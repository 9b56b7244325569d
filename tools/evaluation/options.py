"""The options of each protocol, checked before torch is imported."""

import argparse
import itertools
import math
import os
from typing import Any

OPTIONS = {  # of each protocol, beside the options of all
    "knn": ("k", "temperature"),
    "linear": ("lr", "epochs", "batch_size", "fast", "lbfgs", "l2", "max_iterations"),
    "finetune": ("lr", "epochs", "batch_size", "labels", "subset"),
    "transfer": ("l2", "max_iterations"),
}


def check_options(args: argparse.Namespace) -> None:
    """Refuses options that do not go together or are out of range, before anything is read.

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
    limits = dict.fromkeys(("max_images", "k", "temperature", "lr", "epochs", "max_iterations", "batch_size"))
    for option, most in (limits | {"threads": 1024, "l2": 10_000}).items():
        given: Any = getattr(args, option)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{option.replace('_', '-')} {value} must be a finite number above 0")
            if value is not None and most and value > most:
                raise ValueError(f"--{option} {value} must be at most {most}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be at least 0 and below 2**63")
    if args.data and args.train and os.path.realpath(args.data) == os.path.realpath(args.train):
        raise ValueError(
            f"--train {args.train} and --data {args.data} hold the same images: name another data set "
            "(tools/make_shards.py --split train=.9,val=.1 makes two)"
        )
    if args.protocol == "finetune" and (args.labels is None) == (args.subset is None):
        raise ValueError("--protocol finetune needs --labels 0.01, 0.1 or 1.0, or --subset FILE")
    if args.protocol == "linear":
        of_sgd, of_lbfgs = ("lr", "epochs", "batch_size", "fast"), ("l2", "max_iterations")
        for option in of_sgd if args.lbfgs else of_lbfgs:
            if getattr(args, option) is not None:
                name, verb = option.replace("_", "-"), "cannot be combined with" if args.lbfgs else "needs"
                raise ValueError(f"--{name} {verb} --lbfgs")
    if args.protocol == "linear" and len(args.epochs or [80]) > 1:
        raise ValueError("--epochs: the linear protocol takes one number")
    if args.subset and args.max_images:
        raise ValueError("--subset cannot be combined with --max-images, which renumbers the samples")
