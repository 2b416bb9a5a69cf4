"""Telling people from backgrounds: cutting them out for training, the pictures drawn of them, the network."""

import shutil

import pytest
import torch

from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import Clip, ClipWriter
from geodiff4d.data.world_clips import subject_cameras, subject_motion, write_clip
from geodiff4d.heads import load_head
from geodiff4d.render import meshes
from geodiff4d.render.crops import head_region
from geodiff4d.tracking.cutouts import Cutouts, gather_cutouts, is_held_out, pieces, plain_background
from geodiff4d.tracking.person import PersonConfig, PersonNet, load_person_net, person_in
from geodiff4d.tracking.person_scenes import PersonScenes, recoloured, rooms
from geodiff4d.tracking.person_training import PersonTraining, person_loss, train_person

TINY = PersonConfig(64, (4, 4, 8, 8, 8, 8), 4)


def wall(size: int) -> torch.Tensor:
    """A wall that darkens to one side and downward."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return torch.stack([0.6 + 0.2 * x, 0.5 - 0.1 * y * y, 0.4 + 0.1 * x * y])


def person(size: int) -> torch.Tensor:
    """Alpha of an oval with a soft rim."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return ((0.5 - (x.square() + (y - 0.3).square() * 0.6).sqrt()) * 10).clamp(0, 1)[None]


def some_cutouts(n: int = 5, size: int = 64) -> Cutouts:
    g = torch.Generator().manual_seed(0)
    alpha = person(size)[None].expand(n, 1, size, size)
    colour = alpha * torch.rand(n, 3, 1, 1, generator=g)
    whole = [(x * 255).round().byte() for x in (colour, alpha, (alpha > 0.5).float().expand(n, 2, size, size))]
    return Cutouts(*whole, (torch.rand(3, 3, size, size, generator=g) * 255).byte())


def test_a_wall_is_known_behind_the_person_and_a_room_is_none():
    alpha, behind = person(96), wall(96)
    image = alpha * torch.tensor([0.1, 0.1, 0.1])[:, None, None] + (1 - alpha) * behind
    # A picture on the wall, and the bars of what lies beyond the photograph.
    image[:, 4:16, 4:16] = 0.9
    image[:, :, -6:] = 0.5
    torch.testing.assert_close(plain_background(image, alpha), behind, atol=0.01, rtol=0)
    room = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert plain_background(alpha * 0.1 + (1 - alpha) * room, alpha) is None
    assert plain_background(image, torch.ones(1, 96, 96)) is None, "nothing is background"


def test_pieces_of_a_background_show_nobody():
    alpha = person(96)
    marked = torch.cat([alpha, torch.zeros(2, 96, 96)])
    found = pieces(marked, alpha)
    assert len(found) == 2 and all(p.max() == 0 and min(p.shape[1:]) > 10 for p in found)
    # To the right there is only what lies beyond the photograph.
    marked[:, :, 60:] = 0.5
    assert len(pieces(marked, alpha)) == 1


def test_people_are_cut_out_of_clips_with_their_own_colour(tmp_path, subject):
    write_clip(tmp_path / "plain", subject, "speech", 1, 1, 64)
    frame = Clip(tmp_path / "plain").frame(0)
    room = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    for name, behind in (("room", room), ("walled", wall(64))):
        with ClipWriter(tmp_path / name, head="openhead") as clip:
            clip.add_params(0, frame.params)
            clip.add(0, 0, frame.image * frame.mask + behind * (1 - frame.mask), frame.camera, frame.mask)
    cut = gather_cutouts([tmp_path / "room", tmp_path / "walled"], 64)
    assert len(cut) == 1 and cut.alpha[0].float().sub(frame.mask * 255).abs().max() <= 1
    inside = frame.mask[0] > 0.99
    torch.testing.assert_close(cut.colour[0].float()[:, inside] / 255, frame.image[:, inside], atol=0.02, rtol=0)
    whole, head = cut.heads[0].float() / 255
    assert (whole >= head).all() and 0 < head.mean() < whole.mean()
    assert (frame.mask[0][whole > 0] > 0.5).float().mean() > 0.9
    with pytest.raises(UserError, match="before a plain background"):
        gather_cutouts([tmp_path / "room"], 64)


def test_a_person_is_held_out_whole(tmp_path):
    names = [f"{k:03d}" for k in range(300)]
    held = [is_held_out(tmp_path / f"{n}_neutral") for n in names]
    assert held == [is_held_out(tmp_path / f"{n}_smiling") for n in names] and 10 < sum(held) < 50


def test_pictures_are_people_before_other_backgrounds():
    scenes = PersonScenes(some_cutouts(), 64, spare=4)
    a, again, other = scenes.crops(3, 6), scenes.crops(3, 6), scenes.crops(4, 6)
    assert torch.equal(a.images, again.images) and not torch.equal(a.images, other.images)
    assert a.images.min() >= 0 and a.images.max() <= 1 and set(a.heads.unique().tolist()) <= {0.0, 1.0}
    # What lies beyond a picture repeats its edges, and is not asked for.
    many = scenes.crops(0, 40)
    assert set(many.shown.unique().tolist()) == {0.0, 1.0} and many.shown.mean() > 0.7
    edge = (many.shown[:, 0, 32, :-1] > 0) & (many.shown[:, 0, 32, 1:] == 0)
    row, column = edge.nonzero()[0].tolist()
    torch.testing.assert_close(
        many.images[row, :, 32, column + 1 :], many.images[row, :, 32, -1:].expand(3, 63 - column)
    )
    # Silhouettes are where the person is, a tracker's error aside.
    assert ((a.heads[:, :1] > 0) == (a.alpha > 0.5)).float().mean() > 0.9
    made = rooms(3, 64, torch.Generator().manual_seed(0))
    assert made.std((2, 3)).min() > 0.01
    colour = torch.tensor([0.9, 0.1, 0.2])[None, :, None, None].expand(3, 3, 64, 64) * person(64)
    alike = recoloured(made, colour, person(64)[None].expand(3, 1, 64, 64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(alike.mean((0, 2, 3)), torch.tensor([0.9, 0.1, 0.2]), atol=0.12, rtol=0)


def test_the_loss_is_least_for_the_truth():
    crops = PersonScenes(some_cutouts(), 64, spare=4).crops(0, 2)
    truth = torch.logit(crops.alpha.clamp(1e-3, 1 - 1e-3))
    total = [sum(person_loss(x, crops).values()) for x in (truth, truth.roll(3, -1), -truth)]
    assert total[0] < total[1] < total[2]


def test_network_file(tmp_path):
    torch.manual_seed(0)
    model = PersonNet(TINY).eval()
    model.save(tmp_path / "net")
    again = load_person_net(tmp_path / "net")
    crop, mesh = torch.rand(3, 128, 128), torch.zeros(128, 128, dtype=torch.bool)
    told = person_in(crop, mesh, mesh, model)
    assert told.shape == (1, 128, 128) and 0 <= told.min() <= told.max() <= 1
    torch.testing.assert_close(person_in(crop, mesh, mesh, again), told, atol=1e-2, rtol=0)
    both = [person_in(x, mesh, mesh, model, twice=True) for x in (crop, crop.flip(-1))]
    torch.testing.assert_close(both[0], both[1].flip(-1), msg="looked at twice, left and right are alike")
    for name, says in (("nothing", "not a model folder"), ("net", "damaged")):
        (tmp_path / "net/model.safetensors").write_bytes(b"damaged")
        load_person_net.cache_clear()
        with pytest.raises(UserError, match=says):
            load_person_net(tmp_path / name)


def test_training_resumes_exactly(tmp_path):
    config = PersonTraining(TINY, steps=4, batch=2, backgrounds=2, save_every=2, validate_every=100, log_every=1)
    people = some_cutouts()
    whole = train_person(tmp_path / "a", people, people, config)

    class Stop(Exception):
        pass

    def interrupt(record: dict) -> None:
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train_person(tmp_path / "b", people, people, config, on_record=interrupt)
    resumed = train_person(tmp_path / "b", people, people, config)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    shutil.rmtree(tmp_path / "b/person")  # Killed between the last checkpoint and the network that is made of it.
    train_person(tmp_path / "b", people, people, config)
    assert load_person_net(tmp_path / "b/person").config == TINY


def test_the_network_that_ships_takes_no_door_for_hair(subject):
    """A person of the open world before planks of the hair's own colour, upright and dark at their joints."""
    params = subject_motion(subject, 1, "speech")
    cameras = subject_cameras(subject, params, [0], 256)
    out = subject.render(params, cameras)
    head = load_head("openhead")
    fragments = meshes.rasterize(head.pose(params[0]).vertices, head.faces, cameras[0])
    part = meshes.interpolate(fragments, head.faces, head_region(head).float()[:, None])[0] > 0.5
    alpha = out.mask[0]
    hair = (alpha[0] > 0.9) & ~fragments.mask
    own = out.rgb[0][:, hair].mean(1)
    planks = own[:, None, None] * (0.75 + 0.5 * torch.rand(1, 1, 8, generator=torch.Generator().manual_seed(0)))
    door = planks.repeat_interleave(32, -1).expand(3, 256, 256).clone()
    door[:, :, ::32] *= 0.4
    door = (door + 0.02 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    told = person_in(out.rgb[0] * alpha + door * (1 - alpha), fragments.mask, part, load_person_net())
    beyond = ~fragments.mask[None]
    assert ((told > 0.5) & beyond & (alpha < 0.1)).float().sum() < 0.02 * alpha.sum(), "the door stays behind"
    assert ((told > 0.5) & (alpha > 0.9)).sum() > 0.93 * (alpha > 0.9).sum(), "the person is kept"
