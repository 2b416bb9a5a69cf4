"""Stable Diffusion 1.5 weights for the denoiser and its twin, the reference network.

Reads a folder in diffusers' layout (`unet/config.json` + `diffusion_pytorch_model.safetensors`, whole or sharded).
Every tensor must find its place: what may be missing (ours alone) or left over (a reference network ends early) is
listed here, and anything else is refused by name. The first convolution grows from SD's 4 channels to ours, the new
ones at zero, so that a fresh model computes what Stable Diffusion does.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geodiff4d.core.deferred import Draws, deferred
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json, read_tensors
from geodiff4d.video.image_encoder import load_image_encoder
from geodiff4d.video.model import VideoModel, VideoModelConfig
from geodiff4d.video.unet import UNet, UNetConfig
from geodiff4d.video.vae import StableCodec

OURS = ("expressions", "temporals", "class_embedding", "expression_embedding")
"""Modules that Stable Diffusion does not have: they keep the values they were built with."""

REFERENCE_LEAVES = ("conv_norm_out", "conv_out")
"""What a reference network does not have: it ends at its last attention site."""

_STEM = "diffusion_pytorch_model"

_FIXED: dict[str, Any] = {
    "act_fn": "silu", "addition_embed_type": None, "center_input_sample": False, "class_embed_type": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1, "dual_cross_attention": False,
    "encoder_hid_dim": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "only_cross_attention": False,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_embedding_act_fn": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}  # fmt: skip
"""Settings that our UNet does not vary; a folder that omits one has diffusers' default, which is the same."""


_TOPOLOGY = (
    "out_channels", "widths", "layers", "down_attention", "up_attention", "heads", "groups", "ff_factor", "cross_dim",
)  # fmt: skip
"""What a Stable Diffusion folder decides about our configuration."""


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one network."""

    missing: tuple[str, ...]
    """Ours, not in the folder: left at their initial values."""
    unexpected: tuple[str, ...]
    """In the folder, without a place in ours."""
    grown: tuple[str, ...]
    """Filled up with zero input channels."""


def unet_config(folder: Path, in_channels: int | None = None, reference: bool = False) -> UNetConfig:
    """Build our configuration from a diffusers UNet folder's config.json.

    `attention_head_dim` is the *number* of heads, as diffusers reads every SD 1.x folder.

    Args:
        in_channels: input channels of ours (latent and pose map: 7); None keeps the folder's.
        reference: build the reference network's, without expression modules.

    Raises:
        UserError: not a UNet folder, or one of a topology other than Stable Diffusion 1.x.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DConditionModel":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{folder} is not a diffusers UNet: expected _class_name UNet2DConditionModel, got {found}")
    wrong = [f"{k} {config[k]!r} (expected {v!r})" for k, v in _FIXED.items() if config.get(k, v) != v]
    if wrong:
        raise UserError(f"{folder} is not of SD 1.x's topology: {', '.join(wrong)}; pass an SD 1.5 folder")
    try:
        layers, widths = config.get("layers_per_block", 2), tuple(config["block_out_channels"])
        down = tuple(_attends(kind, "Down") for kind in config["down_block_types"])
        up = tuple(layers + 1 if _attends(kind, "Up") else 0 for kind in config["up_block_types"])
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        ours = UNetConfig(
            in_channels=in_channels or config["in_channels"], out_channels=config["out_channels"], widths=widths,
            layers=layers, down_attention=down, up_attention=up, heads=_heads(heads, widths),
            groups=config["norm_num_groups"], cross_dim=config["cross_attention_dim"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is not an SD 1.x UNet's: {error}; pass an SD 1.5 folder") from None
    return replace(ours, expression_dim=None, reference=True) if reference else ours


def _attends(kind: str, way: str) -> bool:
    if kind not in (f"CrossAttn{way}Block2D", f"{way}Block2D"):
        raise ValueError(f"unknown block type {kind}")
    return kind.startswith("CrossAttn")


def _heads(heads: Any, widths: tuple[int, ...]) -> int | None:
    """One number for all levels, or a list that means 64 channels per head."""
    if isinstance(heads, int):
        return heads
    if len(set(heads)) == 1:
        return int(heads[0])
    if list(heads) == [w // 64 for w in widths]:
        return None
    raise ValueError(f"unsupported numbers of heads {heads}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a diffusers folder's weights, whole or sharded; safetensors only.

    Raises:
        UserError: weights are missing, damaged or only there as pickles.
    """
    folder = Path(folder)
    index = folder / f"{_STEM}.safetensors.index.json"
    if (folder / f"{_STEM}.safetensors").exists():
        files = [folder / f"{_STEM}.safetensors"]
    elif index.exists():
        names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
        files = [folder / name for name in names]
        # An index is data: it may not point out of its folder.
        absent = [n for n, file in zip(names, files, strict=True) if Path(n).name != n or not file.exists()]
        if absent or not names:
            raise UserError(f"{folder} lacks the weight files its index names ({absent}): copy the folder again")
    elif (folder / f"{_STEM}.fp16.safetensors").exists():
        files = [folder / f"{_STEM}.fp16.safetensors"]
    else:
        pickled = " (pickles such as .bin are not read: convert them first)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} has no weights: expected {_STEM}.safetensors{pickled}")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_tensors(file)
    return state


@torch.no_grad()
def load_unet(network: UNet, folder: Path, draws: Draws | None = None) -> LoadReport:
    """Give our UNet a copy of a diffusers UNet's weights; nothing is changed unless everything fits.

    Args:
        draws: of a network that was built `deferred`.

    Raises:
        UserError: a tensor is missing, left over or of another shape, beyond what the module's header allows.
    """
    theirs, ours = read_weights(folder), network.state_dict()
    leaves = REFERENCE_LEAVES if network.config.reference else ()
    missing = tuple(k for k in ours if k not in theirs)
    unexpected = tuple(k for k in theirs if k not in ours)
    wrong = [f"{k} is missing" for k in missing if not _part_of(k, OURS)]
    wrong += [f"{k} has no place" for k in unexpected if not _part_of(k, leaves)]
    fitting = {k: v for k, v in theirs.items() if k in ours}
    grown: tuple[str, ...] = ()
    conv, channels = fitting.get("conv_in.weight"), network.config.in_channels
    if conv is not None and conv.ndim == 4 and conv.shape[1] < channels:
        wider = conv.new_zeros(conv.shape[0], channels, *conv.shape[2:])
        wider[:, : conv.shape[1]] = conv
        fitting["conv_in.weight"], grown = wider, ("conv_in.weight",)
    shapes = ((k, tuple(v.shape), tuple(ours[k].shape)) for k, v in fitting.items())
    wrong += [f"{k} is {got} (expected {expected})" for k, got, expected in shapes if got != expected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder} does not fit this UNet: {'; '.join(wrong[:3])}{more}; pass an SD 1.5 folder")
    (draws or Draws()).fill(network, {k: v.to(torch.float32, copy=True) for k, v in fitting.items()}, strict=False)
    return LoadReport(missing, unexpected, grown)


def _part_of(name: str, modules: tuple[str, ...]) -> bool:
    return any(part in modules for part in name.split("."))


def load_stable_diffusion(model: VideoModel, folder: Path, draws: Draws | None = None) -> dict[str, LoadReport]:
    """Start both networks of a video model from the `unet` of a Stable Diffusion folder.

    `draws` are those of a model that was built `deferred`.

    Example:
        >>> config = unet_config(folder / "unet", in_channels=7)  # doctest: +SKIP
        >>> model = VideoModel(VideoModelConfig(config, reference), StableCodec(folder / "vae"))  # doctest: +SKIP
        >>> load_stable_diffusion(model, folder)["reference"].unexpected  # doctest: +SKIP
        ('conv_norm_out.bias', 'conv_norm_out.weight', 'conv_out.bias', 'conv_out.weight')
    """
    networks = {"unet": model.unet, "reference": model.reference}
    return {name: load_unet(network, Path(folder) / "unet", draws) for name, network in networks.items()}


def from_stable_diffusion(
    folder: Path, like: VideoModelConfig | None = None
) -> tuple[VideoModel, dict[str, LoadReport]]:
    """Build the paper's video model from a Stable Diffusion 1.5 or sd-image-variations folder (Sec. 4.1).

    Topology comes from the folder; everything SD does not have, from `like` (the paper's by default) at its fresh
    values: new input channels, expression and temporal modules start at zero. The image encoder comes along if there
    is one.

    Raises:
        UserError: the folder is not of Stable Diffusion 1.x's shape, or damaged.
    """
    folder, like = Path(folder), like or VideoModelConfig()
    absent = [part for part in ("unet", "vae") if not (folder / part / "config.json").exists()]
    if absent:
        raise UserError(
            f"{folder} is not a Stable Diffusion folder in diffusers' layout: expected sub-folders unet and vae with "
            f"a config.json each, {' and '.join(absent)} has none"
        )
    theirs = unet_config(folder / "unet")
    if theirs.in_channels != theirs.out_channels:
        raise UserError(
            f"{folder}/unet has {theirs.in_channels} input channels: expected {theirs.out_channels}; pass a plain "
            "SD 1.5 folder, not one for inpainting"
        )
    topology = {k: getattr(theirs, k) for k in _TOPOLOGY} | {"in_channels": theirs.in_channels + 3}
    config = replace(like, unet=replace(like.unet, **topology), reference=replace(like.reference, **topology))
    eyes = folder / "image_encoder"
    codec, image_encoder = StableCodec(folder / "vae"), load_image_encoder(eyes) if eyes.is_dir() else None
    try:
        with deferred() as draws:
            model = VideoModel(config, codec, image_encoder)
    except ValueError as error:
        raise UserError(f"{folder} holds parts that do not fit each other ({error}): pass an SD 1.5 folder") from None
    report = load_stable_diffusion(model, folder, draws)
    draws.fill(model.expression, {}, strict=False)
    return model.eval(), report
