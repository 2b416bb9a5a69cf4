"""The open world (docs/WORLD.md): synthetic people, motions and cameras, a pure function of (seed, split)."""

from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.subject import SyntheticSubject

__all__ = ["SyntheticSubject", "random_cameras", "random_expression"]
