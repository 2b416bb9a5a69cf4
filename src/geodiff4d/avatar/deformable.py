"""The deformable surface that Gaussians are bound to: from head parameters and an expression to Gaussians in the world.

head → surface (remeshed or its own) → displaced by the U-Net → a frame per triangle → Gaussians, with the MLP's
residuals (Sec. 3.3). Parts that an avatar does without are None.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians, face_frames, place
from geodiff4d.avatar.deformation import Deformation, DeformationConfig, PositionMap, canonical
from geodiff4d.avatar.dynamics import Dynamics, DynamicsConfig
from geodiff4d.avatar.expression import Code, ExpressionCode
from geodiff4d.avatar.surface import Surface, own_surface
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.gaussians import Gaussians
from geodiff4d.render.harmonics import TurnedHarmonics


@dataclass(frozen=True)
class Posing:
    """Gaussians in the world, and the networks' outputs that moved them, which the fit penalises."""

    gaussians: Gaussians
    colors: Float[Tensor, "n 3"]
    """sRGB, 0 to 1, without what depends on the view."""
    shading: TurnedHarmonics | None = None
    """What they add seen from each side; None where colours are the same from everywhere."""
    displacement: Float[Tensor, "1 3 size size"] | None = None
    """Displacement of the surface, in texture space [cm]; None without a deformation network."""
    residuals: Float[Tensor, "n outputs"] | None = None
    """Outputs of the dynamics MLP for each Gaussian, in units of `dynamics.STRENGTH`; None without it."""


@dataclass(frozen=True)
class DeformableSurface:
    """A head's surface with the networks that deform it: what a person's Gaussians are bound to (Sec. 3.3)."""

    head: Head
    surface: Surface
    """The mesh, at rest."""
    code: ExpressionCode | None = None
    """What the networks are conditioned on."""
    deformation: Deformation | None = None
    dynamics: Dynamics | None = None
    maps: PositionMap | None = None
    """Lookups between the surface and texture space; present with the deformation."""

    @staticmethod
    def plain(head: Head) -> "DeformableSurface":
        """Return the head's own mesh, with nothing added."""
        return DeformableSurface(head, own_surface(head))

    def expression(self, params: HeadParams, tokens: Float[Tensor, "tokens channels"] | None = None) -> Code | None:
        """Return the code of one expression; None where no network is conditioned on it."""
        if self.code is None or (self.deformation is None and self.dynamics is None):
            return None
        return self.code(params, tokens)

    def vertices(
        self, params: HeadParams, code: Code | None = None
    ) -> tuple[Float[Tensor, "verts 3"], Float[Tensor, "1 3 size size"] | None]:
        """Return the posed surface's vertices in the world [m], and their displacement in texture space [cm]."""
        mesh = self.head.pose(params)
        vertices, displacement = self.surface.on(mesh.vertices), None
        if self.deformation is not None and self.maps is not None and code is not None:
            displacement = self.deformation(self.position_map(params), code.tokens)
            vertices = vertices + self.maps.read(displacement, mesh.T_world_joint)
        return vertices, displacement

    @torch.no_grad()
    def position_map(self, params: HeadParams) -> Float[Tensor, "1 6 size size"]:
        """Return the deformation network's input: the head moved by its expression alone, drawn in texture space."""
        assert self.maps is not None
        both = HeadParams.stack([canonical(params), canonical(params.without_expression())])
        moved, rest = self.head.pose(both).vertices.unbind(0)
        return self.maps.map(moved, rest)

    def pose(
        self, local: LocalGaussians, params: HeadParams, tokens: Float[Tensor, "tokens channels"] | None = None,
        vertices: Float[Tensor, "verts 3"] | None = None,
    ) -> Posing:  # fmt: skip
        """Pose Gaussians (no batch axis). `vertices`, of the posed surface, are computed unless they are given."""
        code, displacement, residuals = self.expression(params, tokens), None, None
        if vertices is None:
            vertices, displacement = self.vertices(params, code)
        if self.dynamics is not None and code is not None and local.features is not None:
            residuals = self.dynamics(local.features, code.summary)
            local = self.dynamics.applied(local, residuals)
        splats = place(local, vertices, self.surface.faces)
        shading = None
        if local.harmonics is not None:
            turn = face_frames(vertices, self.surface.faces).R.index_select(0, local.face_index)
            shading = TurnedHarmonics(local.harmonics, turn)
        return Posing(splats, local.color_logits.sigmoid(), shading, displacement, residuals)

    def networks(self) -> dict[str, Deformation | Dynamics]:
        """Return the networks that are learned with the Gaussians, by name."""
        both: dict[str, Deformation | Dynamics | None] = {"deformation": self.deformation, "dynamics": self.dynamics}
        return {name: network for name, network in both.items() if network is not None}

    def to(self, device: torch.device | str) -> "DeformableSurface":
        """Copy everything to a device; the networks are moved where they are."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    def described(self) -> dict[str, Any]:
        """Return the configurations of the parts that are there, for JSON; `restored` reads them."""
        out = {name: asdict(network.config) for name, network in self.networks().items()}
        return out | ({"remeshed": True} if self.surface.remeshed else {})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors but the head's, by `part.name`; `restored` reads them."""
        parts: dict[str, dict[str, Tensor]] = {n: dict(m.state_dict()) for n, m in self.networks().items()}
        if self.surface.remeshed:
            parts["surface"] = {k: v for k, v in vars(self.surface).items() if isinstance(v, Tensor)}
        if self.code is not None and self.networks():
            parts["code"] = self.code.tensors()
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    @staticmethod
    def restored(head: Head, described: dict[str, Any], tensors: dict[str, Tensor]) -> "DeformableSurface":
        """Make a surface from what `described` and `tensors` returned.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: they do not fit each other.
        """

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        surface = Surface(**part("surface"), remeshed=True) if described.get("remeshed") else own_surface(head)
        if surface.remeshed:
            surface.check(head)
        code = ExpressionCode.from_tensors(part("code")) if part("code") else None
        deformation = dynamics = maps = None
        if code is not None and "deformation" in described:
            deformation = Deformation(DeformationConfig(**described["deformation"]), code.size)
            deformation.load_state_dict(part("deformation"))
            maps = PositionMap.of(head, surface, deformation.config.size)
        if code is not None and "dynamics" in described:
            dynamics = Dynamics(DynamicsConfig(**described["dynamics"]), code.basis.shape[1])
            dynamics.load_state_dict(part("dynamics"))
        for network in (deformation, dynamics):
            if network is not None:
                network.requires_grad_(False)
        return DeformableSurface(head, surface, code, deformation, dynamics, maps)
