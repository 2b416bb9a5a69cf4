"""Small data sets in exactly the formats of the real ones, from renders of OpenHead: what readers are tested on.

`performance` renders a head that moves, seen by a few cameras; every `make_…` writes it as one data set does.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import invert, look_at
from geodiff4d.core.images import to_uint8
from geodiff4d.core.video import write_video
from geodiff4d.heads import Head, HeadParams, load_head
from geodiff4d.render.meshes import render_normals


@dataclass(frozen=True)
class Performance:
    """A head that turns and opens its mouth, with everything known about it."""

    head: Head
    params: HeadParams
    cameras: list[Camera]
    images: Tensor  # timesteps cameras 3 h w
    masks: Tensor  # timesteps cameras 1 h w
    normals: Tensor  # timesteps cameras 3 h w, unit or zero


def performance(
    timesteps: int = 3, azimuths_deg: tuple[float, ...] = (0.0, 40.0), width: int = 110, height: int = 160
) -> Performance:
    """Render it; the first camera is in front, positive azimuth sees the person's left side."""
    head = load_head()
    wave = torch.linspace(0, 1, timesteps)
    expr = torch.zeros(timesteps, head.expr_basis.shape[-1])
    expr[:, head.expression_names.index("jawOpen")] = wave
    params = head.neutral(timesteps)
    rotation = torch.stack([0.1 * wave, 0.3 * wave, 0.05 * wave], -1)
    translation = torch.tensor([0.01, -0.02, 0.015]).expand(timesteps, 3)
    params = HeadParams(**{**vars(params), "expr": expr, "rotation": rotation, "translation": translation})
    mesh = head.pose(params)
    centre = mesh.vertices[0].mean(0)
    cameras = []
    for azimuth in torch.deg2rad(torch.tensor(azimuths_deg)):
        eye = centre + torch.stack([azimuth.sin(), torch.tensor(0.2), azimuth.cos()])
        # Not centred and not square, so that a swapped axis cannot hide.
        K = torch.tensor([[1.9 * width, 0, 0.47 * width], [0, 1.9 * width, 0.52 * height], [0, 0, 1.0]])
        cameras.append(Camera(look_at(eye, centre, torch.tensor([0.0, 1.0, 0.0])), K, width, height))
    normals, masks = [], []
    for camera in cameras:
        n, m = render_normals(mesh, camera.expand(timesteps))
        normals.append(n)
        masks.append(m)
    normal, mask = torch.stack(normals, 1), torch.stack(masks, 1)
    shade = (0.35 + 0.6 * normal[:, :, 2:].clamp(min=0)) * torch.tensor([0.95, 0.75, 0.6])[:, None, None]
    images = shade * mask + torch.tensor([0.1, 0.2, 0.35])[:, None, None] * (1 - mask)
    return Performance(head, params, cameras, images, mask, normal)


def png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, "PNG")
    return file.getvalue()


def write_by_frame(folder: Path, values: Tensor) -> Path:
    """Write [timesteps, cameras, channels, h, w] in [0, 1] as {t:05d}_{c:02d}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, views in enumerate(values):
        for c, value in enumerate(views):
            (folder / f"{t:05d}_{c:02d}.png").write_bytes(png(value))
    return folder


def write_params(folder: Path, params: HeadParams) -> Path:
    """Write {t:05d}.npz in the clip's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(len(params.rotation)):
        row = {k: v[t].numpy() for k, v in vars(params).items() if v is not None}
        np.savez(folder / f"{t:05d}.npz", **{k: v if k == "shape" else v[None] for k, v in row.items()})
    return folder


def make_nersemble(root: Path, show: Performance, matrix: list[list[float]], sequence: str = "EXP-1-head") -> Path:
    """Write participant 017 with one sequence; `matrix` undoes what `camera_sees` did to the colours."""
    from geodiff4d.data.nersemble import CALIBRATED_HEIGHT, CALIBRATED_WIDTH, SERIALS

    person = root / "017"
    serials = [SERIALS[8], SERIALS[3], SERIALS[11]][: len(show.cameras)]
    first = show.cameras[0]
    scale = torch.diag(torch.tensor([CALIBRATED_WIDTH / first.width, CALIBRATED_HEIGHT / first.height, 1.0]))
    calibration = {
        "world_2_cam": {s: c.T_cam_world.tolist() for s, c in zip(serials, show.cameras, strict=True)},
        "intrinsics": (scale @ first.K).tolist(),
    }
    (person / "calibration").mkdir(parents=True, exist_ok=True)
    (person / "calibration/camera_params.json").write_text(json.dumps(calibration))
    (person / "calibration/color_calibration.json").write_text(json.dumps(dict.fromkeys(serials, matrix)))
    for c, serial in enumerate(serials):
        video = person / f"sequences/{sequence}/images/cam_{serial}.mp4"
        write_video(video, list(camera_sees(show.images[:, c])), 73.0)
        empty = torch.tensor([0.1, 0.2, 0.35])[:, None, None].expand_as(show.images[0, c])
        picture = person / f"sequences/BACKGROUND/image_{serial}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(camera_sees(empty))).save(picture, quality=95)
    return root


COLOUR_GAIN = (0.8, 0.7, 0.9)
COLOUR_MATRIX = [[1 / 0.8, 0.0, 0.0, 0.0], [0.0, 1 / 0.7, 0.0, 0.0], [0.0, 0.0, 1 / 0.9, 0.0]]
"""Affine (4 terms): takes the camera's linear colours back to the true ones."""


def camera_sees(image: Tensor) -> Tensor:
    """Return an image as an uncorrected camera would give it: its linear colours scaled."""
    from geodiff4d.data.nersemble import linear_from_srgb, srgb_from_linear

    return srgb_from_linear(linear_from_srgb(image) * torch.tensor(COLOUR_GAIN)[:, None, None])


def make_renderme(root: Path, show: Performance, part: str = "e3", split: bool = True) -> Path:
    """Write actor 0026: images in _raw.smc, masks, calibration and FLAME in _anno.smc; or all in one file."""
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    names = ["25", "19", "31"][: len(show.cameras)]
    raw_path = root / (f"0026_{part}_raw.smc")
    with h5py.File(raw_path, "w") as raw:
        _renderme_head(raw, part, show)
        for c, name in enumerate(names):
            for t, image in enumerate(show.images[:, c]):
                raw[f"Camera/{name}/color/{t}"] = np.frombuffer(png(image), np.uint8)
    anno_path = root / f"0026_{part}_anno.smc" if split else raw_path
    with h5py.File(anno_path, "w" if split else "a") as anno:
        if split:
            _renderme_head(anno, part, show)
        for c, (name, camera) in enumerate(zip(names, show.cameras, strict=True)):
            for t, mask in enumerate(show.masks[:, c]):
                anno[f"Camera/{name}/mask/{t}"] = np.frombuffer(png(mask.expand(3, -1, -1)), np.uint8)
            anno[f"Calibration/{name}/D"] = np.zeros(5)
            anno[f"Calibration/{name}/K"] = camera.K.double().numpy()
            anno[f"Calibration/{name}/RT"] = invert(camera.T_cam_world.double()).numpy()
        for t in range(len(show.images)):
            p, group = show.params[t], anno.create_group(f"FLAME/{t}")
            pieces = {
                "global_pose": p.rotation,
                "neck_pose": p.neck_pose,
                "jaw_pose": p.jaw_pose,
                "trans": p.translation,
            }
            pieces |= {"left_eye_pose": p.eyes_pose[:3], "right_eye_pose": p.eyes_pose[3:]}
            pieces |= {"shape": torch.full((100,), 0.25), "exp": torch.full((50,), 0.5)}
            for key, value in pieces.items():
                group[key] = value.double().numpy()
    return root


def _renderme_head(file, part: str, show: Performance) -> None:
    file.attrs.update({"actor_id": "0026", "performance_part": part, "capture_date": "0801"})
    file.attrs.update({"age": 30, "color": "yellow", "gender": "female", "height": 165.0, "weight": 55.0})
    camera = show.cameras[0]
    group = file.create_group("Camera")
    group.attrs["num_device"], group.attrs["num_frame"] = len(show.cameras), len(show.images)
    group.attrs["resolution"] = np.array([camera.height, camera.width])


def make_synthhuman(root: Path, show: Performance) -> Path:
    """Write every view of every instant as a sample of the face subset, and one of the full-body subset."""
    import OpenEXR

    root.mkdir(parents=True, exist_ok=True)
    sample = 0
    for t in range(len(show.images)):
        for c, camera in enumerate(show.cameras):
            number = f"{sample:07d}"
            (root / f"rgb_{number}.png").write_bytes(png(show.images[t, c]))
            (root / f"alpha_{number}.png").write_bytes(png(show.masks[t, c]))
            x, y, z = show.normals[t, c].half().numpy()
            # As OpenCV writes it: its channel 0 is called B in the file.
            planes = {"B": np.ascontiguousarray(x), "G": np.ascontiguousarray(y), "R": np.ascontiguousarray(z)}
            OpenEXR.File({"type": OpenEXR.scanlineimage}, planes).write(str(root / f"normal_{number}.exr"))
            np.savetxt(root / f"cam_{number}.txt", camera.K.numpy())
            sample += 1
    (root / "rgb_0098040.png").write_bytes(png(show.images[0, 0]))
    return root
