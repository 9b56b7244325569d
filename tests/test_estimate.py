"""Memory and time of a run: counted again by torch, and compared with what was measured."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from byolt.configs import estimate, schema
from byolt.files.console import duration
from byolt.files.machine import Device
from byolt.model.byol import make_byol
from byolt.model.resnet import make_encoder

ROOT = Path(__file__).resolve().parent.parent
H200 = Device("cuda", "NVIDIA H200", 140 * 2**30, 16)
CPU = Device("cpu", "AMD EPYC", 16 * 2**30, 2)


def load(name: str, *overrides: str) -> schema.Config:
    return schema.load(ROOT / "configs" / f"{name}.yaml", [*overrides])


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes of all memory, besides the network's own, that autograd keeps for the backward pass."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        network(images)
    own = {t.untyped_storage()._cdata for t in [*network.parameters(), *network.buffers()]}
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in kept.items() if storage not in own)


SMALL = ("resnet8", "resnet8_half", "resnet18")


@pytest.mark.parametrize(
    ("backbone", "stem"),
    [pytest.param(*key, marks=() if key[0] in SMALL else pytest.mark.slow) for key in estimate.COSTS],
)
def test_costs_are_what_torch_counts(backbone: str, stem: str) -> None:
    cost, size = estimate.COSTS[backbone, stem], 96
    with torch.device("meta"):
        network = make_encoder(backbone, stem)
        assert (sum(p.numel() for p in network.parameters()), network.num_features) == cost[:2]
        for dtype, stated in ((torch.float32, cost.bytes32), (torch.bfloat16, cost.bytes16)):
            images = torch.empty(2, 3, size, size, dtype=dtype)
            assert kept_bytes(network.to(dtype), images) / images[:, 0].numel() == pytest.approx(stated, 1e-3)
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
    assert counter.get_total_flops() / size**2 == pytest.approx(cost.flops, 1e-3)


def test_every_backbone_and_stem_has_a_cost() -> None:
    assert len(estimate.COSTS) == len(schema.get_args(schema.Backbone)) * len(schema.get_args(schema.Stem))


def test_memory_is_what_was_measured() -> None:
    """ResNet-50, batch 256, 224 px, bf16: torch's peak on an H200 was 21.5 GiB for the step alone."""
    need = estimate.memory(load("throughput"), "cuda")
    step = need.weights + 256 * need.activations
    assert step / 2**30 == pytest.approx(21.5, rel=0.02)
    model = make_byol(load("throughput", "model.backbone=resnet8").model)
    online, target = (sum(p.numel() for p in n.parameters()) for n in (model.online, model.target))
    need = estimate.memory(load("throughput", "model.backbone=resnet8", "train.precision=fp32"), "cuda")
    assert need.weights == 4 * (3 * online + target)


def test_the_largest_batch_and_the_accumulation_that_fit() -> None:
    config, small = load("r50_100ep"), H200._replace(memory=24 * 2**30)
    assert "does not fit; largest that fits: train.batch_size=1608, or train.accumulation=4" in (
        estimate.memory_line(config, H200, 1)
    )
    assert estimate.fitting_accumulation(config, H200, 8) == 1
    assert estimate.fitting_accumulation(config, small, 8) == 4
    assert "does not fit" not in estimate.memory_line(config, H200, 8)
    tiny = estimate.memory_line(config, H200._replace(memory=2**30), 1)
    assert tiny.endswith("libraries 2.0); no batch fits")
    need = estimate.memory(config, "cuda")
    largest = need.largest(small.memory)
    assert need.total(largest) <= small.memory < need.total(largest + 8) and largest % 8 == 0


def test_time_says_where_its_rate_comes_from() -> None:
    time = estimate.time_line
    config = load("throughput")
    assert time(config, H200, 1, 100) == (
        "about 19 s at 1,411 images/s (measured on one NVIDIA H200, commit 20cdd17)"
    )
    assert "at 11,288 images/s" in time(load("throughput", "train.batch_size=2048"), H200, 8, 100)
    assert "(a step takes at least 60 ms, measured on one NVIDIA H200" in time(config, H200, 8, 100)
    assert time(load("throughput", "model.backbone=resnet18"), H200, 1, 10_000).endswith(
        "(scaled from resnet50 at 224 px, measured on one NVIDIA H200, commit 20cdd17)"
    )
    other = time(config, H200._replace(name="NVIDIA A100"), 1, 19_844)
    assert (
        other == "not yet measured in bf16 on NVIDIA A100; about 1 h 1 min on one NVIDIA H200 for each rank"
    )
    assert (
        time(load("throughput", "train.precision=fp32"), H200, 1, 9)
        == "not yet measured in fp32 on NVIDIA H200"
    )
    assert (
        time(load("quickstart", "train.precision=fp16"), CPU, 1, 9) == "not yet measured in fp16 on AMD EPYC"
    )
    measured = load("quickstart", "model.backbone=resnet8", "augment.size=24")
    two, four = (time(measured, CPU._replace(cores=n), 1, 5000) for n in (2, 4))
    assert two == "about 17 min at 320 images/s (measured on 2 cores of an AMD EPYC 9005)"
    assert four.startswith("about 9 min at 640 images/s")


def test_a_rate_from_cpu_time_is_an_estimate() -> None:
    small = load(
        "own_images", "model.backbone=resnet8", "augment.size=96", "train.batch_size=32", "train.epochs=10"
    )
    assert estimate.time_line(small, CPU, 1, 280) == (
        "about 90 s at 100 images/s (estimated from CPU time on 2 cores of an AMD EPYC 9005)"
    )


def speed(line: str) -> float:
    return float(line.split(" at ")[1].split(" images/s")[0].replace(",", ""))


def test_small_steps_large_heads_and_large_views_are_not_free() -> None:
    small = load("quickstart", "model.stem=imagenet", "train.batch_size=16")
    assert estimate.time_line(small, CPU, 1, 4_000_000).startswith("about 47 h")
    assert "(a step takes at least 43 ms, scaled from resnet8_half at 16 px" in (
        estimate.time_line(small, CPU, 1, 4_000_000)
    )
    quick, wide = (
        speed(estimate.time_line(load("quickstart", *more), CPU, 1, 100))
        for more in ((), ("model.projector_hidden=65536", "model.predictor_hidden=65536"))
    )
    assert quick == 1300 and wide < quick / 5
    assert [estimate._data_seconds(n) for n in (224, 32)] == pytest.approx([2.0e-3, 0.07e-3], rel=0.03)
    faster = speed(estimate.time_line(load("quickstart", "model.stem=imagenet"), CPU._replace(cores=1), 1, 9))
    assert faster < 650 * 24416 / 2648  # as the network alone would be


def test_the_largest_batch_is_at_most_the_data_set() -> None:
    config = load("throughput")
    assert estimate.memory_line(config, H200, 1, 10_000).endswith(
        "; largest that fits: train.batch_size=1608"
    )
    assert estimate.memory_line(config, H200, 1, 1608).endswith("; a batch of all 1,608 images fits")


def test_a_run_that_does_not_fit_begins_with_a_warning() -> None:
    fits, lacks = (
        estimate.expect(load("throughput"), H200._replace(memory=n), 1, 100) for n in (2**36, 2**33)
    )
    assert len(fits) == 1 and fits[0].startswith("NVIDIA H200 with 64 GiB: about 19 s at 1,411 images/s")
    assert lacks[1].startswith("warning: memory: about ") and "train.accumulation=8" in lacks[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (61, "61 s"),
        (118.5, "119 s"),
        (119.5, "2 min"),
        (3600, "1 h 0 min"),
        (3900, "1 h 5 min"),
        (4e5, "5 days"),
        (2e8, "2,315 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_networks_of_timm_are_not_yet_measured() -> None:
    config = load("r50_100ep", "model.backbone=timm:convnext_tiny")
    unknown = "not yet measured for model.backbone=timm:convnext_tiny"
    assert estimate.memory_line(config, H200, 1) == estimate.time_line(config, H200, 1, 100) == unknown
    assert estimate.expect(config, H200, 1, 100) == [f"{H200}: {unknown}"]
    assert estimate.fitting_accumulation(config, H200, 1) == 1
