"""Operations and memory, counted and not measured: the code runs on the meta device, which computes shapes alone."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

AttentionShape = tuple[int, int, int, int, int]
"""Batch, heads, queries, keys, channels of a head."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a piece of work by kind; a multiplication with its addition is two."""

    conv: float
    linear: float
    attention: float
    largest: AttentionShape
    """The shape of attention that most of its operations have."""

    @property
    def flop(self) -> float:
        return self.conv + self.linear + self.attention


class _Attention(TorchFunctionMode):
    """Counts attention by its shapes, and stands in for it: whichever kernel does it, the operations are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[AttentionShape] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        b, h, n, d = q.shape
        self.shapes[b, h, n, k.shape[-2], d] += 2 * b * h * n * k.shape[-2] * (d + v.shape[-1])
        return q.new_empty(b, h, n, v.shape[-1])


def count_work(run: Callable[[], object]) -> Work:
    """Return the operations of one call, whose tensors must be on the meta device."""
    attention, counter = _Attention(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, attention:
        run()
    kinds = {str(k): float(v) for k, v in counter.get_flop_counts()["Global"].items()}
    conv = sum(v for k, v in kinds.items() if "convolution" in k)
    largest = max(attention.shapes, key=lambda shape: attention.shapes[shape], default=(1, 1, 1, 1, 1))
    return Work(conv, sum(kinds.values()) - conv, float(sum(attention.shapes.values())), largest)


class _Memory(TorchDispatchMode):
    """Adds up the storages that are alive; in `whole` those too that were `let_go` and would have been kept."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.let_go = self.whole = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.whole = max(self.whole, self.live + self.let_go)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def count_memory(run: Callable[[], object]) -> int:
    """Return the peak memory of one call beside its inputs [bytes]; all tensors must be on the meta device.

    Workspaces of kernels and the allocator's waste are not counted.
    """
    memory = _Memory()
    with torch.no_grad(), _Attention(), memory:
        run()
    return memory.peak


def training_peaks(run: Callable[[], object], parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Return the peak memory of a forward and backward pass beside its inputs [bytes]: with all gradients kept, and
    with each let go as soon as it is there.
    """
    memory = _Memory()

    def let_go(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        memory.let_go += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(let_go)
    with memory:
        run()
    return memory.whole, memory.peak


def weight_bytes(network: torch.nn.Module) -> int:
    """Return the size of a network's parameters and buffers [bytes]."""
    return sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))
