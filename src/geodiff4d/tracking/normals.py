"""Normals of single images by the perception network: a monocular estimator beside a clip's own (Table 2)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.images import composite
from geodiff4d.data.clip import ClipFrame
from geodiff4d.render.crops import crop_image
from geodiff4d.tracking.detect import Detector
from geodiff4d.tracking.embedded import EmbeddedDetector


def normal_estimator(detector: Detector | None = None) -> Callable[[ClipFrame], Tensor]:
    """Return a function from a clip's frame to camera-space normals estimated from its image alone.

    They are unit on the person and zero elsewhere; without a face they are zero everywhere.
    """
    looks = detector or EmbeddedDetector()

    def estimate(frame: ClipFrame) -> Float[Tensor, "3 height width"]:
        image = composite(frame.image, frame.mask)
        [found] = looks.detect([image])
        if found is None or found.normal is None:
            return torch.zeros_like(image)
        height, width = image.shape[1:]
        side = max(height, width)
        left, top, extent = found.extent or (0.0, 0.0, float(width))
        scale = found.normal.shape[2] / extent
        box = (-left * scale, -top * scale, side * scale)
        normal = crop_image(found.normal.float(), box, side, fill=0.0)[:, :height, :width]
        length = normal.norm(dim=0, keepdim=True)
        return torch.where(length > 0.1, normal / length.clamp(min=1e-6), 0.0)

    return estimate
