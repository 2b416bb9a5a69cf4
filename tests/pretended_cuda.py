"""A GPU for tests on machines without one: tensors that say they are on `cuda:0` and keep their numbers on the CPU.

What a GPU would refuse is refused: operations on tensors of two devices, `numpy()`, a CPU's generator. Where a program
would wait for the device is counted by the line of the package. Numbers are real, so that loops run to their end. Not
covered: kernels and their precision, memory, several GPUs.
"""

import importlib.machinery
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # optimisers load it when they are first used, and operators cannot be registered in here
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PACKAGE = Path(__file__).parents[1] / "src" / "geodiff4d"
HOST, FIRST = torch.device("cpu"), torch.device("cuda:0")
COPIES = {"aten::copy_", "aten::_to_copy"}
"""What may read from one device and write to another."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""What may have its indices on the host."""
ANSWERS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
"""What tells the host something that it must wait for."""

waits: Counter[str] = Counter()
"""How often the host waited for the device, by module and function of the package; cleared by `pretended_cuda`."""


class OnDevice(Tensor):
    """A tensor that says it is on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=HOST,
        )  # fmt: skip
        made.held = held.detach()
        return made

    # Python is told of a GPU. In C++ it is a CPU's tensor, because a build without CUDA knows no streams and no guards.
    device = property(lambda self: FIRST)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    is_cpu = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        waited()
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Also tensors that are made on the device from nothing, and those of the host, come by here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def waited() -> None:
    """Note that the host waits here."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    if frame is not None:
        waits[f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_code.co_name}"] += 1


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the host what the device would, or refuse."""
    name, device = func.name().split(".")[0], kwargs.get("device")
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, OnDevice)]
    made_here = device is not None and torch.device(device).type == "cuda"
    if ours or made_here:
        _check(name, args, leaves, kwargs)
    if ours and (
        name in ANSWERS
        or (name == "aten::copy_" and not isinstance(args[0], OnDevice))
        or (name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]))
    ):
        waited()
    plain = {k: v for k, v in kwargs.items() if k != "pin_memory"} | ({"device": "cpu"} if made_here else {})
    out = func(*tree_map_only(OnDevice, _held, args), **tree_map_only(OnDevice, _held, plain))
    if name.endswith("_") and not name.endswith("__"):
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], OnDevice):
            with torch._C._DisableTorchDispatch():  # the wrapper's own shape
                func(*args, **kwargs)
        return args[0] if isinstance(out, Tensor) else out
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    return tree_map_only(Tensor, OnDevice, out) if made_here or ours else out


def _held(tensor: OnDevice) -> Tensor:
    return tensor.held


def _check(name: str, args: tuple[Any, ...], leaves: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuse what CUDA refuses."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
    looked_at = tree_leaves((args[0], args[2:])) if name in INDEXING else leaves
    host = [x for x in looked_at if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.ndim > 0]
    if host and name not in COPIES:
        shapes = [tuple(x.shape) for x in host]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but {shapes} are on the CPU")


def _put_back(name: str, module: types.ModuleType | None) -> None:
    sys.modules.pop(name)
    if module is not None:
        sys.modules[name] = module


@contextmanager
def pretended_cuda() -> Iterator[Counter[str]]:
    """Have torch and Accelerate find one GPU, and count in the yielded `waits` where the host waits for it."""
    made, moved, enabled, answers = torch.tensor, Tensor.to, torch.is_autocast_enabled, {
        "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None, "is_initialized": True,
        "set_device": None, "_lazy_init": None, "is_current_stream_capturing": False, "get_device_capability": (9, 0),
        "empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 0, "is_bf16_supported": True,
        "manual_seed_all": None,
    }  # fmt: skip

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return made(*args, **kwargs) if device is None else made(*args, **kwargs).to(device)

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = next((a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device | Tensor)), None)
        device = asked.device if isinstance(asked, Tensor) else self.device if asked is None else torch.device(asked)
        args = tuple(HOST if a is asked else a for a in args if not isinstance(a, Tensor))
        args = (*args, asked.dtype) if isinstance(asked, Tensor) else args
        kwargs |= {"device": HOST} if kwargs.get("device") is not None else {}
        if isinstance(self, OnDevice) and device.type == "cpu":
            waited()
            return moved(self.held, *args, **kwargs | {"copy": True})
        there = device.type == "cuda" and not isinstance(self, OnDevice)
        return OnDevice(moved(self, *args, **kwargs | {"copy": True})) if there else moved(self, *args, **kwargs)

    def grouped(*args: Any, **kwargs: Any) -> Any:
        """Torch groups an optimiser's tensors by what C++ says of their device."""
        found = group(*args, **kwargs)
        return {(FIRST if isinstance(v[0][0][0], OnDevice) else k[0], k[1]): v for k, v in found.items()}

    group = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
    waits.clear()
    AcceleratorState._reset_state(True)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *a, value=value, **k: value))
        # What was built for CUDA would ask a driver, which is not there; what was not knows no accelerator.
        stack.enter_context(patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: None))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(patch.object(Tensor, "to", to))
        for where, what in ((torch.nn.utils.clip_grad, grouped), (torch.optim.Optimizer, staticmethod(grouped))):
            stack.enter_context(patch.object(where, "_group_tensors_by_device_and_dtype", what))
        stack.enter_context(patch.object(torch.amp.autocast_mode, "autocast", _Autocast))
        stack.enter_context(patch.object(torch, "autocast", _Autocast))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device="cuda": enabled("cpu")))
        # Not `patch.dict`, which forgets every module that is first imported meanwhile: numba cannot be loaded twice.
        stack.callback(_put_back, "gsplat", sys.modules.get("gsplat"))
        sys.modules["gsplat"] = _gsplat()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with _Everywhere():
                yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_swap_module_params_on_conversion(swapped)
            AcceleratorState._reset_state(True)


class _Autocast(torch.autocast):
    """The CPU's, whatever device is named: that is where C++ finds the tensors."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu", *args, **kwargs)


class _Splatted(torch.autograd.Function):
    """What gsplat's function does, by our own kernels."""

    @staticmethod
    def forward(ctx: Any, means, quats, scales, opacities, colors, viewmat, K, width, height) -> Any:
        from geodiff4d.render.rasterizer_cpu import rasterize_cpu

        ctx.given = [x.held.clone().requires_grad_() for x in (means, quats, scales, opacities, colors)]
        with torch.enable_grad():
            image, alpha, _ = rasterize_cpu(*ctx.given, viewmat.held, K.held, width, height)  # pyright: ignore[reportCallIssue]
        ctx.made = image, alpha
        return OnDevice(image), OnDevice(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        given = [g.held.contiguous() for g in gradients]
        found = torch.autograd.grad(ctx.made, ctx.given, given, allow_unused=True)
        return *(None if g is None else OnDevice(g) for g in found), None, None, None, None


def _rasterization(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int, near_plane: float = 0.01, far_plane: float = 1e10, radius_clip: float = 0.0,
    eps2d: float = 0.3, sh_degree: int | None = None, packed: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """gsplat 1.5's function, as far as its arguments are used, for one camera."""
    for value in (means, quats, scales, opacities, colors, viewmats, Ks):
        assert value.is_cuda and value.dtype == torch.float32
    assert viewmats.shape == (1, 4, 4) and Ks.shape == (1, 3, 3) and not packed and sh_degree is None
    image, alpha = _Splatted.apply(means, quats, scales, opacities, colors, viewmats[0], Ks[0], width, height)
    return image.permute(1, 2, 0)[None], alpha.permute(1, 2, 0)[None], {}


def _gsplat() -> types.ModuleType:
    module = types.ModuleType("gsplat")
    module.__dict__["rasterization"] = _rasterization
    module.__spec__ = importlib.machinery.ModuleSpec("gsplat", None)
    return module
