"""Large modules, built without computing first values that a file will replace.

PyTorch's layers draw random weights as they are made: for two billion of them that takes a minute and a half, and all
of their memory, before the file is even opened. Here the draws are only noted while a module is built. Weights that are
then given take the parameters' place; the draws of all others are made afterwards, in their order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "constant_", "fill_", "zero_",
})  # fmt: skip
"""Functions that only set a parameter's first values."""


class Draws:
    """The first values of a module's parameters that are still to be computed."""

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, Callable[[], object]]] = []

    @torch.no_grad()
    def fill(self, module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
        """Give a module its weights: those in `state`, whose tensors it takes over, and the draws of all others.

        Raises:
            RuntimeError: a tensor has another shape, or (`strict`) is missing or left over.
        """
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        module.load_state_dict(state, strict=strict, assign=True)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])
        kept = {id(parameter) for parameter in module.parameters()}
        for parameter, draw in self.noted:
            if id(parameter) in kept:
                draw()
        self.noted = [(parameter, draw) for parameter, draw in self.noted if id(parameter) not in kept]


class _Noting(TorchFunctionMode):
    def __init__(self, draws: Draws):
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, nn.Parameter) and getattr(func, "__name__", "") in _DRAWS:
            self.draws.noted.append((tensor, lambda: func(*args, **kwargs)))
            return tensor
        return func(*args, **kwargs)


@contextmanager
def deferred() -> Iterator[Draws]:
    """Note the draws of what is built inside instead of making them; `Draws.fill` must follow.

    Example:
        >>> with deferred() as draws:
        ...     layer = nn.Linear(2, 2)
        >>> draws.fill(layer, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
        >>> layer.weight.sum().item()
        4.0
    """
    draws = Draws()
    with _Noting(draws):
        yield draws
