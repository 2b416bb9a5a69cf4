"""The CPU rasteriser and the loss beside it, forward and backward, with torch doing the same as baseline."""

import math
from dataclasses import dataclass
from typing import Any

import numba
import torch
from torch import Tensor
from torch.nn.functional import normalize

from geodiff4d.bench.machine import Clock
from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at, matrix_to_quat
from geodiff4d.presets import PRESETS, Preset
from geodiff4d.render.gaussians import Gaussians, rasterize
from geodiff4d.render.photometric import photometric, ssim_reference
from geodiff4d.render.rasterizer_oracle import rasterize_oracle

CHANNELS = 7
"""Features of the scenes: colours, normals and depth."""
ORACLE = (64, 800, 3.0)
"""The scene for the oracle, whose memory grows as Gaussians × pixels."""


@dataclass(frozen=True)
class SplatBench:
    """Measures the rasteriser on a head-like shell of flat Gaussians, half the image wide, and the photometric loss."""

    preset: Preset = PRESETS["embedded"]
    threads: int = 2
    clock: Clock = Clock(torch.device("cpu"), repeats=31)

    def run(self) -> dict[str, Any]:
        """Return milliseconds of the two scenes and of the loss at the first size; parts and baselines are `rows`."""
        before = torch.get_num_threads(), numba.get_num_threads()
        torch.set_num_threads(self.threads)
        numba.set_num_threads(min(self.threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            return self._run()
        finally:
            torch.set_num_threads(before[0])
            numba.set_num_threads(before[1])

    def _run(self) -> dict[str, Any]:
        row: dict[str, Any] = {"device": str(self.clock.device)}
        rows = []
        for k, case in enumerate(self.preset.bench.scenes):
            timed = self._rasteriser(case, rasterize)
            suffix = f"_{case[0]}" if k else ""
            row |= {
                f"ms_forward{suffix}": timed["ms_forward"],
                f"ms_forward_backward{suffix}": timed["ms_forward_backward"],
            }
            rows.append({"what": "rasterize, 7 channels and alpha", **timed})
        side = self.preset.bench.scenes[0][0]
        ours, theirs = self._loss(side, photometric), self._loss(side, _torch_loss)
        row["ms_loss"] = ours["ms_forward_backward"]
        rows += [
            {"what": "L1 and SSIM, the gradient made in the forward pass", **ours},
            {"what": "baseline: the same by torch's convolutions", **theirs},
            {"what": "rasterize, on the oracle's scene", **self._rasteriser(ORACLE, rasterize)},
            {"what": "baseline: the same by torch, our oracle", **self._rasteriser(ORACLE, _oracle)},
        ]
        if self.clock.device.type == "cpu":
            row["gsplat"] = "has no CPU rasteriser"
        row["rows"] = rows
        return row

    def _rasteriser(self, case: tuple[int, int, float], function: Any) -> dict[str, Any]:
        side, count, radius = case
        splats, features, camera = head_scene(side, count, radius, self.clock.device)
        leaves = [x.requires_grad_() for x in (*vars(splats).values(), features)]
        cotangents = [0.1 * torch.randn(c, side, side, device=self.clock.device) for c in (CHANNELS, 1)]

        def forward() -> tuple[Tensor, Tensor]:
            return function(splats, camera, features)

        def both() -> None:
            for x in leaves:
                x.grad = None
            torch.autograd.backward(forward(), cotangents)

        return {"scene": f"{side}², {count} Gaussians", **self._times(forward, both)}

    def _loss(self, side: int, function: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        image, target = torch.rand(2, 3, side, side, generator=generator).to(self.clock.device)
        image.requires_grad_()

        def both() -> None:
            image.grad = None
            function(image, target).backward()

        return {"scene": f"{side}², 3 channels", **self._times(lambda: function(image, target), both)}

    def _times(self, forward: Any, both: Any) -> dict[str, float]:
        return {
            "ms_forward": 1000 * self.clock.seconds(forward), "ms_forward_backward": 1000 * self.clock.seconds(both)
        }  # fmt: skip


def head_scene(side: int, count: int, radius_px: float, device: torch.device) -> tuple[Gaussians, Tensor, Camera]:
    """Return flat Gaussians on an egg that covers half the image, with sizes as after a fit; features; and a camera."""
    g = torch.Generator().manual_seed(count)
    focal, distance = side / (2 * math.tan(math.radians(15))), 0.8
    half = distance * math.tan(math.radians(15))
    axes = half * torch.tensor([0.70, 0.91, 0.78])
    direction = normalize(torch.randn(count, 3, generator=g), dim=-1)
    normal = normalize(direction / axes, dim=-1)
    tangent = normalize(torch.linalg.cross(normal, torch.randn(count, 3, generator=g)), dim=-1)
    turns = torch.stack([tangent, torch.linalg.cross(normal, tangent), normal], -1)
    sigma = radius_px / 3 * distance / focal
    splats = Gaussians(
        direction * axes * (1 + 0.01 * torch.randn(count, 1, generator=g)),
        matrix_to_quat(turns),
        sigma * (0.35 * torch.randn(count, 3, generator=g)).exp() * torch.tensor([1.15, 1.15, 0.25]),
        (1 + 1.5 * torch.randn(count, generator=g)).sigmoid(),
    )
    eye = distance * torch.tensor([math.sin(0.3), 0.0, math.cos(0.3)])
    T = look_at(eye, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    camera = Camera(T, pinhole(focal, side, side), side, side)
    features = torch.cat([torch.rand(count, 3, generator=g), normal, torch.ones(count, 1)], -1)
    on = Gaussians(*(x.to(device) for x in vars(splats).values()))
    return on, features.to(device), camera.to(device)


def _oracle(splats: Gaussians, camera: Camera, features: Tensor) -> tuple[Tensor, Tensor]:
    tensors = (splats.means, splats.quats, splats.scales, splats.opacities)
    return rasterize_oracle(*tensors, features, camera.T_cam_world, camera.K, camera.width, camera.height)[:2]


def _torch_loss(image: Tensor, target: Tensor) -> Tensor:
    return 0.8 * (image - target).abs().mean() + 0.2 * (1 - ssim_reference(image, target))
