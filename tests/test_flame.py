"""FLAME from generated files in its formats, against a slow skinning of its own in float64."""

import hashlib
import os
import pickle
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from flame_files import arrays, python2, write_beside, write_model, write_obj
from geodiff4d.core.errors import UserError
from geodiff4d.heads import Head, HeadParams, flame, flame_teeth, load_head, openhead

N = 5023


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model of FLAME's size with everything beside it: (its arrays, its file)."""
    folder = tmp_path_factory.mktemp("flame") / "FLAME2023"
    a = arrays()
    path = write_model(folder / "flame2023.pkl", a)
    write_beside(folder, a)
    return a, path


@pytest.fixture(scope="module")
def head(full) -> Head:
    return load_head(str(full[1]))


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Other tests' models are not candidates for a name, nor are the user's."""
    monkeypatch.setattr(flame, "LOADED", [])
    monkeypatch.delenv(flame.ENVIRONMENT, raising=False)


def small(path, seed: int = 0, **more):
    return write_model(path, arrays(80, 150, seed), **more)


def random_params(head: Head, *batch: int, seed: int = 0) -> HeadParams:
    g = torch.Generator().manual_seed(seed)
    p = head.neutral(*batch).map(lambda v: torch.randn(v.shape, generator=g))
    angles = {k: 0.4 * getattr(p, k) for k in ("rotation", "neck_pose", "jaw_pose", "eyes_pose")}
    return replace(p, **angles, static_offset=1e-3 * torch.randn(*batch, len(head.template), 3, generator=g))


def slow_flame(a: dict, lids: np.ndarray, p: HeadParams) -> np.ndarray:
    """FLAME's equations on the file's own arrays, joint by joint, in float64 and without the teeth."""
    q = {k: None if v is None else v.double().numpy() for k, v in vars(p).items()}
    v = (
        a["v_template"]
        + a["shapedirs"] @ np.concatenate([q["shape"], q["expr"]])
        + q["static_offset"][: len(a["v_template"])]
    )
    joints = a["J_regressor"] @ v
    R = [np.eye(3)] * 5
    for j, angle in enumerate([q["rotation"], q["neck_pose"], q["jaw_pose"], *np.split(q["eyes_pose"], 2)]):
        w, U = np.linalg.eig(np.cross(np.eye(3), angle))  # of the cross product's matrix
        R[j] = (U @ np.diag(np.exp(w)) @ np.linalg.inv(U)).real
    v = v + a["posedirs"] @ np.concatenate([(r - np.eye(3)).ravel() for r in R[1:]])
    parents = [-1, *a["kintree_table"][0][1:].astype(int)]
    world: list[tuple[np.ndarray, np.ndarray]] = []
    for j, parent in enumerate(parents):
        if parent < 0:
            world.append((R[j], joints[j]))
        else:
            turn, at = world[parent]
            world.append((turn @ R[j], at + turn @ (joints[j] - joints[parent])))
    out = np.zeros_like(v)
    for j, (turn, at) in enumerate(world):
        out += a["weights"][:, j : j + 1] * ((v - joints[j]) @ turn.T + at)
    return out + (lids @ q["eyelids"]) @ R[0].T + q["translation"]


def test_posing_matches_the_file_in_float64(full, head):
    a, path = full
    lids = np.stack([np.load(path.parent / f"{side}_eyelid.npy") for side in "lr"], -1)
    params = random_params(head, 3)
    posed = head.pose(params).vertices
    for i in range(3):
        want = slow_flame(a, lids, params[i])
        np.testing.assert_allclose(posed[i, :N].numpy(), want, atol=3e-6)
    assert np.abs(want - a["v_template"]).max() > 0.1


VARIANTS = {
    "flame2020": ("FLAME2020/generic_model.pkl", {}),
    "flame2023": ("FLAME2023/flame2023.pkl", {}),
    "flame2023-no-jaw": ("FLAME2023/flame2023_no_jaw.pkl", {}),
    "flame2023-open": ("FLAME2023_Open/flame2023.pkl", {flame.OPEN_KEY: {"expr_source": "SUPR_head", "n_expr": 100}}),
}
"""The models by their files, as they are handed out, and what a file has beside the arrays."""


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_poses_as_its_file_says(tmp_path, name):
    """And its coefficients are refused by every other, by name: in size they are alike."""
    file, more = VARIANTS[name]
    a = arrays(80, 150, seed=list(VARIANTS).index(name))
    head = load_head(write_model(tmp_path / file, a, **more))
    params = random_params(head, 2)
    posed = head.pose(params).vertices
    for i in range(2):
        one = replace(params[i], eyelids=torch.zeros(2))
        np.testing.assert_allclose(posed[i].numpy(), slow_flame(a, np.zeros((80, 3, 2)), one), atol=3e-6)
    assert head.name == name
    for other in VARIANTS.keys() - {name}:
        with pytest.raises(UserError, match=f"asked for is {other}, found {name} .*do not mix"):
            load_head(other)


def test_the_api_is_openheads(full, head):
    own = load_head("openhead")
    assert type(head) is type(own) and len(vars(head)) == len(vars(own))
    assert head.name == "flame2023" and head.shape_basis.shape[-1] == 300 and head.expr_basis.shape[-1] == 100
    assert len(head.expression_names) == 100 == len(set(head.expression_names))
    p = head.neutral(2)
    assert p.eyelids is not None and p.eyelids.shape == (2, 2)
    torch.testing.assert_close(head.pose(p).vertices[0], head.template, atol=1e-6, rtol=0)
    assert {v.dtype for v in vars(head).values() if isinstance(v, torch.Tensor)} == {torch.float32, torch.int64}
    for part in ("skin", "eyes", "left_eye", "right_eye", "teeth", "neck", "lips", "ears", "scalp", "lids"):
        assert head.regions[part].any() and head.regions[part].shape == (len(head.template),), part
    assert (head.regions["eyes"] & head.regions["skin"]).sum() == 0
    assert (head.skin_weights[head.regions["left_eye"], 3] > 0.5).all()


def test_eyelids_turn_with_the_head(head):
    """Pixel3DMM's lids are added to the still head, which its global rotation then turns."""
    closed = replace(head.neutral(), eyelids=torch.tensor([1.0, 0.5]))
    turn = torch.tensor([0.0, np.pi / 2, 0.0])
    moved = [
        head.pose(replace(closed, rotation=r)).vertices - head.pose(replace(head.neutral(), rotation=r)).vertices
        for r in (torch.zeros(3), turn)
    ]
    torch.testing.assert_close(moved[1], torch.stack([moved[0][:, 2], moved[0][:, 1], -moved[0][:, 0]], -1))


def test_chumpy_and_plain_files_are_the_same_head(tmp_path):
    """A file that somebody freed of chumpy is as good as FLAME's own, and so is an .npz."""
    a = arrays(80, 150)
    own = load_head(small(tmp_path / "flame2023.pkl"))
    plain, converted = tmp_path / "flame2023_plain.pkl", tmp_path / "flame2023_converted.npz"
    plain.write_bytes(pickle.dumps(a))
    np.savez(converted, **a)
    for path in (plain, converted):
        other = load_head(path)
        assert other.name == "flame2023" and torch.equal(other.shape_basis, own.shape_basis)
        assert torch.equal(other.joint_regressor, own.joint_regressor)
        assert other.eyelid_basis is None and other.neutral().eyelids is None


# Teeth


def test_teeth_are_vhaps(full, head):
    """Counts, order and rigidity: what static offsets and GaussianAvatars' bindings rely on."""
    assert head.template.shape == (5143, 3) and head.faces.shape == (10144, 3)
    faces = flame_teeth.faces()
    # A few rows of VHAP's table, written out.
    known = {0: (0, 31, 30), 27: (14, 44, 43), 28: (60, 75, 76), 42: (67, 82, 68), 56: (75, 30, 76), 70: (82, 37, 38),
             84: (45, 46, 15), 98: (52, 23, 22), 112: (90, 106, 105), 126: (97, 98, 112), 140: (105, 106, 45),
             154: (112, 53, 52), 155: (112, 113, 53), 167: (118, 119, 59)}  # fmt: skip
    assert len(faces) == 168
    for row, corners in known.items():
        got = tuple(int(i) for i in faces[row])
        assert sorted(got) == sorted(corners), row
        assert got in {corners, corners[1:] + corners[:1], corners[2:] + corners[:2]}, row
    assert sorted(set(faces.ravel())) == list(range(120))
    p = random_params(head)
    p = replace(p, static_offset=None, shape=p.shape * 0)
    posed, T = head.pose(p), head.pose(p).T_world_joint
    for rows, joint in ((flame_teeth.UPPER, 1), (flame_teeth.LOWER, 2)):
        index = torch.tensor([N + r * 15 + i for r in rows for i in range(15)])
        rigid = head.template[index] @ T[joint, :3, :3].T + T[joint, :3, 3]
        torch.testing.assert_close(posed.vertices[index], rigid, atol=1e-6, rtol=0)


def test_teeth_stand_behind_the_lips():
    """On a mouth that is one: rims 1 cm apart at z = 10 cm."""
    template = np.zeros((N, 3))
    x = np.linspace(-0.025, 0.025, 15)
    for rim, y in ((flame_teeth.UPPER_LIP, 0.005), (flame_teeth.LOWER_LIP, -0.005)):
        template[list(rim)] = np.stack([x, np.full(15, y), np.full(15, 0.1)], 1)
    teeth = flame_teeth.positions(template).reshape(8, 15, 3)
    assert (teeth[..., 2] < 0.1 - 0.0149).all() and np.allclose(teeth[..., 0], x)
    upper, lower = teeth[list(flame_teeth.UPPER)], teeth[list(flame_teeth.LOWER)]
    np.testing.assert_allclose([upper[..., 1].min(), upper[..., 1].max()], [0.001, 0.021])
    np.testing.assert_allclose([lower[..., 1].min(), lower[..., 1].max()], [-0.021, -0.001])
    normal = np.cross(
        *(
            teeth.reshape(-1, 3)[flame_teeth.faces()[:28, i]] - teeth.reshape(-1, 3)[flame_teeth.faces()[:28, 0]]
            for i in (1, 2)
        )
    )
    assert (np.abs(normal[:, 2]) > np.abs(normal[:, :2]).max(1)).all() and len(np.unique(np.sign(normal[:, 2]))) == 1


def test_lower_teeth_follow_the_chin_where_no_jaw_turns():
    rng = np.random.default_rng(0)
    expr, weights = rng.normal(size=(N, 3, 4)), np.eye(5)[rng.integers(0, 5, N)]
    basis = flame_teeth.expression_basis(expr, weights, no_jaw=True).reshape(8, 15, 3, 4)
    for row in range(8):
        want = expr[weights[:, 2] == 1].mean(0) if row in flame_teeth.LOWER else np.zeros((3, 4))
        np.testing.assert_allclose(basis[row], np.tile(want, (15, 1, 1)))
    assert not flame_teeth.expression_basis(expr, weights, no_jaw=False).any()


# Years


def test_the_year_is_read_from_the_content(tmp_path, monkeypatch):
    a = arrays(80, 150)
    open_key = {"expr_source": "SUPR_head", "n_expr": 100}
    named = write_model(tmp_path / "a" / "flame2023.pkl", a, supr_expression_metadata=open_key)
    assert load_head(named).name == "flame2023-open", "the package of 2023 Open has had this file name too"
    path = write_model(tmp_path / "b" / "generic_model.pkl", a)
    unknown = load_head(path).name
    assert unknown.startswith("flame-") and unknown == load_head(write_model(tmp_path / "c" / "x.pkl", a)).name
    assert unknown != load_head(small(tmp_path / "d" / "x.pkl", seed=1)).name
    assert load_head(write_model(tmp_path / "FLAME2020" / "generic_model.pkl", a)).name == "flame2020"
    monkeypatch.setitem(flame.OFFICIAL, hashlib.sha256(path.read_bytes()).hexdigest(), "flame2020")
    copy = tmp_path / "d" / "generic_model.pkl"
    shutil.copy(path, copy)
    assert load_head(copy).name == "flame2020" and flame.read_model(copy).evidence == "the official file"


def test_open_is_known_by_its_mean_head(tmp_path):
    a = arrays(80, 150)
    low, high = np.array(flame.OPEN_BOUNDS)
    t = a["v_template"]
    a["v_template"] = low + (t - t.min(0)) / np.ptp(t, axis=0) * (high - low)
    assert load_head(write_model(tmp_path / "converted.pkl", a)).name == "flame2023-open"


def test_a_name_of_another_year_is_refused(tmp_path, monkeypatch):
    a = arrays(80, 150)
    for name, year in (("FLAME2020/generic_model.pkl", "2020"), ("flame2023_no_jaw.pkl", "2023-no-jaw")):
        path = write_model(tmp_path / name, a, supr_expression_metadata={"n_expr": 100})
        with pytest.raises(
            UserError, match=f"named as flame{year} but holds flame2023-open: models of different years"
        ):
            load_head(path)


def test_a_clips_head_is_found_by_its_name_only_in_the_right_year(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="FLAME, which you have to bring"):
        load_head("flame2023")
    old, new = small(tmp_path / "flame2020.pkl"), small(tmp_path / "flame2023.pkl", seed=1)
    monkeypatch.setenv(flame.ENVIRONMENT, str(old))
    with pytest.raises(UserError, match=r"asked for is flame2023, found flame2020 .*do not mix"):
        load_head("flame2023")
    assert load_head("flame").name == "flame2020", "a VHAP export does not say"
    monkeypatch.setenv(flame.ENVIRONMENT, str(tmp_path))
    assert load_head("flame2023").name == "flame2023" and load_head("flame2020").name == "flame2020"
    with pytest.raises(UserError, match="does not say which year: found flame2020"):
        load_head("flame")
    monkeypatch.delenv(flame.ENVIRONMENT)
    monkeypatch.setattr(flame, "LOADED", [])
    load_head(new)
    assert load_head("flame2023") is load_head(new), "a model that was loaded is known"


def test_coefficients_of_another_head_are_refused(head):
    with pytest.raises(ValueError, match="parameters of another head"):
        head.pose(load_head("openhead").neutral())


# Beside the model


def test_landmarks_are_those_of_the_files(full, head, tmp_path):
    a, path = full
    embedding = np.load(path.parent / "landmark_embedding_with_eyes.npy", allow_pickle=True)[()]
    assert len(head.landmarks68.face_index) == 68
    assert head.landmarks68.face_index.tolist() == embedding["full_lmk_faces_idx"][0, :68].tolist()
    point = head.landmarks68.on(head.template, head.faces)[30].numpy()
    corners = a["v_template"][a["f"][embedding["full_lmk_faces_idx"][0, 30]]]
    np.testing.assert_allclose(point, embedding["full_lmk_bary_coords"][0, 30] @ corners, atol=1e-6)
    assert len(head.mediapipe_index) == 105 and head.mediapipe_index.max() < 478
    # Without the full embedding: the contour of a frontal head and the static 51.
    folder = tmp_path / "m"
    model = small(folder / "flame2020.pkl")
    write_beside(folder, arrays(80, 150))
    (folder / "landmark_embedding_with_eyes.npy").unlink()
    other = load_head(folder)
    contour = np.load(folder / "flame_dynamic_embedding.npy", allow_pickle=True)[()]
    assert other.landmarks68.face_index[:17].tolist() == contour["lmk_face_idx"][0].tolist()
    assert load_head(model) is other


def test_the_atlas_is_the_templates(full, head, tmp_path):
    path = full[1]
    assert head.uv.min() >= 0 and head.uv.max() <= 1 and head.uv_faces.shape == head.faces.shape
    lines = (path.parent / "head_template_mesh.obj").read_text().splitlines()
    first = [int(c.split("/")[1]) - 1 for c in next(s for s in lines if s.startswith("f ")).split()[1:]]
    vt = [[float(x) for x in s.split()[1:]] for s in lines if s.startswith("vt ")]
    want = torch.tensor([[vt[i][0], 1 - vt[i][1]] for i in first])
    torch.testing.assert_close(head.uv[head.uv_faces[0]], want)
    # The same mesh with its triangles in another order and turned round.
    b = arrays(80, 150)
    small(tmp_path / "flame2020.pkl")
    rng = np.random.default_rng(0)
    uv, uv_faces, order = rng.random((90, 2)), rng.integers(0, 90, (150, 3)), rng.permutation(150)
    write_obj(
        tmp_path / "head_template.obj", b["v_template"], uv, b["f"][order][:, [1, 2, 0]], uv_faces[order][:, [1, 2, 0]]
    )
    other = load_head(tmp_path)
    np.testing.assert_allclose(other.uv[other.uv_faces[7]].numpy(), uv[uv_faces[7]] * [1, -1] + [0, 1], atol=1e-6)


def test_the_texture_file_has_an_atlas_too(tmp_path):
    small(tmp_path / "flame2020.pkl")
    rng = np.random.default_rng(0)
    vt, ft = rng.random((90, 2)), rng.integers(0, 90, (150, 3))
    np.savez(tmp_path / "FLAME_texture.npz", vt=vt, ft=ft, mean=np.zeros(3))
    head = load_head(tmp_path)
    assert head.uv_faces.tolist() == ft.tolist()
    np.testing.assert_allclose(head.uv.numpy(), vt * [1, -1] + [0, 1], atol=1e-6)


def test_without_an_atlas_a_cylinder_serves(tmp_path):
    head = load_head(small(tmp_path / "flame2020.pkl"))
    assert head.uv.min() >= 0 and head.uv.max() <= 1 and head.uv_faces.shape == head.faces.shape
    skin = head.regions["skin"][head.faces].all(1)
    assert np.ptp(head.uv[head.uv_faces][skin][..., 0].numpy(), axis=1).max() <= 0.5 + 1e-6, "no face is smeared"


OUTSIDE = {"full_lmk_faces_idx": np.full(68, 9000), "full_lmk_bary_coords": np.full((68, 3), 1 / 3)}
FOREIGN = {
    "FLAME_masks.pkl": (lambda f: f.write_bytes(python2({"lips": np.array([4, 99])})), "vertices up to 99"),
    "landmark_embedding.npy": (lambda f: np.save(f, np.array(OUTSIDE, dtype=object)), "faces up to 9000"),
    "head_template_mesh.obj": (
        lambda f: write_obj(f, np.zeros((81, 3)), np.zeros((3, 2)), *np.zeros((2, 150, 3), int)),
        "81 vertices",
    ),
    "FLAME_texture.npz": (lambda f: np.savez(f, vt=np.zeros((3, 2)), ft=np.zeros((9, 3), int)), "texture faces 9"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_another_model_are_refused(tmp_path, name):
    model = small(tmp_path / "flame2020.pkl")
    write, why = FOREIGN[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} does not belong to .*{why}.*do not mix") as caught:
        load_head(model)
    assert "\n" not in str(caught.value)


def test_lids_come_in_pairs(tmp_path):
    model = small(tmp_path / "flame2020.pkl")
    np.save(tmp_path / "l_eyelid.npy", np.zeros((80, 3)))
    with pytest.raises(UserError, match="is alone"):
        load_head(model)
    np.save(tmp_path / "r_eyelid.npy", np.zeros((5023, 3)))
    with pytest.raises(UserError, match=r"r_eyelid.npy does not belong .*5023×3 numbers for 80 vertices"):
        load_head(model)


# A model that came alone


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """A person whom OpenHead's basis cannot quite express, written as a FLAME file without anything beside it."""
    own = openhead.load_wide()
    g = torch.Generator().manual_seed(1)
    shaped = own.shape(replace(own.neutral(), shape=torch.randn(own.shape_basis.shape[-1], generator=g)))
    a = arrays(80, 150)
    n = len(own.template)
    a |= {"v_template": 0.95 * shaped.vertices.double().numpy() + [0, 0.03, -0.05], "f": own.faces.numpy()}
    a |= {"weights": own.skin_weights.double().numpy(), "J_regressor": own.joint_regressor.double().numpy()}
    a |= {"shapedirs": np.zeros((n, 3, 400), np.float16), "posedirs": np.zeros((n, 3, 36), np.float16)}
    path = tmp_path_factory.mktemp("lone") / "flame2023.pkl"
    path.write_bytes(pickle.dumps(a))
    return own, load_head(path), path


def test_openhead_hands_over_landmarks_and_regions(lone):
    own, head, _ = lone
    for kind, most in (("landmarks68", 2.5), ("mediapipe", 2.0)):
        got, truth = (getattr(h, kind).on(head.template, head.faces) for h in (head, own))
        assert (got - truth).norm(dim=1).mean() * 1000 < most, kind
    assert torch.equal(head.mediapipe_index, own.mediapipe_index)
    for name in ("lips", "brows", "lids", "scalp", "ears", "mouth"):
        both, any_ = (head.regions[name] & own.regions[name]).sum(), (head.regions[name] | own.regions[name]).sum()
        assert both / any_ > 0.6, name


def test_what_is_there_is_told(lone, full):
    told = flame.describe(lone[2])
    assert told[0] == f"flame2023 (by its name), {len(lone[0].template)} vertices"
    assert "68 landmarks: handed over from OpenHead" in told and "atlas: a cylinder" in told
    told = flame.describe(full[1].parent)
    assert told[0].endswith("5143 vertices with teeth") and "regions: FLAME_masks.pkl" in told
    assert "eyelids: l_eyelid.npy, r_eyelid.npy" in told


# Bad files


def broken(**change) -> bytes:
    a = arrays(80, 150) | change
    return python2({k: v for k, v in a.items() if v is not None})


BAD = {
    "no template": (broken(v_template=None), "lacks v_template"),
    "SMPL": (broken(weights=np.zeros((80, 24))), "has 24 joints: .* body or hand"),
    "short basis": (broken(shapedirs=np.zeros((80, 3, 10))), "`shapedirs` should be 80×3×400 numbers, is 80×3×10"),
    "not finite": (broken(posedirs=np.full((80, 3, 36), np.nan)), "not finite"),
    "faces outside": (broken(f=np.full((150, 3), 80)), "points outside its 80 vertices"),
    "other tree": (broken(kintree_table=np.zeros((2, 5), int)), "hang together otherwise"),
    "weights": (broken(weights=np.zeros((80, 5))), "do not add up to 1"),
    "text": (broken(f="faces"), "`f` should be"),
    "a list": (python2([1, 2]), "expected a dict"),
    "hostile": (b"cos\nsystem\n(S'true'\ntR.", "holds os.system"),
    "cut": (broken()[:5000], "damaged"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path, what):
    data, message = BAD[what]
    (tmp_path / "flame2020.pkl").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_head(tmp_path / "flame2020.pkl")
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="no FLAME model at"):
        load_head(tmp_path / "flame.pkl")
    with pytest.raises(UserError, match="expected one FLAME model in it, got none"):
        load_head(tmp_path)
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as file:
        file.writestr("v_template.npy", b"nonsense")
    with pytest.raises(UserError, match="lacks f, shapedirs"):
        load_head(tmp_path / "z.npz")
    with pytest.raises(UserError, match="no head at"):
        openhead.load(tmp_path / "no.npz")


def test_a_changed_file_is_read_again(tmp_path):
    path = small(tmp_path / "flame2020.pkl")
    first = load_head(path)
    small(path, seed=5)
    os.utime(path, ns=(1, 1))
    assert not torch.equal(load_head(path).template, first.template)


def test_generated_files_are_flames_size(full):
    """The official 2020 and 2023 files have 53,023,716 bytes."""
    assert abs(full[1].stat().st_size - 53_023_716) < 200_000


def test_doctor_tells_what_it_finds(lone, tmp_path, monkeypatch):
    from geodiff4d.cli.doctor import flame_model

    assert flame_model()[0].state == "missing"
    monkeypatch.setenv(flame.ENVIRONMENT, str(lone[2]))
    (found,) = flame_model()
    assert found.state == "ok" and "flame2023 (by its name)" in found.detail and "atlas: a cylinder" in found.detail
    (tmp_path / "x.pkl").write_bytes(BAD["cut"][0])
    monkeypatch.setenv(flame.ENVIRONMENT, str(tmp_path))
    assert flame_model()[0].state == "failed"
