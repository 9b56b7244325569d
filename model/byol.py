"""Bootstrap Your Own Latent (arXiv 2006.07733): encoder, projector, predictor; online and target network."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byolt.configs.schema import ModelConfig
from byolt.model.kernels.norm import BatchNorm, each_view
from byolt.model.resnet import initialize_, make_encoder


class Predictions(NamedTuple):
    """Outputs of the online network for one batch."""

    prediction1: Tensor  # (N, D) of view 1
    prediction2: Tensor  # (N, D) of view 2
    features1: Tensor  # (N, F) of view 1, detached: for a linear probe or a gauge, never for the loss


class MLP(nn.Sequential):
    """Projector and predictor: Linear(bias) -> BatchNorm -> ReLU -> Linear(no bias) (paper, sec. 3.3)."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden),
            BatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_features, bias=False),
        )
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features) -> (N, out_features)."""
        first, norm, _, last = self  # batch norm applies the ReLU, in one kernel on a GPU
        return last(norm(first(x), relu=True))


class Online(nn.Module):
    """The online network theta: encoder f, projector g and predictor q; trained by gradient."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, view1: Tensor, view2: Tensor) -> Predictions:
        """Both views in one call (one reduction under DDP); batch norm's statistics are those of each view alone."""
        features1, features2 = each_view(self.encoder, view1, view2)  # y = f(v)
        projections = each_view(self.projector, features1, features2)  # z = g(y)
        prediction1, prediction2 = each_view(self.predictor, *projections)  # q(z)
        return Predictions(prediction1, prediction2, features1.detach())


class Target(nn.Module):
    """The target network xi: a copy of the online encoder and projector that follows by EMA, without gradient.

    It stays in train mode even after `eval()`: its batch norm always uses the batch's statistics, as in the reference.
    """

    def __init__(self, online: Online) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(online.encoder)
        self.projector = copy.deepcopy(online.projector)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Target":
        return super().train(True)

    @torch.no_grad()
    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (N, D) of both views; batch norm's statistics are those of each view alone."""
        return each_view(self.projector, *each_view(self.encoder, view1, view2))


class BYOL(nn.Module):
    """Online and target network, equal at the start.

    Args:
        encoder: (N, ...) -> (N, num_features), with the attribute `num_features` (see `make_encoder`).
        projector_hidden: width of the projector's hidden layer.
        projector_size: dimension D of projections and predictions.
        predictor_hidden: width of the predictor's hidden layer.
        predictor: False makes the projection the prediction; BYOL then collapses (paper, table 5b).
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector_hidden: int,
        projector_size: int,
        predictor_hidden: int,
        predictor: bool = True,
    ) -> None:
        super().__init__()
        projector = MLP(int(encoder.num_features), projector_hidden, projector_size)  # type: ignore[arg-type]
        q = MLP(projector_size, predictor_hidden, projector_size) if predictor else nn.Identity()
        self.online = Online(encoder, projector, q)
        self.target = Target(self.online)

    def ema_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Paired parameters (target, online) for `ema_update_`, without batch norm's buffers."""
        online = dict(self.online.named_parameters())
        target = dict(self.target.named_parameters())
        return list(target.values()), [online[name] for name in target]


def make_byol(settings: ModelConfig, size: int = 224) -> BYOL:
    """The networks of a run on images of a size in pixels, with weights from torch's global generator."""
    return BYOL(
        make_encoder(settings.backbone, settings.stem, size),
        settings.projector_hidden,
        settings.projector_size,
        settings.predictor_hidden,
        settings.predictor,
    )


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the normalized rows (N, D), 2 - 2 cos (paper, eq. 2): (N,) in [0, 4].

    Computed as a difference, as in the reference: close to 0 it keeps the digits that 2 - 2 cos would lose. The result
    is float32, or float64 for float64.
    """
    return (l2_normalize(prediction) - l2_normalize(target)).square().sum(dim=-1)


def l2_normalize(x: Tensor) -> Tensor:
    """Scales rows (N, D) to length 1, in float32 or float64; rows shorter than 1e-6 by 1e6, as in the reference."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * x.square().sum(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def byol_loss(online: Predictions, projection1: Tensor, projection2: Tensor) -> Tensor:
    """The symmetric loss, averaged over the batch (paper, sec. 3.1): 0-dim, about 4 at the start."""
    return (
        regression_loss(online.prediction1, projection2) + regression_loss(online.prediction2, projection1)
    ).mean()
