"""Parametric heads: FLAME-shaped parameters in, posed meshes out."""

import re
from pathlib import Path

from geodiff4d.heads.rig import Head, HeadParams, Landmarks, PosedHead

__all__ = ["Head", "HeadParams", "Landmarks", "PosedHead", "load_head"]


def load_head(source: str | Path = "openhead") -> Head:
    """Load a head by name or path: OpenHead, an .npz in its format, or the user's own FLAME.

    FLAME is its .pkl (or a folder with one), or a name that a clip recorded, such as "flame2023": then the file is the
    one already loaded, or where the environment variable GEODIFF4D_FLAME points (docs/FLAME.md).

    Raises:
        UserError: the name is unknown, the file is missing or not a head, or it is FLAME of another year.

    Example:
        >>> head = load_head("openhead")
        >>> mesh = head.pose(head.neutral(1))
        >>> mesh.vertices.shape[-1]
        3
    """
    from geodiff4d.heads import flame, openhead

    path = Path(source)
    if re.fullmatch(r"flame[a-z0-9-]*", str(source)) and not path.exists():
        return flame.find(str(source))
    if path.suffix == ".pkl" or path.is_dir() or openhead.lacks_names(path):
        return flame.load(path)
    return openhead.load(source)
