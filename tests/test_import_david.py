"""A DAViD-shaped ONNX file, written here byte by byte and run by onnxruntime: input, output and joining."""

import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import encode_normals
from geodiff4d.data import nersemble
from geodiff4d.data.clip import Clip
from geodiff4d.data.david import DavidNormals
from geodiff4d.data.importer import ImportConfig, import_sources
from geodiff4d.data.importing import Choice, Report
from geodiff4d.data.joins import Joins
from mini_datasets import COLOUR_MATRIX, make_nersemble, performance, png
from mini_onnx import field, network_file, node, scalar, tensor_info


def write_network(path, side=512):
    """normal = 2 × input − 1, as if the picture showed the normals; and a foreground, as the multi-task file has."""
    shape = (1, 3, side, side)
    graph = node("Mul", ["image", "two"], "doubled") + node("Sub", ["doubled", "one"], "pred_normal")
    graph += node("Identity", ["image"], "foreground") + field(2, "mini")
    graph += scalar("two", 2.0) + scalar("one", 1.0) + tensor_info(11, "image", shape)
    graph += tensor_info(12, "foreground", shape) + tensor_info(12, "pred_normal", shape)
    return network_file(path, graph)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("onnx") / "mini.onnx")


def test_blue_is_the_first_channel_and_sizes_come_back(network):
    """A picture whose blue, green and red are x, y and z of smooth normals gives those normals."""
    x, y = torch.meshgrid(torch.linspace(-0.6, 0.6, 90), torch.linspace(-0.5, 0.7, 120), indexing="xy")
    normal = torch.stack([x, y, (1 - x * x - y * y).sqrt()])
    out = DavidNormals(network)(encode_normals(normal, torch.ones(1, 120, 90)).flip(0))
    torch.testing.assert_close(out, normal, atol=0.01, rtol=0)


def test_it_joins_an_import(network, tmp_path):
    show = performance(timesteps=1)
    make_nersemble(tmp_path / "data", show, COLOUR_MATRIX)
    masks = tmp_path / f"masks/cam_{nersemble.SERIALS[8]}"
    masks.mkdir(parents=True)
    (masks / "00000.png").write_bytes(png(show.masks[0, 0]))
    report, choice = Report(), Choice(cameras=("8",))
    sources = nersemble.read(tmp_path / "data", choice, report)
    config = ImportConfig(joins=Joins(tmp_path / "masks", network))
    (folder,) = import_sources(sources, tmp_path / "out", "x", choice, report, config, None, DavidNormals(network))
    frame = Clip(folder).frame(0)
    assert frame.normal is not None
    assert bool((frame.normal.abs().sum(0)[frame.mask[0] < 0.5] == 0).all())
    assert bool((frame.normal.abs().sum(0)[frame.mask[0] > 0.5] > 0.9).float().mean() > 0.9)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(UserError, match=r"text\.onnx is not an ONNX file that runs here"):
        DavidNormals(tmp_path / "text.onnx")
    with pytest.raises(UserError, match=r"takes \[1, 3, 64, 64\]: expected DAViD's"):
        DavidNormals(write_network(tmp_path / "small.onnx", 64))
    with pytest.raises(UserError, match="has no CUDA"):
        DavidNormals(write_network(tmp_path / "ok.onnx"), "cuda")
    (tmp_path / "masks.txt").write_text("")
    with pytest.raises(UserError, match="expects a folder of files named by frame"):
        Joins(masks=tmp_path / "masks.txt")
    with pytest.raises(UserError, match="does not exist: --normals expects"):
        Joins(normals=tmp_path / "nowhere")
