"""The data pipelines that a BYOL user would otherwise take, each as its own documentation or reference script has it.

Each function takes a Job and yields batches (view 1, view 2) without end: float32 tensors (batch, 3, size, size) on the
CPU, with the augmentation of the BYOL paper (appendix B) as the peer's own operations express it. Libraries are
imported inside: a missing one leaves out its own peer only.
"""

import importlib
import io
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDLESS = 1 << 30  # samples: more than any measurement takes
Views = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """One measurement: the same images in the layouts that peers read, and the shape of the batches."""

    data: str  # class folders of JPEGs
    shards: str  # a WebDataset tar of the same JPEGs
    batch_size: int
    size: int  # side of a view in pixels
    workers: int  # DataLoader processes, or threads
    solo_learn: str = ""  # a checkout of solo-learn


class _Blur:
    """The blur of moco-v3, lightly and solo-learn: PIL's, sigma uniform in [0.1, 2]."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class _Solarize:
    def __call__(self, image: Any) -> Any:
        from PIL import ImageOps

        return ImageOps.solarize(image)


class _Twice:
    """One input, two views."""

    def __init__(self, first: Callable[[Any], Tensor], second: Callable[[Any], Tensor]) -> None:
        self.first, self.second = first, second

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.first(image), self.second(image)


def _pil_views(size: int) -> _Twice:
    """The augmentations of moco-v3's main_moco.py, which follow BYOL's."""
    from torchvision import transforms as T

    def view(blur: float, solarize: float) -> Any:
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.08, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([_Blur()], p=blur),
                *([T.RandomApply([_Solarize()], p=solarize)] if solarize else []),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    return _Twice(view(1.0, 0.0), view(0.1, 0.2))


def _image_folder(transform: Any, job: Job) -> Views:
    """ImageFolder and DataLoader, as the reference scripts of moco-v3 and lightly use them."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(job.data, transform)
    sampler = RandomSampler(dataset, num_samples=ENDLESS)
    for views, _ in DataLoader(dataset, job.batch_size, sampler=sampler, num_workers=job.workers):
        yield views[0], views[1]


def _webdataset(transform: Callable[[bytes], tuple[Tensor, Tensor]], job: Job) -> Views:
    import webdataset as wds

    dataset = wds.WebDataset(job.shards, resampled=True, shardshuffle=False).shuffle(200)
    dataset = dataset.map(lambda sample: transform(sample["jpg"])).batched(job.batch_size, partial=False)
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=job.workers)


def mocov3(job: Job) -> Views:
    """PIL images, torchvision v1 transforms."""
    return _image_folder(_pil_views(job.size), job)


def lightly(job: Job) -> Views:
    """lightly's BYOLTransform with its defaults."""
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    views = BYOLTransform(BYOLView1Transform(job.size), BYOLView2Transform(job.size))
    return _image_folder(views, job)


def wds_pil(job: Job) -> Views:
    """As mocov3, from tar files."""
    both = _pil_views(job.size)

    def views(data: bytes) -> tuple[Tensor, Tensor]:
        from PIL import Image

        return both(Image.open(io.BytesIO(data)).convert("RGB"))

    return _webdataset(views, job)


def wds_v2(job: Job) -> Views:
    """Tar files, torchvision.io.decode_jpeg, torchvision v2 on uint8 tensors."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> Any:
        return v2.Compose(
            [
                v2.RandomResizedCrop(job.size, scale=(0.08, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur),
                *([v2.RandomSolarize(128, p=solarize)] if solarize else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    both = _Twice(view(1.0, 0.0), view(0.1, 0.2))

    def views(data: bytes) -> tuple[Tensor, Tensor]:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return both(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    return _webdataset(views, job)


def kornia(job: Job) -> Views:
    """Crops by torchvision in the workers, without which images make no batch; kornia on whole batches."""
    import kornia.augmentation as K
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> Any:
        return K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=blur),
            *([K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=solarize)] if solarize else []),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
            data_keys=["input"],
        )

    crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(job.size, scale=(0.08, 1.0), antialias=True)])
    first, second = view(1.0, 0.0), view(0.1, 0.2)
    torch.set_num_threads(job.workers)
    with torch.inference_mode():
        for one, two in _image_folder(_Twice(crop, crop), job):
            yield first(one.float().div_(255)), second(two.float().div_(255))


def solo_learn(job: Job) -> Views:
    """solo-learn's own augmentation (asymmetric.yaml), dataset and DataLoader, out of a checkout."""
    from omegaconf import OmegaConf

    if not Path(job.solo_learn, "solo").is_dir():
        raise ImportError("give --solo-learn CHECKOUT, a clone of github.com/vturrisi/solo-learn")
    sys.path.insert(0, job.solo_learn)
    for package in (
        "solo",
        "solo.data",
        "solo.utils",
    ):  # their __init__ imports all methods and their libraries
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(Path(job.solo_learn, *package.split(".")))]
    solo = importlib.import_module("solo.data.pretrain_dataloader")

    def view(blur: float, solarize: float) -> Any:
        settings = {
            "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
            "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
            "grayscale": {"prob": 0.2},
            "gaussian_blur": {"prob": blur},
            "solarization": {"prob": solarize},
            "equalization": {"prob": 0.0},
            "horizontal_flip": {"prob": 0.5},
            "crop_size": job.size,
        }
        return solo.build_transform_pipeline("imagenet", OmegaConf.create(settings))

    views = solo.prepare_n_crop_transform([view(1.0, 0.0), view(0.1, 0.2)], [1, 1])
    dataset = solo.prepare_datasets("imagenet", views, train_data_path=job.data)
    while True:
        for _, (first, second), _ in solo.prepare_dataloader(dataset, job.batch_size, job.workers):
            yield first, second


PEERS: dict[str, Callable[[Job], Views]] = {
    "mocov3": mocov3,
    "lightly": lightly,
    "wds-pil": wds_pil,
    "wds-v2": wds_v2,
    "kornia": kornia,
    "solo-learn": solo_learn,
}
