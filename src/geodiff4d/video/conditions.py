"""What is drawn of a portrait before anything is generated: pose maps, and its texture on the head (Sec. 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import encode_normals
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import rasterize, render_normals
from geodiff4d.render.relief import LiftedPortrait, lift_portrait
from geodiff4d.video.inputs import Portrait
from geodiff4d.video.model import ConditionImages, VideoModel

TEXELS = 256
"""Side of the completed texture; the same as in training."""


def lifted(head: Head, portrait: Portrait, surroundings: bool, painted: bool = False) -> LiftedPortrait:
    """Lift a portrait's texture onto its head, once for all targets.

    `surroundings` adds hair and shoulders, `painted` colours for what it hides of mouth and eyes (`render/hidden.py`).
    """
    mesh = head.pose(portrait.params)
    return lift_portrait(head, portrait.on_grey, portrait.mask, mesh, portrait.camera, TEXELS, surroundings, painted)


def condition_images(
    head: Head, portrait: LiftedPortrait, params: HeadParams, cameras: Camera, moved: HeadParams | None = None
) -> ConditionImages:
    """Draw pose map, warped portrait and its visibility for every target frame.

    The pose map is at zero expression, and so is the warped portrait, unless `moved` says what the latents say.
    """
    still = head.pose(params.without_expression())
    fragments = rasterize(still.vertices, head.faces, cameras)
    normals, mask = render_normals(still, cameras, fragments)
    if moved is not None:
        fragments = rasterize(head.pose(moved).vertices, head.faces, cameras)
    warp, visibility = portrait.shown(fragments, still.T_world_joint, cameras)
    to_clip = "t c h w -> 1 c t h w"
    return ConditionImages(
        rearrange(encode_normals(normals, mask), to_clip), rearrange(warp, to_clip),
        rearrange(visibility, to_clip),
    )  # fmt: skip


def moved_by(model: VideoModel, head: Head, params: HeadParams, latents: Float[Tensor, "1 t f"]) -> HeadParams | None:
    """Give heads the expression that the latents say; None if the model cannot read it off for this head."""
    coefficients = model.expression.config.motion
    if coefficients != len(head.expression_names) + 3:
        return None
    motion = model.expression.motion(latents)[0]
    return replace(params.without_expression(), expr=motion[:, :-3], jaw_pose=motion[:, -3:])


def with_known(moved: HeadParams | None, params: HeadParams, known: Bool[Tensor, " frames"]) -> HeadParams:
    """Put known expressions, jaws and eyes in place of what latents say (None: nothing, a face at rest)."""
    read = params.without_expression() if moved is None else moved

    def chosen(name: str) -> Tensor:
        return torch.where(known[:, None], getattr(params, name), getattr(read, name))

    return replace(read, **{name: chosen(name) for name in ("expr", "jaw_pose", "eyes_pose")})


@dataclass(frozen=True)
class Targets:
    """The frames that are asked of a portrait: how its head is posed in each, and which camera sees it."""

    head: Head
    portrait: LiftedPortrait
    params: HeadParams
    """[frames, …], in the portrait's shape; expressions in it are not read."""
    cameras: Camera
    """[frames]."""
    moved: HeadParams | None
    """The same heads with the expression that the latents say (`moved_by`), for the warped portrait."""

    def __len__(self) -> int:
        return self.params.batch[0]

    def chunks(self, size: int) -> Iterator[tuple[slice, "Targets"]]:
        """Yield stretches of at most `size` frames, and where they are: full-size images exist for one at a time."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            moved = None if self.moved is None else self.moved[part]
            yield part, replace(self, params=self.params[part], cameras=self.cameras[part], moved=moved)

    def images(self) -> ConditionImages:
        """Draw the condition images of all frames (`condition_images`)."""
        return condition_images(self.head, self.portrait, self.params, self.cameras, self.moved)
