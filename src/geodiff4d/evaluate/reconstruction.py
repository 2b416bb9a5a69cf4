"""What a reconstruction leaves to look at: the driven video and a page (no truth exists for a user's own portrait)."""

from pathlib import Path

import torch

from geodiff4d.avatar.drive import head_centre, orbit, render_sequence
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import turned
from geodiff4d.core.files import read_json
from geodiff4d.core.images import encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.video import write_video
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.report import Grid, Report, Section, Table, Video, build_report
from geodiff4d.video.inputs import Driving, Portrait

VIDEO_FRAMES = 96
YAWS = (-45, -25, 0, 25, 45)


@torch.no_grad()
def finish(out: Path, portrait: Portrait, driving: Driving, generator: str, progress: Progress = silent) -> None:
    """Write avatar.mp4 and report.html beside the clip and the avatar."""
    out = Path(out)
    clip, avatar = Clip(out / "clip"), Avatar.load(out / "avatar")
    n = min(VIDEO_FRAMES, max(24, avatar.sequence.batch[0]))
    params = avatar.sequence[torch.arange(n) % avatar.sequence.batch[0]]
    frames = render_sequence(avatar, params, orbit(avatar, n, 45.0))
    pictures = (torch.cat([f.rgb.clamp(0, 1), f.normal * 0.5 + 0.5], -1) for f in progress(frames, "rendering", n))
    write_video(out / "avatar.mp4", pictures, clip.fps)

    metrics = read_json(out / "avatar" / "metrics.json")
    picks = torch.linspace(0, len(clip) - 1, 6).round().long().tolist()
    chosen = [clip.frame(i) for i in picks]
    drivers = [driving.crops[clip.records[i].timestep % len(driving)] for i in picks]
    normals = [encode_normals(f.normal, torch.ones_like(f.mask)) for f in chosen if f.normal is not None]
    centre, last = head_centre(avatar), avatar.sequence.batch[0] - 1
    shown = [
        avatar.render(avatar.sequence[k * last // 4], turned(avatar.camera, centre, yaw)) for k, yaw in enumerate(YAWS)
    ]
    sections = [
        Section("What went in", "", [Grid([("portrait", [portrait.image, portrait.on_grey]), ("driver", drivers)])]),
        Section("What was generated", f"By the {generator} generator; the avatar was fitted to this.",
                [Grid([("colour", [f.image for f in chosen]), ("normals", normals)])]),
        Section("The avatar", "", [
            Grid([("colour", [f.rgb.clamp(0, 1) for f in shown]), ("normals", [f.normal * 0.5 + 0.5 for f in shown])],
                 [f"{yaw}°" for yaw in YAWS]),
            Video(out / "avatar.mp4", "Driven and orbited; normals beside it."),
            Table(["frames", "PSNR, foreground [dB]", "normals off by [°]"],
                  [[k, metrics[k]["psnr_fg"], metrics[k]["normal_deg"]] for k in ("train", "held_out")],
                  "The avatar against the generated frames it was, and was not, fitted to: not against a truth."),
        ]),
    ]  # fmt: skip
    lead = "One portrait and a driving performance went in; an animatable head of 3D Gaussians came out."
    build_report(out / "report.html", Report("Reconstruction", lead, sections))
