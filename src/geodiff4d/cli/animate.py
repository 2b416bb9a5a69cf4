"""Animate a portrait by the video model alone: RGB and normals, before the portrait's camera or the driver's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geodiff4d.cli._generation import GenerationArgs, prepare, set_up


@dataclass(frozen=True, kw_only=True)
class Args(GenerationArgs):
    """Options of `geodiff4d animate`."""

    out: Path
    """Folder to write: video.mp4, normals.mp4 and side_by_side.mp4."""
    pose: Literal["driver", "still"] = "driver"
    """driver: turn the head as the driver does. still: keep the portrait's pose."""
    camera: Literal["portrait", "driver"] = "portrait"
    """portrait: the head stays where the portrait shows it. driver: it is seen where the driver's is seen, and as
    large, whatever size the tracker gave either of them."""
    frames: int | None = None
    """At most so many frames of the driver."""


def run(args: Args) -> None:
    from dataclasses import replace

    import torch

    from geodiff4d.cli.progress import bar
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.files import fresh_folder, refuse_foreign
    from geodiff4d.core.images import encode_normals
    from geodiff4d.core.video import write_video
    from geodiff4d.pipeline import animate, following
    from geodiff4d.video.generate import with_identity_of

    if args.camera == "driver" and args.pose == "still":
        raise UserError("--camera driver --pose still: expected one of them, a head follows the driver's camera or not")
    if args.frames is not None and args.frames < 1:
        raise UserError(f"--frames is {args.frames}: expected at least 1")
    refuse_foreign(args.out, args.portrait, args.driving)
    job = prepare(args, set_up(args), bar, args.frames)
    n, own = len(job.driving), job.portrait.params
    if args.camera == "driver":
        driving, camera = following(job.portrait, job.driving, job.head)
    else:
        params = with_identity_of(job.portrait, job.driving.params)
        kept = ["translation"] if args.pose == "driver" else ["translation", "rotation", "neck_pose"]
        params = replace(params, **{k: getattr(own, k).expand(n, -1) for k in kept})
        driving, camera = replace(job.driving, params=params), job.portrait.camera
    made = animate(
        job.portrait, driving, args.generator, job.model, job.head, camera.expand(n), job.sample, bar
    )  # fmt: skip
    normals = encode_normals(made.normal, torch.ones_like(made.mask))
    portrait = job.portrait.on_grey
    crops = torch.nn.functional.interpolate(
        job.driving.crops, size=portrait.shape[-2:], mode="bilinear", align_corners=False
    )
    with fresh_folder(args.out) as folder:
        write_video(folder / "video.mp4", made.rgb, job.driving.fps)
        write_video(folder / "normals.mp4", normals, job.driving.fps)
        rows = (torch.cat([portrait, crops[i], made.rgb[i], normals[i]], -1) for i in range(n))
        write_video(folder / "side_by_side.mp4", rows, job.driving.fps)
    print(f"{args.out}: {n} frames; side_by_side.mp4 shows portrait, driver, result and normals")
