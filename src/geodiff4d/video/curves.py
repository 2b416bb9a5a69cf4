"""Curves of a run's log as one image, for those without TensorBoard."""

from pathlib import Path

import numpy as np

from geodiff4d.core.files import fresh_file
from geodiff4d.core.rundir import read_log

PANELS = {
    "training loss": ("loss", "loss_rgb", "loss_normal"),
    "validation error, colours": ("val_rgb_300", "val_rgb_700", "val_rgb_999", "val_rgb_999_null"),
    "validation error, normals": ("val_normal_300", "val_normal_700", "val_normal_999", "val_normal_999_null"),
    "flicker [levels of 255]": ("flicker_rgb", "flicker_rgb_alone", "flicker_normal", "flicker_normal_alone"),
}
SMOOTH = 15
"""Records that a training curve is averaged over."""


def write_curves(log: Path, path: Path) -> None:
    """Draw training loss, validation errors and flicker over the steps.

    A resumed run repeats the steps since its checkpoint: the last record of a step counts.
    """
    from matplotlib.figure import Figure

    records = read_log(log)
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        # Records of a warm start have no step of their own.
        for name, value in record.items() if "step" in record else ():
            curves.setdefault(name, {})[record["step"]] = value
    shown = {title: [n for n in names if n in curves] for title, names in PANELS.items()}
    shown = {title: names for title, names in shown.items() if names}
    figure = Figure(figsize=(5 * max(1, len(shown)), 3.5), layout="constrained")
    for i, (title, names) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), i + 1, title=title, xlabel="step")
        for name in names:
            steps = sorted(curves[name])
            values = np.array([curves[name][s] for s in steps], dtype=float)
            if name.startswith("loss"):
                (line,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
                axes.plot(steps, _smoothed(values), label=name, color=line.get_color())
            else:
                axes.plot(steps, values, marker=".", label=name)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    with fresh_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Average each value with those before it."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - SMOOTH)
    return (total[last] - total[first]) / (last - first)
