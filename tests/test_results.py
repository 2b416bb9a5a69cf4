"""What results stand on: the ablation's variants differ in their part alone; `paper` is as PAPER.md says."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from geodiff4d.data.pairs import PairConfig, draw_pairs
from geodiff4d.data.store import StoreConfig
from geodiff4d.presets import DEBUG_CODEC, preset
from geodiff4d.video.batches import Batches
from geodiff4d.video.model import VideoModel
from geodiff4d.video.vae import PatchCodec


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
    same = draw_pairs((9, 4, 3), replace(training.pairs, moved=1.0), 0, 5)
    own = draw_pairs((9, 4, 3), replace(training.pairs, moved=1.0, cross_view=False), 0, 5)
    assert (same.target == own.target).all() and (own.driving_view == own.target[..., 1]).all()


def test_weights_start_equal_whatever_is_left_out(tool: ModuleType, tmp_path: Path):
    def first(variant: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, _ = tool.configured(tool.Args(out=tmp_path), variant)
        return VideoModel(model, PatchCodec(tool.preset("embedded").codec.codec)).state_dict()

    full, joint = first("full"), first("no-joint")
    assert full.keys() == joint.keys() and all(torch.equal(full[k], joint[k]) for k in full)


def test_estimated_batches_change_the_targets_normals_alone(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    config, rng = StoreConfig(subjects=2, instants=2, views=2, size=64), np.random.default_rng(0)
    store = SimpleNamespace(config=config, normal=rng.integers(0, 256, (2, 2, 2, 3, 64, 64), dtype=np.uint8))
    torch.manual_seed(0)
    codec = PatchCodec(DEBUG_CODEC)
    codec.basis.normal_()
    z = torch.zeros(1, 2, DEBUG_CODEC.channels, 2, 8, 8)
    given = SimpleNamespace(target=z, untouched=object())
    monkeypatch.setattr(Batches, "__getitem__", lambda self, index: given)
    monkeypatch.setattr(tool, "replace", lambda batch, **new: SimpleNamespace(**{**vars(batch), **new}))
    make = tool.EstimatedBatches.__new__(tool.EstimatedBatches)
    vars(make).update(store=store, codec=codec, pairs=PairConfig(references=1, targets=2), seed=0)
    batch: Any = make[3]
    assert batch.target.shape == z.shape and (batch.target[:, 0] == 0).all() and batch.target[:, 1].abs().sum() > 0
    assert batch.untouched is given.untouched
    assert torch.equal(batch.target, make[3].target), "a picture's error does not change"


def test_the_paper_preset_trains_as_the_paper_says_and_as_its_map_assumes():
    p = preset("paper")
    image, video = p.image, p.video
    assert (image.steps, video.steps, image.lr, video.lr) == (80_000, 20_000, 1e-5, 1e-5)
    assert (image.pairs.references, video.pairs.references, video.pairs.targets) == (32, 8, 16)
    for training in (image, video):
        assert (training.weight_decay, training.ema, training.clip, training.drop_expression) == (1e-2, 0.999, 1.0, 0.1)
        assert training.pairs.frontal_reference == 0.5 and training.pairs.cross_view
