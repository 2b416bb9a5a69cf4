"""Training batches of the video model: ranges of consecutive samples, read, encoded by the codec and weighted."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain, count
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.data import DataLoader

from geodiff4d.data.footage.take import CachedFrames, DecodedFrames, on_grid
from geodiff4d.data.sampling import Example, Samples
from geodiff4d.video.vae import Codec


@dataclass(frozen=True)
class Batch:
    """References with the target frames that share them; a row is a sample."""

    index: Int[Tensor, " b"]
    """Of each sample: its noise and what is dropped are functions of it."""
    reference_pose: Float[Tensor, "b p h w"]
    target: Float[Tensor, "b d c t h w"]
    pose: Float[Tensor, "b p t h w"]
    """Pose maps of the targets, on the latent grid."""
    crops: Float[Tensor, "b t 3 size size"]
    """Driving crops in [0, 1]."""
    weight: Float[Tensor, "b d 1 t h w"]
    """Weight of each latent cell in the loss, mean 1 over a sample's frames; 0 in padding and where normals are not
    known."""
    start: Float[Tensor, "b 2 c h w"]
    """Latents of the portraits and of their normals, which a sampler's first noise is added to."""
    valid: Bool[Tensor, "b t"]
    """Frames that do not merely pad a clip."""
    warp: Float[Tensor, "b 3 t height width"] | None = None
    """The portraits carried to the targets' heads; None for models that do not look at it."""
    visibility: Float[Tensor, "b 2 t height width"] | None = None
    """Where the portrait itself shows the point, and where the head is at all."""

    @property
    def reference(self) -> Float[Tensor, "b c h w"]:
        """RGB latents of the portraits."""
        return self.start[:, 0]

    def to(self, device: torch.device) -> "Batch":
        """Move everything but the index, which draws need on the host: asking a GPU for it would make steps wait."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "index"}
        return replace(self, **{name: value.to(device) for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class WeightConfig:
    """How much a latent cell counts: background, plus foreground, plus mouth, eyes and brows."""

    background: float = 0.1
    foreground: float = 1.0
    focus: float = 3.0


UNIFORM = WeightConfig(background=1.0, foreground=0.0, focus=0.0)
"""The paper's loss."""


class Batches:
    """Batches by index: batch `i` holds samples `i·size` to `(i+1)·size − 1`, `size` being `pairs.references`.

    So the batches that all processes take in one step are one range of samples, however many processes there are.
    """

    def __init__(
        self, samples: Samples, codec: Codec, weights: WeightConfig = WeightConfig(), encoded_pose: bool = True,
        workers: int = 0,
    ):  # fmt: skip
        """`encoded_pose` gives pose maps as latents; off, they are resized to the latent grid (Sec. 3.2). `workers`
        processes read ahead (`read_ahead`)."""
        self.samples, self.codec, self.weights = samples, codec, weights
        self.encoded_pose, self.workers = encoded_pose, workers
        self.size = samples.pairs.references
        self._ahead: Iterator[list[Example]] | None = None
        self._next = self._stride = 0

    @property
    def targets(self) -> int:
        """Targets of a batch."""
        return self.size * self.samples.pairs.targets

    def __getitem__(self, index: int) -> Batch:
        if self._ahead is not None and index == self._next:
            self._next += self._stride
            return self.encode(next(self._ahead))
        return self.encode([self.samples[i] for i in self._range(index)])

    def _range(self, index: int) -> range:
        return range(index * self.size, (index + 1) * self.size)

    def read_ahead(self, first: int, stride: int) -> None:
        """Let worker processes, if there are any, read batches `first`, `first + stride`, … before they are wanted.

        Other indices may still be asked for, and those in any other order; they are read then.
        """
        if self.workers == 0:
            return
        # A generator of its own: torch's would otherwise be advanced, and a resumed run would differ.
        loader = DataLoader(
            self.samples, batch_sampler=map(list, map(self._range, count(first, stride))), collate_fn=list,
            num_workers=self.workers, multiprocessing_context="spawn", generator=torch.Generator(),
        )  # fmt: skip
        self._ahead, self._next, self._stride = iter(loader), first, stride

    @torch.no_grad()
    def encode(self, examples: list[Example]) -> Batch:
        """Encode what was not encoded before, all at once, and put the samples together, on the codec's device."""
        device = next(chain(self.codec.parameters(), self.codec.buffers())).device
        new = [e.frames for e in examples if isinstance(e.frames, DecodedFrames)]
        fresh = iter(())
        if new:
            images = (torch.cat([getattr(f, k) for f in new]).to(device) for k in ("rgb", "normal", "pose"))
            planes = encode_planes(self.codec, *images, encoded_pose=self.encoded_pose)
            fresh = iter(planes.split([len(f.rgb) for f in new]))
        rows = [self._row(e, e.frames.planes if isinstance(e.frames, CachedFrames) else next(fresh)).to(device)
                for e in examples]  # fmt: skip
        columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Batch)}
        whole: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
        return Batch(**whole)

    def _row(self, e: Example, planes: Float[Tensor, "n p h w"]) -> Batch:
        """Lay one sample out, its padding too."""
        n, c, f = len(e.driving), self.codec.channels, e.frames
        pad = torch.arange(n + e.padding).clamp(max=n - 1)
        valid = torch.arange(n + e.padding) < n
        clip, to_clip = planes[1:][pad.to(planes.device)], "t c h w -> 1 c t h w"
        weight = self._weight(f, planes.shape[-1])[1:]
        if e.counts is not None:
            weight = weight * adaptive_avg_pool2d(e.counts, planes.shape[-1])[:, 0]
        weight = weight[pad]
        # By itself: the others in its batch must not change what a sample counts.
        weight = weight / weight[valid].mean() * valid[:, None, None]
        known = f.has_normal[1:][pad]
        return Batch(
            index=torch.tensor([e.index]), reference_pose=planes[:1, 2 * c :],
            target=rearrange(clip[:, : 2 * c], "t (d c) h w -> 1 d c t h w", d=2),
            pose=rearrange(clip[:, 2 * c :], to_clip), crops=e.driving[pad][None],
            weight=torch.stack([weight, weight * known[:, None, None]])[None, :, None],
            start=planes[:1, : 2 * c].unflatten(1, (2, c)), valid=valid[None],
            warp=None if e.warp is None else rearrange(e.warp[pad], to_clip),
            visibility=None if e.visibility is None else rearrange(e.visibility[pad], to_clip),
        )  # fmt: skip

    def _weight(self, f: DecodedFrames | CachedFrames, side: int) -> Float[Tensor, "n h w"]:
        cover, focus = on_grid(f.mask, f.focus, side) if isinstance(f, DecodedFrames) else (f.cover, f.focus)
        return self.weights.background + self.weights.foreground * cover + self.weights.focus * focus


def encode_planes(
    codec: Codec, rgb: Float[Tensor, "n 3 height width"], normal: Float[Tensor, "n 3 height width"],
    pose: Float[Tensor, "n 3 height width"], encoded_pose: bool,
) -> Float[Tensor, "n p h w"]:  # fmt: skip
    """Encode frames: channels of the image's latents, the normals' and the pose map's, or its own three resized."""
    z = codec.encode(torch.cat([rgb, normal, pose] if encoded_pose else [rgb, normal]))
    parts = list(z.split(len(rgb)))
    if not encoded_pose:
        parts.append(interpolate(pose * 2 - 1, size=z.shape[-2:], mode="area"))
    return torch.cat(parts, 1)
