"""Initialisation of a fit: Gaussians on the head, hair raised to the silhouettes, colours taken from the frames."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from geodiff4d.avatar.binding import NORMAL_AXIS, FaceFrames, LocalGaussians, bind, face_frames, sample_surface
from geodiff4d.avatar.frames import FitFrames
from geodiff4d.avatar.shoulders import add_shoulders
from geodiff4d.avatar.surface import Surface
from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import quat_to_matrix
from geodiff4d.heads.rig import Head
from geodiff4d.render.meshes import rasterize

DENSITY = {"scalp": 1.5, "neck": 1.0, "mouth": 0.3, "sockets": 0.2, "teeth": 0.5, "tongue": 0.5}
"""Gaussians per area, relative to skin: hair has detail, the inside of the mouth is rarely seen."""
VIEWS = 24
"""Number of frames that are used, spread over the clip."""
HEIGHTS = 12
"""Heights above the scalp that are tested against the silhouettes."""
MIN_REACH_M = 0.01
"""Faces whose splats may start no higher than this are left alone [m]."""
GRAZING = 0.35
"""A splat is on an outline where |n·v| falls below this in some view."""
NEIGHBOURS = 6
"""Splats on an outline over whose heights the limit of the others is averaged."""
INSIDE = 0.97
"""A point is part of the head if at least this share of the views has foreground there."""
OCCLUDED_M = 0.006
"""A splat this far behind the rasterised surface is occluded [m]."""


def start(
    frames: FitFrames, head: Head, surface: Surface, count: int, tolerance: Float[Tensor, " faces"], seed: int
) -> tuple[LocalGaussians, Float[Tensor, " faces"]]:
    """Place and colour the first Gaussians, on the surface and on the shoulders below it.

    About `count` Gaussians are spread by area and region. `tolerance` is how far splats may leave each triangle [m]; it
    is returned, raised where shoulders are bound.
    """
    generator = torch.Generator().manual_seed(seed)
    density = torch.ones(len(head.template))
    for name, value in DENSITY.items():
        if name in head.regions:
            density[head.regions[name]] = value
    heads = head.pose(frames.sequence)
    meshes = surface.on(heads.vertices)
    shaped = head.pose(replace(frames.sequence[0], **vars(head.neutral()) | {"shape": frames.sequence.shape[0]}))
    per_face = surface.on(density[:, None])[:, 0][surface.faces].mean(-1)
    local = sample_surface(surface.on(shaped.vertices), surface.faces, per_face, count, generator)
    picked = [frames.train[i] for i in torch.linspace(0, len(frames.train) - 1, VIEWS).round().long().unique()]
    posed = {row: face_frames(meshes[row], surface.faces) for row in {frames.row(i) for i in picked}}
    local = grow(local, frames, posed, picked, hair_reach(head, surface, tolerance), generator)
    local, tolerance = add_shoulders(local, tolerance, frames, head, surface, heads, picked, generator)
    return paint(local, frames, posed, meshes, surface.faces, picked), tolerance


def grow(
    local: LocalGaussians, frames: FitFrames, posed: dict[int, FaceFrames], picked: list[int],
    reach: Float[Tensor, " faces"], generator: torch.Generator,
) -> LocalGaussians:  # fmt: skip
    """Return the splats, those of the scalp raised as far as all silhouettes allow: a visual hull along the normals.

    A hull says little where no view sees the outline, at the back of the head above all: splats there rise no higher
    than their nearest neighbours on an outline do.
    """
    loose = (reach[local.face_index] > MIN_REACH_M).nonzero()[:, 0]
    if len(loose) == 0:
        return local
    face = local.face_index[loose]
    height = torch.linspace(0, 1, HEIGHTS)[:, None] * reach[face]
    inside, grazing = torch.zeros_like(height), torch.ones(len(loose))
    for i in picked:
        f, target = posed[frames.row(i)], frames.target(i)
        means, normals = bind(local, f).means[loose], f.R[face][..., NORMAL_AXIS]
        points = means + height[..., None] * normals
        inside += (sample(target.mask, target.camera, points.flatten(0, 1), outside=1.0)[:, 0] > 0.5).view_as(height)
        view = normalize(target.camera.position - means, dim=-1)
        grazing = torch.minimum(grazing, (view * normals).sum(-1).abs())
    steps = (inside >= INSIDE * len(picked)).cumprod(0).sum(0).long() - 1
    lift = height.gather(0, steps.clamp(min=0)[None])[0]
    outline = (grazing < GRAZING) & (steps < HEIGHTS - 1)
    means = bind(local, next(iter(posed.values()))).means[loose]
    if int(outline.sum()) >= NEIGHBOURS:
        _, nearest = KDTree(means[outline].numpy()).query(means.numpy(), k=NEIGHBOURS)
        lift = torch.minimum(lift, lift[outline][torch.from_numpy(nearest)].mean(-1))
    # Mostly outside, where it is seen; the rest fills the volume for views that graze it.
    lift = lift * (0.4 + 0.6 * torch.rand(len(loose), generator=generator).sqrt())
    k = next(iter(posed.values())).scale[face].clamp(min=1e-9)
    lifted = local.means.clone()
    lifted[loose, NORMAL_AXIS] += lift / k
    return replace(local, means=lifted)


def hair_reach(head: Head, surface: Surface, tolerance: Float[Tensor, " faces"]) -> Float[Tensor, " faces"]:
    """Return how far [m] splats may start above each face: its tolerance, but zero on the neck.

    Silhouettes leave the hollow under the chin open, and what starts there is left behind as debris.
    """
    neck = head.regions.get("neck")
    return tolerance if neck is None else torch.where(neck[head.faces].any(-1)[surface.head_face], 0.0, tolerance)


def paint(
    local: LocalGaussians, frames: FitFrames, posed: dict[int, FaceFrames],
    meshes: Float[Tensor, "timesteps verts 3"], faces: Int[Tensor, "faces 3"], picked: list[int],
) -> LocalGaussians:  # fmt: skip
    """Return the splats coloured by the views that see them, weighted by the squared cosine to the view.

    Splats that no view sees take the colour of the nearest one that is seen.
    """
    total, weight = torch.zeros(len(local), 3), torch.zeros(len(local), 1)
    for i in picked:
        target, row = frames.target(i), frames.row(i)
        f = posed[row]
        splats = bind(local, f)
        means, normals = splats.means, quat_to_matrix(splats.quats)[..., NORMAL_AXIS]
        view = normalize(target.camera.position - means, dim=-1)
        facing = (normals * view).sum(-1, keepdim=True).clamp(min=0)
        depth = rasterize(meshes[row], faces, target.camera).depth[None]
        surface = sample(depth.clamp(max=1e3), target.camera, means, outside=0.0, nearest=True)
        _, z = target.camera.project(means)
        seen = (z[:, None] < surface + OCCLUDED_M) * (sample(target.mask, target.camera, means, outside=0.0) > 0.9)
        w = facing.square() * seen
        total += w * sample(target.image, target.camera, means, outside=0.5)
        weight += w
    known = weight[:, 0] > 1e-3
    colors = total / weight.clamp(min=1e-9)
    if known.any() and not known.all():
        means = bind(local, next(iter(posed.values()))).means
        _, nearest = KDTree(means[known].numpy()).query(means[~known].numpy())
        colors[~known] = colors[known][torch.from_numpy(nearest)]
    return replace(local, color_logits=torch.logit(colors.clamp(0.02, 0.98)))


def sample(
    image: Float[Tensor, "channels height width"], camera: Camera, points: Float[Tensor, "n 3"], outside: float,
    nearest: bool = False,
) -> Float[Tensor, "n channels"]:  # fmt: skip
    """Return an image's values at world points; `outside` where they leave it or are behind the camera."""
    xy, depth = camera.project(points)
    grid = 2 * xy / torch.tensor([camera.width, camera.height]) - 1
    mode = "nearest" if nearest else "bilinear"
    values = grid_sample(image[None], grid[None, None], mode=mode, padding_mode="border", align_corners=False)[
        0, :, 0
    ].T
    visible = (grid.abs() <= 1).all(-1, keepdim=True) & (depth[:, None] > 0)
    return torch.where(visible, values, outside)
