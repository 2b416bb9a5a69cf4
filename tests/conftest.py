"""Every test run is also a shape check: annotations are executed, not decoration.

Numba kernels are left out: the hook wraps every function, and `njit` cannot compile the wrapper.
"""

from jaxtyping import install_import_hook

CHECKED = [
    "core",
    "heads",
    "render.meshes",
    "render.warp",
    "render.gaussians",
    "render._torch",
    "render._gsplat",
    "data",
    "tracking",
    "video",
    "avatar",
    "evaluate",
]
install_import_hook(
    [f"geodiff4d.{name}" for name in CHECKED],
    # The numeric tower lets an int stand in for a float, as PEP 484 says it may.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
