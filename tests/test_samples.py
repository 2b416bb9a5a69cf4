"""Training samples: each is a function of its index alone, pairs keep their promises, sources their shares."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.data.augment import AugmentConfig
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.footage.clips import ClipFootage, clips_below
from geodiff4d.data.footage.render import build_store
from geodiff4d.data.footage.rendered import RenderedFootage, Store, StoreConfig
from geodiff4d.data.footage.take import STRANGER, Footage, FrameKey, Take, kind_of
from geodiff4d.data.sampling import PairConfig, ReadConfig, Samples, open_footage
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.meshes import pose_map, rasterize, render_normals
from geodiff4d.render.viewpoints import openhead, orbit, world_region

SIZE = 40
STAGE2 = PairConfig(targets=16, clips=True)
READ = ReadConfig(SIZE, 24, augment=None)


class Paper(Footage):
    """Footage that is never decoded."""

    def __init__(self, name, takes, behind=()):
        self.name, self.takes, self.behind = name, takes, set(behind)

    def reference_views(self, take):
        return [v for v in range(self.takes[take].present.shape[1]) if v not in self.behind]

    driving_views = reference_views


def take(subject, instants, views, temporal=True, fps=24.0, step=1):
    return Take(subject, np.arange(instants) * step, np.ones((instants, views), bool), temporal, fps)


def rig(subjects=4, instants=30, views=5, **k):
    return Paper("rig", [take(f"{s}", instants, views, **k) for s in range(subjects) for _ in range(2)])


def stills(n=50):
    return Paper("stills", [take(f"{i}", 1, 1, temporal=False) for i in range(n)])


def test_resuming_draws_the_same_samples():
    samples = Samples([rig(), stills()], PairConfig(targets=3), READ, seed=7)
    alone = [samples.draw(i) for i in range(5 * 8)]
    again = Samples([rig(), stills()], PairConfig(targets=3), READ, seed=7)
    for step in (4, 2, 0, 3, 1):
        batch = range(step * 8, (step + 1) * 8)
        assert [again.draw(i) for i in batch] == alone[batch.start : batch.stop]
    assert Samples([rig(), stills()], PairConfig(targets=3), READ, seed=8).draw(0) != alone[0]


@pytest.mark.parametrize("targets", ["images", "clip"])
def test_pairs_are_cross_view(targets):
    footage = Paper("rig", rig().takes, behind=[3])
    samples = Samples([footage], PairConfig(targets=4, clips=targets == "clip"), READ)
    fronts = 0
    for i in range(300):
        s = samples.draw(i)
        person = {footage.takes[k.take].subject for k in (s.reference, *s.target, *s.driving)}
        assert len(person) == 1
        for t, d in zip(s.target, s.driving, strict=True):
            assert (t.take, t.instant) == (d.take, d.instant) and t.view != d.view and d.view != 3
        assert (s.reference.take, s.reference.instant) not in {(t.take, t.instant) for t in s.target}
        assert s.reference.view != 3
        fronts += s.reference.view == 0
    # Half are the most frontal, and a quarter of the rest by chance.
    assert 0.5 < fronts / 300 < 0.75
    targets_seen = {k.view for i in range(300) for k in samples.draw(i).target}
    assert targets_seen == set(range(5)), "a view from behind is a fair target"


def test_ablated_cross_view_drives_by_the_target():
    samples = Samples([rig()], PairConfig(targets=2, cross_view=False), READ)
    assert all((s := samples.draw(i)).driving == s.target for i in range(50))


def test_holes_are_never_drawn():
    rng = np.random.default_rng(0)
    holes = Take("a", np.arange(40), rng.random((40, 4)) < 0.4, True)
    holes.present[0, 0] = True
    for targets in ("images", "clip"):
        samples = Samples([Paper("holes", [holes])], PairConfig(targets=6, clips=targets == "clip"), READ)
        for i in range(200):
            s = samples.draw(i)
            assert all(holes.present[k.instant, k.view] for k in (s.reference, *s.target, *s.driving))
            if targets == "clip":
                times = [k.instant for k in s.target[: len(s.target) - s.padding]]
                assert np.all(np.diff(times) == 1), "a clip does not jump over a gap"


def test_clips_are_consecutive_and_padded():
    long = Samples([rig(instants=30)], STAGE2, READ)
    starts = set()
    for i in range(200):
        s = long.draw(i)
        assert not s.padding and len(s.target) == 16
        assert len({(k.take, k.view) for k in s.target}) == 1 and len({k.view for k in s.driving}) == 1
        assert np.all(np.diff([k.instant for k in s.target]) == 1)
        starts.add(s.target[0].instant)
    assert starts == set(range(15)), "every start that leaves 16 frames is drawn"
    short = Samples([rig(instants=5)], STAGE2, READ).draw(0)
    assert short.padding == 11
    assert [k.instant for k in short.target] == [0, 1, 2, 3, 4] + [4] * 11
    one = Samples([stills()], STAGE2, READ).draw(3)
    assert one.padding == 15 and len(set(one.target)) == 1


@pytest.mark.parametrize(("fps", "step", "stride"), [(73.0, 1, 3), (24.3, 3, 1), (24.0, 1, 1), (12.0, 1, 1)])
def test_fast_footage_is_thinned(fps, step, stride):
    s = Samples([rig(instants=60, fps=fps, step=step)], STAGE2, READ).draw(1)
    assert not s.padding and set(np.diff([k.instant for k in s.target])) == {stride}


def test_single_images_drive_themselves():
    s = Samples([stills()], PairConfig(targets=2), READ).draw(0)
    assert s.target[0] == s.driving[0] == s.reference


def test_single_view_video_takes_its_reference_from_another_time():
    samples = Samples([Paper("video", [take("a", 40, 1)])], STAGE2, READ)
    for i in range(100):
        s = samples.draw(i)
        assert s.driving == s.target and s.reference not in s.target


def test_a_single_instant_takes_its_reference_from_another_view():
    samples = Samples([Paper("instant", [take("a", 1, 3, temporal=False)])], PairConfig(targets=1), READ)
    assert all((s := samples.draw(i)).reference.view != s.target[0].view for i in range(50))


def test_multi_view_is_drawn_ten_times_as_often_per_sample():
    many, one = rig(subjects=2, views=5), stills(100)  # 2 × 2 takes × 5 cameras against 100 pictures.
    samples = Samples([many, one], PairConfig(least_share=0.0), READ)
    np.testing.assert_allclose(samples.shares, [20 * 10 / 300, 100 / 300])
    n = 4000
    found = [samples.draw(i) for i in range(n)]
    counts = np.bincount([s.source for s in found], minlength=2)
    expected = n * samples.shares
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - samples.shares)))
    drawn = [(k.take, k.view) for s in found if s.source == 0 for k in s.target]
    each = np.bincount([t * 5 + v for t, v in drawn], minlength=20)
    assert np.all(np.abs(each - each.mean()) < 4.5 * np.sqrt(each.mean())), "every camera of every take alike"


def test_small_sources_stay_represented():
    samples = Samples([rig(50), stills(1), stills(2)], PairConfig(least_share=0.1), READ)
    np.testing.assert_allclose(samples.shares, [0.8, 0.1, 0.1])
    np.testing.assert_allclose(Samples([stills(5)] * 20, PairConfig(least_share=0.5), READ).shares, 1 / 20)
    by_hand = Samples([stills(10), stills(30)], PairConfig(importance=(3.0, 1.0)), READ)
    np.testing.assert_allclose(by_hand.shares, 0.5)
    with pytest.raises(UserError, match="one each"):
        Samples([stills()], PairConfig(importance=(1.0, 2.0)), READ)
    with pytest.raises(UserError, match="positive"):
        PairConfig(importance=(0.0,))


# Footage on disk.


def write(folder, instants=4, azimuths=(0.0, 40.0, -30.0), cropped=True, extra=None, params=True, motion=None):
    """A clip of the mean head turning its face; its pictures are its own normals, tinted by time and camera."""
    head = openhead()
    p = head.neutral(instants) if motion is None else motion
    p = replace(p, rotation=torch.linspace(-0.2, 0.2, instants)[:, None] * torch.tensor([0.0, 1.0, 0.0]))
    mesh = head.pose(p)
    cameras = orbit(torch.tensor(azimuths), torch.zeros(len(azimuths)), SIZE)
    if not cropped:
        shift = torch.tensor([[0.0, 0.0, 0.8 * SIZE], [0.0, 0.0, 0.2 * SIZE], [0.0, 0.0, 0.0]])
        cameras = replace(cameras, K=cameras.K + shift, width=2 * SIZE, height=SIZE + 20)
    else:
        cameras = canonical_crop(cameras, mesh.vertices[:, world_region()])
    with ClipWriter(folder, "openhead", extra=extra or {}) as w:
        for t in range(instants):
            if params:
                w.add_params(t, p[t])
            for c in range(len(azimuths)):
                normal, mask = render_normals(mesh_at(mesh, t), cameras[c : c + 1])
                tint = torch.tensor([0.2 + 0.1 * t, 0.2 + 0.2 * c, 0.5])[:, None, None]
                w.add(t, c, (normal[0] * 0.25 + 0.25) * tint + 0.4, cameras[c], mask[0], normal[0])
    return cameras


def mesh_at(mesh, t):
    return type(mesh)(mesh.vertices[t : t + 1], mesh.faces, mesh.T_world_joint[t : t + 1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "rig/a1", 4, extra={"subject": "a"})
    write(folder / "rig/a2", 3, (0.0, 160.0), extra={"subject": "a"})
    write(folder / "stills", 3, (0.0,), extra={"stills": True})
    write(folder / "video", 5, (10.0,))
    return folder


PAIRS = PairConfig(targets=2)


def test_folders_of_clips_become_takes(data):
    rig, stills, video = (open_footage(data / k) for k in ("rig", "stills", "video"))
    assert [kind_of(f) for f in (rig, stills, video)] == ["multi-view", "images", "video"]
    assert [t.subject for t in rig.takes] == ["a", "a"] and rig.takes[0].present.shape == (4, 3)
    assert len(stills.takes) == 3 and len({t.subject for t in stills.takes}) == 3
    # The camera behind the head is no reference and drives nothing; the nearest to the front comes first.
    assert rig.reference_views(1) == (0,) and rig.driving_views(1) == (0,)
    assert rig.reference_views(0)[0] == 0 and set(rig.reference_views(0)) == {0, 1, 2}


def test_examples_are_what_the_indices_say(data):
    samples = Samples([open_footage(data / "rig")], PAIRS, replace(READ, warp=True))
    head, footage = openhead(), samples.sources[0]
    for index in (0, 5):
        s, x = samples.draw(index), samples[index]
        for n, key in enumerate((s.reference, *s.target)):
            clip = Clip(data / "rig" / ("a1", "a2")[key.take])
            views = len(footage.takes[key.take].present[0])
            frame = clip.frame(key.instant * views + key.view)
            assert (frame.timestep, frame.camera_index) == (key.instant, key.view)
            on_grey = frame.image * frame.mask + 0.5 * (1 - frame.mask)
            f = x.frames
            assert (f.rgb[n] - on_grey).abs().max() < 1e-5, "cut already: left as it is"
            expected, mask = pose_map(head, frame.params, frame.camera)
            assert (f.pose[n] - expected).abs().max() < 1e-4
            # The picture shows the mean head without expression: its normals are its pose map.
            assert ((f.normal[n] - expected).abs() * mask).mean() < 0.02
            assert f.focus[n].max() == (key.view in footage.driving_views(key.take)), "behind there is no mouth"
            assert f.has_normal[n]
        assert all(0.3 < share < 0.9 for share in x.visibility[:, 1].mean((1, 2)).tolist())
    again = Samples([footage], PAIRS, replace(READ, warp=True))[3]
    assert all(torch.equal(getattr(samples[3], k), getattr(again, k)) for k in ("driving", "warp", "visibility"))
    assert all(torch.equal(getattr(samples[3].frames, k), v) for k, v in vars(again.frames).items())


def keys(take, view, instants):
    return [FrameKey(take, i, view) for i in instants]


def test_warp_puts_the_reference_where_the_target_is(data):
    """From a view to itself, what is seen is the picture itself."""
    footage = open_footage(data / "rig")
    warp, visibility = footage.warped(FrameKey(0, 1, 0), keys(0, 0, [1]), SIZE)
    rgb = footage.frames(keys(0, 0, [1]), SIZE).rgb
    seen = visibility[:, :1] > 0.99
    assert seen.float().mean() > 0.1
    assert ((warp - rgb).abs() * seen).max() < 0.05


def test_uncut_clips_are_cropped_as_cut_ones(tmp_path):
    write(tmp_path / "wide", 2, (0.0, 30.0), cropped=False)
    footage = open_footage(tmp_path / "wide")
    x = footage.frames(keys(0, 1, [0, 1]), SIZE)
    head = openhead()
    clip = Clip(tmp_path / "wide")
    box = footage.crop_box(0, 1)
    assert box is not None
    camera: Camera = clip.records[1].camera.cropped(*box, SIZE)
    seen = rasterize(head.pose(clip.params(0)).vertices, head.faces, camera).mask
    assert (x.mask[0, 0] - seen.float()).abs().mean() < 0.03, "the picture and its camera are cut alike"
    rows = head.pose(clip.params(0)).vertices[world_region()]
    xy, _ = camera.project(rows)
    extent = (xy.amax(0) - xy.amin(0)).max() / SIZE
    assert 0.55 < extent < 0.7, "the head fills 1 / 1.6 of the crop"


def test_driving_crops_hold_the_face_alone(data):
    footage = open_footage(data / "rig")
    crops = footage.driving(keys(0, 0, [0, 1, 2, 3]), 24)
    assert crops.shape == (4, 3, 24, 24)
    background = (crops - 0.5).abs().amax(1) < 0.02
    assert background.float().mean() < 0.35


def test_only_driving_crops_are_augmented(data):
    footage = open_footage(data / "rig")
    plain, changed = (Samples([footage], PAIRS, replace(READ, augment=a))[1] for a in (None, AugmentConfig()))
    assert not torch.equal(plain.driving, changed.driving)
    assert all(torch.equal(v, getattr(changed.frames, k)) for k, v in vars(plain.frames).items())


def test_clips_that_are_too_short_are_read_once(data):
    sources = [open_footage(data / k) for k in ("video", "stills")]
    samples, seen = Samples(sources, replace(STAGE2, least_share=0.5), READ), set()
    for i in range(4):
        s, x = samples.draw(i), samples[i]
        n = 16 - s.padding
        seen.add((s.source, n))
        assert len(x.driving) == n == len(x.frames.rgb) - 1 and x.padding == s.padding
    assert seen == {(0, 5), (1, 1)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    config = StoreConfig("val", subjects=1, instants=2, views=2, size=32, supersample=1, crop=16, texels=32, grid=4)
    build_store(folder / "store", config, workers=1)
    return folder / "store"


def test_stores_and_clips_mix(data, store):
    sources = [open_footage(store), open_footage(data / "rig")]
    samples = Samples(sources, PAIRS, ReadConfig(32, 24, warp=True, augment=None), seed=1)
    assert kind_of(samples.sources[0]) == "multi-view" and samples.sources[0].takes[0].temporal is False
    examples = [samples[i] for i in range(6)]
    assert {samples.draw(i).source for i in range(6)} == {0, 1}
    assert all(x.warp.shape == (2, 3, 32, 32) and x.visibility.shape == (2, 2, 32, 32) for x in examples)
    assert all(x.frames.rgb.shape == (3, 3, 32, 32) and x.frames.has_normal.all() for x in examples)
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301 - our own bytes: what a worker gets.
    assert len(pickle.dumps(samples)) < 20_000, "workers are sent indices, not images"
    assert torch.equal(again[2].frames.rgb, examples[2].frames.rgb)
    # The store's own arrays, unchanged.
    i = next(i for i in range(20) if samples.draw(i).source == 0)
    key = samples.draw(i).target[0]
    raw = Store(store).rgb[key.take, key.instant, key.view]
    np.testing.assert_allclose(samples[i].frames.rgb[1].numpy() * 255, raw, atol=1e-3)


def test_motion_is_known_of_any_footage_on_openhead(data, store, tmp_path):
    """Crops come with the motion that they show, in the proportion of the sources."""
    write(tmp_path / "foreign", 2, (0.0,))
    path = tmp_path / "foreign/transforms.json"
    path.write_text(path.read_text().replace('"openhead"', '"flame2020"'))
    sources = [open_footage(store), open_footage(data / "video"), open_footage(tmp_path / "foreign")]
    samples = Samples(sources, replace(PAIRS, least_share=0.3), ReadConfig(32, 24), seed=1)
    assert [any(t.motion for t in s.takes) for s in sources] == [True, True, False] and samples.knows_motion
    crops, motion = samples.drivers(0, 12)
    again, same = samples.drivers(0, 12)
    assert torch.equal(crops, again) and torch.equal(motion.expr, same.expr)
    assert crops.shape == (12, 3, 24, 24) and len(motion.jaw_pose) == 12
    assert len(samples.motion().expr) == 2 + 5, "every instant of the store and of the video"
    assert not Samples([sources[2]], PAIRS, READ).knows_motion
    rows = sources[0].motion([FrameKey(0, 1, 0)])
    np.testing.assert_allclose(rows.expr[0], Store(store).expr[0, 1], atol=1e-6)


def test_warped_portraits_of_clips_move_where_they_are_told_to(tmp_path):
    smiling = replace(openhead().neutral(3), expr=torch.full((3, 52), 0.5))
    write(tmp_path, 3, (0.0,), motion=smiling)
    footage, targets = open_footage(tmp_path), keys(0, 0, [1, 2])
    still, moved = (
        footage.warped(FrameKey(0, 0, 0), targets, SIZE, moved=np.array([False, m]))[0] for m in (False, True)
    )
    assert torch.equal(still[0], moved[0]) and (still[1] - moved[1]).abs().max() > 0.02


def test_normals_are_estimated_where_they_are_exact_and_synthetic(data, store, tmp_path):
    write(tmp_path / "world", 2, (0.0,), extra={"params": "truth"})
    for folder, synthetic in ((store, True), (tmp_path / "world", True), (data / "video", False)):
        exact, estimated = (open_footage(folder, estimated=e).frames(keys(0, 0, [0, 1]), 32) for e in (False, True))
        assert torch.equal(exact.normal, estimated.normal) != synthetic, folder
        assert torch.equal(exact.rgb, estimated.rgb) and torch.equal(exact.mask, estimated.mask)


def test_what_is_held_out_is_never_trained_on(tmp_path, monkeypatch):
    """Neither a clip in a folder `val`, however deep, nor one that is linked from there."""
    for name in ("a", "b/c", "val/d", "b/val/e"):
        write(tmp_path / "all" / name, 1, (0.0,))
    write(tmp_path / "elsewhere/f", 1, (0.0,))
    write(tmp_path / "elsewhere/g", 1, (0.0,))
    (tmp_path / "all/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all/b/up").symlink_to(tmp_path / "all")  # A cycle.
    (tmp_path / "all/dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "all/val/g").symlink_to(tmp_path / "elsewhere/g")
    trained, held_out = (
        [str(p.relative_to(tmp_path / "all")) for p in clips_below(tmp_path / "all", h)] for h in (False, True)
    )
    assert trained == ["a", "b/c", "linked/f"] and held_out == ["b/val/e", "val/d", "val/g"]
    opened: list[str] = []
    monkeypatch.setattr("geodiff4d.data.footage.clips.Clip", lambda path: opened.append(path.name) or Clip(path))
    samples = Samples([open_footage(tmp_path / "all")], PAIRS, READ)
    assert len(samples.sources[0].takes) == 3
    for i in range(30):
        samples[i]
    assert set(opened) == {"a", "c", "f"}


def test_truth_is_disturbed_as_a_tracker_would(tmp_path):
    write(tmp_path / "synthetic", 4, extra={"params": "truth", "subject_seed": 5})
    footage = ClipFootage(tmp_path / "synthetic")
    found, truth = footage.params(0, [2, 1]), Clip(tmp_path / "synthetic").params(2)
    turned = axis_angle_to_matrix(found.rotation[0]) @ axis_angle_to_matrix(truth.rotation).mT
    assert 0.001 < (turned - torch.eye(3)).abs().max() < 0.1
    assert torch.equal(footage.params(0, [0, 2]).rotation[1], found.rotation[0]), "one error for each frame"


@pytest.mark.parametrize("damage", ["nothing", "a file", "no params", "another head", "broken json", "broken image"])
def test_bad_footage_is_a_user_error(tmp_path, damage):
    if damage == "a file":
        (tmp_path / "a").write_text("")
    elif damage != "nothing":
        write(tmp_path / "a", 2, (0.0,), params=damage != "no params")
    if damage == "broken json":
        (tmp_path / "a/transforms.json").write_text('{"frames": [{"camera_index": 0}]}')
    if damage == "broken image":
        path = tmp_path / "a/images/00001_00.png"
        path.write_bytes(path.read_bytes()[:50])
    if damage == "another head":
        text = (tmp_path / "a/transforms.json").read_text().replace('"openhead"', '"flame2023"')
        (tmp_path / "a/transforms.json").write_text(text)
    with pytest.raises(UserError):
        samples = Samples([open_footage(tmp_path / "a")], PAIRS, READ)
        for i in range(8):
            samples[i]


def test_a_person_on_two_heads_is_two_subjects(tmp_path):
    """Pairs share a person; were they drawn across heads, one head would pose the other's coefficients."""
    for name, head in (("a", "openhead"), ("b", "flame2020"), ("c", "flame2023")):
        write(tmp_path / name, 2, (0.0,), extra={"participant": "074"})
        path = tmp_path / name / "transforms.json"
        path.write_text(path.read_text().replace('"openhead"', f'"{head}"'))
    assert len({t.subject for t in open_footage(tmp_path).takes}) == 3


def test_params_of_one_clip_stack(data):
    """Heads without eyelids and with none of the options still stack."""
    assert isinstance(open_footage(data / "video").params(0, [0, 1]), HeadParams)


def test_somebody_else_can_make_the_expression(tmp_path):
    config = StoreConfig(
        subjects=1, instants=3, views=2, size=48, supersample=1, crop=24, texels=32, grid=3, strangers=True
    )
    footage = RenderedFootage(build_store(tmp_path / "store", config, workers=1))
    samples = Samples([footage], PairConfig(targets=2, strangers=0.5), ReadConfig(48, 24, augment=None))
    drawn = [samples.draw(i) for i in range(200)]
    others = [s for s in drawn if any(k.view == STRANGER for k in s.driving)]
    assert 70 < len(others) < 130
    assert all(k.view == STRANGER for s in others for k in s.driving), "one person drives a sample"
    plain = Samples([footage], PairConfig(targets=2), samples.read)
    assert all(plain.draw(i).target == s.target for i, s in enumerate(drawn)), "targets are what they were"
    own, other = FrameKey(0, 1, 0), FrameKey(0, 1, STRANGER)
    crops = footage.driving([own, other], 24)
    # Another face, in the place of the first, with the same expression.
    assert 0.02 < (crops[0] - crops[1]).abs().mean() < 0.4
    a, b = (footage.motion([k]) for k in (own, other))
    assert torch.equal(a.expr, b.expr) and torch.equal(a.eyes_pose, b.eyes_pose)
    x = samples[next(i for i, s in enumerate(drawn) if s in others)]
    assert x.driving.shape == (2, 3, 24, 24)
    crops, motion = samples.drivers(0, 8)
    assert len(crops) == 8 == len(motion.expr), "the warm start reads them too"
