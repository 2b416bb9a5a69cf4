"""Several portraits of one person: merged into one look, fitted to one identity, and asked for on the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from geodiff4d.cli._generation import GenerationArgs, prepare, set_up
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import rigid
from geodiff4d.core.images import write_image
from geodiff4d.core.progress import silent
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.evaluate.metrics import psnr
from geodiff4d.heads import load_head
from geodiff4d.pipeline import tracked_portrait
from geodiff4d.render.merge import MergedPortrait, View, merge_portraits, relit
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.render.relief import lift_portrait
from geodiff4d.render.viewpoints import orbit
from geodiff4d.tracking.choose import chosen_frames
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.projection import FRONT
from geodiff4d.tracking.together import Photo, fit_together, identity_doubt, photo, strangers
from geodiff4d.tracking.track import TrackingConfig
from geodiff4d.video.conditions import lifted
from geodiff4d.video.inputs import Portrait, load_portrait

SIZE = 96


@pytest.fixture(scope="module")
def head():
    return load_head()


def around(*azimuth: float) -> Camera:
    return orbit(torch.tensor(azimuth), torch.zeros(len(azimuth)), SIZE)


def painted(head, camera: Camera, gain: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A head whose sides have nothing in common, on grey: (image, mask)."""
    X = head.template * 60
    waves = torch.stack([torch.sin(X[:, 0]), torch.sin(0.7 * X[:, 1] + 2 * X[:, 0].sign()), torch.cos(X[:, 2])], 1)
    fragments = rasterize(head.template[None], head.faces, camera.expand(1))
    mask = fragments.mask.float()
    image = interpolate(fragments, head.faces, (0.45 + 0.25 * waves) * gain)[0]
    return 0.5 + mask * (image - 0.5), mask


def view(head, azimuth: float, gain: float = 1.0) -> View:
    camera = around(azimuth)[0]
    return View(*painted(head, camera, gain), head.pose(head.neutral()), camera)


def shown(head, portrait, azimuth: float) -> tuple[torch.Tensor, torch.Tensor]:
    cameras, mesh = around(azimuth), head.pose(head.neutral(1))
    return portrait.shown(rasterize(mesh.vertices, mesh.faces, cameras), mesh.T_world_joint, cameras)


def test_every_further_portrait_shows_more_of_the_head(head):
    views, found, seen = [view(head, a) for a in (0.0, 60.0, -60.0)], [], []
    for n in (1, 2, 3):
        merged = merge_portraits(head, views[:n], 128)
        errors = []
        for azimuth in (45.0, -45.0):
            truth, mask = painted(head, around(azimuth)[0])
            rgb, masks = shown(head, merged, azimuth)
            errors.append(psnr(rgb[0], truth, mask).item())
            seen.append(float((masks[0, :1] * mask).sum() / mask.sum()))
        found.append(errors)
    assert found[1][0] > found[0][0] + 2 and abs(found[1][1] - found[0][1]) < 0.5
    assert found[2][1] > found[1][1] + 2 and min(found[2]) > 25
    assert seen[0] < seen[2] and seen[4] > 0.9


def test_the_first_portrait_leads_where_it_sees(head):
    """Another's colours must not wash over the place that the reference itself shows best."""
    reference, other = view(head, 0.0), view(head, 12.0)
    other = replace(other, image=other.image.flip(0))
    alone = merge_portraits(head, [reference], 128)
    both = merge_portraits(head, [reference, other], 128)
    (a, _), (b, masks) = (shown(head, m, 0.0) for m in (alone, both))
    middle = torch.zeros_like(masks[0, :1])
    middle[:, SIZE // 3 : -SIZE // 3, SIZE // 3 : -SIZE // 3] = 1
    assert psnr(b[0], a[0], middle).item() > 30


def test_one_view_is_drawn_as_a_single_portrait(head):
    one = view(head, 20.0)
    single = lift_portrait(head, one.image, one.mask, one.mesh, one.camera, 128)
    merged = merge_portraits(head, [one], 128)
    (mine, mine_seen), (rgb, seen) = (shown(head, p, -30.0) for p in (merged, single))
    # An outline of hair is a line here, and half seen there.
    clear = (seen[:, 1:] > 0) | (seen[:, :1] < 0.01) | (seen[:, :1] > 0.99)
    assert clear.float().mean() > 0.95
    assert_close(mine * clear, rgb * clear, atol=2e-3, rtol=0)
    assert_close(mine_seen * clear, seen * clear, atol=0.01, rtol=0)


def test_a_portrait_without_others_is_lifted_as_ever(head):
    """To the last bit: whoever gives one image gets what one image gave."""
    one = view(head, 10.0)
    portrait = Portrait(one.image, one.mask, one.camera, head.neutral())
    assert portrait.others == ()
    now = lifted(head, portrait, True)
    then = lift_portrait(head, portrait.on_grey, one.mask, one.mesh, one.camera, 256)
    assert type(now) is type(then)
    assert all(torch.equal(a, b) for a, b in zip(shown(head, now, 40.0), shown(head, then, 40.0), strict=True))
    several = replace(portrait, others=(portrait,))
    assert isinstance(lifted(head, several, True), MergedPortrait)
    assert [p.image.shape[-1] for p in (several.resized(48), *several.resized(48).others)] == [48, 48]


def test_light_is_brought_to_the_references(head):
    merged = merge_portraits(head, [view(head, 0.0)], 128)
    true, dark = view(head, 25.0), view(head, 25.0, gain=0.7)
    ours = relit(dark, merged)
    inner = -torch.nn.functional.max_pool2d(-true.mask, 5, 1, 2)
    assert psnr(ours, true.image, inner).item() > psnr(dark.image, true.image, inner).item() + 5
    assert_close(ours * (1 - dark.mask), dark.image * (1 - dark.mask))


# One identity


def detector(head, params, K: torch.Tensor, size: tuple[int, int]):
    """Project a head's landmarks before a camera of K: a detector that errs by nothing."""
    camera = Camera(rigid(FRONT, torch.tensor([0.02, -0.03, 1.1])), K, *size)
    [points] = camera.expand(1).project(head.mediapipe.on(head.pose(params).vertices, head.faces))[0]
    points = points[::4]
    found = Detection(points, head.mediapipe_index[::4], 1.0, torch.cat([points.amin(0), points.amax(0)]))

    class One:
        def detect(self, images, video=False):
            return [found for _ in images]

    return One()


def person(head, seed: int, yaw: float, smile: float):
    g = torch.Generator().manual_seed(seed)
    p = head.neutral(1)
    expr = p.expr.clone()
    for side in ("mouthSmileLeft", "mouthSmileRight"):
        expr[:, head.expression_names.index(side)] = smile
    shape = torch.randn(p.shape.shape[-1], generator=g)
    return replace(p, shape=shape[None], expr=expr, rotation=torch.tensor([[0.0, yaw, 0.0]]))


def pictured(head, seed: int, yaw: float, smile: float, size: tuple[int, int] = (320, 240), zoom: float = 2.0) -> Photo:
    K = pinhole(zoom * size[0], *size)
    config = TrackingConfig(size=64, focal_px=float(K[0, 0]))
    image = torch.full((3, size[1], size[0]), 0.5)
    return photo(
        Path(f"{seed}_{yaw}.jpg"), image, head, detector(head, person(head, seed, yaw, smile), K, size), config
    )


@pytest.fixture(scope="module")
def photos(head) -> list[Photo]:
    """One person before two cameras."""
    return [pictured(head, 1, 0.0, 0.0), pictured(head, 1, 0.5, 0.6, (500, 500), 1.3)]


def test_one_identity_is_fitted_to_photographs_of_other_cameras(head, photos):
    together = fit_together(head, photos, 64)
    truth = person(head, 1, 0, 0).shape[0]
    fits = [p.located.fit for p in together]
    assert all(torch.equal(f.params.shape, fits[0].params.shape) for f in fits)
    errors = [float((f.params.shape[0] - truth).norm()) for f in (photos[0].located.fit, fits[0])]
    assert errors[1] < errors[0], "two photographs tell more of a shape than one"
    for own, f in zip(photos, fits, strict=True):
        # The landmarks come out where they were seen, through each photograph's own camera.
        world = head.mediapipe.on(head.pose(f.params).vertices, head.faces)
        xy, _ = f.camera.expand(1).project(world)
        assert (xy[0, ::4] - own.detection.points).norm(dim=-1).mean() < 0.02 * own.located.fit.face_px
        assert (f.camera.width, f.camera.height) == (own.image.shape[2], own.image.shape[1])
        assert not f.params.translation.any()
    assert abs(float(fits[1].params.rotation[0, 1]) - 0.5) < 0.06
    assert strangers(head, photos) == []


def test_who_laughs_says_less_of_an_identity(head, photos):
    doubt = identity_doubt([photos[0], pictured(head, 1, 0.2, 1.0)])
    assert doubt[0] == 1 and doubt[1] > 2
    kept = photos[0].located.fit.params.shape[0]
    camera = photos[1].located.fit.camera
    again = fit(head, [photos[1].detection], camera.width, camera.height, float(camera.K[0, 0]), shape=kept)
    assert_close(again.params.shape[0], kept)
    assert not torch.equal(again.params.shape, photos[1].located.fit.params.shape)


def test_somebody_else_is_found_out(head, photos):
    assert strangers(head, [photos[0], pictured(head, 2, 0.1, 0.0)]) == [1]


def test_frames_of_a_video_show_other_sides_and_a_sharp_frontal_one_leads(head):
    n = 40
    p = head.neutral(n)
    yaw = torch.linspace(-0.7, 0.7, n)
    params = replace(p, rotation=torch.stack([0 * yaw, yaw, 0 * yaw], 1))
    sharp = torch.ones(n)
    sharp[[19, 20]] = 0.3
    sharp[0] = -1.0
    chosen = chosen_frames(head, params, around(0.0)[0], sharp).tolist()
    assert abs(float(yaw[chosen[0]])) < 0.1 and not {0, 19, 20} & set(chosen)
    assert min(chosen) < 4 and max(chosen) > n - 3 and 4 <= len(chosen) <= 8
    still = chosen_frames(head, head.neutral(n), around(0.0)[0], sharp)
    assert len(still) == 1, "a head that never moves has one side"


# Commands


def test_images_of_one_person_are_tracked_together(pair, tmp_path, monkeypatch, capsys):
    def together(sources, out, head, config, progress):
        names = [p.name for p in sources]
        with ClipWriter(out, extra={"portraits": names[:-1], "notes": [f"{names[-1]} was left out"]}) as clip:
            for t in range(len(sources) - 1):
                clip.add_params(t, pair.portrait.params)
                clip.add(t, 0, pair.portrait.image, pair.portrait.camera, pair.portrait.mask)
        return Clip(out)

    monkeypatch.setattr("geodiff4d.pipeline.track_together", together)
    files = tuple(tmp_path / name for name in ("a.png", "b.png", "c.png"))
    for file in files:
        write_image(file, torch.rand(3, 16, 16))
    with ClipWriter(tmp_path / "driver") as clip:
        clip.add_params(0, pair.driving.params[0])
        clip.add(0, 0, pair.portrait.image, pair.portrait.camera, pair.portrait.mask)
    args = GenerationArgs(portrait=files, driving=tmp_path / "driver", generator="warp", preset="debug")
    request = prepare(args, set_up(args), silent, None)
    assert len(request.portrait.others) == 1
    said = capsys.readouterr().err
    assert "c.png was left out" in said and "2 images of one person are merged" in said
    frames = args.driving
    with pytest.raises(UserError, match="is a folder: expected it alone"):
        tracked_portrait((files[0], frames), load_head(), 48, tmp_path / "out")
    again = load_portrait(together(files, tmp_path / "kept", None, None, None), 48)
    assert len(again.others) == 1 and again.others[0].others == ()
