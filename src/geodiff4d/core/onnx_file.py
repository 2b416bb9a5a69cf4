"""ONNX files of the user's, run by onnxruntime (the `onnx` extra)."""

from pathlib import Path
from typing import Any, Literal

from geodiff4d.core.errors import UserError, install_extra


def open_onnx(path: Path, expected: str, device: Literal["auto", "cpu", "cuda"] = "cpu", threads: int = 0) -> Any:
    """Return onnxruntime's session of a file; `auto` is CUDA where onnxruntime has it, `threads` 0 all cores.

    Raises:
        UserError: onnxruntime or its CUDA build is missing, or the file is no network that runs here; `expected` says
            which one is.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"running an ONNX file needs onnxruntime: run `{install_extra('onnx')}`") from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: expected {expected}")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise UserError("this onnxruntime has no CUDA: install onnxruntime-gpu, or pass --device cpu")
    providers = ["CUDAExecutionProvider"] * (has_cuda and device != "cpu") + ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        # onnxruntime raises a dozen types of its own.
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not an ONNX file that runs here ({reason}): expected {expected}") from None
