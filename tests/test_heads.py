"""The rig against a slow oracle, and OpenHead against anatomy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix, look_at
from geodiff4d.heads import HeadParams, load_head
from geodiff4d.heads.openhead import OPENHEAD, load, load_attributes, load_field, load_shell, load_wide
from geodiff4d.heads.rig import PARENTS, Head, Landmarks
from geodiff4d.render.meshes import rasterize, rasterize_uv

ARKIT = {
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen",
    "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight",
    "mouthFunnel", "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight",
    "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    "mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft",
    "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
}  # fmt: skip

MIRRORED = [(i, 16 - i) for i in range(8)] + [(17 + i, 26 - i) for i in range(5)]
MIRRORED += [
    (31, 35),
    (32, 34),
    (36, 45),
    (37, 44),
    (38, 43),
    (39, 42),
    (40, 47),
    (41, 46),
    (48, 54),
    (49, 53),
    (50, 52),
]
MIRRORED += [(59, 55), (58, 56), (60, 64), (61, 63), (67, 65)]


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


def tiny_head(pose_correctives: bool = False) -> Head:
    """Seven random vertices with every optional part, in float64."""
    g = torch.Generator().manual_seed(3)

    def r(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    landmarks = Landmarks(torch.tensor([0]), torch.full((1, 3), 1 / 3))
    return Head(
        name="tiny", template=r(7, 3), faces=torch.tensor([[0, 1, 2], [2, 3, 4], [4, 5, 6]]), shape_basis=r(7, 3, 2),
        expr_basis=r(7, 3, 3), joint_regressor=r(5, 7).softmax(-1), skin_weights=r(7, 5).softmax(-1),
        uv=torch.rand(7, 2),
        uv_faces=torch.tensor([[0, 1, 2], [2, 3, 4], [4, 5, 6]]), regions={}, expression_names=("a", "b", "c"),
        landmarks68=landmarks, mediapipe=landmarks, mediapipe_index=torch.tensor([0]),
        pose_basis=0.1 * r(7, 3, 36) if pose_correctives else None,
        eyelid_basis=0.1 * r(7, 3, 2) if pose_correctives else None,
    )  # fmt: skip


def random_params(head: Head, *batch: int, seed: int = 0, angle: float = 0.5) -> HeadParams:
    g = torch.Generator().manual_seed(seed)
    like = head.neutral(*batch)
    return like.map(lambda v: angle * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype))


def action(head: Head, **weights: float) -> torch.Tensor:
    """Return how far the given actions move each vertex."""
    expr = torch.zeros(52)
    for name, weight in weights.items():
        expr[head.expression_names.index(name)] = weight
    return head.pose(replace(head.neutral(), expr=expr)).vertices - head.template


def slow_pose(head: Head, p: HeadParams) -> np.ndarray:
    """One head, vertex by vertex and joint by joint, in numpy."""
    n = {f: None if v is None else v.numpy() for f, v in vars(p).items()}
    v = head.template.numpy() + head.shape_basis.numpy() @ n["shape"] + head.expr_basis.numpy() @ n["expr"]
    J = head.joint_regressor.numpy() @ v
    angles = [n["rotation"], n["neck_pose"], n["jaw_pose"], n["eyes_pose"][:3], n["eyes_pose"][3:]]
    R = []
    for a in angles:  # the exponential map as its power series: nothing in common with Rodrigues' formula
        K = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
        term, total = np.eye(3), np.eye(3)
        for k in range(1, 40):
            term = term @ K / k
            total = total + term
        R.append(total)
    if head.pose_basis is not None:
        v = v + head.pose_basis.numpy() @ np.concatenate([(r - np.eye(3)).ravel() for r in R[1:]])
    out = np.zeros_like(v)
    for i in range(len(v)):
        for j in range(5):
            x, k = v[i], j
            while k >= 0:
                x = R[k] @ (x - J[k]) + J[k]
                k = PARENTS[k]
            out[i] += head.skin_weights[i, j].item() * x
    if head.eyelid_basis is not None:
        out = out + (head.eyelid_basis.numpy() @ n["eyelids"]) @ R[0].T
    return out + n["translation"]


@pytest.mark.parametrize("correctives", [False, True])
def test_pose_matches_slow_skinning(correctives):
    head = tiny_head(correctives)
    params = random_params(head, 2, 3)
    posed = head.pose(params)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(posed.vertices[i, j].numpy(), slow_pose(head, params[i][j]), atol=1e-12)


def test_pose_has_correct_gradients():
    head = tiny_head(pose_correctives=True)
    p = random_params(head, 2)
    names = ["shape", "expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation", "eyelids"]
    inputs = [getattr(p, n).clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(
        lambda *x: head.pose(HeadParams(**dict(zip(names, x, strict=True)))).vertices, inputs
    )


def test_gradient_at_rest_is_finite():
    head = tiny_head()
    p = head.neutral().map(lambda v: v.clone().requires_grad_())
    head.pose(p).vertices.square().sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in (p.rotation, p.jaw_pose, p.eyes_pose, p.shape))


vectors = st.tuples(*[st.sampled_from([0.0, 1e-9, -1e-5, 0.4, -2.0, np.pi])] * 3)


@settings(max_examples=25, deadline=None)
@given(vectors, vectors, st.integers(0, 5))
def test_global_motion_is_rigid(rotation, translation, seed):
    """Rotation turns everything about the root joint; translation comes after. Joint transforms go along."""
    head = tiny_head()
    p = random_params(head, seed=seed)
    zero = torch.zeros(3, dtype=torch.float64)
    rotation, translation = torch.tensor(rotation).double(), torch.tensor(translation).double()
    still = head.pose(replace(p, rotation=zero, translation=zero))
    moved = head.pose(replace(p, rotation=rotation, translation=translation))
    root = head.shape(p).joints[0]
    R = axis_angle_to_matrix(rotation)
    torch.testing.assert_close(moved.vertices, (still.vertices - root) @ R.T + root + translation)
    torch.testing.assert_close(moved.T_world_joint[..., :3, :3], R @ still.T_world_joint[..., :3, :3])


def test_joint_transforms_carry_rigid_vertices(head):
    p = random_params(head, angle=0.1)
    posed, shaped = head.pose(p), head.shape(p)
    eye = head.regions["left_eye"]
    T = posed.T_world_joint[3]
    torch.testing.assert_close(posed.vertices[eye], shaped.vertices[eye] @ T[:3, :3].T + T[:3, 3], atol=1e-6, rtol=0)


def test_parameters_survive_a_file(tmp_path, head):
    p = random_params(head, 2)
    p.save(tmp_path / "p.npz")
    back = HeadParams.load(tmp_path / "p.npz")
    assert all(v is None or torch.equal(v, getattr(back, k)) for k, v in vars(p).items()) and back.static_offset is None
    assert back.without_expression().expr.abs().sum() == 0 and torch.equal(
        back.without_expression().rotation, p.rotation
    )
    whole = (tmp_path / "p.npz").read_bytes()
    (tmp_path / "p.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"p\.npz is damaged"):
        HeadParams.load(tmp_path / "p.npz")


def test_parameters_of_another_head_are_refused(head):
    with pytest.raises(ValueError, match="parameters of another head"):
        head.pose(tiny_head().neutral().map(lambda v: v.float()))


# OpenHead


def test_asset_is_small_and_complete(head):
    assert OPENHEAD.stat().st_size < 8e6
    assert len(head.expression_names) == 52 and set(head.expression_names) == ARKIT
    assert head.shape_basis.shape[-1] == 64 and load_wide().shape_basis.shape[-1] >= 128
    assert torch.equal(load_wide().shape_basis[..., :64], head.shape_basis)
    parts = ["skin", "lips", "brows", "lids", "eyes", "left_eye", "right_eye", "scalp", "ears"]
    parts += ["teeth", "gums", "tongue", "mouth", "sockets", "cap", "neck"]
    for name in parts:
        assert head.regions[name].any(), name
    torch.testing.assert_close(head.joint_regressor.sum(1), torch.ones(5))
    torch.testing.assert_close(head.skin_weights.sum(1), torch.ones(len(head.template)))
    assert head.skin_weights.min() >= 0 and head.joint_regressor.min() >= 0
    assert (head.skin_weights[head.regions["left_eye"], 3] == 1).all()
    assert (head.skin_weights[head.regions["right_eye"], 4] == 1).all()
    torch.testing.assert_close(head.pose(head.neutral()).vertices, head.template, atol=1e-6, rtol=0)


def test_axes_and_size(head):
    joints = head.joint_regressor @ head.template
    assert joints[3, 0] > 0.025 and joints[4, 0] < -0.025 and (joints[3:, 2] > 0.05).all()
    assert joints[0].norm() < 0.01, "the root joint is near the head's centre"
    tip = head.template[head.regions["skin"], 2].max()
    assert 0.1 < tip < 0.15 and 0.36 < torch.aminmax(head.template[:, 1]).max - head.template[:, 1].min() < 0.42
    a, b, c = (head.template[head.faces[:, i]] for i in range(3))
    assert (a * torch.linalg.cross(b, c)).sum() > 0, "faces are counter-clockwise from outside"


def test_small_rotations_turn_the_right_way(head):
    p = head.neutral()
    tip, chin = 30, 8

    def landmark(i: int, **change: list[float]) -> torch.Tensor:
        q = replace(p, **{k: torch.tensor(v) for k, v in change.items()})
        return (
            head.landmarks68.on(head.pose(q).vertices, head.faces) - head.landmarks68.on(head.template, head.faces)
        )[i]

    for name in ("rotation", "neck_pose"):
        assert landmark(tip, **{name: [0.0, 0.01, 0.0]})[0] > 5e-4, "+y turns the nose to the subject's left"
        assert landmark(tip, **{name: [0.01, 0.0, 0.0]})[1] < -5e-4, "+x nods"
    assert landmark(chin, jaw_pose=[0.01, 0.0, 0.0])[1] < -3e-4, "+x opens the jaw"
    assert landmark(tip, jaw_pose=[0.1, 0.0, 0.0]).norm() < 1e-4, "the nose does not follow the jaw"
    eye = head.regions["left_eye"]
    front = eye & (head.template[:, 2] > head.template[eye, 2].max() - 1e-3)
    gaze = head.pose(replace(p, eyes_pose=torch.tensor([0, 0.1, 0, 0, 0, 0]))).vertices - head.template
    assert gaze[front, 0].mean() > 5e-4 and gaze[head.regions["right_eye"]].abs().max() < 1e-6
    rim = head.regions["neck"] & (head.template[:, 1] < -0.2)
    turned = head.pose(replace(p, neck_pose=torch.tensor([0.0, 0.5, 0.0]))).vertices
    assert (turned - head.template)[rim].abs().max() < 2e-3, "the shoulders stay"


def test_left_actions_move_the_left(head):
    left = head.template[:, 0] > 0.005
    for name in ("eyeBlink", "mouthSmile", "browDown", "cheekSquint", "eyeWide"):
        moved = action(head, **{name + "Left": 1.0}).norm(dim=1)
        other = action(head, **{name + "Right": 1.0}).norm(dim=1)
        assert moved[left].sum() > 10 * moved[head.template[:, 0] < -0.005].sum(), name
        assert moved.sum() == pytest.approx(other.sum().item(), rel=0.05), "both sides alike"
    lids = head.regions["lids"] & left
    assert action(head, eyeBlinkLeft=1.0)[lids, 1].min() < -0.005


def seen(head: Head, params: HeadParams, target: list[float], width_m: float, size: int = 90) -> torch.Tensor:
    """Return the face each pixel shows [batch, size, size] from in front of `target`, -1 for none."""
    at = torch.tensor(target)
    T = look_at(at + torch.tensor([0.0, 0.0, 0.9]), at, torch.tensor([0.0, 1.0, 0.0]))
    camera = Camera(T, pinhole(size * 0.9 / width_m, size, size), size, size).expand(*params.batch)
    return rasterize(head.pose(params).vertices, head.faces, camera).face_index


def test_teeth_are_rigid_to_skull_and_jaw(head):
    """Two rows with gums: the upper never moves, the lower one as the jaw does, by actions and by the joint."""
    hard = head.regions["teeth"] | head.regions["gums"]
    lower = hard & (head.skin_weights[:, 2] == 1)
    upper = hard & ~lower
    assert (head.skin_weights[upper, 1] == 1).all() and upper.sum() == lower.sum() == 68 + 400
    assert (head.expr_basis[upper] == 0).all()
    rest = head.template[lower]
    for name in head.expression_names:
        moved = action(head, **{name: 1.0})[lower]
        if not name.startswith("jaw"):
            assert (moved == 0).all(), name
            continue
        R, t = rigid_fit(rest, rest + moved)
        torch.testing.assert_close(rest @ R.T + t, rest + moved, atol=5e-5, rtol=0)
        tongue = head.regions["tongue"]
        torch.testing.assert_close(
            head.template[tongue] @ R.T + t,
            head.template[tongue] + action(head, **{name: 1.0})[tongue],
            atol=1e-4,
            rtol=0,
        )
    assert action(head, jawOpen=1.0)[lower, 1].max() < -0.005
    p = replace(head.neutral(), jaw_pose=torch.tensor([0.2, 0.05, 0.0]))
    both = head.pose(replace(p, expr=torch.eye(52)[head.expression_names.index("jawOpen")] * 0.5))
    opened = rest + action(head, jawOpen=0.5)[lower]
    T = both.T_world_joint[2]
    torch.testing.assert_close(both.vertices[lower], opened @ T[:3, :3].T + T[:3, 3], atol=1e-6, rtol=0)
    edge = head.template[head.regions["teeth"]]
    assert 0.0015 < edge[lower[head.regions["teeth"]], 1].max() - edge[upper[head.regions["teeth"]], 1].min() < 0.009


def rigid_fit(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotation and translation that take points a nearest to b."""
    u, _, vt = torch.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
    R = (u @ torch.diag(torch.tensor([1.0, 1.0, torch.sign(torch.det(u @ vt))])) @ vt).T
    return R, b.mean(0) - R @ a.mean(0)


def test_tongue_leaves_the_mouth_and_follows_the_jaw(head):
    out = head.template + action(head, tongueOut=1.0, jawOpen=0.5)
    tongue, lower_lip = head.regions["tongue"], head.landmarks68.on(out, head.faces)[57]
    assert out[tongue, 2].max() > lower_lip[2] + 0.005 and head.template[tongue, 2].max() < lower_lip[2] - 0.008
    turned = head.pose(replace(head.neutral(), jaw_pose=torch.tensor([0.2, 0.0, 0.0]))).vertices
    assert (turned - head.template)[tongue, 1].min() < -0.01


@pytest.mark.parametrize("mouth", [{}, {"mouthSmileLeft": 1.0, "mouthSmileRight": 1.0}, {"mouthPucker": 1.0}])
def test_closed_lips_hide_the_teeth(head, mouth):
    """On random people too, and lips meet without a hole: what is seen between them is never a tooth nor nothing."""
    params = people(head, 8, **mouth)
    face = seen(head, params, [0.0, -0.05, 0.1], 0.08)
    assert (face >= 0).all()
    hard = (head.regions["teeth"] | head.regions["gums"])[head.faces].all(1)
    assert hard[face].flatten(1).sum(1).max() <= 8, "a speck at the corners at most"


def test_teeth_stay_within_an_open_mouth(head):
    """A tooth is only seen where the mouth's inside would be seen without it."""
    hard = (head.regions["teeth"] | head.regions["gums"])[head.faces].all(1)
    inside = head.regions["mouth"][head.faces].any(1) | head.regions["tongue"][head.faces].all(1)
    kept = (~hard).nonzero()[:, 0]
    bare = replace(head, faces=head.faces[kept], uv_faces=head.uv_faces[kept])
    for mouth in ({"jawOpen": 0.3, "mouthSmileLeft": 1.0, "mouthSmileRight": 1.0}, {"jawOpen": 1.0}):
        params = people(head, 6, **mouth)
        face = seen(head, params, [0.0, -0.055, 0.1], 0.09)
        tooth = hard[face] & (face >= 0)
        behind = inside[kept[seen(bare, params, [0.0, -0.055, 0.1], 0.09)]]
        assert (tooth & ~behind).flatten(1).sum(1).max() <= 2 and tooth.sum() > 500


def people(head: Head, n: int, **weights: float) -> HeadParams:
    """The mean person and random ones, with the given actions."""
    shape = torch.randn(n, head.shape_basis.shape[-1], generator=torch.Generator().manual_seed(1)).clamp(-2.5, 2.5)
    shape[0] = 0
    expr = torch.zeros(n, len(head.expression_names))
    for name, weight in weights.items():
        expr[:, head.expression_names.index(name)] = weight
    return replace(head.neutral(n), shape=shape, expr=expr)


@pytest.mark.parametrize("squint", [0.0, 1.0])
def test_lids_close_without_gaps(head, squint):
    params = people(head, 8, eyeBlinkLeft=1.0, eyeSquintLeft=squint)
    eyes = head.regions["eyes"][head.faces].all(1)
    shut, open_ = (eyes[seen(head, p, [0.031, 0.024, 0.09], 0.06)].sum() for p in (params, people(head, 8)))
    assert shut == 0 and open_ > 1000


def test_gaze_actions_turn_the_eyes_as_joints_do(head):
    """Rigidly, about the eye's joint, each eye its way; giving both the joint and the action does not double."""
    assert head.gaze is not None and (head.expr_basis[head.regions["eyes"]] == 0).all()
    expr = torch.eye(52)[head.expression_names.index("eyeLookOutLeft")]
    expr = expr + torch.eye(52)[head.expression_names.index("eyeLookInRight")]
    joints = replace(head.neutral(), eyes_pose=torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0]))
    eyes = head.regions["eyes"]
    by_joints = head.pose(joints).vertices[eyes]
    torch.testing.assert_close(head.pose(replace(head.neutral(), expr=expr)).vertices[eyes], by_joints)
    torch.testing.assert_close(head.pose(replace(joints, expr=expr)).vertices[eyes], by_joints)
    back = head.pose(replace(joints, expr=expr, eyes_pose=-joints.eyes_pose)).vertices[eyes]
    torch.testing.assert_close(back, head.template[eyes], atol=1e-6, rtol=0)
    down = torch.eye(52)[head.expression_names.index("eyeLookDownLeft")]
    front = head.template[eyes][:, 2].argmax()
    assert (head.pose(replace(head.neutral(), expr=down)).vertices - head.template)[eyes][front, 1] < -0.003


def test_landmarks_mirror_and_sit_on_their_parts(head):
    points = head.landmarks68.on(head.template, head.faces)
    torch.testing.assert_close(head.landmarks68.bary.sum(1), torch.ones(68))
    for right, left in MIRRORED:
        assert points[left, 0] > 0.003
        torch.testing.assert_close(points[right] * torch.tensor([-1.0, 1, 1]), points[left], atol=1.5e-3, rtol=0)
    assert points[[8, 27, 28, 29, 30, 33, 51, 57, 62, 66], 0].abs().max() < 1.5e-3
    assert points[30, 2] == points[:, 2].max() and points[8, 1] == points[:, 1].min()
    assert points[17:27, 1].min() > points[36:48, 1].max() and points[48:68, 1].max() < points[31:36, 1].min()
    opened = head.landmarks68.on(head.template + action(head, jawOpen=0.3), head.faces)
    assert (opened[[61, 62, 63], 1] - opened[[67, 66, 65], 1]).min() > 0.003, "inner lips part"
    closed = head.landmarks68.on(head.template + action(head, eyeBlinkLeft=1.0), head.faces)
    assert (
        (closed[[43, 44], 1] - closed[[47, 46], 1]).abs().max()
        < 2.5e-3
        < (points[[43, 44], 1] - points[[47, 46], 1]).min()
    )


def test_atlas_has_no_overlaps(head):
    """Charts lie in the square, turn one way each, and cover as much of it as their triangles' areas add up to."""
    corners = head.uv[head.uv_faces]
    assert head.uv.min() >= 0 and head.uv.max() <= 1
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = 0.5 * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    size = 1024
    covered = float((rasterize_uv(head.uv, head.uv_faces, size).face_index >= 0).sum()) / size**2
    assert covered == pytest.approx(area.abs().sum().item(), rel=2e-3) and covered > 0.5
    for name, region in head.regions.items():
        if name not in ("skin", "cap"):
            side = area[region[head.faces].all(1)].sign()
            assert abs(side[side != 0].mean()) > 0.99, f"{name} is folded"


def test_old_parts_keep_their_places(head):
    """Data written before teeth were appended refers to these vertices, faces and texels."""
    assert len(head.template) == 5522 + 800 and head.faces[:10748].max() == 5521 and len(head.uv) == 5765 + 800
    assert head.faces[10748:].min() == 5522 and (head.uv_faces[10748:] >= 5765).all()
    assert max(int(head.landmarks68.face_index.max()), int(head.mediapipe.face_index.max())) < 10748
    assert len(head.mediapipe_index) > 390
    outer = head.regions["skin"] | head.regions["eyes"] | head.regions["sockets"]
    assert outer[head.faces[head.mediapipe.face_index]].any(1).all()


def test_named_directions_change_what_they_say(head):
    wide, named = load_wide(), load_attributes()
    assert list(named) == ["female", "age", "weight", "muscle", "african", "asian", "caucasian"]
    at = {k: wide.template + wide.shape_basis @ (1.5 * v) for k, v in named.items()}
    throat = head.regions["neck"] & (head.template[:, 1] > -0.14)
    width = {k: v[throat, 0].abs().mean() for k, v in at.items()} | {"mean": head.template[throat, 0].abs().mean()}
    assert width["weight"] > 1.02 * width["mean"] > 1.05 * width["female"]

    def nose_width(v: torch.Tensor) -> torch.Tensor:
        points = head.landmarks68.on(v, head.faces)
        return points[35, 0] - points[31, 0]

    assert nose_width(at["african"]) > nose_width(at["caucasian"]) + 0.001


def test_scalp_shell_rises_from_the_hairline(head):
    shell = load_shell()
    mesh = head.pose(people(head, 3))
    flat, high = shell.on(mesh, 0.0), shell.on(mesh, 0.02)
    height = (high - flat).norm(dim=-1)
    assert height.max() == pytest.approx(0.02, abs=1e-5) and (height[:, shell.lift == 0] == 0).all()
    field = (load_field("hairline")[head.faces[shell.points.face_index]] * shell.points.bary).sum(1)
    assert field.min() > -1e-3 and (shell.lift[field > 0.021] == 1).all()
    directed = torch.cat([shell.faces[:, [i, (i + 1) % 3]] for i in range(3)]).tolist()
    assert len({tuple(e) for e in directed}) == len(directed), "one sheet, every edge used once each way"


def test_identities_stay_heads(head):
    """At two standard deviations eyes keep their distance, mirror pairs their sides and nothing explodes."""
    shape = 2 * torch.eye(64)
    posed = head.pose(replace(head.neutral(64), shape=shape))
    joints = head.shape(replace(head.neutral(64), shape=shape)).joints
    assert ((joints[:, 3, 0] - joints[:, 4, 0] - 0.062).abs() < 0.015).all()
    assert (posed.vertices - head.template).norm(dim=-1).max() < 0.12


def test_fields_agree_with_regions(head):
    hairline, brows, lashes = load_field("hairline"), load_field("brows"), load_field("lashes")
    lid = (lashes > 0) & head.regions["skin"]
    assert 40 < lid.sum() < 400 and (head.template[lid, 2] > 0.06).all() and (lashes > 0).equal(lid)
    assert (hairline[head.regions["scalp"]] > 0).all() and (brows[head.regions["brows"]] > 0).all()
    with pytest.raises(UserError, match="no field 'beard'"):
        load_field("beard")


def test_bad_files_are_named(tmp_path):
    cases = {
        "missing.npz": "no head at",
        "generic_model.pkl": "no head at",
        "text.npz": "is not a head",
        "other.npz": "lacks template, faces",
        "shape.npz": "`template` should be",
        "folder.npz": "is a folder",
    }
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with np.load(OPENHEAD) as data:
        small = {k: data[k] for k in data.files if "basis" not in k}
    small |= {
        "template": small["template"][:, :2],
        "shape_basis": np.zeros((1, 3, 1)),
        "expr_basis": np.zeros((1, 3, 1)),
    }
    np.savez(tmp_path / "shape.npz", **small)
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_an_npz_of_the_same_format_loads(tmp_path, head):
    copy = tmp_path / "mine.npz"
    copy.write_bytes(OPENHEAD.read_bytes())
    assert load(copy).name == "mine" and torch.equal(load(copy).template, head.template)
