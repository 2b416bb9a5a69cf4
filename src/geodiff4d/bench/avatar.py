"""Speed of fitting and rendering an avatar of an open-world person, and the cost of each of its parts."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from geodiff4d.avatar.config import FitConfig
from geodiff4d.avatar.deformation import DeformationConfig
from geodiff4d.avatar.dynamics import DynamicsConfig
from geodiff4d.avatar.fit import prepare
from geodiff4d.avatar.fitting import Fitting
from geodiff4d.avatar.frames import FitFrames, HoldOut
from geodiff4d.avatar.surface import RemeshConfig
from geodiff4d.bench.machine import Clock
from geodiff4d.data.clip import Clip
from geodiff4d.data.world_clips import write_clip
from geodiff4d.heads import load_head
from geodiff4d.presets import Preset
from geodiff4d.world.subject import SyntheticSubject

FRAMES, VIEWS = 3, 2
PARTS: dict[str, dict[str, Any]] = {
    "bare": {"remesh": None, "deformation": None, "dynamics": None, "densify": None},
    "bare, no refine": {"remesh": None, "deformation": None, "dynamics": None, "densify": None, "refine": None},
    "deformation": {"deformation": DeformationConfig(), "dynamics": None, "remesh": None},
    "dynamics": {"deformation": None, "dynamics": DynamicsConfig(), "remesh": None},
    "all": {"remesh": RemeshConfig(96), "deformation": DeformationConfig(), "dynamics": DynamicsConfig()},
}
"""Overrides of the preset for each row of the table, at the sizes of `embedded`."""


@dataclass(frozen=True)
class AvatarBench:
    """Measures the steps of a fit, or the frames of a driven avatar, after a warm-up."""

    preset: Preset
    threads: int

    def fit(self) -> dict[str, Any]:
        """Return optimiser steps per second: posing, rasteriser, all losses, backward, update."""

        def speed(fitting: Fitting, steps: int) -> float:
            count = iter(range(10**9))
            return 1 / self._clock(fitting).seconds(lambda: fitting.step(next(count), 0), steps)

        return self._measured("iterations_per_second", speed)

    def render(self) -> dict[str, Any]:
        """Return frames per second of a driven avatar: posing and one pass of RGB, normals and alpha."""

        @torch.no_grad()
        def speed(fitting: Fitting, steps: int) -> float:
            avatar = fitting.avatar(24.0).to(fitting.config.device)
            count = iter(range(10**9))

            def one() -> None:
                avatar.render(avatar.sequence[next(count) % FRAMES], avatar.camera)

            return 1 / self._clock(fitting).seconds(one, 3 * steps)

        return self._measured("frames_per_second", speed)

    def _measured(self, key: str, speed: Any) -> dict[str, Any]:
        size, steps = self.preset.model.size, self.preset.bench.steps
        config = replace(self.preset.fit, hold_out=HoldOut(0))
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with tempfile.TemporaryDirectory(prefix="geodiff4d-") as folder:
                write_clip(Path(folder) / "clip", SyntheticSubject(0, "val"), "speech", FRAMES, VIEWS, size)
                clip, head = Clip(Path(folder) / "clip"), load_head("openhead")
                rows = []
                for name, parts in {"preset": {}, **PARTS}.items():
                    variant: FitConfig = replace(config, **parts)
                    fitting, _ = prepare(FitFrames(clip, head, variant.hold_out), head, variant, seed=0)
                    rows.append({"parts": name, key: speed(fitting, steps), "gaussians": len(fitting.local)})
        finally:
            torch.set_num_threads(before)
        return {key: rows[0][key], "size_px": size, "gaussians": rows[0]["gaussians"], "rows": rows}

    @staticmethod
    def _clock(fitting: Fitting) -> Clock:
        return Clock(torch.device(fitting.config.device))
