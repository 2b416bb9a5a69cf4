"""Several portraits of one person, lifted and merged: what each shows best is carried into other views (ours).

Every portrait is lifted by itself (`relief.py`). On the head's mesh a place takes its colour from the portraits that
see it, by how many of their pixels it has; beside the mesh, where hair and shoulders are sheets that foreshorten, from
the portrait whose camera stands nearest to the target's. The first portrait leads in both. Light differs between
photographs: before a portrait is lifted, a smooth gain brings it to what is already merged, where both see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize
from torch.nn.functional import interpolate as resize

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform
from geodiff4d.core.topology import edges, vertex_normals
from geodiff4d.heads.rig import SKULL_JOINT, Head, PosedHead
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, rasterize_uv
from geodiff4d.render.relief import LiftedPortrait, lift
from geodiff4d.render.warp import CompletedHead, Texels, both_sides, carry, completed_texture, mirror_vertices

LEAD = 2.0
"""The first portrait leads unless another shows a place by more than so many times its pixels."""
CHOOSY = 4.0
"""Exponent of the ratio of pixels: means over portraits that lie a little differently on the head are soft."""
FEATHER = 12
"""Rings of the mesh over which a portrait's share falls to zero where it ceases to see."""
NEAR_RAD = 0.16
"""Sheets are mixed by a Gaussian of this width of the angle to their cameras."""
UNDECIDED = (0.4, 0.6)
"""Shares of the sheets that cover a pixel between which it fades in."""
GAIN_CELLS = 32
"""The gain between two portraits is estimated on a grid of this side."""
GAIN_REACH = 5
"""Side of the window that is averaged, twice, for a cell's gain [cells]."""
GAIN_LIMITS = (0.4, 2.5)


@dataclass(frozen=True)
class View:
    """One portrait to merge, on grey, with the head that was tracked in it."""

    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    mesh: PosedHead
    camera: Camera


@dataclass(frozen=True)
class MergedPortrait:
    """Portraits of one person, lifted onto one head; it is drawn as one is (`LiftedPortrait.shown`)."""

    views: tuple[LiftedPortrait, ...]
    weights: Float[Tensor, "verts views"]
    """How well each portrait shows each vertex; only ratios count."""
    toward: Float[Tensor, "views 3"]
    """From the head to each portrait's camera, in the head's frame."""

    def shown(
        self, fragments: Fragments, T_world_joint: Float[Tensor, "t joints 4 4"], cameras: Camera
    ) -> tuple[Float[Tensor, "t 3 height width"], Float[Tensor, "t 2 height width"]]:
        """Draw the person in other poses and views, on grey; arguments and result as `LiftedPortrait.shown` has."""
        drawn = [view.shown(fragments, T_world_joint, cameras) for view in self.views]
        rgb, masks = (torch.stack(x) for x in zip(*drawn, strict=True))
        inside = masks[0, :, 1:]
        maps = interpolate(fragments, self.views[0].head.head.faces, self.weights)
        if maps.shape[-2:] != rgb.shape[-2:]:
            maps = resize(maps, rgb.shape[-2:], mode="bilinear", align_corners=False)
        on_mesh = maps.movedim(1, 0)[:, :, None] * masks[:, :, :1]
        # Where no portrait sees the mesh, all show the same completed texture.
        on_mesh = (on_mesh + 1e-9) / (on_mesh + 1e-9).sum(0)
        near = self._nearness(T_world_joint, cameras)[:, :, None, None, None]
        # Sheets do not agree on where hair ends: of two outlines the nearer one's is taken, and none half.
        cover = (near * masks[:, :, :1]).sum(0)
        beside = 0.5 + (near * (rgb - 0.5)).sum(0) * (_decided(cover) / cover.clamp(min=1e-6))
        colour = torch.where(inside > 0, (on_mesh * rgb).sum(0), beside)
        seen = torch.where(inside > 0, (on_mesh * masks[:, :, :1]).sum(0), _decided(cover))
        return colour, torch.cat([seen, inside], 1)

    def _nearness(self, T_world_joint: Tensor, cameras: Camera) -> Float[Tensor, "views t"]:
        """Return each portrait's share of the sheets in each target view."""
        angle = torch.acos((self.toward @ toward(T_world_joint, cameras).mT).clamp(-1, 1))
        off = -0.5 * (angle / NEAR_RAD).square()
        off[0] += torch.log(off.new_tensor(LEAD))
        return off.softmax(0)


def _decided(cover: Tensor) -> Tensor:
    low, high = UNDECIDED
    return ((cover - low) / (high - low)).clamp(0, 1)


def toward(T_world_joint: Float[Tensor, "t joints 4 4"], cameras: Camera) -> Float[Tensor, "t 3"]:
    """Return the unit vectors to cameras, in the heads' frames."""
    return normalize(transform(T_world_joint[:, SKULL_JOINT].inverse(), cameras.position[:, None])[:, 0], dim=-1)


def merge_portraits(head: Head, views: Sequence[View], texels: int, surroundings: bool = True) -> MergedPortrait:
    """Lift portraits of one person onto the head and merge them; the first is the reference for light.

    Args:
        views: of one identity, each with its own pose, expression and camera.
        texels: side of the completed texture.
        surroundings: whether hair and shoulders come along.
    """
    lifted: list[LiftedPortrait] = []
    weights: list[Tensor] = []
    for view in views:
        if lifted:
            so_far = MergedPortrait(tuple(lifted), torch.stack(weights, 1), _seen_from(views[: len(lifted)]))
            view = replace(view, image=relit(view, so_far))
        portrait = _without_texture(head, view, surroundings)
        weights.append(_pixels(head, view) * _feathered(head, portrait.head.carried.visibility))
        lifted.append(portrait)
    share = torch.stack(weights, 1)
    share[:, 0] *= LEAD
    share = (share / share.amax(1, keepdim=True).clamp(min=1e-12)) ** CHOOSY
    texture = _texture(head, lifted, share, texels)
    whole = tuple(replace(p, head=replace(p.head, texture=texture)) for p in lifted)
    return MergedPortrait(whole, share, _seen_from(views))


def _seen_from(views: Sequence[View]) -> Float[Tensor, "views 3"]:
    return torch.cat([toward(v.mesh.T_world_joint[None], v.camera.expand(1)) for v in views])


def _without_texture(head: Head, view: View, surroundings: bool) -> LiftedPortrait:
    carried = carry(view.mesh.vertices, head.faces, view.camera, view.mask)
    foreground = (view.mask > 0.5).to(view.image.dtype)
    grey = view.image.new_full((3, 1, 1), 0.5)
    return LiftedPortrait(
        CompletedHead(head, view.image, carried, grey), torch.cat([view.image, foreground]),
        lift(head, view.mesh, view.camera, foreground) if surroundings else None,
    )  # fmt: skip


def _pixels(head: Head, view: View) -> Float[Tensor, " verts"]:
    """Return how many pixels a portrait has per area of the surface at every vertex, up to a factor."""
    vertices, camera = view.mesh.vertices, view.camera
    _, z = camera.project(vertices)
    ray = normalize(camera.position - vertices, dim=-1)
    cosine = (vertex_normals(vertices, head.faces) * ray).sum(-1).clamp(min=0)
    return (camera.K[0, 0] / z.clamp(min=1e-3)).square() * cosine


def _feathered(head: Head, visibility: Float[Tensor, " verts"]) -> Float[Tensor, " verts"]:
    """Let visibility fall to zero before the portrait ceases to see (`FEATHER`)."""
    pairs, out = _edges(head.faces), visibility
    count = torch.bincount(pairs.flatten(), minlength=len(visibility)).clamp(min=1)
    for _ in range(FEATHER):
        total = torch.zeros_like(out)
        total.index_add_(0, pairs[:, 0], out[pairs[:, 1]]).index_add_(0, pairs[:, 1], out[pairs[:, 0]])
        out = torch.minimum(visibility, 0.5 * (out + total / count))
    # What nobody sees well is still shown by who sees it at all.
    return out + 1e-3 * visibility


@lru_cache(maxsize=4)
def _edges(faces: Int[Tensor, "faces 3"]) -> Int[Tensor, "edges 2"]:
    # Tensors hash by identity: one search for each head that is loaded.
    return edges(faces)


def _texture(
    head: Head, lifted: Sequence[LiftedPortrait], weights: Float[Tensor, "verts views"], texels: int
) -> Float[Tensor, "3 texels texels"]:
    """Complete one texture from all portraits."""
    atlas = rasterize_uv(head.uv, head.uv_faces, texels)
    sides = [both_sides(head, p.head.image, p.head.carried, atlas) for p in lifted]
    mixed: list[Texels] = []
    for side, values in enumerate((weights, weights[mirror_vertices(head)])):
        maps = interpolate(atlas, head.faces, values)[:, None]
        colours, known = (torch.stack([s[side][k] for s in sides]) for k in (0, 1))
        share = maps * known + 1e-9 * known
        share = share / share.sum(0).clamp(min=1e-12)
        mixed.append(((share * colours).sum(0), known.amax(0)))
    own, mirrored = mixed
    return completed_texture(head, own, mirrored, atlas)


def relit(view: View, merged: MergedPortrait) -> Float[Tensor, "3 height width"]:
    """Bring a portrait to the light of what is merged already, by a gain that varies slowly over the image.

    It is the ratio of means over windows where both see the person, and, far from there, of all that both see.
    """
    image, mesh, cameras = view.image, view.mesh, view.camera.expand(1)
    fragments = rasterize(mesh.vertices[None], mesh.faces, cameras)
    shown, masks = merged.shown(fragments, mesh.T_world_joint[None], cameras)
    both = (masks[0, :1] > 0.5).float() * (view.mask > 0.9)
    theirs, ours = _linear(shown[0]) * both, _linear(image) * both

    def windowed(x: Tensor) -> Tensor:
        x = resize(x[None], (GAIN_CELLS, GAIN_CELLS), mode="area")
        for _ in range(2):
            x = avg_pool2d(x, GAIN_REACH, 1, GAIN_REACH // 2)
        return x

    if float(both.mean()) < 1e-3:
        return image
    overall = [x.mean((1, 2), keepdim=True)[None] for x in (theirs, ours)]
    gain = (windowed(theirs) + 0.05 * overall[0]) / (windowed(ours) + 0.05 * overall[1]).clamp(min=1e-6)
    gain = resize(gain.clamp(*GAIN_LIMITS), image.shape[-2:], mode="bilinear", align_corners=False)[0]
    return image + view.mask * (_srgb(_linear(image) * gain) - image)


def _linear(x: Tensor) -> Tensor:
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=1e-8) + 0.055) / 1.055).pow(2.4))


def _srgb(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, x * 12.92, 1.055 * x.clamp(min=1e-8).pow(1 / 2.4) - 0.055)
