"""The codec between pixels and latents, one for both domains (Sec. 3.2).

Two implementations of one small interface: `PatchCodec`, the embedded default (principal components of image patches
with a convolutional decoder on top; trained in minutes, encodes at memory speed), and `StableCodec`, which holds a
diffusers `AutoencoderKL` folder for the paper's scale (latent mean, scaling 0.18215).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_folder, load_model, read_json, save_model, save_tensors


@dataclass(frozen=True)
class PatchCodecConfig:
    """Sizes of the embedded codec."""

    factor: int = 16
    """Pixels per latent cell, each way."""
    channels: int = 48
    """Principal components kept of `3 · factor²`."""
    trunk: int = 96
    """Width of the refiner on the latent grid."""
    detail: int = 40
    """Width of the refiner at a quarter of the image size."""


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualConv(nn.Module):
    """Two normalised convolutions beside a skip; the second starts at zero, so that the block does nothing at first."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.conv2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.conv2(silu(self.conv1(silu(self.norm(x)))))


class PatchCodec(nn.Module):
    """Linear patch code, convolutional decoder.

    Encoding is a projection onto the leading principal components of `factor²` patches of both domains. The square
    root of each component's deviation is divided out, so that large components keep part of their weight in a
    diffusion loss. Decoding inverts it and adds what a small network infers from neighbouring cells.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, config: PatchCodecConfig):
        super().__init__()
        self.config, self.channels, self.factor = config, config.channels, config.factor
        patch = 3 * config.factor**2
        self.register_buffer("mean", torch.zeros(patch))
        self.register_buffer("basis", torch.zeros(patch, config.channels))
        self.register_buffer("scale", torch.ones(config.channels))
        up = config.factor // 4
        if up * 4 != config.factor:
            raise ValueError(f"factor must be a multiple of 4, got {config.factor}")
        self.trunk = nn.Sequential(
            nn.Conv2d(config.channels, config.trunk, 3, padding=1),
            ResidualConv(config.trunk), ResidualConv(config.trunk),
            nn.SiLU(), nn.Conv2d(config.trunk, config.detail * up * up, 1), nn.PixelShuffle(up),
        )  # fmt: skip
        self.detail = nn.Sequential(
            ResidualConv(config.detail), ResidualConv(config.detail), nn.SiLU(),
            nn.Conv2d(config.detail, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip
        _zero(self.detail[3])

    def fit_basis(self, images: Float[Tensor, "n 3 height width"]) -> None:
        """Set the linear code from a sample of images of both domains (PCA over aligned patches)."""
        patches = rearrange(pixel_unshuffle(images * 2 - 1, self.factor), "n p h w -> (n h w) p").double()
        self.mean.copy_(patches.mean(0))
        centred = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(centred))
        order = values.argsort(descending=True)[: self.channels]
        deviation = values[order].clamp(min=1e-9).sqrt()
        scale = deviation.sqrt()
        scale = scale * (deviation / scale).square().mean().sqrt()
        self.basis.copy_(vectors[:, order])
        self.scale.copy_(scale)

    @property
    def visibility(self) -> Float[Tensor, " c"]:
        """How much a squared error in each latent channel shows in pixels, mean 1 (the basis is orthonormal)."""
        return self.scale.square() / self.scale.square().mean()

    def encode(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Project images in [0, 1]; height and width must be multiples of the factor."""
        patches = rearrange(pixel_unshuffle(images * 2 - 1, self.factor), "n p h w -> n h w p")
        return rearrange(((patches - self.mean) @ self.basis) / self.scale, "n h w c -> n c h w")

    def decode_linear(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Invert the projection alone, in [-1, 1]."""
        patches = (rearrange(latents, "n c h w -> n h w c") * self.scale) @ self.basis.mT + self.mean
        return pixel_shuffle(rearrange(patches, "n h w p -> n p h w"), self.factor)

    def refine(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Return the learned residual, in [-1, 1]'s scale."""
        if latents.device.type == "cpu":
            latents = latents.contiguous(memory_format=torch.channels_last)
        return self.detail(self.trunk(latents))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Return images in [0, 1]."""
        image = self.decode_linear(latents.float()) + self.refine(latents).float()
        return (image / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Write the model folder, fp16."""
        config = {"kind": "patch", **asdict(self.config)}
        save_model(folder, config, {k: v.half() for k, v in self.state_dict().items()})


_STABLE: dict[str, Any] = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
    sample_size=512, scaling_factor=0.18215,
)  # fmt: skip
"""Stable Diffusion 1.5's autoencoder."""


class StableCodec(nn.Module):
    """A Stable Diffusion `AutoencoderKL` folder: factor 8, 4 channels, latent mean times its scaling factor."""

    def __init__(self, folder: Path | None, chunk: int = 8):
        """`folder` None gives fresh weights in Stable Diffusion's shape, to measure speed and memory with."""
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae: Any = AutoencoderKL(**_STABLE) if folder is None else self._read(folder)
        self.vae.requires_grad_(False)
        self.chunk = chunk
        self.channels = int(self.vae.config.latent_channels)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scaling = float(self.vae.config.scaling_factor)

    @staticmethod
    def _read(folder: Path) -> Any:
        from diffusers import AutoencoderKL

        config = read_json(Path(folder) / "config.json")
        if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
            kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
            raise UserError(f"{folder} is not a diffusers autoencoder: expected _class_name AutoencoderKL, got {kind}")
        try:
            return AutoencoderKL.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{folder} has no usable autoencoder ({reason}): copy the folder again") from None

    @property
    def visibility(self) -> Float[Tensor, " c"]:
        """Stable Diffusion's loss treats its channels alike."""
        return torch.ones(self.channels, device=self.vae.device)

    def encode(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Encode in chunks, so that memory does not grow with the clip."""
        inputs = (images * 2 - 1).to(self.vae.dtype).split(self.chunk)
        return torch.cat([self.vae.encode(x).latent_dist.mean.to(images.dtype) for x in inputs]) * self.scaling

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Decode in chunks to images in [0, 1]."""
        inputs = (latents / self.scaling).to(self.vae.dtype).split(self.chunk)
        parts = [self.vae.decode(z).sample.to(latents.dtype) for z in inputs]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Write the diffusers folder again, so that a saved model is whole."""
        with fresh_folder(folder) as temporary:
            self.vae.save_config(temporary)
            save_tensors(self.vae.state_dict(), temporary / "diffusion_pytorch_model.safetensors", {"format": "pt"})


Codec = PatchCodec | StableCodec
"""Images in [0, 1], latents with about unit variance."""


def load_codec(folder: Path) -> Codec:
    """Load a codec by what its `config.json` says it is.

    Raises:
        UserError: the folder holds neither a patch codec nor a diffusers AutoencoderKL, or a damaged one.
    """
    folder = Path(folder)
    if list(folder.glob("diffusion_pytorch_model*")):
        return StableCodec(folder)
    config, state = load_model(folder)
    if config.pop("kind", None) != "patch":
        raise UserError(f'{folder} is not a codec: expected kind "patch" in config.json, or a diffusers AutoencoderKL')
    try:
        codec = PatchCodec(PatchCodecConfig(**config))
        codec.load_state_dict({k: v.float() for k, v in state.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not fit its config ({str(error).splitlines()[0]}): copy the folder again"
        ) from None
    return codec
