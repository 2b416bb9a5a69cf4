"""Where the avatar of a portrait ends: at a clean bust line, the lower edge of what its own view shows.

Generated frames from other sides show more of shoulders than any portrait does. What they show there is made up anew in
every frame, and splats that are fitted to it are rags of any colour (ours; the paper's data are full captures).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from geodiff4d.avatar.binding import LocalGaussians
from geodiff4d.avatar.surface import Surface
from geodiff4d.core.camera import Camera
from geodiff4d.heads.rig import Head

MARGIN = 0.01
"""How far beyond the image splats stay, over its side: without them its last rows would be pale."""


def above_bust_line(
    means: Float[Tensor, "n 3"], local: LocalGaussians, camera: Camera, head: Head, surface: Surface
) -> Bool[Tensor, " n"]:
    """Say which splats stay: none below the frontal camera's image, and no shoulders to its left or right.

    `means` are the posed splats, at an instant that the camera has seen. Shoulders are what is bound to the neck
    (`avatar.shoulders`); a head without a region "neck" has none.
    """
    xy, depth = camera.project(means)
    room = MARGIN * camera.height
    stays = (xy[:, 1] < camera.height + room) | (depth <= 0)
    neck = head.regions.get("neck")
    if neck is None:
        return stays
    of_neck = neck[head.faces].all(-1)[surface.head_face][local.face_index]
    beside = (xy[:, 0] < -room) | (xy[:, 0] > camera.width + room)
    return stays & ~(of_neck & beside)
