"""Where the networks lie that are used when no option names others."""

import os
from pathlib import Path

VARIABLE = "GEODIFF4D_WEIGHTS"
"""Environment variable: a folder laid out as the package's `assets`, as `geodiff4d train all` leaves it in
OUT/weights."""
MOST_BYTES = 40_000_000
"""Of all networks that ship together."""


def weights_folder(name: str) -> Path:
    """Return the folder of a network that ships (`embedded`, `perception`, `reader`, `person`, `identity`), or of its
    namesake in the folder that `GEODIFF4D_WEIGHTS` names."""
    named = os.environ.get(VARIABLE)
    return (Path(named) if named else Path(__file__).parents[1] / "assets") / name
