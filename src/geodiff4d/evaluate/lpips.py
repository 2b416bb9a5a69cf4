"""LPIPS (Zhang et al. 2018) on weights of the user's: AlexNet or VGG16, and LPIPS' own linear layers.

Nothing is downloaded. The files are torchvision's state dict of the network and LPIPS' weights (`alex.pth`, `vgg.pth`
of its repository), or one state dict that holds both; .pth is read with `weights_only`, .safetensors as it is.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

from geodiff4d.core.errors import UserError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
ALEX = ((0, 4, 2), "pool", (3, 1, 2), "pool", (6, 1, 1), (8, 1, 1), (10, 1, 1))
"""torchvision's `features`: (index, stride, padding) of convolutions, each followed by a ReLU; pools between."""
ALEX_TAPS = (0, 3, 6, 8, 10)
VGG_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_TAPS = (2, 7, 14, 21, 28)
HELP = "give AlexNet's or VGG16's state dict and LPIPS' linear weights: --lpips NETWORK.pth LINEAR.pth"


class Lpips:
    """Perceptual distance of two pictures in [0, 1]; 0 is the same.

    Example:
        >>> distance = Lpips([Path("alexnet.pth"), Path("alex.pth")])  # doctest: +SKIP
        >>> distance(a, b)  # doctest: +SKIP
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the weights.

        Raises:
            UserError: a file is missing or damaged, or weights are missing.
        """
        state: dict[str, Tensor] = {}
        for file in files:
            state |= _read(Path(file))
        self.convs = _convolutions(state)
        alex = self.convs.get(0, (torch.zeros(0, 0, 0, 0), None))[0].shape[-1] == 11
        self.name = "AlexNet" if alex else "VGG16"
        self.taps = ALEX_TAPS if alex else VGG_TAPS
        needed = [layer[0] for layer in ALEX if layer != "pool"] if alex else [i for b in VGG_LAYERS for i in b]
        self.linear = _linear(state)
        missing = [f"features.{i}.weight" for i in needed if i not in self.convs]
        missing += [f"lin{k}.model.1.weight" for k in range(5) if k not in self.linear]
        if missing:
            raise UserError(f"--lpips: {', '.join(map(str, files))} has no {missing[0]}: {HELP}")

    @torch.no_grad()
    def __call__(
        self, a: Float[Tensor, "n 3 height width"], b: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, " n"]:
        total = a.new_zeros(len(a))
        for k, (x, y) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
            total += conv2d((unit[0] - unit[1]).square(), self.linear[k]).mean((1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        x = images * 2 - 1
        x = (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        out: dict[int, Tensor] = {}
        if self.name == "AlexNet":
            for layer in ALEX:
                if isinstance(layer, str):
                    x = max_pool2d(x, 3, 2)
                else:
                    index, stride, padding = layer
                    x = out[index] = relu(conv2d(x, *self.convs[index], stride=stride, padding=padding))
        else:
            for number, block in enumerate(VGG_LAYERS):
                x = max_pool2d(x, 2) if number else x
                for index in block:
                    x = out[index] = relu(conv2d(x, *self.convs[index], padding=1))
        return [out[i] for i in self.taps]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"--lpips {path} does not exist: {HELP}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"--lpips {path} cannot be read ({' '.join(str(error).split())[:80]}): {HELP}") from None
    except Exception as error:  # the restricted unpickler's own type is private to torch
        raise UserError(f"--lpips {path} holds more than tensors ({type(error).__name__}): {HELP}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--lpips {path} is not a state dict of tensors: {HELP}")
    return {k: v.float() for k, v in state.items()}


def _convolutions(state: dict[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Find the network's convolutions: `features.N`, or `net.sliceK.N` as the lpips package saves them."""
    out = {}
    for key, weight in state.items():
        words = key.split(".")
        if words[-1] == "weight" and weight.ndim == 4 and words[-2].isdigit() and not words[0].startswith("lin"):
            bias = state.get(".".join([*words[:-1], "bias"]))
            if bias is not None:
                out[int(words[-2])] = (weight, bias)
    return out


def _linear(state: dict[str, Tensor]) -> dict[int, Tensor]:
    """Find the 1×1 weights: `linK.model.1.weight`, or `lins.K.model.1.weight`."""
    out = {}
    for key, weight in state.items():
        words = key.split(".")
        if words[-3:] == ["model", "1", "weight"] and words[0].startswith("lin"):
            out[int(words[1] if words[0] == "lins" else words[0][3:])] = weight
    return out
