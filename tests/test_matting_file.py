"""A matting network of the user's: how it is called, what it is told, and what is refused."""

import pytest
import torch

from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.tracking.matting_file import MattingFile
from mini_onnx import field, network_file, node, scalar, tensor_info

SIDE = 64


def bright_is_person(path, threshold: float, gain: float, channels: int = 3, logits: bool = False):
    """Alpha is how far the brightest channel is above a threshold in the file's own scale of colours."""
    axis = field(5, field(1, "axes") + field(8, 1) + field(20, 7))
    graph = field(1, b"".join([field(1, "image"), field(2, "bright"), field(4, "ReduceMax"), axis]))
    graph += node("Sub", ["bright", "threshold"], "above") + node("Mul", ["above", "gain"], "steep")
    graph += node("Identity" if logits else "Sigmoid", ["steep"], "alpha") + field(2, "matting")
    graph += scalar("threshold", threshold) + scalar("gain", gain)
    graph += tensor_info(11, "image", (1, channels, SIDE, SIDE)) + tensor_info(12, "alpha", (1, 1, SIDE, SIDE))
    return network_file(path, graph)


def bright_head() -> tuple[torch.Tensor, torch.Tensor]:
    """A head of .7 before a wall of .45, at another size than the file's."""
    head = torch.zeros(96, 96, dtype=torch.bool)
    head[20:76, 24:72] = True
    return torch.where(head, 0.7, 0.45).expand(3, 96, 96).contiguous(), head


@pytest.mark.parametrize(
    ("threshold", "gain"), [(0.6, 40.0), (0.2, 40.0), (0.7, 20.0)], ids=["0 to 1", "-1 to 1", "ImageNet's"]
)
@pytest.mark.parametrize("logits", [False, True])
def test_its_scale_of_colours_is_found(tmp_path, threshold, gain, logits):
    image, head = bright_head()
    matting = MattingFile(bright_is_person(tmp_path / "matting.onnx", threshold, gain, logits=logits))
    for picture in (image, image.flip(-1)):  # The second by what the first has told.
        alpha = matting(picture, head)
        assert alpha.shape == (1, 96, 96) and alpha.min() >= 0 and alpha.max() <= 1
        inside = head if picture is image else head.flip(-1)
        assert alpha[0][inside].mean() > 0.9 and alpha[0][~inside].mean() < 0.1


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no network")
    for name, says in (("none.onnx", "does not exist"), ("text.onnx", "is not an ONNX file that runs here")):
        with pytest.raises(UserError, match=f"{name} {says}.*expected a matting network"):
            MattingFile(tmp_path / name)
    with pytest.raises(UserError, match=r"takes image \[1, 4, 64, 64\]: expected a matting network"):
        MattingFile(bright_is_person(tmp_path / "four.onnx", 0.5, 1.0, channels=4))


def test_one_foreground_at_a_time(tmp_path, capsys):
    command = [
        "track",
        str(tmp_path / "me.png"),
        "--out",
        str(tmp_path / "me"),
        "--mask",
        "m.png",
        "--matting",
        "m.onnx",
    ]
    assert main(command) == 2 and "leave one out" in capsys.readouterr().err
