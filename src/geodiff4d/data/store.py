"""A store of rendered training images: subjects × instants × views, memory-mapped and resumable.

What the video model reads of the open world: the picture on plain grey, exact normals, the pose map and the mesh
fragments of the *tracked* head (its parameters carry a tracker's error), where each of its vertices falls in the
picture, and the face crop. Built once in parallel; one subject is the unit of work.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d
from torch.nn.functional import interpolate as resized

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import write_json
from geodiff4d.core.images import composite, encode_normals
from geodiff4d.data.world_clips import SyntheticSubject
from geodiff4d.heads.rig import HeadParams, PosedHead
from geodiff4d.render.crops import canonical_crop, crop_image, face_crop_box
from geodiff4d.render.meshes import Fragments, interpolate, rasterize, render_normals
from geodiff4d.render.relief import CELL_PX, Relief, carry_relief, lift
from geodiff4d.render.viewpoints import openhead, orbit, world_region
from geodiff4d.render.warp import complete
from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.subject import WORLD_VERSION
from geodiff4d.world.tracker_error import disturbed

FOCUS_REGIONS = ("lips", "mouth", "teeth", "tongue", "lids", "eyes", "brows")


@dataclass(frozen=True)
class StoreConfig:
    """What is rendered."""

    split: Split = "train"
    subjects: int = 384
    instants: int = 6
    views: int = 5
    size: int = 256
    reference_views: int = 2
    """Views, the first ones, that can serve as reference: only they carry a texture."""
    supersample: int = 2
    crop: int = 96
    """Side of the driving crop [px]."""
    texels: int = 256
    """Side of the portrait's completed texture."""
    grid: int = 16
    """Side of the latent grid, for the foreground and focus maps."""
    seed: int = 0
    world: int = WORLD_VERSION
    """Version of the open world: pictures of another are not mixed in."""
    parameters: Literal["disturbed", "tracked"] = "disturbed"
    """Head parameters: the truth with a tracker's error, or what our tracker sees (`tracking/relabel.py`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.subjects, self.instants, self.views

    def arrays(self, verts: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every array, by name."""
        n, half = self.shape, self.size // 2
        image = (*n, 3, self.size, self.size)
        portraits, points = (*n[:2], self.reference_views), (self.size // CELL_PX) ** 2
        return {
            "rgb": (image, "u1"), "normal": (image, "u1"), "pose": (image, "u1"),
            "face": ((*n, half, half), "i2"), "bary": ((*n, 2, half, half), "u1"),
            "moved_face": ((*n, half, half), "i2"), "moved_bary": ((*n, 2, half, half), "u1"),
            "carried": ((*portraits, verts, 3), "f2"),
            "texture": ((*portraits, 3, self.texels, self.texels), "u1"),
            "relief": ((*portraits, 2, points, 3), "f2"), "follows": ((*portraits, points), "f2"),
            "T_world_joint": ((*n[:2], 2, 4, 4), "f4"), "T_cam_world": ((*n, 4, 4), "f4"), "K": ((*n, 3, 3), "f4"),
            "crop": ((*n, 3, self.crop, self.crop), "u1"),
            "cover": ((*n, self.grid, self.grid), "u1"), "focus": ((*n, self.grid, self.grid), "u1"),
            "expr": ((*n[:2], 52), "f4"), "joints": ((*n[:2], 9), "f4"), "done": ((n[0],), "u1"),
        }  # fmt: skip


def _topology() -> dict[str, np.ndarray]:
    """The mesh that fragments and carried vertices refer to: a store outlives a new version of the head."""
    head = openhead()
    return {"faces": head.faces.numpy(), "uv": head.uv.numpy(), "uv_faces": head.uv_faces.numpy()}


class Store:
    """Memory-mapped arrays by attribute; `StoreConfig.arrays` has their shapes and types."""

    rgb: np.ndarray
    normal: np.ndarray
    pose: np.ndarray
    face: np.ndarray
    bary: np.ndarray
    moved_face: np.ndarray
    """Fragments of the head as the expression latent would move it; `face` and `bary` are at zero expression."""
    moved_bary: np.ndarray
    carried: np.ndarray
    texture: np.ndarray
    relief: np.ndarray
    """Sheets of what surrounds the portraits' heads (`render/relief.py`), at rest."""
    follows: np.ndarray
    T_world_joint: np.ndarray
    """Of the tracked head's root and neck."""
    T_cam_world: np.ndarray
    K: np.ndarray
    crop: np.ndarray
    cover: np.ndarray
    focus: np.ndarray
    expr: np.ndarray
    joints: np.ndarray
    done: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    uv_faces: np.ndarray

    def motion(self) -> HeadParams:
        """Expression, jaw and gaze of every (subject, instant), in rows; the rest is zero."""
        joints = torch.from_numpy(np.array(self.joints)).flatten(0, 1)
        still = openhead().neutral(len(joints))
        expr = torch.from_numpy(np.array(self.expr)).flatten(0, 1)
        return replace(still, expr=expr, jaw_pose=joints[:, :3], eyes_pose=joints[:, 3:].reshape(still.eyes_pose.shape))

    def __init__(self, folder: Path, writable: bool = False):
        """Open a store.

        Raises:
            UserError: there is none, it is another version's, or it was not finished.
        """
        self.folder = Path(folder)
        mode = "r+" if writable else "r"
        try:
            saved = json.loads((self.folder / "store.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not a training store: expected store.json; `geodiff4d train` builds one"
            ) from None
        try:
            self.config = StoreConfig(**saved)
            for name in (*self.config.arrays(0), *_topology()):
                setattr(self, name, np.load(self.folder / f"{name}.npy", mmap_mode=mode))
        except (FileNotFoundError, TypeError) as error:
            raise UserError(f"{folder} is a store of another version ({error}): remove it and build it again") from None
        if not writable and not self.done.all():
            raise UserError(f"{folder} is unfinished: run the same `geodiff4d train` command again to resume it")


def build_store(
    folder: Path,
    config: StoreConfig,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
    render: Callable[[Path, int], None] | None = None,
) -> Store:
    """Render a store, or finish one that was interrupted; subjects that are done are kept.

    `render` fills a subject's rows of the store in a folder; the default draws independent instants.
    """
    render = render or render_subject
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store.json"
    if path.exists() and asdict(StoreConfig()) | json.loads(path.read_text()) != asdict(config):
        raise UserError(f"{folder} holds a store of another configuration: name another folder or remove it")
    if not path.exists():
        for name, (shape, kind) in config.arrays(len(openhead().template)).items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(kind), shape).flush()
        for name, array in _topology().items():
            np.save(folder / f"{name}.npy", array)
        write_json(path, config)
    todo = np.nonzero(Store(folder, writable=True).done == 0)[0].tolist()
    finished = config.subjects - len(todo)
    progress(finished, config.subjects)
    if workers <= 1:
        for s in todo:
            render(folder, s)
            finished += 1
            progress(finished, config.subjects)
        return Store(folder)
    # spawn: a forked torch may wait forever for threads it does not have.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(render, folder, s) for s in todo]):
            future.result()
            finished += 1
            progress(finished, config.subjects)
    return Store(folder)


def random_motion(split: Split, subject: int, instants: int, seed: int) -> HeadParams:
    """Draw independent expressions and head poses (shape left at zero): half the heads look straight ahead."""
    rng = generator("store", split, subject, seed)
    expr, jaw, eyes = random_expression(int(rng.integers(1 << 31)), instants)
    turn = np.deg2rad(rng.normal(0, 1, (2, instants, 3)) * np.array([8.0, 14.0, 5.0])) * (
        rng.random((2, instants, 1)) < 0.5
    )
    rotation, neck = (torch.from_numpy(x.astype(np.float32)) for x in turn)
    move = torch.from_numpy(rng.normal(0, 0.008, (instants, 3)).astype(np.float32))
    zero = openhead().neutral(instants)
    return HeadParams(zero.shape, expr, rotation, neck, jaw, eyes, move)


def draw_cameras(config: StoreConfig, seed: int) -> Camera:
    """View 0 near the front, as portraits are; the others from anywhere in the capture cameras' range."""
    azimuth, elevation = np.random.default_rng(seed).uniform(-1, 1, 2) * (25.0, 10.0)
    front = orbit(torch.tensor([azimuth]).float(), torch.tensor([elevation]).float(), config.size)
    others = random_cameras(config.views - 1, seed, config.size)
    return Camera.stack([front[0], *(others[k] for k in range(config.views - 1))])


def render_subject(folder: Path, s: int) -> None:
    torch.set_num_threads(1)
    store = Store(folder, writable=True)
    c = store.config
    head = openhead()
    subject = SyntheticSubject(c.seed * 100_000 + s, c.split)
    m = random_motion(c.split, s, c.instants, c.seed)
    truth = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    # Independent instants: every one gets its own draw of the tracker's error.
    tracked = HeadParams.stack([disturbed(truth[i : i + 1], seed=s * 1000 + i)[0] for i in range(c.instants)])
    posed = head.pose(tracked)
    moved = head.pose(as_read(tracked, m, c.seed * 100_000 + s))
    still = head.pose(tracked.without_expression())
    store.expr[s], store.joints[s] = m.expr.numpy(), torch.cat([m.jaw_pose, m.eyes_pose.flatten(1)], 1).numpy()
    for i in range(c.instants):
        cameras = draw_cameras(c, (c.seed * 100_000 + s) * 100 + i)
        cameras = canonical_crop(cameras, still.vertices[i][world_region()])
        render_instant(store, s, i, subject, truth[i], one_of(posed, i), one_of(still, i), moved.vertices[i], cameras)
    store.done[s] = 1


def one_of(heads: PosedHead, i: int) -> PosedHead:
    """Take one head out of a batch."""
    return replace(heads, vertices=heads.vertices[i], T_world_joint=heads.T_world_joint[i])


def render_instant(
    store: Store, s: int, i: int, subject: SyntheticSubject, truth: HeadParams,
    posed: PosedHead, standing: PosedHead, moved: Float[Tensor, "verts 3"], cameras: Camera,
) -> None:  # fmt: skip
    """Render one instant from all its views and write the rows of the store."""
    c = store.config
    frames = subject.render(truth.map(lambda x: x.expand(c.views, *x.shape)), cameras, c.supersample)
    rgb = composite(frames.rgb, frames.mask)
    store.rgb[s, i] = _u8(rgb)
    store.normal[s, i] = _u8(encode_normals(frames.normal, frames.mask))
    store.cover[s, i] = _u8(avg_pool2d(frames.mask, c.size // c.grid)[:, 0])
    write_conditions(store, s, i, rgb, frames.mask, [posed] * c.reference_views, standing, moved, cameras)


def write_conditions(
    store: Store, s: int, i: int, rgb: Float[Tensor, "views 3 size size"], mask: Float[Tensor, "views 1 size size"],
    posed: Sequence[PosedHead], standing: PosedHead, moved: Float[Tensor, "verts 3"], cameras: Camera,
) -> None:  # fmt: skip
    """Write what an instant's tracked head says of its pictures.

    Args:
        posed: the head as tracked in each view that can be a portrait.
        standing: the head without expression; all views see it where it is.
        moved: its vertices, moved as an expression latent would.
    """
    head, c, still = openhead(), store.config, standing.vertices
    v = c.views
    store.T_world_joint[s, i] = standing.T_world_joint[:2].numpy()
    store.T_cam_world[s, i], store.K[s, i] = cameras.T_cam_world.numpy(), cameras.K.numpy()
    fragments = rasterize(still.expand(v, -1, -1), head.faces, cameras)
    mesh = head.pose(head.neutral(v))
    normals, shown = render_normals(
        type(mesh)(still.expand(v, -1, -1), head.faces, mesh.T_world_joint), cameras, fragments
    )
    focus = torch.stack([head.regions[r] for r in FOCUS_REGIONS if r in head.regions]).any(0).float()[:, None]
    focus = interpolate(fragments, head.faces, focus)
    points = head.landmarks68.on(still, head.faces)
    store.pose[s, i] = _u8(encode_normals(normals, shown))
    for prefix, vertices in (("", still), ("moved_", moved)):
        small = rasterize(vertices.expand(v, -1, -1), head.faces, cameras.resized(c.size // 2, c.size // 2))
        getattr(store, f"{prefix}face")[s, i] = small.face_index.to(torch.int16).numpy()
        getattr(store, f"{prefix}bary")[s, i] = _u8(small.bary[..., :2].movedim(-1, 1))
    store.focus[s, i] = _u8(max_pool2d(avg_pool2d(focus, c.size // c.grid), 3, 1, 1)[:, 0])
    for k in range(v):
        box = face_crop_box(cameras[k].project(points)[0])
        store.crop[s, i, k] = _u8(crop_image(rgb[k], box, c.crop))
    for k, own in enumerate(posed):
        portrait = complete(head, rgb[k], own.vertices, cameras[k], mask[k], c.texels)
        seen = torch.cat([portrait.carried.grid, portrait.carried.visibility[:, None]], -1)
        store.carried[s, i, k] = seen.half().numpy()
        store.texture[s, i, k] = _u8(portrait.texture)
        sheet = lift(head, own, cameras[k], (mask[k] > 0.5).float())
        store.relief[s, i, k], store.follows[s, i, k] = sheet.points.half().numpy(), sheet.follows.half().numpy()


def _u8(x: Tensor) -> np.ndarray:
    return (x.clamp(0, 1) * 255).round().byte().numpy()


def as_read(tracked: HeadParams, motion: HeadParams, seed: int) -> HeadParams:
    """Give tracked heads the motion that a readout of the expression latent would: shrunk, noisy, gaze at rest.

    The shares are what a regression explains on held-out people (docs/LOG.md).
    """
    rng = generator("readout", seed)

    def noisy(x: Tensor, sigma: float) -> Tensor:
        gain = rng.uniform(0.7, 1.0, (len(x), 1))
        return x * torch.from_numpy(gain).to(x) + torch.from_numpy(rng.normal(0, sigma, tuple(x.shape))).to(x)

    expr = noisy(motion.expr, 0.04).clamp(0, 1)
    return replace(tracked.without_expression(), expr=expr, jaw_pose=noisy(motion.jaw_pose, np.deg2rad(0.7)))


def take(array: np.ndarray, index: tuple, scale: float = 1.0) -> Tensor:
    """Copy rows of a memory-mapped array as float32."""
    return torch.from_numpy(np.array(array[index])).float().div_(scale)


def carried_pixels(
    store: Store, ref: tuple, tgt: tuple, moved: Bool[np.ndarray, "b t"] | None = None, surroundings: bool = False
) -> tuple[Float[Tensor, "b 3 t size size"], Float[Tensor, "b 2 t size size"]]:
    """Carry references' pixels to their targets' heads; the texture fills what the portrait hides.

    `ref` indexes subject, instant and view, [b] each; `tgt` likewise, [b, t]. Heads are without expression, but where
    `moved` is set: there they move as the expression latent would say. Returns the picture, and what the
    portrait itself shows beside where the head is at all. Fragments are stored at half size: their coordinates are
    resampled, not the colours. `surroundings` shows hair and shoulders around the head too.
    """
    size = store.config.size
    faces, uv_atlas, uv_faces = (torch.from_numpy(np.array(x)) for x in (store.faces, store.uv, store.uv_faces))
    still, planes = store.face[tgt], store.bary[tgt]
    if moved is not None and moved.any():
        choose = moved[..., None, None]
        still = np.where(choose, store.moved_face[tgt], still)
        planes = np.where(choose[..., None], store.moved_bary[tgt], planes)
    face = torch.from_numpy(still.astype(np.int64)).flatten(0, 1)
    two = torch.from_numpy(planes).float().div_(255).flatten(0, 1)
    bary = torch.cat([two, 1 - two.sum(1, keepdim=True)], 1).movedim(1, -1)
    fragments = Fragments(face, bary, torch.zeros_like(bary[..., 0]))
    b, t = tgt[0].shape
    carried = take(store.carried, ref).repeat_interleave(t, 0)
    seen = (carried[..., 2:] > 0).float()
    own = interpolate(fragments, faces, torch.cat([carried, seen], -1))
    uv = interpolate(fragments, uv_faces, uv_atlas * 2 - 1)
    hit = (face >= 0).float()[:, None]
    maps = resized(
        torch.cat([own[:, :2], uv, own[:, 2:], hit], 1), size=(size, size), mode="bilinear", align_corners=False
    )
    inside = maps[:, 6:].clamp(min=1e-3)
    rgb, texture = (take(x, ref, 255.0).repeat_interleave(t, 0) for x in (store.rgb, store.texture))

    def look(image: Tensor, grid: Tensor) -> Tensor:
        return grid_sample(image, (grid / inside).movedim(1, -1), padding_mode="border", align_corners=False)

    visible = maps[:, 4:5] * (maps[:, 5:6] > 0.999 * maps[:, 6:]) * (maps[:, 6:] > 0.5)
    colour = look(texture, maps[:, 2:4])
    colour = colour + visible * (look(rgb, maps[:, :2]) - colour)
    mask = (maps[:, 6:] > 0.5).float()
    warp = colour * mask + 0.5 * (1 - mask)
    if surroundings:
        under, alpha = _surroundings(store, ref, tgt)
        alpha = alpha * (1 - mask)
        warp, visible = warp + alpha * (under - warp), visible + alpha
    split = "(b t) c h w -> b c t h w"
    return rearrange(warp, split, b=b), rearrange(torch.cat([visible, mask], 1), split, b=b)


def _surroundings(
    store: Store, ref: tuple, tgt: tuple
) -> tuple[Float[Tensor, "n 3 size size"], Float[Tensor, "n 1 size size"]]:
    """Carry what surrounds the references' heads to their targets: (rgb, alpha), a row for each target."""
    t = tgt[0].shape[1]
    size = store.config.size
    normal = take(store.normal, ref, 255.0) * 2 - 1
    picture = torch.cat([take(store.rgb, ref, 255.0), (normal.square().sum(1, keepdim=True) > 0.25).float()], 1)
    sheet = Relief(*(take(x, ref).repeat_interleave(t, 0) for x in (store.relief, store.follows)))
    joints = take(store.T_world_joint, tgt[:2]).flatten(0, 1)
    cameras = Camera(take(store.T_cam_world, tgt).flatten(0, 1), take(store.K, tgt).flatten(0, 1), size, size)
    return carry_relief(sheet, picture.repeat_interleave(t, 0), joints, cameras)
