"""Blinks that a film shows for some frames: they close the eyes all the way (ours).

Lids that are nearly shut look much like lids that are, most of all to whoever has seen few shut eyes of real people:
the fit and the reader stop at two thirds, and a face that is driven by that never quite closes its eyes. But whoever
closes both eyes for a tenth of a second blinks, and a blink closes them.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import median_filter
from torch import Tensor

from geodiff4d.tracking.layout import Layout

SIDES = ("eyeBlinkLeft", "eyeBlinkRight")
BEGUN, SURE = 0.15, 0.4
"""Lids that have moved by this much from where they rest are closing, and blink if they get as far as the second."""
LONGEST = 15
"""Longest time for which a blink is more than half of its height [frames]; a squint lasts longer."""
SHUT = 0.95
"""How far a blink goes."""
MOST = 1.7
"""A blink is not made larger than this, times what was seen of it."""
AROUND = 2
"""Frames before and after that are moved with it."""
REST = 31
"""Frames over which lids are taken to rest where their median is."""


def completed_blinks(layout: Layout, frame: Float[Tensor, "frames unknowns"]) -> Float[Tensor, "frames unknowns"]:
    """Return unknowns of a film's frames with every blink closing the eyes; of a head without such weights, the same.

    What both eyes do for a short time is a blink; a wink, a squint and eyes that stay shut are left as they are.
    """
    if not set(SIDES) <= set(layout.names):
        return frame
    lids = [layout.slices["expr"].start + layout.names.index(side) for side in SIDES]
    values = frame[:, lids].numpy()
    both = values.min(1)
    rest = median_filter(both, REST, mode="nearest")
    moved = both - rest
    closing = np.flatnonzero(moved > BEGUN)
    out = values.copy()
    for run in np.split(closing, np.flatnonzero(np.diff(closing) > 1) + 1):
        if not len(run):
            continue
        highest = run[both[run].argmax()]
        short = (moved[run] > 0.5 * moved[run].max()).sum() <= LONGEST
        if both[highest] < SURE or not short:
            continue
        part = slice(max(0, run[0] - AROUND), run[-1] + 1 + AROUND)
        larger = max(1.0, min((SHUT - rest[highest]) / moved[highest], MOST))
        still = rest[part, None]
        risen = still + (values[part] - still) * larger
        out[part] = np.maximum(values[part], np.minimum(risen, np.maximum(SHUT, values[part])))
    frame = frame.clone()
    frame[:, lids] = torch.from_numpy(out).to(frame)
    return frame
