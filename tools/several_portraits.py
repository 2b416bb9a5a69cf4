"""What more portraits of a person are worth: unseen views of people of the open world, 1 to 4 portraits and a film.

Usage: `.venv/bin/python tools/several_portraits.py --out runs/several --judges DIR`. Each person is photographed as a
user would: from the front, from 35° to either side, and laughing, each with an expression, an exposure and a white
balance of its own; and filmed for three seconds while the head turns. Everything is tracked from the pixels. Frames
from other sides, under expressions that no photograph shows, are compared with the truth in its foreground, and by
independent networks with the true frame. Finished people are kept. Prints Markdown tables.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from geodiff4d.cli import progress
from geodiff4d.core.camera import Camera
from geodiff4d.core.files import read_json, write_json
from geodiff4d.core.images import composite, read_image, write_image
from geodiff4d.core.video import write_video
from geodiff4d.evaluate.metrics import bootstrap, paired_difference, psnr, sharpness
from geodiff4d.evaluate.pairs import loosely
from geodiff4d.evaluate.readers import compare_identities, readers
from geodiff4d.heads import Head, load_head
from geodiff4d.heads.rig import HeadParams
from geodiff4d.pipeline import load_model
from geodiff4d.presets import preset
from geodiff4d.render.crops import canonical_crop, head_region
from geodiff4d.render.viewpoints import orbit, world_region
from geodiff4d.tracking.together import photo, track_together, write_portraits
from geodiff4d.tracking.track import TrackingConfig, default_detector
from geodiff4d.video.generate import DiffusionGenerator, GenerationRequest, Generator, WarpGenerator
from geodiff4d.video.inputs import Driving, Portrait, driving_crop, load_portrait
from geodiff4d.world.expressions import expression_track
from geodiff4d.world.seeds import Split
from geodiff4d.world.subject import SyntheticSubject, plain_seed

PORTRAITS = ((0.0, {"mouthSmileLeft": 0.2, "mouthSmileRight": 0.2}),
             (35.0, {"browInnerUp": 0.3}), (-35.0, {"jawOpen": 0.1}),
             (8.0, {"mouthSmileLeft": 0.9, "mouthSmileRight": 0.9, "mouthUpperUpLeft": 0.5, "mouthUpperUpRight": 0.5,
                    "jawOpen": 0.25}))  # fmt: skip
"""Azimuth [degrees] and expression of each."""
AZIMUTHS_DEG = (-60.0, -45.0, -20.0, -10.0, 10.0, 20.0, 45.0, 60.0)
"""Of the frames that are scored; elevations alternate between 8° above and below, where no portrait was taken."""
BANDS = {"to 20°": (0, 30), "45°": (40, 50), "60°": (55, 65)}
FILM_FRAMES, FILM_TURN_DEG = 72, 40.0
"""Three seconds, in which the camera goes once to either side."""


@dataclass(frozen=True)
class Args:
    """Options of the measurement."""

    out: Path
    """Photographs, frames and results."""
    people: int = 8
    split: Split = "val"
    size: int = 256
    """Side of portraits and frames [px]."""
    generator: tuple[Literal["warp", "diffusion"], ...] = ("warp", "diffusion")
    sets: tuple[str, ...] = ("1", "2", "3", "4", "film")
    """How many portraits, or the film."""
    model: Path | None = None
    """By default the one that ships."""
    judges: Path | None = None
    """Folder of an environment with independent networks that read identities."""
    threads: int | None = None


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    head = load_head()
    generators = {name: _generator(name, args) for name in args.generator}
    crop = load_model(args.model).config.expression.size
    rows = []
    for index in progress.bar(range(args.people), "people"):
        rows.append(person(args, head, index, generators, crop))
    print("\n".join(table(args, rows)))
    if args.judges is not None:
        print("\n".join(identity_table(args, head)))


def _generator(name: str, args: Args) -> Generator:
    if name == "warp":
        return WarpGenerator()
    return DiffusionGenerator(load_model(args.model), preset("embedded").sample)


def person(
    args: Args, head: Head, index: int, generators: dict[str, Generator], crop: int
) -> dict[str, Any]:  # fmt: skip
    """Make and score one person's frames by all generators and sets; returns scores by name."""
    folder = args.out / f"{index}"
    found = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    wanted = [(g, s) for g in generators for s in args.sets if f"{g}_{s}" not in found]
    if not wanted:
        return found
    subject = SyntheticSubject(plain_seed(index, args.split), args.split)
    photographs(folder, head, subject, args)
    params, cameras = performance(subject, index), true_cameras(subject, args.size)
    shown = subject.render(params, cameras)
    truth = composite(shown.rgb, shown.mask)
    for k, a in enumerate(AZIMUTHS_DEG):
        write_image(folder / "frames" / f"truth_{a:+.0f}.png", truth[k])
    crops = torch.stack([driving_crop(truth[k], head, params[k], cameras[k], crop) for k in range(len(truth))])
    portraits = portraits_of(folder, head, args)
    for name, which in wanted:
        portrait = portraits[which]
        moved = replace(params, shape=portrait.params.shape.expand(len(truth), -1))
        request = GenerationRequest(portrait, Driving(moved, crops, temporal=False), head)
        made = generators[name].generate(request, around_tracked(head, subject, portrait, cameras))
        for k, a in enumerate(AZIMUTHS_DEG):
            write_image(folder / "frames" / f"{name}_{which}_{a:+.0f}.png", made.rgb[k])
        found[f"{name}_{which}"] = {
            "psnr": psnr(made.rgb, truth, shown.mask).tolist(),
            "sharpness": sharpness(made.rgb, truth, shown.mask).tolist(),
        }
    write_json(folder / "scores.json", found)
    return found


# What goes in


def performance(subject: SyntheticSubject, index: int) -> HeadParams:
    """Return the true parameters of the frames that are scored: a still head with expressions."""
    expr, jaw, eyes = expression_track("mixed", 96, 9000 + index)
    pick = torch.linspace(8, 95, len(AZIMUTHS_DEG)).round().long()
    return subject.params(expr[pick], jaw_pose=jaw[pick], eyes_pose=eyes[pick])


def photographs(folder: Path, head: Head, subject: SyntheticSubject, args: Args) -> None:
    """Write a person's photographs and film; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((subject.seed, 31))
    for k, (azimuth, named) in enumerate(PORTRAITS):
        expr = torch.zeros(1, 52)
        for name, value in named.items():
            expr[0, head.expression_names.index(name)] = value
        tone = rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3) if k else np.ones(3)
        path = folder / f"photo_{k}.png"
        if path.exists():
            continue
        params = subject.params(expr)
        camera = orbit(torch.tensor([azimuth]), torch.tensor([float(rng.uniform(-4, 4))]), 256)
        camera = loosely(camera, subject.vertices(params)[0][world_region()], args.size)
        image = subject.render(params, camera).rgb[0]
        write_image(path, (image * torch.tensor(tone).float()[:, None, None]).clamp(0, 1))
    film = folder / "film.mp4"
    if "film" in args.sets and not film.exists():
        expr, jaw, eyes = expression_track("mixed", FILM_FRAMES, 9500 + subject.seed)
        params = subject.params(expr, jaw_pose=jaw, eyes_pose=eyes)
        turn = FILM_TURN_DEG * torch.sin(torch.linspace(0, 2 * torch.pi, FILM_FRAMES))
        params = replace(params, rotation=torch.stack([0 * turn, turn.deg2rad(), 0 * turn], 1))
        camera = loosely(orbit(torch.zeros(1), torch.zeros(1), 256),
                         subject.vertices(params[:1])[0][world_region()], args.size)  # fmt: skip
        out = subject.render(params, camera.expand(FILM_FRAMES))
        write_video(film, iter(out.rgb), 24.0)


def portraits_of(folder: Path, head: Head, args: Args) -> dict[str, Portrait]:
    """Track as many photographs as each set has, and the film; an image is looked at once."""
    config, detector, out = TrackingConfig(size=args.size), default_detector(), {}
    files = [folder / f"photo_{k}.png" for k in range(len(PORTRAITS))]
    photos = [photo(f, read_image(f), head, detector, config) for f in files]
    for which in args.sets:
        place = folder / f"tracked_{which}"
        if which == "film":
            clip = track_together([folder / "film.mp4"], place, head, detector, config)
        else:
            clip = write_portraits(place, head, photos[: int(which)], config)
        for note in clip.extra["notes"]:
            print(f"{folder.name}, {which}: {note}")
        out[which] = load_portrait(clip, args.size)
    return out


def true_cameras(subject: SyntheticSubject, size: int) -> Camera:
    """Return the cameras that see the person in the scored frames."""
    azimuth = torch.tensor(AZIMUTHS_DEG)
    elevation = 8.0 * torch.tensor([1.0, -1.0]).repeat(len(azimuth))[: len(azimuth)]
    points = subject.vertices(subject.params(torch.zeros(1, 52)))[0][world_region()]
    return canonical_crop(orbit(azimuth, elevation, size), points, size)


def around_tracked(head: Head, subject: SyntheticSubject, portrait: Portrait, cameras: Camera) -> Camera:
    """Move cameras from around the true head to around the tracked one, which may be of another size."""
    at_rest = replace(head.neutral(1), shape=portrait.params.shape[None])
    a = head.pose(at_rest).vertices[0][head_region(head)]
    b = subject.vertices(subject.params(torch.zeros(1, 52)))[0][world_region()]
    ca, cb = a.mean(0), b.mean(0)
    scale = (b - cb).norm() / (a - ca).norm()
    T = cameras.T_cam_world.clone()
    T[..., :3, 3] = (T[..., :3, 3] + T[..., :3, :3] @ cb) / scale - T[..., :3, :3] @ ca
    return replace(cameras, T_cam_world=T)


# Tables


def banded(values: list[float], band: tuple[float, float]) -> float:
    """Return the mean over the frames whose azimuth lies in a band."""
    return float(np.mean([v for v, a in zip(values, AZIMUTHS_DEG, strict=True) if band[0] <= abs(a) <= band[1]]))


def table(args: Args, rows: list[dict[str, Any]]) -> list[str]:
    """Lay means over people out in Markdown, and what each set gains over one portrait."""
    heads = ["", "portraits", *(f"PSNR, {b} [dB]" for b in BANDS), "all over 30°, minus one portrait's", "sharpness"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in args.generator:
        for which in args.sets:
            each = [r[f"{name}_{which}"] for r in rows]
            cells = [f"{np.mean([banded(r['psnr'], b) for r in each]):.2f}" for b in BANDS.values()]
            wide = [banded(r["psnr"], (30, 90)) for r in each]
            base = [banded(r[f"{name}_{args.sets[0]}"]["psnr"], (30, 90)) for r in rows]
            e = paired_difference(wide, base)
            cells += [f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"]
            cells += [f"{np.mean([np.mean(r['sharpness']) for r in each]):.2f}"]
            lines.append(f"| {name} | {which} | {' | '.join(cells)} |")
    return lines


def identity_table(args: Args, head: Head) -> list[str]:
    """Compare every frame with the true one by independent networks."""
    each, _ = readers(head, args.judges)
    lines = ["", "| | portraits | network | " + " | ".join(BANDS) + " |", "|" + "---|" * (3 + len(BANDS))]
    names = [f"{g}_{s}" for g in args.generator for s in args.sets]
    for reader in [r for r in each if r.key != "tracker"]:
        of = [(i, a) for i in range(args.people) for a in AZIMUTHS_DEG]
        frames = [args.out / f"{i}" / "frames" / f"{w}_{a:+.0f}.png" for w in ("truth", *names) for i, a in of]
        read = reader.read(read_image(p) for p in frames)
        for key, vectors in read.identity.items():
            truth, *each_set = vectors.reshape(1 + len(names), len(of), -1)
            for name, made in zip(names, each_set, strict=True):
                same = compare_identities(key, made, truth).reshape(args.people, -1)
                cells = []
                for low, high in BANDS.values():
                    inside = [low <= abs(a) <= high for a in AZIMUTHS_DEG]
                    e = bootstrap(np.nanmean(same[:, inside], 1))
                    cells.append(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]")
                lines.append(f"| {name.replace('_', ' | ')} | {key} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
