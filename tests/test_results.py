"""What results stand on: the ablation's variants differ in their part alone; `paper` is as PAPER.md says."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from geodiff4d.data.footage.rendered import RenderedFootage
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples
from geodiff4d.video.batches import WeightConfig
from geodiff4d.video.model import VideoModel
from geodiff4d.video.vae import PatchCodec
from tiny import EMBEDDED, TinyStore, tiny_codec


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parent.parent / "tools" / "model_ablation.py"
    spec = importlib.util.spec_from_file_location("model_ablation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_ablation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_variants_have_one_budget_and_differ_in_their_part(tool: ModuleType, tmp_path: Path):
    args = tool.Args(out=tmp_path)
    made = {v: tool.configured(args, v) for v in tool.VARIANTS}
    full, training = made["full"]
    for variant, (model, config) in made.items():
        words = variant.split()
        assert replace(config, pairs=replace(config.pairs, cross_view=True)) == training
        assert config.pairs.cross_view == ("no-cross-view" not in words)
        assert model.normals == ("no-joint" not in words)
        assert model.joint_attention == ("no-domain-attention" not in words)
        assert model.warp == ("no-warp" not in words)
        assert model.unet.widths == full.unet.widths
    footage = RenderedFootage(TinyStore(9, 4, 3))
    same, own = (
        Samples([footage], replace(training.pairs, moved=1.0, cross_view=cross), ReadConfig())
        for cross in (True, False)
    )
    for i in range(20):
        assert same.draw(i).target == own.draw(i).target and same.draw(i).reference == own.draw(i).reference
        assert own.draw(i).driving == own.draw(i).target


def test_weights_start_equal_whatever_is_left_out(tool: ModuleType, tmp_path: Path):
    def first(variant: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, _ = tool.configured(tool.Args(out=tmp_path), variant)
        return VideoModel(model, PatchCodec(tool.preset("embedded").codec.codec)).state_dict()

    full, joint = first("full"), first("no-joint")
    assert full.keys() == joint.keys() and all(torch.equal(full[k], joint[k]) for k in full)


def test_estimated_batches_change_the_targets_normals_alone(tool: ModuleType, tmp_path: Path, monkeypatch):
    training = SimpleNamespace(pairs=PairConfig(references=1, targets=2), weights=WeightConfig(), seed=0)
    monkeypatch.setattr(tool, "configured", lambda args, variant: (EMBEDDED, training))
    args, store, codec = tool.Args(tmp_path), TinyStore(), tiny_codec()
    exact, estimated = (tool.batches_of(args, v, store, codec)[3] for v in ("full", "no-synthetic"))
    for name, value in vars(exact).items():
        if name == "target":
            assert torch.equal(value[:, 0], estimated.target[:, 0])
            assert not torch.equal(value[:, 1], estimated.target[:, 1])
        elif name == "start":
            assert torch.equal(value[:, 0], estimated.start[:, 0])
        else:
            assert torch.equal(value, getattr(estimated, name)), name
