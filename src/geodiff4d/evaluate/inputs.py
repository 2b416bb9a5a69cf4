"""What every method of a protocol gets, and what it is scored against: tracked reference and driver, and the truth.

Reference and driver are tracked from their pixels, as a user's are, and written as clips; no method sees true
parameters. In self-reenactment the truth is the driver's own frames, cut where the tracker cut them. In
cross-reenactment the open world's own person performs what the driver performed, seen where the tracked head is: an
image does not tell how large a head is, so position and scale are aligned, one for all frames, and rotations are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.geometry import transform
from geodiff4d.core.images import composite
from geodiff4d.data.clip import Clip, ClipFrame, ClipWriter
from geodiff4d.evaluate.cases import Case, Recording
from geodiff4d.evaluate.metrics import Truth
from geodiff4d.evaluate.pairs import FACE_MARGIN_PX, FACE_REGIONS
from geodiff4d.heads import Head, HeadParams
from geodiff4d.heads.rig import SKULL_JOINT
from geodiff4d.render.crops import canonical_crop_box, crop_image, head_region
from geodiff4d.render.meshes import interpolate, rasterize
from geodiff4d.render.viewpoints import world_region
from geodiff4d.tracking.placed import placed
from geodiff4d.tracking.track import TrackingConfig, track_frames
from geodiff4d.video.inputs import Portrait, load_portrait, with_identity_of
from geodiff4d.world.subject import SyntheticSubject
from geodiff4d.world.tracker_error import disturbed

Tracking = Literal["pixels", "clip"]


@dataclass(frozen=True)
class Inputs:
    """A case, ready to be generated and scored; everything was read back from files."""

    case: Case
    portrait: Portrait
    driving: Clip
    params: HeadParams
    """The driver's motion in the portrait's shape, [frames, …]; as large in the image as the driver."""
    camera: Camera
    """The driver's, one for all frames."""
    truth: Truth | None
    """None where it is not known how the reference's person performs what another did (real cross-reenactment)."""
    yaw_difference_deg: Float[Tensor, " frames"]
    """Between how the head stands to the camera in the reference and in each frame."""

    @property
    def cameras(self) -> Camera:
        return self.camera.expand(len(self.case.driving.timesteps))


def prepare_reference(out: Path, case: Case, head: Head, size: int, tracking: Tracking) -> Clip:
    """Track a case's reference into OUT/references; what is there is kept.

    Raises:
        UserError: the tracker sees no face.
    """
    return _track(out / "references" / case.reference_name, case.reference, head, size, tracking)


def stamp(*sources: Recording) -> str:
    """Tell frames of clips apart: which they are, their cameras, and how large their files are."""
    parts = []
    for source in sources:
        clip = Clip(source.clip)
        chosen = [r for r in clip.records if r.camera_index == source.camera and r.timestep in source.timesteps]
        parts += [source.clip.name, clip.fps, source.timesteps]
        images = [r.image_path for r in chosen]
        parts += [r.camera for r in chosen] + [(p.name, p.stat().st_size if p.exists() else 0) for p in images]
    return fingerprint(*parts)


def prepare_driver(out: Path, case: Case, head: Head, size: int, tracking: Tracking) -> Clip:
    """Track a case's driver into OUT/drivers; what is there is kept.

    Raises:
        UserError: the tracker sees no face.
    """
    name = f"{case.driving.clip.name}_c{case.driving.camera:02d}"
    return _track(out / "drivers" / name, case.driving, head, size, tracking)


def prepare_case(out: Path, case: Case, head: Head, size: int, tracking: Tracking) -> Inputs:
    """Track a case's driver into OUT/drivers and write its truth into OUT/truth; what is there is kept.

    Raises:
        UserError: the tracker sees no face.
    """
    reference = prepare_reference(out, case, head, size, tracking)
    portrait = load_portrait(reference, size)
    driving = prepare_driver(out, case, head, size, tracking)
    frames = [driving.frame(i) for i in range(len(driving))]
    tracked = HeadParams.stack([f.params for f in frames if f.params is not None])
    camera = frames[0].camera
    params = placed(head, with_identity_of(portrait, tracked), tracked, camera)
    folder = out / "truth" / case.name
    of = fingerprint(reference.extra["of"], driving.extra["of"], case.same)
    if not (folder / "transforms.json").exists() or Clip(folder).extra.get("of") != of:
        _write_truth(folder, case, driving, params, camera, head, of)
    truth = None if Clip(folder).extra.get("none") else _read_truth(Clip(folder), tracked, camera, head)
    own = head_yaw(head, HeadParams.stack([portrait.params]), portrait.camera)
    difference = torch.rad2deg(
        torch.remainder(head_yaw(head, params, camera) - own + torch.pi, 2 * torch.pi) - torch.pi
    )
    return Inputs(case, portrait, driving, params, camera, truth, difference.abs())


def head_yaw(head: Head, params: HeadParams, camera: Camera) -> Float[Tensor, " frames"]:
    """How far a head looks past the camera, sideways [rad]."""
    R = camera.T_cam_world[:3, :3] @ head.pose(params).T_world_joint[:, SKULL_JOINT, :3, :3]
    return torch.atan2(R[:, 0, 2], -R[:, 2, 2])


def source_frames(source: Recording) -> list[ClipFrame]:
    """Read the frames of a recording, in order.

    Raises:
        UserError: its clip lacks one.
    """
    clip = Clip(source.clip)
    at = {(r.timestep, r.camera_index): i for i, r in enumerate(clip.records)}
    try:
        return [clip.frame(at[t, source.camera]) for t in source.timesteps]
    except KeyError as error:
        raise UserError(f"{source.clip} has no frame {error} (timestep, camera): import the clip again") from None


def _track(folder: Path, source: Recording, head: Head, size: int, tracking: Tracking) -> Clip:
    of = fingerprint(stamp(source), head.name, head.template, size, tracking)
    if (folder / "transforms.json").exists() and (known := Clip(folder)).extra.get("of") == of:
        return known
    frames, fps = source_frames(source), Clip(source.clip).fps
    images = [f.image for f in frames]
    if tracking == "pixels":
        found = track_frames(images, head, config=TrackingConfig(size=size), video=len(frames) > 1)
        box, camera, params, cuts, masks = found.located.box, found.camera, found.params, found.images, found.masks
        normals = found.normals
    else:
        params, uncut = _own_parameters(frames, source, head), frames[0].camera
        box = canonical_crop_box(uncut, head.pose(params).vertices[:, head_region(head)])
        camera, normals = uncut.cropped(*box, size), None
        cuts = torch.stack([crop_image(i, box, size, fill=0.5) for i in images])
        masks = torch.stack([crop_image(f.mask, box, size, fill=0.0) for f in frames])
    extra = {"crop": list(box), "tracking": tracking, "normals": None if normals is None else "detector"}
    extra["of"] = of
    with ClipWriter(folder, head.name, fps, extra) as clip:
        for k, t in enumerate(source.timesteps):
            clip.add_params(t, params[k])
            normal = None if normals is None or len(frames) > 1 else normals[k]
            clip.add(t, source.camera, cuts[k], camera, masks[k], normal)
    return Clip(folder)


def _own_parameters(frames: list[ClipFrame], source: Recording, head: Head) -> HeadParams:
    """Take the clip's parameters: a tracker's, or the truth with a tracker's error."""
    clip = Clip(source.clip)
    clip.require_head(head.name)
    known = [f.params for f in frames if f.params is not None]
    if len(known) < len(frames):
        raise UserError(f"{source.clip} has frames without head parameters: use --tracking pixels")
    params = HeadParams.stack(known)
    true = clip.extra.get("params") == "truth"
    return disturbed(params, int(clip.extra.get("subject_seed", 0)) + source.camera) if true else params


# The truth


def _write_truth(
    folder: Path, case: Case, driving: Clip, params: HeadParams, camera: Camera, head: Head, of: str
) -> None:
    source, reference = Clip(case.driving.clip), Clip(case.reference.clip)
    box, size = tuple(driving.extra["crop"]), camera.width
    made = "subject_seed" in source.extra and "subject_seed" in reference.extra
    extra = {"none": not case.same and not made, "of": of}
    with ClipWriter(folder, head.name, source.fps, extra) as clip:
        frames = source_frames(case.driving)
        if not case.same and made:
            subject = SyntheticSubject(int(reference.extra["subject_seed"]), reference.extra["split"])
            shown = performed(subject, frames, params, camera, box, head)
        for k, t in enumerate(case.driving.timesteps):
            if case.same or not made:
                image, mask, normal = cut_frame(frames[k], box, size)
            else:
                image, normal, mask = (x[k] for x in shown)
            clip.add(t, case.driving.camera, image, camera, mask, normal)


def cut_frame(frame: ClipFrame, box: tuple[float, float, float], size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut a source's frame where the tracker cut it: (image, mask, normals if there are any)."""
    mask = crop_image(frame.mask, box, size, fill=0.0)
    normal = None if frame.normal is None else _renormalised(crop_image(frame.normal, box, size, fill=0.0), mask)
    return crop_image(frame.image, box, size, fill=0.5), mask, normal


def performed(
    subject: SyntheticSubject, frames: Sequence[ClipFrame], params: HeadParams, camera: Camera,
    box: tuple[float, float, float], head: Head,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Render a person of the open world performing a driver's true motion, where the tracked head is.

    `params` are the tracked motion in the reference's shape and `camera` the tracked crop's; position and scale in
    front of the camera are aligned over all frames. Returns (rgb, normals, mask).
    """
    m = HeadParams.stack([f.params for f in frames if f.params is not None])
    motion = subject.params(m.expr, m.rotation, m.neck_pose, m.jaw_pose, m.eyes_pose, m.translation)
    true = frames[0].camera.cropped(*box, camera.width)
    n = len(frames)
    a = transform(camera.expand(n).T_cam_world, head.pose(params).vertices[:, head_region(head)])
    b = transform(true.expand(n).T_cam_world, subject.vertices(motion)[:, world_region()])
    ca, cb = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    scale = (b - cb).norm() / (a - ca).norm()
    T = true.T_cam_world.clone()
    T[:3, 3] += (scale * ca - cb).mean((0, 1))
    out = subject.render(motion, replace(camera, T_cam_world=T).expand(n))
    return out.rgb, out.normal, out.mask


def _renormalised(normal: Tensor, mask: Tensor) -> Tensor:
    """Normals after resampling: unit again, and none where the surface ends."""
    length = normal.norm(dim=0, keepdim=True)
    return normal / length.clamp(min=1e-6) * ((length > 0.5) & (mask > 0.5))


def _read_truth(clip: Clip, tracked: HeadParams, camera: Camera, head: Head) -> Truth:
    frames = [clip.frame(i) for i in range(len(clip))]
    mask = torch.stack([f.mask for f in frames])
    rgb = torch.stack([composite(f.image, f.mask) for f in frames])
    normals = [f.normal for f in frames if f.normal is not None]
    normal = torch.stack(normals) if len(normals) == len(frames) else torch.zeros_like(rgb)
    return Truth(rgb, normal, mask, face_mask(head, tracked, camera) * mask)


def face_mask(head: Head, params: HeadParams, camera: Camera) -> Float[Tensor, "frames 1 height width"]:
    """Mark mouth and eyes of a tracked head, a little grown."""
    known = [head.regions[r] for r in FACE_REGIONS if r in head.regions]
    inside = torch.stack(known).any(0).float()[:, None]
    n = params.batch[0]
    fragments = rasterize(head.pose(params).vertices, head.faces, camera.expand(n))
    grown = 2 * FACE_MARGIN_PX + 1
    return torch.nn.functional.max_pool2d(
        (interpolate(fragments, head.faces, inside) > 0.5).float(), grown, 1, FACE_MARGIN_PX
    )
