"""The points that the embedded network predicts: numbered places on OpenHead's surface.

Numbers below 478 are MediaPipe's, 1000 to 1067 the 68 of iBUG's markup, 2000 and on are ours: spread over ears, scalp
and jaw, where neither has any. A point is kept as a place on the mean head, not as a face of its mesh, so that weights
outlive a new version of the head's file.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodiff4d.heads.rig import Head, Landmarks
from geodiff4d.render.crops import head_region

IBUG, OWN = 1000, 2000
FIRST_IRIS, MEDIAPIPE_POINTS = 468, 478

LIPS = (
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409,
    78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415,
)  # fmt: skip
EYES = (
    33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173,
    263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398,
)  # fmt: skip
BROWS = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107, 276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
NOSE = (1, 2, 4, 5, 6, 19, 94, 97, 98, 195, 197, 326, 327, 168, 48, 278, 64, 294, 129, 358)
CONTOUR = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
"""The face's outline in MediaPipe's mesh; in its detections it slides over the skin as the head turns."""
JAW = tuple(IBUG + i for i in range(17))


@dataclass(frozen=True)
class SurfacePoints:
    """Numbered places on the mean head."""

    index: Int[Tensor, " points"]
    position: Float[Tensor, "points 3"]
    """Positions on OpenHead's template [m]."""

    def on(self, head: Head) -> Landmarks:
        """Return the points on a version of OpenHead: the nearest places on its skin, on its eyeballs for irises."""
        iris = (self.index >= FIRST_IRIS) & (self.index < MEDIAPIPE_POINTS)
        eyes = head.regions["eyes"][head.faces].all(1)
        hidden = torch.stack(
            [head.regions[r] for r in ("mouth", "teeth", "tongue", "sockets", "cap", "eyes") if r in head.regions]
        ).any(0)
        skin = ~hidden[head.faces].all(1)
        face = torch.zeros(len(self.index), dtype=torch.int64)
        bary = torch.zeros(len(self.index), 3)
        for rows, allowed in ((iris, eyes), (~iris, skin)):
            if rows.any():
                choice = allowed.nonzero()[:, 0]
                local, weights = closest(self.position[rows], head.template[head.faces[choice]])
                face[rows], bary[rows] = choice[local], weights
        return Landmarks(face, bary)


def known_points(head: Head) -> tuple[Landmarks, Int[Tensor, " points"]]:
    """Return the numbered landmarks of a head's own file: MediaPipe's, then the 68."""
    both = head.mediapipe, head.landmarks68
    index = torch.cat([head.mediapipe_index, IBUG + torch.arange(len(head.landmarks68.face_index))])
    return Landmarks(torch.cat([x.face_index for x in both]), torch.cat([x.bary for x in both])), index


def choose_points(head: Head, count: int = 192) -> SurfacePoints:
    """Return the points for a network: features of the face, its outline, and points spread over the rest."""
    landmarks, index = known_points(head)
    position = landmarks.on(head.template, head.faces)
    iris = range(FIRST_IRIS, MEDIAPIPE_POINTS)
    wanted = torch.tensor(sorted({*LIPS, *EYES, *BROWS, *NOSE, *CONTOUR, *iris, *JAW}))
    rows = torch.isin(index, wanted)
    index, position = index[rows][:count], position[rows][:count]
    hidden = torch.stack([head.regions[r] for r in ("mouth", "teeth", "tongue", "sockets", "cap", "eyes")]).any(0)
    free = head.regions["skin"] & head_region(head) & ~hidden & (head.template[:, 2] > -0.05)
    others = head.template[free]
    distance = torch.cdist(others, position).amin(1)
    for k in range(count - len(index)):
        far = distance.argmax()
        index = torch.cat([index, torch.tensor([OWN + k])])
        position = torch.cat([position, others[far][None]])
        distance = torch.minimum(distance, (others - others[far]).norm(dim=1))
    return SurfacePoints(index, position)


def closest(
    points: Float[Tensor, "points 3"], triangles: Float[Tensor, "faces 3 3"]
) -> tuple[Int[Tensor, " points"], Float[Tensor, "points 3"]]:
    """Return each point's nearest triangle and the barycentric weights of the nearest place on it."""
    near = torch.cdist(points, triangles.mean(1)).topk(min(48, len(triangles)), largest=False).indices
    a, b, c = triangles[near].unbind(-2)
    p = points[:, None]
    weights = torch.stack([*_inside(p, a, b, c), *(_edge(p, (a, b, c), i) for i in range(3))], 2)
    # Weights outside the triangle belong to its plane, not to it.
    valid = (weights >= -1e-6).all(-1)
    place = (weights[..., None] * torch.stack([a, b, c], -2)[:, :, None]).sum(-2)
    distance = (place - p[:, :, None]).norm(dim=-1).masked_fill(~valid, torch.inf)
    best = distance.flatten(1).argmin(1)
    k = weights.shape[2]
    rows = torch.arange(len(points))
    chosen = weights[rows, best // k, best % k].clamp(min=0)
    return near[rows, best // k], chosen / chosen.sum(-1, keepdim=True)


def _inside(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """Return the barycentric weights of the points' projections onto the triangles' planes."""
    u, v, w = b - a, c - a, p - a
    uu, uv, vv, wu, wv = (x.mul(y).sum(-1) for x, y in ((u, u), (u, v), (v, v), (w, u), (w, v)))
    denominator = (uu * vv - uv * uv).clamp(min=1e-20)
    s, t = (vv * wu - uv * wv) / denominator, (uu * wv - uv * wu) / denominator
    return [torch.stack([1 - s - t, s, t], -1)]


def _edge(p: Tensor, corners: tuple[Tensor, Tensor, Tensor], i: int) -> Tensor:
    """Return the barycentric weights of the nearest place on the edge from corner i to the next."""
    a, b = corners[i], corners[(i + 1) % 3]
    t = (((p - a) * (b - a)).sum(-1) / (b - a).square().sum(-1).clamp(min=1e-20)).clamp(0, 1)
    out = torch.zeros(*t.shape, 3)
    out[..., i], out[..., (i + 1) % 3] = 1 - t, t
    return out
