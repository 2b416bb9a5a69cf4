"""From a tracked portrait, target head poses and driving crops to frames, normals and expression tokens."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import composite, decode_normals, encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.crops import crop_image, face_crop_box
from geodiff4d.render.meshes import rasterize, render_normals
from geodiff4d.render.relief import LiftedPortrait, lift_portrait
from geodiff4d.video.detail import restore_detail
from geodiff4d.video.memory import alone
from geodiff4d.video.model import ConditionImages, Conditions, VideoModel
from geodiff4d.video.outline import coverage, freed
from geodiff4d.video.sample import SampleConfig, sample
from geodiff4d.video.tone import tone_of
from geodiff4d.video.windows import runs_of

TEXELS = 256
"""Side of the completed texture; the same as in training."""


@dataclass(frozen=True)
class Portrait:
    """A tracked portrait in its canonical crop."""

    image: Float[Tensor, "3 height width"]
    mask: Float[Tensor, "1 height width"]
    """Foreground: head, hair, neck and the start of the shoulders."""
    camera: Camera
    params: HeadParams
    """Tracked parameters (no batch axis)."""
    normal: Float[Tensor, "3 height width"] | None = None
    """Camera-space normals of an estimator, if the user has one; else the model generates its own."""

    @property
    def on_grey(self) -> Float[Tensor, "3 height width"]:
        """The picture as the model sees it."""
        return composite(self.image, self.mask)


@dataclass(frozen=True)
class Generated:
    """What the video model made."""

    rgb: Float[Tensor, "t 3 height width"]
    """On plain grey."""
    normal: Float[Tensor, "t 3 height width"]
    """Camera-space unit normals, zero on the background."""
    mask: Float[Tensor, "t 1 height width"]
    tokens: Float[Tensor, "t tokens channels"]


def with_identity_of(portrait: Portrait, driver: HeadParams) -> HeadParams:
    """Give the driver's motion the portrait's shape: the driver's own would leak its identity (docs/CONVENTIONS.md)."""
    batch = driver.batch
    return replace(
        driver,
        shape=portrait.params.shape.expand(*batch, -1),
        static_offset=None
        if portrait.params.static_offset is None
        else portrait.params.static_offset.expand(*batch, -1, -1),
    )


def driving_crop(
    image: Float[Tensor, "3 height width"], head: Head, params: HeadParams, camera: Camera, size: int
) -> Float[Tensor, "3 size size"]:
    """Cut the face by the landmarks of the tracked head at zero expression: the cut does not tell the expression."""
    points = head.landmarks68.on(head.pose(params.without_expression()).vertices, head.faces)
    return crop_image(image, face_crop_box(camera.project(points)[0]), size)


def lifted(head: Head, portrait: Portrait, surroundings: bool) -> LiftedPortrait:
    """Lift the portrait off its picture, once for all targets."""
    mesh = head.pose(portrait.params)
    return lift_portrait(head, portrait.on_grey, portrait.mask, mesh, portrait.camera, TEXELS, surroundings)


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
    """Give heads the expression that the latents say, if the model can read it off for this head."""
    coefficients = model.expression.config.motion
    if coefficients != len(head.expression_names) + 3:
        return None
    motion = model.expression.motion(latents)[0]
    return replace(params.without_expression(), expr=motion[:, :-3], jaw_pose=motion[:, -3:])


@torch.no_grad()
def generate(
    model: VideoModel,
    head: Head,
    portrait: Portrait,
    params: HeadParams,
    cameras: Camera,
    crops: Float[Tensor, "t 3 size size"],
    config: SampleConfig,
    progress: Progress = silent,
    drop_expression: bool = False,
) -> Generated:
    """Generate one frame for each (head pose, camera, driving crop), on the model's device; the result is on the CPU.

    Args:
        params: target head parameters in the portrait's shape (`with_identity_of`); their expression is not read.
        drop_expression: use the null expression, as a control.
        progress: shown the number of frames finished.
    """
    device = model.device
    portrait = replace(portrait, image=portrait.image.to(device), mask=portrait.mask.to(device),
                       camera=portrait.camera.to(device), params=portrait.params.to(device),
                       normal=None if portrait.normal is None else portrait.normal.to(device))  # fmt: skip
    head, params, cameras = head.to(device), params.to(device), cameras.to(device)
    texture = lifted(head, portrait, model.config.surroundings)
    own = condition_images(head, texture, HeadParams.stack([portrait.params]), Camera.stack([portrait.camera]))
    own_pose = model.pose_planes(own.pose)
    image_latent = model.codec.encode(portrait.on_grey[None])
    words = model.words(portrait.on_grey[None])
    kv = model.reference_kv(image_latent, own_pose[:, :, 0], words)

    latents = model.encode_expressions(crops.to(device))
    null = torch.zeros_like(latents)
    start = None
    # A schedule that ends in plain noise shows nothing of its start.
    if config.start != "noise" and not model.config.diffusion.zero_terminal:
        start = _start(
            model, head, portrait, image_latent, model.conditions(own, pose_planes=own_pose), kv, words, config
        )
    driven = null if drop_expression else latents
    moved = moved_by(model, head, params, driven)
    conditions = _conditions(model, head, texture, params, cameras, moved, config.chunk)
    z = sample(model, conditions, driven, kv, start, config, progress, runs_of(cameras), words)
    with alone(model, "codec", offload=config.offload):
        images = _decode(model, z, head, texture, params, cameras, moved, config)
    rgb, tokens = rearrange(images[:, 0], "1 c t h w -> t c h w"), model.expression.tokens(latents)[0].cpu()
    tone = tone_of(portrait.image, portrait.mask)
    if not model.config.normals:
        rgb = (tone.kept(rgb) if tone else rgb).cpu()
        return Generated(rgb, torch.zeros_like(rgb), torch.ones_like(rgb[:, :1]), tokens)
    encoded = rearrange(images[:, 1], "1 c t h w -> t c h w")
    rgb, mask = freed(rgb, coverage(encoded))
    rgb = tone.kept(rgb) if tone else rgb
    normal = decode_normals(encoded) * (mask > 0)
    return Generated(composite(rgb, mask).cpu(), normal.cpu(), mask.cpu(), tokens)


def _conditions(
    model: VideoModel, head: Head, texture: LiftedPortrait, params: HeadParams, cameras: Camera,
    moved: HeadParams | None, chunk: int,
) -> Conditions:  # fmt: skip
    """Draw and encode the conditions chunk by chunk, so that full-size images never exist for the whole clip."""
    parts = []
    for first in range(0, params.batch[0], chunk):
        part = slice(first, first + chunk)
        here = None if moved is None else moved[part]
        parts.append(model.conditions(condition_images(head, texture, params[part], cameras[part], here)))
    return Conditions(torch.cat([p.planes for p in parts], 2), torch.cat([p.base for p in parts], 3))


def _decode(
    model: VideoModel,
    z: Tensor,
    head: Head,
    texture: LiftedPortrait,
    params: HeadParams,
    cameras: Camera,
    moved: HeadParams | None,
    config: SampleConfig,
) -> Float[Tensor, "1 d 3 t height width"]:
    """Decode chunk by chunk and take over the warped portrait's detail, if asked for."""
    out = []
    for first in range(0, z.shape[3], config.chunk):
        part = slice(first, first + config.chunk)
        images = model.decode_latents(z[:, :, :, part])
        if config.detail > 0 and model.config.warp:
            here = None if moved is None else moved[part]
            known = condition_images(head, texture, params[part], cameras[part], here)
            assert known.warp is not None
            assert known.visibility is not None
            # Normals stay as they are: the tracked head's own detail brings them no nearer to the truth (docs/LOG.md).
            seen, inside = known.visibility.split(1, 1)
            planes = (images[:, 0], known.warp, seen, torch.maximum(seen, inside))
            decoded, carried, seen, shown = (rearrange(x, "1 c t h w -> t c h w") for x in planes)
            frames = restore_detail(decoded, carried, seen, shown, config.detail)
            images[:, 0] = rearrange(frames, "t c h w -> 1 c t h w")
        out.append(images)
    return torch.cat(out, 3)


def _start(
    model: VideoModel,
    head: Head,
    portrait: Portrait,
    image_latent: Tensor,
    conditions: Conditions,
    kv: list,
    words: Tensor | None,
    config: SampleConfig,
) -> Float[Tensor, "1 d c h w"]:
    """Latents of the reference image and its normals, the clean part of the first noisy latent (S-A.1)."""
    if not model.config.normals:
        return image_latent[:, None]
    if portrait.normal is not None:
        normal = model.codec.encode(encode_normals(portrait.normal, portrait.mask)[None].to(image_latent))
    else:
        crop = driving_crop(portrait.on_grey, head, portrait.params, portrait.camera, model.config.expression.size)
        plain = replace(config, start="noise")
        normal = sample(model, conditions, model.encode_expressions(crop[None]), kv, None, plain, words=words)[
            :, 1, :, 0
        ]
    return torch.stack([image_latent, normal], 1)
