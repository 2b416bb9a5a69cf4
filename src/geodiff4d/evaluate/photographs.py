"""Photographs of people, each the only picture of its person: what is made of them from other sides.

Four questions, for every method:

- *views*: is it still this person when the head turns? The portrait's identity against the frame's, by independent
  networks where there are any;
- *likeness*: does a set of views look like photographs, by a kernel distance between the two sets?
- *own view*: does a frame keep what the photograph shows?
- *warp-back*: the photograph, carried to a turned view and kept where it is seen there, is the portrait, and the
  photograph is the truth for what was hidden.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import read_image, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.expression_gain import averaged
from geodiff4d.evaluate.kernel_distance import head_features, kernel_distance
from geodiff4d.evaluate.made import Made
from geodiff4d.evaluate.methods import TITLES, Maker
from geodiff4d.evaluate.metrics import bootstrap, psnr, sharpness
from geodiff4d.evaluate.protocol import Settings, maker_of, settled
from geodiff4d.evaluate.readers import IDENTITIES, Reader, Reading, compare_identities, readers
from geodiff4d.evaluate.taught_avatars import fit_avatar
from geodiff4d.heads.rig import HeadParams
from geodiff4d.tracking.portraits import photographs_below, track_portraits
from geodiff4d.tracking.track import TrackingConfig
from geodiff4d.video.conditions import lifted
from geodiff4d.video.generate import Generated, GenerationRequest, Generator, WarpGenerator, require_frame_size
from geodiff4d.video.inputs import Driving, Portrait, driving_crop, load_portrait
from geodiff4d.video.warp_back import around, seen_turned

PHOTOGRAPH_METHODS = ("video_model", "mesh_warp", "avatar")
TURNS_DEG = (-60, -40, -20, 0, 20, 40, 60)
"""Turns about the upright axis; 0 is the photograph's own view."""
WARP_BACK_DEG = (12.0, 55.0)
"""Least and largest turn of the portrait of a warp-back."""
SHOWN = 192
"""Side of a picture on the sheet [px], at most."""


@dataclass(frozen=True)
class Photograph:
    """A tracked photograph."""

    name: str
    clip: Path


def run_photographs(
    folder: Path, settings: Settings, size: int, judges: Path | None = None, workers: int = 2,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Make and score every photograph's views; returns what it writes to OUT/metrics.json.

    Writes OUT/clips (tracked photographs, unless FOLDER holds such), OUT/frames/{name}_{portrait,METHOD_TURN}.png,
    OUT/sheet.jpg and OUT/table.md. What is there, made of the same photographs by the same model, is not made again.

    Args:
        size: side of portraits and frames [px].
        judges: folder of an environment with independent networks.

    Raises:
        UserError: no photograph shows a face, or bad input.
    """
    if unknown := [m for m in settings.methods if m not in PHOTOGRAPH_METHODS]:
        raise UserError(
            f"--methods {unknown[0]} is not for photographs: expected some of {', '.join(PHOTOGRAPH_METHODS)}"
        )
    settings, out = settled(settings), settings.out
    maker = maker_of(settings)
    require_frame_size(size, maker.model.config.size, maker.model.decoder)
    each, missing = readers(maker.head, judges)
    found, refused = tracked_photographs(folder, out / "clips", size, workers, progress)
    for photograph in progress(found, "photographs", len(found)):
        make_views(out, photograph, settings, maker, size)
    names = [p.name for p in found]
    scores = own_view_scores(out, names, settings.methods)
    identities, absent = identity_scores(out, names, settings.methods, [r for r in each if r.key != "tracker"])
    likeness = likeness_scores(out, names, settings.methods)
    result = {
        "photographs": len(found), "refused": refused, "size": size, "methods": scores, "identity": identities,
        "likeness": likeness,
        "missing": missing | absent,
        "config": {"preset": settings.preset.name, "seed": settings.seed,
                   "model": "shipped" if settings.model is None else settings.model.name},
    }  # fmt: skip
    write_json(out / "metrics.json", result)
    with fresh_file(out / "table.md") as file:
        file.write_text(table_markdown(result), encoding="utf-8")
    write_image(out / "sheet.jpg", contact_sheet(out, names, settings.methods))
    return result


def tracked_photographs(
    folder: Path, place: Path, size: int, workers: int, progress: Progress
) -> tuple[list[Photograph], dict[str, str]]:
    """Open the tracked photographs below a folder, or track its photographs; also says what was left out, and why."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected photographs, or clips of `geodiff4d import portraits`")
    clips = sorted(p.parent for p in folder.rglob("transforms.json"))
    if clips:
        return [Photograph("_".join(c.relative_to(folder).parts) or c.name, c) for c in clips], {}
    if not photographs_below(folder):
        raise UserError(f"{folder} has no photographs: expected images, or clips of `geodiff4d import portraits`")
    made = track_portraits(folder, place, TrackingConfig(size=size), workers=workers, progress=progress)
    return [Photograph("_".join(c.relative_to(place).parts), c) for c in made.clips], made.refused


# Making


def frame_path(out: Path, name: str, what: str) -> Path:
    """Return where a picture of a photograph lies: `portrait`, `METHOD_TURN` or `METHOD_back`."""
    return out / "frames" / f"{name}_{what}.png"


def make_views(out: Path, photograph: Photograph, settings: Settings, maker: Maker, size: int) -> None:
    """Make a photograph's frames by all methods that are not there yet."""
    folder = out / "photographs" / photograph.name
    [record] = Clip(photograph.clip).records[:1]
    files = [p for p in (record.image_path, record.mask_path, record.normal_path, record.params_path) if p]
    digests = [hashlib.blake2b(p.read_bytes()).hexdigest() for p in files]
    there = Made(folder, fingerprint(digests, size, settings.makers))
    wanted = there.missing(settings.methods)
    if not wanted:
        return
    head, portrait = maker.head, load_portrait(Clip(photograph.clip), size)
    write_image(frame_path(out, photograph.name, "portrait"), portrait.on_grey)
    write_image(frame_path(out, photograph.name, "mask"), portrait.mask.expand(3, -1, -1))
    cameras = Camera.stack([around(head, portrait, turn) for turn in TURNS_DEG])
    back = warp_back_portrait(maker, portrait, photograph.name)
    for method in wanted:
        if method == "avatar":
            avatar = Avatar.load(fit_avatar(folder / "avatar", maker, portrait))
            with torch.no_grad():
                made = [avatar.render(portrait.params, cameras[k]).rgb.clamp(0, 1) for k in range(len(TURNS_DEG))]
        else:
            generator = maker.generator if method == "video_model" else WarpGenerator()
            made = list(shown(maker, generator, portrait, portrait, cameras).rgb)
            back_made = shown(maker, generator, back, portrait, Camera.stack([portrait.camera]))
            write_image(frame_path(out, photograph.name, f"{method}_back"), back_made.rgb[0])
        for turn, image in zip(TURNS_DEG, made, strict=True):
            write_image(frame_path(out, photograph.name, f"{method}_{turn:+d}"), image)
        there.add(method)


def shown(maker: Maker, generator: Generator, given: Portrait, driver: Portrait, cameras: Camera) -> Generated:
    """Show a portrait in the pose and expression that a photograph has, before cameras."""
    head, n = maker.head, cameras.T_cam_world.shape[0]
    crop = driving_crop(driver.on_grey, head, driver.params, driver.camera, maker.model.config.expression.size)
    driving = Driving(HeadParams.stack([driver.params] * n), crop.expand(n, -1, -1, -1), temporal=False)
    return generator.generate(GenerationRequest(given, driving, head), cameras)


def warp_back_portrait(maker: Maker, portrait: Portrait, name: str) -> Portrait:
    """Return a photograph as the portrait of its own warp-back; the turn depends on its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    yaw = rng.choice((-1, 1)) * rng.uniform(*WARP_BACK_DEG)
    texture = lifted(maker.head, portrait, True)
    return seen_turned(maker.head, portrait, texture, float(yaw), float(rng.uniform(-12, 12)))


# Scoring


def own_view_scores(out: Path, names: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """Compare own views and warp-backs with the photograph, in its foreground."""
    rows: dict[str, Any] = {}
    truths = [read_image(frame_path(out, n, "portrait"))[None] for n in names]
    masks = [read_image(frame_path(out, n, "mask"), "L")[None] for n in names]
    for method in methods:
        rows[method] = {}
        for key, what in (("own", f"{method}_+0"), ("back", f"{method}_back")):
            if not frame_path(out, names[0], what).exists():
                continue
            found: dict[str, list[float]] = {"psnr": [], "sharpness": []}
            for name, truth, mask in zip(names, truths, masks, strict=True):
                image = read_image(frame_path(out, name, what))[None]
                found["psnr"].append(psnr(image, truth, mask).item())
                found["sharpness"].append(sharpness(image, truth, mask).item())
            rows[method][key] = {k: averaged(bootstrap(v)) for k, v in found.items()}
    return rows


def identity_scores(
    out: Path, names: Sequence[str], methods: Sequence[str], each: Sequence[Reader]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compare every view with the photograph by independent networks; also returns what could not be read, and why."""
    rows: dict[str, Any] = {m: {} for m in methods}
    absent: dict[str, str] = {}
    for reader in each:
        looked = ["portrait", *(f"{m}_{t:+d}" for m in methods for t in TURNS_DEG)]
        whole: Reading = reader.read(read_image(frame_path(out, n, what)) for what in looked for n in names)
        absent |= whole.missing
        for key, vectors in whole.identity.items():
            seen = {what: vectors[i * len(names) : (i + 1) * len(names)] for i, what in enumerate(looked)}
            for method in methods:
                row = rows[method].setdefault(key, {})
                for turn in TURNS_DEG:
                    same = compare_identities(key, seen[f"{method}_{turn:+d}"], seen["portrait"])
                    row[f"{turn:+d}"] = averaged(bootstrap(same))
                    row["unseen"] = row.get("unseen", 0) + int(np.isnan(same).sum())
    return rows, absent


def likeness_scores(out: Path, names: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """Compare every view of all people with the photographs of the others (`kernel_distance`)."""

    def features(what: str) -> Float[np.ndarray, "people features"]:
        return head_features(read_image(frame_path(out, name, what)) for name in names)

    real = features("portrait")
    return {
        m: {f"{t:+d}": averaged(kernel_distance(features(f"{m}_{t:+d}"), real)) for t in TURNS_DEG} for m in methods
    }


def table_markdown(result: dict[str, Any]) -> str:
    """Write table.md."""

    def number(value: dict[str, Any] | None, digits: int) -> str:
        mean = None if value is None else value["mean"]
        return "–" if mean is None else f"{mean:.{digits}f}"

    lines = ["# Photographs", "", f"{result['photographs']} photographs at {result['size']} px.", ""]
    lines += ["| | own view [dB] | sharpness | warp-back [dB] | sharpness |", "|---|---|---|---|---|"]
    for method, row in result["methods"].items():
        cells = [number(row.get(k, {}).get(m), 2) for k in ("own", "back") for m in ("psnr", "sharpness")]
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    turns = [f"{t:+d}" for t in TURNS_DEG]
    for key in IDENTITIES:
        lines += ["", f"## Identity by {key} ({IDENTITIES[key]}), by turn", ""]
        if key in result["missing"]:
            lines.append(f"n/a: {result['missing'][key]}.")
            continue
        lines += ["| | " + " | ".join(f"{t}°" for t in turns) + " |", "|---" * (len(turns) + 1) + "|"]
        for method, row in result["identity"].items():
            lines.append(f"| {TITLES[method]} | " + " | ".join(number(row[key][t], 3) for t in turns) + " |")
    lines += ["", "## Kernel distance to the photographs (lower is more like them), by turn", ""]
    lines += ["| | " + " | ".join(f"{t}°" for t in turns) + " |", "|---" * (len(turns) + 1) + "|"]
    for method, row in result["likeness"].items():
        lines.append(f"| {TITLES[method]} | " + " | ".join(number(row[t], 2) for t in turns) + " |")
    if result["refused"]:
        lines += ["", "## Left out", "", *(f"- {name}: {why}" for name, why in result["refused"].items())]
    return "\n".join([*lines, ""])


def contact_sheet(out: Path, names: Sequence[str], methods: Sequence[str]) -> Float[Tensor, "3 height width"]:
    """Lay out a row per photograph and method: the portrait, then every turn."""
    rows = []
    for name in names:
        for method in methods:
            whats = ("portrait", *(f"{method}_{t:+d}" for t in TURNS_DEG))
            rows.append(torch.cat([_shown(read_image(frame_path(out, name, w))) for w in whats], -1))
    return torch.cat(rows, -2)


def _shown(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 side side"]:
    side = min(SHOWN, image.shape[-1])
    return torch.nn.functional.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
