"""CLIP's image encoder: the portrait as the one token that Stable Diffusion's text attention reads.

The weights of sd-image-variations come with one (`image_encoder/`), and their `attn2` was trained on its output. Ours
has the parameter names of transformers' `CLIPVisionModelWithProjection`, so that folder loads as it is, without that
library. Frozen: it runs once per portrait.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import load_model, save_model

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP normalises images by."""


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes under transformers' names; defaults are ViT-L/14's, which sd-image-variations has."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 768
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}: expected quick_gelu or gelu")


class _Layer(nn.Module):
    """One transformer layer, pre-norm."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        c, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.act = config.num_attention_heads, config.hidden_act
        self.self_attn = nn.ModuleDict({f"{k}_proj": nn.Linear(c, c) for k in ("k", "v", "q", "out")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c, eps), nn.LayerNorm(c, eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(c, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, c)}
        )

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        y = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{name}_proj"](y), "b n (h d) -> b h n d", h=self.heads) for name in "qkv")
        x = x + self.self_attn["out_proj"](rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y) if self.act == "quick_gelu" else gelu(y))


class _Embeddings(nn.Module):
    """Patches and a class token, with their positions."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        c, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(c) * 0.02)
        self.patch_embedding = nn.Conv2d(3, c, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, c)

    def forward(self, pixels: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b n c"]:
        x = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.position_embedding.weight


class _Layers(nn.Module):
    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        for layer in self.layers:
            x = layer(x)
        return x


class _VisionModel(nn.Module):
    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        c, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(c, eps)  # theirs is spelled so
        self.encoder = _Layers(config)
        self.post_layernorm = nn.LayerNorm(c, eps)

    def forward(self, pixels: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b c"]:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class ImageEncoder(nn.Module):
    """Images to CLIP's embedding, as one token each.

    Example:
        >>> encoder = load_image_encoder(folder / "image_encoder")  # doctest: +SKIP
        >>> encoder(torch.rand(1, 3, 512, 512)).shape  # doctest: +SKIP
        torch.Size([1, 1, 768])
    """

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 1 x"]:
        """Encode square images in [0, 1] of any size."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            images = interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (MEAN, STD))
        pixels = ((images.clamp(0, 1) - mean) / std).to(self.visual_projection.weight.dtype)
        return self.visual_projection(self.vision_model(pixels))[:, None].float()

    def save(self, folder: Path) -> None:
        """Write a model folder that transformers reads too, fp16."""
        config = {"model_type": "clip_vision_model", **asdict(self.config)}
        save_model(folder, config, {k: v.half() for k, v in self.state_dict().items()})


def load_image_encoder(folder: Path) -> ImageEncoder:
    """Load the `image_encoder` of a Stable Diffusion folder.

    Raises:
        UserError: it is no CLIP image encoder, or its weights are missing, damaged or of another shape.
    """
    folder = Path(folder)
    given, state = load_model(folder)
    kind = given.get("model_type")
    if kind != "clip_vision_model":
        raise UserError(f"{folder} is not a CLIP image encoder: expected model_type clip_vision_model, got {kind}")
    known: dict[str, Any] = {k: given[k] for k in asdict(ImageEncoderConfig()) if k in given}
    try:
        encoder = ImageEncoder(ImageEncoderConfig(**known))
        # Older files carry the positions' numbers, which are no weights.
        encoder.load_state_dict({k: v.float() for k, v in state.items() if not k.endswith("position_ids")})
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder} does not fit its config.json ({reason}): copy the folder again") from None
    return encoder.eval()
