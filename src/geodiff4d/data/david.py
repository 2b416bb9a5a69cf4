"""Normals of a person by DAViD (Saleh et al. 2025): the user's own ONNX file, run by onnxruntime (the `onnx` extra).

Input 1×3×512×512, BGR in [0, 1] without further normalisation, the picture padded to a square by repeating its edge and
resized bilinearly. Output 1×3×512×512, camera space, x right, y up, z toward the camera; resized back bicubically and
renormalised. Of a file with several outputs (depth, normal, foreground) the one named so is taken.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from geodiff4d.core.errors import UserError
from geodiff4d.core.onnx_file import open_onnx

SIDE = 512


class DavidNormals:
    """A DAViD network, loaded once.

    Example:
        >>> normals = DavidNormals(Path("david.onnx"))  # doctest: +SKIP
        >>> normals(image).shape == image.shape  # doctest: +SKIP
        True
    """

    def __init__(self, path: Path, device: Literal["auto", "cpu", "cuda"] = "auto"):
        """Load the file; `device` is cpu, cuda, or auto for cuda where onnxruntime has it.

        Raises:
            UserError: onnxruntime or its CUDA build is missing, or the file is not such a network.
        """
        self._session = open_onnx(path, "DAViD's normals", device)
        inputs = self._session.get_inputs()
        self._input = inputs[0].name
        self._output = self._named_output(path)
        shape = inputs[0].shape
        fixed = [n for n in shape[-3:] if isinstance(n, int)]
        if len(inputs) != 1 or len(shape) != 4 or any(n not in (3, SIDE) for n in fixed):
            raise UserError(f"{path} takes {shape}: expected DAViD's 1×3×{SIDE}×{SIDE}")

    def _named_output(self, path: Path) -> str:
        outputs = {o.name: o.shape for o in self._session.get_outputs()}
        named = [name for name in outputs if "normal" in name.lower()]
        three = [name for name, shape in outputs.items() if len(shape) == 4 and shape[1] in (3, "3")]
        picked = named or (three if len(three) == 1 else list(outputs) if len(outputs) == 1 else [])
        if not picked:
            raise UserError(f"{path} has the outputs {', '.join(outputs)}: expected one named normal")
        return picked[0]

    def __call__(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        """Estimate camera-space unit normals."""
        _, height, width = image.shape
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = pad(image[None].float(), (left, side - width - left, top, side - height - top), mode="replicate")
        small = interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=side > SIDE).flip(1)
        (out,) = self._session.run([self._output], {self._input: small.contiguous().numpy()})
        normal = torch.from_numpy(out).float()
        if normal.shape != (1, 3, SIDE, SIDE):
            raise UserError(f"the ONNX file gave {tuple(normal.shape)}: expected normals of 1×3×{SIDE}×{SIDE}")
        big = interpolate(normal, (side, side), mode="bicubic")[0, :, top : top + height, left : left + width]
        return big * big.square().sum(0, keepdim=True).clamp(min=1e-12).rsqrt()
