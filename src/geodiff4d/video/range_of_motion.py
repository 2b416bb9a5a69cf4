"""A range of motion: what an avatar should have seen before it is driven by anybody (ours, beyond the paper).

A driver's film shows what that person did in those seconds. An avatar that never saw an open mouth, a shut eye or a
look aside has no colours for them. So the training clip is led through single instants of everything a face does,
played by a person of the open world, whose expressions are known exactly: frames, labels and later driving then speak
of the same amplitudes.
"""

from functools import lru_cache

import torch

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import composite
from geodiff4d.heads.rig import Head
from geodiff4d.render.crops import canonical_crop
from geodiff4d.render.viewpoints import FRONT_CAMERA, capture_cameras, openhead, world_region
from geodiff4d.video.inputs import Driving, driving_crop
from geodiff4d.world.expressions import EMOTIONS, MAX_PITCH_RAD, MAX_YAW_RAD, VISEMES, Motion, held
from geodiff4d.world.subject import SyntheticSubject, plain_seed

ACTOR = 7000
"""The first plain person of the training split from this seed on."""
SIZE = 256
GAZE = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
"""Eight directions, in shares of the farthest gaze: to the person's left, and up."""
ALONE: tuple[dict[str, float], ...] = (
    {"eyeBlink": 1.0}, {"eyeBlink": 0.5}, {"eyeWide": 1.0}, {"eyeSquint": 1.0}, {"eyeBlinkLeft": 1.0},
    {"eyeBlinkRight": 1.0}, {"browDown": 1.0}, {"browOuterUp": 1.0, "browInnerUp": 1.0}, {"browInnerUp": 1.0},
    {"jawOpen": 1.0}, {"jawOpen": 0.5, "mouthSmile": 0.6}, {"mouthSmile": 1.0}, {"mouthFrown": 1.0},
    {"mouthPucker": 1.0}, {"mouthFunnel": 1.0}, {"mouthUpperUp": 1.0, "mouthLowerDown": 1.0},
    {"mouthRollLower": 1.0, "mouthRollUpper": 1.0}, {"tongueOut": 1.0, "jawOpen": 0.5}, {"mouthLeft": 1.0},
    {"mouthRight": 1.0}, {"jawLeft": 0.8}, {"jawRight": 0.8}, {"cheekPuff": 1.0}, {"noseSneer": 1.0},
    {"mouthShrugLower": 1.0, "mouthShrugUpper": 1.0},
)  # fmt: skip
SPOKEN = 1.25
"""Visemes are shown a little stronger than people speak."""


def instants() -> Motion:
    """Return the expressions: rest, visemes, gaze in eight directions, single actions and emotions."""
    spoken = [{k: min(1.0, SPOKEN * v) for k, v in viseme.items()} for viseme in VISEMES]
    poses = [{}, *spoken, *ALONE, *EMOTIONS]
    gaze = [(0.0, 0.0)] * len(poses) + [(x * MAX_YAW_RAD, y * MAX_PITCH_RAD) for x, y in GAZE]
    return held([*poses, *({} for _ in GAZE)], gaze)


def range_of_motion(head: Head, crop: int) -> Driving:
    """Return the range of motion as a driver: [instants], in the open world's own coefficients.

    Args:
        crop: side of the driving crops [px].

    Raises:
        UserError: the head is not OpenHead, whose coefficients the open world's people have.
    """
    if head.name != "openhead":
        raise UserError(
            f"the range of motion is played on OpenHead and the head is {head.name}: give a driver to train with"
        )
    return _played(crop)


@lru_cache(maxsize=2)
def _played(crop: int) -> Driving:
    head, actor = openhead(), SyntheticSubject(plain_seed(0, "train", ACTOR), "train")
    expr, jaw, eyes = instants()
    params = actor.params(expr, jaw_pose=jaw, eyes_pose=eyes)
    camera = canonical_crop(capture_cameras(SIZE)[FRONT_CAMERA], actor.vertices(params[:1])[0][world_region()])
    frames = actor.render(params, camera.expand(len(expr)))
    shown = composite(frames.rgb, frames.mask)
    # The actor's own shape places the cut; the portrait's takes its place when it drives.
    crops = [driving_crop(image, head, params[i], camera, crop) for i, image in enumerate(shown)]
    return Driving(params, torch.stack(crops), temporal=False)
