"""Stream sources into clips: one frame in memory at a time, killed and called again at will, valid at every stop.

A clip being imported grows in place. Every frame's files are written whole, then its line is added to `import.jsonl`,
which is the truth about what is there; `transforms.json` is made from it at the end, and after an error too, so that
what was imported until then is a clip. A later call skips the frames that have a line, so a larger `--limit`, more
cameras or repaired source files only add to it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import write_image
from geodiff4d.core.jsontext import parse_json
from geodiff4d.core.progress import Progress, silent
from geodiff4d.core.rundir import alone
from geodiff4d.data.clip import Clip, ClipWriter, check_params
from geodiff4d.data.importing import Choice, Report, Source, SourceFrame, no_params
from geodiff4d.data.joins import Joins, Normals, joined, params_of
from geodiff4d.data.sheet import fits, sizes, write_sheet
from geodiff4d.heads import Head

JOURNAL = "import.jsonl"
OWN = {JOURNAL, "images", "fg_masks", "normals", "flame_param", "backgrounds"}


@dataclass(frozen=True)
class ImportConfig:
    """What is done to every frame on its way."""

    size: int | None = None
    """Longer side of what is written [px]; larger pictures are scaled down, smaller ones stay."""
    joins: Joins = Joins()
    head: str | None = None
    """Name of the head that the parameters belong to, where the user says it; else the source's own word."""

    def __post_init__(self) -> None:
        if self.size is not None and not 16 <= self.size <= 8192:
            raise UserError(f"--size is {self.size}: expected 16 to 8192 pixels")


def import_sources(
    sources: list[Source], out: Path, origin: str, choice: Choice, report: Report,
    config: ImportConfig = ImportConfig(), head: Head | None = None, estimator: Normals | None = None,
    progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Import every source that is chosen into a clip below `out` and return the clips' folders.

    `origin` names the reader and its source: a folder that holds an import of another origin is not touched. `head` is
    what poses the parameters on the contact sheets. With several sources, one that fails is reported and left out.

    Raises:
        UserError: nothing could be imported, or the only source stopped; the message says what was kept.
    """
    chosen = [source for source in sources if choice.picks_clip(source.name)]
    if not chosen:
        names = ", ".join(source.name for source in sources[:8]) or "none"
        raise UserError(f"{origin} has no clip that matches {' '.join(choice.only) or '*'}: found {names}")
    done: list[Path] = []
    failed: UserError | None = None
    for source in chosen:
        try:
            done.append(
                import_clip(source, out / source.name, origin, choice, report, config, head, estimator, progress)
            )
        except UserError as error:
            if len(chosen) == 1:
                raise
            report.warn(f"{source.name} was left out: {error}")
            failed = error
    if not done and failed is not None:
        raise failed
    report.save(out / "import_report.json")
    return done


def import_clip(
    source: Source, folder: Path, origin: str, choice: Choice, report: Report, config: ImportConfig,
    head: Head | None, estimator: Normals | None, progress: Progress,
) -> Path:  # fmt: skip
    """Import one source into `folder`, going on where an earlier call stopped.

    Raises:
        UserError: the folder holds something else, or the source stopped; what was read until then is a clip.
    """
    joins = config.joins.for_clip(source.name)
    source = of_head(source, config)
    identity = {
        "origin": origin, "clip": source.name, "size": config.size, "head": source.head,
        "joins": {name: None if path is None else str(path.resolve()) for name, path in vars(joins).items()},
        "motion": source.motion,
    }  # fmt: skip
    asked = {"limit": choice.limit, "every": choice.every, "cameras": list(choice.cameras)}
    with _growing(folder, source, identity) as writer:
        if asked in writer.finished:
            writer.is_done = (folder / "transforms.json").exists()
        else:
            _read_on(writer, source, origin, report, config, head, estimator, progress)
            writer.finish(asked, report, source)
    # The last thing that is written: a process that was killed may have left out no other.
    if not writer.is_done or not (folder / "sheet.png").exists():
        write_sheet(folder, head)
    return folder


def _read_on(
    writer: "GrowingClip", source: Source, origin: str, report: Report, config: ImportConfig, head: Head | None,
    estimator: Normals | None, progress: Progress,
) -> None:  # fmt: skip
    """Read the frames that are not there yet."""
    joins = config.joins.for_clip(source.name)
    frames = source.frames(lambda t, c: (t, c) not in writer.stored)
    left = None if source.total is None else max(source.total - len(writer.stored), 0)
    for frame in progress(frames, source.name or writer.folder.name, left):
        frame = joined(frame, joins, source, report, estimator)
        if frame.timestep not in writer.with_params:
            params = params_of(joins, source, frame.timestep)
            if params is not None:
                if config.head is not None and head is not None and not fits(head, params):
                    raise UserError(
                        f"the parameters of {source.name or origin} are not {head.name}'s: " + sizes(head, params)
                    )
                check_params(params, f"the parameters of {source.name or origin}, timestep {frame.timestep}")
                writer.add_params(frame.timestep, params)
        writer.store(scaled(frame, config.size), source.camera_ids.get(frame.camera_index))
    if not writer.stored:
        raise UserError(f"{origin}{'/' * bool(source.name)}{source.name} gave no frame: {_why(report)}")


def of_head(source: Source, config: ImportConfig) -> Source:
    """Return the source with its head named as the user does.

    Raises:
        UserError: the source's own parameters belong to another head.
    """
    if config.head is None:
        return source
    if config.joins.params is None and source.head not in ("flame", config.head) and source.params is not no_params:
        raise UserError(
            f"{source.name or 'the source'} has parameters of {source.head}, --head is {config.head}: coefficients of "
            "different heads do not mix"
        )
    return replace(source, head=config.head)


def _why(report: Report) -> str:
    lines = report.lines()
    return "; ".join(lines[-2:]) if lines else "expected at least one; check --cameras, --every and --limit"


def scaled(frame: SourceFrame, size: int | None) -> SourceFrame:
    """Return the frame with its longer side at most `size` pixels, antialiased, camera included."""
    camera = frame.camera
    if frame.image.shape[1:] != (camera.height, camera.width):
        raise ValueError(f"an image of {tuple(frame.image.shape)} came with a camera {camera.width}×{camera.height}")
    if size is None or max(camera.width, camera.height) <= size:
        return frame
    s = size / max(camera.width, camera.height)
    width, height = (max(1, round(n * s)) for n in (camera.width, camera.height))

    def small(value: Float[Tensor, "channels h w"]) -> Float[Tensor, "channels height width"]:
        return interpolate(value[None], (height, width), mode="bilinear", antialias=True)[0]

    mask = None if frame.mask is None else small(frame.mask).clamp(0, 1)
    normal = None
    if frame.normal is not None:
        normal = small(frame.normal)
        square = normal.square().sum(0, keepdim=True)
        # At the silhouette vectors are averaged with nothing: direction and all stay, length comes back.
        normal = normal * (square > 1e-3) * square.clamp(min=1e-12).rsqrt()
    image = small(frame.image).clamp(0, 1)
    return replace(frame, image=image, mask=mask, normal=normal, camera=camera.resized(width, height))


class GrowingClip(ClipWriter):
    """A clip writer that works in place and remembers, line by line, what is finished."""

    def __init__(self, folder: Path, source: Source, identity: dict):
        super().__init__(folder, source.head, source.fps, source.extra)
        self.path, self.identity = folder, identity
        self.stored: set[tuple[int, int]] = set()
        self.finished: list[dict] = []
        self.report_lines: list[str] = []
        self.is_done = False
        """Nothing was asked for that is not there: the clip stays as it is, warnings included."""

    @property
    def with_params(self) -> set[int]:
        """Timesteps whose head parameters are there."""
        return self._with_params

    def open(self) -> None:
        """Make the folder, or take up an earlier import in it.

        Raises:
            UserError: the folder holds something else.
        """
        journal = self.path / JOURNAL
        if journal.exists():
            self._resume(journal)
        elif self.path.exists() and {p.name for p in self.path.iterdir()} - OWN:
            raise UserError(f"{self.path} holds something that is not this import: choose a new folder, or empty it")
        for name in ("images", "fg_masks", "normals", "flame_param"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        if not journal.exists():
            self._note({"import": self.identity})

    def _resume(self, journal: Path) -> None:
        raw = journal.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            lines = [parse_json(line) for line in whole.splitlines()]
            if lines and lines[0]["import"] != self.identity:
                old, new = lines[0]["import"], self.identity
                differ = [k for k in new if old.get(k) != new[k]]
                changed = ", ".join(f"{k} was {old.get(k)}, is {new[k]}" for k in differ)
                same = "give the same --head as before, " if differ == ["motion"] else ""
                raise UserError(
                    f"{self.path} holds another import ({changed}): {same}choose a new folder, or delete it"
                )
            self._frames = [line["frame"] for line in lines if "frame" in line]
            self._with_params = {line["params"] for line in lines if "params" in line}
            self.finished = [line["finished"] for line in lines if "finished" in line]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{journal} is damaged ({error}): delete {self.path} and import again") from None
        if whole != raw:  # the last line was being written when the process died
            temporary = journal.with_name(f".{JOURNAL}.part")
            temporary.write_bytes(whole)
            os.replace(temporary, journal)
        self.stored = {(f["timestep_index"], f["camera_index"]) for f in self._frames}
        for left in self.path.glob("*/.*.part"):
            left.unlink()

    def _note(self, line: dict) -> None:
        with (self.path / JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def add_params(self, timestep: int, params: Any) -> None:
        """Store a timestep's head parameters (no batch axis)."""
        super().add_params(timestep, params)
        self._note({"params": timestep})

    def store(self, frame: SourceFrame, camera_id: str | None) -> None:
        """Store a frame under the source's own name of its camera."""
        self.add(frame.timestep, frame.camera_index, frame.image, frame.camera, frame.mask, frame.normal)
        if camera_id:
            self._frames[-1]["camera_id"] = camera_id
        self.stored.add((frame.timestep, frame.camera_index))
        self._note({"frame": self._frames[-1]})

    def finish(self, asked: dict, report: Report, source: Source) -> None:
        """Add what belongs to the whole clip, and remember that this request is fulfilled."""
        for camera in sorted({c for _, c in self.stored}):
            path = self.path / f"backgrounds/{camera:02d}.png"
            background = None if path.exists() else source.background(camera)
            if background is not None:
                write_image(path, background)
        self.report_lines = report.lines()
        self._note({"finished": asked})
        self.finished.append(asked)

    def close(self) -> None:
        """Make the clip of what is there; an import without a frame leaves nothing behind."""
        if self.is_done:
            return
        if self._frames:
            self._frames.sort(key=lambda f: (f["timestep_index"], f["camera_index"]))
            self.extra = self.extra | {"import": self.identity | {"complete": bool(self.finished)}}
            if self.report_lines:
                self.extra["warnings"] = self.report_lines
            self._frames = [dict(frame) for frame in self._frames]
            self._write_transforms()
            return
        (self.path / JOURNAL).unlink(missing_ok=True)
        for folder in sorted(self.path.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for folder in (self.path, self.path.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _growing(folder: Path, source: Source, identity: dict) -> Iterator[GrowingClip]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: expected a folder to write to, or a new name")
    writer = GrowingClip(folder, source, identity)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        writer.open()
        try:
            yield writer
        except UserError as error:
            kept = len(writer.stored)
            writer.close()
            kept_text = f"; {kept} frames imported before are kept in {folder}" if kept else ""
            raise UserError(f"{error}{kept_text}") from None
        except BaseException:
            writer.close()
            raise
        writer.close()


def summary(folder: Path) -> str:
    """One line about an imported clip."""
    clip = Clip(folder)
    first = clip.records[0]
    counts = {
        "masks": sum(r.mask_path is not None for r in clip.records),
        "normals": sum(r.normal_path is not None for r in clip.records),
        "head parameters": sum(r.params_path is not None for r in clip.records),
    }
    # Warnings of an earlier, interrupted call are gone; what is missing still shows here.
    has = [name if n == len(clip) else f"{name} on {n}" for name, n in counts.items() if n]
    return (
        f"{folder}: {len(clip)} frames, {len(clip.timesteps)} timesteps × {len(clip.camera_indices)} cameras, "
        f"{first.camera.width}×{first.camera.height} px, {', '.join(has) or 'pictures only'}"
    )
