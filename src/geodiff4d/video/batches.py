"""Training batches of the video model from a store of rendered frames."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.files import read_json, write_json
from geodiff4d.data.augment import AugmentConfig, augment_crops
from geodiff4d.data.estimated import as_estimated
from geodiff4d.data.pairs import PairConfig, Pairs, draw_pairs
from geodiff4d.data.store import Store, carried_pixels, take
from geodiff4d.data.tracks import TrackStore, draw_clips
from geodiff4d.video.vae import Codec

LATENT_KINDS = ("rgb", "normal", "pose")
KEPT_EVERY = 64
"""Chunks of pictures encoded between notes of how far it got."""


@dataclass(frozen=True)
class Batch:
    """References with the target frames that share them."""

    reference: Float[Tensor, "b c h w"]
    """RGB latents of the portraits."""
    reference_pose: Float[Tensor, "b p h w"]
    target: Float[Tensor, "b d c t h w"]
    pose: Float[Tensor, "b p t h w"]
    """Pose maps of the targets, encoded."""
    warp: Float[Tensor, "b 3 t height width"]
    visibility: Float[Tensor, "b 2 t height width"]
    """Where the portrait itself shows the point, and where the head is at all."""
    crops: Float[Tensor, "b t 3 size size"]
    """Driving crops in [0, 1]."""
    weight: Float[Tensor, "b domains 1 t h w"]
    """Weight of each latent cell in the loss, mean 1; one for both domains, or one each."""
    start: Float[Tensor, "b 2 c h w"]
    """Latents of the portraits and of their normals, which a sampler's first noise is added to."""
    valid: Bool[Tensor, "b t"] | None = None
    """Frames that do not merely pad a clip; None means all."""

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class WeightConfig:
    """How much a latent cell counts: background, plus foreground, plus mouth, eyes and brows."""

    background: float = 0.1
    foreground: float = 1.0
    focus: float = 3.0


UNIFORM = WeightConfig(background=1.0, foreground=0.0, focus=0.0)
"""The paper's loss."""


def encode_store(store: Store, codec: Codec, path: Path, chunk: int = 32, exact_normals: bool = True) -> np.ndarray:
    """Encode pictures, normals and pose maps once: `[subjects, instants, views, 3, c, h, w]` fp16, memory-mapped.

    A finished file of the same store and codec is taken as it is; one that was cut off goes on. CUDA encodes where
    there is CUDA. Without `exact_normals` they are degraded to what an estimator gives (Table 2, "w/o synthetic data").
    """
    n, side = store.config.shape, store.config.size // codec.factor
    built = (store.folder / "store.json").stat().st_mtime_ns if hasattr(store, "folder") else 0
    made_of = {"store": asdict(store.config), "built": built, "codec": _fingerprint(codec)}
    if not exact_normals:
        made_of["normals"] = "as estimated"
    note = path.with_suffix(".json")
    known = read_json(note) if path.exists() and note.exists() else {}
    done = known.pop("encoded", None)
    if known == json.loads(json.dumps(made_of)):
        if done is None:
            return np.load(path, mmap_mode="r")
        out = np.lib.format.open_memmap(path, "r+")
    else:
        note.unlink(missing_ok=True)
        done = 0
        out = np.lib.format.open_memmap(path, "w+", np.float16, (*n, len(LATENT_KINDS), codec.channels, side, side))
    flat = out.reshape(-1, *out.shape[3:])
    home = next(codec.parameters()).device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec.to(device)
    for k, kind in enumerate(LATENT_KINDS):
        images = getattr(store, kind).reshape(-1, *getattr(store, kind).shape[3:])
        for i in range(0, len(images), chunk):
            if k * len(images) + i < done:
                continue
            x = torch.from_numpy(np.array(images[i : i + chunk])).float() / 255
            if kind == "normal" and not exact_normals:
                x = as_estimated(x, seed=i)
            with torch.no_grad():
                flat[i : i + chunk, k] = codec.encode(x.to(device)).half().cpu().numpy()
            if (i // chunk + 1) % KEPT_EVERY == 0:
                out.flush()
                write_json(note, {**made_of, "encoded": k * len(images) + min(i + chunk, len(images))})
    codec.to(home)
    out.flush()
    write_json(note, made_of)
    return out


def _fingerprint(codec: Codec) -> str:
    """Tell codecs apart by what they make of a picture."""
    side = 8 * codec.factor
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = codec.encode(picture.to(next(codec.parameters()).device))
    return hashlib.sha256(z.half().cpu().numpy().tobytes()).hexdigest()


class Batches:
    """Draws training batches; batch `i` is a function of (seed, i) alone."""

    def __init__(
        self, store: Store, latents: np.ndarray, pairs: PairConfig, seed: int = 0,
        augment: AugmentConfig | None = AugmentConfig(), weights: WeightConfig = WeightConfig(),
        encoded_pose: bool = True, surroundings: bool = False,
    ):  # fmt: skip
        """`encoded_pose` gives pose maps as latents; off, they are resized to the latent grid (Sec. 3.2).
        `surroundings` is the model's."""
        self.store, self.latents, self.pairs, self.seed = store, latents, pairs, seed
        self.augment, self.weights, self.encoded_pose = augment, weights, encoded_pose
        self.surroundings = surroundings

    @property
    def targets(self) -> int:
        """Targets of a batch."""
        return self.pairs.references * self.pairs.targets

    def __getitem__(self, index: int) -> Batch:
        p, valid = self.draw(index)
        b, t = p.driving_view.shape
        s = np.repeat(p.subject[:, None], t, 1)
        ref = (p.subject, p.reference[:, 0], p.reference[:, 1])
        tgt = (s, p.target[..., 0], p.target[..., 1])
        z_ref, z = take(self.latents, ref), take(self.latents, tgt)
        warp, visibility = carried_pixels(self.store, ref, tgt, p.moved, self.surroundings)
        crops = take(self.store.crop, (s, p.target[..., 0], p.driving_view), 255.0)
        if self.augment is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            crops = augment_crops(crops.flatten(0, 1), self.augment, generator).unflatten(0, (b, t))
        w = self.weights
        cover, focus = (take(getattr(self.store, k), tgt, 255.0) for k in ("cover", "focus"))
        weight = w.background + w.foreground * cover + w.focus * focus
        if valid is not None:
            weight = weight / weight[valid].mean() * valid[:, :, None, None]
        else:
            weight = weight / weight.mean()
        return Batch(
            reference=z_ref[:, 0], reference_pose=self._pose(z_ref, ref),
            target=rearrange(z[:, :, :2], "b t d c h w -> b d c t h w"),
            pose=rearrange(self._pose(z, tgt), "b t c h w -> b c t h w"),
            warp=warp, visibility=visibility, crops=crops,
            weight=weight[:, None, None], start=z_ref[:, :2], valid=valid,
        )  # fmt: skip

    def draw(self, index: int) -> tuple[Pairs, Bool[Tensor, "b t"] | None]:
        """Draw which frames make a batch, and which of them are not padding (None: all)."""
        return draw_pairs(self.store.config.shape, self.pairs, self.seed, index), None

    def _pose(self, z: Tensor, index: tuple) -> Tensor:
        if self.encoded_pose:
            return z[..., 2, :, :, :]
        image = take(self.store.pose, index, 255.0) * 2 - 1
        small = interpolate(image.flatten(0, -4), size=z.shape[-2:], mode="area")
        return small.unflatten(0, image.shape[:-3])

    def drivers(self, index: int, n: int) -> tuple[Float[Tensor, "n 3 size size"], Int[Tensor, " n"]]:
        """Draw driving crops alone, from any view: (augmented crops, their rows of the store's `motion`)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        subjects, instants, views = self.store.config.shape
        row = torch.randint(subjects * instants, (n,), generator=generator)
        view = torch.randint(views, (n,), generator=generator).numpy()
        crops = take(self.store.crop, (row.numpy() // instants, row.numpy() % instants, view), 255.0)
        return crops if self.augment is None else augment_crops(crops, self.augment, generator), row


class TrackBatches(Batches):
    """Draws batches of clips from a store of tracks: `pairs.references` clips of `pairs.targets` frames."""

    store: TrackStore

    def draw(self, index: int) -> tuple[Pairs, Bool[Tensor, "b t"] | None]:
        """Draw clips; frames that only pad a track are marked and weigh nothing."""
        portraits = self.store.tracks.portraits
        return draw_clips(self.store.config.shape, portraits, self.pairs, self.seed, index)
