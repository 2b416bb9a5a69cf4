"""Avatars that are fitted to be measured: to the range of motion alone, so that every driver is a stranger to them."""

from pathlib import Path

from geodiff4d.evaluate.methods import Maker
from geodiff4d.pipeline import plan_clip, reconstruct
from geodiff4d.video.generate import GenerationRequest
from geodiff4d.video.inputs import Portrait
from geodiff4d.video.range_of_motion import range_of_motion


def fit_avatar(folder: Path, maker: Maker, portrait: Portrait) -> Path:
    """Fit a portrait's avatar; finished stages are kept. Returns the avatar's folder.

    Raises:
        UserError: the head is not OpenHead, or FOLDER holds another reconstruction.
    """
    p, motion = maker.preset, range_of_motion(maker.head, maker.model.config.expression.size)
    plan = plan_clip(GenerationRequest(portrait, motion, maker.head), p.views, p.frames, azimuth_deg=p.azimuth_deg)
    reconstruct(plan, maker.generator, folder, p.fit, maker.seed)
    return folder / "avatar"
