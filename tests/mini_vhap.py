"""A VHAP export, written key by key as its export_as_nerf_dataset.py does, of a small head in FLAME's format."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import look_at
from geodiff4d.heads import Head, HeadParams
from mini_tracks import VERTS, motion, save_png, silhouette

W, H, STEPS, CAMERAS = 60, 44, 3, (2, 8)


def camera(c: int) -> Camera:
    eye = torch.tensor([0.5 * c / 8, 0.2, 1.0])
    K = torch.tensor([[90.0, 0, 0.45 * W], [0, 92.0, 0.55 * H], [0, 0, 1]])
    return Camera(look_at(eye, torch.tensor([0.02, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])), K, W, H)


def params(head: Head, t: int) -> HeadParams:
    p = motion(head, t)
    offset = 0.002 * torch.randn(VERTS, 3, generator=torch.Generator().manual_seed(9))
    same = motion(head, 99).shape
    return replace(p, shape=same, translation=0.1 * p.translation, eyelids=None, static_offset=offset)


def make_vhap(folder: Path, head: Head) -> Path:
    """Write pictures, masks and parameters of the head in motion, seen by two cameras."""
    (folder / "flame_param").mkdir(parents=True)
    frames = []
    for t in range(STEPS):
        p = params(head, t)
        rows = {k: v.numpy()[None] for k, v in vars(p).items() if v is not None and k != "shape"}
        np.savez(folder / f"flame_param/{t:05d}.npz", shape=p.shape.numpy(), **rows)
        mesh = head.pose(p)
        for c in CAMERAS:
            cam = camera(c)
            mask = silhouette(mesh.vertices, mesh.faces, cam)
            colour = torch.tensor([0.2 + 0.2 * t, 0.1 * c, 0.6])[:, None, None]
            save_png(folder / f"images/{t:05d}_{c:02d}.png", colour * mask + (1 - mask))
            save_png(folder / f"fg_masks/{t:05d}_{c:02d}.png", mask)
            # OpenGL's camera to world: OpenCV's, with y and z turned over.
            c2w = np.linalg.inv(cam.T_cam_world.numpy().astype(np.float64)) @ np.diag([1, -1, -1, 1])
            K = {"cx": 0.45 * W, "cy": 0.55 * H, "fl_x": 90.0, "fl_y": 92.0, "h": H, "w": W,
                 "camera_angle_x": 2 * np.arctan(W / 180), "camera_angle_y": 2 * np.arctan(H / 184)}  # fmt: skip
            frames.append({
                "timestep_index": t, "timestep_index_original": 3 * t, "timestep_id": f"frame_{t:05d}",
                "camera_index": c, "camera_id": f"2222000{c:02d}", **K, "transform_matrix": c2w.tolist(),
                "file_path": f"images/{t:05d}_{c:02d}.png", "fg_mask_path": f"fg_masks/{t:05d}_{c:02d}.png",
                "flame_param_path": f"flame_param/{t:05d}.npz",
            })  # fmt: skip
    np.savez(folder / "canonical_flame_param.npz", jaw_pose=[[0.3, 0, 0]], shape=np.zeros(300))
    meta = {"frames": frames, **K, "timestep_indices": list(range(STEPS)), "camera_indices": list(CAMERAS)}
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder
