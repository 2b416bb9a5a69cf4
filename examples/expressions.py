"""The pose-free expression (Sec. 3.1): encode two face crops, walk from one to the other, sample what lies between.

python examples/expressions.py --out runs/between.png
"""

from pathlib import Path

import torch
import tyro
from einops import rearrange

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import write_image
from geodiff4d.evaluate.pairs import make_pair
from geodiff4d.heads import HeadParams, load_head
from geodiff4d.pipeline import load_model
from geodiff4d.video.conditions import condition_images, lifted
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample


@torch.no_grad()
def main(out: Path, model: Path | None = None, between: int = 5, steps: int = 1) -> None:
    """Write one image: frames above, normals below.

    Args:
        out: image to write.
        model: model folder; by default the one that ships.
        between: how many frames, both ends included.
        steps: sampling steps.
    """
    video_model, head = load_model(model), load_head()
    pair = make_pair(out.parent / "people", head, 0, 2, video_model.config.size, video_model.config.expression.size)
    portrait = pair.portrait

    ends = video_model.encode_expressions(pair.driving.crops)  # [1, 2, 512]
    t = torch.linspace(0, 1, between)[None, :, None]
    expressions = ends[:, :1] * (1 - t) + ends[:, 1:] * t

    # What is known of every frame: the portrait's own pose, as a pose map, and its texture there.
    params, cameras = HeadParams.stack([portrait.params] * between), Camera.stack([portrait.camera] * between)
    known = condition_images(head, lifted(head, portrait, video_model.config.surroundings), params, cameras)
    pose = video_model.pose_planes(known.pose)
    shown = portrait.on_grey[None]
    face, context = video_model.codec.encode(shown), video_model.image_context(shown)
    reference = video_model.reference_kv(face, pose[:, :, 0], context)  # once, for all frames and steps

    config = SampleConfig(steps=steps, guidance=1.0, still_noise=True)
    conditions = video_model.conditions(known, pose_planes=pose)
    latents = sample(video_model, ClipInputs(conditions, expressions, reference, image_context=context), config)
    images = video_model.decode_latents(latents)  # [1, domains, 3, frames, height, width]
    write_image(out, rearrange(images[0], "d c t h w -> c (d h) (t w)"))
    print(f"{out}: {between} frames between two expressions, {ends.shape[-1]} numbers each")


if __name__ == "__main__":
    tyro.cli(main)
