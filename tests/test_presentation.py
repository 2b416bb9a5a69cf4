"""What a file says beside its pixels: turned and mirrored films, oblong pixels, dynamic range, time, erased parts."""

import itertools
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from geodiff4d.core import images, video
from geodiff4d.core.errors import UserError
from geodiff4d.core.films import described
from geodiff4d.tracking.source import is_video

WHITE = 203.0


def corners() -> torch.Tensor:
    """A picture that looks different whichever way it is turned or mirrored."""
    frame = torch.zeros(3, 32, 64)
    frame[0, :, :32], frame[1, :16], frame[2, 20:, 50:] = 1, 1, 1
    return frame


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: torch.rot90(x, -1, (1, 2))),
        ((-1, 0, 0, -1), lambda x: torch.rot90(x, 2, (1, 2))),
        ((0, -1, 1, 0), lambda x: torch.rot90(x, 1, (1, 2))),
        ((-1, 0, 0, 1), lambda x: x.flip(2)),
        ((1, 0, 0, -1), lambda x: x.flip(1)),
        ((0, 1, 1, 0), lambda x: x.mT),
        ((0, -1, -1, 0), lambda x: torch.rot90(x, 2, (1, 2)).mT),
    ],
)
def test_films_are_turned_and_mirrored_as_their_display_matrix_says(tmp_path, matrix, shown):
    path = tmp_path / "a.mp4"
    video.write_video(path, [corners()] * 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # where its display matrix is (ISO 14496-12, 8.3.2)
    a, b, c, d = (int(x * 65536).to_bytes(4, "big", signed=True) for x in matrix)
    data[at : at + 36] = a + b + bytes(4) + c + d + bytes(12) + (1 << 30).to_bytes(4, "big")
    path.write_bytes(data)
    torch.testing.assert_close(next(video.read_video(path)), shown(corners()), atol=0.35, rtol=0)


def encode(path: Path, frames, rate=24, pts=None, prepare=lambda stream: None, **options) -> None:
    """Write frames by hand, with what `write_video` never writes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(options.pop("codec", "libx264"), rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        prepare(stream)
        for i, frame in enumerate(frames):
            frame.pts = None if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def grey(level: int, width: int = 64, height: int = 48) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), format="rgb24")


@pytest.mark.parametrize(("aspect", "size"), [((16, 11), (48, 93)), ((1, 2), (96, 64)), ((1, 1), (48, 64))])
def test_oblong_pixels_are_made_square(tmp_path, aspect, size):
    def oblong(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)

    encode(tmp_path / "a.mp4", [grey(90)] * 3, prepare=oblong)
    frame = next(video.read_video(tmp_path / "a.mp4"))
    assert tuple(frame.shape[1:]) == size and abs(float(frame.mean()) - 90 / 255) < 0.02
    assert bool(described(tmp_path / "a.mp4")) == (aspect != (1, 1))


def hlg(nits: float) -> float:
    """Return the signal of a grey of that light on a display of 1000 nits (ITU-R BT.2100)."""
    scene = (nits / 1000) ** (1 / 1.2)
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return float(np.sqrt(3 * scene) if scene <= 1 / 12 else a * np.log(12 * scene - b) + c)


def pq(nits: float) -> float:
    """Return SMPTE ST 2084's signal of a light."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    y = (nits / 10000) ** m1
    return float(((c1 + c2 * y) / (1 + c3 * y)) ** m2)


@pytest.mark.parametrize(("transfer", "curve"), [(18, hlg), (16, pq)])
def test_high_dynamic_range_becomes_what_a_screen_shows(tmp_path, transfer, curve):
    def wide(stream):
        stream.pix_fmt = "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9

    found = []
    for share in (0.18, 0.5, 4.0):
        signal = np.full((48, 64, 3), round(curve(share * WHITE) * 65535), np.uint16)
        path = tmp_path / f"{share}.mp4"
        encode(path, [av.VideoFrame.from_ndarray(signal, format="rgb48le")] * 2, prepare=wide)
        found.append(float(next(video.read_video(path)).mean()))
    # sRGB's own curve of 18 % and of half of white; four times white is white, and not beyond it.
    assert found[0] == pytest.approx(0.461, abs=0.02) and found[1] == pytest.approx(0.735, abs=0.02)
    assert 0.95 < found[2] <= 1
    assert "high dynamic range" in described(path)[0]


def test_frames_come_at_their_times(tmp_path):
    levels = [40, 80, 120, 160, 200]
    # In twelfths of a second: the third frame stays for four moments.
    encode(tmp_path / "a.mp4", [grey(v) for v in levels], rate=12, pts=[0, 1, 2, 6, 7])
    with av.open(str(tmp_path / "a.mp4")) as container:
        rate = float(container.streams.video[0].average_rate)
    shown = [round(float(f.mean()) * 255) for f in video.read_video(tmp_path / "a.mp4")]
    for moment, level in enumerate(shown[:-1]):
        at = (moment + 0.5) / rate * 12
        wanted = levels[sum(p <= at for p in (0, 1, 2, 6, 7)) - 1]
        assert abs(level - wanted) < 6 or abs(level - levels[max(levels.index(wanted) - 1, 0)]) < 6
    assert len(shown) == round(8 / 12 * rate)


def test_a_steady_film_loses_and_doubles_nothing(tmp_path):
    for rate in (24, 25, Fraction(30000, 1001)):
        encode(tmp_path / "a.mp4", [grey(10 + 2 * i) for i in range(90)], rate=rate)
        shown = [float(f.mean()) for f in video.read_video(tmp_path / "a.mp4")]
        assert len(shown) == 90 and all(b > a for a, b in itertools.pairwise(shown))


def test_what_was_erased_is_not_seen(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = images.read_image(tmp_path / "a.png")
    assert torch.equal(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(image[:, 3, 0], torch.full((3,), 128 / 255))
    assert float(images.read_image(tmp_path / "a.png", "L")[0, 3, 0]) == 0


def test_a_tiled_photograph_is_not_taken_for_a_film(tmp_path, monkeypatch):
    """A HEIC file is a grid of tiles, each a stream of its own: one of them would be half a face."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert not is_video(path)
    with pytest.raises(UserError, match="is a HEIF photograph"):
        images.read_image(path)


def profile(primaries: dict[str, tuple[float, float, float]]) -> bytes:
    """Return a display's ICC profile of version 2: three primaries (D50) and a gamma of 2.2."""

    def fixed(*values: float) -> bytes:
        return b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in values)

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0",
            b"desc": b"desc\0\0\0\0\0\0\0\5wide\0" + bytes(79)}  # fmt: skip
    for name, xyz in primaries.items():
        tags[f"{name}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(*xyz)
        tags[f"{name}TRC".encode()] = b"curv\0\0\0\0\0\0\0\1" + int(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + (at + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    head = bytearray(128)
    head[:4], head[8:12] = (at + len(body)).to_bytes(4, "big"), b"\2\x20\0\0"
    head[12:24], head[36:40], head[68:80] = b"mntrRGB XYZ ", b"acsp", fixed(0.9642, 1.0, 0.8249)
    return bytes(head) + len(tags).to_bytes(4, "big") + table + body


def test_wide_gamuts_become_srgb(tmp_path):
    p3 = profile({"r": (0.5151, 0.2412, -0.0011), "g": (0.2920, 0.6922, 0.0419), "b": (0.1571, 0.0666, 0.7841)})
    skin = Image.new("RGB", (4, 4), (200, 140, 120))
    skin.save(tmp_path / "p3.png", icc_profile=p3)
    skin.save(tmp_path / "odd.png", icc_profile=b"not a profile")
    skin.convert("RGBA").save(tmp_path / "clear.png", icc_profile=p3)
    wide, plain = (images.read_image(tmp_path / f"{k}.png")[:, 0, 0] * 255 for k in ("p3", "odd"))
    assert plain.tolist() == [200, 140, 120]
    assert images.read_image(tmp_path / "clear.png")[:, 0, 0].mul(255).tolist() == wide.tolist()
    # Display P3's (200, 140, 120) is a stronger colour than sRGB's.
    assert wide[0] > 206 and wide[2] < 119 and abs(float(wide[1]) - 138) < 5
