"""Training batches from a mixture of footage: examples are decoded, encoded by the codec and weighted as they come."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain, count

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d
from torch.utils.data import DataLoader, Dataset

from geodiff4d.data.mixture import Example, Mixture, collate
from geodiff4d.video.batches import UNIFORM, Batch, WeightConfig
from geodiff4d.video.vae import Codec


class MixedBatches:
    """Batches by index, like `Batches`: batch `i` holds the mixture's samples `i·size` to `(i+1)·size − 1`.

    So the batches that all processes take in one step are one range of samples, however many processes there are.
    """

    def __init__(
        self, mixture: Mixture, codec: Codec, size: int,
        weights: WeightConfig = UNIFORM, encoded_pose: bool = False, workers: int = 0,
    ):  # fmt: skip
        """`size` is references per batch; `encoded_pose` as in `Batches`; `workers` decode ahead (`read_ahead`)."""
        self.mixture, self.codec, self.size = mixture, codec, size
        self.weights, self.encoded_pose, self.workers = weights, encoded_pose, workers
        self._ahead: Iterator[Example] | None = None
        self._next = self._stride = 0

    @property
    def targets(self) -> int:
        """Targets of a batch."""
        return self.size * self.mixture.config.frames

    def __getitem__(self, index: int) -> Batch:
        if self._ahead is not None and index == self._next:
            self._next += self._stride
            return self.encode(next(self._ahead))
        return self.encode(_Decoded(self.mixture, self.size)[index])

    def read_ahead(self, first: int, stride: int) -> None:
        """Let worker processes, if there are any, decode batches `first`, `first + stride`, … before they are wanted.

        Other indices may still be asked for, and those in any other order; they are decoded then.
        """
        if self.workers == 0:
            return
        # A generator of its own: torch's would otherwise be advanced, and a resumed run would differ.
        loader = DataLoader(
            _Decoded(self.mixture, self.size), batch_size=None, sampler=_From(first, stride), num_workers=self.workers,
            multiprocessing_context="spawn", worker_init_fn=_one_thread, generator=torch.Generator(),
        )  # fmt: skip
        self._ahead, self._next, self._stride = iter(loader), first, stride

    @torch.no_grad()
    def encode(self, e: Example) -> Batch:
        """Turn decoded examples into latents, conditions and weights, on the codec's device."""
        device = next(chain(self.codec.parameters(), self.codec.buffers())).device
        e = replace(e, **{f.name: v.to(device) for f in fields(Example) if (v := getattr(e, f.name)) is not None})
        rgb, normal = (self._latents(x) for x in (e.rgb, e.normal))
        side = rgb.shape[-1]
        small = "b t c h w -> b c t h w"
        # A mixture without warp is for models that do not look at it.
        warp = torch.zeros_like(e.rgb) if e.warp is None else e.warp
        visibility = torch.zeros_like(e.rgb[:, :, :2]) if e.visibility is None else e.visibility
        portrait = self.codec.encode(torch.stack([e.reference, e.reference_normal], 1).flatten(0, 1))
        start = portrait.unflatten(0, (-1, 2))
        return Batch(
            reference=start[:, 0], reference_pose=self._pose(e.reference_pose[:, None], side)[:, 0],
            target=rearrange([rgb, normal], "d b t c h w -> b d c t h w"),
            pose=rearrange(self._pose(e.pose, side), small),
            warp=rearrange(warp, small), visibility=rearrange(visibility, small),
            crops=e.driving, weight=self._weight(e, side), start=start, valid=e.valid,
        )  # fmt: skip

    def _latents(self, images: Float[Tensor, "b t 3 height width"]) -> Float[Tensor, "b t c h w"]:
        return self.codec.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def _pose(self, images: Float[Tensor, "b t 3 height width"], side: int) -> Float[Tensor, "b t p h w"]:
        if self.encoded_pose:
            return self._latents(images)
        small = interpolate(images.flatten(0, 1) * 2 - 1, size=(side, side), mode="area")
        return small.unflatten(0, images.shape[:2])

    def _weight(self, e: Example, side: int) -> Float[Tensor, "b d 1 t h w"]:
        """Weigh cells by what they show; padding and normals that no one knows count nothing."""

        def cells(x: Float[Tensor, "b t 1 height width"]) -> Float[Tensor, "b t h w"]:
            return adaptive_avg_pool2d(x[:, :, 0], side)

        w = self.weights
        focus = max_pool2d(cells(e.focus), 3, 1, 1)
        weight = w.background + w.foreground * cells(e.mask) + w.focus * focus
        weight = weight / weight[e.valid].mean() * e.valid[:, :, None, None]
        known = torch.stack([torch.ones_like(e.has_normal), e.has_normal], 1)
        return weight[:, None, None] * known[:, :, None, :, None, None]


class _Decoded(Dataset):
    """Decoded batches by index."""

    def __init__(self, mixture: Mixture, size: int):
        self.mixture, self.size = mixture, size

    def __getitem__(self, index: int) -> Example:
        return collate([self.mixture[i] for i in range(index * self.size, (index + 1) * self.size)])


class _From:
    """Indices from one on, for ever."""

    def __init__(self, first: int, stride: int):
        self.first, self.stride = first, stride

    def __iter__(self) -> Iterator[int]:
        return count(self.first, self.stride)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
