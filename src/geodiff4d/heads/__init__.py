"""Parametric heads: FLAME-shaped parameters in, posed meshes out."""

from geodiff4d.heads.rig import Head, HeadParams, Landmarks, PosedHead, ShapedHead

__all__ = ["Head", "HeadParams", "Landmarks", "PosedHead", "ShapedHead", "load_head"]


def load_head(source: str = "openhead") -> Head:
    """Load a head by name or path.

    Raises:
        UserError: the name is unknown or the file is missing or not a head.

    Example:
        >>> head = load_head("openhead")
        >>> mesh = head.pose(head.neutral(1))
        >>> mesh.vertices.shape[-1]
        3
    """
    from geodiff4d.heads.openhead import load

    return load(source)
