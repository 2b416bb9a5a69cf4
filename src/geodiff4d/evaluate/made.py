"""What of an item is made already, and of what: a note beside it, by which an interrupted run goes on."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from geodiff4d.core.files import read_object, write_json

NOTE = "made.json"


class Made:
    """The methods whose frames of an item are there."""

    def __init__(self, folder: Path, of: str):
        """Read an item's note; what was made of something else, by another fingerprint, is removed."""
        self.folder, self.of, self.methods = Path(folder), of, []
        note = self.folder / NOTE
        if note.exists() and (known := read_object(note, "of", "methods"))["of"] == of:
            self.methods: list[str] = known["methods"]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self, methods: Sequence[str]) -> list[str]:
        """Return those of some methods that are still to be made."""
        return [m for m in methods if m not in self.methods]

    def add(self, method: str | None = None) -> None:
        """Note that a method is made, or that there is nothing to make."""
        self.methods += [] if method is None else [method]
        write_json(self.folder / NOTE, {"of": self.of, "methods": self.methods})
