"""Generators: from a tracked portrait, a performance and cameras to frames, normals and expression tokens.

`DiffusionGenerator` is the paper's video model; `WarpGenerator` carries the portrait's texture on the tracked head and
needs no model. Both answer the same request with the same `Generated`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import composite, decode_normals, encode_normals
from geodiff4d.core.progress import Progress, advancing, in_passes, passed_on, silent
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.relief import render_lifted
from geodiff4d.video.conditions import Targets, condition_images, lifted, warped_frames
from geodiff4d.video.decoder import GuidedDecoder
from geodiff4d.video.finish import surface_mask
from geodiff4d.video.frames import SampledFrames
from geodiff4d.video.inputs import Driving, Portrait, driving_crop
from geodiff4d.video.memory import alone
from geodiff4d.video.model import Conditions, VideoModel
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample
from geodiff4d.video.windows import runs_of


@dataclass(frozen=True)
class GenerationRequest:
    """Who is to be shown, and who drives."""

    portrait: Portrait
    driving: Driving
    """Generators take its shape for the portrait's (`with_identity_of`): another identity would be drawn as it is."""
    head: Head
    """The parametric head that both are tracked on."""


@dataclass(frozen=True)
class Generated:
    """What a generator made, on the CPU."""

    rgb: Float[Tensor, "t 3 height width"]
    """In [0, 1], on plain grey."""
    normal: Float[Tensor, "t 3 height width"]
    """Camera-space unit normals, zero on the background; zero everywhere if the model generates none."""
    mask: Float[Tensor, "t 1 height width"]
    """Foreground in [0, 1]; 1 everywhere if the model generates no normals."""
    tokens: Float[Tensor, "t tokens channels"]
    """Expression tokens of every frame; zero where no encoder read them."""


@runtime_checkable
class Generator(Protocol):
    """What makes frames of a portrait."""

    def generate(self, request: GenerationRequest, cameras: Camera, progress: Progress = silent) -> Generated:
        """Generate one frame for each driving frame and its camera; `cameras` are [frames]."""
        ...

    def fingerprint(self) -> str:
        """Hash everything that the frames depend on, but not what only takes more or less memory."""
        ...

    def about(self) -> dict[str, Any]:
        """Return what the notes of a clip say of its generator; `generator` is its name on the command line."""
        ...


@dataclass(frozen=True)
class WarpGenerator:
    """The portrait's texture on the tracked head, in the driver's expression; hair and shoulders on a sheet.

    See `render/relief.py`.
    """

    @torch.no_grad()
    def generate(self, request: GenerationRequest, cameras: Camera, progress: Progress = silent) -> Generated:
        """Generate one frame for each driving frame and its camera, on the CPU."""
        head, params = request.head, request.driving.params
        texture = lifted(head, request.portrait, surroundings=True)
        frames = [
            render_lifted(texture, head.pose(params[i : i + 1]), cameras[i : i + 1])
            for i in progress(range(params.batch[0]), "warping")
        ]
        rgb, normal, mask = (torch.cat([f[k] for f in frames]) for k in range(3))
        return Generated(rgb, normal, mask, torch.zeros(len(rgb), 1, 1))

    def fingerprint(self) -> str:
        """Hash the name: there is nothing to choose."""
        return fingerprint("warp")

    def about(self) -> dict[str, Any]:
        """Return the name."""
        return {"generator": "warp"}


MEMORY_OPTIONS = ("offload", "batched_cfg", "chunk")
"""Of `SampleConfig`: they change how much memory sampling takes, and no frame."""


MOST_PX = 2048
"""Largest side of a frame."""


def require_frame_size(size: int, own: int, decoder: GuidedDecoder | None) -> None:
    """Check that a model whose own size is `own` can make frames of a size [px].

    Raises:
        UserError: it cannot.
    """
    if size == own:
        return
    if decoder is None:
        raise UserError(f"frames of {size} px: this model has no guided decoder, expected {own} px")
    if size % decoder.stride or not own <= size <= MOST_PX:
        raise UserError(f"frames of {size} px: expected a multiple of {decoder.stride} from {own} to {MOST_PX} px")


@dataclass(frozen=True)
class Sampled:
    """Latents of frames, before they are decoded, and what is known of the frames beside them."""

    latents: Float[Tensor, "1 domains c t h w"]
    tokens: Float[Tensor, "t tokens channels"]
    """Expression tokens, on the CPU."""
    targets: Targets
    """The frames at the size that is wanted."""
    portrait: Portrait
    """The portrait that the targets show."""


@dataclass(frozen=True)
class DiffusionGenerator:
    """The video model, sampled in one way."""

    model: VideoModel
    sample: SampleConfig = SampleConfig()
    drop_expression: bool = False
    """Drive by the null expression, as a control."""

    @torch.no_grad()
    def generate(self, request: GenerationRequest, cameras: Camera, progress: Progress = silent) -> Generated:
        """Generate one frame for each driving frame and its camera, on the model's device.

        The pose is the parameters', and so is the expression that the warped portrait moves by (ours); the expression
        tokens are read from the crops alone (Sec. 3.1, 3.2).
        """
        require_frame_size(cameras.width, self.model.config.size, self.model.decoder)
        made = []
        # Frames are sampled, and then decoded, which at 512 px takes longer.
        with advancing(progress, "generating", request.driving.params.batch[0]) as advance:
            pass_over = in_passes(advance, 2)
            frames = self.sampled(request, cameras, passed_on(pass_over))
            with alone(self.model, "codec", "decoder", offload=self.sample.offload):
                for part, here in frames.targets.chunks(self.sample.chunk):
                    made.append(self._finished(frames.latents[:, :, :, part], here, frames.portrait))
                    pass_over(len(made[-1][0]))
        rgb, normal, mask = (torch.cat(x) for x in zip(*made, strict=True))
        return Generated(rgb, normal, mask, frames.tokens)

    @torch.no_grad()
    def sampled(self, request: GenerationRequest, cameras: Camera, progress: Progress = silent) -> Sampled:
        """Sample the frames' latents, and say what they are to show, on the model's device.

        A model with a guided decoder gives frames of the cameras' size, whatever its own is.
        """
        model, config, device = self.model, self.sample, self.model.device
        head, whole = request.head.to(device), request.portrait.to(device)
        params, cameras = request.driving.params.to(device), cameras.to(device)
        portrait, small = whole.resized(model.config.size), cameras.resized(model.config.size, model.config.size)
        reading = _Reading(model, head, portrait)
        latents = model.encode_expressions(request.driving.crops.to(device))
        tokens = model.expression.tokens(latents)[0].cpu()
        if self.drop_expression:
            latents = torch.zeros_like(latents)
        # A model that never saw a warped portrait move is shown one at rest.
        moved = params if model.config.moves and not self.drop_expression else None
        targets = Targets(head, reading.texture, params, small, moved)
        parts = [model.conditions(part.images()) for _, part in targets.chunks(config.chunk)]
        conditions = Conditions(torch.cat([p.planes for p in parts], 2), torch.cat([p.base for p in parts], 3))
        runs = runs_of(cameras) if request.driving.temporal else [1] * len(params.expr)
        given = ClipInputs(
            conditions, latents, reading.reference, reading.start(config), reading.image_context, runs
        )  # fmt: skip
        z = sample(model, given, config, progress)
        if model.decoder is None or cameras.width == model.config.size:
            return Sampled(z, tokens, targets, portrait)
        texture = lifted(head, whole, model.config.surroundings)
        return Sampled(z, tokens, replace(targets, portrait=texture, cameras=cameras), whole)

    def _finished(
        self, z: Float[Tensor, "1 d c t h w"], targets: Targets, portrait: Portrait
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode latents and finish the frames; returns (rgb, normals, mask) as `Generated` has them."""
        images = rearrange(self.model.decode_latents(z), "1 d c t h w -> d t c h w")
        if self.model.decoder is not None:
            frames = self.model.decoder.decode(images[0], images[1], warped_frames(targets.images()))
        elif self.model.config.normals:
            frames = SampledFrames(images[0], images[1], surface_mask(images[1]))
        else:
            frames = SampledFrames(images[0], None, torch.ones_like(images[0, :, :1]))
        for finish in self.sample.finish:
            frames = finish(frames, portrait)
        normals = torch.zeros_like(frames.rgb) if frames.normals is None else decode_normals(frames.normals)
        return composite(frames.rgb, frames.mask).cpu(), (normals * (frames.mask > 0)).cpu(), frames.mask.cpu()

    def without_expression(self) -> "DiffusionGenerator":
        """Return the control that is driven by the null expression, without guidance: there is none to guide by."""
        return replace(self, sample=replace(self.sample, guidance=1.0), drop_expression=True)

    def fingerprint(self) -> str:
        """Hash weights and sampling, without what only takes more or less memory."""
        drawn = {f.name: getattr(self.sample, f.name) for f in fields(SampleConfig) if f.name not in MEMORY_OPTIONS}
        return fingerprint("diffusion", self.model.config, self.model.state_dict(), repr(drawn), self.drop_expression)

    def about(self) -> dict[str, Any]:
        """Return the name and the settings that tell most."""
        return {"generator": "diffusion", "steps": self.sample.steps, "guidance": self.sample.guidance}


class _Reading:
    """What the model reads off a portrait, once for all frames."""

    def __init__(self, model: VideoModel, head: Head, portrait: Portrait):
        self.model, self.head, self.portrait = model, head, portrait
        self.texture = lifted(head, portrait, model.config.surroundings)
        params, camera = HeadParams.stack([portrait.params]), Camera.stack([portrait.camera])
        self.images = condition_images(head, self.texture, params, camera)
        self.pose = model.pose_planes(self.images.pose)
        self.latent = model.codec.encode(portrait.on_grey[None])
        self.image_context = model.image_context(portrait.on_grey[None])
        self.reference = model.reference_kv(self.latent, self.pose[:, :, 0], self.image_context)

    def start(self, config: SampleConfig) -> Float[Tensor, "1 d c h w"] | None:
        """Return latents of the reference image and its normals, the clean part of the first noisy latent (S-A.1).

        None where the first latent is noise alone: by choice, or because the schedule ends in noise that shows nothing
        of its start.
        """
        if config.start == "noise" or self.model.config.diffusion.zero_terminal:
            return None
        if not self.model.config.normals:
            return self.latent[:, None]
        return torch.stack([self.latent, self._normal_latent(config)], 1)

    def _normal_latent(self, config: SampleConfig) -> Float[Tensor, "1 c h w"]:
        """Encode the portrait's normals; where no estimator gave any, sample them from noise."""
        model, portrait = self.model, self.portrait
        if portrait.normal is not None:
            return model.codec.encode(encode_normals(portrait.normal, portrait.mask)[None].to(self.latent))
        size = model.config.expression.size
        crop = driving_crop(portrait.on_grey, self.head, portrait.params, portrait.camera, size)
        conditions = model.conditions(self.images, pose_planes=self.pose)
        latents, plain = model.encode_expressions(crop[None]), replace(config, start="noise")
        z = sample(
            model, ClipInputs(conditions, latents, self.reference, image_context=self.image_context), plain
        )  # fmt: skip
        return z[:, 1, :, 0]
