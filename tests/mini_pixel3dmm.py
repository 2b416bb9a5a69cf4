"""Pixel3DMM's results of a small head in FLAME's format: .frame files as torch writes them, and crops beside them."""

from pathlib import Path

import numpy as np
import torch

from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.images import encode_normals
from geodiff4d.heads import Head, HeadParams
from mini_tracks import save_png

SIDE, TRACKED, STEPS = 96, 48, 3
FOLDER = "clip_01_nV1_noPho_uv2000.0_n1000.0"


def six(angles) -> np.ndarray:
    return axis_angle_to_matrix(torch.as_tensor(angles, dtype=torch.float32))[..., :2, :].reshape(1, -1).numpy()


def draw(t: int) -> dict[str, np.ndarray]:
    """Random axis-angles and coefficients of one timestep."""
    g = np.random.default_rng(t)
    same = np.random.default_rng(77)
    return {
        "shape": 0.5 * same.normal(size=300), "exp": 0.5 * g.normal(size=100), "R": 0.25 * g.normal(size=3),
        "t": np.array([0.02, -0.01, 0.0]) + 0.02 * g.normal(size=3), "neck": 0.2 * g.normal(size=3),
        "jaw": 0.2 * g.normal(size=3), "eyes": 0.2 * g.normal(size=(2, 3)), "eyelids": g.random(2),
        "fl": np.array([[2.6]]), "pp": np.array([[0.03, -0.02]]), "t_base": np.array([[0.01, 0.02, -1.0]]),
        "R_base": axis_angle_to_matrix(torch.tensor([0.02, -0.05, 0.01])).numpy(),
    }  # fmt: skip


def as_frame(d: dict, t: int) -> dict:
    """The tracker's dictionary, key by key."""

    def f(x, *shape):
        return np.asarray(x, np.float32).reshape(*shape)

    return {
        "flame": {
            "exp": f(d["exp"], 1, 100), "shape": f(d["shape"], 1, 300), "eyes": f(six(d["eyes"]), 1, 12),
            "eyelids": f(d["eyelids"], 1, 2), "jaw": six(d["jaw"]), "neck": six(d["neck"]), "R": six(d["R"]),
            "R_rotation_matrix": axis_angle_to_matrix(torch.tensor(d["R"])).float()[None].numpy(), "t": f(d["t"], 1, 3),
        },
        "img_size": np.array([TRACKED, TRACKED]), "frame_id": t, "global_step": 200 * t,
        "camera": {"R_base_0": f(d["R_base"], 1, 3, 3), "t_base_0": f(d["t_base"], 1, 3), "fl": f(d["fl"], 1, 1),
                   "pp": f(d["pp"], 1, 2)},
        "joint_transforms": np.zeros((1, 5, 4, 4), np.float32),
    }  # fmt: skip


def mesh(head: Head, d: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The posed vertices before and after the global motion, which is about the origin."""
    zero = torch.zeros(3)
    p = {k: torch.from_numpy(np.asarray(d[k], np.float32)) for k in ("shape", "exp", "neck", "jaw", "eyes", "eyelids")}
    params = HeadParams(
        p["shape"], p["exp"], zero, p["neck"], p["jaw"], p["eyes"].flatten(), zero, eyelids=p["eyelids"]
    )
    v = head.pose(params).vertices
    R = axis_angle_to_matrix(torch.tensor(d["R"])).float()
    return v, v @ R.T + torch.from_numpy(d["t"]).float()


def screen(d: dict, world: torch.Tensor) -> torch.Tensor:
    """The tracker's project_points_screen_space, by its description: pixel indices of the tracked size."""
    cam = world.double() @ torch.from_numpy(d["R_base"]).double().T + torch.from_numpy(d["t_base"][0])
    K = torch.eye(3, dtype=torch.float64)
    K[0, 0] = K[1, 1] = float(d["fl"][0, 0]) * TRACKED
    K[:2, 2] = TRACKED / 2 + 0.5 + torch.from_numpy(d["pp"][0]) * (TRACKED / 2 + 0.5)
    K[0, 2] = TRACKED - K[0, 2]
    flat = -((cam / -cam[:, 2:]) @ K.T)[:, :2]
    return torch.stack([TRACKED - 1 - flat[:, 0], flat[:, 1]], -1).float()


def painted(xy: torch.Tensor) -> torch.Tensor:
    """A mask with every pixel in which a point falls, and its neighbours."""
    mask = torch.zeros(1, SIDE, SIDE)
    x, y = xy.round().long().clamp(0, SIDE - 1).unbind(-1)
    mask[0, y, x] = 1
    return torch.nn.functional.max_pool2d(mask, 5, 1, 2)


def make_pixel3dmm(root: Path, head: Head) -> Path:
    """Write tracking/ and preprocessed/ side by side, as the environment file of the real thing suggests."""
    results, pictures = root / f"tracking/{FOLDER}", root / "preprocessed/clip_01"
    (results / "checkpoint").mkdir(parents=True)
    for t in range(STEPS):
        d = draw(t)
        torch.save(as_frame(d, t), results / f"checkpoint/{t:05d}.frame")
        _, world = mesh(head, d)
        mask = painted((screen(d, world) + 0.5) * SIDE / TRACKED - 0.5)
        save_png(pictures / f"cropped/{t:05d}.png", mask * (0.2 + 0.2 * t) * torch.ones(3, 1, 1))
        save_png(pictures / f"seg_og/{t:05d}.png", mask * 13 / 255)
        # All of the face looks along FLAME's +z.
        forward = torch.tensor([0.0, 0.0, 1.0])[:, None, None] * torch.ones_like(mask)
        save_png(pictures / f"p3dmm/normals/{t:05d}.png", encode_normals(forward, torch.ones_like(mask)))
    return root
