"""The page of a protocol: tables, plots, and the best and the worst clips side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodiff4d.core.files import fresh_file, write_json
from geodiff4d.evaluate.cases import Case
from geodiff4d.evaluate.judges import MEASURES
from geodiff4d.evaluate.methods import CONTROLS
from geodiff4d.evaluate.metrics import Estimate
from geodiff4d.evaluate.report import Grid, Note, Plot, Report, Section, Table, build_report, interval_plot
from geodiff4d.evaluate.tables import bins, estimates, metrics_of, ranked, table_markdown, title, unavailable

SHOWN = 4
"""Clips from either end of the order."""
PLOTTED = ("psnr_fg", "ssim", "csim_open", "aed", "expression_gain", "normal_deg")
WHOLE = ("psnr", "ssim_full")
"""Come last: over the whole picture a plain background hides the head."""
HEADINGS = {"self": "Self-reenactment", "cross": "Cross-reenactment"}
LEADS = {
    "self": "A reference from one camera, driven by the same person's film from another (Sec. 5.2): the film itself "
    "is the truth.",
    "cross": "A reference of one person, driven by another's film (Sec. 5.3). In the open world the truth is known: "
    "the reference's person, performing the same.",
}


def write_results(
    out: Path, protocol: str, cases: Sequence[Case], found: Sequence[dict[str, Any]], config: dict[str, Any]
) -> dict[str, Any]:
    """Write metrics.json, table.md, psnr_by_yaw.svg and report.html; returns the metrics."""
    metrics = {**metrics_of(found), "protocol": protocol, "config": config}
    write_json(out / "metrics.json", metrics)
    heading = f"{HEADINGS[protocol]}, {config['data']}"
    with fresh_file(out / "table.md") as file:
        file.write_text(table_markdown(metrics, heading), encoding="utf-8")
    figure = yaw_plot(metrics)
    with fresh_file(out / "psnr_by_yaw.svg") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    plots = [Plot(interval_plot(e, MEASURES[k].title, ("video model",)), f"{MEASURES[k].title}, 95 % intervals.")
             for k in PLOTTED if len(e := estimates(metrics, k)) > 1]  # fmt: skip
    sections = [
        Section("The figures", _explained(metrics), [_table(metrics), *_notes(metrics), *plots]),
        Section("How far the head is turned", "By the difference between target and reference.", [Plot(figure)]),
        *_pictures(out, cases, found),
    ]
    build_report(out / "report.html", Report(heading, LEADS[protocol], sections, f"`geodiff4d evaluate {protocol}`"))
    return metrics


def yaw_plot(metrics: dict[str, Any]) -> Any:
    """Draw foreground PSNR by yaw difference, with intervals."""
    from matplotlib.figure import Figure

    names = [n for n, (low, high) in bins().items() if (low, high) != (30.0, 180.0)]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    ax = figure.subplots()
    methods = [m for m, row in metrics.items() if isinstance(row, dict) and row.get("psnr_fg") is not None]
    for i, method in enumerate(m for m in methods if m not in CONTROLS):
        rows = [metrics["yaw"][n].get(method, {}) for n in names]
        at = [k for k, row in enumerate(rows) if row.get("psnr_fg") is not None]
        values = [rows[k]["psnr_fg"] for k in at]
        ends = [rows[k]["interval"]["psnr_fg"] for k in at]
        x = [k + 0.06 * i for k in at]
        [line] = ax.plot(x, values, "o-", label=title(method), linewidth=1.4, markersize=5)
        for xi, (low, high) in zip(x, ends, strict=True):
            ax.plot([xi, xi], [low, high], color=line.get_color(), alpha=0.35)
    ax.set_xticks(range(len(names)), [f"{n}°" for n in names])
    ax.set_ylabel("PSNR, foreground [dB]")
    ax.legend(frameon=False)
    ax.spines[["right", "top"]].set_visible(False)
    return figure


def _table(metrics: dict[str, Any]) -> Table:
    keys = sorted((k for k in MEASURES if k not in metrics["missing"]), key=WHOLE.__contains__)
    methods = [m for m, row in metrics.items() if isinstance(row, dict) and "interval" in row]

    def cell(row: dict[str, Any], key: str) -> Estimate | None:
        return None if row[key] is None else Estimate(row[key], *row["interval"][key])

    rows = [[title(m), *(cell(metrics[m], k) for k in keys)] for m in methods]
    count = metrics["clips"] - len(metrics["failed"])
    return Table(
        ["", *(MEASURES[k].title for k in keys)], rows, f"Means over {count} clips, 95 % intervals over clips.",
        better=["", *(MEASURES[k].better for k in keys)], digits=[0, *(MEASURES[k].digits for k in keys)],
        aside=[title(m) for m in methods if m in CONTROLS or m == "avatar_true"],
    )  # fmt: skip


def _explained(metrics: dict[str, Any]) -> str:
    named = "; ".join(f"{MEASURES[k].title}: {v}" for k, v in metrics["judges"].items())
    return (
        "Everyone gets the same tracked reference and driver. Figures are inside the foreground unless they say "
        "otherwise; what each measures stands in docs/EVALUATION.md. " + (named + "." if named else "")
    )


def _notes(metrics: dict[str, Any]) -> list[Note]:
    lines = [f"{MEASURES[k].title}: n/a, {why}." for k, why in metrics["missing"].items()] + unavailable(metrics)
    notes = [Note("\n\n".join(lines))] if lines else []
    if metrics["failed"]:
        notes.append(Note(f"{len(metrics['failed'])} clips could not be tracked and count for nobody.", "warn"))
    return notes


def _pictures(out: Path, cases: Sequence[Case], found: Sequence[dict[str, Any]]) -> list[Section]:
    order = ranked(found, "video_model") or ranked(found, "video_model", "csim_open")
    if not order:
        order = [i for i, f in enumerate(found) if "scores" in f]
    half = len(order) // 2
    best, worst = order[: min(SHOWN, max(1, half))], order[max(half, len(order) - SHOWN) :][::-1]
    sections = [Section("The best", "By the video model's foreground PSNR.", _grids(out, cases, found, best))]
    if half:
        sections.append(Section("The worst", "By the same.", _grids(out, cases, found, worst)))
    return sections


def _grids(out: Path, cases: Sequence[Case], found: Sequence[dict[str, Any]], chosen: Sequence[int]) -> list[Grid]:
    """One grid per clip: a row per kept frame, RGB and normals of everyone."""
    grids = []
    for i in chosen:
        case, each = cases[i], found[i]
        folder = out / "clips" / case.name
        reference = next((out / "references" / case.reference_name / "images").glob("*.png"))
        columns: list[tuple[str, str, str]] = []
        for method in ("truth", *(m for m in each["scores"] if m not in ("perception",))):
            name = method.replace(":", "_")
            for kind in ("rgb", "normal"):
                if list((folder / name).glob(f"*_{kind}.png")):
                    said = "truth" if method == "truth" else title(method)
                    columns.append((name, kind, said if kind == "rgb" else f"{said}, normals"))
        rows = []
        driven = case.driving
        for k in each["kept"]:
            driver = f"{driven.timesteps[k]:05d}_{driven.camera:02d}.png"
            track = out / "drivers" / f"{driven.clip.name}_c{driven.camera:02d}" / "images" / driver
            cells = [reference, track, *(folder / name / f"{k:05d}_{kind}.png" for name, kind, _ in columns)]
            rows.append((f"{each['yaw_difference_deg'][k]:.0f}°", [c if c.exists() else None for c in cells]))
        grids.append(Grid(rows, ["reference", "driver", *(c[2] for c in columns)], case.name, 96, 160))
    return grids
