"""What training starts from: our own models, carried over to another patch codec, or Stable Diffusion."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.video.model import VideoModelConfig, load_video_model
from geodiff4d.video.objective import trained_state
from geodiff4d.video.pretrained import from_stable_diffusion
from geodiff4d.video.vae import PatchCodec, StableCodec


def change_of_latents(old: PatchCodec, new: PatchCodec) -> Float[Tensor, "old new"]:
    """Map latents of `new` to those of `old`: exact as far as the old basis lies in the span of the new one."""
    return (old.basis / old.scale).mT @ (new.basis * new.scale)


def recode(state: dict[str, Tensor], old: PatchCodec, new: PatchCodec) -> dict[str, Tensor]:
    """Rewrite the first and last convolutions of a model's state for latents of another linear code.

    Every group of latent channels goes through the change of basis; channels beside them (visibility) stay. The codecs'
    mean patches are taken as equal. What only the new code can tell starts out unused and unpredicted.

    Raises:
        ValueError: the codecs differ in more than their number of channels.
    """
    if old.factor != new.factor:
        raise ValueError(f"a model moves between codecs of one factor, got {old.factor} and {new.factor}")
    to_old, to_new = change_of_latents(old, new), change_of_latents(new, old)
    out = {k: v for k, v in state.items() if not k.startswith("codec.")}
    for name in ("unet", "reference"):
        weight = state[f"{name}.conv_in.weight"]
        groups = weight.shape[1] // old.channels
        latents, rest = weight[:, : groups * old.channels], weight[:, groups * old.channels :]
        parts = [torch.einsum("wokl,on->wnkl", part, to_old) for part in latents.split(old.channels, 1)]
        out[f"{name}.conv_in.weight"] = torch.cat([*parts, rest], 1)
    for part in ("weight", "bias"):
        out[f"unet.conv_out.{part}"] = torch.einsum("no,o...->n...", to_new, state[f"unet.conv_out.{part}"])
    return out


def starting_weights(folder: Path, codec: PatchCodec) -> tuple[VideoModelConfig, dict[str, Tensor]]:
    """Load a model to continue from, carried over to `codec` if it has another: (its own configuration, weights).

    Raises:
        UserError: the model cannot be carried over.
    """
    model = load_video_model(folder)
    if not isinstance(model.codec, PatchCodec):
        raise UserError(f"{folder} holds a Stable Diffusion codec: expected a patch codec of factor {codec.factor}")
    if model.codec.factor != codec.factor:
        raise UserError(
            f"{folder} has a codec of {asdict(model.codec.config)}: expected factor {codec.factor} to continue from"
        )
    same = model.codec.config == codec.config and torch.equal(model.codec.basis, codec.basis)
    weights = trained_state(model)
    return model.config, weights if same else recode(weights, model.codec, codec)


def continued(folder: Path, like: VideoModelConfig) -> tuple[VideoModelConfig, StableCodec, dict[str, Tensor]]:
    """Load a model with Stable Diffusion's codec to continue stage 1 from: (configuration, codec, weights).

    Domains and joint attention are those of `like`, which an ablation may have switched off; temporal modules stay out.

    Raises:
        UserError: the model has a patch codec.
    """
    model = load_video_model(folder)
    if not isinstance(model.codec, StableCodec):
        raise UserError(f"{folder} holds a patch codec: expected a model that preset paper has trained")
    unet = replace(model.config.unet, temporal_layers=like.unet.temporal_layers, clip_filter=like.unet.clip_filter)
    config = replace(model.config, unet=unet, normals=like.normals, joint_attention=like.joint_attention)
    return config, model.codec, trained_state(model)


def start_from_stable_diffusion(
    folder: Path | None, like: VideoModelConfig
) -> tuple[VideoModelConfig, StableCodec, dict[str, Tensor]]:
    """Take topology, codec and first weights from a Stable Diffusion folder.

    Raises:
        UserError: no folder is given, or it holds something else.
    """
    if folder is None:
        raise UserError(
            "--preset paper needs --sd, a folder with Stable Diffusion 1.5's unet and vae, or --start, a model to "
            "continue from"
        )
    built, _ = from_stable_diffusion(folder, like)
    assert isinstance(built.codec, StableCodec)
    if built.image_encoder is not None:
        print(f"{folder}/image_encoder is not used: SD's text attention gets a zero token, in training and after it")
    state = {k: v for k, v in built.state_dict().items() if k.startswith(("unet.", "reference.", "expression."))}
    return built.config, built.codec, state
