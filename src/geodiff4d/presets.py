"""Every named configuration: `debug` for tests, `embedded` for two CPU cores, `paper` for the paper's scale.

The three run the same modules; only widths, sizes and counts differ.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.deformation import DeformationConfig
from geodiff4d.avatar.densify import DensifyConfig
from geodiff4d.avatar.dynamics import DynamicsConfig
from geodiff4d.avatar.losses import LossConfig
from geodiff4d.avatar.refine import RefineConfig
from geodiff4d.avatar.surface import RemeshConfig
from geodiff4d.core.errors import UserError
from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.footage.rendered import StoreConfig, TrackStoreConfig
from geodiff4d.data.sampling import PairConfig
from geodiff4d.render.viewpoints import CAPTURE_AZIMUTH_DEG
from geodiff4d.tracking.learn import PerceptionTraining
from geodiff4d.tracking.network import PerceptionConfig
from geodiff4d.tracking.people import PeopleConfig
from geodiff4d.tracking.person import PersonConfig
from geodiff4d.tracking.person_training import PersonTraining
from geodiff4d.tracking.reader import ReaderConfig
from geodiff4d.tracking.reader_data import FacesConfig
from geodiff4d.tracking.reader_training import ReaderTraining
from geodiff4d.video.batches import WeightConfig
from geodiff4d.video.decoder import DecoderConfig
from geodiff4d.video.decoder_rows import DecoderRowsConfig
from geodiff4d.video.diffusion import DiffusionConfig
from geodiff4d.video.expression import ExpressionConfig
from geodiff4d.video.model import VideoModelConfig
from geodiff4d.video.sample import SampleConfig
from geodiff4d.video.tone import KeepTone
from geodiff4d.video.train import VideoTraining
from geodiff4d.video.train_codec import CodecTraining
from geodiff4d.video.train_decoder import DecoderTraining
from geodiff4d.video.unet import UNetConfig
from geodiff4d.video.vae import PatchCodecConfig

PresetName = Literal["debug", "embedded", "paper"]


@dataclass(frozen=True)
class PerceptionStage:
    """How the perception network is trained, and on whom."""

    training: PerceptionTraining
    people: PeopleConfig
    val_people: PeopleConfig


@dataclass(frozen=True)
class ReaderStage:
    """How the reader of faces is trained, and on whose."""

    training: ReaderTraining
    faces: FacesConfig
    val_faces: FacesConfig
    measured_on: tuple[int, int] = (24, 36)
    """People and frames of the performances on which the weights of fit and reading are measured."""
    from_encoder: bool = False
    """Start the trunk from the expression encoder of the video model that ships."""


@dataclass(frozen=True)
class CutoutPeople:
    """Rendered people that are cut out beside photographs': those, about half, who stand before a plain background."""

    subjects: int = 72
    val_subjects: int = 8
    frames: int = 3
    views: int = 3
    size: int = 256


@dataclass(frozen=True)
class PersonStage:
    """How the network that tells people from their backgrounds is trained, and on whom."""

    training: PersonTraining
    people: CutoutPeople


@dataclass(frozen=True)
class DecoderStage:
    """How the guided decoder is trained, and on what."""

    training: DecoderTraining
    rows: DecoderRowsConfig
    """Sizes of the rows; the command names model and photographs."""
    people: int
    val_people: int


@dataclass(frozen=True)
class IdentityStage:
    """On how many people the open measure of identity is fitted, and measured."""

    people: int = 400
    images: int = 6
    """Of each of them."""
    unseen: int = 20
    """People of the test split whom it has to tell apart."""
    seed: int = 0


@dataclass(frozen=True)
class BenchSizes:
    """How much `geodiff4d bench` measures, beside the preset's own sizes."""

    people: int = 4
    """People of the open world per process."""
    images: int = 30
    """Images of each of them."""
    steps: int = 20
    """Steps of a fit, or a third of the frames of a driven avatar, per measurement."""
    scenes: tuple[tuple[int, int, float], ...] = ((256, 20_000, 3.0), (512, 50_000, 4.0))
    """For the rasteriser: side of the image [px], Gaussians, and their mean radius on it at three standard deviations
    [px]."""


@dataclass(frozen=True)
class Preset:
    """One row: what every command takes from it."""

    name: PresetName
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
    tracks: TrackStoreConfig
    """What stage 2 is trained on, in the sizes of `store`."""
    val_tracks: TrackStoreConfig
    fit: FitConfig
    """How an avatar is fitted."""
    perception: PerceptionStage | None = None
    """What tracking looks with; None where it is not trained."""
    reader: ReaderStage | None = None
    """What tracking reads expression and gaze with; None where it is not trained."""
    person: PersonStage | None = None
    """What tracking cuts people out with; None where it is not trained."""
    decoder: DecoderStage | None = None
    """What finishes the video model's frames; None where it is not trained."""
    identity: IdentityStage | None = None
    """The open measure of identity; None where it is not fitted."""
    azimuth_deg: float = CAPTURE_AZIMUTH_DEG
    """Full angle between the outermost cameras of a synthesized clip [degrees]."""
    bench: BenchSizes = BenchSizes()
    trackable: bool = True
    """Whether heads can be tracked in images of this size; where not, evaluations disturb the true parameters as a
    tracker would."""
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
        expression=ExpressionConfig(size=crop, widths=encoder),
        diffusion=DiffusionConfig(prediction="residual", zero_terminal=True),
        size=size, pose="codec", warp=True, surroundings=True, moves=True,
    )  # fmt: skip


DEBUG_CODEC = PatchCodecConfig(factor=8, channels=16, trunk=16, detail=8)
EMBEDDED_CODEC = PatchCodecConfig(factor=16, channels=96, trunk=48)

_ROWS = (
    Preset(
        "debug",
        "64 px, a few steps: tests",
        model=_small(DEBUG_CODEC, 64, 32, (16, 32, 32), (8, 16)),
        codec=CodecTraining(DEBUG_CODEC, steps=6, batch=4, basis_images=8),
        image=VideoTraining(
            steps=4, pairs=PairConfig(references=2, targets=2, moved=0.5, strangers=0.5), lr=1e-3, warm_start=2,
            log_every=1, validate_every=4, save_every=2,
        ),
        store=StoreConfig(
            subjects=2, instants=2, views=2, size=64, crop=32, texels=64, grid=8, supersample=1, strangers=True
        ),
        val_store=StoreConfig(
            "val", subjects=1, instants=2, views=2, size=64, crop=32, texels=64, grid=8, supersample=1
        ),
        sample=SampleConfig(
            steps=2, guidance=1.5, sampler="ddim", finish=(KeepTone(),)
        ),
        views=3, frames=4,
        video=VideoTraining(
            steps=4, pairs=PairConfig(references=1, targets=4, clips=True, moved=1.0), lr=1e-3, parts="temporal",
            sampled_starts=0.5, log_every=1, validate_every=4, save_every=2,
        ),
        tracks=TrackStoreConfig(subjects=2, frames=5, portraits=1),
        val_tracks=TrackStoreConfig(subjects=1, frames=3, portraits=1),
        fit=FitConfig(
            iterations=20, gaussians=10_000, checkpoint_every=10, remesh=RemeshConfig(48),
            deformation=DeformationConfig(size=16, channels=4, levels=2), dynamics=DynamicsConfig(hidden=8),
            densify=DensifyConfig(every=8, limit=18_500),
        ),
        perception=PerceptionStage(
            PerceptionTraining(
                PerceptionConfig(32, 32, (4, 8, 8, 8), (1, 1, 1, 1), 8, 4, (4, 4, 8, 8)), steps=4, batch=4, pictures=2,
                sizes=(), backgrounds=4, log_every=2, validate_every=3, save_every=2,
            ),
            people=PeopleConfig(subjects=2, instants=1, size=64, supersample=1, points=32),
            val_people=PeopleConfig("val", subjects=1, instants=1, size=64, supersample=1, points=32),
        ),
        reader=ReaderStage(
            ReaderTraining(
                ReaderConfig(64, 32, (8, 8), 4, 16, 16, (4, 4, 8), 4, 8), steps=4, batch=4, sizes=(),
                backgrounds=4, log_every=2, validate_every=3, save_every=2, val_rows=2,
            ),
            faces=FacesConfig(subjects=2, instants=2, size=96, supersample=1),
            val_faces=FacesConfig("val", subjects=1, instants=2, size=96, supersample=1),
            measured_on=(1, 4),
        ),
        person=PersonStage(
            PersonTraining(
                PersonConfig(64, (4, 4, 8, 8, 8, 8), 4), steps=4, batch=2, backgrounds=4, log_every=2,
                validate_every=3, save_every=2, val_batches=1,
            ),
            CutoutPeople(subjects=2, val_subjects=3, frames=2, views=1, size=64),
        ),
        decoder=DecoderStage(
            DecoderTraining(
                DecoderConfig((8, 8), (1, 1)), steps=4, batch=2, size=64, warmup=1, log_every=1, validate_every=2,
                save_every=2, val_rows=2,
            ),
            DecoderRowsConfig(rows=2, size=128, low=64), people=2, val_people=1,
        ),
        identity=IdentityStage(people=3, images=3, unseen=2),
        bench=BenchSizes(people=1, images=2, steps=2, scenes=((48, 300, 3.0), (64, 600, 3.0))),
        trackable=False,
        temporal=(1, 2, 1),
    ),
    Preset(
        "embedded",
        "256 px on two CPU cores, trained on the open world (docs/LOG.md has the measurements)",
        model=_small(EMBEDDED_CODEC, 256, 96, (96, 128, 128), (32, 64, 96, 128)),
        codec=CodecTraining(EMBEDDED_CODEC),
        image=VideoTraining(
            steps=4000, pairs=PairConfig(references=8, targets=3, moved=0.8, strangers=0.3), lr=5e-4, warm_start=600,
            expression_lr=0.5, timestep_power=0.15, sampled_starts=0.4, drop_warp=0.05,
            weights=WeightConfig(focus=10.0),
        ),
        store=StoreConfig(subjects=600, instants=8, views=3, strangers=True),
        val_store=StoreConfig("val", subjects=12, instants=3, views=3),
        # Chosen on val (docs/LOG.md): what is trained so far is best at the highest noise levels.
        sample=SampleConfig(
            steps=1, guidance=1.0, still_noise=True, draws=1,
            finish=(KeepTone(),),
        ),
        views=8, frames=96, azimuth_deg=140.0,
        video=VideoTraining(
            steps=500, pairs=PairConfig(references=2, targets=16, clips=True, moved=1.0), lr=1e-3, warmup=30, ema=0.99,
            parts="temporal", sampled_starts=1.0, temporal_loss=4.0, drop_warp=0.0, weights=WeightConfig(focus=10.0),
            log_every=10, validate_every=125, save_every=125,
        ),
        tracks=TrackStoreConfig(),
        val_tracks=TrackStoreConfig(subjects=6, frames=16, portraits=1),
        fit=FitConfig(coarse=0.6),
        perception=PerceptionStage(PerceptionTraining(), PeopleConfig(), PeopleConfig("val", subjects=30)),
        reader=ReaderStage(ReaderTraining(), FacesConfig(), FacesConfig("val", subjects=120), from_encoder=True),
        person=PersonStage(PersonTraining(), CutoutPeople()),
        decoder=DecoderStage(DecoderTraining(), DecoderRowsConfig(), people=240, val_people=16),
        identity=IdentityStage(),
        temporal=(1, 2, 4),
    ),
    Preset(
        "paper",
        "512 px in Stable Diffusion 1.5's size (Sec. 4); needs a GPU and the user's own weights and data",
        model=VideoModelConfig(),
        codec=CodecTraining(),
        image=VideoTraining(
            steps=80_000, pairs=PairConfig(references=32, targets=1), hold=1.0, gradient_checkpointing=True,
            preview=SampleConfig(steps=10, guidance=2.5),
        ),
        store=StoreConfig(subjects=20_000, instants=8, views=16, size=512, crop=224, texels=512, grid=64),
        val_store=StoreConfig("val", subjects=64, instants=4, views=8, size=512, crop=224, texels=512, grid=64),
        sample=SampleConfig(),
        views=12, frames=200,
        video=VideoTraining(
            steps=20_000, pairs=PairConfig(references=8, targets=16, clips=True), hold=1.0, parts="temporal",
            gradient_checkpointing=True,
            preview=SampleConfig(steps=10, guidance=2.5),
        ),
        tracks=TrackStoreConfig(subjects=5_000, frames=48, portraits=4, views=4),
        val_tracks=TrackStoreConfig(subjects=16, frames=32, portraits=1),
        # Sec. 4.2, A.2.
        fit=FitConfig(
            iterations=100_000, gaussians=100_000, means_lr=5e-3, quats_lr=1e-3, log_scales_lr=5e-3, opacity_lr=2.5e-2,
            color_lr=2.5e-3, harmonics=3, harmonics_lr=1.25e-4, checkpoint_every=5000, device="cuda",
            refine=RefineConfig(
                expr=1e-4, pose=1e-5, face=1e-4, translation=1e-5, shape=1e-5, warmup=0.2, plateau=0.8, start=1e-10
            ),
            loss=LossConfig(normal_alpha="mask"),
            remesh=RemeshConfig(128),
            deformation=DeformationConfig(size=128, channels=64, levels=6, lr=1e-4),
            dynamics=DynamicsConfig(features=16, hidden=64, lr=1e-4, feature_lr=2.5e-3),
            densify=DensifyConfig(start=0.08, stop=0.7, every=2000, reset_every=20_000, limit=250_000),
        ),
        bench=BenchSizes(people=3, images=20, scenes=((512, 100_000, 3.0), (1024, 200_000, 4.0))),
    ),
)  # fmt: skip
PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


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
