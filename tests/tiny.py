"""A video model at toy size, and a store in memory to train it on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.footage.rendered import RenderedFootage, Store, StoreConfig
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples
from geodiff4d.video.batches import Batches
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.encode import encode_store
from geodiff4d.video.expression import ExpressionConfig
from geodiff4d.video.model import (
    ConditionImages,
    VideoModel,
    VideoModelConfig,
)
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.train import VideoTraining
from geodiff4d.video.unet import UNetConfig
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig

SIZE = 32
CHANNELS = 6

UNET = UNetConfig(
    in_channels=2 * CHANNELS + CHANNELS + 2, out_channels=CHANNELS, widths=(16, 16), layers=1,
    down_attention=(False, True), up_attention=(1, 0), heads=2, groups=8, ff_factor=2, cross_dim=None,
    expression_dim=4, expression_layers=1, expression_ff_factor=2, expression_latent=8, every_layer=False,
)  # fmt: skip
EMBEDDED = VideoModelConfig(
    unet=UNET,
    reference=replace(UNET, in_channels=2 * CHANNELS, expression_dim=None, expression_latent=None, reference=True),
    expression=ExpressionConfig(size=16, widths=(8, 8), attention=True, squeeze=4, latent=8, tokens=4, token_dim=4),
    diffusion=DiffusionConfig(prediction="residual"), size=SIZE, pose="codec", warp=True,
)  # fmt: skip
"""Like the embedded preset: warp, pose map through the codec, residual around both."""
PAPER = replace(
    EMBEDDED, unet=replace(UNET, in_channels=CHANNELS + 3),
    reference=replace(EMBEDDED.reference, in_channels=CHANNELS + 3), diffusion=DiffusionConfig(),
    pose="interpolate", warp=False,
)  # fmt: skip
"""Like the paper: noise prediction, pose map resized, nothing else."""


def tiny_codec() -> PatchCodec:
    torch.manual_seed(0)
    codec = PatchCodec(PatchCodecConfig(factor=4, channels=CHANNELS, trunk=8, detail=8))
    waves = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    codec.fit_basis(torch.nn.functional.interpolate(waves, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1))
    return codec


def build(config: VideoModelConfig, codec: PatchCodec, seed: int = 0) -> VideoModel:
    """Random weights in every module: those that start at zero would hide what they do."""
    torch.manual_seed(seed)
    model = VideoModel(config, codec)
    for network in model.networks().values():
        for p in network.parameters():
            p.data = torch.randn_like(p) * 0.15 + (p.data if p.ndim == 1 else 0)
    return model.eval()


def images(frames: int = 3, seed: int = 0) -> ConditionImages:
    g = torch.Generator().manual_seed(seed)
    return ConditionImages(*(torch.rand(1, c, frames, SIZE, SIZE, generator=g) for c in (3, 3, 2)))


def ingredients(model: VideoModel, frames: int = 3) -> tuple:
    """Return (conditions, expression latents, reference, start) of a random clip."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        portrait = model.codec.encode(torch.rand(1, 3, SIZE, SIZE, generator=g))
        pose = model.pose_planes(torch.rand(1, 3, 1, SIZE, SIZE, generator=g))[:, :, 0]
        latents = model.expression(torch.rand(frames, 3, 16, 16, generator=g))[None]
        start = portrait[:, None].expand(-1, len(model.config.domains), -1, -1, -1)
        return model.conditions(images(frames)), latents, model.reference_kv(portrait, pose), start


FAST = SampleConfig(steps=2, autocast=False)
VARIANTS = {
    "embedded": EMBEDDED, "paper": PAPER, "without normals": replace(EMBEDDED, normals=False),
    "without normals, paper": replace(PAPER, normals=False),
    "without joint attention": replace(EMBEDDED, joint_attention=False),
    "v": replace(PAPER, diffusion=DiffusionConfig(prediction="v")),
}  # fmt: skip


class TinyStore(Store):
    """A store in memory: two people of two colours, an expression that is a stripe, two triangles for a head."""

    def __init__(self, subjects: int = 2, instants: int = 3, views: int = 2):
        self.tracks = None
        self.config = StoreConfig(
            subjects=subjects, instants=instants, views=views, size=SIZE, crop=16, texels=16, grid=8, reference_views=2
        )
        rng, n = np.random.default_rng(0), (subjects, instants, views)
        for name, (shape, kind) in self.config.arrays(4).items():
            setattr(self, name, np.zeros(shape, kind))
        ramp = np.linspace(0, 1, SIZE)
        self.expr[:] = rng.normal(0, 1, self.expr.shape)
        self.joints[:] = np.random.default_rng(1).normal(0, 0.1, self.joints.shape)
        for s, i, v in np.ndindex(n):
            stripe = 0.5 + 0.3 * np.cos(6 * ramp + 2 * self.expr[s, i, 0])
            picture = np.stack([np.outer(stripe, ramp), np.outer(ramp, stripe), np.full((SIZE, SIZE), 0.2 + 0.6 * s)])
            turn = np.broadcast_to(np.array([0.3 + 0.4 * v, 0.5, 0.9])[:, None, None], picture.shape)
            self.rgb[s, i, v], self.pose[s, i, v] = picture * 255, turn * 255
            self.normal[s, i, v] = (turn * 0.8 + 0.2 * stripe[:, None]) * 255
            self.crop[s, i, v] = picture[:, ::2, ::2] * 255
            self.texture[s, i, min(v, 1)] = picture[:, ::2, ::2] * 255
        a, b = np.meshgrid(np.linspace(0, 1, SIZE // 2), np.linspace(0, 1, SIZE // 2))
        self.face[:] = np.where(a + b < 1, 0, -1)
        self.bary[:] = np.stack([a, b]) * (a + b < 1) * 255
        corners = np.array([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
        self.moved_face[:], self.moved_bary[:] = self.face[..., ::-1, :], self.bary[..., ::-1, :]
        self.carried[..., :2], self.carried[..., 2] = corners, np.array([1.0, 1, 1, 0])
        self.cover[:], self.focus[:] = 255, rng.integers(0, 255, self.focus.shape)
        self.faces = self.uv_faces = np.array([[1, 2, 0], [2, 1, 3]])
        self.uv = ((corners + 1) / 2).astype(np.float32)


TWO = PairConfig(references=2, targets=2)


def tiny_batches(
    codec: PatchCodec, folder: Path, pairs: PairConfig = TWO,
    store: TinyStore | None = None, augment: AugmentConfig | None = AugmentConfig(), kind: type[Batches] = Batches,
) -> Batches:  # fmt: skip
    footage = RenderedFootage(store or TinyStore())
    assert encode_store(footage, codec, folder / "latents.npy")
    return kind(Samples([footage], pairs, ReadConfig(SIZE, 16, warp=True, augment=augment)), codec)


TRAINING = VideoTraining(
    steps=4, lr=2e-3, warmup=1, pairs=TWO, autocast=False, log_every=1, save_every=2
)  # fmt: skip
