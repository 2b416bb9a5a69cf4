"""Single photographs as footage: turned views of themselves are their portraits, and only what these tell of counts."""

from dataclasses import replace

import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import ClipWriter
from geodiff4d.data.footage.photographs import FRAMINGS, TURNS, PhotographFootage, told
from geodiff4d.data.footage.take import FrameKey
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import openhead, orbit, world_region
from geodiff4d.video.batches import Batches
from geodiff4d.video.vae import PatchCodec, PatchCodecConfig
from geodiff4d.world.subject import SyntheticSubject

SIZE = 64
READ = ReadConfig(SIZE, 32, warp=True, surroundings=True, augment=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One person's two photographs, another's one, and one that is held out."""
    folder = tmp_path_factory.mktemp("photographs")
    subject, head = SyntheticSubject(5, "test"), openhead()
    params = subject.params(torch.zeros(52))
    still = head.pose(params.without_expression()).vertices
    camera = canonical_crop(orbit(torch.tensor([10.0]), torch.tensor([0.0]), SIZE)[0], still[world_region()], SIZE)
    frame = subject.render(params, camera, 1)
    for k, name in enumerate(("001_neutral", "001_smiling", "002_neutral", "val/003_neutral")):
        with ClipWriter(folder / name, "openhead") as clip:
            clip.add_params(0, params)
            clip.add(0, 0, frame.rgb * (1 - 0.1 * k), camera, frame.mask)
    return folder


def test_a_photograph_is_seen_from_the_side_by_its_own_portrait(folder):
    samples = Samples([PhotographFootage(folder)], PairConfig(references=2, targets=3), READ)
    seen = [samples.draw(i) for i in range(100)]
    footage = samples.sources[0]
    assert {k.take for s in seen for k in s.target} == {0, 1, 2}, "turned views are no truth"
    assert {k.view for s in seen for k in s.target} == set(range(FRAMINGS))
    alone = [s.reference for s in seen if s.target[0].take == 2]
    assert {k.take for k in alone} == {5} and {k.instant for k in alone} == set(range(TURNS))
    two = {s.reference.take for s in seen if s.target[0].take == 0}
    assert two == {1, 3, 4}, "the twin itself, and both seen from the side; never the truth"
    assert {footage.takes[k.take].subject for k in seen[0].target} == {footage.takes[seen[0].reference.take].subject}


def test_what_is_held_out_is_apart(folder):
    held = PhotographFootage(folder, held_out=True)
    assert held.photographs == 1 and "003" in held.takes[0].subject
    with pytest.raises(UserError, match="nothing to train"):
        PhotographFootage(folder / "001_neutral" / "images")


def test_turned_portraits_hold_less_and_lead_back(folder):
    footage = PhotographFootage(folder)
    near, turned = FrameKey(5, 0, 0), FrameKey(5, 3, 0)
    own = FrameKey(2, 0, 0)
    frames = footage.frames([turned, near, own], SIZE)
    assert not frames.has_normal[0]
    assert frames.mask[0].sum() < frames.mask[1].sum() < 1.05 * frames.mask[2].sum()
    warp, visibility = footage.warped(near, [own], SIZE, surroundings=True)
    sure = (visibility[:, :1] > 0.9) & (frames.mask[2:] > 0.9)
    assert sure.float().mean() > 0.15
    assert ((warp - frames.rgb[2:]).abs() * sure).sum() / sure.sum() / 3 < 0.05, "carried away and back it is itself"


def test_framings_are_cuts_of_the_same_photograph(folder):
    footage = PhotographFootage(folder)
    keys = [FrameKey(0, 0, v) for v in range(FRAMINGS)]
    frames = footage.frames(keys, SIZE)
    assert not torch.equal(frames.rgb[0], frames.rgb[1])
    warp, visibility = footage.warped(FrameKey(1, 0, 0), keys, SIZE, surroundings=True)
    for k in range(FRAMINGS):  # The pose map and the warped portrait move with the cut.
        both = (visibility[k, :1] > 0.9) & (frames.mask[k] > 0.9)
        assert ((warp[k] - frames.rgb[k]).abs() * both).sum() / both.sum() / 3 < 0.12
    crops = footage.driving(keys, 32)
    assert torch.equal(crops[0], crops[1]), "who drives is cut as ever"


def test_what_no_portrait_tells_of_weighs_nothing():
    mask, visibility = torch.zeros(1, 1, 32, 32), torch.zeros(1, 2, 32, 32)
    mask[..., 4:28, 4:28] = 1  # a person
    visibility[:, 1, 12:20, 12:20] = 1  # the head's mesh
    visibility[:, 0, 12:20, 20:28] = 1  # hair that is shown beside it
    counts = told(mask, visibility, torch.tensor([0.75]))[0, 0]
    assert counts[0, 0] == 1, "background counts"
    assert counts[15, 15] == 1 and counts[15, 26] == 1
    assert counts[6, 6] == 0, "hair that nothing tells of"
    assert counts[11, 15] == 1, "near the mesh it counts"
    assert counts[23, 6] == 0 and counts[24, 6] == 1, "below the chin are clothes"


def test_batches_weigh_what_counts(folder):
    codec = PatchCodec(PatchCodecConfig(factor=8, channels=8, trunk=8, detail=8)).eval()
    samples = Samples([PhotographFootage(folder)], PairConfig(references=1, targets=2), READ)
    index = next(i for i in range(50) if samples.draw(i).reference.take >= 3 and samples.draw(i).reference.instant)
    example = samples[index]
    assert example.counts is not None
    # As if nothing told of the upper left quarter of this bald person.
    hidden = torch.ones_like(example.counts)
    hidden[..., : SIZE // 2, : SIZE // 2] = 0
    batch = Batches(samples, codec).encode([replace(example, counts=hidden)])
    assert (batch.weight[0, 1] == 0).all(), "nobody knows a photograph's normals"
    whole = Batches(samples, codec).encode([replace(example, counts=None)])
    side = batch.weight.shape[-1] // 2
    assert (batch.weight[..., :side, :side] == 0).all() and (whole.weight[0, 0, ..., :side, :side] > 0).all()
    torch.testing.assert_close(batch.weight[0, 0].mean(), torch.tensor(1.0))


def test_their_share_is_what_is_asked_for(folder):
    others = PhotographFootage(folder)
    others.takes = [replace(others.takes[0], partial=False, portraits=True)] * 500
    samples = Samples([others, PhotographFootage(folder)], PairConfig(photographs=0.3), READ)
    torch.testing.assert_close(torch.tensor(samples.shares), torch.tensor([0.7, 0.3]).double())
    told_otherwise = Samples([others, PhotographFootage(folder)], PairConfig(importance=(1.0, 1.0)), READ)
    assert told_otherwise.shares[1] < 0.1


def test_motion_is_the_trackers(folder):
    footage = PhotographFootage(folder)
    motion = footage.motion([FrameKey(5, 4, 0)])
    assert isinstance(motion, HeadParams) and motion.expr.shape == (1, 52)
