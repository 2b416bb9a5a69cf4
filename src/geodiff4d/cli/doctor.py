"""Report what is installed, what is missing and how to install it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.core.weights import weights_folder

CORE = [
    "torch", "numpy", "scipy", "pillow", "safetensors", "einops", "jaxtyping", "numba", "tyro", "rich", "av",
    "diffusers", "accelerate", "pytorch-msssim", "matplotlib",
]  # fmt: skip
EXTRAS = {
    # extra: (distribution, import name, what it is for)
    "gpu": ("gsplat", "gsplat", "splatting on CUDA"),
    "provenance": ("c2pa-python", "c2pa", "signed statements in what is made, and verify"),
    "onnx": ("onnxruntime", "onnxruntime", "your own DAViD and ArcFace files"),
    "judges": ("dlib-bin", "dlib", "independent networks that read expressions and identities (`evaluate pairs`)"),
    "data": ("h5py", "h5py", "RenderMe-360 and, with OpenEXR, SynthHuman"),
}
PACKAGE = Path(__file__).parents[1]
GIB = 1024**3


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d doctor`; its probes take about a second, and a table says what they found."""

    self_test: bool = False
    """Also take a made-up portrait the whole way at debug size: track, synthesize, fit, render, export, in a temporary
    folder. About two minutes; one line a step with its time, and the log of one that fails (exit code 1). Put the
    output into a bug report."""


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    what: str
    state: Literal["ok", "note", "missing", "failed"]
    detail: str
    do: str = ""
    """Advice; empty if there is nothing to do."""


def run(args: Args) -> None:
    findings = examine()
    colours = {"ok": "green", "note": "yellow", "missing": "yellow", "failed": "red"}
    table = Table("what", "state", "found", "what to do", title="geodiff4d doctor", title_justify="left")
    for f in findings:
        table.add_row(escape(f.what), f"[{colours[f.state]}]{f.state}[/]", escape(f.detail), escape(f.do))
    # A pipe has no width of its own; 80 columns would fold every line.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    broken = [f.what for f in findings if f.state == "failed"]
    print(f"needs attention: {', '.join(broken)}" if broken else "ready", flush=True)
    if args.self_test:
        from geodiff4d.cli._self_test import self_test

        if not self_test(say=partial(print, flush=True)):
            raise SystemExit(1)


def examine() -> list[Finding]:
    """Return the findings of all probes; an exception of a probe becomes a finding."""
    probes: list[Callable[[], list[Finding]]] = [
        python, core_packages, torch_device, numba_compiler, video_codec, extras, shipped_files, flame_model,
        mediapipe, machine,
    ]  # fmt: skip
    findings = []
    for probe in probes:
        try:
            findings += probe()
        except Exception as error:  # a broken installation may raise anything
            name = (probe.__doc__ or probe.__name__).split(":")[0].rstrip(".")
            findings.append(
                Finding(name, "failed", f"{type(error).__name__}: {error}", "install again: make clean, make demo")
            )
    return findings


def python() -> list[Finding]:
    """Python."""
    from geodiff4d import __version__

    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, geodiff4d {__version__}"
    return [Finding("Python", "ok" if supported else "failed", detail, "" if supported else "use Python 3.11 or 3.12")]


def core_packages() -> list[Finding]:
    """Packages."""
    missing, found = [], []
    for name in CORE:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return [Finding("packages", "failed", f"missing: {', '.join(missing)}", "pip install -c constraints.txt -e .")]
    return [Finding("packages", "ok", ", ".join(found))]


def torch_device() -> list[Finding]:
    """Device: what torch computes on, and how fast bf16 is there."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        detail = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {torch.cuda.device_count()} device(s)"
        detail += "; the video model computes on it (--device)"
        missing_gsplat = importlib.util.find_spec("gsplat") is None
        do = f"{install_extra('gpu')} to splat on it" if missing_gsplat else ""
        findings = [Finding("device", "ok", detail, do)]
    else:
        flags = cpu_flags()
        named = [label for flag, label in (("amx_bf16", "AMX bf16"), ("avx512_bf16", "AVX-512 bf16")) if flag in flags]
        threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
        detail = f"CPU, {threads}, {' + '.join(named) or 'no bf16 instructions'}"
        findings = [Finding("device", "ok", detail)]
    full, half = (matmul_gflops(dtype, device) for dtype in ("float32", "bfloat16"))
    faster = half > 1.2 * full
    detail = f"1024² matmul: {full:.0f} GFLOP/s in fp32, {half:.0f} in bf16"
    return [
        *findings,
        Finding("bf16", "ok" if faster else "note", detail, "" if faster else "fp32 is the better choice here"),
    ]


def cpu_flags() -> set[str]:
    """Return the processor's feature flags (Linux; empty elsewhere)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def matmul_gflops(dtype_name: str, device: str, size: int = 1024) -> float:
    """Return the best of a few timed products, in GFLOP/s; about 0.1 s in all."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype_name), device=device)
    best = float("inf")
    deadline = time.perf_counter() + 0.3
    for _ in range(6):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > deadline:
            break
    return 2 * size**3 / best / 1e9


def numba_compiler() -> list[Finding]:
    """Numba: the compiler of the CPU rasteriser."""
    import numba

    @numba.njit
    def add(a, b):
        return a + b

    if add(1, 2) != 3:
        raise RuntimeError("1 + 2 is not 3")
    return [Finding("Numba", "ok", f"compiles, {numba.config.NUMBA_NUM_THREADS} threads")]  # type: ignore[attr-defined]


def video_codec() -> list[Finding]:
    """Video: H.264 through PyAV."""
    import av

    if "libx264" not in av.codecs_available:
        return [
            Finding("video", "failed", f"PyAV {av.__version__} without libx264", "install the av wheel: pip install av")
        ]
    return [Finding("video", "ok", f"PyAV {av.__version__} writes H.264")]


def extras() -> list[Finding]:
    """Extras: optional packages."""
    findings = []
    for extra, (distribution, module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            findings.append(Finding(f"extra {extra}", "missing", f"optional: {purpose}", install_extra(extra)))
        else:
            findings.append(
                Finding(f"extra {extra}", "ok", f"{distribution} {importlib.metadata.version(distribution)}: {purpose}")
            )
    return findings


def shipped_files() -> list[Finding]:
    """Shipped files: the embedded head and weights."""
    assets = PACKAGE / "assets"
    again = "clone or install the package again: it ships with them"
    findings = []
    head = assets / "openhead.npz"
    if head.is_file():
        findings.append(Finding("head", "ok", f"openhead.npz, {head.stat().st_size / 1e6:.1f} MB"))
    else:
        findings.append(Finding("head", "failed", f"{head} is not there", again))
    weights = weights_folder("")
    models = sorted({file.parent for file in weights.rglob("*.safetensors")})
    for folder in models:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        where = "" if weights == assets else f", in {weights}"
        findings.append(Finding(f"weights {folder.relative_to(weights)}", "ok", f"{size / 1e6:.1f} MB{where}"))
    if not models:
        findings.append(
            Finding("weights", "missing", "no trained network is shipped", "use --generator warp, or --model DIR")
        )
    return findings


def flame_model() -> list[Finding]:
    """FLAME: the user's own head model."""
    from geodiff4d.heads import flame

    paths = flame.environment()
    if not paths:
        how = f"--head PATH, or set {flame.ENVIRONMENT} to it (docs/FLAME.md)"
        return [Finding("FLAME", "missing", "optional: your own head model", how)]
    findings = []
    for path in paths:
        try:
            findings.append(Finding("FLAME", "ok", "; ".join(flame.describe(path))))
        except UserError as error:
            findings.append(Finding("FLAME", "failed", str(error), f"mend it, or unset {flame.ENVIRONMENT}"))
    return findings


def mediapipe() -> list[Finding]:
    """MediaPipe: a second landmark detector, in its own environment."""
    from geodiff4d.tracking.detect import track_environment

    optional = "optional: a second detector (--detector mediapipe)"
    try:
        return [Finding("MediaPipe", "ok", str(track_environment()))]
    except UserError:
        return [Finding("MediaPipe", "missing", optional, "make track-env")]


def machine() -> list[Finding]:
    """Machine: memory and disk."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    findings = [
        Finding(
            "disk",
            "ok" if free > 2 else "note",
            f"{free:.1f} GiB free here",
            "" if free > 2 else "free 2 GiB for the demo",
        )
    ]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(fields[key].split()[0]) / 1024**2 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return [*findings, Finding("memory", "note", "not known on this system")]
    enough = available > 6
    detail = f"{available:.1f} of {total:.1f} GiB available"
    return [
        *findings,
        Finding("memory", "ok" if enough else "note", detail, "" if enough else "the demo wants 8 GB: close something"),
    ]
