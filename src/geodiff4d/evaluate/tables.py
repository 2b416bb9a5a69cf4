"""From every case's scores to metrics.json, table.md and the figures a page shows.

A case counts once: its frames are averaged first, and intervals are bootstrapped over cases. By yaw, a case counts with
those of its frames in which the head stands so far from where it stands in the reference.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from geodiff4d.evaluate.judges import MEASURES
from geodiff4d.evaluate.methods import CONTROLS, TITLES
from geodiff4d.evaluate.metrics import Estimate, PairScores

YAW_BINS = (0.0, 15.0, 30.0, 45.0, 180.0)
BEYOND = 30.0
"""Degrees; everything beyond is a bin of its own."""
YAW_KEYS = ("psnr_fg", "ssim", "csim_open", "aed", "normal_deg", "sharpness")
COMPARISONS = (
    ("video_model", "mesh_warp", ("psnr_fg", "psnr_face", "ssim", "csim_open", "akd", "aed", "expression_gain",
                                  "expression_corr", "normal_deg", "sharpness", "flicker",
                                  "lpips", "jod", "jod_color", "csim")),
    ("video_model", "copy_reference", ("psnr_fg", "csim_open", "aed")),
    ("video_model", "shuffled_reference", ("psnr_fg", "csim_open", "csim")),
    ("video_model", "dropped_expression", ("psnr_face", "aed")),
    ("video_model", "perception", ("normal_deg",)),
    ("video_model", "pose_map", ("normal_deg",)),
    ("avatar", "video_model", ("psnr_fg", "ssim", "csim_open", "aed", "expression_gain", "normal_deg")),
    ("avatar", "mesh_warp", ("psnr_fg", "ssim", "csim_open", "aed", "expression_gain", "normal_deg")),
    ("avatar", "avatar_true", ("psnr_fg", "ssim", "csim_open", "aed", "normal_deg")),
)  # fmt: skip


def bins() -> dict[str, tuple[float, float]]:
    """Name the bins of yaw difference [degrees]."""
    out = {f"{a:.0f} to {b:.0f}" if b < 180 else f"over {a:.0f}": (a, b) for a, b in pairwise(YAW_BINS)}
    return out | {f"over {BEYOND:.0f}": (BEYOND, 180.0)}


def gathered(found: Sequence[dict[str, Any]], low: float = 0.0, high: float = 180.1) -> PairScores:
    """Average every case's frames whose yaw differs by `low` to `high` degrees; a case without such frames is NaN.

    What only a film has counts only where all frames do.
    """
    scores = PairScores(len(found))
    whole = low <= 0 and high > 180
    for i, each in enumerate(found):
        yaw = np.array(each.get("yaw_difference_deg", []))
        inside = (yaw >= low) & (yaw < high)
        for method, measured in each.get("scores", {}).items():
            values: dict[str, float] = {}
            for key, value in measured.items():
                if not isinstance(value, list):
                    if whole:
                        values[key] = value
                    continue
                chosen = np.array([math.nan if v is None else v for v in value], dtype=float)[inside]
                chosen = chosen[np.isfinite(chosen)]
                values[key] = float(chosen.mean()) if len(chosen) else math.nan
            scores.add(i, method, values)
    return scores


def ordered(methods: Sequence[str]) -> list[str]:
    """Sort methods as tables list them; other people's come before the controls."""
    rank = {m: i for i, m in enumerate(TITLES)}
    return sorted(methods, key=lambda m: (m in CONTROLS, rank.get(m, len(rank))))


def title(method: str) -> str:
    """Return a method's name as tables print it."""
    return TITLES.get(method, method.removeprefix("results:"))


def metrics_of(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise: every method's means and intervals, by yaw too, and paired differences (null: not measured)."""
    scores = gathered(found)
    summary = scores.summary()
    out: dict[str, Any] = {m: _complete(summary[m]) for m in ordered(scores.methods)}
    out["differences"] = list(_differences(scores))
    out["yaw"] = {}
    for name, (low, high) in bins().items():
        part = gathered(found, low, high)
        frames = sum(sum(low <= y < high for y in f.get("yaw_difference_deg", [])) for f in found)
        row: dict[str, Any] = {"frames": frames}
        row |= {m: {k: v for k, v in s.items() if k in (*YAW_KEYS, "interval")} for m, s in part.summary().items()}
        row["differences"] = list(_differences(part, YAW_KEYS))
        out["yaw"][name] = row
    out["clips"] = len(found)
    out["failed"] = {f["case"]: f["failed"] for f in found if "failed" in f}
    measured = next((f["judges"] for f in found if "judges" in f), {})
    out["judges"] = measured
    absent = {m for f in found for m in f.get("unavailable", {})}
    reasons = {m: [f["unavailable"][m] for f in found if m in f.get("unavailable", {})] for m in ordered(list(absent))}
    out["unavailable"] = {m: {"clips": len(why), "why": why[0]} for m, why in reasons.items()}
    known = {k for m in scores.methods for k, v in summary[m].items() if k != "interval" and v is not None}
    out["missing"] = {k: m.missing or "not measured" for k, m in MEASURES.items() if k not in known}
    return out


def _complete(summary: dict[str, Any]) -> dict[str, Any]:
    """Give a method all measures: null is "not measured"."""
    interval = {k: summary["interval"].get(k) for k in MEASURES}
    return {**{k: summary.get(k) for k in MEASURES}, "interval": interval}


def _differences(scores: PairScores, keys: Sequence[str] = tuple(MEASURES)) -> list[dict[str, Any]]:
    rows = []
    for method, other, measures in COMPARISONS:
        for key in measures:
            if key not in keys:
                continue
            e = scores.difference(key, method, other)
            if math.isfinite(e.mean):
                count = int(np.isfinite(scores.values(method, key) - scores.values(other, key)).sum())
                rows.append({"key": key, "method": method, "minus": other, "mean": e.mean, "interval": [e.low, e.high],
                             "excludes_zero": e.excludes_zero, "clips": count})  # fmt: skip
    return rows


def estimates(metrics: dict[str, Any], key: str) -> dict[str, Estimate]:
    """Return the methods' estimates of one measure, for a plot."""
    out = {}
    for method, row in metrics.items():
        if isinstance(row, dict) and "interval" in row and row.get(key) is not None:
            out[title(method)] = Estimate(row[key], *row["interval"][key])
    return out


def table_markdown(metrics: dict[str, Any], heading: str) -> str:
    """Write table.md: methods by measures, differences, and everything by yaw."""
    methods = [m for m, row in metrics.items() if isinstance(row, dict) and "interval" in row]
    count = metrics["clips"] - len(metrics["failed"])
    lines = [f"# {heading}", "", f"Means over {count} clips [95 % interval, bootstrap over clips].", ""]
    shown = [k for k in MEASURES if k not in metrics["missing"]]
    lines += [_row(["", *(_headed(k) for k in MEASURES)]), "|---" * (len(MEASURES) + 1) + "|"]
    for method in methods:
        row = metrics[method]
        cells = [_cell(row[k], row["interval"][k], k) if k in shown else "n/a" for k in MEASURES]
        lines.append(_row([("*" + title(method) + "*") if method in CONTROLS else title(method), *cells]))
    lines += ["", "↑ higher is better, ↓ lower. – : the method has no such output."]
    lines += [f"n/a, {MEASURES[k].title}: {why}." for k, why in metrics["missing"].items()]
    lines += unavailable(metrics)
    lines += [f"{MEASURES[k].title}: {name}." for k, name in metrics["judges"].items()]
    if metrics["failed"]:
        lines += ["", f"{len(metrics['failed'])} clips count for nobody, since they could not be tracked:"]
        lines += [f"- {name}: {why}" for name, why in metrics["failed"].items()]
    lines += ["", "## Paired differences", "", _row(["difference", "measure", "mean [95 % interval]", "clips"]),
              "|---|---|---|---|"]  # fmt: skip
    lines += [_difference(d) for d in metrics["differences"]]
    lines += ["", "## By how far the head is turned from the reference", ""]
    for name, part in metrics["yaw"].items():
        lines += _yaw_lines(name, part, methods)
    return "\n".join(lines) + "\n"


def unavailable(metrics: dict[str, Any]) -> list[str]:
    """Say which methods have no frames of some clips, and why."""
    rows = metrics["unavailable"].items()
    return [f"n/a for {row['clips']} clips, {title(m)}: {row['why']}." for m, row in rows]


def _yaw_lines(name: str, part: dict[str, Any], methods: Sequence[str]) -> list[str]:
    lines = [f"### {name}°, {part['frames']} frames", ""]
    if not part["frames"]:
        return [*lines, "None.", ""]
    keys = [k for k in YAW_KEYS if any(part[m].get(k) is not None for m in methods if m in part)]
    lines += [_row(["", *(_headed(k) for k in keys)]), "|---" * (len(keys) + 1) + "|"]
    for m in methods:
        if m in part:
            lines.append(_row([title(m), *(_cell(part[m].get(k), part[m]["interval"].get(k), k) for k in keys)]))
    worth = [d for d in part["differences"] if (d["method"], d["minus"]) == ("video_model", "mesh_warp")]
    said = "; ".join(f"{MEASURES[d['key']].title} {_signed(d)}" for d in worth)
    return [*lines, "", *([f"Video model minus mesh warp: {said}.", ""] if said else [])]


def _headed(key: str) -> str:
    arrow = {"high": " ↑", "low": " ↓", "": ""}[MEASURES[key].better]
    return MEASURES[key].title + arrow


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None, interval: Sequence[float] | None, key: str) -> str:
    if value is None:
        return "–"
    d = MEASURES[key].digits
    return f"{value:.{d}f}" + (f" [{interval[0]:.{d}f}, {interval[1]:.{d}f}]" if interval else "")


def _difference(d: dict[str, Any]) -> str:
    name = f"{title(d['method'])} − {title(d['minus'])}"
    return _row([name, MEASURES[d["key"]].title, _signed(d), str(d["clips"])])


def _signed(d: dict[str, Any]) -> str:
    n = MEASURES[d["key"]].digits
    return f"{d['mean']:+.{n}f} [{d['interval'][0]:+.{n}f}, {d['interval'][1]:+.{n}f}]"


def ranked(found: Sequence[dict[str, Any]], method: str, key: str = "psnr_fg") -> list[int]:
    """Order cases by a method's measure, the best first; those without it are left out."""
    values = gathered(found).values(method, key)
    best = np.argsort(-values if MEASURES[key].better != "low" else values, kind="stable")
    return [int(i) for i in best if np.isfinite(values[i])]
