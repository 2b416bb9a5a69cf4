"""`SyntheticSubject`: one person of the open world, a pure function of (seed, split).

A subject is harder than the head that tracks it: its identity comes from a wider basis than OpenHead exposes, its
surface carries smooth offsets of its own, its actions have personal strengths, sides and shapes, and its hair, beard,
glasses and clothes lie outside the head mesh (docs/WORLD.md).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.viewpoints import openhead
from geodiff4d.world import appearance, garments, glasses, growth, hair, stage
from geodiff4d.world.draw import Backend, Scene, draw
from geodiff4d.world.identity import fit_shape, personal_rig
from geodiff4d.world.mesh import SubjectMesh, assemble, pose
from geodiff4d.world.seeds import Split, generator
from geodiff4d.world.traits import draw_traits

WORLD_VERSION = 2
"""Goes up whenever a subject's pictures change: figures on test subjects compare within one version only."""
BATCH_SAMPLES, CPU_BATCH_SAMPLES = 50_000_000, 4_000_000
"""Samples drawn at once: bounds the memory whatever the number of frames."""


@dataclass(frozen=True)
class SyntheticFrames:
    """Rendered images and their exact normals."""

    rgb: Float[Tensor, "*batch 3 height width"]
    """sRGB in [0, 1], on the subject's background."""
    normal: Float[Tensor, "*batch 3 height width"]
    """Unit, camera space (x right, y up, z to the camera); zero on the background."""
    mask: Float[Tensor, "*batch 1 height width"]
    """Foreground coverage in [0, 1], antialiased."""


def plain_seed(index: int, split: Split, first: int = 0) -> int:
    """Return the seed of the `index`-th person from `first` on who is not domain-randomised."""
    seed = first - 1
    for _ in range(index + 1):
        seed += 1
        while draw_traits(generator("subject", split, seed, "traits")).randomised:
            seed += 1
    return seed


class SyntheticSubject:
    """One person: geometry, appearance, light and background, all fixed by (seed, split).

    Example:
        >>> subject = SyntheticSubject(0, "train")  # doctest: +SKIP
        >>> expr, jaw, eyes = random_expression(0, 4)  # doctest: +SKIP
        >>> params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)  # doctest: +SKIP
        >>> frames = subject.render(params, random_cameras(4, 0))  # doctest: +SKIP
    """

    def __init__(self, seed: int, split: Split = "train"):
        self.seed, self.split = seed, split
        self.key = ("subject", split, seed)
        rng = generator(*self.key, "traits")
        self.traits = draw_traits(rng)
        self.style = hair.draw_style(rng)
        self.light = stage.draw_light(generator(*self.key, "light"), self.traits.melanin)
        self.rig = personal_rig(self.key)
        self.tracked_shape: Float[Tensor, " shapes"] = fit_shape(self.rig.template)
        cloth = garments.cloth_thickness(openhead().template, generator(*self.key, "clothes"))
        pieces = hair.build(self.style, self.rig.template, generator(*self.key, "hair"))
        pieces += glasses.build(self.traits, self.rig.template, generator(*self.key, "glasses", "shape"))
        fur = growth.grow_beard(self.traits, generator(*self.key, "beard", "shape"))
        self.mesh = assemble(self.rig.template, cloth, fur, pieces, self.light.direction)
        self._rigs: dict[torch.device, Head] = {self.rig.template.device: self.rig}
        self._scenes: dict[torch.device, tuple[Scene, SubjectMesh]] = {}
        self._backgrounds: dict[tuple[int, torch.device], Tensor] = {}

    @cached_property
    def texture(self) -> Float[Tensor, "texels 8"]:
        """The painted atlas, made when it is first needed."""
        return appearance.paint_subject(self.traits, self.style, self.key)

    def _rig_on(self, device: torch.device) -> Head:
        if device not in self._rigs:
            self._rigs[device] = self.rig.to(device)
        return self._rigs[device]

    def _on(self, device: torch.device) -> tuple[Scene, SubjectMesh]:
        if device not in self._scenes:
            m, light = self.mesh.to(device), self.light.to(device)
            texture = self.texture.to(device)
            scene = Scene(m.faces, m.uv, m.uv_faces, m.kind, m.shell, m.openness, m.tangents, texture, light)
            self._scenes[device] = scene, m
        return self._scenes[device]

    def params(
        self, expr: Float[Tensor, "*batch 52"], rotation: Float[Tensor, "*batch 3"] | None = None,
        neck_pose: Float[Tensor, "*batch 3"] | None = None, jaw_pose: Float[Tensor, "*batch 3"] | None = None,
        eyes_pose: Float[Tensor, "*batch 6"] | None = None, translation: Float[Tensor, "*batch 3"] | None = None,
    ) -> HeadParams:  # fmt: skip
        """Return OpenHead parameters of this subject, as a perfect tracker would report them."""
        zero = expr.new_zeros(*expr.shape[:-1], 6)

        def given(x: Tensor | None, n: int) -> Tensor:
            return zero[..., :n] if x is None else x

        shape = self.tracked_shape.to(expr).expand(*expr.shape[:-1], -1)
        return HeadParams(
            shape, expr, given(rotation, 3), given(neck_pose, 3), given(jaw_pose, 3), given(eyes_pose, 6),
            given(translation, 3),
        )  # fmt: skip

    def vertices(self, params: HeadParams) -> Float[Tensor, "*batch verts 3"]:
        """Pose the subject's own geometry (without hair): its identity and actions, not `params.shape`."""
        return pose(self._rig_on(params.expr.device), params)[0]

    def background(self, size: int, device: torch.device | str = "cpu") -> Float[Tensor, "3 size size"]:
        """Return the subject's background, linear RGB; the same from every camera."""
        key = (size, torch.device(device))
        if key not in self._backgrounds:
            self._backgrounds[key] = stage.background(size, generator(*self.key, "background")).to(device)
        return self._backgrounds[key]

    def render(
        self, params: HeadParams, camera: Camera, supersample: int = 2, backend: Backend | None = None
    ) -> SyntheticFrames:
        """Render frames; params and camera share one batch (or both have none), square images.

        `supersample`² samples per pixel: 2 is clean, 1 is fast and has jagged edges. CPU frames are drawn one by one
        by kernels on one thread (run several processes to use several cores), others in batches.
        """
        batch = params.batch
        flat = params.map(lambda v: v.reshape(-1, *v.shape[len(batch) :]))
        cameras = replace(camera, T_cam_world=camera.T_cam_world.reshape(-1, 4, 4), K=camera.K.reshape(-1, 3, 3))
        samples = CPU_BATCH_SAMPLES if flat.rotation.device.type == "cpu" else BATCH_SAMPLES
        step = max(1, samples // (camera.width * supersample) ** 2)
        count = flat.rotation.shape[0]
        parts = [
            self._render(flat[i : i + step], cameras[i : i + step], supersample, backend) for i in range(0, count, step)
        ]
        rgb, normal, mask = (torch.cat(x) for x in zip(*parts, strict=True))
        return SyntheticFrames(*(x.reshape(*batch, *x.shape[1:]) for x in (rgb, normal, mask)))

    def _render(
        self, params: HeadParams, camera: Camera, supersample: int, backend: Backend | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = params.rotation.device
        scene, mesh = self._on(device)
        vertices, R_skull = mesh.posed(self._rig_on(device), params)
        return draw(scene, vertices, R_skull, camera, self.background(camera.width, device), supersample, backend)
