"""What is drawn of a portrait before anything is generated: pose maps, and its texture on the head (Sec. 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from einops import rearrange

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import encode_normals
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.hidden import inside_of_mouth
from geodiff4d.render.merge import MergedPortrait, View, merge_portraits
from geodiff4d.render.meshes import interpolate, rasterize, render_normals
from geodiff4d.render.relief import LiftedPortrait, lift_portrait
from geodiff4d.video.frames import WarpedFrames
from geodiff4d.video.inputs import Portrait
from geodiff4d.video.model import ConditionImages

TEXELS = 256
"""Side of the completed texture, the same as in training, up to a portrait of that size; else the portrait's."""


Lifted = LiftedPortrait | MergedPortrait
"""One portrait or several, ready to be drawn in other poses and views."""


def lifted(head: Head, portrait: Portrait, surroundings: bool) -> Lifted:
    """Lift a portrait's texture onto its head, once for all targets; of several portraits, what each shows best.

    `surroundings` adds hair and shoulders.
    """
    mesh, texels = head.pose(portrait.params), max(TEXELS, portrait.image.shape[-1])
    if portrait.others:
        views = [View(p.on_grey, p.mask, head.pose(p.params), p.camera) for p in (portrait, *portrait.others)]
        return merge_portraits(head, views, texels, surroundings)
    return lift_portrait(head, portrait.on_grey, portrait.mask, mesh, portrait.camera, texels, surroundings)


def condition_images(
    head: Head, portrait: Lifted, params: HeadParams, cameras: Camera, moved: HeadParams | None = None
) -> ConditionImages:
    """Draw pose map, warped portrait and its visibility for every target frame.

    The pose map is at zero expression, and so is the warped portrait, unless `moved` gives it an expression.
    """
    still = head.pose(params.without_expression())
    fragments = rasterize(still.vertices, head.faces, cameras)
    normals, mask = render_normals(still, cameras, fragments)
    if moved is not None:
        fragments = rasterize(head.pose(moved).vertices, head.faces, cameras)
    warp, visibility = portrait.shown(fragments, still.T_world_joint, cameras)
    inside = interpolate(fragments, head.faces, inside_of_mouth(head).to(warp)[:, None])
    images = (encode_normals(normals, mask), warp, visibility, inside * (1 - visibility[:, :1]))
    return ConditionImages(*(rearrange(x, "t c h w -> 1 c t h w") for x in images))


def warped_frames(drawn: ConditionImages) -> WarpedFrames:
    """Return a clip's warped portrait as the guided decoder sees it; the model must be conditioned on one."""
    assert drawn.warp is not None
    assert drawn.visibility is not None
    assert drawn.opened is not None
    rgb, visibility, opened, pose = (
        rearrange(x, "1 c t h w -> t c h w") for x in (drawn.warp, drawn.visibility, drawn.opened, drawn.pose)
    )
    return WarpedFrames(rgb, visibility[:, :1], visibility[:, 1:], opened, pose)


@dataclass(frozen=True)
class Targets:
    """The frames that are asked of a portrait: how its head is posed in each, and which camera sees it."""

    head: Head
    portrait: Lifted
    params: HeadParams
    """[frames, …], in the portrait's shape; pose maps do not read the expression."""
    cameras: Camera
    """[frames]."""
    moved: HeadParams | None
    """The same heads with the driver's expression and gaze, for the warped portrait; None: it stays at rest."""

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
