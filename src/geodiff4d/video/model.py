"""The joint RGB + normal model: denoiser, reference network, expression encoder and codec under one roof (Sec. 3.2).

Latents are `[batch, domains, channels, frames, height, width]`, domains ordered ("rgb", "normal"). The frame axis is
frames or views: without temporal modules it is a batch axis that shares one reference.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from geodiff4d.core.deferred import deferred
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import MARKER, fresh_folder, load_model, save_model
from geodiff4d.video.attention import ReferenceKV
from geodiff4d.video.decoder import GuidedDecoder, load_decoder
from geodiff4d.video.diffusion import Diffusion, DiffusionConfig
from geodiff4d.video.expression import ExpressionConfig, ExpressionEncoder
from geodiff4d.video.image_encoder import ImageEncoder, load_image_encoder
from geodiff4d.video.unet import UNet, UNetConfig
from geodiff4d.video.vae import Codec, StableCodec, load_codec


@dataclass(frozen=True)
class VideoModelConfig:
    """What a video model is made of."""

    unet: UNetConfig = UNetConfig()
    reference: UNetConfig = UNetConfig(expression_dim=None, reference=True)
    expression: ExpressionConfig = ExpressionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    size: int = 512
    """Side of the square images [px]."""
    pose: Literal["interpolate", "codec"] = "interpolate"
    """How the pose map reaches the latent grid: resized (Sec. 3.2) or encoded like an image (embedded)."""
    warp: bool = False
    """Give the denoiser the portrait carried to the target pose (ours, beyond the paper)."""
    surroundings: bool = False
    """Let the carried portrait show hair and shoulders beside the head's mesh (`render/relief.py`)."""
    moves: bool = False
    """Whether carried portraits take the driver's expression; off, they keep still, as where a model was trained on
    data whose motion nobody knew."""
    joint_attention: bool = True
    """Whether the domains attend to each other (Table 2, "w/o domain attn.")."""
    normals: bool = True
    """Whether normals are generated at all (Table 2, "w/o joint rep.")."""

    def __post_init__(self) -> None:
        if self.diffusion.prediction == "residual" and not (self.warp and self.pose == "codec"):
            raise ValueError('prediction "residual" needs warp=True and pose="codec": they are its base')

    @property
    def domains(self) -> tuple[int, ...]:
        return (0, 1) if self.normals else (0,)


@dataclass(frozen=True)
class ConditionImages:
    """What is known of the target frames before anything is generated, as images in [0, 1]."""

    pose: Float[Tensor, "b 3 t height width"]
    """Pose maps (Sec. 3.2)."""
    warp: Float[Tensor, "b 3 t height width"] | None = None
    """The portrait's texture on the head in the target pose, holes filled."""
    visibility: Float[Tensor, "b 2 t height width"] | None = None
    """Where the portrait itself shows the point, and where the head is at all."""
    opened: Float[Tensor, "b 1 t height width"] | None = None
    """Where the inside of the mouth is that the portrait hides: for the guided decoder, not for the denoiser."""


@dataclass(frozen=True)
class Conditions:
    """The same on the latent grid."""

    planes: Float[Tensor, "b p t h w"]
    """Channels concatenated to the noisy latents of both domains."""
    base: Float[Tensor, "b d c t h w"]
    """What the conditions alone would say the latents are; zeros unless the prediction is "residual"."""


def _fold(x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "n c h w"]:
    return rearrange(x, "b c t h w -> (b t) c h w")


class VideoModel(nn.Module):
    """Everything that is trained together, and the codec."""

    def __init__(
        self, config: VideoModelConfig, codec: Codec, image_encoder: ImageEncoder | None = None,
        decoder: GuidedDecoder | None = None,
    ):  # fmt: skip
        """`image_encoder` makes the token that SD's text attention reads, where there is one; `decoder` finishes what
        the codec decodes."""
        super().__init__()
        pose = codec.channels if config.pose == "codec" else 3
        needed = codec.channels + pose + (codec.channels + 2 if config.warp else 0)
        for name, unet, channels in (
            ("unet", config.unet, needed),
            ("reference", config.reference, codec.channels + pose),
        ):
            if unet.in_channels != channels:
                raise ValueError(
                    f"{name}.in_channels must be {channels} for this codec and these conditions, got {unet.in_channels}"
                )
        if image_encoder is not None and image_encoder.config.projection_dim != config.unet.cross_dim:
            raise ValueError(
                f"the image encoder's token has {image_encoder.config.projection_dim} numbers, but unet.cross_dim is "
                f"{config.unet.cross_dim}"
            )
        self.config, self.codec, self.image_encoder, self.decoder = config, codec, image_encoder, decoder
        self.unet = UNet(config.unet)
        self.reference = UNet(config.reference)
        self.expression = ExpressionEncoder(config.expression)
        self.diffusion = Diffusion(config.diffusion)
        self._compiled = False

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def temporal(self) -> bool:
        """Whether frames see each other (stage 2)."""
        return self.config.unet.temporal_layers > 0

    def compact(self) -> "VideoModel":
        """Hold the large networks in bf16: half the memory, for inference alone. Returns itself."""
        for network in (self.unet, self.reference, *([self.codec] if isinstance(self.codec, StableCodec) else [])):
            network.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return self

    def compile_steps(self) -> None:
        """Compile the denoiser, as CUDA graphs where there is CUDA; the first steps then take a minute or more."""
        if not self._compiled:
            self.unet.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
            self._compiled = True

    def networks(self) -> dict[str, nn.Module]:
        """The trained networks by name; the codec is frozen."""
        return {"unet": self.unet, "reference": self.reference, "expression": self.expression}

    def encode_expressions(self, crops: Float[Tensor, "t 3 size size"]) -> Float[Tensor, "1 t f"]:
        """Encode a driving clip's face crops in [0, 1] to expression latents, frame by frame (Sec. 3.1)."""
        return torch.cat([self.expression(part) for part in crops.split(64)])[None]

    def image_context(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 1 x"] | None:
        """Encode portraits in [0, 1] to what SD's text attention reads: CLIP's token, or a zero one where there is no
        image encoder; None if the networks have no such attention."""
        width = self.config.unet.cross_dim
        if width is None:
            return None
        return images.new_zeros(len(images), 1, width) if self.image_encoder is None else self.image_encoder(images)

    def encode_images(self, images: Float[Tensor, "b c t height width"]) -> Float[Tensor, "b z t h w"]:
        """Encode a clip of images in [0, 1]."""
        return rearrange(self.codec.encode(_fold(images)), "(b t) c h w -> b c t h w", b=len(images))

    def decode_latents(self, z: Float[Tensor, "b d c t h w"]) -> Float[Tensor, "b d 3 t height width"]:
        """Decode both domains to images in [0, 1]."""
        b, d = z.shape[:2]
        images = self.codec.decode(rearrange(z, "b d c t h w -> (b d t) c h w"))
        return rearrange(images, "(b d t) c h w -> b d c t h w", b=b, d=d)

    def pose_planes(self, pose: Float[Tensor, "b 3 t height width"]) -> Float[Tensor, "b p t h w"]:
        """Bring pose maps to the latent grid, by resizing (Sec. 3.2) or through the codec."""
        if self.config.pose == "codec":
            return self.encode_images(pose)
        small = interpolate(_fold(pose) * 2 - 1, scale_factor=1 / self.codec.factor, mode="area")
        return rearrange(small, "(b t) c h w -> b c t h w", b=len(pose))

    def conditions(self, images: ConditionImages, pose_planes: Float[Tensor, "b p t h w"] | None = None) -> Conditions:
        """Encode the conditions; `pose_planes` are those of `images.pose`, where they are known already."""
        pose = self.pose_planes(images.pose) if pose_planes is None else pose_planes
        return self.join_conditions(pose, images.warp, images.visibility)

    def join_conditions(
        self, pose: Float[Tensor, "b p t h w"], warp_images: Float[Tensor, "b 3 t height width"] | None,
        visibility: Float[Tensor, "b 2 t height width"] | None, keep_warp: Bool[Tensor, " b"] | None = None,
    ) -> Conditions:  # fmt: skip
        """Encode the warped portrait beside pose planes; rows with `keep_warp` false get none (training drops 0.15).

        Raises:
            ValueError: the model is conditioned on the warped portrait, and there is none.
        """
        d, c = len(self.config.domains), self.codec.channels
        b, _, t, h, w = pose.shape
        base = pose.new_zeros(b, d, c, t, h, w)
        if not self.config.warp:
            return Conditions(pose, base)
        if warp_images is None or visibility is None:
            raise ValueError(
                "this model is conditioned on the warped portrait: expected its images and their visibility"
            )
        warp = self.encode_images(warp_images)
        seen = rearrange(avg_pool2d(_fold(visibility), self.codec.factor), "(b t) c h w -> b c t h w", b=b)
        if keep_warp is not None:
            keep = keep_warp.to(warp.dtype)[:, None, None, None, None]
            warp, seen = warp * keep, seen * keep
        if self.config.diffusion.prediction == "residual":
            base = torch.stack([warp, pose][:d], 1)
        return Conditions(torch.cat([pose, warp, seen], 1), base)

    def reference_kv(
        self,
        image_latent: Float[Tensor, "b c h w"],
        pose_planes: Float[Tensor, "b p h w"],
        image_context: Float[Tensor, "b m x"] | None = None,
    ) -> list[ReferenceKV]:
        """Run the reference network once, at t = 0 on the portrait and its pose map, and keep its keys and values.

        `image_context` is the portrait's (`VideoModel.image_context`); None means a zero token.
        """
        x = torch.cat([image_latent, pose_planes], 1)[:, None, :, None]
        image_context = self._zero_context(x) if image_context is None else image_context
        if self.reference.dtype == torch.bfloat16:
            x, image_context = x.bfloat16(), None if image_context is None else image_context.bfloat16()
        _, bank = self.reference(x, torch.zeros(len(x), device=x.device), image_context=image_context, domain_ids=(0,))
        return self.unet.reference_kv(bank)

    def predict_clean(
        self,
        z_t: Float[Tensor, "b d c t h w"],
        t: Int[Tensor, " b"],
        conditions: Conditions,
        latent: Float[Tensor, "b t f"],
        reference: list[ReferenceKV],
        valid: Bool[Tensor, "b t"] | None = None,
        image_context: Float[Tensor, "b m x"] | None = None,
    ) -> Float[Tensor, "b d c t h w"]:
        """Predict the clean latents of both domains from noisy ones and expression latents.

        Args:
            valid: frames that are not padding, for temporal modules.
            image_context: the same as the reference network's.
        """
        x = self.diffusion.scale_input(z_t, conditions.base, t)
        planes = conditions.planes[:, None].expand(-1, x.shape[1], -1, -1, -1, -1)
        image_context = self._zero_context(x) if image_context is None else image_context
        y, tokens = torch.cat([x, planes.to(x.dtype)], 2), self.expression.tokens(latent)
        if self.unet.dtype == torch.bfloat16:
            y, tokens, latent = (x.bfloat16() for x in (y, tokens, latent))
            image_context = None if image_context is None else image_context.bfloat16()
            reference = [(k.bfloat16(), v.bfloat16()) for k, v in reference]
        out, _ = self.unet(
            y, t.float(), tokens, latent, reference, image_context=image_context, domain_ids=self.config.domains,
            joint=self.config.joint_attention, valid=valid,
        )  # fmt: skip
        clean = self.diffusion.to_clean(out.float(), z_t, conditions.base, t)
        for clip_filter in self.unet.temporals:
            clean = clip_filter(clean, self.codec.visibility, valid)
        return clean

    def _zero_context(self, x: Tensor) -> Tensor | None:
        """One zero token for SD's text attention, where the network has it (X-NeMo's unconditional CLIP token)."""
        width = self.config.unet.cross_dim
        return None if width is None else x.new_zeros(len(x), 1, width)

    def save(
        self, folder: Path, state: dict[str, Tensor] | None = None, extra: dict[str, Any] | None = None,
        decoder: GuidedDecoder | None = None,
    ) -> None:  # fmt: skip
        """Write a model folder (fp16): one sub-folder per network; all of them take the old ones' place at once.

        Args:
            state: weights in place of the networks' own, such as averaged ones.
            extra: what to note beside the configuration.
            decoder: one in place of the model's own.

        Raises:
            UserError: the folder holds something that is not ours.
        """
        state, folder = self.state_dict() if state is None else state, Path(folder)
        if folder.is_dir() and not (folder / MARKER).exists():
            # A run that began when networks were still written one by one, each with a note of its own, goes on.
            parts = (*self.networks(), "vae", "image_encoder", "decoder")
            (folder / MARKER).write_text("".join(f"{n}\n" for n in parts if (folder / n / MARKER).exists()))
        with fresh_folder(folder) as whole:
            for name in self.networks():
                part = {k.removeprefix(name + "."): v.half() for k, v in state.items() if k.startswith(name + ".")}
                save_model(whole / name, {"kind": name, "video_model": asdict(self.config), **(extra or {})}, part)
            self.codec.save(whole / "vae")
            if self.image_encoder is not None:
                self.image_encoder.save(whole / "image_encoder")
            if (decoder := decoder or self.decoder) is not None:
                decoder.save(whole / "decoder")


def config_from_dict(d: dict[str, Any]) -> VideoModelConfig:
    """Rebuild a config from JSON; lists become tuples.

    Raises:
        UserError: a field is unknown, missing or contradicts another (a newer or foreign model).
    """

    def build(cls: type, value: dict[str, Any]) -> Any:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})

    try:
        parts = dict(unet=UNetConfig, reference=UNetConfig, expression=ExpressionConfig, diffusion=DiffusionConfig)
        return replace(
            VideoModelConfig(**{k: v for k, v in d.items() if k not in (*parts, "warp", "pose")}),
            **{k: build(cls, d[k]) for k, cls in parts.items()}, warp=d["warp"], pose=d["pose"],
        )  # fmt: skip
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"this model's config.json does not fit this version ({error}): update geodiff4d or retrain"
        ) from None


def load_video_model(folder: Path, compact: bool = False) -> VideoModel:
    """Load a model folder with sub-folders `unet`, `reference`, `expression` and `vae`.

    Args:
        compact: read a model in Stable Diffusion's size as `VideoModel.compact` holds it, without a larger copy before.

    Raises:
        UserError: a part is missing, damaged or does not fit its config.
    """
    folder = Path(folder)
    if not (folder / "unet").is_dir():
        raise UserError(
            f"{folder} is not a video model: expected sub-folders unet, reference, expression, vae; "
            "train one or leave --model out"
        )
    saved, _ = load_model(folder / "unet")
    config, codec = config_from_dict(saved.get("video_model", {})), load_codec(folder / "vae")
    eyes = load_image_encoder(folder / "image_encoder") if (folder / "image_encoder").is_dir() else None
    finish = load_decoder(folder / "decoder") if (folder / "decoder").is_dir() else None
    try:
        with deferred() as draws:
            model = VideoModel(config, codec, eyes, finish)
    except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(
            f"{folder} holds parts of different models, or damaged ones ({reason}): copy the folder again"
        ) from None
    for name, network in model.networks().items():
        _, state = load_model(folder / name)
        half = compact and name != "expression" and isinstance(codec, StableCodec)
        held = torch.bfloat16 if half else torch.float32
        try:
            # One by one, so that what was read is let go while it is converted.
            draws.fill(network, {k: state.pop(k).to(held, copy=True) for k in list(state)})
        except RuntimeError as error:
            raise UserError(
                f"{folder / name} does not fit its config ({str(error).splitlines()[0]}): copy the folder again"
            ) from None
    return (model.compact() if compact and isinstance(codec, StableCodec) else model).eval()
