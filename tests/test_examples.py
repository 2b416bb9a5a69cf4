"""The examples run as they stand, at the smallest size, and stay short."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_there_are_three_and_they_are_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [f.stem for f in files] == ["animate", "expressions", "stable_diffusion"]
    for file in files:
        assert len(file.read_text().splitlines()) < 60
        assert f"def test_{file.stem}(" in Path(__file__).read_text()


def test_animate(model, tmp_path, capsys):
    main("animate")(tmp_path, model, frames=2, name="debug")
    assert "2 frames" in capsys.readouterr().out
    assert (tmp_path / "video.mp4").stat().st_size and (tmp_path / "normals.mp4").stat().st_size


def test_expressions(model, tmp_path, capsys):
    main("expressions")(tmp_path / "between.png", model, between=3)
    assert "512 numbers" in capsys.readouterr().out
    assert (tmp_path / "between.png").stat().st_size


def test_stable_diffusion(tmp_path, capsys):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, scaling_factor=0.18215,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    main("stable_diffusion")(tmp_path, frames=3, steps=1, size=16)
    said = capsys.readouterr().out
    assert "reference: 1 new tensors, 4 left over" in said and "(1, 2, 3, 3, 16, 16)" in said
