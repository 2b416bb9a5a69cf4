"""The web page as a file: small, whole, from nowhere else; what it carries is the avatar; and what it cannot show."""

import base64
import json
import re
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from avatars import painted_avatar, talking, with_networks
from geodiff4d.avatar.drive import own_performance
from geodiff4d.avatar.model import Avatar
from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.heads import load_head
from geodiff4d.viewer.face_tracker import MODELS, PACKAGE, packed_tracker
from geodiff4d.viewer.page import SCRIPTS, SHADERS, WEB, WORKER, PageConfig, page
from geodiff4d.viewer.scene import pose_rows


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    head = load_head()
    return painted_avatar(head, talking(head, 5), gaussians=25_000, harmonics=1)


@pytest.fixture(scope="module")
def text(avatar) -> str:
    return page(avatar, own_performance(avatar), PageConfig("a <b> {{STYLE}}", ("https://example.org:8080",)))


@pytest.fixture(scope="module")
def arrays(text) -> dict[str, np.ndarray]:
    return numbers(text)


def numbers(text: str) -> dict[str, np.ndarray]:
    """The page's numbers, read as its script does: columns, low bytes first, differences summed."""
    found = re.search(r'id="avatar">([^<]*)<', text)
    assert found
    data = zlib.decompress(base64.b64decode(found[1]))
    (length,) = struct.unpack("<I", data[:4])
    about, out = json.loads(data[4 : 4 + length]), {}
    for name, one in about["arrays"].items():
        count, size = one["rows"] * one["width"], one["bytes"]
        planes = np.frombuffer(data, np.uint8, count * size, 4 + length + one["at"]).reshape(size, count)
        kind = "<f4" if one["kind"] == "numbers" else f"<u{size}"
        rows = np.ascontiguousarray(planes.T).reshape(-1).view(kind).reshape(one["width"], one["rows"]).T
        if one["kind"] == "indices":
            rows = rows.astype(np.int64).cumsum(0) % 65536
        if one["kind"] == "columns":
            rows = np.array(one["low"]) + np.array(one["step"]) * rows
        out[name] = rows
    return out


def test_one_file_from_nowhere_else(text):
    assert len(text) < 3_000_000
    assert "default-src 'none'" in text and "connect-src 'none'" in text and "wasm" not in text.partition("<style")[0]
    without = text.replace("https://example.org:8080", "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|<link[^>]+href=\"[^d]|@import|\bfetch\(|XMLHttpRequest", without)
    assert "<title>a &lt;b&gt; {{STYLE}}</title>" in text and text.count("{{") == text.count("{{STYLE}}")


def test_every_file_of_the_page_is_in_it(text):
    files = {p.name for p in WEB.iterdir() if p.is_file()}
    assert files == {*SCRIPTS, *(f"{name}.glsl" for name in SHADERS), WORKER, "page.html", "page.css"}
    assert all((WEB / name).read_text(encoding="utf-8") in text for name in (*SCRIPTS, "page.css"))


def test_what_the_page_carries_is_the_avatar(arrays, avatar):
    head, local = avatar.head, avatar.local
    order = local.face_index.argsort(stable=True)
    assert (arrays["faces"] == head.faces.numpy()).all()
    assert (arrays["splat_face"][:, 0] == local.face_index[order].numpy()).all()
    near = {
        "neutral": (head.template, 1e-5), "skin": (head.skin_weights, 1e-4), "splat_means": (local.means[order], 1e-3),
        "splat_log_scales": (local.log_scales[order], 0.02), "sequence": (pose_rows(avatar.sequence), 1e-4),
        "splat_harmonics": (local.harmonics[order].flatten(1), 0.003),
        "splat_shares": (torch.cat([local.color_logits, local.opacity_logits[:, None]], -1)[order].sigmoid(), 0.0021),
    }  # fmt: skip
    for name, (truth, tolerance) in near.items():
        assert np.abs(arrays[name] - np.asarray(truth)).max() < tolerance, name


def test_an_offset_of_each_vertex_is_the_persons_own():
    head = load_head()
    avatar = painted_avatar(head, talking(head, 2))
    offset = torch.full((len(avatar.sequence.expr), len(avatar.head.template), 3), 0.01)
    wearing = replace(avatar, sequence=replace(avatar.sequence, static_offset=offset))
    own, plain = (numbers(page(a, own_performance(a), PageConfig("a")))["neutral"] for a in (wearing, avatar))
    assert np.abs(own - plain - 0.01).max() < 2e-5


def test_sparse_morph_targets_are_the_whole_expression(arrays, avatar):
    """One random expression, from the page's numbers and from the head: vertices to 10 µm, joints to 1 µm."""
    head = avatar.head
    weights = torch.rand(len(head.expression_names), generator=torch.Generator().manual_seed(0)).numpy()
    start = np.concatenate([[0], arrays["morph_counts"][:, 0].cumsum()])
    vertices = np.array(arrays["neutral"])
    for k, weight in enumerate(weights):
        part = slice(start[k], start[k + 1])
        vertices[arrays["morph_index"][part, 0]] += weight * arrays["morph_offsets"][part]
    joints = arrays["joints"] + (weights @ arrays["joint_morphs"]).reshape(-1, 3)
    neutral = head.neutral()
    shaped = head.shape(type(neutral)(**{**vars(neutral), "expr": torch.from_numpy(weights)}))
    assert np.abs(vertices - shaped.vertices.numpy()).max() < 1e-5
    assert np.abs(joints - shaped.joints.numpy()).max() < 1e-6


def test_the_users_face_tracker_is_in_the_page_and_nothing_else_may_be_asked(avatar, tmp_path):
    """Files that stand for MediaPipe's: the page has them whole; without them it may ask for nothing at all."""
    task, package = tmp_path / "face_landmarker.task", tmp_path / "tasks-vision"
    with zipfile.ZipFile(task, "w") as archive:
        for name in MODELS:
            archive.writestr(name, name)
    for name in PACKAGE.values():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f"</script> of {name}")
    tracker = packed_tracker(task, package)
    whole = page(avatar, own_performance(avatar), PageConfig(tracker=tracker))
    (kept,) = re.findall(r'id="tracker">([^<]*)<', whole)
    parts = {part: zlib.decompress(base64.b64decode(text)) for part, text in json.loads(kept).items()}
    assert parts.pop("task") == task.read_bytes()
    assert parts == {part: (package / name).read_bytes() for part, name in PACKAGE.items()}
    assert "'wasm-unsafe-eval'" in whole and "connect-src blob:;" in whole
    (package / PACKAGE["binary"]).unlink()
    with pytest.raises(UserError, match="npm install @mediapipe/tasks-vision"):
        packed_tracker(task, package)
    with pytest.raises(UserError, match="expected MediaPipe's face_landmarker"):
        packed_tracker(package / PACKAGE["module"], package)
    with zipfile.ZipFile(task, "w") as archive:
        archive.writestr("face_landmarks_detector.tflite", "")
    with pytest.raises(UserError, match="has no face_blendshapes"):
        packed_tracker(task, package)


def test_what_the_page_cannot_show_is_refused(avatar, tmp_path, capsys):
    small = painted_avatar(avatar.head, talking(avatar.head, 12))
    with pytest.raises(UserError, match="has networks, which the page cannot run"):
        page(with_networks(small, None), own_performance(small))
    with pytest.raises(UserError, match="no origin"):
        PageConfig(origins=("javascript:alert(1)",))
    (tmp_path / "a").mkdir()
    small.save(tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "me.html")]) == 0
    assert "MB" in capsys.readouterr().out
    assert "<title>a</title>" in (tmp_path / "me.html").read_text(encoding="utf-8")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "me.htm"), "--to", "web"]) == 2
    assert "ending in .html" in capsys.readouterr().err
