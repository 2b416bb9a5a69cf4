"""Colours for what a portrait hides of eyes and mouth: teeth, tongue, gums and the dark between them, whole irises.

A neutral portrait shows no teeth, and its lids cover a third of the iris. Another expression needs both. Teeth, gums
and tongue get their own colours under the portrait's light, darker the deeper they lie; an iris is round, so what the
lids cover continues what they do not; and a lid, of which an open eye shows a sliver, has the colour of the skin below.
Ours, beyond the paper.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from geodiff4d.core.topology import vertex_normals
from geodiff4d.heads.rig import Head
from geodiff4d.render.meshes import Fragments, interpolate
from geodiff4d.render.push_pull import push_pull

ALBEDO = {
    "mouth": (0.10, 0.020, 0.018),
    "gums": (0.42, 0.16, 0.14),
    "tongue": (0.36, 0.11, 0.10),
    "teeth": (0.66, 0.58, 0.46),
}
"""Linear RGB; later entries paint over earlier ones."""
SCLERA = (0.80, 0.76, 0.72)
"""sRGB of the white of an eye whose portrait shows none."""
REACH_M = 0.014
"""Depth behind the front teeth at which light has fallen to 1/e."""
NOMINAL_LIGHT = 0.50
"""Linear luminance of the brightest tenth of a face in the light that `ALBEDO` is meant for."""
AROUND_EYE_M = 0.032
"""Lids and the skin below them lie this near to the middle of their eye."""
LID_TRAVEL_M = 0.006
"""A full blink moves the middle of an upper lid about this far."""
UNSHADED = 0.75
"""Skin around an eye that is darker than this share of its median is in shadow, or is none."""
LASHES = 0.6
"""Where lids have met, their edges are darkened to this share of what is seen of them apart (sRGB)."""
MET_SHARE = (0.012, 0.04)
"""Lids that show no eyeball within these shares of the image's width, above or below and beside them, have met: of an
open eye, not even the corners have."""
EYE_BINS = 24
"""Rings of equal colour in which an eye is seen."""
EYE_REACH_RAD = 0.9
"""Iris and the white around it lie within this angle of the eye's axis."""
SHIFTS_RAD = tuple(0.06 * i for i in range(-4, 5))
"""Tracked gaze may be off by as much: the iris is looked for."""


def paint_hidden(
    head: Head, texture: Float[Tensor, "3 texels texels"], weight: Float[Tensor, "1 texels texels"],
    seen: Float[Tensor, "1 texels texels"], atlas: Fragments,
) -> Float[Tensor, "3 texels texels"]:  # fmt: skip
    """Paint mouth, lids and eyes of a completed texture (sRGB, [0, 1]) where the portrait does not show them.

    Args:
        weight: how far texels are known, from the portrait or from its mirror image.
        seen: how far the portrait itself shows them.
        atlas: the head's texture atlas, rasterised.
    """
    inner = torch.zeros_like(head.template[:, :1])
    for name in (*ALBEDO, "eyes", "lips", "lids", "brows"):
        if name in head.regions:
            inner = torch.maximum(inner, head.regions[name].float()[:, None])
    skin = (seen[0] > 0.9) & (interpolate(atlas, head.faces, inner)[0] < 0.01)
    texture = paint_mouth(head, texture, weight, atlas, face_light(texture, skin))
    texture = paint_lids(head, texture, seen, atlas, skin)
    return complete_eyes(head, texture, weight, atlas)


def inside_of_mouth(head: Head) -> Bool[Tensor, " verts"]:
    """Return the vertices of teeth, gums, tongue and the cavity around them; none of a head without these regions."""
    none = torch.zeros_like(head.template[:, 0], dtype=torch.bool)
    return torch.stack([none, *(head.regions[name] for name in ALBEDO if name in head.regions)]).any(0)


def inner_light(head: Head) -> Float[Tensor, " verts"]:
    """Return how much light reaches each vertex of an open mouth, 0 to 1: less further back and turned away."""
    inside = inside_of_mouth(head)
    depth = (head.template[inside][:, 2].max() - head.template[:, 2]).clamp(min=0)
    toward = normalize(head.template.new_tensor([0.0, 0.25, 1.0]), dim=0)
    facing = (vertex_normals(head.template, head.faces) @ toward).clamp(min=0)
    return torch.exp(-depth / REACH_M) * (0.45 + 0.55 * facing)


def face_light(image: Float[Tensor, "3 height width"], skin: Bool[Tensor, "height width"]) -> float:
    """Estimate the light on a face from its brightest tenth, relative to the light that `ALBEDO` is meant for."""
    if int(skin.sum()) < 50:
        return 1.0
    luminance = _linear(image[:, skin]).mean(0)
    return float((luminance.quantile(0.9) / NOMINAL_LIGHT).clamp(0.12, 1.25))


def paint_mouth(
    head: Head, texture: Float[Tensor, "3 texels texels"], weight: Float[Tensor, "1 texels texels"], atlas: Fragments,
    light: float,
) -> Float[Tensor, "3 texels texels"]:  # fmt: skip
    """Paint what the portrait does not show (`weight` 0) of the inside of the mouth."""
    if not set(ALBEDO) & set(head.regions):
        return texture
    shade = interpolate(atlas, head.faces, inner_light(head)[:, None])
    for name, albedo in ALBEDO.items():
        if name in head.regions:
            inside = interpolate(atlas, head.faces, head.regions[name].float()[:, None]) * (1 - weight)
            colour = _srgb(texture.new_tensor(albedo)[:, None, None] * shade * light)
            texture = texture + inside * (colour - texture)
    return texture


def paint_lids(
    head: Head, texture: Float[Tensor, "3 texels texels"], seen: Float[Tensor, "1 texels texels"], atlas: Fragments,
    skin: Bool[Tensor, "texels texels"],
) -> Float[Tensor, "3 texels texels"]:  # fmt: skip
    """Continue the skin around an eye over what a blink pulls across it, and the lids' edges where they are not seen.

    An open eye shows its lid as a sliver of crease and lashes, which would be drawn out over the closed eye.
    """
    blink = [i for i, name in enumerate(head.expression_names) if name in ("eyeBlinkLeft", "eyeBlinkRight")]
    if not blink or not {"left_eye", "right_eye"} <= set(head.regions):
        return texture
    travel = head.expr_basis[..., blink].norm(dim=1).amax(-1)
    pulled = ((travel / LID_TRAVEL_M - 0.25) / 0.5).clamp(0, 1)
    lids, edges = interpolate(atlas, head.faces, torch.stack([pulled, eyes_and_lids(head)[:, 1].to(pulled)], -1))
    position = interpolate(atlas, head.faces, head.template)
    for side in ("left_eye", "right_eye"):
        off = position - head.template[head.regions[side]].mean(0)[:, None, None]
        near = (off.square().sum(0) < AROUND_EYE_M**2) & (atlas.face_index >= 0)
        around = near & skin & (lids < 0.05)
        if int(around.sum()) < 20:
            continue
        bright = texture.mean(0)
        # Brows, glasses and shadows are no lids' colour.
        plain = (around & (bright > UNSHADED * bright[around].median()))[None].to(texture.dtype)
        colour = push_pull(texture * plain, plain)
        shown = edges * near * seen
        rims = push_pull(texture * shown, shown)
        colour = colour + edges * (rims - colour)
        texture = texture + torch.maximum(lids, edges) * near * (1 - edges * seen) * (colour - texture)
    return texture


def eyes_and_lids(head: Head) -> Bool[Tensor, "verts 2"]:
    """Return the vertices of the eyeballs, and those of the lids' edges, where lashes grow; none of the latter of a
    head whose edges are not told apart from its lids."""
    none = torch.zeros_like(head.template[:, 0], dtype=torch.bool)
    edges = head.regions.get("lids", none) if "eyeBlinkLeft" in head.expression_names else none
    return torch.stack([head.regions.get("eyes", none), edges], -1)


def met_lids(
    edge: Float[Tensor, "n 1 height width"], eye: Float[Tensor, "n 1 height width"]
) -> Float[Tensor, "n 1 height width"]:
    """Return where a view shows edges of lids that have met: with no eyeball beside them.

    There they show neither skin nor the wet rim of the lower lid, but the line of the lashes (`LASHES`).

    Args:
        edge: where the lids' edges are.
        eye: where an eyeball is.
    """
    high, wide = (max(1, round(share * edge.shape[-1])) for share in MET_SHARE)
    # The mean height of the gap between the lids [px], one axis after the other: less than one is none.
    across = avg_pool2d(eye, (1, 2 * wide + 1), 1, (0, wide))
    gap = avg_pool2d(across, (2 * high + 1, 1), 1, (high, 0)) * (2 * high + 1)
    return edge * (1 - gap).clamp(0, 1)


def complete_eyes(
    head: Head, texture: Float[Tensor, "3 texels texels"], weight: Float[Tensor, "1 texels texels"], atlas: Fragments
) -> Float[Tensor, "3 texels texels"]:
    """Continue irises and whites under the lids: colours depend on the angle to the eye's axis alone.

    Tracked gaze may be a little off, so the axis is where the seen colours are roundest.
    """
    for side in ("left_eye", "right_eye"):
        if side not in head.regions:
            continue
        region = head.regions[side]
        inside = interpolate(atlas, head.faces, region.float()[:, None])
        angles = interpolate(atlas, head.faces, _eye_angles(head.template, region))
        known = (inside[0] > 0.99) & (weight[0] > 0.5) & (angles.square().sum(0) < EYE_REACH_RAD**2)
        if int(known.sum()) < 12:
            white = texture.new_tensor(SCLERA)[:, None, None]
            texture = texture + inside * (1 - weight) * (white - texture)
            continue
        shift, profile = _roundest(angles[:, known], texture[:, known])
        theta = (angles - shift[:, None, None]).square().sum(0).sqrt()
        hidden = _looked_up(profile, theta)
        texture = texture + inside * (1 - weight) * (hidden - texture)
    return texture


def _eye_angles(template: Tensor, region: Tensor) -> Float[Tensor, "verts 2"]:
    """Angles of vertices to the side and upward as seen from the eye's middle [rad]."""
    ball = template[region]
    middle = (ball.amin(0) + ball.amax(0)) / 2
    ray = normalize(template - middle, dim=-1)
    off = torch.atan2(ray[:, :2].norm(dim=-1), ray[:, 2])
    return ray[:, :2] / ray[:, :2].norm(dim=-1, keepdim=True).clamp(min=1e-6) * off[:, None]


def _roundest(angles: Float[Tensor, "2 n"], colours: Float[Tensor, "3 n"]) -> tuple[Tensor, Tensor]:
    """Find the axis around which colours depend on the angle most: (its shift [rad], the profile [3, bins])."""
    best = None
    grey = colours.mean(0)
    for dx in SHIFTS_RAD:
        for dy in SHIFTS_RAD:
            shift = angles.new_tensor([dx, dy])
            index = _bin((angles - shift[:, None]).square().sum(0).sqrt())
            count = grey.new_zeros(EYE_BINS).index_add_(0, index, torch.ones_like(grey))
            mean = grey.new_zeros(EYE_BINS).index_add_(0, index, grey) / count.clamp(min=1)
            # Of equally round axes the one that was tracked.
            error = (grey - mean[index]).square().mean() + 1e-3 * shift.square().sum()
            if best is None or error < best[0]:
                best = error, shift, index, count
    assert best is not None
    _, shift, index, count = best
    profile = colours.new_zeros(3, EYE_BINS).index_add_(1, index, colours) / count.clamp(min=1)
    return shift, _filled(profile, count > 0)


def _bin(theta: Tensor) -> Tensor:
    return (theta / EYE_REACH_RAD * EYE_BINS).long().clamp(max=EYE_BINS - 1)


def _filled(profile: Float[Tensor, "3 bins"], known: Bool[Tensor, " bins"]) -> Float[Tensor, "3 bins"]:
    """Fill empty bins from the nearest known one, then smooth a little."""
    at = torch.arange(EYE_BINS, device=profile.device)
    nearest = at[known][(at[:, None] - at[known]).abs().argmin(1)]
    full = profile[:, nearest]
    padded = torch.cat([full[:, :1], full, full[:, -1:]], 1)
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4


def _looked_up(profile: Float[Tensor, "3 bins"], theta: Float[Tensor, "texels texels"]) -> Tensor:
    x = (theta / EYE_REACH_RAD * EYE_BINS - 0.5).clamp(0, EYE_BINS - 1)
    low = x.floor().long().clamp(max=EYE_BINS - 2)
    share = (x - low)[None]
    return profile[:, low] * (1 - share) + profile[:, low + 1] * share


def _linear(x: Tensor) -> Tensor:
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).pow(2.4))


def _srgb(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, x * 12.92, 1.055 * x.clamp(min=1e-8).pow(1 / 2.4) - 0.055)
