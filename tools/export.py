"""Writes a trained encoder so that others load it: safetensors, a config where the library wants one, and a model card.

python tools/export.py runs/r50_100ep/encoder.safetensors --to timm --out exported

CHECKPOINT is a run's checkpoint-*.pt or encoder.safetensors. What is written is loaded again and compared with the
encoder on random images: by torchvision always, by timm and transformers where they are installed. Only then does the
folder get its name. Nothing is pickled. timm builds no CIFAR stem: such an encoder goes --to torchvision.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from configs import schema
from model.checkpoint import CheckpointError, export_encoder
from model.rows import read_metrics
from model.trained import Trained, load_trained

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
    size = trained.config.augment.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
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


def timm_config(trained: Trained, target: str) -> dict[str, Any]:
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
            "crop_pct": 0.875,
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


def measured(trained: Trained) -> list[str]:
    """One line for each accuracy that was measured on exactly these weights and lies beside the checkpoint."""
    folder, lines = trained.path.parent, []
    for row in read_metrics(folder / "metrics.jsonl"):
        if row["step"] == trained.step and "knn_top1" in row:
            settings = trained.config.eval
            lines.append(
                f"kNN (k = {settings.k}, temperature {settings.temperature:g}): top-1 {row['knn_top1']:.2f} %"
            )
    for path in sorted(folder.glob("evaluate-*.json")):
        try:
            document = json.loads(path.read_text())
            if document["encoder_sha256"] != trained.digest:
                continue
            for result in document["results"]:
                if "top1" in result:
                    low, high = result["top1_interval"]
                    lines.append(
                        f"{document['protocol']}, {result['name']}: top-1 {result['top1']:.2f} % "
                        f"({low:.2f} to {high:.2f}), {result['images']} images of {document['test']['path']}"
                    )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of tools/evaluate.py ({error}): remove it") from None
    return lines


def epochs_done(trained: Trained) -> str:
    """How long was trained, as far as the run's folder says."""
    rows = [row for row in read_metrics(trained.path.parent / "metrics.jsonl") if "epoch" in row]
    at = [row["epoch"] for row in rows if row["step"] == trained.step]
    done, train = f"{at[-1]:.1f}" if at else "an unknown part", trained.config.train
    return f"{done} of {train.epochs:g} epochs, {trained.step} steps of {train.batch_size} images"


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


def model_card(trained: Trained, target: str) -> str:
    """README.md of the export: what it is, how it was made, what was measured, how to load it."""
    config = trained.config
    accuracies = "\n".join(f"- {line}" for line in measured(trained)) or "Not measured."
    return f"""---
library_name: {LIBRARIES[target]}
tags: [image-feature-extraction, self-supervised, byol]
---
# {config.model.backbone}, pre-trained with BYOL

The online encoder of a BYOL run ([arXiv 2006.07733](https://arxiv.org/abs/2006.07733)), without projector and
predictor: images to {trained.encoder.num_features} features. Trained without labels.

- Images: `{config.data.path}`
- Length: {epochs_done(trained)}
- Stem: {config.model.stem}; views of {config.augment.size} px
- Preprocessing: centre crop of 7/8 of the short side, bicubic to {config.augment.size} px; values in 0 .. 1,
  minus {list(config.augment.mean)}, divided by {list(config.augment.std)}
- sha256 of the weights: `{trained.digest}`

## Measured

{accuracies}

## Load

```python
{usage(trained, target)}
```

## Recipe

```yaml
{schema.to_yaml(config).rstrip()}
```
"""


def export(trained: Trained, target: str, out: Path) -> list[str]:
    """Writes, checks, and gives the folder its name.

    Returns:
        What was checked, a sentence each.

    Raises:
        ValueError: the library has no such network, or `out` is there already.
        RuntimeError: what was written is not the encoder; nothing is left.
    """
    check_architecture(trained, target)
    if out.exists():
        raise ValueError(f"--out {out} exists: name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        export_encoder(folder / "model.safetensors", trained.encoder.state_dict(), {"format": "pt"})
        if target != "torchvision":
            text = json.dumps(timm_config(trained, target), indent=2)
            (folder / "config.json").write_text(text + "\n")
        (folder / "README.md").write_text(model_card(trained, target))
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
