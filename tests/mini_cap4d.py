"""CAP4D's fit of a small head in FLAME's format, with pictures by its own skinning, written from its description."""

from pathlib import Path

import numpy as np
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.heads import Head
from mini_tracks import save_png, silhouette

W, H, STEPS = 64, 48, 3
NAMES = ("cam0", "side")


def turn(v) -> np.ndarray:
    return axis_angle_to_matrix(torch.as_tensor(np.asarray(v), dtype=torch.float64)).numpy()


def posed(fit: dict, a: dict, lids: np.ndarray, t: int) -> np.ndarray:
    """CAP4D's vertices in its world, OpenCV: joints turn without a chain, correctives stand at minus the identity."""
    v = a["v_template"] + a["shapedirs"][..., :150] @ fit["shape"] + a["shapedirs"][..., 300:364] @ fit["expr"][t, :64]
    joints = a["J_regressor"] @ v
    eye = turn(fit["eye_rot"][t])
    R = np.stack([turn(fit["neck_rot"][t]), np.eye(3), np.eye(3), eye, eye])
    away = R[[0, 2, 3, 4]] - 2 * np.eye(3)
    v = v + a["posedirs"] @ away.reshape(-1)
    moved = np.stack([(v - j) @ r.T + j for r, j in zip(R, joints, strict=True)], 1)
    v = (moved * a["weights"][..., None]).sum(1) + lids * fit["expr"][t, 64]
    return (v @ turn(fit["rot"][t]).T + fit["tra"][t]) * np.array([1, -1, -1])


def project(fit: dict, c: int, v: np.ndarray) -> torch.Tensor:
    cam = v @ fit["extr"][c, :3, :3].T + fit["extr"][c, :3, 3]
    K = np.array([[fit["fx"][c, 0], 0, fit["cx"][c, 0]], [0, fit["fy"][c, 0], fit["cy"][c, 0]], [0, 0, 1]])
    xyw = cam @ K.T
    return torch.from_numpy(xyw[:, :2] / xyw[:, 2:]).float()


def make_fit(seed: int = 0, shoulders: float = 0.0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    extr = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    extr[1, :3, :3] = turn([0, 0.25, 0.02])
    extr[1, :3, 3] = [-0.3, 0.02, 0.05]
    f = np.float32([[150.0], [160.0]])
    return {
        "fx": f, "fy": f, "cx": np.float32([[W / 2], [0.52 * W]]), "cy": np.float32([[H / 2], [0.47 * H]]),
        "extr": extr, "shape": g.normal(size=150).astype("f4"), "expr": 0.5 * g.normal(size=(STEPS, 65)).astype("f4"),
        "rot": 0.3 * g.normal(size=(STEPS, 3)).astype("f4"), "eye_rot": 0.2 * g.normal(size=(STEPS, 3)).astype("f4"),
        "neck_rot": shoulders * g.normal(size=(STEPS, 3)).astype("f4"),
        "tra": np.float32([0.01, -0.02, -1.1]) + 0.02 * g.normal(size=(STEPS, 3)).astype("f4"),
        "camera_order": np.array(NAMES), "fps": np.array(30), "resolutions": np.array([[H, W]] * 2),
        "valid_mask": np.ones((2, STEPS), bool), "error": np.array(2.1),
    }  # fmt: skip


def make_cap4d(folder: Path, fit: dict, model: tuple[Head, dict]) -> Path:
    """Write fit.npz, pictures and mattes of two cameras."""
    head, a = model
    lids = head.eyelid_basis.sum(-1).double().numpy()
    folder.mkdir(parents=True)
    np.savez(folder / "fit.npz", **fit)
    faces = head.faces
    for c, name in enumerate(NAMES):
        K = torch.eye(3)
        K[0, 0], K[1, 1], K[0, 2], K[1, 2] = (float(fit[k][c, 0]) for k in ("fx", "fy", "cx", "cy"))
        camera = Camera(torch.from_numpy(fit["extr"][c]), K, W, H)
        for t in range(STEPS):
            mask = silhouette(torch.from_numpy(posed(fit, a, lids, t)).float(), faces, camera)
            # Names say nothing: their order does.
            save_png(folder / f"images/{name}/{10 + 7 * t:08d}.png", mask * (0.2 + 0.2 * t) * torch.ones(3, 1, 1))
            save_png(folder / f"bg/{name}/{t:04d}.png", mask)
    return folder
