"""The networks' structure, initialization and loss."""

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from byolt.model.byol import BYOL, MLP, Predictions, byol_loss, regression_loss
from byolt.model.resnet import BACKBONES, RESNET8_WIDTHS, make_encoder


def _small() -> BYOL:
    torch.manual_seed(0)
    return BYOL(make_encoder("resnet8", "cifar"), projector_hidden=16, projector_size=8, predictor_hidden=16)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in RESNET8_WIDTHS])
def test_encoder_has_torchvisions_keys_and_shapes(backbone: str, stem: str) -> None:
    with torch.device("meta"):
        encoder = make_encoder(backbone, stem)
        reference = torchvision.models.get_model(backbone, weights=None)
        features = encoder(torch.empty(2, 3, 64, 64))
    assert features.shape == (2, reference.fc.in_features)
    assert encoder.num_features == reference.fc.in_features
    ours = {key: value.shape for key, value in encoder.state_dict().items()}
    theirs = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    if stem == "cifar":
        theirs["conv1.weight"] = torch.Size([64, 3, 3, 3])
    assert ours == theirs


def test_torchvision_weights_give_torchvisions_features() -> None:
    torch.manual_seed(0)
    reference, encoder = torchvision.models.resnet18(weights=None), make_encoder("resnet18", "imagenet")
    missing = encoder.load_state_dict(reference.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert sorted(missing.unexpected_keys) == ["fc.bias", "fc.weight"]
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(images), reference.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(("stem", "map_size"), [("cifar", 8), ("imagenet", 2)])
@pytest.mark.parametrize(
    ("backbone", "features", "parameters"), [("resnet8", 128, 307_360), ("resnet8_half", 64, 77_392)]
)
def test_resnet8(backbone: str, features: int, parameters: int, stem: str, map_size: int) -> None:
    encoder: Any = make_encoder(backbone, stem)
    sizes = []
    encoder.layer3.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape)))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, features) == (2, encoder.num_features)
    assert sizes == [(2, features, map_size, map_size)]
    if stem == "cifar":
        assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert {name.split(".")[0] for name in encoder.state_dict()} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
    }


def test_initialization_is_the_references() -> None:
    torch.manual_seed(0)
    encoder: Any = make_encoder("resnet50", "imagenet")
    # A normal cut at two deviations keeps .8796 of its deviation.
    for layer, fan_in in ((encoder.layer3[1].conv2, 256 * 9), (encoder.layer4[0].conv1, 1024)):
        assert layer.weight.std().item() * math.sqrt(fan_in) == pytest.approx(0.8796, rel=0.01)
        assert layer.weight.abs().max().item() <= 2 / math.sqrt(fan_in)
    blocks = [block for stage in (encoder.layer1, encoder.layer4) for block in stage]
    assert all(
        block.bn3.weight.count_nonzero() == 0 and bool((block.bn2.weight == 1).all()) for block in blocks
    )
    basic: Any = make_encoder("resnet18", "cifar")
    assert bool((basic.layer1[0].bn2.weight == 1).all())
    mlp: Any = MLP(400, 600, 5)
    assert mlp[0].bias.count_nonzero() == 0
    assert mlp[0].weight.std().item() * math.sqrt(400) == pytest.approx(0.8796, rel=0.01)


def test_batch_norm_settings() -> None:
    norms = [m for m in _small().modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-5)}


def test_mlp_is_linear_norm_relu_linear() -> None:
    torch.manual_seed(0)
    mlp = MLP(3, 5, 2)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(5, 3), (5,), (5,), (5,), (2, 5)]
    x = torch.randn(7, 3)
    w1, b1, gamma, beta, w2 = (p.detach().normal_() for p in mlp.parameters())
    hidden = x @ w1.T + b1
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt() * gamma + beta
    torch.testing.assert_close(mlp(x), hidden.clamp_min(0) @ w2.T, rtol=1e-5, atol=1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'resnet51' is unknown.*resnet50"):
        make_encoder("resnet51", "cifar")
    with pytest.raises(ValueError, match=r"'patch' is unknown.*cifar"):
        make_encoder("resnet50", "patch")


def test_regression_loss_of_known_angles() -> None:
    a = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-3.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(regression_loss(a, b), torch.tensor([0.0, 2.0, 4.0, 2 - math.sqrt(2)]))


def test_regression_loss_is_two_minus_two_cosines_in_float32_for_every_dtype() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 16), torch.randn(50, 16)
    expected = 2 - 2 * torch.cosine_similarity(a.double(), b.double())
    torch.testing.assert_close(regression_loss(a, b).double(), expected, rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = regression_loss(a.to(dtype), b.to(dtype))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.02)


def test_regression_loss_stays_finite_at_zero() -> None:
    a = torch.zeros(2, 4, requires_grad=True)
    loss = regression_loss(a, torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0]
    assert a.grad is not None
    assert bool(a.grad.isfinite().all())


def test_byol_loss_crosses_the_views_and_sums_both_directions() -> None:
    x, y, minus = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 0.0]])
    assert byol_loss(Predictions(x, y, x), y, x).item() == pytest.approx(0.0)
    assert byol_loss(Predictions(x, y, x), x, y).item() == pytest.approx(4.0)
    assert byol_loss(Predictions(x, y, x), y, minus).item() == pytest.approx(4.0)
    rows = Predictions(x.expand(2, 2), torch.cat([y, x]), x)
    assert byol_loss(rows, torch.cat([x, x]), torch.cat([x, x])).item() == pytest.approx((2.0 + 0.0) / 2)


def test_the_target_starts_equal_shares_nothing_and_has_no_gradient() -> None:
    model = _small()
    target, online = model.ema_parameters()
    names = [name for name, _ in model.target.named_parameters()]
    assert len(target) == len(online) == len(names) == len(list(model.target.parameters()))
    assert all(dict(model.online.named_parameters())[n] is p for n, p in zip(names, online, strict=True))
    for t, p in zip(target, online, strict=True):
        assert torch.equal(t, p)
        assert t.data_ptr() != p.data_ptr()
        assert not t.requires_grad
        assert p.requires_grad
    predictor = {id(p) for p in model.online.predictor.parameters()}
    assert len(predictor) == 5
    assert {id(p) for p in model.online.parameters()} - {id(p) for p in online} == predictor


def test_every_view_is_its_own_pass_in_both_networks() -> None:
    model = _small()
    generator = torch.Generator().manual_seed(3)
    view1 = torch.randn(6, 3, 16, 16, generator=generator)
    view2 = 3 * torch.randn(6, 3, 16, 16, generator=generator) + 1
    out, (projection1, projection2) = model.online(view1, view2), model.target(view1, view2)
    alone = model.online(view1, view1)
    torch.testing.assert_close(out.prediction1, alone.prediction1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.features1, model.online.encoder(view1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projection2, model.target(view2, view1)[0], rtol=1e-5, atol=1e-6)
    assert out.prediction1.shape == projection1.shape == (6, 8)
    assert not projection1.requires_grad
    assert out.prediction1.requires_grad
    assert not out.features1.requires_grad


def test_the_target_uses_batch_statistics_even_in_eval_mode() -> None:
    model: Any = _small().eval()
    view = 5 + torch.randn(6, 3, 16, 16)
    before = model.target(view, view)[0]
    assert all(m.training for m in model.target.modules())
    assert not model.online.encoder.bn1.training
    for name, buffer in model.target.named_buffers():
        if "running_mean" in name:
            buffer.fill_(77.0)
    torch.testing.assert_close(model.target(view, view)[0], before, rtol=0, atol=0)


def test_without_predictor_the_projection_is_the_prediction() -> None:
    model = BYOL(make_encoder("resnet8", "cifar"), 16, 8, 16, predictor=False)
    view = torch.rand(4, 3, 16, 16)
    assert torch.equal(
        model.online(view, view).prediction1, model.online.projector(model.online.encoder(view))
    )
    target, online = model.ema_parameters()
    assert len(target) == len(online) == len(list(model.online.parameters()))
