"""The demo's real person: a photograph, and what the video model makes of it from other sides."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.report import Grid, Section
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.tracking.portraits import is_tracked
from geodiff4d.tracking.track import TrackingConfig, track
from geodiff4d.video.generate import DiffusionGenerator, Generated, GenerationRequest
from geodiff4d.video.inputs import Driving, driving_crop, load_portrait
from geodiff4d.video.warp_back import around

PHOTOGRAPH = Path(__file__).parents[1] / "assets" / "portraits" / "debruine.jpg"
"""L. DeBruine, of herself (CC0); of the photographs that no network here was trained on."""
TURNS_DEG = (-60, -40, -20, 0, 20, 40, 60)


@dataclass(frozen=True)
class PhotographViews:
    """A photograph and its person from several sides."""

    cut_out: Float[Tensor, "3 size size"]
    """On grey, as it was tracked."""
    views: Generated
    """Before cameras at `TURNS_DEG`."""


def photograph_views(
    folder: Path, head: Head, generator: DiffusionGenerator, progress: Progress = silent
) -> PhotographViews:
    """Track the photograph into `folder`, unless that is done, and show it from the sides with its own expression."""
    size, crop = generator.model.config.size, generator.model.config.expression.size
    if not is_tracked(folder):
        track(PHOTOGRAPH, folder, head, config=TrackingConfig(size=size), progress=progress)
    portrait, n = load_portrait(Clip(folder), size), len(TURNS_DEG)
    # As the avatar is turned on the page: a positive turn sees the person's left side.
    cameras = Camera.stack([around(head, portrait, -float(turn)) for turn in TURNS_DEG])
    seen = driving_crop(portrait.on_grey, head, portrait.params, portrait.camera, crop)
    driving = Driving(HeadParams.stack([portrait.params] * n), seen.expand(n, -1, -1, -1), temporal=False)
    return PhotographViews(portrait.on_grey, generator.generate(GenerationRequest(portrait, driving, head), cameras))


def photograph_section(shown: PhotographViews) -> Section:
    """Return the page's part about it."""
    made = shown.views
    ones = torch.ones_like(made.mask[0])
    normals = [encode_normals(normal, ones) for normal in made.normal]
    columns = ("photograph", *(f"{turn}°".replace("-", "−") for turn in TURNS_DEG))
    rows = [("colour", [shown.cut_out, *made.rgb]), ("normals", [torch.full_like(shown.cut_out, 0.5), *normals])]
    text = (
        "A real person: L. DeBruine, photographed by herself (CC0), as tracked and as the video model turns her. No "
        "network here was trained on this picture. There is no truth beside it: what it does not show is a guess. Your "
        "own is made so by `geodiff4d reconstruct --portrait me.jpg`."
    )
    return Section("A photograph", text, [Grid(rows, columns)])
