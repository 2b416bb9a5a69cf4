"""Where a head's points lie in the images of one camera, and how that changes with what is fitted."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import IMAGE_NORMAL_FROM_CAM
from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.heads.rig import EYE_JOINTS, JOINTS, Head, joint_transforms
from geodiff4d.tracking.layout import Layout
from geodiff4d.tracking.solve import Limits

FRONT = IMAGE_NORMAL_FROM_CAM
"""Rotation from the world to an upright camera that looks along -z."""

JAW_JOINT = JOINTS.index("jaw")

DIFFERENCE = 1e-6
"""Step of the pose angles' numerical derivatives [rad]."""


def camera_offset() -> Float[Tensor, "3"]:
    """Return the world's origin in the camera while fitting: one metre in front of it."""
    return torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


class Projection:
    """The first `count` points of a reduced head (`layout.landmark_head`) before the camera of the fit."""

    def __init__(self, head: Head, layout: Layout, count: int, K: Float[Tensor, "3 3"], moves: Limits):
        self.head, self.layout, self.count, self.K = head, layout, count, K
        free = moves.free_frame.nonzero()[:, 0].tolist()
        angles = [
            i
            for k in ("jaw_pose", "eyes_pose", "eyelids")
            if k in layout.slices
            for i in range(layout.size)[layout.slices[k]]
        ]
        self.angles = [i for i in angles if i in free and self._turns(i)]
        self.rotates = bool(moves.free_frame[layout.slices["rotation"]].any())
        self.shapes_move = bool(moves.free_shared[:-1].any())
        self.expr_moves = bool(moves.free_frame[layout.slices["expr"]].any())
        self.front, self.offset = FRONT.double(), camera_offset()

    def _turns(self, unknown: int) -> bool:
        """Whether an angle moves any of the points."""
        for name, joint in (("jaw_pose", JAW_JOINT), ("eyes_pose", EYE_JOINTS)):
            where = self.layout.slices[name]
            if where.start <= unknown < where.stop:
                return bool(self.head.skin_weights[: self.count, joint].any())
        return True

    def project(
        self, frame: Float[Tensor, "frames unknowns"], shared: Float[Tensor, " shared"]
    ) -> Float[Tensor, "frames points 2"]:
        """Return the points in some frames [px]."""
        xy, _ = self._through_camera(self._place(frame, shared[:-1]), shared[-1])
        return xy

    def _place(self, frame: Tensor, shape: Tensor) -> Tensor:
        """Return the points in the world [frames, points, 3]."""
        params = self.layout.params(frame, shape.expand(len(frame), -1))
        return self.head.pose(params).vertices[:, : self.count]

    def _nudged(self, frame: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points in the world, and how they move with each of `angles` [angles, frames, points, 3]."""
        nudged = frame.repeat(1 + len(self.angles), 1, 1)
        for row, i in enumerate(self.angles, 1):
            nudged[row, :, i] += DIFFERENCE
        # Posed all at once: for a few hundred points, calling costs more than computing.
        world, *moved = self._place(nudged.flatten(0, 1), shape).unflatten(0, (-1, len(frame)))
        return world, torch.stack([(m - world) / DIFFERENCE for m in moved]).float() if moved else world.new_zeros(0)

    def _through_camera(self, world: Tensor, log_zoom: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [frames, points, 2] and their derivative in the world's points [frames, points, 2, 3]."""
        cam = world @ self.front.T + self.offset
        # A head that a bad step puts behind the camera stays finite, and is rejected by its cost.
        z = cam[..., 2].clamp(min=0.02)
        focal = self.K[0, 0] * log_zoom.exp()
        ray = cam[..., :2] / z[..., None]
        J = torch.zeros(*z.shape, 2, 3, dtype=z.dtype)
        J[..., 0, 0] = J[..., 1, 1] = focal / z
        J[..., 2] = -focal * ray / z[..., None]
        return ray * focal + self.K[:2, 2], J @ self.front

    def jacobian(
        self, frame: Float[Tensor, "frames unknowns"], shared: Float[Tensor, " shared"]
    ) -> tuple[Float[Tensor, "frames points 2"], Float[Tensor, "frames points 2 all"]]:
        """Return the points [px], and their derivatives in the frames' unknowns, then the shared ones (float32).

        Linear bases are differentiated by hand (through skinning and the joints that they move), and so is the head's
        rotation, the few other angles by differences in double precision. What the stage holds fixed is left at zero.
        """
        world, by_angles = self._nudged(frame, shared[:-1])
        xy, camera = self._through_camera(world, shared[-1])
        n, where = self.layout.size, self.layout.slices
        moved_by = torch.zeros(*world.shape, n + len(shared))
        for i, by_angle in zip(self.angles, by_angles, strict=True):
            moved_by[..., i] = by_angle
        if self.rotates:
            turned = torch.einsum("fiab,fpb->fpai", *self._turned(frame, world, shared[:-1]))
            moved_by[..., where["rotation"]] = turned
        moved_by[..., where["translation"]] = torch.eye(3)
        if self.shapes_move or self.expr_moves:
            shape_moves, expr_moves = self._through_skinning(frame)
            moved_by[..., n:-1][..., : shape_moves.shape[-1]] = shape_moves
            moved_by[..., where["expr"]][..., : expr_moves.shape[-1]] = expr_moves
        J = torch.einsum("fpab,fpbk->fpak", camera.float(), moved_by)
        J[..., -1] = (xy - self.K[:2, 2]).float()
        return xy, J

    def along(
        self, frame: Float[Tensor, "frames unknowns"], shared: Float[Tensor, " shared"],
        slope: Callable[[Float[Tensor, "frames points 2"]], Float[Tensor, "frames points 2"]],
    ) -> Float[Tensor, "frames points unknowns"]:  # fmt: skip
        """Return the derivative of one number per point in the frames' unknowns, in single precision.

        `slope` gives that number's derivative in the point's place [1 / px], for points at given pixels. It is the row
        of `jacobian` along that slope, without its two rows in memory.
        """
        world, by_angles = self._nudged(frame, shared[:-1])
        xy, camera = self._through_camera(world, shared[-1])
        pull = (slope(xy)[..., None, :] @ camera.float())[..., 0, :]
        out = torch.zeros(*xy.shape[:2], self.layout.size)
        for i, by_angle in zip(self.angles, by_angles, strict=True):
            out[..., i] = (by_angle * pull).sum(-1)
        if self.rotates:
            spin, arm = self._turned(frame, world, shared[:-1])
            out[..., self.layout.slices["rotation"]] = torch.einsum("fpa,fiab,fpb->fpi", pull, spin, arm)
        out[..., self.layout.slices["translation"]] = pull
        if self.expr_moves:
            basis = self.head.expr_basis
            turn, shift = self._skinned(frame, basis)
            weights = self.head.skin_weights[: self.count].float()
            local = torch.einsum("fpa,fpab->fpb", pull, turn)
            expr = (local.transpose(0, 1) @ basis[: self.count].float()).transpose(0, 1)
            for j in weights.any(0).nonzero()[:, 0].tolist():
                expr = expr + (pull * weights[:, j, None]) @ shift[:, :, j].mT
            out[..., self.layout.slices["expr"]] = expr
        return out

    def _turned(self, frame: Tensor, world: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Return how the head turns with each of its three angles [frames, 3, 3, 3], and the points from the joint that
        it turns about [frames, points, 3]: their products are the points' derivatives."""
        where, n = self.layout.slices, self.count
        angles = frame[:, None, where["rotation"]]
        step = DIFFERENCE * torch.eye(3, dtype=frame.dtype)
        R, moved = axis_angle_to_matrix(torch.cat([angles, angles + step], 1)).split([1, 3], 1)
        spin = (moved - R) / DIFFERENCE @ R.mT
        # The reduced head's first joint is its vertex after the points.
        pivot = (
            self.head.template[n]
            + self.head.shape_basis[n] @ shape
            + frame[:, where["expr"]] @ self.head.expr_basis[n].T
        )
        return spin.float(), (world - (pivot + frame[:, where["translation"]])[:, None]).float()

    def _skinned(self, frame: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return how skinning turns each point [frames, points, 3, 3], and how far each of the basis' terms shifts the
        joints' transforms, since it moves the joints [frames, terms, joints, 3]."""
        params = self.layout.params(frame, frame.new_zeros(len(frame), self.layout.shapes))
        angles = torch.stack([params.rotation, params.neck_pose, params.jaw_pose, *params.eyes_pose.split(3, -1)], -2)
        R = axis_angle_to_matrix(angles)
        # With the rotations held, joint transforms are linear in the joints' places.
        joints = (self.head.joint_regressor @ basis.flatten(1)).view(-1, *basis.shape[1:]).permute(2, 0, 1)
        T = joint_transforms(R[:, None].expand(-1, len(joints), -1, -1, -1), joints.expand(len(R), -1, -1, -1))
        turn = torch.einsum("nj,fjab->fnab", self.head.skin_weights[: self.count], T[:, 0, :, :3, :3])
        return turn.float(), T[..., :3, 3].float()

    def _through_skinning(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the placed points in the identity and expression coefficients [frames, points, 3, …].

        Those of coefficients that are held are not computed, and empty.
        """
        n, split = self.count, self.layout.shapes * self.shapes_move
        shapes = self.head.shape_basis[..., :split]
        basis = torch.cat([shapes, self.head.expr_basis[..., : self.head.expr_basis.shape[-1] * self.expr_moves]], -1)
        turn, shift = self._skinned(frame, basis)
        out = torch.einsum("fnab,nbk->fnak", turn, basis[:n].float())
        out = out + torch.einsum("nj,fkja->fnak", self.head.skin_weights[:n].float(), shift)
        return out[..., :split], out[..., split:]
