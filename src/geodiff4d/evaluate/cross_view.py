"""Cross-view animation (supplement C.2, Fig. 13): one performance seen by twelve cameras must drive to one film.

A person performs with a still head before twelve cameras. Each camera's film drives the same reference, whose head pose
and camera stay as they are, so that all twelve results should be the same, frame by frame. What differs between them is
view that leaked into the expression. In the open world the reference's own camera has the truth.

`consistency` is the share of variance that time explains: between instants, over between instants plus between views
of one instant (an intraclass correlation; 1 is perfect, 0 says that views differ as much as expressions do not).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, fresh_folder, read_object, write_json
from geodiff4d.core.images import composite, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.workers import in_order
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.cases import Case, Extent, Recording, WorldClip, found_clips, timesteps, world_seed
from geodiff4d.evaluate.expression import expressed, face_region
from geodiff4d.evaluate.inputs import (
    face_mask,
    head_yaw,
    prepare_driver,
    prepare_reference,
    source_frames,
)
from geodiff4d.evaluate.judges import MIN_SIZE, quantised
from geodiff4d.evaluate.metrics import PairScores, bootstrap, psnr
from geodiff4d.evaluate.observe import observe_frames
from geodiff4d.evaluate.protocol import WORLD_SIZE, Settings, maker_of, render_clip, settled
from geodiff4d.evaluate.report import Grid, Report, Section, Table, build_report
from geodiff4d.heads import HeadParams
from geodiff4d.pipeline import load_model
from geodiff4d.render.crops import crop_image
from geodiff4d.render.viewpoints import FRONT_CAMERA, capture_views
from geodiff4d.video.generate import GenerationRequest, WarpGenerator
from geodiff4d.video.inputs import Driving, load_driving, load_portrait, with_identity_of

VIEWS = 12
METHODS = {"video_model": "video model", "mesh_warp": "mesh warp"}
KEYS = {
    "consistency": "consistency, tracked expression",
    "view_mm": "between views [mm]", "time_mm": "between instants [mm]",
    "psnr_face": "PSNR, mouth and eyes [dB]", "psnr_face_front": "the same, driven from the front",
    "psnr_face_side": "the same, from more than 30°",
}  # fmt: skip
SHOWN_VIEWS, SHOWN_FRAMES = 6, 4


@dataclass(frozen=True)
class Films:
    """One person, all views: what drives, and what each camera's film drives to."""

    cases: tuple[Case, ...]


def run_cross_view(
    settings: Settings, extent: Extent, data: Path | None = None, workers: int = 1, progress: Progress = silent
) -> dict[str, Any]:
    """Run the protocol and write metrics.json, table.md and report.html; returns the metrics.

    Raises:
        UserError: no clip has two cameras, or nothing could be tracked.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    settings = settled(settings)
    if data is None:
        size = WORLD_SIZE if settings.preset.trackable else load_model(settings.model).config.size
        views = tuple(sorted(capture_views(VIEWS)))
        still = [
            WorldClip(world_seed(i, extent), "extremes", views, extent, size, True) for i in range(extent.subjects)
        ]
        jobs = [(render_clip, settings.out / "data", c) for c in still]
        clips = [Path(p) for p in in_order(jobs, workers, progress, "rendering people")]
    else:
        clips = found_clips(data, replace(extent, sequences=1))
    people = [_films(clip, extent) for clip in clips]
    found = in_order([(_person, settings, p) for p in people], workers, progress, "people")
    if all("failed" in f for f in found):
        raise UserError(f"nobody could be tracked; the first: {found[0]['failed']}")
    metrics = _summary(found)
    metrics["config"] = {"people": len(found), "views": len(people[0].cases), "preset": settings.preset.name,
                         "data": "open world" if data is None else Path(data).name}  # fmt: skip
    write_json(settings.out / "metrics.json", metrics)
    with fresh_file(settings.out / "table.md") as file:
        file.write_text(_markdown(metrics), encoding="utf-8")
    _page(settings.out, metrics, people, found)
    return metrics


def _films(folder: Path, extent: Extent) -> Films:
    clip = Clip(folder)
    cameras = sorted({r.camera_index for r in clip.records})
    if len(cameras) < 2:
        raise UserError(f"{folder} has one camera: evaluate cross-view needs clips of several")
    picked = [
        cameras[round(k * (len(cameras) - 1) / (min(VIEWS, len(cameras)) - 1))] for k in range(min(VIEWS, len(cameras)))
    ]
    steps = timesteps(clip, extent.frames)
    front = FRONT_CAMERA if FRONT_CAMERA in cameras else cameras[len(cameras) // 2]
    reference = Recording(folder, front, steps[:1])
    return Films(tuple(Case(f"{folder.name}_c{c:02d}", reference, Recording(folder, c, steps), True) for c in picked))


def _person(settings: Settings, person: Films) -> dict[str, Any]:
    """Generate and score one person's films; leaves OUT/people/<clip> with scores.json and frames."""
    name = person.cases[0].reference.clip.name
    folder = settings.out / "people" / name
    if (folder / "scores.json").exists():
        known = read_object(folder / "scores.json")
        if known.get("fingerprint") == settings.fingerprint:
            return known
    note: dict[str, Any] = {"name": name, "fingerprint": settings.fingerprint}
    with fresh_folder(folder) as fresh:
        try:
            note |= _measured(fresh, settings, person)
        except UserError as error:
            note["failed"] = str(error)
        write_json(fresh / "scores.json", note)
    return note


@torch.no_grad()
def _measured(folder: Path, settings: Settings, person: Films) -> dict[str, Any]:
    maker = maker_of(settings)
    head, size = maker.head, maker.model.config.size
    reference = prepare_reference(settings.out, person.cases[0], head, size, settings.tracking)
    portrait = load_portrait(reference, size)
    truth, mask = _truth(person, reference)
    own = HeadParams.stack([portrait.params])
    films: dict[str, list[Tensor]] = {m: [] for m in METHODS}
    latents, yaws = [], []
    for case in person.cases:
        driver = prepare_driver(settings.out, case, head, size, settings.tracking)
        driving = load_driving(driver, head, maker.model.config.expression.size)
        yaws.append(float(head_yaw(head, driving.params, driver.frame(0).camera).abs().mean().rad2deg()))
        driving = replace(driving, params=_as_still(driving, own, portrait))
        latents.append(maker.model.encode_expressions(driving.crops.to(maker.device))[0].cpu())
        cameras = portrait.camera.expand(len(driving))
        request = GenerationRequest(portrait, driving, head)
        made, warped = (g.generate(request, cameras) for g in (maker.generator, WarpGenerator()))
        for method, rgb in (("video_model", made.rgb.cpu()), ("mesh_warp", warped.rgb)):
            films[method].append(quantised(rgb))
        for t in _shown(len(driving), SHOWN_FRAMES):
            write_image(folder / f"driver_c{case.driving.camera:02d}_{t:02d}.png", driving.crops[t])
            for method in METHODS:
                write_image(folder / f"{method}_c{case.driving.camera:02d}_{t:02d}.png", _face_of(films[method][-1][t]))
    for t in _shown(len(truth), SHOWN_FRAMES):
        write_image(folder / f"truth_{t:02d}.png", _face_of(truth[t]))
    face = face_mask(head, _tracked_front(settings, person, head, size), portrait.camera) * mask
    scores = {}
    for method, made_films in films.items():
        stacked = torch.stack(made_films)
        per_view = [float(psnr(f, truth, face).nanmean()) for f in stacked]
        scores[method] = _compared(stacked, head, float(portrait.camera.K[0, 0]))
        pairs = list(zip(per_view, yaws, strict=True))
        scores[method] |= {
            "psnr_face": _mean(per_view),
            "psnr_face_front": _mean([p for p, yaw in pairs if yaw < 15]),
            "psnr_face_side": _mean([p for p, yaw in pairs if yaw > 30]),
        }
        scores[method]["psnr_face_by_view"] = per_view
    return {"scores": scores, "yaw_deg": yaws, "latents": consistency(torch.stack(latents))}


def _as_still(driving: Driving, own: HeadParams, portrait: Any) -> HeadParams:
    """The driver's face on the reference's head, where and as it is turned in the reference."""
    params = with_identity_of(portrait, driving.params)
    n = len(driving)
    kept = {k: getattr(own, k).expand(n, -1) for k in ("rotation", "neck_pose", "translation")}
    return replace(params, **kept)


def _tracked_front(settings: Settings, person: Films, head: Any, size: int) -> HeadParams:
    """Where mouth and eyes are in the truth: the driver as the reference's camera tracks it, posed as the reference."""
    front = person.cases[0].reference.camera
    case = next((c for c in person.cases if c.driving.camera == front), person.cases[0])
    driver = prepare_driver(settings.out, case, head, size, settings.tracking)
    reference = load_portrait(prepare_reference(settings.out, case, head, size, settings.tracking), size)
    return _as_still(load_driving(driver, head, 32), HeadParams.stack([reference.params]), reference)


def _truth(person: Films, reference: Clip) -> tuple[Tensor, Tensor]:
    """The reference camera's own frames, cut as the reference is: the head is still."""
    r = person.cases[0].reference
    frames = source_frames(Recording(r.clip, r.camera, person.cases[0].driving.timesteps))
    box, size = tuple(reference.extra["crop"]), reference.frame(0).camera.width
    masks = torch.stack([crop_image(f.mask, box, size, fill=0.0) for f in frames])
    images = torch.stack([crop_image(f.image, box, size, fill=0.5) for f in frames])
    return quantised(composite(images, masks)), masks


def _compared(films: Float[Tensor, "views frames 3 height width"], head: Any, focal_px: float) -> dict[str, Any]:
    """Track all views' films and compare their expressions; pictures too small to be tracked have none."""
    none = {"consistency": None, "view_mm": None, "time_mm": None}
    if films.shape[-1] < MIN_SIZE:
        return none
    seen = [observe_frames(f, head, focal_px).params for f in films]
    known = [expressed(head, p)[:, face_region(head)] for p in seen if p is not None]
    if len(known) < 2:
        return none
    v = torch.stack(known)
    return {
        "consistency": consistency(v.flatten(2)),
        "view_mm": 1000 * float((v - v.mean(0)).norm(dim=-1).mean()),
        "time_mm": 1000 * float((v.mean(0) - v.mean((0, 1))).norm(dim=-1).mean()),
    }


def consistency(values: Float[Tensor, "views frames n"]) -> float:
    """Share of variance between instants that views agree on; 1 where they do on everything."""
    views = len(values)
    mean = values.mean(0)
    within = (values - mean).square().sum(-1).mean() * views / max(views - 1, 1)
    # The mean over views still holds a part of what views disagree on.
    between = (mean - mean.mean(0)).square().sum(-1).mean() - within / views
    between = between.clamp(min=0)
    return float(between / (between + within).clamp(min=1e-12))


def _face_of(image: Float[Tensor, "3 size size"]) -> Float[Tensor, "3 part part"]:
    """The middle of a canonical crop, for looking at expressions."""
    size = image.shape[-1]
    return image[:, size // 4 : size - size // 4, size // 4 : size - size // 4]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(frames: int, count: int) -> list[int]:
    return sorted({round(k * (frames - 1) / (count - 1)) for k in range(count)})


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = PairScores(len(found))
    for i, each in enumerate(found):
        for method, row in each.get("scores", {}).items():
            scores.add(i, method, {k: float("nan") if row[k] is None else row[k] for k in KEYS})
    out: dict[str, Any] = scores.summary()
    latents = bootstrap([f["latents"] for f in found if "latents" in f])
    out["encoder"] = {"consistency": latents.mean, "interval": {"consistency": [latents.low, latents.high]}}
    out["failed"] = {f["name"]: f["failed"] for f in found if "failed" in f}
    return out


def _markdown(metrics: dict[str, Any]) -> str:
    c = metrics["config"]
    means = f"Means over {c['people']} people, {c['views']} driving cameras [95 % interval over people]."
    lines = [f"# Cross-view animation, {c['data']}", "", means, ""]
    lines += ["| | " + " | ".join(KEYS.values()) + " |", "|---" * (len(KEYS) + 1) + "|"]
    for method, name in METHODS.items():
        row = metrics[method]
        cells = ["n/a" if row[k] is None else f"{row[k]:.2f} [{row['interval'][k][0]:.2f}, {row['interval'][k][1]:.2f}]"
                 for k in KEYS]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    e = metrics["encoder"]
    low, high = e["interval"]["consistency"]
    lines += ["", f"Consistency of the expression encoder's latents: {e['consistency']:.2f} [{low:.2f}, {high:.2f}]."]
    return "\n".join(lines) + "\n"


def _page(out: Path, metrics: dict[str, Any], people: Sequence[Films], found: Sequence[dict[str, Any]]) -> None:
    table = Table(["", *KEYS.values()], [[n, *(metrics[m][k] for k in KEYS)] for m, n in METHODS.items()])
    sections = [Section("The figures", "The same performance, driven from each camera.", [table])]
    for person, each in zip(people, found, strict=True):
        if "failed" in each:
            continue
        folder = out / "people" / each["name"]
        frames = _shown(len(person.cases[0].driving.timesteps), SHOWN_FRAMES)
        shown = [person.cases[k] for k in _shown(len(person.cases), SHOWN_VIEWS)]
        rows: list[Any] = [("truth", [p for t in frames for p in (None, folder / f"truth_{t:02d}.png", None)])]
        for case in shown:
            yaw = each["yaw_deg"][person.cases.index(case)]
            c = case.driving.camera
            names = ("driver", "video_model", "mesh_warp")
            rows.append((f"from {yaw:.0f}°", [folder / f"{n}_c{c:02d}_{t:02d}.png" for t in frames for n in names]))
        grid = Grid(rows, ["driver", "video model", "mesh warp"] * len(frames), "", 64, 128)
        sections.append(Section(each["name"], "Rows are driving cameras, by how far they look past the face.", [grid]))
    lead = "One performance before many cameras; every camera's film drives the same reference, whose head stays still."
    build_report(out / "report.html", Report("Cross-view animation", lead, sections, "`geodiff4d evaluate cross-view`"))
