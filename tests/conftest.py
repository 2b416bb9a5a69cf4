"""Every test run is also a shape check: annotations are executed, not decoration.

Numba kernels are left out: the hook wraps every function, and `njit` cannot compile the wrapper. So is `cli`,
whose modules load torch, and their annotations' names, only when a command runs.
"""

import dataclasses
import os
from functools import partial, wraps
from inspect import isgeneratorfunction
from pathlib import Path
from types import FunctionType
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core and a thread each, before anything counts cores: threads that wait for each other spin, and workers that
    # share cores then take ten times as long.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

WORLD = Path(__file__).parents[1] / "src/geodiff4d/world"
CHECKED = [
    "core",
    "heads",
    "render.meshes",
    "render.warp",
    "render.gaussians",
    "render.rasterizer_oracle",
    "render.rasterizer_cuda",
    "render.harmonics",
    "render.photometric",
    "render.merge",
    "render.relief",
    "render.binding_kernels",
    "render.crops",
    "render.viewpoints",
    "data",
    "tracking",
    "video",
    "avatar",
    "presets",
    "pipeline",
    "evaluate",
    "viewer",
    "bench",
    "provenance",
    "studio",
]
KERNELS = {"deferred", "lattice"}
"""Of the world."""
CHECKED += [f"world.{path.stem}" for path in WORLD.glob("*.py") if path.stem not in KERNELS | {"__init__"}]


# The numeric tower lets an int stand in for a float, as PEP 484 says it may.
beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
SHAPES = jaxtyping.jaxtyped("context")
"""Where annotations of one call are compared: a name stands for one size in all of them."""


def checked(fn: Any = None, *, typechecker: Any = None):
    """Check what a function or a dataclass is called with and what it returns, as cheaply as its annotations allow.

    Checking is woven into a function, which takes milliseconds, when it is first called: a worker calls half of them.
    Functions inside functions, which are defined at every call, are left alone.
    """
    if fn is None:
        return partial(checked, typechecker=typechecker)
    if isinstance(fn, FunctionType):
        return fn if "<locals>" in fn.__qualname__ else woven_when_called(fn, typechecker)
    if isinstance(fn, type):
        own = vars(fn).get("__init__")
        if dataclasses.is_dataclass(fn) and isinstance(own, FunctionType) and not hasattr(own, "__wrapped__"):
            fn.__init__ = woven_when_called(own, typechecker)
        return fn
    return woven(fn, typechecker=typechecker)


def woven_when_called(fn: FunctionType, typechecker: Any):
    """Return a function that checks its calls by beartype alone, arrays against each other too where there are any.

    Jaxtyping would check arguments twice and bind them besides. It stays where it is needed: for generators, sizes in
    braces, and names in quotes, which may exist for type checkers only and are forgiven.
    """
    check: Any = None
    annotations = list(fn.__annotations__.values())
    compares = "jaxtyping" in repr(annotations)
    whole = any(isinstance(a, str) for a in annotations) or "{" in repr(annotations) or isgeneratorfunction(fn)

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal check
        if check is None:
            check = woven(fn, typechecker=typechecker) if whole else beartyped(fn)
        if not compares or whole:
            return check(*args, **kwargs)
        with SHAPES:
            return check(*args, **kwargs)

    return call


woven = jaxtyping.jaxtyped
jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook(
    [f"geodiff4d.{name}" for name in CHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


LONGEST = (
    "avatar", "protocols", "training", "pretended_cuda", "tracking", "training_data", "batches", "decoder", "samples",
    "appearance", "docs", "bench", "image_training", "unet", "world", "perception", "reader", "studio", "pipeline",
)  # fmt: skip
"""Files that take longest: they begin first, so that no worker is left with one of them at the end. The first two need
different kernels, which a fresh clone compiles."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def no_credentials_of_the_users(tmp_path_factory):
    """Commands that sign make their local certificate here, not in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def subject():
    """One person of the open world for every test that only looks: painting someone takes half a second."""
    from geodiff4d.world.subject import SyntheticSubject

    return SyntheticSubject(3, "val")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A portrait, another's performance of three frames and the truth, at 48 px."""
    from geodiff4d.evaluate.pairs import make_pair
    from geodiff4d.heads import load_head

    return make_pair(tmp_path_factory.mktemp("pair"), load_head(), 0, frames=3, size=48, crop=32)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of an untrained model of the debug preset."""
    import torch

    from geodiff4d.presets import preset
    from geodiff4d.video.model import VideoModel
    from geodiff4d.video.vae import PatchCodec

    with torch.random.fork_rng():
        torch.manual_seed(0)
        p = preset("debug")
        codec = PatchCodec(p.codec.codec)
        codec.fit_basis(torch.rand(4, 3, p.model.size, p.model.size))
        folder = tmp_path_factory.mktemp("model") / "debug"
        VideoModel(p.model, codec).save(folder)
    return folder
