"""Write an avatar or a clip for others: a web page, glTF, 3DGS .ply, GaussianAvatars, or VHAP's layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from geodiff4d.cli._driving import DrivingArgs
from geodiff4d.cli._signing import SigningArgs, sealer


@dataclass(frozen=True)
class Args(DrivingArgs, SigningArgs):
    """Options of `geodiff4d export`; docs/AVATAR.md and docs/DATA.md say what is in the result."""

    source: Annotated[Path, tyro.conf.Positional]
    """Avatar folder from fit, or (for vhap) clip folder with FLAME parameters, from import or track --head."""
    out: Annotated[Path, tyro.conf.Positional]
    """File (web, glb, ply, spz, sog, compact) or folder (the others) to write; it must not exist."""
    to: Literal["web", "glb", "ply", "ply-sequence", "spz", "sog", "gaussian-avatars", "compact", "vhap"] | None = None
    """web: one page that shows the avatar in any browser, from a disk too. glb: a rigged mesh with 52 morph targets,
    and the splats at rest. ply: the avatar at one instant, for any splat viewer; spz, sog: the same, a tenth and a
    twentieth as large. ply-sequence: one .ply a frame. gaussian-avatars: its folder (FLAME). compact: everything in one
    small file. vhap: a clip as VHAP's export_as_nerf_dataset.py writes it. By default what the name's ending says
    (.html, .glb, .ply, .spz, .sog, .g4d), else ply for an avatar and vhap for a clip."""
    frame: int = 0
    """Frame of the performance that ply, spz and sog are posed at."""
    title: str | None = None
    """Title of the web page; by default the avatar folder's name."""
    origin: tuple[str, ...] = ()
    """Web sites whose pages may drive the web page by messages, such as https://example.org; * for all."""
    face_landmarker: tuple[Path, Path] | None = None
    """MediaPipe's face_landmarker.task and the folder of its npm package @mediapipe/tasks-vision, both yours: put into
    the web page (about 8 MB), they let a webcam drive it. Without them its button says what is missing."""
    background: float = 1.0
    """Grey behind the person in vhap's images, 0 to 1; VHAP's own is white."""


def run(args: Args) -> None:
    from geodiff4d.core.errors import UserError
    from geodiff4d.provenance.beside import read_beside
    from geodiff4d.provenance.seal import available, origin

    if not 0 <= args.background <= 1:
        raise UserError(f"--background is {args.background:g}: expected 0 (black) to 1 (white)")
    if args.out.exists():
        raise UserError(f"{args.out} exists: expected a new name; choose another, or delete it")
    is_clip = (args.source / "transforms.json").is_file()
    suffixes = {"web": ".html", "glb": ".glb", "ply": ".ply", "spz": ".spz", "sog": ".sog", "compact": ".g4d"}
    meant = {ending: to for to, ending in suffixes.items()}.get(args.out.suffix.lower(), "ply")
    to = args.to or ("vhap" if is_clip else meant)
    if is_clip != (to == "vhap"):
        kind, expected = ("a clip", "an avatar's folder") if is_clip else ("no clip", "a folder with transforms.json")
        raise UserError(f"{args.source} is {kind}: --to {to} expected {expected}")
    suffix = suffixes.get(to)
    if suffix and args.out.suffix.lower() != suffix:
        raise UserError(f"{args.out}: --to {to} writes one file, expected a name ending in {suffix}")
    signer = sealer(args)
    (_vhap if is_clip else _avatar)(args, to)
    # A clip without a statement may be of a real recording.
    if not is_clip or (available() and read_beside(args.source)):
        signer.seal(args.out, origin(args.source))


def _avatar(args: Args, to: str) -> None:
    from geodiff4d.avatar.compact import open_avatar, write_compact
    from geodiff4d.avatar.export_gaussian_avatars import export_gaussian_avatars
    from geodiff4d.avatar.export_ply import export_ply, export_sequence
    from geodiff4d.cli import progress
    from geodiff4d.cli._driving import performance
    from geodiff4d.core.errors import UserError

    if to == "compact":
        if not args.source.is_dir():
            raise UserError(f"{args.source} is not an avatar's folder: expected one, from fit")
        size = write_compact(args.source, args.out)
        print(f"{args.out}: {size / 1e6:.2f} MB; render, view and import compact read it")
        return
    avatar = open_avatar(args.source)
    if to == "gaussian-avatars":
        count = export_gaussian_avatars(avatar, args.out, args.source)
        print(f"{args.out}: {len(avatar.local)} Gaussians, {count} timesteps, for GaussianAvatars")
        return
    if to == "glb":
        from geodiff4d.avatar.export_glb import export_glb

        size = export_glb(avatar, args.out)
        print(f"{args.out}: {size / 1e6:.2f} MB, {len(avatar.local)} Gaussians at rest, a mesh with 52 morph targets")
        return
    show = performance(avatar, args)
    if to == "web":
        from geodiff4d.viewer.face_tracker import packed_tracker
        from geodiff4d.viewer.page import PageConfig, write_page

        tracker = None if args.face_landmarker is None else packed_tracker(*args.face_landmarker)
        config = PageConfig(args.title or args.source.stem, args.origin, tracker=tracker)
        size = write_page(avatar, show, args.out, config)
        print(
            f"{args.out}: {size / 1e6:.2f} MB, {len(avatar.local)} Gaussians, {len(show)} frames; open it in a browser"
        )
    elif to == "ply":
        count = export_ply(avatar, show, args.out, args.frame)
        print(f"{args.out}: {count} Gaussians at frame {args.frame}")
    elif to in ("spz", "sog"):
        from geodiff4d.avatar.export_sog import export_sog
        from geodiff4d.avatar.export_spz import export_spz

        count = (export_spz if to == "spz" else export_sog)(avatar, show, args.out, args.frame)
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {count} Gaussians at frame {args.frame}")
    else:
        count = export_sequence(avatar, show, args.out, progress.bar)
        print(f"{args.out}: {len(show)} frames of {count} Gaussians")


def _vhap(args: Args, to: str) -> None:
    import sys

    from geodiff4d.cli import progress
    from geodiff4d.data.clip import Clip
    from geodiff4d.data.vhap import write_vhap

    left = write_vhap(Clip(args.source), args.out, args.background, progress.bar)
    if left:
        print(f"warning: {len(left)} timesteps have no head parameters and were left out", file=sys.stderr)
    written = Clip(args.out)
    print(
        f"{args.out}: {len(written)} frames, {len(written.timesteps)} timesteps × {len(written.camera_indices)} "
        f"cameras on {written.head_name}, in VHAP's layout"
    )
