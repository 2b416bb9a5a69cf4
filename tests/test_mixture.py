"""Mixtures: every sample is a function of its index alone, pairs keep their promises, sources their shares."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.data import store as stores
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.clip_footage import ClipFootage, open_footage
from geodiff4d.data.footage import Footage, FrameKey, Take, kind_of
from geodiff4d.data.mixture import Mixture, MixtureConfig, collate
from geodiff4d.data.store import StoreConfig, build_store
from geodiff4d.heads.rig import HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.meshes import pose_map, rasterize, render_normals
from geodiff4d.render.viewpoints import openhead, orbit, world_region

SIZE = 40
STAGE2 = MixtureConfig(targets="clip", frames=16, size=SIZE, crop=24)


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
    mixture = Mixture([rig(), stills()], MixtureConfig(frames=3), seed=7)
    alone = [mixture.sample(i) for i in range(5 * 8)]
    again = Mixture([rig(), stills()], MixtureConfig(frames=3), seed=7)
    for step in (4, 2, 0, 3, 1):
        batch = range(step * 8, (step + 1) * 8)
        assert [again.sample(i) for i in batch] == alone[batch.start : batch.stop]
    assert Mixture([rig(), stills()], MixtureConfig(frames=3), seed=8).sample(0) != alone[0]


@pytest.mark.parametrize("targets", ["images", "clip"])
def test_pairs_are_cross_view(targets):
    footage = Paper("rig", rig().takes, behind=[3])
    mixture = Mixture([footage], MixtureConfig(targets, frames=4))
    fronts = 0
    for i in range(300):
        s = mixture.sample(i)
        person = {footage.takes[k.take].subject for k in (s.reference, *s.target, *s.driving)}
        assert len(person) == 1
        for t, d in zip(s.target, s.driving, strict=True):
            assert (t.take, t.instant) == (d.take, d.instant) and t.view != d.view and d.view != 3
        assert (s.reference.take, s.reference.instant) not in {(t.take, t.instant) for t in s.target}
        assert s.reference.view != 3
        fronts += s.reference.view == 0
    # Half are the most frontal, and a quarter of the rest by chance.
    assert 0.5 < fronts / 300 < 0.75
    targets_seen = {k.view for i in range(300) for k in mixture.sample(i).target}
    assert targets_seen == set(range(5)), "a view from behind is a fair target"


def test_ablated_cross_view_drives_by_the_target():
    mixture = Mixture([rig()], MixtureConfig(frames=2, cross_view=False))
    assert all((s := mixture.sample(i)).driving == s.target for i in range(50))


def test_holes_are_never_drawn():
    rng = np.random.default_rng(0)
    holes = Take("a", np.arange(40), rng.random((40, 4)) < 0.4, True)
    holes.present[0, 0] = True
    for targets in ("images", "clip"):
        mixture = Mixture([Paper("holes", [holes])], MixtureConfig(targets, frames=6))
        for i in range(200):
            s = mixture.sample(i)
            assert all(holes.present[k.instant, k.view] for k in (s.reference, *s.target, *s.driving))
            if targets == "clip":
                times = [k.instant for k, v in zip(s.target, s.valid, strict=True) if v]
                assert np.all(np.diff(times) == 1), "a clip does not jump over a gap"


def test_clips_are_consecutive_and_padded():
    long = Mixture([rig(instants=30)], STAGE2)
    starts = set()
    for i in range(200):
        s = long.sample(i)
        assert all(s.valid) and len(s.target) == 16
        assert len({(k.take, k.view) for k in s.target}) == 1 and len({k.view for k in s.driving}) == 1
        assert np.all(np.diff([k.instant for k in s.target]) == 1)
        starts.add(s.target[0].instant)
    assert starts == set(range(15)), "every start that leaves 16 frames is drawn"
    short = Mixture([rig(instants=5)], STAGE2).sample(0)
    assert short.valid == (True,) * 5 + (False,) * 11
    assert [k.instant for k in short.target] == [0, 1, 2, 3, 4] + [4] * 11
    one = Mixture([stills()], STAGE2).sample(3)
    assert one.valid == (True,) + (False,) * 15 and len(set(one.target)) == 1


@pytest.mark.parametrize(("fps", "step", "stride"), [(73.0, 1, 3), (24.3, 3, 1), (24.0, 1, 1), (12.0, 1, 1)])
def test_fast_footage_is_thinned(fps, step, stride):
    s = Mixture([rig(instants=60, fps=fps, step=step)], STAGE2).sample(1)
    assert all(s.valid) and set(np.diff([k.instant for k in s.target])) == {stride}


def test_single_images_drive_themselves():
    s = Mixture([stills()], MixtureConfig(frames=2)).sample(0)
    assert s.target[0] == s.driving[0] == s.reference


def test_single_view_video_takes_its_reference_from_another_time():
    mixture = Mixture([Paper("video", [take("a", 40, 1)])], STAGE2)
    for i in range(100):
        s = mixture.sample(i)
        assert s.driving == s.target and s.reference not in s.target


def test_a_single_instant_takes_its_reference_from_another_view():
    mixture = Mixture([Paper("instant", [take("a", 1, 3, temporal=False)])], MixtureConfig())
    assert all((s := mixture.sample(i)).reference.view != s.target[0].view for i in range(50))


def test_multi_view_is_drawn_ten_times_as_often_per_sample():
    many, one = rig(subjects=2, views=5), stills(100)  # 2 × 2 takes × 5 cameras against 100 pictures.
    mixture = Mixture([many, one], MixtureConfig(least_share=0.0))
    np.testing.assert_allclose(mixture.shares, [20 * 10 / 300, 100 / 300])
    n = 4000
    counts = np.bincount([mixture.sample(i).source for i in range(n)], minlength=2)
    expected = n * mixture.shares
    assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - mixture.shares)))
    drawn = [(k.take, k.view) for i in range(n) if (s := mixture.sample(i)).source == 0 for k in s.target]
    each = np.bincount([t * 5 + v for t, v in drawn], minlength=20)
    assert np.all(np.abs(each - each.mean()) < 4.5 * np.sqrt(each.mean())), "every camera of every take alike"


def test_small_sources_stay_represented():
    mixture = Mixture([rig(50), stills(1), stills(2)], MixtureConfig(least_share=0.1))
    np.testing.assert_allclose(mixture.shares, [0.8, 0.1, 0.1])
    np.testing.assert_allclose(Mixture([stills(5)] * 20, MixtureConfig(least_share=0.5)).shares, 1 / 20)
    by_hand = Mixture([stills(10), stills(30)], MixtureConfig(importance=(3.0, 1.0)))
    np.testing.assert_allclose(by_hand.shares, 0.5)
    with pytest.raises(UserError, match="one each"):
        Mixture([stills()], MixtureConfig(importance=(1.0, 2.0)))
    with pytest.raises(UserError, match="positive"):
        MixtureConfig(importance=(0.0,))


# Footage on disk.


def write(folder, instants=4, azimuths=(0.0, 40.0, -30.0), cropped=True, extra=None, params=True):
    """A clip of the mean head turning its face; its pictures are its own normals, tinted by time and camera."""
    head = openhead()
    p = head.neutral(instants)
    p = replace(p, rotation=torch.linspace(-0.2, 0.2, instants)[:, None] * torch.tensor([0.0, 1.0, 0.0]))
    mesh = head.pose(p)
    cameras = orbit(torch.tensor(azimuths), torch.zeros(len(azimuths)), SIZE)
    if not cropped:
        shift = torch.tensor([[0.0, 0.0, 0.8 * SIZE], [0.0, 0.0, 0.2 * SIZE], [0.0, 0.0, 0.0]])
        cameras = replace(cameras, K=cameras.K + shift, width=2 * SIZE, height=SIZE + 20)
    else:
        cameras = canonical_crop(cameras, mesh.vertices[:, world_region()].reshape(-1, 3))
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


CONFIG = MixtureConfig(frames=2, size=SIZE, crop=24, augment=None)


def test_folders_of_clips_become_takes(data):
    rig, stills, video = (open_footage(data / k) for k in ("rig", "stills", "video"))
    assert [kind_of(f) for f in (rig, stills, video)] == ["multi-view", "images", "video"]
    assert [t.subject for t in rig.takes] == ["a", "a"] and rig.takes[0].present.shape == (4, 3)
    assert len(stills.takes) == 3 and len({t.subject for t in stills.takes}) == 3
    # The camera behind the head is no reference and drives nothing; the nearest to the front comes first.
    assert rig.reference_views(1) == (0,) and rig.driving_views(1) == (0,)
    assert rig.reference_views(0)[0] == 0 and set(rig.reference_views(0)) == {0, 1, 2}


def test_examples_are_what_the_indices_say(data):
    mixture = Mixture([data / "rig"], replace(CONFIG, warp=True))
    head, footage = openhead(), mixture.sources[0]
    for index in (0, 5):
        s, x = mixture.sample(index), mixture[index]
        for n, key in enumerate(s.target):
            clip = Clip(data / "rig" / ("a1", "a2")[key.take])
            views = len(footage.takes[key.take].present[0])
            frame = clip.frame(key.instant * views + key.view)
            assert (frame.timestep, frame.camera_index) == (key.instant, key.view)
            on_grey = frame.image * frame.mask + 0.5 * (1 - frame.mask)
            assert (x.rgb[n] - on_grey).abs().max() < 1e-5, "cut already: left as it is"
            expected, mask = pose_map(head, frame.params, frame.camera)
            assert (x.pose[n] - expected).abs().max() < 1e-4
            # The picture shows the mean head without expression: its normals are its pose map.
            assert ((x.normal[n] - expected).abs() * mask).mean() < 0.02
            assert x.focus[n].max() == (key.view in footage.driving_views(key.take)), "behind there is no mouth"
            assert x.has_normal[n] and 0.3 < x.visibility[n, 1].mean() < 0.9
        assert torch.equal(x.reference_normal, footage.frames(*place(s.reference), SIZE).normal[0])
    again = Mixture([footage], replace(CONFIG, warp=True))[3]
    assert all(torch.equal(getattr(mixture[3], k), v) for k, v in vars(again).items())


def place(key: FrameKey):
    return key.take, key.view, [key.instant]


def test_warp_puts_the_reference_where_the_target_is(data):
    """From a view to itself, what is seen is the picture itself."""
    footage = open_footage(data / "rig")
    warp, visibility = footage.warped(FrameKey(0, 1, 0), 0, 0, [1], SIZE)
    rgb = footage.frames(0, 0, [1], SIZE).rgb
    seen = visibility[:, :1] > 0.99
    assert seen.float().mean() > 0.1
    assert ((warp - rgb).abs() * seen).max() < 0.05


def test_uncut_clips_are_cropped_as_cut_ones(tmp_path):
    write(tmp_path / "wide", 2, (0.0, 30.0), cropped=False)
    footage = open_footage(tmp_path / "wide")
    x = footage.frames(0, 1, [0, 1], SIZE)
    head = openhead()
    clip = Clip(tmp_path / "wide")
    box = footage._box(0, 1)
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
    crops = footage.driving(0, 0, [0, 1, 2, 3], 24)
    assert crops.shape == (4, 3, 24, 24)
    background = (crops - 0.5).abs().amax(1) < 0.02
    assert background.float().mean() < 0.35


def test_only_driving_crops_are_augmented(data):
    plain, changed = (Mixture([data / "rig"], replace(CONFIG, augment=a))[1] for a in (None, MixtureConfig().augment))
    for k, v in vars(plain).items():
        same = v is getattr(changed, k) if v is None else torch.equal(v, getattr(changed, k))
        assert same == (k != "driving"), k


def test_stage_two_pads_by_repeating(data):
    mixture = Mixture([data / "video", data / "stills"], replace(STAGE2, augment=None, least_share=0.5))
    sources = set()
    for i in range(4):
        s, x = mixture.sample(i), mixture[i]
        n = sum(s.valid)
        sources.add((s.source, n))
        assert x.rgb.shape == (16, 3, SIZE, SIZE) and x.valid.tolist() == list(s.valid)
        for k in ("rgb", "normal", "pose", "driving"):
            v = getattr(x, k)
            assert torch.equal(v[n:], v[n - 1 : n].expand_as(v[n:])) and v.isfinite().all(), k
    assert sources == {(0, 5), (1, 1)}


def test_stores_and_clips_mix(data, tmp_path, monkeypatch):
    config = StoreConfig("val", subjects=1, instants=2, views=2, size=32, supersample=1, crop=16, texels=32, grid=4)
    build_store(tmp_path / "store", config, workers=1)
    mixture = Mixture([tmp_path / "store", data / "rig"], replace(CONFIG, size=32, warp=True), seed=1)
    assert kind_of(mixture.sources[0]) == "multi-view" and mixture.sources[0].takes[0].temporal is False
    examples = [mixture[i] for i in range(6)]
    assert {mixture.sample(i).source for i in range(6)} == {0, 1}
    batch = collate(examples)
    assert batch.warp.shape == (6, 2, 3, 32, 32) and batch.visibility.shape == (6, 2, 2, 32, 32)
    assert batch.expr.isfinite().all() and batch.has_normal.all()
    again = pickle.loads(pickle.dumps(mixture))  # noqa: S301 - our own bytes: what a worker gets.
    assert len(pickle.dumps(mixture)) < 20_000, "workers are sent indices, not pictures"
    assert torch.equal(again[2].rgb, examples[2].rgb)
    # The store's own arrays, unchanged.
    i = next(i for i in range(20) if mixture.sample(i).source == 0)
    key = mixture.sample(i).target[0]
    raw = stores.Store(tmp_path / "store").rgb[key.take, key.instant, key.view]
    np.testing.assert_allclose(mixture[i].rgb[0].numpy() * 255, raw, atol=1e-3)


def test_truth_is_disturbed_as_a_tracker_would(tmp_path):
    write(tmp_path / "synthetic", 4, extra={"params": "truth", "subject_seed": 5})
    footage = ClipFootage(tmp_path / "synthetic")
    found, truth = footage._params(0, [2, 1]), Clip(tmp_path / "synthetic").params(2)
    turned = axis_angle_to_matrix(found.rotation[0]) @ axis_angle_to_matrix(truth.rotation).mT
    assert 0.001 < (turned - torch.eye(3)).abs().max() < 0.1
    assert torch.equal(footage._params(0, [0, 2]).rotation[1], found.rotation[0]), "one error for each frame"


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
        mixture = Mixture([tmp_path / "a"], CONFIG)
        for i in range(8):
            mixture[i]


def test_a_person_on_two_heads_is_two_subjects(tmp_path):
    """Pairs share a person; were they drawn across heads, one head would pose the other's coefficients."""
    for name, head in (("a", "openhead"), ("b", "flame2020"), ("c", "flame2023")):
        write(tmp_path / name, 2, (0.0,), extra={"participant": "074"})
        path = tmp_path / name / "transforms.json"
        path.write_text(path.read_text().replace('"openhead"', f'"{head}"'))
    assert len({t.subject for t in open_footage(tmp_path).takes}) == 3


def test_params_of_one_clip_stack(data):
    """Heads without eyelids and with none of the options still stack."""
    assert isinstance(open_footage(data / "video")._params(0, [0, 1]), HeadParams)
