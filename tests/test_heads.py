"""The rig against a slow oracle, and OpenHead against anatomy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geodiff4d.core.errors import UserError
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.heads import HeadParams, load_head
from geodiff4d.heads.openhead import OPENHEAD, load, load_field, load_wide
from geodiff4d.heads.rig import PARENTS, Head, Landmarks

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
    parts += ["teeth", "tongue", "mouth", "neck"]
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


def test_jaw_teeth_and_tongue(head):
    teeth = head.regions["teeth"]
    lower = head.skin_weights[teeth, 2] == 1
    drop = action(head, jawOpen=1.0)[teeth, 1]
    assert lower.float().mean() == 0.5 and (drop[~lower] == 0).all() and drop[lower].max() < -0.005
    out = head.template + action(head, tongueOut=1.0, jawOpen=0.5)
    tongue, lower_lip = head.regions["tongue"], head.landmarks68.on(out, head.faces)[57]
    assert out[tongue, 2].max() > lower_lip[2] + 0.005 and head.template[tongue, 2].max() < lower_lip[2]


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
    corners = head.uv[head.uv_faces]
    assert head.uv.min() >= 0 and head.uv.max() <= 1
    g = torch.Generator().manual_seed(0)
    points = torch.rand(400, 1, 1, 2, generator=g)
    edge = corners.roll(-1, 1) - corners
    to = points - corners
    side = edge[..., 0] * to[..., 1] - edge[..., 1] * to[..., 0]
    inside = (side < 0).all(-1) | (side > 0).all(-1)
    assert inside.sum(1).max() == 1 and inside.any(1).float().mean() > 0.5


def test_identities_stay_heads(head):
    """At two standard deviations eyes keep their distance, mirror pairs their sides and nothing explodes."""
    shape = 2 * torch.eye(64)
    posed = head.pose(replace(head.neutral(64), shape=shape))
    joints = head.shape(replace(head.neutral(64), shape=shape)).joints
    assert ((joints[:, 3, 0] - joints[:, 4, 0] - 0.062).abs() < 0.015).all()
    assert (posed.vertices - head.template).norm(dim=-1).max() < 0.12


def test_fields_agree_with_regions(head):
    hairline, brows = load_field("hairline"), load_field("brows")
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
