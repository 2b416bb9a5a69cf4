"""Benchmarks: each measures one hot path and returns its row (docs/BENCHMARKS.md)."""

from collections.abc import Callable
from typing import Any

from geodiff4d.bench.machine import commit, hardware
from geodiff4d.presets import Preset

__all__ = ["TARGETS", "commit", "hardware"]


def _world(preset: Preset, threads: int) -> dict[str, Any]:
    from geodiff4d.bench.world import WorldBench

    return WorldBench(preset.model.size, preset.bench.people, preset.bench.images, threads).run()


def _unet(preset: Preset, threads: int) -> dict[str, Any]:
    from geodiff4d.bench.unet import UnetBench

    return UnetBench(preset, threads).run()


def _fit(preset: Preset, threads: int) -> dict[str, Any]:
    from geodiff4d.bench.avatar import AvatarBench

    return AvatarBench(preset, threads).fit()


def _render(preset: Preset, threads: int) -> dict[str, Any]:
    from geodiff4d.bench.avatar import AvatarBench

    return AvatarBench(preset, threads).render()


def _splat(preset: Preset, threads: int) -> dict[str, Any]:
    from geodiff4d.bench.splat import SplatBench

    return SplatBench(preset, threads).run()


TARGETS: dict[str, Callable[[Preset, int], dict[str, Any]]] = {
    "world": _world,
    "unet": _unet,
    "fit": _fit,
    "render": _render,
    "splat": _splat,
}
"""What can be measured: (preset, threads) to a row; a row's `rows` are a table of their own."""
