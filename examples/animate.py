"""Animate a portrait: frames and normals of another person's performance, by the video model alone (Sec. 3.2).

    python examples/animate.py --out runs/example

Portrait and driver are made-up people here. With your own, tracked by `geodiff4d track`, take instead

    portrait = load_portrait(Clip(Path("runs/me")), model.config.size)
    driving = load_driving(Clip(Path("runs/talking")), head, model.config.expression.size)
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro

from geodiff4d.core.images import encode_normals
from geodiff4d.core.video import write_video
from geodiff4d.evaluate.pairs import make_pair
from geodiff4d.heads import load_head
from geodiff4d.pipeline import load_model
from geodiff4d.presets import preset
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import with_identity_of


def main(out: Path, model: Path | None = None, frames: int = 8, name: str = "embedded") -> None:
    """Write video.mp4 and normals.mp4.

    Args:
        out: folder to write.
        model: model folder; by default the one that ships.
        frames: how much of the performance.
        name: preset that says how to sample.
    """
    video_model, head = load_model(model), load_head()
    size, crop = video_model.config.size, video_model.config.expression.size
    pair = make_pair(out / "people", head, 0, frames, size, crop)

    # The driver's motion, the portrait's shape.
    driving = replace(pair.driving, params=with_identity_of(pair.portrait, pair.driving.params))
    request = GenerationRequest(pair.portrait, driving, head)
    made = DiffusionGenerator(video_model, preset(name).sample).generate(request, pair.portrait.camera.expand(frames))

    write_video(out / "video.mp4", made.rgb, pair.driving.fps)
    write_video(out / "normals.mp4", encode_normals(made.normal, torch.ones_like(made.mask)), pair.driving.fps)
    print(f"{out}: {len(made.rgb)} frames, expression tokens {tuple(made.tokens.shape)}")


if __name__ == "__main__":
    tyro.cli(main)
