"""A matting network of the user's: an ONNX file that takes a picture and returns the person's alpha.

Such files agree in little but that (MODNet, U²-Net, IS-Net, BiRefNet …): each has its own size, and takes colours from
0 to 1, from −1 to 1, or less ImageNet's mean over its deviation. Which one it is, the first picture tells: the right
one leaves the tracked head in and most of what is beside it out.
"""

from pathlib import Path
from threading import Lock

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from geodiff4d.core.errors import UserError
from geodiff4d.core.onnx_file import open_onnx

SIDE = 512
"""Of the picture, where the file takes any [px]."""
SCALES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "0 to 1": ((0.0,) * 3, (1.0,) * 3),
    "-1 to 1": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of each channel that files expect."""
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
EXPECTED = "a matting network: one image 1×3×H×W in, its alpha out"


class MattingFile:
    """A matting network, loaded once.

    Example:
        >>> matting = MattingFile(Path("modnet.onnx"))  # doctest: +SKIP
        >>> matting(crop, head).shape  # doctest: +SKIP
        torch.Size([1, 512, 512])
    """

    def __init__(self, path: Path):
        """Load the file.

        Raises:
            UserError: onnxruntime is missing, or the file is not such a network.
        """
        self.path, self._session = path, open_onnx(path, EXPECTED, threads=torch.get_num_threads())
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            taken = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise UserError(f"{path} takes {taken}: expected {EXPECTED}")
        if inputs[0].type not in TYPES:
            raise UserError(f"{path} takes {inputs[0].type}: expected {' or '.join(TYPES)}")
        self._input, self._type = inputs[0].name, TYPES[inputs[0].type]
        self._size = tuple(n if isinstance(n, int) else SIDE for n in shape[2:])
        self._scale: str | None = None
        self._deciding = Lock()  # Frames are shared out to threads.

    def __call__(
        self, crop: Float[Tensor, "3 side side"], head: Bool[Tensor, "side side"]
    ) -> Float[Tensor, "1 side side"]:
        """Return the alpha of a canonical crop, 0 to 1; `head` is the silhouette of the tracked head.

        Raises:
            UserError: the file's output is no alpha.
        """
        with self._deciding:
            if self._scale is None:
                each = {name: self._alpha(crop, name) for name in SCALES}
                apart = {name: float(a[0][head].mean() - a[0][~head].mean()) for name, a in each.items()}
                self._scale = max(apart, key=apart.__getitem__)
        return self._alpha(crop, self._scale)

    def _alpha(self, crop: Tensor, scale: str) -> Tensor:
        mean, deviation = (torch.tensor(v)[:, None, None] for v in SCALES[scale])
        smaller = self._size[0] < crop.shape[-1]
        small = interpolate(crop[None], self._size, mode="bilinear", antialias=smaller)
        given = ((small[0] - mean) / deviation)[None].numpy().astype(self._type)
        out = np.asarray(self._session.run(None, {self._input: given})[0], dtype=np.float32).squeeze()
        if out.ndim != 2 or not np.isfinite(out).all():
            raise UserError(f"{self.path} gave {out.shape}: expected {EXPECTED}")
        alpha = torch.from_numpy(out)[None, None]
        if alpha.min() < -0.05 or alpha.max() > 1.05:
            alpha = alpha.sigmoid()  # Logits.
        return interpolate(alpha, crop.shape[1:], mode="bilinear")[0].clamp(0, 1)
