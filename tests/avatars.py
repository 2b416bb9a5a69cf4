"""A small avatar that nobody fitted: coloured splats on a head, for tests of what happens afterwards."""

from dataclasses import replace

import torch

from geodiff4d.avatar.binding import sample_surface
from geodiff4d.avatar.deformable import DeformableSurface
from geodiff4d.avatar.deformation import Deformation, DeformationConfig, PositionMap
from geodiff4d.avatar.dynamics import Dynamics, DynamicsConfig
from geodiff4d.avatar.expression import fit_expression_code
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.surface import own_surface
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.heads.rig import Head, HeadParams


def painted_avatar(head: Head, sequence: HeadParams, gaussians: int = 1, size: int = 64, harmonics: int = 0) -> Avatar:
    """Return an avatar seen from an angle, so that a mirrored or turned picture would show."""
    local = sample_surface(
        head.template, head.faces, torch.ones(len(head.faces)), gaussians, torch.Generator().manual_seed(0)
    )
    points = head.template[head.faces[local.face_index]].mean(1)
    waves = torch.tensor([[60.0, 10.0, 0.0], [20.0, 50.0, 40.0], [0.0, 30.0, 45.0]])
    local = replace(local, color_logits=torch.logit(0.5 + 0.4 * torch.sin(points @ waves)))
    if harmonics:
        count = (harmonics + 1) ** 2 - 1
        noise = torch.randn(len(local), count, 3, generator=torch.Generator().manual_seed(1))
        local = replace(local, harmonics=0.1 * noise)
    T = look_at(torch.tensor([0.5, 0.25, 0.9]), torch.tensor([0.0, -0.02, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    return Avatar(
        head, local, sequence.shape[0], sequence, Camera(T, pinhole(2.75 * size, size, size), size, size), 12.0
    )


def talking(head: Head, frames: int = 12, seed: int = 0) -> HeadParams:
    """Somebody who opens the mouth and smiles now and then, from a face at rest."""
    g = torch.Generator().manual_seed(seed)
    neutral = head.neutral(frames)
    expr = torch.zeros_like(neutral.expr)
    count = min(expr.shape[1], 20)
    expr[:, :count] = (torch.rand(frames, count, generator=g) - 0.4).clamp(min=0)
    jaw = torch.zeros(frames, 3)
    jaw[:, 0] = 0.2 * (torch.rand(frames, generator=g) - 0.4).clamp(min=0)
    return replace(neutral, expr=expr, jaw_pose=jaw)


def with_networks(avatar: Avatar, tokens: torch.Tensor | None, seed: int = 0) -> Avatar:
    """Return the avatar with a deformation and dynamics that do something, as a fit on such a clip leaves them."""
    g = torch.Generator().manual_seed(seed)
    code, _ = fit_expression_code(avatar.sequence, tokens)
    surface = own_surface(avatar.head)
    deformation = Deformation(DeformationConfig(size=32, channels=4, levels=2), code.size)
    dynamics = Dynamics(DynamicsConfig(), code.basis.shape[1])
    for network in (deformation, dynamics):
        for parameter in network.parameters():
            parameter.data += 0.06 * torch.randn(parameter.shape, generator=g)
        network.requires_grad_(False)
    maps = PositionMap.of(avatar.head, surface, 32)
    deformable = DeformableSurface(avatar.head, surface, code, deformation, dynamics, maps)
    features = torch.randn(len(avatar.local), dynamics.config.features, generator=g)
    return replace(avatar, local=replace(avatar.local, features=features), parts=deformable, tokens=tokens)
