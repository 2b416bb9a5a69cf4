"""JOD, just-objectionable differences: 10 is the same film, one less is a difference that three of four people see.

`jod` is FovVideoVDP's (Mantiuk et al. 2021), which the paper cites: CC BY-NC, so it is imported only where the user
installed it (`pip install pyfvvdp`). `jod_color` is ColorVideoVDP's (2024), MIT (`pip install cvvdp`). Films are scored
as 8 bits on plain grey, at the display `standard_4k` (3840×2160, 30 inches, 0.75 m), an image taking as many of its
pixels as it has.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.errors import UserError

DISPLAY = "standard_4k"
Films = Callable[[Float[Tensor, "frames 3 height width"], Float[Tensor, "frames 3 height width"], float], float]
"""(film, truth, frames per second) → JOD."""


def fov_video_vdp() -> tuple[Films, str]:
    """Return FovVideoVDP and what to call it.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    try:
        import pyfvvdp  # type: ignore[import-not-found]

        metric = pyfvvdp.fvvdp(display_name=DISPLAY, heatmap=None, device=torch.device("cpu"), quiet=True)
    except ImportError as error:
        raise UserError(f"install FovVideoVDP, which is non-commercial: pip install pyfvvdp ({error})") from None
    return _films(metric), f"FovVideoVDP {_version('pyfvvdp')}, {DISPLAY}"


def color_video_vdp() -> tuple[Films, str]:
    """Return ColorVideoVDP and what to call it.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    try:
        import pycvvdp  # type: ignore[import-not-found]

        metric = pycvvdp.cvvdp(display_name=DISPLAY, heatmap=None, device=torch.device("cpu"), quiet=True)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"install ColorVideoVDP and torchvision: pip install cvvdp torchvision ({error})") from None
    return _films(metric), f"ColorVideoVDP {_version('cvvdp')}, {DISPLAY}"


def _films(metric: object) -> Films:
    def jod(film: Tensor, truth: Tensor, fps: float) -> float:
        a, b = (_bytes(x) for x in (film, truth))
        value, _ = metric.predict(a, b, dim_order="FHWC", frames_per_second=fps)  # type: ignore[attr-defined]
        return float(value)

    return jod


def _bytes(film: Tensor) -> np.ndarray:
    return (film.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
