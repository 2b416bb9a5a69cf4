"""Give opened mouths an inside (ours, beyond the paper; embedded preset only).

A portrait with closed lips shows no teeth, and a denoiser that saw little paints grey where lips part. The warped
portrait has teeth, gums, tongue and the dark between them, lit as the face is (`render/hidden.py`): what a mouth shows
and the portrait does not is taken from there.
"""

from dataclasses import dataclass, replace

from torch.nn.functional import avg_pool2d

from geodiff4d.video.finish import FinishContext
from geodiff4d.video.frames import SampledFrames

SOFT = 3
"""Width over which frame and inside pass into each other, at 256 px [px]."""


@dataclass(frozen=True)
class FillMouth:
    """Take the inside of mouths from the warped portrait, where the portrait itself does not show it.

    Normals stay as they are, and so do frames of a model that is not conditioned on the warped portrait.
    """

    def __call__(self, frames: SampledFrames, context: FinishContext) -> SampledFrames:
        """Return the frames with their mouths filled."""
        known = context.warped
        if known is None:
            return frames
        window = 2 * max(1, round(SOFT * known.opened.shape[-1] / 512)) + 1
        share = avg_pool2d(known.opened, window, 1, window // 2, count_include_pad=False)
        return replace(frames, rgb=frames.rgb + share * (known.rgb - frames.rgb))
