"""Driving: another person's rest stays there, weights by name and line by line, one command for all sources."""

import io
import json
from dataclasses import replace

import pytest
import torch

from avatars import painted_avatar, talking, with_networks
from geodiff4d.avatar.drive import LiveDriver, held, own_performance, performed, wants_tokens
from geodiff4d.avatar.relative import Rest, transferred, transferred_tokens
from geodiff4d.avatar.stream import read_stream, read_stream_file
from geodiff4d.cli import main
from geodiff4d.cli._driving import DrivingArgs, performance
from geodiff4d.core.errors import UserError
from geodiff4d.core.video import read_video
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head()


@pytest.fixture(scope="module")
def avatar(head):
    return painted_avatar(head, talking(head), size=48)


def test_own_clip_changes_nothing(head, avatar):
    again = performed(avatar, avatar.sequence, fps=30)
    torch.testing.assert_close(again.params.expr, avatar.sequence.expr)
    torch.testing.assert_close(again.params.jaw_pose, avatar.sequence.jaw_pose)
    assert len(again) == 12 and again.fps == 30


def test_the_avatars_own_offset_stays(head, avatar):
    """Trackers such as VHAP fit an offset of each vertex: the Gaussians lie on the surface with it."""
    offset = torch.full((len(avatar.sequence.expr), len(head.template), 3), 0.01)
    wearing = replace(avatar, sequence=replace(avatar.sequence, static_offset=offset))
    params = performed(wearing, talking(head, 3, seed=1)).params
    assert params.static_offset is not None and torch.equal(params.static_offset, offset[:3])


def test_another_persons_rest_does_not_leak_in(head, avatar):
    """The same acting by somebody who always frowns, smiles and lets the jaw hang moves the avatar the same way."""
    acting = talking(head, 40, seed=5)
    habit = torch.zeros(52)
    habit[[2, 19, 30]] = torch.tensor([0.3, 0.2, 0.25])
    drop = torch.tensor([0.06, 0.01, 0.0])
    other = replace(
        acting, expr=habit + acting.expr * (1 - habit), jaw_pose=acting.jaw_pose + drop,
        shape=torch.randn(40, acting.shape.shape[1], generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip
    plain, driven = performed(avatar, acting), performed(avatar, other)
    torch.testing.assert_close(driven.params.expr, plain.params.expr, atol=1e-5, rtol=0)
    torch.testing.assert_close(driven.params.jaw_pose, plain.params.jaw_pose, atol=1e-5, rtol=0)
    assert torch.equal(driven.params.shape[3], avatar.shape)
    leaked = performed(avatar, other, relative=False)
    assert (leaked.params.expr - plain.params.expr).abs().max() > 0.15
    # In images: the leak is what is seen, not what is transferred.
    still = int(acting.expr.sum(-1).argmin())
    shots = [avatar.render(p.params[still], avatar.camera).rgb for p in (plain, driven, leaked)]
    assert (shots[0] - shots[1]).abs().max() < 1e-3 < 0.02 < (shots[0] - shots[2]).abs().max()


def test_a_driver_at_rest_leaves_the_avatar_at_rest_and_eyes_shut(head, avatar):
    hanging_lids = replace(head.neutral(20), expr=torch.zeros(20, 52).index_fill(1, torch.tensor([0, 1]), 0.2))
    made = performed(
        avatar, replace(hanging_lids, expr=torch.where(torch.arange(20)[:, None] == 7, 1.0, hanging_lids.expr))
    )
    rest = Rest.of(head, avatar.sequence)
    torch.testing.assert_close(made.params.expr[0], rest.expr)
    assert (made.params.expr[7] > 0.999).all()


def test_tokens_are_relative_too_and_stay_in_range(head, avatar):
    """A driver whose encoder sees an offset in every frame drives as one without; slider's tokens are guessed."""
    g = torch.Generator().manual_seed(3)
    tokens, offset = torch.randn(12, 32, 16, generator=g), torch.randn(32, 16, generator=g)
    learned = with_networks(avatar, tokens)
    assert wants_tokens(learned) and not wants_tokens(avatar) and not wants_tokens(with_networks(avatar, None))
    own = performed(learned, learned.sequence, tokens + offset)
    assert own.tokens is not None
    torch.testing.assert_close(own.tokens, tokens, atol=1e-5, rtol=0)
    row, row_tokens = own.frame(4)
    same = learned.render(learned.sequence[4], learned.camera, tokens=tokens[4]).rgb
    torch.testing.assert_close(learned.render(row, learned.camera, tokens=row_tokens).rgb, same, atol=1e-3, rtol=0)
    assert own_performance(learned).tokens is tokens and held(learned, torch.zeros(1, 52)).tokens is None


def test_live_driving_learns_the_drivers_rest(head, avatar):
    acting = replace(talking(head, 48, seed=5), expr=0.2 + 0.8 * talking(head, 48, seed=5).expr)
    driver = LiveDriver(avatar)
    rows = [driver(acting[i]) for i in range(48)]
    whole = performed(avatar, acting)
    torch.testing.assert_close(rows[47].expr, whole.params.expr[47], atol=1e-5, rtol=0)
    assert (rows[0].expr - whole.params.expr[0]).abs().max() > 0.1


def test_one_image_says_nothing_about_rest(head, avatar):
    smile = replace(head.neutral(1), expr=torch.full((1, 52), 0.3))
    assert (Rest.of(head, smile).expr == 0).all()
    tokens = torch.ones(1, 32, 16)
    assert torch.equal(transferred_tokens(tokens, Rest.of(head, smile, tokens), Rest.of(head, smile)), tokens)


def test_coefficients_are_shifted(head):
    """FLAME's coefficients go both ways: no end to keep."""
    flame = replace(head, expression_names=tuple(f"expr{i:03d}" for i in range(52)))
    params = replace(head.neutral(30), expr=torch.randn(30, 52, generator=torch.Generator().manual_seed(1)))
    shifted = replace(params, expr=params.expr + 0.7)
    a, b = Rest.of(flame, params), Rest.of(flame, shifted)
    torch.testing.assert_close(transferred(flame, shifted, b, a).expr, params.expr)


def test_a_byte_order_mark_is_no_part_of_a_stream(head, tmp_path):
    names = head.expression_names
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"jawOpen": 0.5}\n{"jawOpen": 0.25}\n')
    lines = read_stream_file(tmp_path / "a.jsonl", names)
    assert [float(line.weights.max()) for line in lines] == [0.5, 0.25]
    assert len(list(read_stream(['\ufeff{"jawOpen": 0.5}'], names))) == 1


def test_stream_forms(head, tmp_path):
    names = head.expression_names
    lines = [
        '{"jawOpen": 0.5, "time": 1.5}', "", '{"EyeBlinkLeft": 1, "neck": [0.1, 0, 0]}',
        json.dumps({"names": ["tongueOut", "jawOpen"], "weights": [0.25, 1.0004]}), '{"weights": [0, 0.75]}',
    ]  # fmt: skip
    got = list(read_stream(lines, names))
    jaw, tongue = names.index("jawOpen"), names.index("tongueOut")
    assert [float(x.weights[jaw]) for x in got] == [0.5, 0.0, 1.0, 0.75] and got[2].weights[tongue] == 0.25
    assert got[1].neck.tolist() == pytest.approx([0.1, 0, 0]) and got[1].weights[names.index("eyeBlinkLeft")] == 1
    whole = {"names": list(names), "frames": [{"weights": [0.1] * 52, "time": 0.0}, {"weights": [0.2] * 52}]}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=1))
    assert [round(float(x.weights.mean()), 3) for x in read_stream_file(tmp_path / "a.json", names)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"jawOpne": 1}', "line 2: names 'jawOpne', which is no expression of this head: did you mean jawOpen?"),
        ('{"jawOpen": 1.2}', "line 2: has jawOpen = 1.2: expected a number from 0 to 1"),
        ('{"jawOpen": NaN}', "expected a number from 0 to 1"),
        ('{"jawOpen": true}', "expected a number from 0 to 1"),
        ('{"jawOpen": 0.5', "line 2: is not JSON"),
        ("[1, 2]", "line 2: is list, expected an object"),
        ('{"weights": [1]}', "line 2: has 1 weights: expected 52"),
        ('{"weights": 1}', "line 2: has weights that are not a list"),
        ('{"neck": [0, 0, 99]}', "line 2: has a neck"),
        ("[" * 9000, "line 2: is not JSON"),
    ],
)
def test_bad_lines_are_named(head, line, says):
    with pytest.raises(UserError) as error:
        list(read_stream(["{}", line], head.expression_names, "standard input"))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_names_need_a_head_with_names(head, avatar):
    with pytest.raises(UserError, match="FLAME"):
        list(read_stream(["{}"], ("expr000",)))


def test_command_drives_by_weights(avatar, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "avatar"
    folder.mkdir()
    avatar.save(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO('{"jawOpen": 1}\n{"jawOpen": 0}\n'))
    assert main(["render", str(folder), "--driving", "-", "--camera", "front", "--out", str(tmp_path / "a.mp4")]) == 0
    jaw = list(read_video(tmp_path / "a.mp4"))
    assert len(jaw) == 2 and (jaw[0] - jaw[1]).abs().max() > 0.2
    assert main(["render", str(folder), "--set", "jawOpen=2", "--out", str(tmp_path / "b.mp4")]) == 2
    assert main(["render", str(folder), "--set", "jawOpen", "--out", str(tmp_path / "b.mp4")]) == 2
    assert main(["render", str(folder), "--driving", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "b.mp4")]) == 2
    assert not (tmp_path / "b.mp4").exists()
    assert capsys.readouterr().err.strip().count("\n") == 2


def test_named_weights_start_from_the_avatars_rest(head, avatar):
    made = performance(avatar, DrivingArgs(set=("jawOpen=0.5", "mouthsmileleft=1")))
    rest = Rest.of(head, avatar.sequence).expr
    jaw, smile = (head.expression_names.index(n) for n in ("jawOpen", "mouthSmileLeft"))
    assert made.params.expr[0, smile] == 1 and made.params.expr[0, jaw] == pytest.approx(0.5 + 0.5 * float(rest[jaw]))
    assert torch.equal(held(avatar, torch.zeros(1, 52)).params.expr[0], rest)
    assert len(own_performance(avatar).looped(5)) == 5
