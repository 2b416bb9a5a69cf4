"""What tracked head parameters say of an expression: named coefficients, and the face's vertices without identity."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.heads import Head, HeadParams

FACE_RADIUS_M = 0.095
"""The face is the skin so near to the tip of the nose."""
GROUPS: dict[str, tuple[str, ...]] = {
    "vertices": (),
    "mouth": ("mouth", "jaw"),
    "jaw": ("jaw",),
    "blinks": ("eyeBlink",),
    "squints": ("eyeSquint",),
    "wide eyes": ("eyeWide",),
    "brows": ("brow",),
    "gaze": ("eyeLook",),
}
"""What tracked expressions are compared by: prefixes of coefficients, and the displacements of the face's vertices."""


def face_region(head: Head) -> Bool[Tensor, " verts"]:
    """Mark the skin near the tip of the nose."""
    tip = head.landmarks68.on(head.template, head.faces)[30]
    return head.regions["skin"] & ((head.template - tip).norm(dim=1) < FACE_RADIUS_M)


def expressed(head: Head, params: HeadParams) -> Float[Tensor, "frames verts 3"]:
    """Return the average head, upright, with an expression, jaw and eyelids [m]."""
    still = head.neutral(params.batch[0])
    return head.pose(replace(still, expr=params.expr, jaw_pose=params.jaw_pose, eyelids=params.eyelids)).vertices


def coefficient_names(head: Head) -> tuple[str, ...]:
    """Name the columns of `coefficients` so that `expression_gain.REGIONS` finds them."""
    named = head.expression_names or tuple(f"expr{i:03d}" for i in range(head.expr_basis.shape[-1]))
    lids = () if head.eyelid_basis is None else ("eyeBlinkLeft", "eyeBlinkRight")
    eyes = tuple(f"eyeLook{way}{side}" for side in ("Left", "Right") for way in ("Pitch", "Yaw"))
    return (*(n for n in named if not n.startswith("eyeLook")), *lids, "jawPitch", "jawYaw", "jawRoll", *eyes)


def coefficients(head: Head, params: HeadParams) -> Float[np.ndarray, "frames coefficients"]:
    """Return expression weights, eyelids, and how jaw and eyes turn [rad].

    Gaze is how the eyeballs turn: ARKit's eyeLook weights, which only move the lids along, are left out.
    """
    kept = [i for i, n in enumerate(head.expression_names) if not n.startswith("eyeLook")]
    expr = params.expr[:, kept] if head.expression_names else params.expr
    n = params.batch[0]
    lids = params.expr.new_zeros(n, 0)
    if head.eyelid_basis is not None:
        lids = params.expr.new_zeros(n, 2) if params.eyelids is None else params.eyelids
    eyes = params.eyes_pose.reshape(n, 2, 3)[..., :2].reshape(n, 4)
    return torch.cat([expr, lids, params.jaw_pose, eyes], -1).double().numpy()


def face_displacements(head: Head, params: HeadParams) -> Float[np.ndarray, "frames coordinates"]:
    """Return how far each vertex of the face is from where it rests on the average head [mm]; gaze is not in it."""
    region = face_region(head)
    moved = expressed(head, params)[:, region] - head.template[region]
    return 1000 * moved.flatten(1).double().numpy()


def compared(
    head: Head, truth: HeadParams, tracked: HeadParams
) -> dict[str, tuple[Float[np.ndarray, "frames _"], Float[np.ndarray, "frames _"]]]:
    """Return (true, tracked) rows for every one of `GROUPS` that the head has coefficients of."""
    names, x, y = coefficient_names(head), coefficients(head, truth), coefficients(head, tracked)
    out = {"vertices": (face_displacements(head, truth), face_displacements(head, tracked))}
    for group, prefixes in GROUPS.items():
        if prefixes and any(chosen := [n.startswith(prefixes) for n in names]):
            out[group] = (x[:, chosen], y[:, chosen])
    return out
