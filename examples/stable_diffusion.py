"""The paper's model from Stable Diffusion's weights (Sec. 4.1): what is loaded, what is new, and one clip by windows.

    python examples/stable_diffusion.py --weights stable-diffusion-v1-5

A folder in diffusers' layout with `unet` and `vae` (and `image_encoder`, as sd-image-variations has one). The new parts
are untrained, so the frames show nothing yet: training starts from this model.
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro

from geodiff4d.video.model import ConditionImages, VideoModelConfig
from geodiff4d.video.pretrained import from_stable_diffusion
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample


@torch.no_grad()
def main(weights: Path, frames: int = 20, steps: int = 25, size: int = 512) -> None:
    """Build the model, say what came from where, and sample a clip.

    Args:
        weights: Stable Diffusion 1.5 folder.
        frames: length of the clip; the model sees 16 at a time.
        steps: sampling steps (Sec. 4.2).
        size: side of the images [px].
    """
    paper = VideoModelConfig(size=size)
    paper = replace(paper, unet=replace(paper.unet, temporal_layers=2))  # stage 2
    model, reports = from_stable_diffusion(weights, paper)
    for name, report in reports.items():
        print(f"{name}: {len(report.missing)} new tensors, {len(report.unexpected)} left over, grown {report.grown}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (model.to(device).compact() if device.type == "cuda" else model).eval()
    portrait, pose_maps = torch.rand(1, 3, size, size), torch.rand(1, 3, frames, size, size)
    portrait, pose_maps = portrait.to(device), pose_maps.to(device)

    face, image_context = model.codec.encode(portrait), model.image_context(portrait)
    reference = model.reference_kv(face, model.pose_planes(pose_maps[:, :, :1])[:, :, 0], image_context)
    crop = model.config.expression.size
    expressions = model.encode_expressions(torch.rand(frames, 3, crop, crop, device=device))
    start = face[:, None].expand(-1, 2, -1, -1, -1)  # the reference image; its normals stand beside it (A.1)
    config = SampleConfig(steps=steps, guidance=2.5, window=16, overlap=4)
    conditions = model.conditions(ConditionImages(pose_maps))
    latents = sample(model, ClipInputs(conditions, expressions, reference, start, image_context), config)
    images = model.decode_latents(latents)
    print(f"frames and normals: {tuple(images.shape)}, from {images.min():.2f} to {images.max():.2f}")


if __name__ == "__main__":
    tyro.cli(main)
