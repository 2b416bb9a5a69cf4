"""The open world (docs/WORLD.md): synthetic people, motions and cameras, a pure function of (seed, split)."""

from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.expressions import ACTIONS, TRACK_KINDS, expression_track, random_expression
from geodiff4d.world.subject import SyntheticFrames, SyntheticSubject
from geodiff4d.world.tracker_error import disturbed

__all__ = [
    "ACTIONS", "TRACK_KINDS", "SyntheticFrames", "SyntheticSubject", "disturbed", "expression_track",
    "random_cameras", "random_expression",
]  # fmt: skip
