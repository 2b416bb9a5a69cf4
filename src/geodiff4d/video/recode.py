"""Carry a trained model over to another patch codec, as a start for further training."""

from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.video.model import load_video_model
from geodiff4d.video.vae import PatchCodec


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


def starting_weights(folder: Path, codec: PatchCodec) -> dict[str, Tensor]:
    """Load a model's weights to continue from, carried over to `codec` if the model has another.

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
    return model.state_dict() if same else recode(model.state_dict(), model.codec, codec)
