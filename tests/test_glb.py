"""The .glb: its parts read back by glTF's rules, the mesh posed by them is our head, the splats are the avatar's."""

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from avatars import painted_avatar, talking
from geodiff4d.avatar.export_glb import export_glb
from geodiff4d.avatar.ply import SH_C0
from geodiff4d.cli import main
from geodiff4d.core.geometry import quat_to_matrix
from geodiff4d.heads import load_head

TYPES = {5126: "<f4", 5121: "<u1", 5123: "<u2"}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}


@pytest.fixture(scope="module")
def avatar():
    head = load_head()
    return painted_avatar(head, talking(head, 3), harmonics=1)


@pytest.fixture(scope="module")
def parts(avatar, tmp_path_factory) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The document, and every accessor's numbers."""
    path = tmp_path_factory.mktemp("glb") / "me.glb"
    assert export_glb(avatar, path) == path.stat().st_size
    data = path.read_bytes()
    magic, version, size, length, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, size, kind) == (b"glTF", 2, len(data), b"JSON")
    document = json.loads(data[20 : 20 + length])
    binary = data[28 + length :]
    assert data[24 + length : 28 + length] == b"BIN\0" and len(binary) == document["buffers"][0]["byteLength"]

    def read(view: int, kind: str, count: int, width: int) -> np.ndarray:
        start = document["bufferViews"][view]["byteOffset"]
        assert start % 4 == 0
        return np.frombuffer(binary, kind, count * width, start).reshape(count, width)

    arrays = []
    for one in document["accessors"]:
        width, kind = WIDTHS[one["type"]], TYPES[one["componentType"]]
        rows = np.zeros((one["count"], width), kind)
        if "bufferView" in one:
            rows = read(one["bufferView"], kind, one["count"], width)
        if "sparse" in one:
            sparse = one["sparse"]
            places = read(sparse["indices"]["bufferView"], "<u2", sparse["count"], 1)[:, 0]
            assert (np.diff(places.astype(int)) > 0).all()
            rows[places] = read(sparse["values"]["bufferView"], kind, sparse["count"], width)
        for key, of in (("min", np.min), ("max", np.max)):
            assert key not in one or np.allclose(of(rows, 0), one[key])
        arrays.append(rows)
    return document, arrays


def test_the_mesh_is_our_head(parts, avatar):
    """Neutral + targets, and the skin's joints turned as glTF turns them, against `Head.pose` at rest."""
    document, arrays = parts
    mesh, head = document["meshes"][1], avatar.head
    primitive = mesh["primitives"][0]
    assert mesh["extras"]["targetNames"] == list(head.expression_names) and len(primitive["targets"]) == 52
    assert set(mesh["extras"]["gaze"]) == {n for n in head.expression_names if n.startswith("eyeLook")}
    get = {name: arrays[i] for name, i in primitive["attributes"].items()}
    assert (arrays[primitive["indices"]].reshape(-1, 3) == head.faces.numpy()).all()
    targets = [arrays[t["POSITION"]] for t in primitive["targets"]]
    shaped = get["POSITION"] + sum(w * t for w, t in zip(mesh["weights"], targets, strict=True))
    skin, nodes = document["skins"][0], document["nodes"]
    world: dict[int, np.ndarray] = {}
    parent = {child: i for i, node in enumerate(nodes) for child in node.get("children", [])}
    for j in skin["joints"]:
        local = np.eye(4)
        x, y, z, w = nodes[j].get("rotation", [0, 0, 0, 1])
        local[:3, :3] = quat_to_matrix(torch.tensor([w, x, y, z], dtype=torch.float64)).numpy()
        local[:3, 3] = nodes[j]["translation"]
        world[j] = world[parent[j]] @ local if j in parent else local
    unbound = arrays[skin["inverseBindMatrices"]].reshape(-1, 4, 4).transpose(0, 2, 1)
    moves = np.stack([world[j] @ unbound[i] for i, j in enumerate(skin["joints"])])
    T = (get["WEIGHTS_0"][:, :, None, None] * moves[get["JOINTS_0"]]).sum(1)
    vertices = (T @ np.concatenate([shaped, np.ones((len(shaped), 1))], 1)[..., None])[:, :3, 0]
    rest = replace(head.neutral(), shape=avatar.shape, expr=torch.tensor(mesh["weights"]))
    assert np.abs(vertices - head.pose(rest).vertices.numpy()).max() < 1e-4
    assert np.allclose(get["WEIGHTS_0"].sum(1), 1)


def test_an_offset_of_each_vertex_is_the_persons_own(avatar, tmp_path):
    offset = torch.full((len(avatar.sequence.expr), len(avatar.head.template), 3), 0.01)
    wearing = replace(avatar, sequence=replace(avatar.sequence, static_offset=offset))
    low = []
    for one in (avatar, wearing):
        export_glb(one, tmp_path / "a.glb")
        data = (tmp_path / "a.glb").read_bytes()
        document = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
        low.append([document["accessors"][m["primitives"][0]["attributes"]["POSITION"]]["min"]
                    for m in document["meshes"]])  # fmt: skip
    assert np.allclose(np.subtract(*reversed(low)), 0.01, atol=1e-5), "splats and mesh alike"


def test_the_splats_are_the_avatars(parts, avatar):
    document, arrays = parts
    primitive = document["meshes"][0]["primitives"][0]
    get = {name.rpartition(":")[2]: arrays[i] for name, i in primitive["attributes"].items()}
    assert primitive["mode"] == 0 and primitive["extensions"]["KHR_gaussian_splatting"]["kernel"] == "ellipse"
    rest = replace(avatar.head.neutral(), expr=torch.tensor(document["meshes"][1]["weights"]))
    posed = avatar.posed(rest)
    ours = {
        "POSITION": posed.gaussians.means, "SCALE": posed.gaussians.scales,
        "OPACITY": posed.gaussians.opacities[:, None],
        "SH_DEGREE_0_COEF_0": (posed.colors - 0.5) / SH_C0, "_FACE": posed.face_index[:, None],
    }  # fmt: skip
    assert posed.shading is not None
    ours |= {f"SH_DEGREE_1_COEF_{k}": posed.shading.in_world()[:, k] for k in range(3)}
    for name, truth in ours.items():
        assert np.abs(get[name] - truth.numpy()).max() < 1e-4, name
    turns = quat_to_matrix(torch.from_numpy(get["ROTATION"][:, [3, 0, 1, 2]].copy()))
    assert (turns - quat_to_matrix(posed.gaussians.quats)).abs().max() < 1e-4
    assert document["scenes"][document["scene"]]["nodes"] == [0]


def test_command(avatar, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    avatar.save(tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "me.glb")]) == 0
    assert "52 morph targets" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "me.gltf"), "--to", "glb"]) == 2
