"""Writes a trained encoder so that others load it: safetensors, a config where the library wants one, and a model card.

python tools/export.py runs/r50_100ep/encoder.safetensors --to timm --out exported

CHECKPOINT is a run's checkpoint-*.pt or encoder.safetensors. What is written is loaded again and compared with the
encoder on random images: by torchvision always, by timm and transformers where they are installed. Only then does the
folder get its name. Nothing is pickled; tools/evaluate.py reads the model.safetensors, too. timm builds no CIFAR stem:
such an encoder goes --to torchvision.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from byolt.configs import schema
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import Trained, export_trained, load_trained
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.sources import open_source
from byolt.pipelines.subset import spaced
from byolt.tools.reporting.model_card import model_card, public

Features = Callable[[Tensor], Tensor]  # images (N, 3, H, W), normalised -> (N, F)
LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "huggingface": "transformers"}
TOLERANCE = 1e-5  # of the largest feature: other kernels may round differently


def check_architecture(trained: Trained, target: str) -> None:
    """Refuses what the library cannot build.

    Raises:
        ValueError: names the setting and the remedy.
    """
    model = trained.config.model
    if model.backbone == "resnet8":
        raise ValueError(
            f"model.backbone=resnet8 is this project's own network, {LIBRARIES[target]} has none like it: load "
            "encoder.safetensors with model.trained.load_trained, or train another backbone"
        )
    if model.stem == "cifar" and target != "torchvision":
        raise ValueError(
            f"model.stem=cifar: timm, on which --to {target} rests, builds {model.backbone} with the 7x7 stem only: "
            "use --to torchvision"
        )


# --------------------------------------------------------------------------------------------------- loading again


def _load_torchvision(folder: Path, trained: Trained) -> Features:
    network = torchvision.models.get_model(trained.config.model.backbone, weights=None)
    network.fc = nn.Identity()
    if trained.config.model.stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


def _load_timm(folder: Path, trained: Trained) -> Features:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _load_transformers(folder: Path, trained: Trained) -> Features:
    import timm  # noqa: F401 -- what the wrapper wraps; without it transformers fails later and less clearly
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder).eval()
    return lambda images: network(pixel_values=images).pooler_output


LOADERS = {"torchvision": _load_torchvision, "timm": _load_timm, "huggingface": _load_transformers}


def _noise(config: schema.Config) -> Tensor:
    """Two images (2, 3, size, size) that differ."""
    size = config.augment.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_alive(trained: Trained) -> None:
    """Refuses an encoder that tells no image from another: it is of no use, and nothing to compare with.

    Raises:
        ValueError: names the file.
    """
    one, other = trained.encoder(_noise(trained.config))
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError(
            f"{trained.path}: its features are not finite, the encoder is broken: export another"
        )
    if (one - other).abs().max() <= TOLERANCE * one.abs().max():
        raise ValueError(f"{trained.path}: the encoder has collapsed, all images have the same features")


@torch.no_grad()
def check_equal(trained: Trained, folder: Path, target: str) -> str:
    """Loads what was written as its users will, and compares features.

    Returns:
        One sentence: what was found, or that the library is not installed.

    Raises:
        RuntimeError: the features differ, or the library refuses the files.
    """
    try:
        loaded = LOADERS[target](folder, trained)
    except ImportError as error:
        return f"not checked with {LIBRARIES[target]}: {error} (pip install timm transformers)"
    images = _noise(trained.config)
    expected, found = trained.encoder(images), loaded(images)
    if found.shape != expected.shape:
        raise RuntimeError(
            f"{target} gives features of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{target} gives other features than the encoder: relative difference {difference:.2g}"
        )
    return f"checked with {LIBRARIES[target]}: features differ by {difference:.2g} of the largest at most"


# ----------------------------------------------------------------------------------------------------- what is written


def crop_of(config: schema.Config) -> tuple[float, str]:
    """timm's crop_pct, which is one for all images, whereas ours depends on the image (`plain_images`).

    Returns:
        What most of 100 images of eval.path, else data.path, are cropped to; a sentence that says so.
    """
    path, size = config.eval.path or config.data.path, config.augment.size
    sides = []
    try:
        source = open_source(path)
        for number in spaced(len(source), 100):
            with suppress(ValueError):  # it is left out when measuring, too
                header = inspect(source.read(int(number)))
                sides.append(min(header.height, header.width))
    except (ValueError, OSError):
        sides = []
    if not sides:
        return 0.875, "config.json has crop_pct 0.875: the images were not there to look at their sizes."
    if statistics.median(sides) > size:
        return 0.875, "config.json has crop_pct 0.875, right for most images measured on."
    return (
        1.0,
        "config.json has crop_pct 1, right for most images measured on: they are no larger than a view.",
    )


def timm_config(trained: Trained, target: str, crop: float) -> dict[str, Any]:
    """config.json as timm's `local-dir:` and `hf-hub:` read it; for transformers with the type of its timm wrapper."""
    augment, model = trained.config.augment, trained.config.model
    config: dict[str, Any] = {
        "architecture": model.backbone,
        "num_classes": 0,
        "num_features": int(trained.encoder.num_features),  # type: ignore[arg-type]
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, augment.size, augment.size],
            "interpolation": "bicubic",
            "crop_pct": crop,
            "mean": list(augment.mean),
            "std": list(augment.std),
            "num_classes": 0,
            "pool_size": [(augment.size + 31) // 32] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    if target == "huggingface":
        config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    return config


def usage(trained: Trained, target: str) -> str:
    """The lines of Python that load it."""
    backbone = trained.config.model.backbone
    if target == "timm":
        return "import timm\n\nmodel = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # or hf-hub:NAME"
    if target == "huggingface":
        return (
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            "processor = AutoImageProcessor.from_pretrained('FOLDER')\n"
            "model = AutoModel.from_pretrained('FOLDER')\n"
            "features = model(**processor(image)).pooler_output"
        )
    lines = [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        "",
        f"model = torchvision.models.{backbone}()",
        "model.fc = torch.nn.Identity()",
    ]
    if trained.config.model.stem == "cifar":
        lines += [
            "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    return "\n".join([*lines, "model.load_state_dict(load_file('model.safetensors'))", "model.eval()"])


def export(trained: Trained, target: str, out: Path) -> list[str]:
    """Writes, checks, and gives the folder its name.

    Returns:
        What was checked, a sentence each.

    Raises:
        ValueError: the library has no such network, `out` is there already, or the encoder is of no use.
        RuntimeError: what was written is not the encoder; nothing is left.
    """
    check_architecture(trained, target)
    if out.exists():
        raise ValueError(f"--out {out} exists: name a new folder")
    check_alive(trained)
    config = public(trained.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        export_trained(folder / "model.safetensors", trained.encoder, config, trained.step)
        resizing = ""
        if target != "torchvision":
            crop, resizing = crop_of(trained.config)
            text = json.dumps(timm_config(trained, target, crop), indent=2)
            (folder / "config.json").write_text(text + "\n")
        card = model_card(trained, LIBRARIES[target], usage(trained, target), resizing)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
        said = [check_equal(trained, folder, library) for library in dict.fromkeys(("torchvision", target))]
        folder.rename(out)
    return said


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 what was written is not the encoder, 2 it cannot be done as asked, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint-*.pt or encoder.safetensors of a run")
    parser.add_argument("--to", required=True, choices=tuple(LIBRARIES), help="the library that will load it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        said = export(load_trained(args.checkpoint), args.to, args.out)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"export: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export: interrupted, nothing was written", file=sys.stderr)
        return 130
    print("\n".join([*said, f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
