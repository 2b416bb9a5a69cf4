"""Animate a portrait by the video model alone: RGB and normals, before the portrait's camera or the driver's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geodiff4d.cli._generation import GenerationArgs, inputs_of, prepare, set_up, stated
from geodiff4d.cli._signing import sealer


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
    from geodiff4d.pipeline import following
    from geodiff4d.video.inputs import with_identity_of

    if args.camera == "driver" and args.pose == "still":
        raise UserError("--camera driver --pose still: expected one of them, a head follows the driver's camera or not")
    if args.frames is not None and args.frames < 1:
        raise UserError(f"--frames is {args.frames}: expected at least 1")
    if args.driving is None:
        raise UserError("no driver: expected --driving with a video of one face, or a tracked clip")
    refuse_foreign(args.out, *inputs_of(args))
    signer, setup = sealer(args), set_up(args)
    request = prepare(args, setup, bar, args.frames)
    portrait, driving = request.portrait, request.driving
    n, own = len(driving), portrait.params
    if args.camera == "driver":
        placed, camera = following(portrait, driving, request.head)
    else:
        params = with_identity_of(portrait, driving.params)
        kept = ["translation"] if args.pose == "driver" else ["translation", "rotation", "neck_pose"]
        params = replace(params, **{k: getattr(own, k).expand(n, -1) for k in kept})
        placed, camera = replace(driving, params=params), portrait.camera
    made = setup.generator.generate(replace(request, driving=placed), camera.expand(n), bar)
    normals = encode_normals(made.normal, torch.ones_like(made.mask))
    crops = torch.nn.functional.interpolate(
        driving.crops, size=portrait.on_grey.shape[-2:], mode="bilinear", align_corners=False
    )
    with fresh_folder(args.out) as folder:
        write_video(folder / "video.mp4", made.rgb, driving.fps)
        write_video(folder / "normals.mp4", normals, driving.fps)
        rows = (torch.cat([portrait.on_grey, crops[i], made.rgb[i], normals[i]], -1) for i in range(n))
        write_video(folder / "side_by_side.mp4", rows, driving.fps)
    signer.seal(args.out, stated(args, setup.generator))
    print(f"{args.out}: {n} frames; side_by_side.mp4 shows portrait, driver, result and normals")
