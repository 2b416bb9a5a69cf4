"""The avatar: a head and the Gaussians bound to it, rendered as RGB, normals and alpha in one pass (Sec. 3.3)."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians
from geodiff4d.avatar.deformable import DeformableSurface
from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM, Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import read_json, save_tensors, write_json
from geodiff4d.core.geometry import quat_to_matrix
from geodiff4d.core.images import write_image
from geodiff4d.core.stills import MAX_PIXELS
from geodiff4d.data.clip import MAX_FPS
from geodiff4d.data.importing import camera_checked
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.binding_kernels import shortest_axes
from geodiff4d.render.gaussians import Gaussians, rasterize
from geodiff4d.render.harmonics import TurnedHarmonics, degree_of

FORMAT_VERSION = 3
"""Version of the folder's format; version 1 had Gaussians on the head's own mesh alone, version 2 no harmonics."""


@dataclass(frozen=True)
class AvatarFrame:
    """One rendered view."""

    rgb: Float[Tensor, "3 height width"]
    """sRGB on a plain background."""
    normal: Float[Tensor, "3 height width"]
    """Camera-space normals (x right, y up, z to the camera), premultiplied by alpha."""
    alpha: Float[Tensor, "1 height width"]
    """Opacity, 0 to 1."""


@dataclass(frozen=True)
class PosedSplats:
    """An avatar's Gaussians in the world under one expression, for rendering and export."""

    gaussians: Gaussians
    colors: Float[Tensor, "n 3"]
    """sRGB, 0 to 1, without what depends on the view."""
    face_index: Int[Tensor, " n"]
    """The head's face that each is bound to."""
    shading: TurnedHarmonics | None = None
    """What colours add seen from each side."""


@dataclass(frozen=True)
class Avatar:
    """One person: Gaussians on a head, the identity they were fitted with, and the sequence they were fitted to.

    Example:
        >>> avatar = Avatar.load("runs/demo/avatar")  # doctest: +SKIP
        >>> avatar.render(avatar.sequence[0], camera).rgb.shape  # doctest: +SKIP
        torch.Size([3, 256, 256])
    """

    head: Head
    local: LocalGaussians
    shape: Float[Tensor, " shapes"]
    """The person's identity; that of the parameters it is driven with is ignored."""
    sequence: HeadParams
    """The fitted parameters, one row per timestep of the clip."""
    camera: Camera
    """The clip's most frontal camera: the default view."""
    fps: float = 24.0
    parts: DeformableSurface | None = None
    """Remeshed surface, deformation and dynamics; None for Gaussians on the head's own mesh alone."""
    tokens: Float[Tensor, "timesteps _tokens _channels"] | None = None
    """Expression tokens of the sequence, where the clip had them."""

    @cached_property
    def deformable(self) -> DeformableSurface:
        """Return the surface that the Gaussians are bound to: `parts`, or the head's own mesh."""
        return self.parts or DeformableSurface.plain(self.head)

    def neutral(self, *batch: int) -> HeadParams:
        """Return this person at rest at the origin: identity, and whatever offset of each vertex it was fitted with.

        Where there is another offset at every instant (GaussianAvatars'), the first counts.
        """
        still, offset = self.head.neutral(*batch), self.sequence.static_offset
        own = None if offset is None else offset[0].expand(*batch, -1, -1)
        return replace(still, shape=self.shape.expand(*batch, -1), static_offset=own)

    def posed(self, params: HeadParams, tokens: Float[Tensor, "tokens channels"] | None = None) -> PosedSplats:
        """Return the posed splats (no batch axis), differentiable in the Gaussians and in the parameters.

        `tokens` are the frame's expression tokens from the driver's encoder; by default the avatar predicts them from
        the parameters.
        """
        posing = self.deformable.pose(self.local, replace(params, shape=self.shape), tokens)
        face = self.deformable.surface.head_face[self.local.face_index]
        return PosedSplats(posing.gaussians, posing.colors, face, posing.shading)

    def gaussians(self, params: HeadParams) -> Gaussians:
        """Return the posed splats without their colours."""
        return self.posed(params).gaussians

    def render(
        self, params: HeadParams, camera: Camera, background: float | Tensor = 0.5,
        tokens: Float[Tensor, "tokens channels"] | None = None,
    ) -> AvatarFrame:  # fmt: skip
        """Render RGB, normals and alpha in one pass; `background` is a grey level or an RGB triple."""
        posed = self.posed(params, tokens)
        return render_splats(posed.gaussians, posed.colors, camera, background, posed.shading)

    def to(self, device: torch.device | str) -> "Avatar":
        """Return a copy on a device."""
        names = ("head", "local", "shape", "sequence", "camera", "parts", "tokens")
        moved = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return replace(self, **moved)

    def save(self, folder: Path) -> None:
        """Write config.json, avatar.safetensors, params.npz and preview.png into an existing folder."""
        folder = Path(folder)
        config = {
            "format": "geodiff4d avatar", "version": FORMAT_VERSION, "head": self.head.name, "fps": self.fps,
            "gaussians": len(self.local), "width": self.camera.width, "height": self.camera.height,
            "parts": {} if self.parts is None else self.parts.described(),
        }  # fmt: skip
        write_json(folder / "config.json", config)
        camera = {"T_cam_world": self.camera.T_cam_world, "K": self.camera.K}
        tensors = {**self.local.tensors, "shape": self.shape, **camera}
        tensors |= {} if self.tokens is None else {"tokens": self.tokens}
        tensors |= {} if self.parts is None else self.parts.tensors()
        save_tensors(tensors, folder / "avatar.safetensors")
        self.sequence.save(folder / "params.npz")
        with torch.no_grad():
            tokens = None if self.tokens is None else self.tokens[0]
            frame = self.render(self.sequence[0], self.camera, tokens=tokens)
            write_image(folder / "preview.png", frame.rgb.cpu())

    @staticmethod
    def load(folder: Path | str) -> "Avatar":
        """Read an avatar.

        Raises:
            UserError: the folder is not an avatar, or is damaged.
        """
        folder = Path(folder)
        missing = [n for n in ("config.json", "avatar.safetensors", "params.npz") if not (folder / n).exists()]
        if missing:
            raise UserError(f"{folder} is not an avatar: {missing[0]} is missing; make one with `geodiff4d fit`")
        config = read_json(folder / "config.json")
        version = config.get("version") if isinstance(config, dict) else None
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{folder} is an avatar of version {version}: this geodiff4d reads up to {FORMAT_VERSION}; update it"
            )
        try:
            tensors = load_file(folder / "avatar.safetensors")
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{name} has NaN or infinite numbers")
            sides = config["width"], config["height"]
            if not all(type(n) is int for n in sides):
                raise ValueError(f"width and height are {sides}, expected whole numbers")
            camera = Camera(tensors.pop("T_cam_world"), tensors.pop("K"), *sides)
            shape, sequence = tensors.pop("shape"), HeadParams.load(folder / "params.npz")
            tokens, head, described = tensors.pop("tokens", None), load_head(config["head"]), config.get("parts") or {}
            if not isinstance(described, dict):
                raise TypeError(f"parts is {described!r}, expected an object")
            parts = DeformableSurface.restored(head, described, tensors) if described else None
            local = LocalGaussians(**{k: v for k, v in tensors.items() if "." not in k})
            avatar = Avatar(head, local, shape, sequence, camera, float(config["fps"]), parts, tokens)
            check_avatar(avatar, str(folder))
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder} is a damaged avatar ({reason}): fit or copy it again") from None
        return avatar


def check_avatar(avatar: Avatar, where: str) -> None:
    """Refuse what would pose or render as garbage: the compiled loops read past the end of short tensors.

    Raises:
        ValueError: a tensor, the camera, the rate or the sequence is not an avatar's; UserError for another head's.
    """
    local, camera, sequence, count = avatar.local, avatar.camera, avatar.sequence, len(avatar.local)
    shapes = {"means": (3,), "quats": (4,), "log_scales": (3,), "opacity_logits": (), "color_logits": (3,)}
    for name, row in shapes.items():
        tensor: Tensor = getattr(local, name)
        if tensor.dtype != torch.float32 or tensor.shape != (count, *row):
            raise ValueError(f"{name} is {_described(tensor)}, expected float32 {[count, *row]}")
    if local.features is not None and (local.features.dim() != 2 or len(local.features) != count):
        raise ValueError(f"features is {_described(local.features)}, expected a row for each of {count} Gaussians")
    if local.harmonics is not None:
        if local.harmonics.dtype != torch.float32 or local.harmonics.dim() != 3 or len(local.harmonics) != count:
            raise ValueError(f"harmonics is {_described(local.harmonics)}, expected float32 of {count} Gaussians")
        degree_of(local.harmonics)
    if local.face_index.dtype != torch.int64 or local.face_index.dim() != 1:
        raise ValueError(f"face_index is {_described(local.face_index)}, expected int64 in one row")
    if count and int(local.face_index.min()) < 0:
        raise ValueError("face_index has negative numbers")
    if count and int(local.face_index.max()) >= len(avatar.deformable.surface.faces):
        raise UserError(f"{where} was made for another version of the head {avatar.head.name!r}: fit it again")
    if camera.T_cam_world.shape != (4, 4) or camera.K.shape != (3, 3):
        raise ValueError("T_cam_world and K are not one camera's")
    camera_checked(camera.T_cam_world, camera.K, camera.width, camera.height, where)
    if camera.width * camera.height > MAX_PIXELS:
        raise ValueError(f"the camera has {camera.width}×{camera.height} pixels, expected at most {MAX_PIXELS:,}")
    if not (math.isfinite(avatar.fps) and 0 < avatar.fps <= MAX_FPS):
        raise ValueError(f"fps is {avatar.fps}, expected more than 0 and at most {MAX_FPS:g}")
    rows = [v for v in vars(sequence).values() if v is not None]
    if len({len(v) if v.dim() > 1 else -1 for v in rows}) != 1 or rows[0].dim() < 2 or not len(rows[0]):
        raise ValueError("params.npz has no timesteps, or not equally many of everything")
    if not all(bool(v.isfinite().all()) for v in rows):
        raise ValueError("params.npz has NaN or infinite numbers")
    avatar.head.pose(replace(sequence[0], shape=avatar.shape))
    if avatar.tokens is not None and len(avatar.tokens) != len(rows[0]):
        raise ValueError(f"tokens of {len(avatar.tokens)} timesteps, expected {len(rows[0])}")
    if avatar.parts is not None:
        # Networks, code and regressor fit each other if the first instant can be posed, with and without its tokens.
        with torch.no_grad():
            avatar.posed(sequence[0])
            if avatar.tokens is not None:
                avatar.posed(sequence[0], avatar.tokens[0])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def render_splats(
    gaussians: Gaussians, colors: Float[Tensor, "n 3"], camera: Camera, background: float | Tensor = 0.5,
    shading: TurnedHarmonics | None = None,
) -> AvatarFrame:  # fmt: skip
    """Render colours and shortest-axis normals in one six-channel pass; `background` is grey or an RGB triple."""
    if shading is not None:
        colors = shading.seen(colors, gaussians.means, camera)
    image, alpha = rasterize(gaussians, camera, torch.cat([colors, splat_normals(gaussians, camera)], -1))
    if isinstance(background, Tensor):
        background = background[:, None, None]
    # Slices would cost a whole image of zeros each on the way back.
    rgb, normal = image.split(3)
    return AvatarFrame(rgb + (1 - alpha) * background, normal, alpha)


def splat_normals(gaussians: Gaussians, camera: Camera) -> Float[Tensor, "n 3"]:
    """Return each splat's shortest axis, flipped to the viewer, in camera space (x right, y up, z to the camera)."""
    turn = camera.T_cam_world[:3, :3]
    R = (IMAGE_NORMAL_FROM_CAM.to(turn.device) @ turn).to(gaussians.quats)
    if not gaussians.quats.is_cuda:
        eye = camera.position.to(gaussians.means)
        return shortest_axes(gaussians.quats, gaussians.scales, gaussians.means, eye, R)
    x, y, z = gaussians.scales.unbind(-1)
    shortest = torch.where(x < torch.minimum(y, z), 0, torch.where(y < z, 1, 2))[:, None, None].expand(-1, 3, 1)
    axis = quat_to_matrix(gaussians.quats).gather(-1, shortest).squeeze(-1)
    toward = camera.position.to(axis) - gaussians.means.detach()
    facing = torch.where((axis * toward).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return facing * axis @ R.mT
