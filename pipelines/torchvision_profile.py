"""Profile torchvision: a drawn view by the functions of torchvision.transforms.v2 themselves, on float32 images.

That is what solo-learn and lightly train with, less their storing 8 bits between two stages: the crop is resized with
antialias (bicubic, a = -0.5, clipped to [0, 1] as storing would), brightness is a factor, contrast turns about the mean
of the grey image, saturation about the grey image, hue is HSV's, the blur mirrors the image at its border. The blur's
taps follow byol's rule (`AugmentConfig.blur_taps`), and solarize inverts from 0.5 on, which is 128 of 255.
"""

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams


def apply(image: Tensor, view: ViewParams, size: int, taps: int) -> Tensor:
    """One drawn view of an image, before normalisation: what `pipelines.torch_backend.apply` is to profile byol.

    Args:
        image: uint8 (H, W, 3).
        view: parameters of one sample.
        size: side of the view.
        taps: taps of the blur kernel.

    Returns:
        float32 (1, size, size, 3) in [0, 1].
    """
    top, left, height, width = (int(a[0]) for a in (view.top, view.left, view.height, view.width))
    window = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float() / 255
    x = F.resize(window, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if view.flip[0]:
        x = F.horizontal_flip(x)
    if view.jitter[0]:
        for operation in view.order[0]:
            if operation == BRIGHTNESS:
                x = F.adjust_brightness(x, float(view.brightness[0]))
            elif operation == CONTRAST:
                x = F.adjust_contrast(x, float(view.contrast[0]))
            elif operation == SATURATION:
                x = F.adjust_saturation(x, float(view.saturation[0]))
            elif operation == HUE:
                x = F.adjust_hue(x, float(view.hue[0]))
    if view.gray[0]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if view.blur[0]:
        x = F.gaussian_blur(x, [taps, taps], [float(view.sigma[0])])
    if view.solarize[0]:
        x = F.solarize(x, 0.5)
    return x.permute(0, 2, 3, 1)
