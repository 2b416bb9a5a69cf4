"""--device: where a command computes."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]


def chosen_device(name: DeviceName, splats: bool = False) -> "torch.device":
    """Return the device: `auto` takes CUDA where it is available and, for Gaussian splats, gsplat is installed.

    Raises:
        UserError: `cuda` was asked for, and there is none or no gsplat.
    """
    from importlib.util import find_spec

    import torch

    from geodiff4d.core.errors import UserError, install_extra

    found, gsplat = torch.cuda.is_available(), not splats or find_spec("gsplat") is not None
    if name == "cuda" and not found:
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu, or see `geodiff4d doctor`")
    if name == "cuda" and not gsplat:
        raise UserError(f"--device cuda: splatting on a GPU needs gsplat; run `{install_extra('gpu')}`")
    return torch.device("cuda" if name != "cpu" and found and gsplat else "cpu")
