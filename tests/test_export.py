"""Files that other tools open: posed .ply, GaussianAvatars both ways to the bit, the compact form; damaged ones."""

import gzip
import io
import json
import math
import struct
import zipfile
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import KDTree
from torch.nn.functional import normalize

import flame_files
from avatars import painted_avatar, talking, with_networks
from geodiff4d.avatar.binding import face_frames
from geodiff4d.avatar.compact import open_avatar, unpack, write_compact
from geodiff4d.avatar.drive import own_performance
from geodiff4d.avatar.export_gaussian_avatars import export_gaussian_avatars, import_gaussian_avatars
from geodiff4d.avatar.export_ply import export_ply, export_sequence
from geodiff4d.avatar.export_sog import alike, export_sog
from geodiff4d.avatar.export_spz import export_spz, packed
from geodiff4d.avatar.model import Avatar, render_splats
from geodiff4d.avatar.ply import SH_C0, read_ply, write_ply
from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import MARKER
from geodiff4d.heads import flame, load_head
from geodiff4d.render.gaussians import Gaussians
from geodiff4d.render.harmonics import sh_basis


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    head = load_head()
    return painted_avatar(head, talking(head, 3), harmonics=2)


@pytest.fixture(scope="module")
def folder(avatar, tmp_path_factory):
    path = tmp_path_factory.mktemp("avatar") / "a"
    path.mkdir()
    avatar.save(path)
    return path


@pytest.fixture(scope="module")
def on_flame(tmp_path_factory) -> Avatar:
    """An avatar on a random head with FLAME's counts and teeth."""
    path = flame_files.write_model(tmp_path_factory.mktemp("flame") / "flame2023.pkl", flame_files.arrays())
    flame.LOADED.clear()  # A head is found by its name, and other tests load others of that name.
    head = flame.load(path)
    return painted_avatar(head, talking(head, 3), gaussians=12_000, harmonics=1)


def test_spz_holds_the_same_splats(avatar, tmp_path):
    """Decoded here as the format says: position, opacity, colour, scale, rotation, each of all splats."""
    show = own_performance(avatar)
    export_spz(avatar, show, tmp_path / "a.spz", 1)
    data = np.frombuffer(gzip.decompress((tmp_path / "a.spz").read_bytes()), np.uint8)
    magic, version, n, degree, bits, flags, _ = struct.unpack_from("<4sIIBBBB", data)
    posed = avatar.posed(*show.frame(1))
    g = posed.gaussians
    assert (magic, version, n, degree, flags) == (b"NGSP", 2, len(g), 2, 0) and len(data) == 16 + n * 43
    at = np.cumsum([16, 9 * n, n, 3 * n, 3 * n, 3 * n, 24 * n])
    places, alphas, colors, scales, quats, rest = (torch.from_numpy(data[a:b].copy()) for a, b in pairwise(at))
    whole = places.reshape(n, 3, 3).int()
    fixed = whole[..., 0] + 256 * whole[..., 1] + 65536 * (whole[..., 2] - 256 * (whole[..., 2] > 127))
    assert (fixed / 2**bits - g.means).abs().max() < 1e-6
    assert (alphas / 255 - g.opacities).abs().max() < 0.5 / 255 + 1e-6
    seen = 0.5 + SH_C0 * (colors.reshape(n, 3) / 255 - 0.5) / 0.15
    assert (seen - posed.colors).abs().max() < SH_C0 * 0.5 / 255 / 0.15 + 1e-5
    assert (scales.reshape(n, 3) / 16 - 10 - g.scales.log().clamp(min=-10)).abs().max() < 0.5 / 16 + 1e-4
    turn = quats.reshape(n, 3) / 127.5 - 1
    w = (1 - turn.square().sum(-1)).clamp(min=0).sqrt()
    off = (torch.cat([w[:, None], turn], -1) * normalize(g.quats, dim=-1)).sum(-1).abs().clamp(max=1).acos()
    assert off.max() < 0.1 and off.median() < 0.01
    assert (rest.reshape(n, 8, 3) / 128 - 1 - posed.shading.in_world()).abs().max() < 0.5 / 128 + 1e-6
    far = replace(g, means=g.means + 9)
    with pytest.raises(UserError, match="within 8 m"):
        packed(far, posed.colors)


def test_sog_holds_the_same_splats_as_ply(avatar, tmp_path):
    """Decoded here as the format says, and compared with the .ply."""
    show = own_performance(avatar)
    count = export_sog(avatar, show, tmp_path / "a.sog", 1)
    export_ply(avatar, show, tmp_path / "a.ply", 1)
    ply = read_ply(tmp_path / "a.ply")
    with zipfile.ZipFile(tmp_path / "a.sog") as archive:
        meta = json.loads(archive.read("meta.json"))
        pixels = {n[:-5]: np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in archive.namelist()[1:]}
    rows = {n: p.reshape(-1, p.shape[-1])[:count].astype(np.int64) for n, p in pixels.items()}
    assert (meta["version"], meta["count"], meta["shN"]["bands"]) == (2, count, 2)
    low, high = (np.array(meta["means"][k]) for k in ("mins", "maxs"))
    logs = low + (high - low) * (256 * rows["means_u"] + rows["means_l"]) / 65535
    means = np.sign(logs) * np.expm1(np.abs(logs))
    # Which splat is which: whose place is next.
    ours = np.stack([ply[n] for n in "xyz"], 1)
    away, which = KDTree(ours).query(means)
    assert away.max() < 1e-5 and len(np.unique(which)) > 0.99 * count
    ply = {name: values[which] for name, values in ply.items()}
    for name, key, tolerance in (("scales", "scale", 0.06), ("sh0", "f_dc", 0.02)):
        read = np.array(meta[name]["codebook"])[rows[name][:, :3]]
        off = np.abs(read - np.stack([ply[f"{key}_{i}"] for i in range(3)], 1))
        assert off.mean() < tolerance / 3 and np.quantile(off, 0.999) < 4 * tolerance, name
    assert np.abs(rows["sh0"][:, 3] / 255 - 1 / (1 + np.exp(-ply["opacity"]))).max() < 0.51 / 255
    largest, three = rows["quats"][:, 3] - 252, (rows["quats"][:, :3] / 255 - 0.5) * math.sqrt(2)
    left = np.sqrt((1 - (three**2).sum(1)).clip(0))
    quats = np.stack([np.insert(t, k, w) for t, k, w in zip(three, largest, left, strict=True)])
    theirs = np.stack([ply[f"rot_{i}"] for i in range(4)], 1)
    turned = 2 * np.arccos(np.abs((quats * theirs).sum(1) / np.linalg.norm(theirs, axis=1)).clip(0, 1))
    assert turned.max() < 0.02
    label = rows["shN_labels"][:, 0] + 256 * rows["shN_labels"][:, 1]
    codes = pixels["shN_centroids"].reshape(-1, 8, 3)[label]
    rest = np.array(meta["shN"]["codebook"])[codes].transpose(0, 2, 1).reshape(count, -1)
    truth = np.stack([ply[f"f_rest_{15 * c + k}"] for c in range(3) for k in range(8)], 1)
    assert np.abs(rest - truth).mean() < 0.01


def test_a_palette_of_harmonics_has_rows_that_are_alike():
    rows = np.random.default_rng(0).integers(0, 8, (4096, 3)).astype(float)
    labels = alike(rows, 512)
    assert (np.bincount(labels) == 8).all()
    within = np.stack([rows[labels == k] for k in range(512)])
    assert (within - within.mean(1, keepdims=True)).var() < 0.1 * rows.var()


def test_ply_is_the_standard_layout_to_others(avatar, tmp_path):
    """trimesh, which knows nothing of us, reads positions and columns; the axes are the documented ones."""
    import trimesh  # takes a second, and only this file's worker needs it

    export_ply(avatar, own_performance(avatar), tmp_path / "a.ply", 1)
    cloud: Any = trimesh.load(tmp_path / "a.ply", process=False)
    table = cloud.metadata["_ply_raw"]["vertex"]["data"]
    rest = [f"f_rest_{i}" for i in range(45)]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity"]
    assert list(table.dtype.names) == [*names, *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    posed = avatar.posed(avatar.sequence[1])
    np.testing.assert_allclose(cloud.vertices, posed.gaussians.means * torch.tensor([1.0, -1.0, -1.0]), atol=1e-6)
    np.testing.assert_allclose(0.5 + 0.28209479 * table["f_dc_1"], posed.colors[:, 1], atol=1e-5)
    np.testing.assert_allclose(np.exp(table["scale_2"]), posed.gaussians.scales[:, 2], rtol=1e-4)
    np.testing.assert_allclose(1 / (1 + np.exp(-table["opacity"])), posed.gaussians.opacities, atol=1e-5)
    # Rotations: the file's covariance is ours, turned.
    q = np.stack([table[f"rot_{i}"] for i in range(4)], -1)[5]
    R = trimesh.transformations.quaternion_matrix(q / np.linalg.norm(q))[:3, :3]
    ours = trimesh.transformations.quaternion_matrix(posed.gaussians.quats[5].numpy())[:3, :3]
    turn, scale = np.diag([1.0, -1.0, -1.0]), np.diag(posed.gaussians.scales[5].numpy() ** 2)
    np.testing.assert_allclose(R @ scale @ R.T, turn @ ours @ scale @ ours.T @ turn, rtol=1e-3, atol=1e-9)


def test_ply_reads_back_as_the_same_image(avatar, tmp_path):
    """Read as other programs do: harmonics, logits, logarithms, wxyz, in axes half a turn about x away."""
    export_ply(avatar, own_performance(avatar), tmp_path / "a.ply")
    columns = read_ply(tmp_path / "a.ply")

    def read(*names: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([columns[n] for n in names], -1))

    w, x, y, z = normalize(read("rot_0", "rot_1", "rot_2", "rot_3"), dim=-1).unbind(-1)
    means, turned = read("x", "y", "z") * torch.tensor([1.0, -1, -1]), torch.stack([-x, w, -z, y], -1)
    splats = Gaussians(means, turned, read("scale_0", "scale_1", "scale_2").exp(), read("opacity")[:, 0].sigmoid())
    dc, rest = read("f_dc_0", "f_dc_1", "f_dc_2"), read(*(f"f_rest_{i}" for i in range(45))).view(-1, 3, 15)
    away = normalize(read("x", "y", "z") - avatar.camera.position * torch.tensor([1.0, -1, -1]), dim=-1)
    coefficients = torch.cat([dc[:, None], rest.mT], 1)
    colours = (0.5 + (sh_basis(away, 3)[..., None] * coefficients).sum(1)).clamp(min=0)
    assert (colours - avatar.posed(avatar.sequence[0]).colors).abs().max() > 0.1, "they do depend on the view"
    again = render_splats(splats, colours, avatar.camera).rgb
    torch.testing.assert_close(again, avatar.render(avatar.sequence[0], avatar.camera).rgb, atol=2e-3, rtol=0)


def test_sequence_is_whole_or_absent(avatar, tmp_path):
    export_sequence(avatar, own_performance(avatar), tmp_path / "all")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [
        MARKER, *(f"frame_{i:05d}.ply" for i in range(3)), "sequence.json",
    ]  # fmt: skip
    about = json.loads((tmp_path / "all/sequence.json").read_text())
    assert about["frames"] == 3 and about["fps"] == 12

    def interrupted(items, *_):
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_sequence(avatar, own_performance(avatar), tmp_path / "half", interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


def same_tree(a, b) -> bool:
    x, y = (np.load(p / "flame_param.npz") for p in (a, b))
    arrays = set(x.files) == set(y.files) and all(x[k].tobytes() == y[k].tobytes() for k in x.files)
    return arrays and (a / "point_cloud.ply").read_bytes() == (b / "point_cloud.ply").read_bytes()


def test_gaussian_avatars_and_back_to_the_bit(on_flame, tmp_path):
    export_gaussian_avatars(on_flame, tmp_path / "ga")
    again = import_gaussian_avatars(tmp_path / "ga", on_flame.head, tmp_path / "again")
    for name, value in on_flame.local.parameters.items():
        assert torch.equal(getattr(again.local, name), value), name
    for name, value in vars(on_flame.sequence).items():
        if value is not None:
            assert torch.equal(getattr(again.sequence, name), value), name
    assert torch.equal(again.camera.K, on_flame.camera.K) and again.fps == 12 and again.camera.width == 64
    loaded = Avatar.load(tmp_path / "again")
    assert torch.equal(loaded.posed(loaded.sequence[2]).colors, on_flame.posed(on_flame.sequence[2]).colors)
    export_gaussian_avatars(loaded, tmp_path / "ga2", tmp_path / "again")
    assert same_tree(tmp_path / "ga", tmp_path / "ga2")


def theirs(folder, head, n: int = 10_500, frames: int = 4) -> None:
    """Write what GaussianAvatars itself would: harmonics of degree 3, offsets, colours out of range."""
    rng = np.random.default_rng(0)

    def real(*shape):
        return rng.normal(size=shape).astype(np.float32)

    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(45))]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    columns = {k: np.zeros(n, np.float32) if k[0] == "n" else real(n) for k in names}
    columns["binding_0"] = rng.integers(0, len(head.faces), n).astype(np.float32)
    write_ply(folder / "point_cloud.ply", columns)
    arrays: dict[str, Any] = {k: 0.1 * real(frames, 3) for k in ("rotation", "neck_pose", "jaw_pose", "translation")}
    arrays |= {"static_offset": 1e-3 * real(1, 5143, 3), "dynamic_offset": 1e-4 * real(frames, 5143, 3)}
    arrays |= {"shape": real(300), "expr": real(frames, 100), "eyes_pose": real(frames, 6)}
    np.savez(folder / "flame_param.npz", **arrays)


def test_theirs_and_back_to_the_bit(on_flame, tmp_path):
    (tmp_path / "ga").mkdir()
    theirs(tmp_path / "ga", on_flame.head)
    avatar = import_gaussian_avatars(tmp_path / "ga/point_cloud.ply", on_flame.head, tmp_path / "avatar")
    assert avatar.sequence.batch == (4,) and avatar.render(avatar.sequence[0], avatar.camera).rgb.isfinite().all()
    export_gaussian_avatars(Avatar.load(tmp_path / "avatar"), tmp_path / "ga2", tmp_path / "avatar")
    assert same_tree(tmp_path / "ga", tmp_path / "ga2")
    # Colours that were changed since are ours, not those that were kept; what depends on the view went both ways.
    moved = replace(avatar, local=replace(avatar.local, color_logits=avatar.local.color_logits + 0.1))
    export_gaussian_avatars(moved, tmp_path / "ga3", tmp_path / "avatar")
    before, after = (read_ply(tmp_path / k / "point_cloud.ply") for k in ("ga", "ga3"))
    assert not np.allclose(before["f_dc_1"], after["f_dc_1"], atol=1e-2)
    np.testing.assert_allclose(before["f_rest_27"], after["f_rest_27"], atol=1e-4)


def test_compact_form(avatar, folder, tmp_path):
    size = write_compact(folder, tmp_path / "a.g4d")
    assert size < 2_000_000 and size < 0.4 * sum(p.stat().st_size for p in folder.iterdir())
    packed = open_avatar(tmp_path / "a.g4d")
    torch.testing.assert_close(packed.sequence.expr, avatar.sequence.expr, atol=1e-4, rtol=0)
    assert torch.equal(packed.local.face_index, avatar.local.face_index) and torch.equal(packed.shape, avatar.shape)
    for row in (0, 2):
        a, b = (x.render(x.sequence[row], avatar.camera.resized(128, 128)) for x in (avatar, packed))
        inside = a.alpha[0] > 0.5
        assert -10 * math.log10(float((a.rgb - b.rgb)[:, inside].square().mean())) > 40
    unpack(tmp_path / "a.g4d", tmp_path / "unpacked")
    assert write_compact(tmp_path / "unpacked", tmp_path / "b.g4d") < 1.01 * size


def test_a_damaged_compact_file_is_one_line(folder, tmp_path):
    write_compact(folder, tmp_path / "a.g4d")
    whole = (tmp_path / "a.g4d").read_bytes()
    for seed in range(12):
        random = np.random.default_rng(seed)
        data = bytearray(whole)
        for at in random.integers(100, len(whole) // 2, 20):
            data[at] ^= 0xFF
        (tmp_path / "a.g4d").write_bytes(data)
        with pytest.raises(UserError, match=r"truncated or not a compact avatar|is damaged"):
            unpack(tmp_path / "a.g4d", tmp_path / "out")


def test_networks_leave_as_they_are_at_rest(on_flame, tmp_path):
    """GaussianAvatars knows no networks: at rest both look the same, bound to FLAME's own triangles."""
    learned = with_networks(on_flame, None)
    rest = replace(learned.head.neutral(), shape=learned.shape)
    expected, plain = learned.posed(rest), on_flame.posed(rest)
    assert (expected.gaussians.means - plain.gaussians.means).norm(dim=-1).max() > 1e-4
    export_gaussian_avatars(learned, tmp_path / "ga")
    again = import_gaussian_avatars(tmp_path / "ga", on_flame.head, tmp_path / "again").posed(rest)
    # Slivers of the random head have no frame to be expressed in.
    mesh = learned.head.pose(rest)
    whole = face_frames(mesh.vertices, mesh.faces).scale[expected.face_index] > 1e-3
    for name in ("means", "scales", "opacities"):
        a, b = getattr(again.gaussians, name)[whole], getattr(expected.gaussians, name)[whole]
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(again.colors, expected.colors, atol=1e-3, rtol=0)


def test_compact_form_with_networks(avatar, tmp_path):
    learned = with_networks(avatar, torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(2)))
    (tmp_path / "a").mkdir()
    learned.save(tmp_path / "a")
    assert write_compact(tmp_path / "a", tmp_path / "a.g4d") < 2_000_000
    packed, camera = open_avatar(tmp_path / "a.g4d"), avatar.camera.resized(128, 128)
    assert packed.tokens is not None and learned.tokens is not None
    a = learned.render(learned.sequence[1], camera, tokens=learned.tokens[1])
    b = packed.render(packed.sequence[1], camera, tokens=packed.tokens[1])
    plain = avatar.render(avatar.sequence[1], camera)
    inside = a.alpha[0] > 0.5

    def psnr(x, y):
        return -10 * math.log10(float((x.rgb - y.rgb)[:, inside].square().mean()))

    assert psnr(a, b) > max(40, psnr(a, plain) + 6)


def test_damaged_files_and_other_heads(avatar, folder, on_flame, tmp_path, capsys):
    ply = tmp_path / "a.ply"
    export_ply(avatar, own_performance(avatar), ply)
    whole = ply.read_bytes()
    for data, says in (
        (whole[:-100], "truncated"), (whole[:300], "header has no end"), (b"\x00" * 40, "not a .ply"),
        (whole.replace(b"binary_little", b"binary_big___", 1), "not a binary little-endian"),
        (whole.replace(b"property float x\n", b"property list uchar int x\n", 1), "is it a mesh"),
    ):  # fmt: skip
        ply.write_bytes(data)
        with pytest.raises(UserError, match=says):
            read_ply(ply)
    with pytest.raises(UserError, match="FLAME with teeth"):
        export_gaussian_avatars(avatar, tmp_path / "ga")
    (tmp_path / "theirs").mkdir()
    theirs(tmp_path / "theirs", on_flame.head, n=20)
    with pytest.raises(UserError, match="openhead"):
        import_gaussian_avatars(tmp_path / "theirs", avatar.head, tmp_path / "out")
    cut = tmp_path / "theirs/point_cloud.ply"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        import_gaussian_avatars(tmp_path / "theirs", on_flame.head, tmp_path / "out")
    write_compact(folder, tmp_path / "a.g4d")
    data = (tmp_path / "a.g4d").read_bytes()
    (tmp_path / "cut.g4d").write_bytes(data[: len(data) // 2])
    for line in (
        f"import compact {tmp_path}/cut.g4d {tmp_path}/out", f"render {tmp_path}/cut.g4d --out {tmp_path}/out.mp4",
        f"export {folder} {tmp_path}/out --to gaussian-avatars", f"export {folder} {tmp_path}/out --to vhap",
        f"export {folder} {tmp_path}/out.ply --frame 99", f"export {folder} {tmp_path}/out.txt --to ply",
        f"export {folder} {tmp_path}/a.g4d --to compact", f"import gaussian-avatars {tmp_path}/theirs {tmp_path}/out",
        f"export {tmp_path}/theirs {tmp_path}/out.ply",
    ):  # fmt: skip
        assert main(line.split()) == 2, line
    assert capsys.readouterr().err.strip().count("\n") == 8 and not list(tmp_path.glob("out*"))
