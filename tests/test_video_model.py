"""The joint model at toy size: conditions, domains, folders and configurations."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import MARKER
from geodiff4d.video.model import (
    ConditionImages,
    VideoModel,
    config_from_dict,
    load_video_model,
)
from geodiff4d.video.recode import recode, starting_weights
from geodiff4d.video.sample import ClipInputs, sample
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig
from tiny import (
    CHANNELS,
    EMBEDDED,
    FAST,
    SIZE,
    UNET,
    VARIANTS,
    build,
    images,
    ingredients,
    tiny_codec,
)


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return tiny_codec()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_samples(codec, name):
    model = build(VARIANTS[name], codec)
    conditions, latents, kv, start = ingredients(model)
    z = sample(model, ClipInputs(conditions, latents, kv, start), FAST)
    d = len(model.config.domains)
    assert z.shape == (1, d, CHANNELS, 3, 8, 8) and z.isfinite().all()
    pictures = model.decode_latents(z)
    assert pictures.shape == (1, d, 3, 3, SIZE, SIZE) and pictures.min() >= 0 and pictures.max() <= 1


@torch.no_grad()
def test_normals_reach_colours_only_by_joint_attention(codec):
    for joint in (True, False):
        model = build(replace(EMBEDDED, joint_attention=joint), codec)
        conditions, latents, kv, _ = ingredients(model)
        g = torch.Generator().manual_seed(3)
        z, t = torch.randn(conditions.base.shape, generator=g), torch.tensor([600])
        other = z.clone()
        other[:, 1] += 1
        a, b = (model.predict_clean(x, t, conditions, latents, kv) for x in (z, other))
        moved = a - b
        assert moved[:, 1].abs().max() > 1e-2
        assert (moved[:, 0].abs().max() > 1e-4) == joint


@torch.no_grad()
def test_the_portrait_matters(codec):
    model = build(EMBEDDED, codec)
    conditions, latents, _, start = ingredients(model)
    a, b = torch.rand(2, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    pose = torch.zeros(1, CHANNELS, 8, 8)
    outs = [
        sample(model, ClipInputs(conditions, latents, model.reference_kv(model.codec.encode(x), pose), start), FAST)
        for x in (a, b)
    ]
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_dropped_warps_leave_the_pose_alone(codec):
    model = build(EMBEDDED, codec)
    one, other = images(seed=0), images(seed=1)
    two = ConditionImages(*(torch.cat([getattr(x, k) for x in (one, other)]) for k in ("pose", "warp", "visibility")))
    whole = model.conditions(two)
    some = model.join_conditions(model.pose_planes(two.pose), two.warp, two.visibility, torch.tensor([True, False]))
    assert torch.equal(some.planes[0], whole.planes[0]) and torch.equal(some.base[0], whole.base[0])
    assert torch.equal(some.planes[1, :CHANNELS], whole.planes[1, :CHANNELS])
    assert some.planes[1, CHANNELS:].abs().max() == 0 and some.base[1, 0].abs().max() == 0
    assert torch.equal(some.base[1, 1], whole.base[1, 1]), "the pose map is the normals' base with or without a warp"


def test_missing_warps_and_wrong_widths_are_named(codec):
    model = build(EMBEDDED, codec)
    with pytest.raises(ValueError, match="warped portrait"):
        model.conditions(ConditionImages(images().pose))
    with pytest.raises(ValueError, match=r"unet\.in_channels must be 20"):
        VideoModel(replace(EMBEDDED, unet=replace(UNET, in_channels=7)), codec)
    with pytest.raises(ValueError, match="residual"):
        replace(EMBEDDED, warp=False)


@torch.no_grad()
def test_a_model_survives_its_folder(codec, tmp_path):
    model = build(EMBEDDED, codec)
    model.save(tmp_path / "model", extra={"preset": "tiny"})
    again = load_video_model(tmp_path / "model")
    assert again.config == model.config and not again.training
    for k, v in model.state_dict().items():
        assert_close(again.state_dict()[k], v.half().float(), atol=0, rtol=0)
    z, other = (sample(m, ClipInputs(*ingredients(m)), FAST) for m in (model, again))
    assert_close(other, z, atol=0.05, rtol=0.05)
    assert json.loads((tmp_path / "model/unet/config.json").read_text())["preset"] == "tiny"


@torch.no_grad()
def test_a_model_moves_to_a_larger_code(codec, tmp_path):
    """Same pictures in, same pictures out: the first 6 of 9 components, mixed and scaled otherwise."""
    larger = PatchCodec(replace(codec.config, channels=9))
    g = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(9, 9, generator=g))[0]
    rest = torch.randn(48, 3, generator=g)
    basis = torch.linalg.qr(torch.cat([codec.basis, rest - codec.basis @ (codec.basis.mT @ rest)], 1))[0]
    larger.basis.copy_(basis @ mix)
    larger.scale.copy_(torch.rand(9, generator=g) + 0.5)
    larger.mean.copy_(codec.mean)
    model = build(EMBEDDED, codec)
    grown = replace(
        EMBEDDED, unet=replace(UNET, in_channels=3 * 9 + 2, out_channels=9),
        reference=replace(EMBEDDED.reference, in_channels=2 * 9),
    )  # fmt: skip
    moved = VideoModel(grown, larger)
    model.save(tmp_path / "model")
    assert set(moved.load_state_dict(recode(model.state_dict(), codec, larger), strict=False).missing_keys) == {
        k for k in moved.state_dict() if k.startswith("codec.")
    }

    picture = torch.rand(3, 3, SIZE, SIZE, generator=g)
    seen = torch.rand(1, 1, 2, 1, SIZE // 4, SIZE // 4, generator=g)
    out = []
    for m in (model, moved.eval()):
        latents = m.codec.encode(picture)
        planes = latents.flatten(0, 1)[None, None, :, None]
        bank = m.reference_kv(latents[:1], latents[1:2])
        y, _ = m.unet(torch.cat([planes, seen], 2), torch.ones(1), reference=bank, domain_ids=(0,))
        out.append(m.codec.decode_linear(y[:, 0, :, 0]))
    assert_close(out[1], out[0], atol=1e-4, rtol=1e-4)
    assert_close(
        starting_weights(tmp_path / "model", larger)[1]["unet.conv_in.weight"],
        moved.unet.conv_in.weight,
        atol=2e-3,
        rtol=1e-2,
    )
    with pytest.raises(UserError, match="factor 8"):
        starting_weights(tmp_path / "model", PatchCodec(PatchCodecConfig(factor=8, channels=6, trunk=8, detail=8)))


def test_configurations_round_trip_through_json():
    for config in VARIANTS.values():
        assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_foreign_configurations_are_refused():
    good = json.loads(json.dumps(asdict(EMBEDDED)))
    for change in (
        {"colour": 1}, {"unet": {**good["unet"], "depth": 3}}, {"unet": None}, {"warp": False},
        {"unet": {**good["unet"], "widths": [8]}}, {"expression": []},
    ):  # fmt: skip
        with pytest.raises(UserError, match="does not fit this version"):
            config_from_dict({**good, **change})
    with pytest.raises(UserError, match="unet"):
        config_from_dict({})


def test_a_model_is_replaced_whole_or_not_at_all(codec, tmp_path, monkeypatch):
    folder, model = tmp_path / "model", build(EMBEDDED, codec)
    model.save(folder)
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError("no space left on device")

    other = {k: v + 1 for k, v in model.state_dict().items()}
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(PatchCodec, "save", full)
        model.save(folder, other)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    # As versions before wrote it: each network its own folder, and nothing that holds them together.
    (folder / MARKER).unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="did not write"):
        model.save(folder, other)
    (folder / "notes.txt").unlink()
    model.save(folder, other)
    assert_close(load_video_model(folder).unet.conv_in.weight, other["unet.conv_in.weight"], atol=2e-3, rtol=1e-3)


def test_damaged_folders_are_refused(codec, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="not a video model"):
        load_video_model(folder)
    model = build(EMBEDDED, codec)

    def fresh() -> None:
        model.save(folder)

    fresh()
    weights = folder / "reference/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_video_model(folder)
    fresh()
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        load_video_model(folder)
    fresh()
    weights.write_bytes((folder / "expression/model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit its config"):
        load_video_model(folder)
    fresh()
    PatchCodec(PatchCodecConfig(factor=4, channels=5, trunk=8, detail=8)).save(folder / "vae")
    with pytest.raises(UserError, match="parts of different models"):
        load_video_model(folder)
    fresh()
    config = json.loads((folder / "unet/config.json").read_text())
    config["video_model"]["unet"]["widths"] = [[16], 16]
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"damaged ones|does not fit this version"):
        load_video_model(folder)
    fresh()
    (folder / "unet/config.json").write_text("{}")
    with pytest.raises(UserError, match="does not fit this version"):
        load_video_model(folder)
