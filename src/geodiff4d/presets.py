"""Every named configuration: `debug` for tests, `embedded` for two CPU cores, `paper` for the paper's scale.

The three run the same modules; only widths, sizes and counts differ.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.pairs import PairConfig
from geodiff4d.data.store import StoreConfig
from geodiff4d.data.tracks import TrackConfig
from geodiff4d.video.batches import WeightConfig
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.expression import ExpressionConfig
from geodiff4d.video.model import VideoModelConfig
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.train import VideoTraining
from geodiff4d.video.train_codec import CodecTraining
from geodiff4d.video.unet import UNetConfig
from geodiff4d.video.vae import PatchCodecConfig

PresetName = Literal["debug", "embedded", "paper"]


@dataclass(frozen=True)
class Preset:
    """One row: what every command takes from it."""

    description: str
    model: VideoModelConfig
    codec: CodecTraining
    image: VideoTraining
    store: StoreConfig
    val_store: StoreConfig
    sample: SampleConfig
    views: int
    """Cameras of a synthesized clip."""
    frames: int
    """Frames of a synthesized clip, over all its cameras."""
    video: VideoTraining
    """Stage 2."""
    tracks: TrackConfig
    """What stage 2 is trained on, in the sizes of `store`."""
    val_tracks: TrackConfig
    temporal: tuple[int, int, int] = (2, 4, 0)
    """Attentions and feed-forward factor of stage 2's temporal modules (the default is X-NeMo's), and the reach of the
    filter behind them (ours)."""
    augment: AugmentConfig = AugmentConfig()
    clip_augment: AugmentConfig = AugmentConfig(0.05, 0.05, 0.05, 0.02, 0.0, 0.03, 0.04, 0.02)
    """Of a clip's driving crops: its frames are lit and cut alike, but for what a tracker's jitter does."""


def _small(
    codec: PatchCodecConfig, size: int, crop: int, widths: tuple[int, ...], encoder: tuple[int, ...]
) -> VideoModelConfig:
    """The embedded family: warp-conditioned, residual prediction, joint attention at 16² tokens and below."""
    c = codec.channels
    groups = min(16, widths[0] // 2)
    shared: dict[str, Any] = dict(
        out_channels=c, widths=widths, layers=1, down_attention=(False, True, False), up_attention=(1, 2, 1),
        heads=None, groups=groups, ff_factor=2, cross_dim=None, expression_layers=1, expression_ff_factor=1,
        every_layer=False,
    )  # fmt: skip
    return VideoModelConfig(
        unet=UNetConfig(in_channels=3 * c + 2, expression_latent=512, **shared),
        reference=UNetConfig(in_channels=2 * c, expression_dim=None, reference=True, **shared),
        expression=ExpressionConfig(size=crop, widths=encoder, motion=OPENHEAD_MOTION),
        diffusion=DiffusionConfig(prediction="residual", zero_terminal=True),
        size=size, pose="codec", warp=True, surroundings=True,
    )  # fmt: skip


OPENHEAD_MOTION = 52 + 3
"""Coefficients that the embedded encoder is read out to: OpenHead's expressions and the jaw."""
DEBUG_CODEC = PatchCodecConfig(factor=8, channels=16, trunk=16, detail=8)
EMBEDDED_CODEC = PatchCodecConfig(factor=16, channels=96, trunk=48)

PRESETS: dict[str, Preset] = {
    "debug": Preset(
        "64 px, a few steps: tests",
        model=_small(DEBUG_CODEC, 64, 32, (16, 32, 32), (8, 16)),
        codec=CodecTraining(DEBUG_CODEC, steps=6, batch=4, basis_images=8),
        image=VideoTraining(
            steps=4, pairs=PairConfig(references=2, targets=2, moved=0.5), lr=1e-3, warm_start=2,
            log_every=1, validate_every=4, save_every=2,
        ),
        store=StoreConfig(subjects=2, instants=2, views=2, size=64, crop=32, texels=64, grid=8, supersample=1),
        val_store=StoreConfig(
            "val", subjects=1, instants=2, views=2, size=64, crop=32, texels=64, grid=8, supersample=1
        ),
        sample=SampleConfig(steps=2, guidance=1.5, sampler="ddim"),
        views=3, frames=4,
        video=VideoTraining(
            steps=4, pairs=PairConfig(references=1, targets=4, moved=1.0), lr=1e-3, parts="temporal",
            sampled_starts=0.5, log_every=1, validate_every=4, save_every=2,
        ),
        tracks=TrackConfig(subjects=2, frames=5, portraits=1),
        val_tracks=TrackConfig(subjects=1, frames=3, portraits=1),
        temporal=(1, 2, 1),
    ),
    "embedded": Preset(
        "256 px on two CPU cores, trained on the open world (docs/LOG.md has the measurements)",
        model=_small(EMBEDDED_CODEC, 256, 96, (96, 128, 128), (32, 64, 96, 128)),
        codec=CodecTraining(EMBEDDED_CODEC),
        image=VideoTraining(
            steps=4000, pairs=PairConfig(references=4, targets=6, moved=0.8), lr=5e-4, warm_start=600,
            expression_lr=0.5, timestep_power=0.15, drop_warp=0.05, weights=WeightConfig(focus=10.0),
        ),
        store=StoreConfig(subjects=600, instants=10, views=3),
        val_store=StoreConfig("val", subjects=12, instants=3, views=3),
        # Chosen on val (docs/LOG.md): what is trained so far is best at the highest noise levels.
        sample=SampleConfig(steps=1, guidance=1.0, still_noise=True, draws=1, detail=0.08),
        views=8, frames=96,
        video=VideoTraining(
            steps=500, pairs=PairConfig(references=2, targets=16, moved=1.0), lr=1e-3, warmup=30, ema=0.99,
            parts="temporal", sampled_starts=1.0, steadiness=4.0, drop_warp=0.0, weights=WeightConfig(focus=10.0),
            log_every=10, validate_every=125, save_every=125,
        ),
        tracks=TrackConfig(),
        val_tracks=TrackConfig(subjects=6, frames=16, portraits=1),
        temporal=(1, 2, 4),
    ),
    "paper": Preset(
        "512 px in Stable Diffusion 1.5's size (Sec. 4); needs a GPU and the user's own weights and data",
        model=VideoModelConfig(),
        codec=CodecTraining(),
        image=VideoTraining(
            steps=80_000, pairs=PairConfig(references=32, targets=1), hold=1.0, recompute=True,
            preview=SampleConfig(steps=10, guidance=2.5),
        ),
        store=StoreConfig(subjects=20_000, instants=8, views=16, size=512, crop=224, texels=512, grid=64),
        val_store=StoreConfig("val", subjects=64, instants=4, views=8, size=512, crop=224, texels=512, grid=64),
        sample=SampleConfig(),
        views=12, frames=200,
        video=VideoTraining(
            steps=20_000, pairs=PairConfig(references=8, targets=16), hold=1.0, parts="temporal", recompute=True,
            preview=SampleConfig(steps=10, guidance=2.5),
        ),
        tracks=TrackConfig(subjects=5_000, frames=48, portraits=4, views=4),
        val_tracks=TrackConfig(subjects=16, frames=32, portraits=1),
    ),
}  # fmt: skip


def with_temporal_modules(config: VideoModelConfig, temporal: tuple[int, int, int]) -> VideoModelConfig:
    """Give an image model's configuration temporal modules; those it has already stay as they are."""
    if config.unet.temporal_layers:
        return config
    layers, ff_factor, reach = temporal
    unet = replace(config.unet, temporal_layers=layers, temporal_ff_factor=ff_factor, clip_filter=reach)
    return replace(config, unet=unet)


def ablated(p: Preset, parts: tuple[str, ...]) -> tuple[VideoModelConfig, PairConfig]:
    """Switch parts of the video model off (Table 2, and our warp): (model, pairing).

    Raises:
        UserError: an unknown part, or the warp of a preset that has none.
    """
    model, pairs = p.model, p.image.pairs
    for part in parts:
        if part == "joint":
            model = replace(model, normals=False)
        elif part == "domain-attention":
            model = replace(model, joint_attention=False)
        elif part == "cross-view":
            pairs = replace(pairs, cross_view=False)
        elif part == "warp":
            if not model.warp:
                raise UserError("--ablate warp: this preset has no warped portrait to switch off: leave the option out")
            planes = model.unet.in_channels - model.unet.out_channels - 2
            model = replace(
                model, warp=False, surroundings=False, unet=replace(model.unet, in_channels=planes),
                diffusion=replace(model.diffusion, prediction="v"),
            )  # fmt: skip
        elif part != "synthetic":  # That one is the data's.
            raise UserError(
                f"--ablate {part} is not known: expected joint, domain-attention, cross-view, synthetic or warp"
            )
    return model, pairs


def preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
