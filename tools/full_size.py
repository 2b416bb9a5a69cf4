"""The paper's model at its true size on a CPU: load it, sample two frames in two guided steps, and say what that takes.

Usage: `.venv/bin/python tools/full_size.py --out runs/full_size` (17 GB of disk). Nobody needs Stable Diffusion's
weights for it: a folder in its layout and sizes is made of random ones, becomes the paper's model
(`from_stable_diffusion`), is saved as training saves it, and is loaded in bf16 as `synthesize` does, each in a process
of its own. Prints seconds, and the largest memory of each [GB], pages of mapped files included.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from geodiff4d.core.camera import Camera
from geodiff4d.evaluate.pairs import make_pair
from geodiff4d.heads import load_head
from geodiff4d.presets import preset
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import with_identity_of
from geodiff4d.video.model import load_video_model
from geodiff4d.video.pretrained import from_stable_diffusion
from geodiff4d.video.sample import SampleConfig

Part = Literal["all", "folder", "model", "sample"]
SIZE, FRAMES, STEPS = 512, 2, 2


@dataclass(frozen=True)
class Args:
    """Options of the run."""

    part: Annotated[Part, tyro.conf.Positional] = "all"
    """What this process does; `all` starts one for each."""
    out: Path = Path("runs/full_size")
    """Folder for Stable Diffusion's layout, the model, and the frames."""
    threads: int | None = None
    """Of torch; by default as many as it takes."""


def make_folder(out: Path) -> None:
    """Write Stable Diffusion 1.5's UNet and VAE with random float32 weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    unet.save_pretrained(out / "sd" / "unet")
    del unet
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, scaling_factor=0.18215,
    ).save_pretrained(out / "sd" / "vae")  # fmt: skip


def make_model(out: Path) -> dict[str, float]:
    """Turn the folder into the paper's model, with temporal modules, and save it as training does."""
    began = time.perf_counter()
    model, _ = from_stable_diffusion(out / "sd", preset("paper").model)
    seconds = time.perf_counter() - began
    model.save(out / "model")
    weights = sum(p.numel() for n in model.networks().values() for p in n.parameters())
    return {"from Stable Diffusion [s]": seconds, "weights [billions]": weights / 1e9}


@torch.no_grad()
def sample(out: Path) -> dict[str, float]:
    """Load the model in bf16 and sample, as `synthesize` would."""
    began, before = time.perf_counter(), _peak_gb()
    model = load_video_model(out / "model", compact=True)
    loaded, memory = time.perf_counter() - began, _peak_gb()
    head = load_head("openhead")
    pair = make_pair(out / "pair", head, 0, FRAMES, SIZE, model.config.expression.size)
    params = with_identity_of(pair.portrait, pair.driving.params)
    request = GenerationRequest(pair.portrait, replace(pair.driving, params=params), head)
    generator = DiffusionGenerator(model, SampleConfig(steps=STEPS, guidance=2.5))
    began = time.perf_counter()
    made = generator.generate(request, Camera.stack([pair.portrait.camera] * FRAMES))
    seconds = time.perf_counter() - began
    assert made.rgb.shape == (FRAMES, 3, SIZE, SIZE)
    assert torch.isfinite(made.rgb).all()
    return {
        "before [GB]": before, "loading [s]": loaded, "loaded [GB]": memory,
        f"{FRAMES} frames of {SIZE} px in {STEPS} guided steps [s]": seconds,
    }  # fmt: skip


def _peak_gb() -> float:
    """Return the largest memory of this process so far, mapped pages included [GB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(args: Args) -> None:
    if args.part == "all":
        for part in ("folder", "model", "sample"):
            made = {"folder": "sd/vae/config.json", "model": "model/vae/config.json", "sample": "none"}[part]
            if not (args.out / made).exists():
                threads = [] if args.threads is None else ["--threads", str(args.threads)]
                subprocess.run([sys.executable, __file__, part, "--out", str(args.out), *threads], check=True)
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found = {"folder": make_folder, "model": make_model, "sample": sample}[args.part](args.out) or {}
    found["largest memory [GB]"] = _peak_gb()
    print(f"{args.part}: " + json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
