"""What render, export and view share: where an avatar's performance comes from."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.avatar.drive import Performance, Pose
    from geodiff4d.avatar.model import Avatar
    from geodiff4d.avatar.stream import Line
    from geodiff4d.data.clip import Clip

STREAM_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class DrivingArgs:
    """Options about the performance that render and export have in common."""

    driving: Path | None = None
    """Who drives: a tracked clip's folder, a video, a file of ARKit weights (.jsonl, one object a line, or Live Link
    Face's .csv; docs/AVATAR.md) or - for such lines from standard input. Without it, the sequence that the avatar was
    fitted to."""
    set: tuple[str, ...] = ()
    """Hold expressions by name instead: --set jawOpen=0.6 mouthSmileLeft=1."""
    absolute: bool = False
    """Take the driver's expressions as they are. By default another person's face at rest is not taken over."""
    model: Path | None = None
    """Video model whose encoder reads the driver's images; by default the one that ships."""


def performance(avatar: "Avatar", args: DrivingArgs, pose: "Pose" = "fixed") -> "Performance":
    """Make the performance that the options ask for.

    Raises:
        UserError: two sources at once, or one that cannot be read or belongs to another head.
    """
    import torch

    from geodiff4d.avatar.arkit_csv import SUFFIX, read_csv_file
    from geodiff4d.avatar.drive import held, own_performance
    from geodiff4d.avatar.stream import read_stream, read_stream_file
    from geodiff4d.core.errors import UserError

    source = args.driving
    if source is not None and args.set:
        raise UserError("--driving and --set were both given: expected one of them")
    names, fps = avatar.head.expression_names, None
    if args.set:
        return held(avatar, _weights(args.set, names)[None], avatar.fps)
    if source is None:
        return own_performance(avatar)
    if str(source) == "-":
        lines: list[Line] = list(read_stream(sys.stdin, names, "standard input"))
        if not lines:
            raise UserError("standard input had no frames: expected one JSON object a line")
    elif source.suffix.lower() in STREAM_SUFFIXES and not source.is_dir():
        lines = read_stream_file(source, names)
    elif source.suffix.lower() == SUFFIX and not source.is_dir():
        lines, fps = read_csv_file(source, names)
    else:
        return _followed(avatar, source, args, pose)
    made = held(avatar, torch.stack([line.weights for line in lines]), fps or avatar.fps)
    return made.turned(torch.stack([line.neck for line in lines]))


def _followed(avatar: "Avatar", source: Path, args: DrivingArgs, pose: "Pose") -> "Performance":
    """Follow a clip, or a video that is tracked first."""
    from geodiff4d.avatar.drive import performed, wants_tokens
    from geodiff4d.avatar.frames import read_sequence
    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.pipeline import tracked

    if not source.exists():
        raise UserError(f"--driving {source} does not exist: expected a clip's folder, a video or a .jsonl file")
    with TemporaryDirectory(prefix="geodiff4d-") as name:
        size, out = max(avatar.camera.width, 128), Path(name) / "tracked"
        clip = tracked(source, avatar.head, size, out, progress=progress.bar)
        params = read_sequence(clip, avatar.head)
        tokens = _tokens(clip, args.model, avatar) if wants_tokens(avatar) else None
    return performed(avatar, params, tokens, clip.fps, pose, not args.absolute)


def _tokens(clip: "Clip", model: Path | None, avatar: "Avatar"):
    """Return the clip's own expression tokens, or encode its images; None where it has no images."""
    import torch

    from geodiff4d.avatar.frames import read_tokens
    from geodiff4d.cli import progress
    from geodiff4d.pipeline import load_model
    from geodiff4d.video.inputs import load_driving

    if (tokens := read_tokens(clip)) is not None:
        return tokens
    if any(not r.image_path.is_file() for r in clip.records):
        return None
    encoder = load_model(model).expression
    crops = load_driving(clip, avatar.head, encoder.config.size, progress=progress.bar).crops
    with torch.no_grad():
        return torch.cat([encoder.tokens(encoder(part)).float() for part in crops.split(16)])


def _weights(given: Iterable[str], names: tuple[str, ...]):
    """Read `name=weight` words."""
    from geodiff4d.avatar.stream import Reader, require_names
    from geodiff4d.core.errors import UserError

    require_names(names, "--set")
    pairs = dict(_pairs(given))
    try:
        values = {name: float(weight) for name, weight in pairs.items()}
    except ValueError as error:
        raise UserError(f"--set: {error}: expected name=weight, such as jawOpen=0.6") from None
    return Reader(names, "--set").record(values, 0).weights


def _pairs(given: Iterable[str]) -> Iterator[tuple[str, str]]:
    from geodiff4d.core.errors import UserError

    for word in given:
        name, equals, weight = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: expected name=weight, such as jawOpen=0.6")
        yield name, weight
