"""The machine that a figure was measured on: hardware, commit, and the rates that it reaches."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention


def hardware() -> str:
    """Return the names of the processor and, if there is one, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}"


def commit() -> str | None:
    """Return the short hash of the checkout that this runs from; None for an installed package."""
    folder = Path(__file__).parents[3]
    if not (folder / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


@dataclass(frozen=True)
class Clock:
    """Times work on a device, which is synchronised at the start and end only."""

    device: torch.device
    repeats: int = 3
    now: Callable[[], float] = time.perf_counter

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Return the seconds of one call: the median over `repeats` of the mean of `times` calls, after one warm-up."""
        work()
        taken = []
        for _ in range(self.repeats):
            self.wait()
            start = self.now()
            for _ in range(times):
                work()
            self.wait()
            taken.append((self.now() - start) / times)
        return statistics.median(taken)


@dataclass(frozen=True)
class Rates:
    """Rates that the machine reaches on large pieces of each kind of work [FLOP/s]."""

    matmul: float
    conv: float
    attention: float


@torch.no_grad()
def measure_rates(
    clock: Clock, dtype: torch.dtype, convs: Sequence[tuple[int, int, int]], attention: tuple[int, ...]
) -> Rates:
    """Return the measured rates of matrix product, 3×3 convolution and attention in one dtype.

    Args:
        convs: (rows, channels, side) of convolutions to try; the best counts.
        attention: batch, heads, queries, keys and channels of a head.
    """
    device, cuda = clock.device, clock.device.type == "cuda"

    def rate(flop: float, work: Callable[[], object]) -> float:
        # Long enough that starting it does not count, at a guess of 100 GFLOP/s (CPU) or 100 TFLOP/s.
        return flop / clock.seconds(work, max(1, round(0.02 * (1e14 if cuda else 1e11) / flop)))

    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for rows, channels, side in convs:
        x = torch.randn(rows, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        best = max(best, rate(18.0 * rows * side**2 * channels**2, lambda x=x, w=w: conv2d(x, w, padding=1)))
    rows, heads, queries, keys, width = attention
    q = torch.randn(rows, heads, queries, width, device=device, dtype=dtype)
    k, v = (torch.randn(rows, heads, keys, width, device=device, dtype=dtype) for _ in range(2))
    attended = rate(4.0 * rows * heads * queries * keys * width, lambda: scaled_dot_product_attention(q, k, v))
    return Rates(rate(2.0 * n**3, lambda: a @ b), best, attended)
