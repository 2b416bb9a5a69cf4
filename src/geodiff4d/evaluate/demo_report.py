"""The demo's page: what went in, what came out beside the truth, and the figures with their intervals."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from geodiff4d.avatar.drive import head_centre
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import turned
from geodiff4d.core.images import encode_normals, read_image, write_image
from geodiff4d.evaluate.demo_photograph import PhotographViews, photograph_section
from geodiff4d.evaluate.metrics import PairScores, Truth
from geodiff4d.evaluate.pairs import Pair
from geodiff4d.evaluate.report import Grid, Note, Plot, Report, Section, Table, Video, build_report, interval_plot
from geodiff4d.video.generate import Generated
from geodiff4d.video.inputs import Driving

METHODS = {
    "generated": "video model",
    "mesh_warp": "mesh warp",
    "copy_reference": "portrait copied",
    "shuffled_reference": "control: another's portrait",
    "dropped_expression": "control: no expression",
    "pose_map": "pose map as normals",
    "vae": "codec's ceiling",
}
ASIDE = ("control: another's portrait", "control: no expression", "pose map as normals", "codec's ceiling")
MEASURES = {"psnr_fg": "PSNR, foreground [dB]", "psnr_face": "PSNR, mouth and eyes [dB]",
            "normal_deg": "normals off by [°]", "sharpness": "sharpness (truth = 1)"}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What a scored pair leaves for the report."""

    pair: Pair
    shots: Driving
    truth: Truth
    generated: Generated
    warp: Generated


def write_report(
    out: Path, metrics: dict[str, Any], scores: PairScores, kept: list[Scored], first: Pair, avatar: Avatar,
    photograph: PhotographViews | None = None,
) -> None:  # fmt: skip
    """Write `out/report.html`, self-contained."""
    sections = [_inputs(out, first), _generated(kept), _avatar(out, metrics, avatar)]
    if photograph is not None:
        sections.append(photograph_section(photograph))
    sections.append(_figures(metrics, scores))
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds"].items())
    machine = f"{platform.machine()} with {torch.get_num_threads()} threads, torch {torch.__version__}"
    footer = f"`geodiff4d demo` on {machine}; {seconds}."
    lead = (
        "One portrait and someone else's performance went in. The video model made frames and surface normals of that "
        "person from several cameras, and an avatar of 3D Gaussians was fitted to them. All here but one are made "
        "up by a program: people of the open world's test split, whom the model has never seen."
    )
    build_report(out / "report.html", Report("From one portrait to an avatar", lead, sections, footer))


@torch.no_grad()
def write_overview(path: Path, shown: Scored, avatar: Avatar) -> None:
    """Write one picture of it all: portrait, driver, generated frame and normals, and the avatar from three sides."""
    k = len(shown.truth.rgb) // 2
    size = shown.truth.rgb.shape[-1]
    centre = head_centre(avatar)
    views = [avatar.render(shown.shots.params[k], turned(avatar.camera, centre, yaw)) for yaw in (-35, 0, 35)]
    driver = resize(shown.shots.crops[k][None], size=(size, size), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    generated = shown.generated
    tiles = [
        shown.pair.portrait.image, driver, generated.rgb[k],
        encode_normals(generated.normal[k], torch.ones_like(generated.mask[k])),
        *(v.rgb.clamp(0, 1) for v in views), views[1].normal * 0.5 + 0.5,
    ]  # fmt: skip
    gap = torch.ones(3, size, max(2, size // 64))
    row = [part for tile in tiles for part in (tile, gap)][:-1]
    write_image(path, torch.cat(row, -1))


def _inputs(out: Path, first: Pair) -> Section:
    n = len(first.driving)
    crops = [first.driving.crops[i] for i in torch.linspace(0, n - 1, 6).round().long().tolist()]
    text = (
        "The portrait is one picture file; the driver is a film of another person. The expression encoder sees the "
        "driver's face crops only, and the driver's head shape is not used."
    )
    rows: list[tuple[str, list[Tensor]]] = [("portrait", [first.portrait.image]), ("driver", crops)]
    overlay = out / "pairs" / "0" / "portrait" / "overlay.png"
    if overlay.exists():
        panels = read_image(overlay)
        rows.insert(1, ("as tracked", list(panels.split(panels.shape[1], 2))))
        note = Note(
            "Portrait and drivers are tracked from their pixels, as yours would be. The truth is rendered where the "
            "tracked head says that it is: a picture does not tell how large a head is."
        )
    else:
        note = Note(
            "Head parameters are not tracked from pixels here: they are the true ones, disturbed by 1° of rotation, "
            "2 mm, 2° of jaw and 0.1 of every expression weight.",
            "warn",
        )
    return Section("What went in", text, [Grid(rows), note])


def _generated(kept: list[Scored]) -> Section:
    rows = []
    for i, s in enumerate(kept):
        k = len(s.truth.rgb) // 2
        ones = torch.ones_like(s.truth.mask[k])
        cells: list[Tensor] = [
            s.pair.portrait.image, s.shots.crops[k], s.truth.rgb[k], s.generated.rgb[k], s.warp.rgb[k],
            encode_normals(s.truth.normal[k], ones), encode_normals(s.generated.normal[k], ones),
            encode_normals(s.warp.normal[k], ones),
        ]  # fmt: skip
        rows.append((f"pair {i + 1}", cells))
    columns = ("portrait", "driver", "truth", "video model", "mesh warp", "truth", "video model", "mesh warp")
    text = (
        "One frame of every scored pair. The truth is the portrait's own person, performing what the driver performed."
    )
    return Section("What the video model makes", text, [Grid(rows, columns)])


@torch.no_grad()
def _avatar(out: Path, metrics: dict[str, Any], avatar: Avatar) -> Section:
    centre = head_centre(avatar)
    n = avatar.sequence.batch[0]
    cells, normals = [], []
    for k, yaw in enumerate((-60, -35, -15, 0, 15, 35, 60)):
        frame = avatar.render(avatar.sequence[k * (n - 1) // 6], turned(avatar.camera, centre, yaw))
        cells.append(frame.rgb.clamp(0, 1))
        normals.append((frame.normal * 0.5 + 0.5).clamp(0, 1))
    a = metrics["avatar"]
    unseen = a["psnr_fg_vs_generated"]
    text = (
        f"{a['gaussians']:,} Gaussians on the head's triangles. "
        + ("" if unseen is None else f"On generated frames it was not fitted to it reaches {unseen:.1f} dB. ")
        + f"Against the truth it has {a['psnr_fg_vs_truth']:.1f} dB and {a['normal_deg']:.1f}°. "
        f"Its silhouette overlaps the truth's by {100 * a['silhouette_iou_orbit']:.0f} % over an orbit of ±60°."
    )
    columns = ("−60°", "−35°", "−15°", "0°", "15°", "35°", "60°")
    videos = [
        Video(out / "avatar.mp4", "The avatar, driven and orbited; its normals beside it."),
        Video(out / "generated.mp4", "The clip it was fitted to, one camera after the other."),
    ]
    return Section("The avatar", text, [Grid([("colour", cells), ("normals", normals)], columns), *videos])


def _figures(metrics: dict[str, Any], scores: PairScores) -> Section:
    rows = []
    for method, name in METHODS.items():
        found = metrics.get(method, {})
        rows.append([name, *(found.get(key) for key in MEASURES)])
    table = Table(
        ["", *MEASURES.values()],
        rows,
        f"Means over {scores.pairs} pairs.",
        better=("", "high", "high", "low", ""),
        aside=ASIDE,
    )
    controls = [
        [
            f"{METHODS[d['method']]} − {METHODS[d['minus']]}",
            MEASURES[d["key"]],
            d["mean"],
            *d["interval"],
            "yes" if d["excludes_zero"] else "no",
        ]
        for d in metrics["differences"]
    ]
    differences = Table(
        ["difference", "measure", "mean", "low", "high", "excludes zero"], controls,
        "Paired differences with 95 % bootstrap intervals over the pairs.",
    )  # fmt: skip
    shown = ("generated", "mesh_warp", "copy_reference", "shuffled_reference", "vae")
    estimates = {METHODS[m]: scores.estimate(m, "psnr_fg") for m in shown}
    intervals = interval_plot(estimates, MEASURES["psnr_fg"], ("video model",))
    plot = Plot(intervals, "Foreground PSNR with 95 % intervals.")
    text = (
        "Everything is measured inside the foreground; a plain background would flatter any figure. A model that "
        "ignored the portrait would score the same with another's; one that ignored the driver, the same without "
        "expression; normals no better than the pose map's would mean that none were generated. PSNR likes "
        "blur, so sharpness stands beside it."
    )
    return Section("The figures", text, [table, differences, plot])
