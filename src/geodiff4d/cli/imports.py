"""Import data sets or trackers' results as clips (NeRSemble v2, RenderMe-360, SynthHuman, VHAP, Pixel3DMM, CAP4D),
photographs (portraits), or avatars (GaussianAvatars, compact)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Dataset = Literal[
    "nersemble", "renderme360", "synthhuman", "vhap", "pixel3dmm", "cap4d", "portraits", "gaussian-avatars", "compact"
]  # fmt: skip

SHOWN_WARNINGS = 20


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d import`; docs/DATA.md says how to get each data set."""

    dataset: Annotated[Dataset, tyro.conf.Positional]
    """The format of SRC."""
    src: Annotated[Path, tyro.conf.Positional]
    """The data set's folder, or a part of it: one participant, one sequence, one file."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write to: a clip, or one clip below it for each person and sequence. The same command resumes."""
    limit: int | None = None
    """Largest number of timesteps of each clip (SynthHuman: of images)."""
    every: int = 1
    """Take every n-th timestep (NeRSemble runs at 73 frames/s: 3 is 24.3)."""
    cameras: tuple[str, ...] = ()
    """Only these cameras, by index or by the data set's own name."""
    only: tuple[str, ...] = ()
    """Only clips whose name matches one of these patterns, such as '017_EXP-*'."""
    size: int | None = None
    """Scale images down to this many pixels on their longer side; portraits: side of the tracked crops (512)."""
    masks: Path | None = None
    """Folder of foreground masks by frame (docs/DATA.md has the file names)."""
    normals: Path | None = None
    """Folder of camera-space normals by frame, or your DAViD .onnx file, which is run on every image."""
    params: Path | None = None
    """Folder of head parameters by timestep, {t:05d}.npz as in a clip."""
    head: str | None = None
    """The head that the parameters belong to: your FLAME file (.pkl; docs/FLAME.md), or openhead. --params needs it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that a DAViD network runs on."""
    workers: int = 2
    """Processes that track portraits."""


def run(args: Args) -> None:
    from importlib import import_module

    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.importer import ImportConfig, import_sources, summary
    from geodiff4d.data.importing import Choice, Report
    from geodiff4d.data.joins import Joins
    from geodiff4d.heads import load_head

    if not args.src.exists():
        raise UserError(f"{args.src} does not exist: expected the folder or file of {args.dataset}; see docs/DATA.md")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: expected a folder to write clips to, or a new name")
    if args.dataset in ("gaussian-avatars", "compact"):
        _avatar(args)
        return
    if args.dataset == "portraits":
        _portraits(args)
        return
    choice = Choice(args.limit, args.every, args.cameras, args.only)
    if args.params is not None and args.head is None:
        raise UserError("--params needs --head: whose parameters are they? Pass your FLAME file, or openhead")
    head = load_head(args.head) if args.head else None
    joins = Joins(args.masks, args.normals, args.params)
    config = ImportConfig(args.size, joins, None if head is None else head.name)
    estimator = None
    if args.normals is not None and args.normals.is_file():
        from geodiff4d.data.david import DavidNormals

        estimator = DavidNormals(args.normals, args.device)
    report = Report()
    sources = import_module(f"geodiff4d.data.{args.dataset}").read(args.src, choice, report)
    origin = f"{args.dataset} {args.src.resolve()}"
    if head is None:
        try:
            head = load_head(sources[0].head)
        except UserError:  # FLAME without its file: everything is imported, only the sheet's pose maps are missing
            head = None
    clips = import_sources(sources, args.out, origin, choice, report, config, head, estimator, progress.bar)
    for folder in clips:
        print(summary(folder))
    for line in report.lines()[:SHOWN_WARNINGS]:
        print(f"warning: {line}", file=sys.stderr)
    warned = f"; all {len(report)} warnings: {args.out}/import_report.json" if len(report) else ""
    print(f"look at {clips[0]}/sheet.png{warned}")


def _portraits(args: Args) -> None:
    """Track photographs, each to a clip of one frame."""
    from geodiff4d.cli import progress
    from geodiff4d.tracking.portraits import track_portraits
    from geodiff4d.tracking.track import TrackingConfig

    config = TrackingConfig(size=args.size or 512)
    made = track_portraits(args.src, args.out, config, args.head or "openhead", args.workers, progress.bar)
    for path, problem in list(made.refused.items())[:SHOWN_WARNINGS]:
        print(f"warning: {path} was left out: {problem}", file=sys.stderr)
    print(f"{args.out}: {len(made.clips)} tracked portraits, {len(made.refused)} photographs left out")


def _avatar(args: Args) -> None:
    """Import an avatar of another program, or a compact one."""
    from geodiff4d.avatar.compact import open_avatar, unpack
    from geodiff4d.avatar.export_gaussian_avatars import import_gaussian_avatars
    from geodiff4d.core.errors import UserError
    from geodiff4d.heads import load_head

    if args.out.exists():
        raise UserError(f"{args.out} exists: expected a new name for the avatar; choose another, or delete it")
    if args.dataset == "compact":
        open_avatar(args.src)
        unpack(args.src, args.out)
        print(f"{args.out}: an avatar; render, view and export read it")
        return
    if args.head is None:
        raise UserError("import gaussian-avatars needs --head: pass the FLAME file that the avatar was made with")
    avatar = import_gaussian_avatars(args.src, load_head(args.head), args.out)
    print(f"{args.out}: {len(avatar.local)} Gaussians on {avatar.head.name}, {avatar.sequence.batch[0]} timesteps")
