"""A recipe: every network that ships made from nothing, a stage after another, each a command in a process of its own.

It is a TOML file, those of the presets in `assets/recipes`, with a table for each stage in the order in which they run:

    [stage.video]
    command = "train video --start {image}/model --data {data} --out {out} --workers {workers} --seed {seed}"
    makes = "temporal modules (stage 2)"
    data = "96 tracks of 24 frames"
    steps = "500 × 2 clips of 16 frames"
    hours = 0.5
    machine = "one core of a Xeon with AMX"
    needs = ["image"]
    weights = { "embedded" = "model" }

`{out}` is the folder that the stage writes to, `{image}` the one that the stage `image` wrote to, `{data}` what is
rendered, for all. `weights` says which of the folders in `{out}` ships as what.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_folder, load_model, read_object, save_model, write_json
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.jsontext import parse_json
from geodiff4d.core.packing import packed
from geodiff4d.core.weights import VARIABLE
from geodiff4d.launch.jobs import OUT, Job, Outcome

RECIPES = Path(__file__).parents[1] / "assets" / "recipes"
PACKED = ("unet", "reference", "expression")
"""Parts of a video model that ship in eight bits; codec and decoder are small, and every pixel passes through them."""
MARK = "stage.json"
"""In a stage's folder once it is done: what it was made of, how long it took, its figures."""


@dataclass(frozen=True)
class Figure:
    """A validation figure that a stage logs."""

    key: str
    """In the records of `{out}/log.jsonl`; the last one that has it counts."""
    what: str
    """With its unit."""
    shipped: float | None = None
    """Of the weights that ship, measured the same way; None where it was not."""


@dataclass(frozen=True)
class Stage:
    """One command and what is known of it."""

    name: str
    command: str
    makes: str
    data: str
    steps: str
    hours: float
    machine: str
    """On which `hours` were measured."""
    needs: tuple[str, ...] = ()
    """Earlier stages whose networks it takes."""
    photographs: bool = False
    """Whether it is given the photographs, where there are any."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Folder among the weights → folder in `{out}`."""
    figures: tuple[Figure, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command's words, with their placeholders."""
        return shlex.split(self.command)


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run."""

    path: Path
    stages: tuple[Stage, ...]
    networks: Literal["own", "shipped"] = "own"
    """Which networks the stages look with (tracking, expression encoder): those made so far, or those that ship,
    because those of a few steps see nothing."""


def read_recipe(path: Path, commands: Sequence[str]) -> Recipe:
    """Read a recipe whose stages are some of `commands`.

    Raises:
        UserError: the file is missing or no recipe.
    """
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML ({error}): expected a recipe (docs/TRAINING.md)") from None
    tables = given.get("stage")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{path} has no stages: expected a table [stage.NAME] for each (docs/TRAINING.md)")
    networks = given.get("networks", "own")
    if networks not in ("own", "shipped"):
        raise UserError(f'{path}: networks is {networks!r}: expected "own" or "shipped"')
    stages: list[Stage] = []
    for name, table in tables.items():
        stages.append(_stage(f"{path}, stage {name}", name, table, [s.name for s in stages], commands))
    return Recipe(Path(path), tuple(stages), networks)


def _stage(where: str, name: str, table: Any, earlier: Sequence[str], commands: Sequence[str]) -> Stage:
    known = {f.name for f in fields(Stage)} - {"name"}
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or name in ("out", "data", "workers", "seed", "weights"):
        raise UserError(f"{where}: {name!r} cannot be a stage's name: expected small letters, digits and '_'")
    if not isinstance(table, dict) or (strange := sorted(set(table) - known)):
        raise UserError(f"{where} has unknown {', '.join(strange) if isinstance(table, dict) else 'content'}: "
                        f"expected {', '.join(sorted(known))}")  # fmt: skip
    try:
        figures = tuple(Figure(**f) for f in table.get("figures", ()))
        stage = Stage(name, **{**table, "needs": tuple(table.get("needs", ())), "figures": figures})
        words = stage.words
        hours = float(stage.hours)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} is no stage ({error}): expected command, makes, data, steps, hours, machine"
        ) from None
    if not words or words[0] not in commands or words[:2] == ["train", "all"]:
        raise UserError(f"{where}: {words[:2]} cannot be a stage: expected one of {', '.join(commands)}")
    if not any(OUT in word for word in words):
        raise UserError(f"{where}: the command does not write to {OUT}")
    if late := [n for n in stage.needs if n not in earlier]:
        raise UserError(f"{where} needs {late[0]}, which does not come before it")
    free = {m for word in words for m in re.findall(r"\{(\w+)\}", word)} - {"out", "data", "workers", "seed"}
    if strange := sorted(free - set(stage.needs)):
        raise UserError(f"{where}: {{{strange[0]}}} is neither out, data, workers, seed nor a stage that it needs")
    if odd := [n for n in stage.weights if not re.fullmatch(r"\w+", n)]:
        raise UserError(f"{where}: {odd[0]!r} is no name for a folder of weights: expected letters, digits and '_'")
    if hours < 0:
        raise UserError(f"{where}: hours is {hours}: expected at least 0")
    return stage


@dataclass(frozen=True)
class RecipeRun:
    """A recipe carried out below a folder: OUT/NAME for each stage, OUT/data, OUT/weights."""

    recipe: Recipe
    out: Path
    photographs: Path | None = None
    workers: int = 2
    seed: int = 0

    @property
    def weights(self) -> Path:
        """The networks as they would ship, laid out as the package's `assets`."""
        return self.out / "weights"

    def job(self, stage: Stage) -> Job:
        """Return a stage's command with its placeholders filled in, but for its own `{out}`."""
        values = {"data": str(self.out / "data"), "workers": str(self.workers), "seed": str(self.seed)}
        values |= {name: str(self.out / name / "out") for name in stage.needs}
        words = stage.words
        if stage.photographs and self.photographs is not None:
            words += ["--photographs", str(self.photographs)]
        for name, value in values.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return Job(stage.name, tuple(words))

    def environment(self) -> dict[str, str]:
        """Return what stages are told of the networks to look with."""
        return {VARIABLE: str(self.weights) if self.recipe.networks == "own" else ""}

    def made_of(self, stage: Stage) -> str:
        """Return what a stage depends on, hashed: its command and those of all that it needs."""
        by_name = {s.name: s for s in self.recipe.stages}
        given = str(self.photographs) if stage.photographs and self.photographs is not None else ""
        return fingerprint(stage.command, given, self.seed, [self.made_of(by_name[n]) for n in stage.needs])

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """Return what a finished stage noted, None where it is not finished.

        Raises:
            UserError: it was made by another recipe, from other photographs or another seed.
        """
        mark = self.out / stage.name / MARK
        if not mark.exists():
            return None
        note = read_object(mark, "made_of", "seconds", "figures")
        if note["made_of"] != self.made_of(stage):
            after = [s.name for s in self.recipe.stages if stage.name in s.needs and (self.out / s.name).exists()]
            also = f", {', '.join(after)} too, which need it," if after else ""
            raise UserError(
                f"{self.out / stage.name} was made by another recipe, from other photographs or with another seed: "
                f"remove it{also} to make it again, or give --out a new folder"
            )
        return note

    def finish(self, stage: Stage, outcome: Outcome) -> None:
        """Put a stage's networks among the weights, and note that it is done.

        Raises:
            UserError: the command did not leave what the recipe says.
        """
        wrote = self.out / stage.name / "out"
        for name, source in stage.weights.items():
            place_weights(wrote / source, self.weights / name)
        found = last_figures(wrote / "log.jsonl", [f.key for f in stage.figures])
        write_json(
            self.out / stage.name / MARK,
            {"made_of": self.made_of(stage), "seconds": outcome.seconds, "figures": found, "command": stage.command},
        )


def place_weights(source: Path, out: Path) -> None:
    """Copy a network, or a video model's folder of them, as it ships: large parts in eight bits, without notes.

    Raises:
        UserError: there is no network.
    """
    parts = [source] if (source / "config.json").exists() else sorted(p for p in source.glob("*/") if p.is_dir())
    if not parts:
        raise UserError(f"{source} is no network: expected config.json in it, or in folders in it")
    with fresh_folder(out) as folder:
        for part in parts:
            place = folder if part == source else folder / part.name
            if part.name in PACKED:
                config, state = load_model(part)
                save_model(place, config, packed(state))
            else:
                place.mkdir(exist_ok=True)
                for file in (part / "config.json", *part.glob("model*.safetensors")):
                    shutil.copyfile(file, place / file.name)


def last_figures(log: Path, keys: Sequence[str]) -> dict[str, float]:
    """Return the last value of each key in a run's log, of those that are there."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = parse_json(line)
        except ValueError:
            continue  # cut by a kill
        found |= {k: record[k] for k in keys if isinstance(record.get(k), int | float)}
    return found


def plan_lines(run: RecipeRun) -> list[str]:
    """Lay the plan out: every stage with its hours, and whether it is done; then what is left."""
    stages, lines = run.recipe.stages, []
    width, left = max(len(s.name) for s in stages), 0.0
    for s in stages:
        done = run.done(s) is not None
        left += 0 if done else s.hours
        lines.append(f"{s.name:<{width}}  {'done' if done else lasting(s.hours):>7}  {s.makes}: {s.steps}; {s.data}")
    whole = sum(s.hours for s in stages)
    machines = "; ".join(dict.fromkeys(s.machine for s in stages))
    lines.append(f"{len(stages)} stages, {lasting(whole)}, {lasting(left)} left, as measured on {machines}")
    return lines


def lasting(hours: float) -> str:
    """Say how long something takes, in hours or in minutes."""
    return f"{hours:.1f} h" if hours >= 0.95 or not hours else f"{60 * hours:.0f} min"


def write_figures(run: RecipeRun) -> dict[str, Any]:
    """Write OUT/figures.json and OUT/figures.md, every stage's figures beside those of the weights that ship."""
    size = sum(f.stat().st_size for f in run.weights.rglob("*.safetensors"))
    rows, result = [], {"recipe": str(run.recipe.path), "seed": run.seed, "megabytes": size / 1e6, "stages": {}}
    for stage in run.recipe.stages:
        note = run.done(stage)
        assert note is not None
        result["stages"][stage.name] = {
            "hours": note["seconds"] / 3600, "expected_hours": stage.hours,
            "figures": {f.key: {"what": f.what, "value": note["figures"].get(f.key), "shipped": f.shipped}
                        for f in stage.figures},
        }  # fmt: skip
        for f in stage.figures:
            values = [note["figures"].get(f.key), f.shipped]
            rows.append([stage.name, f.what, *("–" if v is None else f"{v:.4g}" for v in values)])
    hours = sum(s["hours"] for s in result["stages"].values())
    head = ["stage", "figure on people who are held out", "these weights", "those that ship"]
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * 4, *rows)]
    page = ["# Weights from a recipe", "", f"{size / 1e6:.1f} MB, made in {lasting(hours)}.", "", *table, ""]
    write_json(run.out / "figures.json", result)
    (run.out / "figures.md").write_text("\n".join(page), encoding="utf-8")
    return result
