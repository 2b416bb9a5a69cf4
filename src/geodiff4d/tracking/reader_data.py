"""Rendered faces to train the reader on: crops at the size it looks at, with what moves the visible face.

One row is one instant of one person. Labels are coefficients of the shared head, not those that were drawn: a person's
actions have strengths, sides and directions of their own, and the reader has to say how far the face in front of it
moves, so that another's face moves as far (`visible_coefficients`).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_config
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.rowstore import as_bytes, create_rows, fill_rows, open_rows
from geodiff4d.heads.rig import EYE_JOINTS, SKULL_JOINT, Head, HeadParams
from geodiff4d.render.viewpoints import openhead, world_region
from geodiff4d.tracking.face_square import face_square
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.reader_instants import (
    draw_cameras,
    draw_expressions,
    draw_gaze,
    draw_head_turns,
    follow_gaze,
)
from geodiff4d.tracking.turn import apparent_turn
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import SyntheticSubject

MARGIN = 1.35
"""Side of the stored pictures over the side of the square that the reader looks at: room to cut sloppily."""
PULL = 1e-3
"""How strongly labels hold on to the drawn actions, in squared metres of the summed motion of a whole coefficient."""
MOST = 1.5
"""Largest label: strong people go beyond 1."""
SWEEPS = 40
ROWS = ("rgb", "mask", "points", "expr", "jaw", "eyes", "turn")


@dataclass(frozen=True)
class FacesConfig:
    """What is rendered."""

    split: Split = "train"
    subjects: int = 2200
    instants: int = 24
    """Pictures of each person, each with an expression, gaze, pose and camera of its own."""
    size: int = 256
    """Side of the stored pictures [px]; the reader's square is 1 / 1.35 of it."""
    supersample: int = 2
    points: int = 192
    seed: int = 0

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and type of every array, by name."""
        n, s = (self.subjects, self.instants), self.size
        return {
            "rgb": ((*n, 3, s, s), "u1"), "mask": ((*n, s, s), "u1"), "points": ((*n, self.points, 2), "f4"),
            "expr": ((*n, 52), "f4"), "jaw": ((*n, 3), "f4"), "eyes": ((*n, 6), "f4"), "turn": ((*n, 3, 3), "f4"),
            "done": (n[:1], "u1"),
        }  # fmt: skip


class Faces:
    """Memory-mapped rows, by name: `rgb` [n, 3, size, size] and `mask` [n, size, size] bytes, and the labels.

    `points` are in pixels; `expr`, `jaw` and `eyes` as in `HeadParams`; `turn` rotates the head to the viewer along the
    ray to it.
    """

    def __init__(self, folder: Path, unfinished: bool = False):
        """Open a store; one that is still being rendered only where `unfinished` ones will do.

        Raises:
            UserError: there is none, or it is not finished.
        """
        self.folder = Path(folder)
        if not (self.folder / "faces.json").exists():
            raise UserError(
                f"{folder} has no rendered faces: expected faces.json; `geodiff4d train reader` renders them"
            )
        self.config = read_config(self.folder / "faces.json", FacesConfig)
        stored = open_rows(self.folder, (*ROWS, "done"), arrays=self.config.arrays())
        self._done = stored["done"]
        if not unfinished and not self._done.all():
            raise UserError(f"{folder} is unfinished: run the same `geodiff4d train reader` again to resume it")
        self.rows = {name: stored[name].reshape(-1, *stored[name].shape[2:]) for name in ROWS}
        self.index = choose_points(openhead(), self.config.points).index

    def ready(self) -> np.ndarray:
        """Return the numbers of the rows that are there by now."""
        k = self.config.instants
        return (np.nonzero(self._done)[0][:, None] * k + np.arange(k)).ravel()

    def take(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Read rows, in the order asked for."""
        order = np.argsort(rows)
        back = np.argsort(order)
        return {name: torch.from_numpy(array[rows[order]][back]) for name, array in self.rows.items()}


def build_faces(folder: Path, config: FacesConfig, workers: int = 1, progress: Progress = silent) -> Faces:
    """Render the faces, or finish what was interrupted; people who are done are kept.

    Raises:
        UserError: the folder holds faces of another configuration.
    """
    create_rows(Path(folder) / "faces.json", config, config.arrays(), {})
    fill_rows(Path(folder), _render, workers, progress)
    return Faces(folder)


def _render(folder: Path, s: int) -> None:
    torch.set_num_threads(1)
    config = read_config(folder / "faces.json", FacesConfig)
    stored = open_rows(folder, config.arrays(), writable=True)
    rows = render_person(SyntheticSubject(config.seed * 100_000 + s, config.split), config)
    for name, value in rows.items():
        stored[name][s] = value


def render_person(subject: SyntheticSubject, config: FacesConfig) -> dict[str, np.ndarray]:
    """Draw one person's instants and render them: arrays as in `FacesConfig.arrays`, without the first axis."""
    rng, n = generator("faces", config.split, subject.seed, config.seed), config.instants
    drawn, (rotation, neck) = draw_expressions(rng, n), draw_head_turns(rng, n)
    cameras = draw_cameras(rng, n, config.size)
    jaw = torch.from_numpy(np.radians(rng.normal(0, 2.0, (n, 3)) * (1.0, 0.6, 0.3)).astype(np.float32))
    turned = subject.params(drawn, rotation, neck, jaw)
    gaze = draw_gaze(rng, _angles_to_camera(subject.rig, turned, cameras))
    drawn = follow_gaze(drawn, gaze, rng)
    zero = torch.zeros(n)
    eyes = torch.stack([-gaze[:, 0, 1], gaze[:, 0, 0], zero, -gaze[:, 1, 1], gaze[:, 1, 0], zero], 1)
    params = subject.params(drawn, rotation, neck, jaw, eyes)
    vertices = subject.vertices(params)
    markup, head = choose_points(openhead(), config.points), openhead()
    places = markup.on(head).on(vertices, head.faces)
    cameras = Camera.stack([_framed(cameras[i], places[i], markup.index, config.size) for i in range(n)])
    frames = subject.render(params, cameras, config.supersample)
    skull = subject.rig.pose(params.without_shape()).T_world_joint[:, SKULL_JOINT, :3, :3]
    return {
        "rgb": as_bytes(frames.rgb),
        "mask": as_bytes(frames.mask[:, 0]),
        "points": cameras.project(places)[0].numpy(),
        "expr": visible_coefficients(subject.rig, drawn).numpy(),
        "jaw": jaw.numpy(),
        "eyes": eyes.numpy(),
        "turn": apparent_turn(skull, cameras.T_cam_world, vertices[:, world_region()].mean(1)).numpy(),
    }


def _angles_to_camera(rig: Head, params: HeadParams, cameras: Camera) -> Float[Tensor, "n 2"]:
    """Return (yaw, pitch) at which a head sees the camera [rad]."""
    T = rig.pose(params.without_shape()).T_world_joint
    middle = T[:, EYE_JOINTS, :3, 3].mean(1)
    x, y, z = (T[:, SKULL_JOINT, :3, :3].mT @ (cameras.position - middle)[..., None])[..., 0].unbind(-1)
    return torch.stack([torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))], -1)


def _framed(camera: Camera, places: Float[Tensor, "points 3"], index: Tensor, size: int) -> Camera:
    """Return a camera turned about its axis and cropped so that the reader's square stands upright in its middle."""
    square = face_square(camera.project(places)[0], index)
    c, s = float(np.cos(square.roll)), float(np.sin(square.roll))
    T = torch.eye(4)
    T[:2, :2] = torch.tensor([[c, s], [-s, c]])
    upright = Camera(T @ camera.T_cam_world, camera.K, camera.width, camera.height)
    square = face_square(upright.project(places)[0], index).grown(MARGIN)
    return upright.cropped(square.x - square.side / 2, square.y - square.side / 2, square.side, size)


@lru_cache
def visible_skin() -> Bool[Tensor, " verts"]:
    """Return the vertices of OpenHead whose motion a picture of a face shows: its skin without ears and scalp."""
    head = openhead()
    hidden = [
        head.regions[r] for r in ("mouth", "teeth", "gums", "tongue", "sockets", "cap", "eyes", "neck", "ears", "scalp")
    ]
    return head.regions["skin"] & world_region() & ~torch.stack(hidden).any(0)


def visible_coefficients(rig: Head, drawn: Float[Tensor, "n 52"]) -> Float[Tensor, "n 52"]:
    """Return the coefficients of OpenHead that come nearest to what `drawn` ones do to a person's visible skin.

    Least squares between 0 and 1.5, pulled to the drawn actions times their personal strengths, so that neighbouring
    actions stay apart: on ten people 14 % of the motion is left unexplained (the drawn coefficients alone leave 27 %,
    with their strengths 21 %, without the pull 13 %).
    """
    shown = visible_skin()
    ours, theirs = (h.expr_basis[shown].reshape(-1, drawn.shape[1]).double() for h in (openhead(), rig))
    size = ours.square().sum(0)
    strength = torch.where(size > 1e-9, (ours * theirs).sum(0) / size.clamp(min=1e-12), 1.0)
    near = drawn.double() * strength
    gram = ours.T @ ours + PULL * torch.eye(len(size), dtype=torch.float64)
    wanted = drawn.double() @ (theirs.T @ ours) + PULL * near
    # One coordinate after another: the minimum within bounds, as the matrix is positive definite.
    found, diagonal = near.clamp(0, MOST), gram.diagonal()
    for _ in range(SWEEPS):
        for k in range(len(size)):
            found[:, k] = (found[:, k] + (wanted[:, k] - found @ gram[k]) / diagonal[k]).clamp(0, MOST)
    return found.float()
