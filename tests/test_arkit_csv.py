"""Tables of ARKit weights as Live Link Face records them: what is read, at which rate, and bad ones."""

import pytest
import torch

from avatars import painted_avatar, talking
from geodiff4d.avatar.arkit_csv import frame_rate, read_csv_file
from geodiff4d.avatar.drive import held
from geodiff4d.cli._driving import DrivingArgs, performance
from geodiff4d.core.errors import UserError
from geodiff4d.heads import load_head

NAMES = ("jawOpen", "eyeBlinkLeft", "tongueOut")
HEAD = "Timecode,BlendshapeCount,EyeBlinkLeft,JawOpen,HeadYaw,HeadPitch,HeadRoll\r\n"


def written(folder, text: str, name: str = "a.csv"):
    path = folder / name
    path.write_bytes(text.encode("utf-8-sig"))
    return path


def test_live_link_rows(tmp_path):
    rows = [f"11:22:{s:02d}:{f:02d}.123,61,{f / 30:.4f},0.5,0.1,-3.0,0" for s in range(3, 7) for f in range(30)]
    lines, fps = read_csv_file(written(tmp_path, HEAD + "\r\n".join(rows[20:-5]) + "\r\n\r\n"), NAMES)
    assert fps == 30 and len(lines) == len(rows) - 25
    assert lines[0].weights.tolist() == pytest.approx([0.5, 20 / 30, 0.0], abs=1e-3)
    assert not lines[0].neck.any()


@pytest.mark.parametrize(("codes", "rate"), [
    (["00:00:01:00"] * 50, None), ([], None), (["rubbish"] * 9, None),
    ([f"00:00:{i // 60:02d}:{i % 60:02d}" for i in range(240)], 60.0),
    ([f"00:00:{i // 900:02d}:0" for i in range(4000)], None),
])  # fmt: skip
def test_rates(codes, rate):
    assert frame_rate(codes) == rate


@pytest.mark.parametrize(("text", "says"), [
    ("", "no column of an ARKit"), ("a,b\n1,2\n", "no column of an ARKit"), (HEAD, "no frames"),
    (HEAD + "0:0:0:0,61,1\n", "line 2: has 3 columns, expected 7"),
    (HEAD + "0:0:0:0,61,1,x,0,0,0\n", "line 2: has JawOpen = x"),
    (HEAD + "0:0:0:0,61,1,nan,0,0,0\n", "expected a number from 0 to 1"),
    (HEAD + "0:0:0:0,61,1,2,0,0,0\n", "from 0 to 1"),
    ("jawOpen,jawopen\n0,0\n", "more than one column jawopen"), ("jawOpen,nose\n0,0\n", "line 2: names 'nose'"),
    ("jawOpen\n" + '"' + "x" * 200_000, "not a table"),
])  # fmt: skip
def test_bad_tables(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read_csv_file(written(tmp_path, text), NAMES)


def test_it_drives(tmp_path):
    head = load_head()
    avatar = painted_avatar(head, talking(head, 3))
    rows = "\n".join(f"0:0:{i // 25}:{i % 25},61,0,0.5,0,0,0" for i in range(75))
    show = performance(avatar, DrivingArgs(driving=written(tmp_path, HEAD + rows)))
    weights = torch.zeros(1, 52)
    weights[0, head.expression_names.index("jawOpen")] = 0.5
    assert show.fps == 25 and torch.equal(show.params.expr[7], held(avatar, weights).params.expr[0])
    for missing in (tmp_path / "no.csv", written(tmp_path, "", "empty.csv")):
        with pytest.raises(UserError):
            performance(avatar, DrivingArgs(driving=missing))
