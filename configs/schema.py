"""Declares every setting once, with its type, range, unit and source.

`load` reads a YAML file, merges `key=value` overrides and returns a frozen `Config`, or lists all mistakes. The module
imports neither torch nor numpy, so it refuses a wrong config in well under a second.
"""

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from yaml import AliasEvent, CollectionStartEvent, YAMLError, parse

from byolt.files.console import count
from byolt.files.machine import cores_per_rank
from byolt.files.paths import expand_home, hide_secrets, local_path
from byolt.files.regular import open_regular


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"the lower bound {interval[0]} is above the upper bound {interval[1]}")
    return interval


def _project(name: str) -> str:
    if not re.fullmatch(r"([^/\\#?%:]{1,128}/)?[^/\\#?%:]{1,128}", name):
        raise ValueError(
            "must be PROJECT or ENTITY/PROJECT, of up to 128 characters each, without \\ # ? % :"
        )
    return name


def _bucket(url: str) -> str:
    if not re.fullmatch(r"(s3|gs|az)://[\w.-]+(/[^?#;@]*)?", url):
        raise ValueError(
            "must be a folder in object storage, as s3://bucket/folder (s3, gs or az), without a password or query"
        )
    return url.rstrip("/")


def _or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value if value == "auto" else validate(value)


T = TypeVar("T")
# A setting that may be "auto" until `derived.decide` puts a value of type T in its place, at the start of a run.
OrAuto = Annotated[T, WrapValidator(_or_auto), PlainSerializer(lambda value: value)]
PathText = Annotated[str, AfterValidator(expand_home)]
LocalPath = Annotated[str, AfterValidator(local_path)]  # to write
BucketURL = Annotated[str, AfterValidator(_bucket)]
ProjectName = Annotated[str, AfterValidator(_project)]
Probability = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(ge=1e-6, le=1e6)]
_Offset = Annotated[float, Field(ge=-1e6, le=1e6)]
_Count = Annotated[int, Field(ge=1, le=2**40)]
_Width = Annotated[int, Field(ge=1, le=2**16)]
PositiveInterval = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]
_Fraction = Annotated[float, Field(gt=0, le=1)]
FractionInterval = Annotated[tuple[_Fraction, _Fraction], AfterValidator(_ordered)]
Profile = Literal["byol", "torchvision"]
Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnet8", "resnet8_half"
]
TIMM = "timm:"  # begins the name of a backbone that timm builds


def _backbone(name: Any) -> Any:
    """Accepts a name of `Backbone`, or timm:NAME; only timm itself knows its names."""
    of_timm = isinstance(name, str) and re.fullmatch(rf"{TIMM}[\w.]{{1,128}}", name, re.A)
    if of_timm or name in get_args(Backbone):
        return name
    names = ", ".join(map(repr, get_args(Backbone)))
    raise PydanticKnownError("literal_error", {"expected": f"{names} or 'timm:NAME'"})


BackboneName = Annotated[str, BeforeValidator(_backbone)]
Stem = Literal["imagenet", "cifar"]
UpdateBackend = Literal["auto", "triton", "foreach", "apex"]
Trust = Literal["scale", "clip"]


class Section(BaseModel):
    """A group of settings. It refuses unknown keys; its values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Section):
    path: PathText
    """Training images: a folder made by tools/make_shards.py, a folder of images, FFCV .beton files separated by
    commas, synthetic:COUNT:HxW, or shards at a URL (s3, gs, az, https; docs/remote.md)."""
    expected_images: _Count | None = None
    """Number of images that the recipe was written for. A data set of another size is used with a warning. Where the
    data set is missing, --print-config derives the number of steps from this setting."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """Library that decodes and augments: DALI, or plain torch (slow). auto: DALI if it is installed."""
    resident: Literal["auto", "always", "never"] = "auto"
    """Keep all images decoded in memory. auto: if no image is larger than 96 px and all fit in 4 GiB. Not available
    with data.backend=torch, which decodes an image for every view."""
    order: Literal["full", "block", "lanes"] = "full"
    """Order of samples. full: a permutation of the data set. block: long consecutive reads, shuffled within windows of
    16,384 samples. lanes: the same in gcd(batch_size, 64) lanes, a window of up to 131,072 samples, in which each rank
    reads its own part of the data set (pipelines/order.py)."""
    threads: Annotated[int, Field(ge=1, le=256, default_factory=lambda: min(cores_per_rank(), 256))]
    """CPU threads per rank that decode and, without a GPU, augment; no number depends on them. Default: the cores that
    the process may use, divided by the ranks on its machine."""
    hw_decoder_load: Probability = 1.0
    """Fraction of a batch's JPEGs that nvJPEG decodes on the GPU's JPEG engine; CUDA kernels decode the rest. Below 1.0
    an image's pixels may depend on its place in the batch, by at most one level of 255. On one H200 0.65 decoded 12,338
    images/s and 1.0 decoded 8,291. No effect on a CPU or on images kept in memory."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    """Micro-batches per rank prepared ahead of the training step; a step uses train.accumulation of them."""
    max_pixels: Annotated[int, Field(ge=1, le=2**27)] = 2**26
    """Largest height x width of an image that is decoded; its pixels take 3 bytes each. Larger images count as
    undecodable. ImageNet's largest image has 61 million pixels."""
    max_corrupt: Annotated[int, Field(ge=0, le=2**40)] = 100
    """Number of different undecodable images that a rank tolerates. It replaces each by the next valid image and lists
    it in corrupt.jsonl; one more stops the run."""
    cache: LocalPath | None = None
    """Folder on a local disk for what is read from a URL; runs may share it. null: byolt in $XDG_CACHE_HOME, which is
    ~/.cache by default."""
    cache_gb: Annotated[float, Field(gt=0, le=1e6)] = 200
    """Largest size of data.cache in GB; the files used least recently are removed. ImageNet has 140 GB."""
    connections: Annotated[int, Field(ge=1, le=256)] = 8
    """Parallel requests per rank to the server of a URL, of about 8 MB each."""
    remote_minutes: Annotated[float, Field(gt=0, le=1e6)] = 8
    """How long a request to the server of a URL is repeated before the run stops. With several ranks it must be below
    train.timeout_minutes, after which the others give up the waiting one."""

    @property
    def on_demand(self) -> "DataConfig":
        """These settings for reading a few images: data at a URL is then not copied as a whole."""
        return self.model_copy(update={"order": "block"})


class ViewConfig(Section):
    """Distribution of a view's augmentation. Defaults: values common to both views (paper, appendix B, table 6)."""

    crop_area: FractionInterval = (0.08, 1.0)
    """Area of the crop as a fraction of the image, uniform."""
    crop_ratio: PositiveInterval = (3 / 4, 4 / 3)
    """Width / height of the crop, log-uniform."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability that the four color operations below are applied, in random order."""
    brightness: Probability = 0.4
    """Adds U(-b, b) to all pixels (range [0, 1]). Profile torchvision: multiplies them by U(1 - b, 1 + b)."""
    contrast: Probability = 0.4
    """Scales the distance to each channel's mean by U(1 - c, 1 + c). torchvision: to the mean of the gray image."""
    saturation: Probability = 0.2
    """Scales the saturation in HSV by U(1 - s, 1 + s). torchvision: the distance to the gray image."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Adds U(-h, h) of a full turn to the hue in HSV."""
    gray: Probability = 0.2
    """Probability of conversion to gray, independent of the jitter."""
    blur: Probability
    """Probability of a Gaussian blur (paper: 1.0 for view 1, 0.1 for view 2)."""
    blur_sigma: PositiveInterval = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform."""
    solarize: Probability
    """Probability of solarization at 0.5 (paper: 0.0 for view 1, 0.2 for view 2)."""


class AugmentConfig(Section):
    profile: Profile = "byol"
    """Definition of the operations. byol: the reference implementation's (byol/utils/augmentations.py). torchvision:
    transforms.v2's, as in solo-learn and lightly: RandomResizedCrop with 10 tries and antialias, ColorJitter."""
    size: OrAuto[Annotated[int, Field(ge=8, le=1024)]] = 224
    """Side of a view in pixels."""
    mean: tuple[_Offset, _Offset, _Offset] = (0.485, 0.456, 0.406)
    """Subtracted from each channel after augmentation (ImageNet; range [0, 1])."""
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)
    """Divides each channel after the subtraction (ImageNet)."""
    view1: ViewConfig
    """Distribution T of the paper."""
    view2: ViewConfig
    """Distribution T' of the paper."""

    @property
    def blur_taps(self) -> int:
        """Taps of the blur kernel: 2 * int(size / 10 / 2) + 1, as in the reference (23 at 224, 3 at 32)."""
        return 2 * int(self.size / 10 / 2) + 1


class ModelConfig(Section):
    backbone: OrAuto[BackboneName] = "resnet50"
    """Encoder: a torchvision network, or for small images on a CPU resnet8 (0.3 M parameters) or resnet8_half (half as
    wide, 0.08 M). timm:NAME: any model of timm that pools its features to a vector (pip install -e '.[timm]')."""
    stem: Stem = "imagenet"
    """First layers. imagenet: 7x7 convolution of stride 2, max-pool. cifar: 3x3 convolution of stride 1, no max-pool,
    for images of about 32 px. The models of timm have stems of their own."""
    init_from: PathText | None = None
    """File of weights with which the encoder of a new run begins: an encoder.safetensors or checkpoint of a run, or a
    state_dict of torchvision or timm (docs/recipes.md). A resumed run does not read it. null: random weights."""
    projector_hidden: _Width = 4096
    """Width of the projector's hidden layer (paper, section 3.3)."""
    projector_size: Annotated[int, Field(ge=2, le=2**14)] = 256
    """Dimension of projections and predictions (paper, section 3.3)."""
    predictor_hidden: _Width = 4096
    """Width of the predictor's hidden layer (paper, section 3.3)."""
    predictor: bool = True
    """false: the projection is the prediction, an ablation that collapses (paper, table 5b)."""


class OptimizerConfig(Section):
    base_lr: OrAuto[Annotated[float, Field(ge=0, le=1e6)]]
    """Learning rate at a batch of 256; the peak is base_lr * batch_size / 256."""
    warmup_epochs: OrAuto[Annotated[float, Field(ge=0, le=1e6)]] = 10
    """Length of the linear warm-up from 0; then a cosine to 0 (paper, section 3.3)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Heavy-ball momentum of LARS (reference: 0.9)."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)]
    """Weight decay (wd); not applied to biases and batch-norm parameters unless decay_all is set."""
    decay_all: bool = False
    """Apply the weight decay to biases and batch-norm parameters, too (lightly's CIFAR benchmark does)."""
    trust: Trust = "scale"
    """scale: LARS multiplies the update g + wd p of a weight tensor p by eta |p| / |g + wd p| (reference). clip: by
    min(eta |p| / (|g| + wd |p|) / lr, 1), which caps the step only (solo-learn's clip_lr)."""
    trust_coefficient: _Positive = 1e-3
    """eta of LARS (reference: 1e-3; solo-learn with clip: 0.02)."""
    backend: UpdateBackend = "auto"
    """Kernels of the update: triton fuses LARS, EMA and the finite check (CUDA only), foreach is torch's multi-tensor
    operations, apex is NVIDIA's amp_C, built from source. auto: triton on CUDA, foreach elsewhere."""
    base_tau: Probability
    """tau of the target's moving average at step 0."""
    tau_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: tau rises to 1 at the end (paper, section 3.3). constant: for ablations."""


class TrainConfig(Section):
    epochs: OrAuto[Annotated[float, Field(gt=0, le=1e6)]]
    """Length of the run in passes over the data set: int(epochs * images / batch_size) steps, as in the reference."""
    batch_size: OrAuto[Annotated[int, Field(ge=2, le=2**24)]]
    """Images per optimizer step over all ranks."""
    accumulation: OrAuto[Annotated[int, Field(ge=1, le=2**24)]] = 1
    """Micro-batches per optimizer step. Batch norm's statistics are those of a micro-batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    channels_last: bool = True
    """Stores weights and activations in NHWC order, in which tensor cores convolve faster."""
    compile: bool = False
    """Runs both networks through torch.compile; for a single process only."""
    cuda_graph: Literal["auto", True, False] = "auto"
    """true launches each step as one CUDA graph, which frees the host: one CUDA device, optimizer.backend=triton, no
    fp16, no train.compile. Not yet run on a GPU, so auto is false for now."""
    deterministic: bool = False
    """Every run on the same machine gives the same weights to the bit, at some cost in speed: on a GPU, torch uses
    deterministic algorithms only (cost not yet measured). Runs on a CPU are deterministic in either case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: each rank's own GPU if there is one, else the CPU."""
    stop_at_step: _Count | None = None
    """Ends the run after this many steps in total, with a checkpoint. The schedules still span all epochs."""
    timeout_minutes: Annotated[float, Field(gt=0, le=1e6)] = 10
    """Longest time that a rank waits for the others before it fails."""
    on_collapse: Literal["ignore", "warn", "stop"] = "warn"
    """Reaction if the target's projections are almost equal for all samples (train.collapse_std)."""
    collapse_std: Probability = 0.01
    """The projections count as collapsed if their standard deviation over samples is below this fraction of
    1/sqrt(projector_size), its value on the whole sphere. Checked at every row of metrics.jsonl."""

    def precision_on(self, kind: str) -> str:
        """`precision` on a "cpu" or "cuda" device, with auto resolved."""
        if self.precision == "auto":
            return "bf16" if kind == "cuda" else "fp32"
        return self.precision


class EvalConfig(Section):
    path: PathText | None = None
    """Labeled images for kNN accuracy. The bank is data.path, which must be labeled too. null: no kNN."""
    every_epochs: Annotated[float, Field(gt=0, le=1e6)] = 10
    """Epochs between two measurements of kNN accuracy, which is also measured before the first step and at the end."""
    k: _Count = 200
    """Number of neighbors that vote, clamped to the size of the bank."""
    temperature: _Positive = 0.1
    """A neighbor's vote has the weight exp(cosine / temperature)."""
    max_images: _Count = 50_000
    """Largest number of images used of each split, evenly spaced."""
    online_probe: bool = True
    """Trains a linear classifier on the detached features of view 1 if data.path is labeled (reference:
    byol_experiment.py). Its accuracy on each batch before the update is probe_top1 in the metrics."""


class RunConfig(Section):
    out: LocalPath
    """Folder for checkpoints, metrics, pictures and the exported encoder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the sample order and every augmentation."""
    log_every: _Count = 50
    """Steps between two rows of metrics.jsonl and TensorBoard, which are also lines of output. Steps 1, 2, 5 and 10,
    where they come before the first of these, have rows too."""
    wandb: ProjectName | None = None
    """Project, or ENTITY/PROJECT, at Weights & Biases that also gets the rows of metrics.jsonl (pip install -e
    '.[wandb]'). Log in with wandb login or WANDB_API_KEY; WANDB_MODE=offline records to run.out/wandb. Its failures
    only print warnings. A resumed run continues the same one there."""
    checkpoint_minutes: Annotated[float, Field(ge=0, le=1e6)] = 15
    """Minutes between two checkpoints. One is also written on a signal and at the end."""
    keep_checkpoints: _Count = 3
    """Number of newest checkpoints that are kept."""
    mirror: BucketURL | None = None
    """URL, as s3://bucket/folder, to which rank 0 copies checkpoints, metrics and the encoder in the background (pip
    install -e '.[remote]'); --resume auto continues from there if run.out has no checkpoint as new. Its failures only
    print warnings (docs/remote.md)."""
    on_write_error: Literal["stop", "continue"] = "stop"
    """Reaction to a checkpoint, a row of metrics.jsonl or a views.png that cannot be written, as on a full disk: stops
    the run, or only logs a warning. The run's last checkpoint and its encoder must be written in either case."""


class Config(Section):
    """All settings of a run.

    Settings of the type `OrAuto` may be "auto" in a config file; `derived.decide` replaces them before the run begins.
    """

    run: RunConfig
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        train, warmup = self.train, self.optimizer.warmup_epochs
        if "auto" not in (train.batch_size, train.accumulation) and train.batch_size % train.accumulation:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by "
                f"train.accumulation={self.train.accumulation}: change one of the two"
            )
        if "auto" not in (warmup, train.epochs) and warmup >= train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs={self.optimizer.warmup_epochs:g} leaves nothing of "
                f"train.epochs={self.train.epochs:g}: shorten the warm-up"
            )
        if self.model.backbone.startswith(TIMM) and self.model.stem != "imagenet":
            raise ValueError(
                f"model.stem={self.model.stem}: timm builds the stem of model.backbone={self.model.backbone}: set "
                "model.stem=imagenet"
            )
        if self.data.backend == "torch" and self.data.resident == "always":
            raise ValueError(
                "data.resident=always: data.backend=torch keeps no images in memory: set data.backend=auto or "
                "data.resident=auto"
            )
        return self

    @property
    def undecided(self) -> list[str]:
        """Dotted keys of the settings that are still "auto"."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return [
            f"{name}.{key}"
            for name, section in sections
            for key, field in type(section).model_fields.items()
            if getattr(section, key) == "auto" and any(isinstance(m, WrapValidator) for m in field.metadata)
        ]

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: base_lr * batch_size / 256."""
        return self.optimizer.base_lr * self.train.batch_size / 256

    def total_steps(self, num_images: int) -> int:
        """Optimizer steps of the whole run: int(epochs * images / batch), as in the reference."""
        return math.floor(self.train.epochs * num_images / self.train.batch_size)

    def check_steps(self, num_images: int) -> None:
        """Raises ValueError if the run would have no step."""
        if self.total_steps(num_images) < 1:
            raise ValueError(
                f"train.epochs={self.train.epochs:g} is less than one step, which takes train.batch_size="
                f"{self.train.batch_size} of {num_images} images: raise the first, or lower the second"
            )

    def warmup_steps(self, num_images: int) -> int:
        """Optimizer steps of the linear warm-up."""
        return math.floor(self.optimizer.warmup_epochs * num_images / self.train.batch_size)

    def check_ranks(self, world_size: int) -> None:
        """Refuses settings that do not fit the number of ranks.

        Raises:
            ValueError: the ranks cannot share the batch (`images_per_rank`), or several have train.compile set, or
                would give up one that repeats a request.
        """
        if "auto" not in (self.train.batch_size, self.train.accumulation):
            self.images_per_rank(world_size)
        remote, timeout = self.data.remote_minutes, self.train.timeout_minutes
        if world_size > 1 and ("://" in self.data.path or self.run.mirror) and remote >= timeout:
            raise ValueError(
                f"data.remote_minutes={remote:g} must be below train.timeout_minutes={timeout:g}: {world_size} ranks "
                "would give up one that still repeats a request. Lower the first, or raise the second"
            )
        if self.train.compile and world_size > 1:
            raise ValueError(
                f"train.compile=true does not work with {world_size} ranks: DDP's static graph excludes compiled "
                "modules, and synchronized batch norm breaks the graph. Set train.compile=false, or start one process"
            )

    def images_per_rank(self, world_size: int) -> int:
        """Images in one micro-batch of one rank.

        Raises:
            ValueError: the batch does not divide evenly over ranks and micro-batches, or leaves one fewer than the two
                images that batch norm needs.
        """
        parts = world_size * self.train.accumulation
        images, rest = divmod(self.train.batch_size, parts)
        if rest:
            near = max(parts, round(self.train.batch_size / parts) * parts)
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by {world_size} ranks x "
                f"train.accumulation={self.train.accumulation}: use a multiple of {parts}, for example {near}"
                f"{self._nearest_ranks(world_size)}"
            )
        if images < 2:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} leaves {images} image per rank and micro-batch "
                f"({world_size} ranks x accumulation {self.train.accumulation}): batch norm needs at least 2: raise it"
                f"{self._nearest_ranks(world_size)}"
            )
        return images

    def _nearest_ranks(self, world_size: int) -> str:
        """Text ", or start 4 or 8 ranks": the next smaller and larger numbers of ranks that can share the batch."""
        micro = self.train.batch_size // self.train.accumulation  # images of all ranks
        fit = [size for size in range(1, micro // 2 + 1) if micro % size == 0]
        near = [
            max((n for n in fit if n < world_size), default=0),
            min((n for n in fit if n > world_size), default=0),
        ]
        found = " or ".join(str(size) for size in near if size)
        return f", or start {found} ranks" if found else ""


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a config file and merges overrides into it.

    Args:
        path: YAML file, or the name of a shipped recipe, r50_100ep for configs/r50_100ep.yaml.
        overrides: strings "section.key=value", the value in YAML notation. For a path everything after the first "="
            is the value; only null, where it is allowed, and ${...} keep their meaning.

    Raises:
        ValueError: one message that lists every mistake with its dotted path and, for an unknown key, the nearest
            valid one.
    """
    overrides = overrides or []
    malformed = [text for text in overrides if "=" not in text or text.startswith(("=", "-"))]
    if malformed:
        raise ValueError(f"overrides must be written section.key=value, not: {' '.join(malformed)}")
    if not os.path.isfile(path) and os.fspath(path) in _recipes():
        path = _RECIPES / f"{path}.yaml"
    failed = f"config file {path} is not a valid YAML mapping"
    try:
        with open(path, encoding="utf-8", opener=open_regular) as file:
            _check_events(file, aliases=True)
            file.seek(0)
            parts = [OmegaConf.load(file)]
        for override in overrides:
            failed = f"override {override[:200]}"
            parts.append(_parse_override(override))
        failed = f"config file {path} and its overrides do not resolve"
        raw = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist{_nearest_file(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{failed}: {error}") from None
    except RecursionError:
        raise ValueError(f"{failed}: it is nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError(f"config file {path} has no settings")
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(mistake) for mistake in error.errors()]
        head = f"{_origin(path, overrides, error)}: {count(len(lines), 'mistake')}"
        raise ValueError("\n  ".join([head, *lines])) from None


def _origin(path: str | Path, overrides: list[str], error: ValidationError) -> str:
    """The file, the overrides, or both: where the mistakes are."""
    keys = [override.partition("=")[0] + "." for override in overrides]
    # "." for settings that do not fit together.
    places = [".".join(map(str, mistake["loc"])) + "." for mistake in error.errors()]
    overridden = [any(k.startswith(place) or place.startswith(k) for k in keys) for place in places]
    if all(overridden):
        return f"overrides of {path}"
    return f"{path} and its overrides" if any(overridden) or (keys and "." in places) else str(path)


def _parse_override(override: str) -> DictConfig:
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    field = getattr(Config.model_fields.get(section), "annotation", None)
    field = getattr(field, "model_fields", {}).get(name)
    types = (field.annotation, *get_args(field.annotation)) if field else ()
    if not {str, PathText, LocalPath, ProjectName} & set(types) or (value == "null" and type(None) in types):
        _check_events(value, aliases=True)
        return OmegaConf.from_dotlist([override])
    if not value and ProjectName not in types:
        raise ValueError("a path cannot be empty")
    return OmegaConf.create({section: {name: value}})


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds to the settings of an older version the defaults of those that were added since.

    A default keeps the older version's behavior. Settings that no longer exist are kept, for messages.
    """
    try:
        return Config.model_validate(settings).model_dump(mode="json")
    except ValidationError:
        return settings


def to_yaml(config: Config, secrets: bool = True) -> str:
    """The config as YAML text, from which `load` makes an equal one; without `secrets` those of URLs are ***."""
    settings = config.model_dump(mode="json")
    return OmegaConf.to_yaml(OmegaConf.create(settings if secrets else hide_secrets(settings)))


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote, from a file that anybody may have changed.

    Raises:
        ValueError: one line that lists all mistakes. Text that would exhaust memory or libyaml's stack is refused
            unread: aliases, more than 200 lists and mappings, more than 64 kB.
    """
    try:
        if len(text) > 1 << 16:
            raise ValueError(f"it has {len(text):,} characters")
        _check_events(text, aliases=False)
        settings = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"not a valid YAML mapping: {' '.join(str(error).split())}") from None
    except (AssertionError, RecursionError):  # from OmegaConf: a bare number, 1,000 levels
        raise ValueError("not a valid YAML mapping") from None
    return from_settings(settings)


def _check_events(text: str | TextIO, *, aliases: bool) -> None:
    """Refuses YAML that would exhaust memory or libyaml's stack, which ends the process."""
    collections = 0
    for event in parse(text):
        collections += isinstance(event, CollectionStartEvent)
        if collections > 200 or (isinstance(event, AliasEvent) and not aliases):
            raise ValueError(
                "it has more than 200 lists and mappings" + " or aliases (*name)" * (not aliases)
            )


def from_settings(settings: Any) -> Config:
    """The config from nested settings, as a checkpoint holds them; a ValueError lists the mistakes in one line."""
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(mistake) for mistake in error.errors())) from None
    if config.undecided:
        raise ValueError(f"{', '.join(config.undecided)}: auto is for config files only: set a value")
    return config


_REASONS = {  # by pydantic's type of error
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a path",  # or the name of a project: the only settings that are text
    "tuple_type": "must be a list",
    "too_long": "must have {max_length} numbers",
    "model_type": "must be a mapping of settings",
}


def _explain(mistake: Any) -> str:
    """One line for one of pydantic's errors: dotted path, value, and the bound or the nearest key."""
    where = ".".join(str(part) for part in mistake["loc"])
    context = mistake.get("ctx", {})
    if mistake["type"] == "extra_forbidden":
        valid = _valid_keys(mistake["loc"][:-1])
        near = valid if len(mistake["loc"]) > 1 else valid + dotted_keys()
        close = difflib.get_close_matches(str(mistake["loc"][-1]), near, n=1, cutoff=0.4)
        hint = (
            f"did you mean {'.'.join([*map(str, mistake['loc'][:-1]), close[0]])}?"
            if close
            else f"valid here: {', '.join(valid)}"
        )
        return f"{where}: no such setting; {hint}"
    if mistake["type"] == "missing":
        return f"{where}: missing, and it has no default"
    value = hide_secrets(mistake["input"])
    setting = f"{where}={'null' if value is None else repr(value)}" if where else "the file"
    if reason := _REASONS.get(mistake["type"]):
        numbers = {key: f"{x:.15g}" if isinstance(x, float) else x for key, x in context.items()}
        return f"{setting} {reason.format(**numbers)}"
    reason = str(context.get("error", mistake["msg"]))  # of a validator above, or pydantic's sentence
    return f"{setting}: {reason}" if where else reason


def _valid_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a path."""
    section: Any = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
    return list(section.model_fields)


def dotted_keys() -> list[str]:
    """Every section.key, as suggestions for an unknown one."""
    return [f"{section}.{key}" for section in Config.model_fields for key in _valid_keys((section,))]


_RECIPES = Path(__file__).resolve().parent


def _recipes() -> dict[str, str]:
    """The shipped recipes: `load` takes their names."""
    return {path.stem: path.stem for path in _RECIPES.glob("*.yaml")}


def _nearest_file(path: Path) -> str:
    """ "; did you mean ...?" for a misspelled config file or recipe, or ""."""
    known = _recipes() | {beside.stem: str(beside) for beside in path.parent.glob("*.yaml")}
    close = difflib.get_close_matches(path.stem, known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else ""
