"""Every setting once: type, range, unit and source beside the field.

`load` reads a YAML file, merges `key=value` overrides and returns a frozen `Config`; a mistake never
reaches training. This module imports neither torch nor numpy: a wrong config is refused in well under a second.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import (
    AliasToken,
    BlockMappingStartToken,
    BlockSequenceStartToken,
    FlowMappingStartToken,
    FlowSequenceStartToken,
    YAMLError,
    scan,
)

_COLLECTIONS = (
    BlockMappingStartToken,
    BlockSequenceStartToken,
    FlowMappingStartToken,
    FlowSequenceStartToken,
)

Probability = Annotated[float, Field(ge=0, le=1)]


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"the lower bound {interval[0]} is above the upper bound {interval[1]}")
    return interval


_Positive = Annotated[float, Field(gt=0)]
PositiveInterval = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]
_Share = Annotated[float, Field(gt=0, le=1)]
ShareInterval = Annotated[tuple[_Share, _Share], AfterValidator(_ordered)]


Profile = Literal["byol", "torchvision"]
Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnet8"]
Stem = Literal["imagenet", "cifar"]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Section):
    path: str
    """Training images: a folder made by tools/make_shards.py, a folder of images, FFCV .beton files (with commas
    between them), or synthetic:COUNT:HxW."""
    expected_images: Annotated[int, Field(gt=0)] | None = None
    """How many images the recipe was written for: a different number is reported, and used. Without the data
    set --print-config derives the steps from it."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """What decodes and augments: DALI, or plain torch; auto takes DALI where it is installed."""
    resident: Literal["auto", "always", "never"] = "auto"
    """Keep the whole set decoded in memory; auto: when no image is larger than 96 px and all are below 4 GiB. Not with
    data.backend=torch, which makes every view from the bytes."""
    order: Literal["full", "block"] = "full"
    """full: a permutation of all samples; block: long consecutive reads, shuffled in a window (pipelines/order.py)."""
    threads: Annotated[int, Field(ge=1, le=256)] = 4
    """CPU threads per rank that decode (and, without a GPU, augment)."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    """Micro-batches made ahead of the training step, per rank (train.accumulation of them are a step)."""
    max_corrupt: Annotated[int, Field(ge=0)] = 100
    """Different undecodable images per rank after which the run stops; until then each is replaced by the next
    sound image and listed in corrupt.jsonl."""


class ViewConfig(Section):
    """What is drawn for one view. Defaults: BYOL, appendix B (table 6), the values common to both views."""

    crop_area: ShareInterval = (0.08, 1.0)
    """Area of the crop as a share of the image, uniform."""
    crop_ratio: PositiveInterval = (3 / 4, 4 / 3)
    """Width / height of the crop, log-uniform."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability that the four colour operations below are applied, in a random order."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.4
    """A value U(-b, b) is added to every pixel (range [0, 1]); torchvision: they are scaled by U(1 - b, 1 + b)."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Distance to the per-channel mean is scaled by U(1 - c, 1 + c); torchvision: to the mean of the grey image."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Saturation in HSV is scaled by U(1 - s, 1 + s); torchvision: the distance to the grey image is."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """U(-h, h) of a turn is added to the hue in HSV."""
    gray: Probability = 0.2
    """Probability of conversion to grey, independent of the jitter."""
    blur: Probability
    """Probability of a Gaussian blur (paper: 1.0 for view 1, 0.1 for view 2)."""
    blur_sigma: PositiveInterval = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform."""
    solarize: Probability
    """Probability of solarization at 0.5 (paper: 0.0 for view 1, 0.2 for view 2)."""


class AugmentConfig(Section):
    profile: Profile = "byol"
    """Whose definitions the operations have: the reference implementation's (byol: byol/utils/augmentations.py), or
    torchvision's (transforms.v2: RandomResizedCrop of 10 tries with antialias, ColorJitter by factors), with which
    solo-learn and lightly train."""
    size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of a view in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel after augmentation (ImageNet; range [0, 1])."""
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)
    """Each channel is divided by it (ImageNet)."""
    view1: ViewConfig
    """The distribution T of the paper."""
    view2: ViewConfig
    """The distribution T' of the paper."""

    @property
    def blur_taps(self) -> int:
        """Taps of the blur kernel: 2 * int(size / 10 / 2) + 1, as the reference (23 at 224, 3 at 32)."""
        return 2 * int(self.size / 10 / 2) + 1


class ModelConfig(Section):
    backbone: Backbone = "resnet50"
    """Encoder: torchvision's networks by name, or resnet8 (0.3 M parameters, for the quickstart)."""
    stem: Stem = "imagenet"
    """cifar: 3x3 convolution of stride 1 and no max-pool, for images of about 32 px."""
    projector_hidden: Annotated[int, Field(ge=1)] = 4096
    """Width of the projector's hidden layer (paper, section 3.3)."""
    projector_size: Annotated[int, Field(ge=2)] = 256
    """Dimension of projections and predictions (paper, section 3.3)."""
    predictor_hidden: Annotated[int, Field(ge=1)] = 4096
    """Width of the predictor's hidden layer (paper, section 3.3)."""
    predictor: bool = True
    """Without it the projection is the prediction: an ablation, which collapses (paper, table 5b)."""


class OptimizerConfig(Section):
    base_lr: Annotated[float, Field(ge=0)]
    """Learning rate at a batch of 256; the peak is base_lr * batch_size / 256."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    """Linear warm-up from 0 (paper, section 3.3), then cosine to 0."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of LARS, heavy ball (reference: 0.9)."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Not applied to biases and batch-norm parameters."""
    trust_coefficient: Annotated[float, Field(gt=0)] = 1e-3
    """eta of LARS: the step of a weight matrix is eta * |p| / |g + wd p| of its gradient (reference: 1e-3)."""
    backend: Literal["auto", "triton", "foreach", "apex"] = "auto"
    """Kernels of the update: triton fuses LARS, EMA and the finite check (CUDA only), foreach is torch's multi-tensor
    operations, apex is NVIDIA's amp_C, built from source. auto: triton on CUDA, foreach elsewhere."""
    base_tau: Annotated[float, Field(ge=0, le=1)]
    """tau of the target's moving average at step 0."""
    tau_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: tau rises to 1 at the end (paper, section 3.3); constant: for ablations."""


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0, le=1e6)]
    """Length of the run in images seen: total steps = int(epochs * images / batch_size), as the reference."""
    batch_size: Annotated[int, Field(ge=2, le=2**24)]
    """Images per optimizer step over all ranks."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step; batch-norm statistics are those of a micro-batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    channels_last: bool = True
    """Weights and activations in NHWC order, for which tensor cores have the faster convolutions."""
    compile: bool = False
    """torch.compile of the online and target networks; of a single process only (`Config.check_ranks`)."""
    deterministic: bool = False
    """The same weights to the bit in every run on the same machine, at some speed: on a GPU torch then takes only
    algorithms that promise it (not yet run on one). On a CPU that is so anyway."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: each rank's own GPU where there is one, else the CPU."""
    stop_at_step: Annotated[int, Field(ge=1)] | None = None
    """End the run in good order after this many steps in all; the schedules still span all epochs."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10
    """A rank that waits longer than this for the others fails."""
    on_collapse: Literal["ignore", "warn", "stop"] = "warn"
    """What to do where the target's projections are almost equal for all samples (train.collapse_std)."""
    collapse_std: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Collapsed is a standard deviation over samples below this share of 1/sqrt(projector_size), which projections
    spread over the sphere have; compared at every row of metrics.jsonl."""


class EvalConfig(Section):
    path: str | None = None
    """Labelled images for kNN accuracy; the bank is data.path, which must be labelled too. null: no kNN."""
    every_epochs: Annotated[float, Field(gt=0, le=1e6)] = 10
    """kNN accuracy is taken before the first step, every so many epochs, and at the end."""
    k: Annotated[int, Field(ge=1)] = 200
    """Neighbours that vote (clamped to the size of the bank)."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    max_images: Annotated[int, Field(ge=1)] = 50_000
    """At most so many images of each split, evenly spaced."""
    online_probe: bool = True
    """Where data.path is labelled, a linear classifier follows the training on the detached features of view 1
    (reference: byol_experiment.py): probe_top1 in the metrics, on the batches as they come. It changes nothing else."""


class RunConfig(Section):
    out: str
    """Folder for checkpoints, metrics, pictures and the exported encoder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds weights, sample order and every augmentation."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two rows of metrics.jsonl and TensorBoard, and two lines on a console that is no terminal."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 15
    """Minutes between two checkpoints; one is also written on a signal and at the end."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 3
    """The newest so many are kept."""
    on_write_error: Literal["stop", "continue"] = "stop"
    """Whether a checkpoint, a row of metrics.jsonl or views.png that cannot be written (a full disk) ends the run, or
    is told, and the next one tried. The last checkpoint of a run and its encoder must be written in either case."""


class Config(Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        if self.train.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by "
                f"train.accumulation={self.train.accumulation}: change one of them"
            )
        if self.optimizer.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs={self.optimizer.warmup_epochs:g} leaves nothing of "
                f"train.epochs={self.train.epochs:g}: lower the warm-up"
            )
        if self.data.backend == "torch" and self.data.resident == "always":
            raise ValueError(
                "data.resident=always: data.backend=torch keeps no images in memory: set data.backend=auto, or "
                "data.resident=auto"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: base_lr * batch_size / 256."""
        return self.optimizer.base_lr * self.train.batch_size / 256

    def total_steps(self, num_images: int) -> int:
        """Optimizer steps of the whole run: int(epochs * images / batch), the reference's count."""
        return math.floor(self.train.epochs * num_images / self.train.batch_size)

    def warmup_steps(self, num_images: int) -> int:
        """Optimizer steps of the linear warm-up."""
        return math.floor(self.optimizer.warmup_epochs * num_images / self.train.batch_size)

    def check_ranks(self, world_size: int) -> None:
        """Refuses what so many ranks cannot do.

        Raises:
            ValueError: they cannot share the batch (`images_per_rank`), or are several and train.compile is set.
        """
        self.images_per_rank(world_size)
        if self.train.compile and world_size > 1:
            raise ValueError(
                f"train.compile=true does not go with {world_size} ranks: DDP's static graph is not for compiled "
                "modules, and batch norms that talk to other ranks break the graph. Set train.compile=false, or "
                "start one process"
            )

    def images_per_rank(self, world_size: int) -> int:
        """Images in one micro-batch of one rank.

        Raises:
            ValueError: the batch does not divide evenly over ranks and micro-batches, or leaves fewer than
                two images to one, with which batch-norm has no statistics.
        """
        parts = world_size * self.train.accumulation
        images, rest = divmod(self.train.batch_size, parts)
        if rest:
            near = max(parts, round(self.train.batch_size / parts) * parts)
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by {world_size} ranks x "
                f"train.accumulation={self.train.accumulation}: use a multiple of {parts}, such as {near}"
            )
        if images < 2:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} leaves {images} image a rank and micro-batch "
                f"({world_size} ranks x accumulation {self.train.accumulation}); batch-norm needs at least 2"
            )
        return images


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a config file and merges overrides into it.

    Args:
        path: YAML file.
        overrides: strings "section.key=value", the value in YAML notation.

    Returns:
        The validated, frozen config.

    Raises:
        ValueError: one message that lists every mistake with its dotted path and, for an unknown key, the
            nearest valid one.
    """
    overrides = overrides or []
    malformed = [text for text in overrides if "=" not in text or text.startswith(("=", "-"))]
    if malformed:
        raise ValueError(f"overrides are written section.key=value, not: {' '.join(malformed)}")
    try:
        parts = [OmegaConf.load(path)]
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist{_nearest_file(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"config file {path} is not a valid YAML mapping: {error}") from None
    for override in overrides:
        try:
            parts.append(OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            raise ValueError(f"override {override}: {error}") from None
    try:
        raw = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"config file {path} with its overrides does not resolve: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"config file {path} holds no settings")
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(mistake) for mistake in error.errors()]
        count = f"{len(lines)} mistake" + "s" * (len(lines) > 1)
        raise ValueError("\n  ".join([f"{path}: {count}", *lines])) from None


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older version wrote, with the defaults of those that were added since.

    A default is what the older version did. Settings that no longer exist are kept, for messages.
    """
    try:
        return Config.model_validate(settings).model_dump(mode="json")
    except ValidationError:
        return settings


def to_yaml(config: Config) -> str:
    """The config as a YAML file that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote, out of a file that anybody may have made since.

    Raises:
        ValueError: one line that lists what this version does not know, or says that this is no such text. What
            would take a reader minutes, gigabytes or its life is refused unread: aliases, more than 200 lists and
            mappings (deeply nested ones overflow libyaml's stack), more than 64 kB.
    """
    collections = 0
    try:
        if len(text) > 1 << 16:
            raise ValueError(f"it has {len(text):,} characters")
        for token in scan(text):
            collections += isinstance(token, _COLLECTIONS)
            if isinstance(token, AliasToken) or collections > 200:
                raise ValueError("it has aliases (*name), or more than 200 lists and mappings")
        settings = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"not a valid YAML mapping: {' '.join(str(error).split())}") from None
    except (AssertionError, RecursionError):  # what omegaconf makes of a bare number, and of 1,000 levels
        raise ValueError("not a valid YAML mapping") from None
    return from_settings(settings)


def from_settings(settings: Any) -> Config:
    """The config out of nested settings, as a checkpoint holds it; a ValueError lists the mistakes in one line."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(mistake) for mistake in error.errors())) from None


def _explain(mistake: Any) -> str:
    """One line for one of pydantic's errors: dotted path, what is wrong, nearest key or the value."""
    where = ".".join(str(part) for part in mistake["loc"])
    what = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if mistake["type"] == "extra_forbidden":
        valid = _valid_keys(mistake["loc"][:-1])
        near = valid if len(mistake["loc"]) > 1 else valid + _dotted_keys()
        close = difflib.get_close_matches(str(mistake["loc"][-1]), near, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"valid here: {', '.join(valid)}"
        return f"{where}: no such setting; {hint}"
    if mistake["type"] == "missing":
        return f"{where}: missing, and it has no default"
    if not where:
        return what
    return f"{where}={mistake['input']!r}: {what}"


def _valid_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys allowed in the section at a path."""
    section: Any = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
    return list(section.model_fields)


def _dotted_keys() -> list[str]:
    """Every section.key: what a key at the top level may have been meant to be."""
    return [f"{section}.{key}" for section in Config.model_fields for key in _valid_keys((section,))]


def _nearest_file(path: Path) -> str:
    """' ; did you mean ...?' for a misspelt config file, or nothing."""
    folder = path.parent if path.parent.is_dir() else Path(__file__).parent
    close = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
    return f"; did you mean {folder / close[0]}?" if close else ""
