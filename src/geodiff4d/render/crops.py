"""The canonical crop of every image, and the driving crop of the face.

Canonical (docs/CONVENTIONS.md): square, centred on the projected head, side 1.6 × its box, fixed per clip and camera;
of a head that moves, 1.6 × the median box, and wide enough for all of them.
Driving: 1.1 × the face's box, of every frame by itself (X-NeMo: one size per clip, its centres through a Gaussian of
σ = 5 frames).

Boxes are (left, top, side) in pixels of the uncut image and may reach beyond it.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.heads.rig import Head

CANONICAL_SCALE = 1.6
FACE_SCALE = 1.1


def head_region(head: Head) -> Bool[Tensor, " verts"]:
    """Return which vertices are the head without neck and shoulders: those above a plane from the chin to the nape."""
    chin = head.landmarks68.on(head.template, head.faces)[8]
    height = head.template[:, 1] - chin[1] + 0.012 - 0.25 * (chin[2] - head.template[:, 2])
    return height > 0


def canonical_crop_box(camera: Camera, vertices: Float[Tensor, "*batch verts 3"]) -> tuple[float, float, float]:
    """Return the canonical crop (left, top, side) [px] of one camera from the head's vertices in the world.

    The box is one for all frames given: where the head moves through the image, it is widened to contain the head in
    every frame. `camera` is single, or has the vertices' batch. Pass the head without neck and shoulders.
    """
    points, _ = camera.project(vertices) if camera.batch else _project_all(camera, vertices)
    points = points.reshape(-1, *points.shape[-2:]).double()
    low, high = points.amin(1), points.amax(1)
    union_low, union_high = low.amin(0), high.amax(0)
    side = float(CANONICAL_SCALE * (high - low).amax(-1).median())
    side = max(side, float(1.15 * (union_high - union_low).max()))
    left, top = ((union_low + union_high) / 2 - side / 2).tolist()
    return left, top, side


def _project_all(camera: Camera, vertices: Tensor) -> tuple[Tensor, Tensor]:
    return camera.expand(*vertices.shape[:-2]).project(vertices)


def canonical_crop(camera: Camera, vertices: Float[Tensor, "*frames verts 3"], size: int | None = None) -> Camera:
    """Return the camera(s) of the canonical crop (`canonical_crop_box`), each of its own over all frames given.

    `vertices` are world points of the head without the neck; `camera` is single or has one batch axis. The crop may
    reach beyond the original image.
    """
    if not camera.batch:
        return camera.cropped(*canonical_crop_box(camera, vertices), size or camera.width)
    return Camera.stack([canonical_crop(camera[i], vertices, size) for i in range(camera.batch[0])])


def face_crop_box(points: Float[Tensor, "points 2"], scale: float = FACE_SCALE) -> tuple[float, float, float]:
    """Return the square (left, top, side) [px] around a face's landmarks, `scale` × their box."""
    low, high = points.amin(0), points.amax(0)
    side = float(scale * (high - low).max())
    left, top = ((low + high) / 2 - side / 2).tolist()
    return left, top, side


def crop_image(
    image: Float[Tensor, "channels height width"], box: tuple[float, float, float], size: int, fill: float | None = None
) -> Float[Tensor, "channels size size"]:
    """Return a square of an image, resampled to `size`² pixels, subpixel-exact and antialiased.

    The camera of the result is `camera.cropped(*box, size)`. Beyond the border the edge is repeated, or `fill`.

    Example:
        >>> crop_image(torch.rand(3, 48, 64), (8.0, 0.0, 48.0), 16).shape
        torch.Size([3, 16, 16])
    """
    left, top, side = box
    if image.device.type == "cpu" and image.dtype == torch.float32 and not image.requires_grad:
        # Numba takes half a second to import, which those who cut nothing are spared.
        from geodiff4d.render.kernels.resample import resample

        out = torch.empty(len(image), size, size)
        resample(image.contiguous().numpy(), left, top, side, fill is None, np.float32(fill or 0), out.numpy())
        return out
    (y, rows), (x, columns) = (
        _resampling(length, start, side, size, clamp=fill is None)
        for length, start in ((image.shape[1], top), (image.shape[2], left))
    )
    rows, columns = rows.to(image), columns.to(image)
    out = torch.einsum("yh,chw,xw->cyx", rows, image[:, y, x], columns)
    if fill is not None:
        out = out + fill * (1 - rows.sum(1)[:, None] * columns.sum(1))
    return out


def _resampling(
    length: int, start: float, side: float, size: int, clamp: bool
) -> tuple[slice, Float[Tensor, "size some"]]:
    """Return which source pixels are looked at, and their weights: of a tent filter as wide as the larger of source and
    target pixels; rows sum to one where `clamp`."""
    step = side / size
    centres = start + (torch.arange(size, dtype=torch.float64) + 0.5) * step
    radius = max(step, 1.0)
    first = (centres - radius - 0.5).ceil().long()
    taps = first[:, None] + torch.arange(int(2 * radius) + 2)
    weights = (1 - (taps + 0.5 - centres[:, None]).abs() / radius).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    inside = (taps >= 0) & (taps < length)
    if not clamp:
        weights = weights * inside
    taps = taps.clamp(0, length - 1)
    low, high = int(taps.min()), int(taps.max()) + 1
    out = torch.zeros(size, high - low, dtype=torch.float64)
    return slice(low, high), out.scatter_add_(1, taps - low, weights)
