"""Render people of the open world into stores (`rendered`): single images, and tracks for stage 2 (Sec. 4.1).

One subject is the unit of work: several processes render, and an interrupted build goes on with the next person.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json, write_json
from geodiff4d.core.images import composite, encode_normals
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.footage.rendered import Store, StoreConfig, TrackStoreConfig
from geodiff4d.data.footage.take import of_mesh, on_grid
from geodiff4d.data.rowstore import as_bytes, create_rows, fill_rows
from geodiff4d.data.world_clips import random_motion, track_motion
from geodiff4d.heads.rig import HeadParams, PosedHead
from geodiff4d.render.crops import canonical_crop, crop_image, face_crop_box
from geodiff4d.render.meshes import rasterize
from geodiff4d.render.relief import lift
from geodiff4d.render.viewpoints import openhead, world_region
from geodiff4d.render.warp import complete
from geodiff4d.world.cameras import portrait_and_other_cameras
from geodiff4d.world.seeds import generator
from geodiff4d.world.subject import SyntheticSubject
from geodiff4d.world.tracker_error import disturbed, moved_as_tracked

MOST_BYTES = 1e12
"""No larger store is begun."""


def build_store(
    folder: Path, config: StoreConfig, workers: int = 2, progress: Progress = silent,
    render: Callable[[Path, int], None] | None = None,
) -> Store:  # fmt: skip
    """Render a store, or finish one that was interrupted; subjects that are done are kept.

    `render` fills a subject's rows of the store in a folder, by default as the open world draws them.

    Raises:
        UserError: the folder holds a store of another configuration, or the store would fill terabytes.
    """
    folder, head = Path(folder), openhead()
    refuse_terabytes(folder, config)
    topology = {"faces": head.faces.numpy(), "uv": head.uv.numpy(), "uv_faces": head.uv_faces.numpy()}
    create_rows(folder / "store.json", config, config.arrays(len(head.template)), topology)
    fill_rows(folder, render or render_subject, workers, progress)
    return Store(folder)


def refuse_terabytes(folder: Path, config: StoreConfig) -> None:
    """Do not begin a store that no disk at hand holds.

    Raises:
        UserError: it would hold more than a terabyte.
    """
    arrays = config.arrays(len(openhead().template)).values()
    size = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in arrays)
    if size > MOST_BYTES and not (folder / "store.json").exists():
        raise UserError(
            f"{folder} would hold {math.prod(config.shape) / 1e6:.1f} million rendered images in {size / 1e12:.1f} TB: "
            "expected at most 1 TB; give --data your own clips, imported data sets, or stores rendered by a smaller "
            "preset (each is a folder with store.json or transforms.json)"
        )


def build_tracks(
    folder: Path, config: TrackStoreConfig, like: StoreConfig, workers: int = 2, progress: Progress = silent
) -> Store:
    """Render tracks in the sizes of another store, or finish what was interrupted.

    Raises:
        UserError: the folder holds something else, or the store would fill terabytes.
    """
    folder, whole = Path(folder), config.store(like)
    note = folder / "track.json"
    if (folder / "store.json").exists() and not (note.exists() and read_json(note) == asdict(config)):
        raise UserError(
            f"{folder} holds single images, or tracks of another configuration: name another folder or remove it"
        )
    refuse_terabytes(folder, whole)
    write_json(note, config)
    return build_store(folder, whole, workers, progress)


def render_subject(folder: Path, s: int) -> None:
    """Render one person into the rows of a store: the track, where it is a store of tracks, and single instants."""
    torch.set_num_threads(1)
    store = Store(folder, writable=True)
    c, tracks, who = store.config, store.tracks, store.config.seed * 100_000 + s
    subject, head, n = SyntheticSubject(who, c.split), openhead(), tracks.frames if tracks else 0
    m = random_motion(c.split, s, c.instants - n, c.seed + bool(tracks))
    if tracks:
        m = HeadParams.cat([track_motion(c.split, s, n, c.seed, tracks.fps), m])
    truth = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    # A tracker's error drifts along a track, and is drawn anew for every single instant.
    found = [disturbed(truth[i : i + 1], seed=who * 1000 + i) for i in range(n, c.instants)]
    if tracks:
        drifting = disturbed(truth[:n], seed=who)
        if not m.rotation[:n].any():  # A head that is held still is posed by us, not found by a tracker.
            first = {k: getattr(drifting, k)[:1].expand(n, -1) for k in ("rotation", "translation")}
            drifting = replace(drifting, **first)
        found.insert(0, drifting)
    tracked = HeadParams.cat(found)
    posed, still = head.pose(tracked), head.pose(tracked.without_expression())
    moved = head.pose(moved_as_tracked(tracked, m, who, temporal=n > 0)).vertices
    store.expr[s], store.joints[s] = m.expr.numpy(), torch.cat([m.jaw_pose, m.eyes_pose.flatten(1)], 1).numpy()
    bare = Store(folder, writable=True)
    bare.config = replace(c, reference_views=0)  # Frames of a track carry no texture.
    standing = _cropped(c, who * 100, still.vertices[:n]) if n else None
    if c.strangers:
        _render_stranger(store, s, who, m, n)
    for i in range(c.instants):
        rows, cameras = (
            (bare, standing)
            if standing is not None and i < n
            else (store, _cropped(c, who * 100 + i, still.vertices[i]))
        )
        render_instant(rows, s, i, subject, truth[i], posed[i], still[i], moved[i], cameras)


def render_instant(
    store: Store, s: int, i: int, subject: SyntheticSubject, truth: HeadParams,
    posed: PosedHead, standing: PosedHead, moved: Float[Tensor, "verts 3"], cameras: Camera,
) -> None:  # fmt: skip
    """Render one instant from all its views and write the rows of the store."""
    c = store.config
    frames = subject.render(truth.map(lambda x: x.expand(c.views, *x.shape)), cameras, c.supersample)
    rgb = composite(frames.rgb, frames.mask)
    store.rgb[s, i] = as_bytes(rgb)
    store.normal[s, i] = as_bytes(encode_normals(frames.normal, frames.mask))
    write_conditions(store, s, i, rgb, frames.mask, [posed] * c.reference_views, standing, moved, cameras)


def write_conditions(
    store: Store, s: int, i: int, rgb: Float[Tensor, "views 3 size size"], mask: Float[Tensor, "views 1 size size"],
    posed: Sequence[PosedHead], standing: PosedHead, moved: Float[Tensor, "verts 3"], cameras: Camera,
) -> None:  # fmt: skip
    """Write what an instant's tracked head says of its pictures.

    Args:
        posed: the head as tracked in each view that can be a portrait.
        standing: the head without expression; all views see it where it is.
        moved: its vertices, moved as the driver's tracked expression would.
    """
    head, c, v, still = openhead(), store.config, store.config.views, standing.vertices
    store.T_world_joint[s, i] = standing.T_world_joint[:2].numpy()
    store.T_cam_world[s, i], store.K[s, i] = cameras.T_cam_world.numpy(), cameras.K.numpy()
    seen_by_all = replace(
        standing, vertices=still.expand(v, -1, -1), T_world_joint=standing.T_world_joint.expand(v, -1, -1, -1)
    )
    pose, focus = of_mesh(head, seen_by_all, cameras)
    points = head.landmarks68.on(still, head.faces)
    store.pose[s, i] = as_bytes(pose)
    for prefix, vertices in (("", still), ("moved_", moved)):
        small = rasterize(vertices.expand(v, -1, -1), head.faces, cameras.resized(c.size // 2, c.size // 2))
        getattr(store, f"{prefix}face")[s, i] = small.face_index.to(torch.int16).numpy()
        getattr(store, f"{prefix}bary")[s, i] = as_bytes(small.bary[..., :2].movedim(-1, 1))
    store.cover[s, i], store.focus[s, i] = (as_bytes(x) for x in on_grid(mask, focus, c.grid))
    for k in range(v):
        box = face_crop_box(cameras[k].project(points)[0])
        store.crop[s, i, k] = as_bytes(crop_image(rgb[k], box, c.crop))
    for k, own in enumerate(posed):
        portrait = complete(head, rgb[k], own.vertices, cameras[k], mask[k], c.texels)
        seen = torch.cat([portrait.carried.grid, portrait.carried.visibility[:, None]], -1)
        store.carried[s, i, k] = seen.half().numpy()
        store.texture[s, i, k] = as_bytes(portrait.texture)
        sheet = lift(head, own, cameras[k], (mask[k] > 0.5).float())
        store.relief[s, i, k], store.follows[s, i, k] = sheet.points.half().numpy(), sheet.follows.half().numpy()


def _render_stranger(store: Store, s: int, who: int, motion: HeadParams, track: int) -> None:
    """Render somebody else who makes a person's expressions, before cameras of their own: one for the whole track."""
    c, head = store.config, openhead()
    seed = int(generator("stranger", c.split, who).integers(1 << 30))
    other = SyntheticSubject(seed, c.split)
    truth = other.params(
        motion.expr, motion.rotation, motion.neck_pose, motion.jaw_pose, motion.eyes_pose, motion.translation
    )
    runs = [range(track), *(range(i, i + 1) for i in range(track, c.instants))]
    for run in filter(len, runs):
        at = torch.tensor(list(run))
        found = disturbed(truth[at], seed=seed + run[0]).without_expression()
        still = head.pose(found).vertices
        chosen = portrait_and_other_cameras(2, seed + run[0], c.size)[(seed + run[0]) % 2]
        cameras = canonical_crop(chosen, still[:, world_region()]).expand(len(run))
        frames = other.render(truth[at], cameras, c.supersample)
        points, _ = cameras.project(head.landmarks68.on(still, head.faces))
        for k, i in enumerate(run):
            box = face_crop_box(points[k])
            store.stranger[s, i] = as_bytes(crop_image(composite(frames.rgb, frames.mask)[k], box, c.crop))


def _cropped(config: StoreConfig, seed: int, still: Float[Tensor, "*frames verts 3"]) -> Camera:
    cameras = portrait_and_other_cameras(config.views, seed, config.size)
    return canonical_crop(cameras, still[..., world_region(), :])
