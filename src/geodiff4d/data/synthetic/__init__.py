"""The open world (docs/WORLD.md): synthetic people, motions, cameras and clips, a pure function of (seed, split)."""

from geodiff4d.data.synthetic.cameras import canonical_crop, random_cameras, rig, world_region
from geodiff4d.data.synthetic.expressions import ACTIONS, TRACK_KINDS, expression_track, random_expression
from geodiff4d.data.synthetic.subject import SyntheticFrames, SyntheticSubject
from geodiff4d.data.synthetic.world import disturbed

__all__ = [
    "ACTIONS", "TRACK_KINDS", "SyntheticFrames", "SyntheticSubject", "canonical_crop", "disturbed", "expression_track",
    "random_cameras", "random_expression", "rig", "world_region",
]  # fmt: skip
