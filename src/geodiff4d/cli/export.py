"""Write a clip in another program's layout: vhap, the NeRF-style folder on FLAME that GaussianAvatars trains on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d export`; docs/DATA.md says what is in the result."""

    clip: Annotated[Path, tyro.conf.Positional]
    """Clip folder with FLAME parameters, from import or track --head."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist."""
    to: Literal["vhap"] = "vhap"
    """What to write: vhap, as VHAP's export_as_nerf_dataset.py does."""
    background: float = 1.0
    """Grey behind the person, 0 to 1; VHAP's own is white."""


def run(args: Args) -> None:
    import sys

    from geodiff4d.cli import progress
    from geodiff4d.core.errors import UserError
    from geodiff4d.data.clip import Clip
    from geodiff4d.data.vhap import write_vhap

    if not 0 <= args.background <= 1:
        raise UserError(f"--background is {args.background:g}: expected 0 (black) to 1 (white)")
    if args.out.exists():
        raise UserError(f"{args.out} exists: expected a new folder; choose another name, or delete it")
    left = write_vhap(Clip(args.clip), args.out, args.background, progress.track)
    if left:
        print(f"warning: {len(left)} timesteps have no head parameters and were left out", file=sys.stderr)
    written = Clip(args.out)
    print(
        f"{args.out}: {len(written)} frames, {len(written.timesteps)} timesteps × {len(written.camera_indices)} "
        f"cameras on {written.head_name}, in VHAP's layout"
    )
