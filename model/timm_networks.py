"""Builds encoders of timm (github.com/huggingface/pytorch-image-models), which is an optional extra."""

import difflib
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from byolt.configs.command_line import check_backbone
from byolt.configs.schema import TIMM


def make_timm_encoder(backbone: str, size: int) -> nn.Module:
    """Makes timm:NAME without its classifier, with timm's initialization, for images of this side.

    Dropout and stochastic depth are off: a resumed run could not repeat their random numbers.

    Returns:
        A module with the attributes `num_features` and `timm_arguments` (those of timm.create_model beside the name
        and num_classes=0): images (N, 3, size, size) -> (N, num_features).

    Raises:
        ValueError: timm is not installed, has no such model, or the model does not take images of this size or does
            not pool its features to a vector.
    """
    check_backbone(backbone)
    import timm

    name = backbone.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(TIMM + n for n in near)}?" if near else ""
        raise ValueError(f"model.backbone={backbone}: timm {timm.__version__} has no model {name!r}{hint}")
    arguments: dict[str, Any] = {"img_size": size}
    try:
        try:
            encoder = timm.create_model(name, num_classes=0, **arguments)
        except TypeError:  # most convolutional networks take images of any size and have no such argument
            arguments = {}
            encoder = timm.create_model(name, num_classes=0)
        for layer in encoder.modules():
            if "Drop" in type(layer).__name__:  # Dropout, DropPath, DropBlock2d, PatchDropout
                for probability in {"p", "drop_prob", "prob"} & vars(layer).keys():
                    setattr(layer, probability, 0.0)
        with torch.no_grad():
            shape = tuple(encoder.eval()(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:  # each model has its own way to refuse a size
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"model.backbone={backbone} cannot be built for augment.size={size}: {reason[:300]}"
        ) from None
    for layer in encoder.modules():
        cut = isinstance(layer, timm.layers.PatchEmbed) and layer.img_size and not layer.dynamic_img_pad
        if cut and any(side % patch for side, patch in zip(layer.img_size, layer.patch_size, strict=True)):
            raise ValueError(
                f"model.backbone={backbone} sees patches of {layer.patch_size[0]} pixels, and would not see the right "
                f"and lower edges at augment.size={size}: set a multiple"
            )
    if len(shape) != 2:
        raise ValueError(
            f"model.backbone={backbone} gives features of shape {shape}, not one vector for an image: choose a model "
            "that pools them"
        )
    if getattr(encoder, "num_features", None) != shape[1]:  # some state the width before a last layer
        encoder.num_features = shape[1]
    encoder.timm_arguments = arguments
    return encoder.train()


def fit_positions(encoder: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolates position embeddings of another size of image, as timm does when it loads its own weights.

    Returns:
        The tensors, unchanged if the embeddings fit, if there are none, or if timm cannot interpolate them.
    """
    found, own = state_dict.get("pos_embed"), getattr(encoder, "pos_embed", None)
    fit = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if fit and found is not None and own is not None and found.shape != own.shape:
        with suppress(Exception):  # it trusts the shapes; `initialize` names those that do not fit
            return dict(fit(state_dict, encoder))
    return state_dict
