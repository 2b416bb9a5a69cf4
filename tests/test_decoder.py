"""The guided decoder: what it is before training, at which sizes it works, and what it is trained on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import ClipWriter
from geodiff4d.heads import load_head
from geodiff4d.pipeline import load_model
from geodiff4d.presets import PRESETS
from geodiff4d.video.conditions import lifted
from geodiff4d.video.decoder import DecoderConfig, GuidedDecoder, load_decoder
from geodiff4d.video.decoder_rows import DecoderRows, build_decoder_rows, twin_of
from geodiff4d.video.frames import WarpedFrames
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest
from geodiff4d.video.inputs import with_identity_of
from geodiff4d.video.outline import settle
from geodiff4d.video.train_decoder import at, decoder_loss, mirrored, train_decoder
from geodiff4d.video.warp_back import around, seen_turned

STAGE = PRESETS["debug"].decoder
TINY = DecoderConfig((8, 8), (1, 1))


def frames(n: int = 2, low: int = 16, size: int = 32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def random(c: int, side: int):
        return torch.rand(n, c, side, side, generator=g)

    return random(3, low), random(3, low), WarpedFrames(*(random(c, size) for c in (3, 1, 1, 1)), random(3, low))


def test_before_training_what_is_seen_is_the_portraits():
    rgb, normals, warped = frames()
    seen = torch.zeros(2, 1, 32, 32)
    seen[..., :16] = 1
    decoder = GuidedDecoder(TINY)
    colours, normal, logit = decoder(decoder.planes(rgb, normals, replace(warped, seen=seen)))
    low = torch.nn.functional.interpolate(rgb, (32, 32), mode="bilinear")
    assert (colours - warped.rgb)[..., :16].abs().max() < 0.06 and (colours - low)[..., 16:].abs().max() < 0.06
    assert colours.shape == normal.shape == (2, 3, 32, 32) and logit.shape == (2, 1, 32, 32)


def test_an_opened_mouth_shows_what_was_painted_inside_it():
    rgb, _, warped = frames()
    facing = torch.tensor([0.5, 0.5, 1.0])[:, None, None].expand(2, 3, 16, 16)
    hidden = replace(warped, seen=torch.zeros(2, 1, 32, 32), inside=torch.ones(2, 1, 32, 32))
    decoder, opened = GuidedDecoder(TINY), torch.zeros(2, 1, 32, 32)
    closed = decoder.decode(rgb, facing, replace(hidden, opened=opened)).rgb
    opened[..., 12:16, 8:24] = 1
    made = decoder.decode(rgb, facing, replace(hidden, opened=opened)).rgb
    inside, outside = torch.zeros(2, 2, 3, 32, 32, dtype=torch.bool)
    inside[..., 13:15, 9:23], outside[..., :11, :] = True, True
    torch.testing.assert_close(made[inside], warped.rgb[inside])
    torch.testing.assert_close(made[outside], closed[outside])
    torch.testing.assert_close(made[..., 11, 16], closed[..., 11, 16].lerp(warped.rgb[..., 11, 16], 1 / 3))
    assert (closed - warped.rgb)[inside].abs().mean() > 0.1


def disc(size: int, side: float):
    """A red disc whose outline is guessed: its mask falls over 24 pixels, its colours fade to the background's grey
    with it, and a dark ring lies where the mesh ends."""
    y, x = torch.meshgrid(*(2 * [torch.arange(size) + 0.5 - size / 2]), indexing="ij")
    radius = (x.square() + y.square()).sqrt()[None, None] * (256 / size)
    logit = (80 - radius) / 4
    red = torch.tensor([0.8, 0.2, 0.2])[None, :, None, None]
    rgb = (0.5 + (red - 0.5) * torch.sigmoid(logit)) * (1 - 0.5 * ((radius - 60).abs() < 1.5).float())
    inside, seen = (radius < 60).float(), (x < -side * size).float()[None, None]
    return rgb, logit, WarpedFrames(rgb, seen, inside, torch.zeros_like(seen), rgb)


@pytest.mark.parametrize("size", [256, 512])
def test_what_is_hidden_has_one_outline_in_its_own_colour(size):
    rgb, logit, warped = disc(size, side=1)
    settled, mask = settle(rgb, logit, warped)
    partly, before = (((m > 0.05) & (m < 0.95)).float().mean() for m in (mask, torch.sigmoid(logit)))
    assert partly < 0.35 * before
    # The disc is as large as where its mask was .35, red up to its outline, and without a ring.
    assert abs(float((mask > 0.5).float().mean() / (torch.sigmoid(logit) > 0.35).float().mean()) - 1) < 0.03
    red = torch.tensor([0.8, 0.2, 0.2])[None, :, None, None]
    away = (settled - red).abs().amax(1, keepdim=True)
    assert away[mask > 0.5].max() < 0.06 < (rgb - red).abs().amax(1, keepdim=True)[mask > 0.5].max()


def test_what_the_portrait_shows_keeps_its_soft_edge():
    rgb, logit, warped = disc(256, side=-1)
    settled, mask = settle(rgb, logit, warped)
    torch.testing.assert_close(settled, rgb)
    torch.testing.assert_close(mask, ((torch.sigmoid(logit) - 0.2) / 0.3).clamp(0, 1))


def test_weights_are_kept_and_serve_every_size(tmp_path):
    torch.manual_seed(0)
    decoder = GuidedDecoder(TINY)
    torch.nn.init.normal_(decoder.leave.weight, std=0.1)
    decoder.save(tmp_path / "decoder")
    again = load_decoder(tmp_path / "decoder")
    for size in (16, 32, 64):
        rgb, normals, warped = frames(size=size)
        a, b = (d.decode(rgb, normals, warped) for d in (decoder, again))
        torch.testing.assert_close(a.rgb, b.rgb, atol=2e-3, rtol=0)
        # A frame does not depend on those beside it.
        alone = again.decode(rgb[1:], normals[1:], warped[1])
        assert torch.equal(alone.rgb, b.rgb[1:])
    (tmp_path / "decoder" / "config.json").write_text('{"widths": [8], "blocks": [1]}')
    with pytest.raises(UserError, match="no guided decoder of this version"):
        load_decoder(tmp_path / "decoder")


@pytest.fixture(scope="module")
def photograph(pair):
    """The pair's portrait, as large as a decoder's row."""
    size = STAGE.rows.size
    return pair.portrait.resized(size)


@pytest.fixture(scope="module")
def clips(photograph, tmp_path_factory):
    """One person's two photographs, tracked, and another's."""
    folder = tmp_path_factory.mktemp("photographs")
    for k, name in enumerate(("anna_neutral", "anna_smiling", "berta")):
        with ClipWriter(folder / name) as clip:
            clip.add_params(0, photograph.params)
            clip.add(0, 0, photograph.image * (1 - 0.1 * k), photograph.camera, photograph.mask)
    return tuple(str(folder / name) for name in ("anna_neutral", "anna_smiling", "berta"))


def test_a_portrait_seen_from_the_side_has_only_what_it_shows(photograph):
    head = load_head()
    texture = lifted(head, photograph, True)
    own = seen_turned(head, photograph, texture, 0.0, 0.0)
    side = seen_turned(head, photograph, texture, 50.0, 0.0)
    inside = (own.mask > 0) & (photograph.mask > 0.9)
    assert inside.float().mean() > 0.15
    assert ((own.image - photograph.on_grey).abs() * inside).sum() / inside.sum() / 3 < 0.03
    assert side.mask.sum() < own.mask.sum(), "half of the head is hidden"
    back = around(head, replace(photograph, camera=side.camera), -50.0)
    torch.testing.assert_close(back.T_cam_world, photograph.camera.T_cam_world, atol=1e-5, rtol=0)


def test_twins_are_photographs_of_one_person():
    clips = ("a/1_x", "a/1_y", "a/2_x", "b/1_z", "a/3")
    assert [twin_of(clips, s) for s in range(5)] == ["a/1_y", "a/1_x", None, None, None]


@pytest.fixture(scope="module")
def rows(model, clips, tmp_path_factory):
    """Rows of rendered people and of photographs."""
    folder = tmp_path_factory.mktemp("rows")
    config = replace(STAGE.rows, model=str(model), people=1)
    world = build_decoder_rows(folder / "world", config, 1)
    real = build_decoder_rows(folder / "real", replace(config, source="photographs", clips=clips, rows=3), 1)
    return world, real


def test_rows_hold_what_the_decoder_sees_and_the_truth(rows, clips):
    world, real = rows
    assert len(world.index) == 2 and len(real.index) == 9
    batch = real.read(np.array([0]))
    size, low = STAGE.rows.size, STAGE.rows.low
    assert batch.truth.shape == (1, 3, size, size) and batch.rgb.shape == (1, 3, low, low)
    seen = (batch.warped.seen > 0.99) & (batch.mask > 0.9)
    assert seen.float().mean() > 0.1
    # Of its own view, the warped portrait is the photograph.
    assert ((batch.warped.rgb - batch.truth).abs() * seen).sum() / seen.sum() / 3 < 0.04
    assert not batch.exact.any() and world.read(np.array([0, 1])).exact.all()
    # The last row of one of two photographs is driven by it, from the other.
    twin = real.read(np.array([2]))
    gap = ((twin.warped.rgb - twin.truth) * seen).sum() / seen.sum() / 3
    assert gap < -0.02, "the other photograph is darker"
    with pytest.raises(UserError, match="another configuration"):
        build_decoder_rows(world.folder, replace(STAGE.rows, model="other", people=1), 1)


def test_what_was_not_carried_does_not_count(rows):
    """Of a photograph's hair, that is: made-up people are known all over, and clothes are asked for."""
    own, turned = (rows[1].read(np.array([k])) for k in (0, 1))
    assert rows[0].read(np.array([0, 1])).counts.min() == 1
    assert turned.counts.mean() < own.counts.mean(), "half of the head is hidden"
    size = own.truth.shape[-1]
    assert turned.counts[..., -size // 16 :, :].min() == 1 and (own.counts + own.mask).min() > 0.9


def test_rows_are_cut_shrunk_and_mirrored_alike(rows):
    batch = rows[0].read(np.array([0, 1]))
    half = at(batch, 64, None)
    assert half.truth.shape[-1] == half.warped.rgb.shape[-1] == 64
    cut = at(batch, 64, (32, 16))
    assert torch.equal(cut.truth, batch.truth[..., 16:80, 32:96])
    assert cut.counts.shape == cut.mask.shape == (2, 1, 64, 64)
    assert cut.warped.pose.shape[-1] == cut.rgb.shape[-1] == 64
    twice = mirrored(mirrored(batch))
    torch.testing.assert_close(twice.truth_normals, batch.truth_normals)
    assert torch.equal(mirrored(batch).warped.seen, batch.warped.seen.flip(-1))


def test_training_learns_and_resumes_to_the_same_weights(rows, tmp_path):
    config = replace(STAGE.training, steps=16, adversarial_from=0.75, cuts=0.0)
    records: list[dict] = []
    whole = train_decoder(tmp_path / "a", rows, config, rows[:1], records.append)
    assert "adversarial" in records[-1] and "adversarial" not in records[11]
    batch = at(rows[0].read(np.arange(2)), 64, None)
    with torch.no_grad():
        untrained, trained = (sum(decoder_loss(d, batch, config)[0].values()) for d in (GuidedDecoder(TINY), whole))
    assert trained < untrained
    assert {"world_psnr", "world_sharp", "world_mask"} <= set(records[-1])

    def interrupt(record: dict) -> None:
        if record["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_decoder(tmp_path / "b", rows, config, rows[:1], interrupt)
    resumed = train_decoder(tmp_path / "b", rows, config, rows[:1])
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_model_with_a_decoder_makes_frames_of_the_cameras_size(model, pair, tmp_path):
    network = load_model(model)
    network.decoder = GuidedDecoder(TINY)
    network.save(tmp_path / "model")
    again, head = load_model(tmp_path / "model"), load_head()
    assert isinstance(again.decoder, GuidedDecoder)
    sample = replace(PRESETS["debug"].sample, finish=())
    for size in (64, 128):
        portrait = pair.portrait.resized(size)
        driving = replace(pair.driving, params=with_identity_of(portrait, pair.driving.params))
        made = DiffusionGenerator(again, sample).generate(
            GenerationRequest(portrait, driving, head), portrait.camera.expand(3)
        )
        assert made.rgb.shape == made.normal.shape == (3, 3, size, size)
        length = made.normal.norm(dim=1)
        assert ((length > 0.9) | (length < 0.1)).float().mean() > 0.95


def test_a_folder_without_rows_is_said(tmp_path):
    with pytest.raises(UserError, match="has no rows for a decoder"):
        DecoderRows(tmp_path)
