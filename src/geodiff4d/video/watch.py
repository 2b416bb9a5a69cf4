"""How a training run looks while it runs: validation pictures, curves, flicker, and TensorBoard where it is installed.

All of it is drawn from the averaged weights and from draws of its own, so that looking changes nothing.
"""

import importlib.util
from typing import Any

from geodiff4d.core.images import write_image
from geodiff4d.core.rundir import RunFolder
from geodiff4d.video.batches import Batches
from geodiff4d.video.curves import write_curves
from geodiff4d.video.flicker import measure_flicker
from geodiff4d.video.model import VideoModel
from geodiff4d.video.preview import sheet
from geodiff4d.video.sample import SampleConfig


class Watch:
    """Writes a run's log, curves and pictures, and passes them on to TensorBoard if it is there."""

    def __init__(self, folder: RunFolder, preview: SampleConfig, pictures: int):
        """`pictures` is how many rows a validation sheet has; 0 draws none."""
        self.folder, self.preview, self.pictures = folder, preview, pictures
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder.path / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        """Note one record of numbers with its `step`."""
        self.folder.log(record)
        if self.board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, record["step"])
            self.board.flush()

    def look(self, model: VideoModel, val: Batches, step: int) -> dict[str, float]:
        """Draw the validation sheet and the curves; return what was measured on the way (flicker, of a video model)."""
        found: dict[str, float] = {}
        if model.temporal:
            found = measure_flicker(model, val, self.preview)
        if self.pictures:
            picture = sheet(model, val, self.preview, self.pictures)
            write_image(self.folder.path / "pictures" / f"step_{step + 1:06d}.png", picture)
            if self.board is not None:
                self.board.add_image("validation", picture.clamp(0, 1), step)
        write_curves(self.folder.path / "log.jsonl", self.folder.path / "curves.png")
        return found
