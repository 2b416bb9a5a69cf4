"""Two photographs of one person: the first is the portrait, the second drives it and is the truth.

Everything is a real person's here, truth and driver alike. The driver is tracked from its pixels, and every method is
seen by the driver's camera, with its head where and as large as the driver's, so that its frame and the truth compare.
Copying the portrait, which does nothing, scores a gain of 0.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.images import composite, read_image, write_image
from geodiff4d.core.progress import Progress, silent
from geodiff4d.data.clip import Clip
from geodiff4d.evaluate.cases import Case, Recording
from geodiff4d.evaluate.gain_tables import Scores, tables
from geodiff4d.evaluate.inputs import Inputs
from geodiff4d.evaluate.made import Made
from geodiff4d.evaluate.methods import Maker
from geodiff4d.evaluate.protocol import Settings, maker_of, settled
from geodiff4d.evaluate.readers import Reader, Reading, compare_identities, readers
from geodiff4d.evaluate.taught_avatars import fit_avatar
from geodiff4d.pipeline import following, tracked
from geodiff4d.tracking.source import IMAGE_SUFFIXES
from geodiff4d.video.inputs import load_driving, load_portrait

PAIR_METHODS = ("video_model", "mesh_warp", "avatar")
CONTROL = "copy_reference"
"""Does nothing: the portrait stays as it is."""
SHOWN = 256
"""Side of an image on the contact sheet [px], at most."""


@dataclass(frozen=True)
class Person:
    """Two photographs of one person."""

    name: str
    portrait: Path
    driver: Path
    """Drives, and is the truth."""


def people_of(folder: Path) -> tuple[list[Person], dict[str, str]]:
    """List the people of a folder, and why others are left out.

    An image's name up to its first underscore says who it shows; of two, by name, the first is the portrait.

    Raises:
        UserError: it is no folder, or nobody has two photographs.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: expected images named PERSON_….jpg, two for each person")
    images: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            images.setdefault(path.stem.partition("_")[0], []).append(path)
    people = [Person(name, *paths) for name, paths in images.items() if len(paths) == 2]
    if not people:
        raise UserError(f"{folder} has no person with two images: expected names such as anna_1.jpg and anna_2.jpg")
    refused = {n: f"number of photographs: {len(p)}, expected 2" for n, p in images.items() if len(p) != 2}
    return people, refused


def run_pairs(
    folder: Path, settings: Settings, judges: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:  # fmt: skip
    """Make and score every person's frames; returns what it writes to OUT/metrics.json.

    Writes OUT/frames/{person}_{portrait,truth,METHOD}.png, OUT/sheet.png and OUT/table.md. A person whose frames are
    there, made of the same photographs by the same model, is not made again. `judges` is the folder of an environment
    with independent networks.

    Raises:
        UserError: no person's face is found, or bad input.
    """
    people, failed = people_of(folder)
    if unknown := [m for m in settings.methods if m not in PAIR_METHODS]:
        raise UserError(f"--methods {unknown[0]} is not for image pairs: expected some of {', '.join(PAIR_METHODS)}")
    settings = settled(settings)
    maker, out = maker_of(settings), settings.out
    each, missing = readers(maker.head, judges)
    done = []
    for person in progress(people, "people", len(people)):
        try:
            make_person(out, person, settings, maker)
            done.append(person)
        except UserError as error:
            failed[person.name] = str(error)
    if not done:
        name, why = next(iter(failed.items()))
        raise UserError(f"nobody could be made; the first, {name}: {why}")
    methods = (*settings.methods, CONTROL)
    scores, absent = score_people(out, [p.name for p in done], methods, each)
    missing |= absent
    result = {
        "people": len(done), "failed": failed, "methods": scores.summary(methods), "missing": missing,
        "config": {"preset": settings.preset.name, "seed": settings.seed,
                   "model": "shipped" if settings.model is None else settings.model.name},
    }  # fmt: skip
    write_json(out / "metrics.json", result)
    with fresh_file(out / "table.md") as file:
        file.write_text(table_markdown(result), encoding="utf-8")
    write_image(out / "sheet.png", contact_sheet(out, [p.name for p in done], methods))
    return result


# Making


def make_person(out: Path, person: Person, settings: Settings, maker: Maker) -> None:
    """Track a person's two photographs and make the frames of all methods; what is there is kept.

    Raises:
        UserError: no face is found.
    """
    folder = out / "people" / person.name
    digests = [hashlib.blake2b(p.read_bytes()).hexdigest() for p in (person.portrait, person.driver)]
    there = Made(folder, fingerprint(digests, settings.makers))
    wanted = there.missing(settings.methods)
    if not wanted and frame_path(out, person.name, "truth").exists():
        return
    inputs = pair_inputs(folder, person, maker)
    frame = inputs.driving.frame(0)
    write_image(frame_path(out, person.name, "portrait"), inputs.portrait.on_grey)
    write_image(frame_path(out, person.name, "truth"), composite(frame.image, frame.mask))
    driving = maker.driving(inputs)
    for method in wanted:
        if method == "avatar":
            fit_avatar(folder / "avatar", maker, inputs.portrait)
        made = maker.make(method, inputs, driving, inputs.portrait, folder / "avatar" / "avatar")
        assert made.rgb is not None
        write_image(frame_path(out, person.name, method), made.rgb[0])
        there.add(method)
    there.add()


def frame_path(out: Path, person: str, what: str) -> Path:
    """Return where a person's frame of a method lies; the control's is the portrait."""
    return out / "frames" / f"{person}_{'portrait' if what == CONTROL else what}.png"


def pair_inputs(folder: Path, person: Person, maker: Maker) -> Inputs:
    """Track both photographs into FOLDER, and place the portrait's head where the driver's is seen."""
    head, size = maker.head, maker.model.config.size
    clips = []
    for name, source in (("portrait", person.portrait), ("driver", person.driver)):
        there = (folder / name / "transforms.json").exists()
        clips.append(Clip(folder / name) if there else tracked(source, head, size, folder / name, 1))
    portrait = load_portrait(clips[0], size)
    driving, camera = following(portrait, load_driving(clips[1], head, maker.model.config.expression.size), head)
    case = Case(person.name, Recording(clips[0].folder, 0, (0,)), Recording(clips[1].folder, 0, (0,)), same=True)
    return Inputs(case, portrait, clips[1], driving.params, camera, None, torch.zeros(1))


# Scoring


def score_people(
    out: Path, people: Sequence[str], methods: Sequence[str], each: Sequence[Reader]
) -> tuple[Scores, dict[str, str]]:
    """Read everyone's frames and compare them with the truth; also returns which readings there were not, and why."""
    scores, absent = Scores(), {}
    looked = ("truth", *methods)
    for reader in each:
        seen: dict[str, Reading] = {}
        paths = [frame_path(out, p, what) for what in looked for p in people]
        whole = reader.read(read_image(path) for path in paths)
        for i, what in enumerate(looked):
            rows = slice(i * len(people), (i + 1) * len(people))
            expression = None if whole.expression is None else whole.expression[rows]
            seen[what] = Reading(whole.names, expression, {k: v[rows] for k, v in whole.identity.items()})
        rest, truth = seen[CONTROL], seen["truth"]
        for method in methods:
            made = seen[method]
            if rest.expression is not None and truth.expression is not None and made.expression is not None:
                scores.add_change(method, reader.key, whole.names, rest.expression, truth.expression, made.expression)
            for key, vectors in made.identity.items():
                scores.add_identity(method, key, list(compare_identities(key, vectors, truth.identity[key])))
        absent |= whole.missing
    return scores, absent


def table_markdown(result: dict[str, Any]) -> str:
    """Write table.md."""
    lines = ["# Image pairs", ""]
    lines += [f"{result['people']} people, each driven by the second of two photographs, which is the truth.", ""]
    lines += tables(result["methods"], "cos", result["missing"])
    if result["failed"]:
        lines += ["## Left out", "", *(f"- {name}: {why}" for name, why in result["failed"].items()), ""]
    return "\n".join(lines)


def contact_sheet(out: Path, people: Sequence[str], methods: Sequence[str]) -> Tensor:
    """Lay out a row per person: portrait, truth, and every method in order [3, height, width]."""
    columns = ("portrait", "truth", *(m for m in methods if m != CONTROL))
    rows = [[_shown(frame_path(out, person, what)) for what in columns] for person in people]
    return torch.cat([torch.cat(row, -1) for row in rows], -2)


def _shown(path: Path) -> Tensor:
    image = read_image(path)
    side = min(SHOWN, image.shape[-1])
    if image.shape[-1] == side:
        return image
    return torch.nn.functional.interpolate(image[None], size=(side, side), mode="bilinear", antialias=True)[0]
