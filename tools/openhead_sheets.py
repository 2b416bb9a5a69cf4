"""Draw OpenHead's picture sheets for docs/OPENHEAD.md: identities, every action, joints, and mouth and eyes from near.

    python tools/openhead_sheets.py [--out docs/images] [--only actions] [--asset src/geodiff4d/assets/openhead.npz]

Plain colours per region and one soft light: what is seen here is the mesh, not a painter's skill.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.heads.openhead import load, load_attributes, load_field, load_wide
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import interpolate, rasterize

SUPERSAMPLE = 3
BACKGROUND = torch.tensor([0.93, 0.94, 0.95])
COLOURS = {
    "skin": (0.80, 0.62, 0.53), "scalp": (0.70, 0.54, 0.46), "lips": (0.66, 0.36, 0.34), "mouth": (0.36, 0.10, 0.10),
    "tongue": (0.72, 0.38, 0.38), "gums": (0.74, 0.38, 0.37), "teeth": (0.93, 0.90, 0.82),
    "sockets": (0.62, 0.38, 0.36), "cap": (0.6, 0.6, 0.62),
}  # fmt: skip
"""Linear-ish base colours; later entries paint over earlier ones."""
PUPIL, IRIS, LIMBUS = 0.13, 0.36, 0.42
"""Angles from the eyeball's axis [rad]."""


@dataclass(frozen=True)
class Shot:
    """One tile: parameters (no batch), where to look and from where."""

    label: str
    params: HeadParams
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    width_m: float = 0.33
    """What the tile's width covers at the target's distance."""


MOUTH: dict[str, Any] = {"target": (0.0, -0.045, 0.1), "width_m": 0.085}
EYES: dict[str, Any] = {"target": (0.0, 0.024, 0.09), "width_m": 0.125}
LEFT_EYE: dict[str, Any] = {"target": (0.031, 0.024, 0.09), "width_m": 0.055}


class Painter:
    """Draws posed heads with per-vertex colours."""

    def __init__(self, head: Head, lashes: Tensor | None):
        self.head = head
        colour = torch.tensor(COLOURS["skin"]).repeat(len(head.template), 1)
        for name, value in COLOURS.items():
            if name in head.regions:
                colour[head.regions[name]] = torch.tensor(value)
        self.colour = colour
        joints = head.joint_regressor @ head.template
        local = head.template - torch.where(head.template[:, :1] > 0, joints[3], joints[4])
        eyes = head.regions["eyes"].float()[:, None]
        line = torch.full_like(eyes, -1.0) if lashes is None else lashes[:, None]
        self.attributes = torch.cat([colour, local, eyes, line], 1)

    def draw(self, shot: Shot, size: int) -> Tensor:
        """Return one tile [3, size, size], sRGB."""
        mesh = self.head.pose(shot.params.map(lambda v: v[None]))
        camera = aim(shot, size * SUPERSAMPLE)[None]
        fragments = rasterize(mesh.vertices, self.head.faces, camera)
        face = fragments.face_index[0]
        at = interpolate(fragments, self.head.faces, torch.cat([self.attributes, mesh.normals[0]], 1))[0]
        colour, local, eye, line, normal = at.split([3, 3, 1, 1, 3])
        eye = (eye > 0.99).float()
        colour = torch.lerp(colour, eye_colour(local), eye)
        colour = colour * (1 - 0.75 * ((line > 0).float() * (1 - eye)))
        colour = shade(colour, normalize(normal, dim=0), eye)
        colour = torch.where(face >= 0, colour, BACKGROUND[:, None, None])
        return avg_pool2d(colour[None], SUPERSAMPLE)[0].clamp(0, 1)


def aim(shot: Shot, size: int) -> Camera:
    """Return the camera of a shot, 0.9 m from its target."""
    yaw, pitch = np.deg2rad(shot.yaw_deg), np.deg2rad(shot.pitch_deg)
    direction = torch.tensor([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)]).float()
    target = torch.tensor(shot.target)
    T = look_at(target + 0.9 * direction, target, torch.tensor([0.0, 1.0, 0.0]))
    return Camera(T, pinhole(size * 0.9 / shot.width_m, size, size), size, size)


def eye_colour(local: Tensor) -> Tensor:
    """Colour the eyeball by the angle from its axis."""
    angle = torch.acos(normalize(local, dim=0)[2].clamp(-1, 1))
    out = torch.tensor([0.90, 0.88, 0.86])[:, None, None].expand_as(local).clone()
    for limit, value in ((LIMBUS, (0.12, 0.14, 0.16)), (IRIS, (0.30, 0.42, 0.50)), (PUPIL, (0.02, 0.02, 0.02))):
        out = torch.where(angle < limit, torch.tensor(value)[:, None, None], out)
    return out


def shade(colour: Tensor, normal: Tensor, gloss: Tensor) -> Tensor:
    """One key light, a fill light and a bright sky; the eyes glint."""

    def lit(x: float, y: float, z: float) -> Tensor:
        d = normalize(torch.tensor([x, y, z]), dim=0)
        return (normal * d[:, None, None]).sum(0)

    light = 0.42 + 0.58 * lit(0.5, 0.6, 0.8).clamp(min=0) + 0.18 * lit(-0.9, 0.1, 0.5).clamp(min=0)
    light = light + 0.10 * (0.5 + 0.5 * normal[1])
    return colour * light + 0.8 * gloss * lit(0.3, 0.35, 0.9).clamp(min=0) ** 120


def sheet(painter: Painter, shots: Sequence[Shot], columns: int, size: int) -> Image.Image:
    """Draw the shots row by row, each with its label."""
    rows = -(-len(shots) // columns)
    page = Image.new("RGB", (columns * size, rows * (size + 16)), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    for i, shot in enumerate(shots):
        x, y = i % columns * size, i // columns * (size + 16)
        pixels = (255 * painter.draw(shot, size)).byte().permute(1, 2, 0).contiguous().numpy()
        page.paste(Image.fromarray(pixels), (x, y + 16))
        pen.text((x + 4, y + 2), shot.label, fill=(30, 30, 30))
    return page


def posed(
    head: Head,
    jaw: Sequence[float] = (0, 0, 0),
    neck: Sequence[float] = (0, 0, 0),
    eyes: Sequence[float] = (0, 0),
    root: Sequence[float] = (0, 0, 0),
    **actions: float,
) -> HeadParams:
    """Neutral parameters with joints [deg] and actions set; a paired action's bare name sets both sides."""
    expr = torch.zeros(len(head.expression_names))
    for name, weight in actions.items():
        for full in (name, name + "Left", name + "Right"):
            if full in head.expression_names:
                expr[head.expression_names.index(full)] = weight

    def radians(x: Sequence[float]) -> Tensor:
        return torch.deg2rad(torch.tensor(x, dtype=torch.float32))

    gaze = radians([*eyes, 0.0])
    return replace(
        head.neutral(), expr=expr, jaw_pose=radians(jaw), neck_pose=radians(neck), rotation=radians(root),
        eyes_pose=torch.cat([gaze, gaze]),
    )  # fmt: skip


def identities(head: Head) -> list[Shot]:
    """The mean, the measured directions at 1.7 standard deviations, and random people."""
    neutral = head.neutral()
    shots = [Shot("mean", neutral), Shot("mean, 35°", neutral, 35), Shot("mean, 90°", neutral, 90)]
    for name, direction in load_attributes().items():
        for label, sign in (("low", -1.0), ("high", 1.0)):
            shots.append(Shot(f"{name}: {label}", replace(neutral, shape=1.7 * sign * direction)))
    g = torch.Generator().manual_seed(4)
    shape = 0.85 * torch.randn(64, neutral.shape.shape[-1], generator=g)
    while len(shots) < 45:
        i = len(shots)
        shots.append(Shot(f"random {i}", replace(neutral, shape=shape[i]), (0, 25, -25)[i % 3]))
    return shots


def actions(head: Head) -> list[Shot]:
    """Every ARKit action at weight 1."""
    shots = []
    for name in head.expression_names:
        weights: dict[str, Any] = {name: 1.0}
        if name == "mouthClose":  # ARKit's closes what jawOpen opens and means nothing alone
            weights["jawOpen"] = 1.0
        yaw = 35 if name in SIDEWAYS else 0
        shots.append(Shot(" + ".join(weights), posed(head, **weights), yaw, 0, (0.0, -0.02, 0.0), 0.23))
    return shots


SIDEWAYS = ("jawForward", "tongueOut", "mouthFunnel", "mouthPucker", "cheekPuff", "mouthShrugLower", "mouthShrugUpper")


def joints(head: Head) -> list[Shot]:
    """Joints alone and beside the actions that move the same parts."""
    wide: dict[str, Any] = {"width_m": 0.42, "target": (0.0, -0.06, 0.0)}
    near: dict[str, Any] = {"width_m": 0.23, "target": (0.0, -0.02, 0.0)}
    kwargs: dict[str, Any]
    turns = [("x +20°", (20, 0, 0)), ("x -20°", (-20, 0, 0)), ("y +30°", (0, 30, 0)), ("z +20°", (0, 0, 20))]
    shots = [Shot(f"root {t}", posed(head, root=a), **wide) for t, a in turns]
    shots += [Shot(f"neck {t}", posed(head, neck=a), **wide) for t, a in turns]
    for label, kwargs in (
        ("jaw x 12°", {"jaw": (12, 0, 0)}), ("jaw x 24°", {"jaw": (24, 0, 0)}), ("jawOpen 1", {"jawOpen": 1.0}),
        ("jaw 10° + jawOpen 0.5", {"jaw": (10, 0, 0), "jawOpen": 0.5}), ("jaw y 6°", {"jaw": (0, 6, 0)}),
        ("jaw x 18°, y 5° + smile", {"jaw": (18, 5, 0), "mouthSmile": 0.8}),
        ("jaw 15° + tongueOut", {"jaw": (15, 0, 0), "tongueOut": 1.0}),
        ("jawOpen 0.5 + tongueOut", {"jawOpen": 0.5, "tongueOut": 1.0}),
    ):  # fmt: skip
        shots.append(Shot(label, posed(head, **kwargs), 20, **near))
    for label, kwargs in (
        ("eyes y +20°", {"eyes": (0, 20)}), ("eyes x +15°", {"eyes": (15, 0)}), ("eyes x -15°", {"eyes": (-15, 0)}),
        ("eyeLookOut L, In R", {"eyeLookOutLeft": 1.0, "eyeLookInRight": 1.0}),
        ("the same + eyes y +28°", {"eyeLookOutLeft": 1.0, "eyeLookInRight": 1.0, "eyes": (0, 28.6)}),
        ("eyeLookDown", {"eyeLookDown": 1.0}), ("eyeLookDown + eyes x 20°", {"eyeLookDown": 1.0, "eyes": (20, 0)}),
        ("eyeLookUp", {"eyeLookUp": 1.0}),
    ):  # fmt: skip
        shots.append(Shot(label, posed(head, **kwargs), **EYES))
    return shots


def closeups(head: Head) -> list[Shot]:
    """Mouth and eyes from near, in extreme actions."""
    shots: list[Shot] = []
    kwargs: dict[str, Any]
    for label, kwargs in (
        ("neutral", {}), ("jawOpen 1", {"jawOpen": 1}), ("jawOpen 0.15", {"jawOpen": 0.15}),
        ("jawOpen 0.3 + smile", {"jawOpen": 0.3, "mouthSmile": 1}),
        ("jawOpen 1 + smile", {"jawOpen": 1, "mouthSmile": 1}),
        ("smile", {"mouthSmile": 1}), ("upperUp + lowerDown", {"mouthUpperUp": 1, "mouthLowerDown": 1}),
        ("funnel", {"mouthFunnel": 1}), ("stretch + jawOpen 0.2", {"mouthStretch": 1, "jawOpen": 0.2}),
        ("tongueOut", {"tongueOut": 1}), ("tongueOut + jawOpen 0.4", {"tongueOut": 1, "jawOpen": 0.4}),
        ("pucker", {"mouthPucker": 1}), ("rolls", {"mouthRollLower": 1, "mouthRollUpper": 1}),
        ("jawOpen 0.6 + mouthClose 0.6", {"jawOpen": 0.6, "mouthClose": 0.6}),
        ("dimple + smile", {"mouthDimple": 1, "mouthSmile": 0.6}),
        ("jawLeft + jawOpen 0.3", {"jawLeft": 1, "jawOpen": 0.3}),
    ):  # fmt: skip
        params = posed(head, **kwargs)
        shots += [Shot(label, params, 0, **MOUTH), Shot(label, params, 40, **MOUTH)]
    for label, kwargs in (
        ("neutral", {}), ("blink 0.5", {"eyeBlink": 0.5}), ("blink 1", {"eyeBlink": 1}),
        ("blink + squint", {"eyeBlink": 1, "eyeSquint": 1}), ("squint", {"eyeSquint": 1}), ("wide", {"eyeWide": 1}),
        ("lookDown", {"eyeLookDown": 1}), ("lookUp + wide", {"eyeLookUp": 1, "eyeWide": 1}),
    ):  # fmt: skip
        params = posed(head, **kwargs)
        shots += [Shot(label, params, 0, **LEFT_EYE), Shot(label, params, 50, **LEFT_EYE)]
    return shots


SHEETS = {"identities": (identities, 9, 190), "actions": (actions, 9, 200), "joints": (joints, 8, 220),
          "closeups": (closeups, 8, 220)}  # fmt: skip


def main() -> None:
    """Draw the sheets asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=sorted(SHEETS), default=None)
    parser.add_argument("--quality", type=int, default=82)
    parser.add_argument("--png", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (make, columns, size) in SHEETS.items():
        if args.only in (None, name):
            head = load_wide() if name == "identities" else load()
            page = sheet(Painter(head, load_field("lashes")), make(head), columns, size)
            path = args.out / f"openhead_{name}.{'png' if args.png else 'jpg'}"
            page.save(path, quality=args.quality)
            print(f"{path}: {page.width}x{page.height}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
