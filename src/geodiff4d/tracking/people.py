"""Rendered people to train the perception network on: pictures, exact normals and points, memory-mapped and resumable.

One row is one picture of one person. The picture stands on plain grey and its normals are zero where there is nothing,
so that their length is the foreground: training puts other backgrounds behind (`scenes`).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from geodiff4d.core.camera import Camera
from geodiff4d.core.images import composite, encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.rowstore import RowStore, as_bytes, create_rows, fill_rows
from geodiff4d.heads.rig import SKULL_JOINT, HeadParams
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import openhead, orbit, world_region
from geodiff4d.tracking.points import SurfacePoints, choose_points
from geodiff4d.tracking.turn import apparent_turn
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import SyntheticSubject

SURROUND = 1.25
"""Side of the pictures over the side of the canonical crop: shoulders and hair are in it."""


@dataclass(frozen=True)
class PeopleConfig:
    """What is rendered."""

    split: Split = "train"
    subjects: int = 600
    instants: int = 8
    """Pictures of each subject: every one has its own expression, pose and camera."""
    size: int = 256
    supersample: int = 2
    azimuth_deg: float = 75.0
    elevation_deg: float = 30.0
    points: int = 192
    seed: int = 0

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every array, by name."""
        n, image = (self.subjects, self.instants), (3, self.size, self.size)
        return {
            "rgb": ((*n, *image), "u1"), "normal": ((*n, *image), "u1"), "points": ((*n, self.points, 2), "f4"),
            "turn": ((*n, 3, 3), "f4"), "shape": ((*n, 64), "f4"), "done": (n[:1], "u1"),
        }  # fmt: skip


class People(RowStore):
    """Rendered people by image: `rgb` and `normal` [n, 3, size, size], on grey; `points` [n, points, 2] in pixels;
    `turn` [n, 3, 3] of the skull, in `network.Look.rotation`'s convention; `shape` [n, 64]. `len` is n.
    """

    NOTE, CONFIG = "people.json", PeopleConfig
    CONSTANTS = "points_index", "points_position"

    def __getattr__(self, name: str) -> np.ndarray:
        rows = super().__getattr__(name)
        if name not in ("done", *self.CONSTANTS):
            rows = vars(self)[name] = rows.reshape(-1, *rows.shape[2:])
        return rows

    @cached_property
    def markup(self) -> SurfacePoints:
        """Where the points are on the head."""
        return SurfacePoints(*(torch.from_numpy(np.array(getattr(self, name))) for name in self.CONSTANTS))

    def __len__(self) -> int:
        return len(self.points)


def build_people(folder: Path, config: PeopleConfig, workers: int = 2, progress: Progress = silent) -> People:
    """Render the images, or finish what was interrupted; subjects that are done are kept.

    Raises:
        UserError: the folder holds people of another configuration.
    """
    markup = choose_points(openhead(), config.points)
    constants = {"points_index": markup.index.numpy(), "points_position": markup.position.numpy()}
    create_rows(Path(folder) / "people.json", config, config.arrays(), constants)
    fill_rows(Path(folder), _render_subject, workers, progress)
    return People(folder)


def draw_motion(config: PeopleConfig, s: int) -> tuple[HeadParams, Camera]:
    """Draw a subject's expressions, head poses and cameras: near and far, from all sides that a tracker should take."""
    rng, n = generator("people", config.split, s, config.seed), config.instants
    expr, jaw, eyes = random_expression(int(rng.integers(1 << 31)), n)
    turn = np.deg2rad(rng.normal(0, 1, (2, n, 3)) * np.array([6.0, 6.0, 5.0]))
    rotation, neck = (torch.from_numpy(x.astype(np.float32)) for x in turn)
    zero = openhead().neutral(n)
    params = HeadParams(zero.shape, expr, rotation, neck, jaw, eyes, zero.translation)
    # Half the pictures are nearly frontal, as portraits are.
    wide = rng.random(n) < 0.5
    azimuth = np.where(wide, rng.uniform(-1, 1, n) * config.azimuth_deg, rng.normal(0, 15, n))
    elevation = np.where(wide, rng.uniform(-1, 1, n) * config.elevation_deg, rng.normal(0, 8, n))
    distance = np.exp(rng.uniform(np.log(0.45), np.log(2.5), n))
    angles = [torch.from_numpy(x.astype(np.float32)) for x in (azimuth, elevation)]
    cameras = [orbit(angles[0][i : i + 1], angles[1][i : i + 1], config.size, float(distance[i]))[0] for i in range(n)]
    return params, Camera.stack(cameras)


def _render_subject(folder: Path, s: int) -> None:
    torch.set_num_threads(1)
    head, stored = openhead(), People(folder, writable=True)
    config, own = stored.config, slice(s * stored.config.instants, (s + 1) * stored.config.instants)
    subject = SyntheticSubject(config.seed * 100_000 + s, config.split)
    motion, cameras = draw_motion(config, s)
    params = subject.params(motion.expr, motion.rotation, motion.neck_pose, motion.jaw_pose, motion.eyes_pose)
    vertices = subject.vertices(params)
    crops = [canonical_crop(cameras[i], vertices[i][world_region()]) for i in range(config.instants)]
    # A wider look of the same direction.
    grown = (SURROUND - 1) / 2 * config.size
    cameras = Camera.stack([c.cropped(-grown, -grown, SURROUND * config.size, config.size) for c in crops])
    frames = subject.render(params, cameras, config.supersample)
    skull = subject.rig.pose(params.without_shape()).T_world_joint[:, SKULL_JOINT, :3, :3]
    stored.rgb[own] = as_bytes(composite(frames.rgb, frames.mask))
    stored.normal[own] = as_bytes(encode_normals(frames.normal, frames.mask))
    stored.points[own] = cameras.project(stored.markup.on(head).on(vertices, head.faces))[0].numpy()
    stored.turn[own] = apparent_turn(skull, cameras.T_cam_world, vertices[:, world_region()].mean(1)).numpy()
    stored.shape[own] = params.shape.numpy()
