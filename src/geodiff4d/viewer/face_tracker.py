"""MediaPipe's face landmarker inside a page, out of files that the user has: neither ships with this package.

Its four parts (a module, a loader, a WebAssembly binary, a model) are put into the page compressed, and the page's
policy lets them be fetched from itself alone. Newer versions of MediaPipe report their use to their maker; that is
refused as any other request is.
"""

import base64
import zipfile
import zlib
from pathlib import Path

from geodiff4d.core.errors import UserError

PACKAGE = {
    "module": "vision_bundle.mjs", "loader": "wasm/vision_wasm_internal.js", "binary": "wasm/vision_wasm_internal.wasm",
}  # fmt: skip
"""Parts out of the npm package `@mediapipe/tasks-vision`, by their places in it."""
MODELS = {"face_landmarks_detector.tflite", "face_blendshapes.tflite"}
"""What the archive face_landmarker.task must have."""
MAX_BYTES = 64_000_000


def packed_tracker(task: Path, package: Path) -> dict[str, str]:
    """Return the parts of a face tracker for a page, by name: deflated, in base64; about 8 MB together.

    Args:
        task: MediaPipe's face_landmarker.task.
        package: folder of the npm package @mediapipe/tasks-vision.

    Raises:
        UserError: a file is missing, too large, or is not what it should be.
    """
    try:
        with zipfile.ZipFile(task) as archive:
            missing = sorted(MODELS - set(archive.namelist()))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{task} cannot be read ({error}): expected MediaPipe's face_landmarker.task") from None
    if missing:
        raise UserError(f"{task} has no {missing[0]}: expected MediaPipe's face_landmarker.task, with blendshapes")
    files = {"task": task} | {part: package / name for part, name in PACKAGE.items()}
    return {part: _packed(path) for part, path in files.items()}


def _packed(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES / 1e6:.0f} MB: is it MediaPipe's?")
        return base64.b64encode(zlib.compress(path.read_bytes(), 9)).decode()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected the folder of @mediapipe/tasks-vision, "
            "from `npm install @mediapipe/tasks-vision`"
        ) from None
