"""The video model's sampling: seconds per frame, the share of the machine's limits, and the gain of each optimisation.

One step of one window of frames, with both guidance branches, is timed in a plain implementation and then with one
optimisation more at a time. Weights are random: they take as long as trained ones.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from geodiff4d.bench.count import Work, count_memory, count_work, weight_bytes
from geodiff4d.bench.machine import Clock, Rates, measure_rates
from geodiff4d.core.errors import UserError
from geodiff4d.core.precision import bf16_is_native
from geodiff4d.presets import PRESETS, Preset, with_temporal_modules
from geodiff4d.video.memory import parts
from geodiff4d.video.model import Conditions, VideoModel
from geodiff4d.video.sample import ClipInputs, SampleConfig, sample
from geodiff4d.video.vae import PatchCodec, StableCodec
from geodiff4d.video.windows import plan_windows

GUIDED_STEPS = 25
"""Steps with guidance in the paper's setting (Sec. 4.2), for which the optimisations are measured."""
CPU_FLOP = 1e13
"""A window's step of more operations is only counted where there is no GPU."""


@dataclass(frozen=True)
class Measures:
    """Optimisations of a step; without any it is the plain implementation."""

    cached: bool = False
    """The reference network runs once per clip, not in every step and branch."""
    batched_cfg: bool = False
    """Both guidance branches go through the network in one batch."""
    fused: bool = False
    """Fused attention, which does not write its matrix to memory."""
    channels_last: bool = False
    half: bool = False
    """Weights and activations in bf16."""
    compiled: bool = False


def ladder(half: bool, compiled: bool) -> list[tuple[str, Measures]]:
    """Return the plain implementation, then one optimisation more at a time, as far as the machine has them."""
    rungs = [
        ("reference keys and values once", "cached"), ("both branches in one batch", "batched_cfg"),
        ("fused attention", "fused"), ("channels last", "channels_last"),
    ]  # fmt: skip
    rungs += [("bf16", "half")] * half + [("compiled steps", "compiled")] * compiled
    rows = [("plain", Measures())]
    for name, field in rungs:
        rows.append((f"+ {name}", replace(rows[-1][1], **{field: True})))
    return rows


@dataclass(frozen=True)
class Given:
    """A random window of frames and its conditions."""

    z: Tensor
    t: Tensor
    conditions: Conditions
    latents: Tensor
    portrait: tuple[Tensor, Tensor]

    def rows(self, n: int) -> "Given":
        """Return the window repeated for `n` guidance branches."""
        conditions = Conditions(*(x.expand(n, *x.shape[1:]) for x in (self.conditions.planes, self.conditions.base)))
        grown = (x.expand(n, *x.shape[1:]) for x in (self.z, self.latents, *self.portrait))
        z, latents, *portrait = grown
        return Given(z, self.t.expand(n), conditions, latents, (portrait[0], portrait[1]))


def build(p: Preset, device: torch.device) -> VideoModel:
    """Return a preset's video model with random weights; the paper's with Stable Diffusion's autoencoder."""
    with torch.device(device):
        codec = PatchCodec(p.codec.codec) if p.model.pose == "codec" else StableCodec(None)
        return VideoModel(p.model, codec).to(device).eval().requires_grad_(False)


def random_window(model: VideoModel, frames: int) -> Given:
    """Return random inputs of one window, in the model's sizes and on its device."""
    c, side, d = model.codec.channels, model.config.size // model.codec.factor, len(model.config.domains)
    pose = model.config.unet.in_channels - c

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=model.device)

    own = model.config.reference.in_channels - c
    return Given(
        noise(1, d, c, frames, side, side), torch.full((1,), 500, device=model.device),
        Conditions(noise(1, pose, frames, side, side), noise(1, d, c, frames, side, side)),
        noise(1, frames, model.config.expression.latent), (noise(1, c, side, side), noise(1, own, side, side)),
    )  # fmt: skip


@contextmanager
def plain_layout(model: VideoModel, m: Measures) -> Iterator[None]:
    """Disable the optimisations that the model has by default, for rows without them."""
    with ExitStack() as stack:
        if not m.fused:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if not m.channels_last:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    hook = module.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
                    stack.callback(hook.remove)
        yield


def one_step(model: VideoModel, given: Given, m: Measures, kv: list, branches: int = 2) -> None:
    """Denoise one window by one step, with guidance if there are two branches."""
    passes = [branches] if m.batched_cfg else [1] * branches
    for n in passes:
        here = given.rows(n)
        reference = [(k.expand(n, -1, -1), v.expand(n, -1, -1)) for k, v in kv]
        if not m.cached:
            reference = model.reference_kv(*here.portrait)
        model.predict_clean(here.z, here.t, here.conditions, here.latents, reference)


@dataclass(frozen=True)
class UnetBench:
    """Measures one preset's sampling on CUDA if there is any, else on the CPU."""

    preset: Preset = PRESETS["embedded"]
    threads: int = 2
    repeats: int = 3
    clock: Clock | None = None
    """Clock to use instead of wall time, for machines that are not idle."""

    def run(self) -> dict[str, Any]:
        """Return the preset's row; its `rows` have the optimisations and the shortcuts."""
        p = replace(self.preset, model=with_temporal_modules(self.preset.model, self.preset.temporal))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        window = min(p.sample.window, p.frames)
        step, single = (self._work(p, window, branches) for branches in (2, 1))
        counted = {"window": window, "gflop_per_frame_step": step.flop / window / 1e9}
        if device.type == "cpu" and step.flop > CPU_FLOP:
            return counted | {"gflop_per_frame_step_branch": single.flop / window / 1e9, **_counted_memory(p, window)}
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return counted | self._measure(p, device, window, step)
        finally:
            torch.set_num_threads(threads)

    @staticmethod
    def _work(p: Preset, window: int, branches: int) -> Work:
        model = build(p, torch.device("meta"))
        given, m = random_window(model, window), Measures(cached=True, batched_cfg=True)
        kv = model.reference_kv(*given.portrait)
        return count_work(lambda: one_step(model, given, m, kv, branches))

    @torch.no_grad()
    def _measure(self, p: Preset, device: torch.device, window: int, step: Work) -> dict[str, Any]:
        clock = self.clock or Clock(device, self.repeats)
        half, cuda = bf16_is_native(device), device.type == "cuda"
        model = build(p, device)
        given = random_window(model, window)
        times: dict[str, tuple[float, float | None]] = {}
        kv: list[Any] = []
        for name, m in ladder(half, cuda):
            if m.half:
                model.compact()
            if m.compiled:
                model.compile_steps()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with plain_layout(model, m):
                try:
                    kv = model.reference_kv(*given.portrait) if m.cached else []
                    seconds = _timed(clock, m, lambda m=m, kv=kv: one_step(model, given, m, kv))
                except torch.OutOfMemoryError:
                    continue  # plain attention at the paper's size holds a matrix of a hundred gigabytes
            times[name] = (seconds, torch.cuda.max_memory_allocated() / 1e9 if cuda else None)
        if not times:
            raise UserError("one step of one window does not fit into this device's memory: choose a smaller --preset")
        best, m = list(times)[-1], ladder(half, cuda)[-1][1]
        single = _timed(clock, m, lambda: one_step(model, given, m, kv, branches=1))
        rates = self._rates(clock, torch.bfloat16 if half else torch.float32, p, window, step)
        decode = clock.seconds(lambda: model.decode_latents(given.z)) / window
        sampled = clock.seconds(lambda: _sample(model, given, replace(p.sample, autocast=False))) / window
        seconds, first = times[best][0], next(iter(times))
        return {
            "seconds_per_frame": self._whole(p, sampled, 1) + decode,
            "setting": f"the preset's: {p.sample.sampler}, steps {p.sample.steps}, guidance {p.sample.guidance}, "
            f"draws {p.sample.draws}",
            "seconds_per_frame_25_guided": self._whole(p, seconds / window) + decode,
            "fraction_of_peak": step.flop / seconds / rates.matmul,
            "fraction_of_roofline": roofline_seconds(step, rates) / seconds,
            "matmul_gflops": rates.matmul / 1e9,
            "conv_gflops": rates.conv / 1e9,
            "attention_gflops": rates.attention / 1e9,
            "decode_seconds_per_frame": decode,
            "peak_memory_gb": _peak_memory(device),
            "baseline": {
                "what": f"{first}, 25 guided steps",
                "seconds_per_frame": self._whole(p, times[first][0] / window) + decode,
            },
            "rows": self._rows(p, times, rates, step, window, decode, single),
        }

    @staticmethod
    def _rates(clock: Clock, dtype: torch.dtype, p: Preset, window: int, step: Work) -> Rates:
        factor = p.codec.codec.factor if p.model.pose == "codec" else 8
        rows, side = 2 * window * len(p.model.domains), p.model.size // factor
        convs = [(rows, c, max(1, side >> level)) for level, c in enumerate(p.model.unet.widths)]
        return measure_rates(clock, dtype, convs, step.largest)

    @staticmethod
    def _whole(p: Preset, seconds_per_frame_step: float, steps: int = GUIDED_STEPS) -> float:
        """Return the seconds per frame of the preset's clip, including the windows' overlaps."""
        windows = plan_windows([p.frames], p.sample.window, p.sample.overlap)
        share = sum(w.stop - w.start for w in windows) / p.frames
        return steps * seconds_per_frame_step * share

    def _rows(
        self, p: Preset, times: dict, rates: Rates, step: Work, window: int, decode: float, single: float
    ) -> list[dict[str, Any]]:
        plain = before = next(iter(times.values()))[0]
        rows = []
        for name, (seconds, memory) in times.items():
            rows.append({
                "measure": name, "steps": GUIDED_STEPS, "ms_per_frame_step": 1000 * seconds / window,
                "seconds_per_frame": self._whole(p, seconds / window) + decode, "gain": before / seconds,
                "gain_over_plain": plain / seconds, "fraction_of_roofline": roofline_seconds(step, rates) / seconds,
                "peak_memory_gb": memory,
            })  # fmt: skip
            before = seconds
        for name, guided, alone in SHORTCUTS:
            steps = guided + alone
            mean = (guided * before + alone * single) / steps
            rows.append({
                "measure": f"shortcut: {name}", "steps": steps, "ms_per_frame_step": 1000 * mean / window,
                "seconds_per_frame": self._whole(p, mean / window, steps) + decode,
                "gain": GUIDED_STEPS * before / (steps * mean),
                "gain_over_plain": GUIDED_STEPS * plain / (steps * mean),
                "fraction_of_roofline": None, "peak_memory_gb": None,
            })  # fmt: skip
        return rows


SHORTCUTS = (
    ("guidance in the middle 40 % of the steps", 10, 15),
    ("12 steps (UniPC or DPM++)", 12, 0),
    ("12 steps, guidance in 5 of them", 5, 7),
    ("no guidance", 0, GUIDED_STEPS),
)
"""Name, steps with guidance, steps without. They change the image; their loss of quality is not measured here."""


def _timed(clock: Clock, m: Measures, work: Callable[[], object]) -> float:
    """Return the seconds of a step; a compiled one is first called until it is compiled and recorded."""
    for _ in range(2 if m.compiled else 0):
        work()
    return clock.seconds(work)


def roofline_seconds(work: Work, rates: Rates) -> float:
    """Return the seconds of work in which each kind runs at the rate that the machine reaches for it."""
    return work.conv / rates.conv + work.linear / rates.matmul + work.attention / rates.attention


def _sample(model: VideoModel, given: Given, config: SampleConfig) -> Tensor:
    kv = model.reference_kv(*given.portrait)
    return sample(model, ClipInputs(given.conditions, given.latents, kv, given.z[:, :, :, 0]), config)


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory [GB]: the allocator's on CUDA, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _counted_memory(p: Preset, window: int) -> dict[str, float]:
    """Return a clip's counted memory in bf16 with all networks resident, and with those of each stage alone."""
    model = build(p, torch.device("meta")).compact()
    given, m = random_window(model, window), Measures(cached=True, batched_cfg=True)
    c, side, d = model.codec.channels, given.z.shape[-1], len(model.config.domains)
    # Latents, their noise and prediction, conditions, and the finished images.
    clip = p.frames * d * 4 * (6 * c * side**2 + 3 * model.config.size**2) + 4 * given.conditions.planes.numel()
    kv = model.reference_kv(*given.portrait)
    clip += sum(x.numel() * x.element_size() for pair in kv for x in pair)
    both = count_memory(lambda: one_step(model, given, m, kv))
    apart = count_memory(lambda: one_step(model, given, replace(m, batched_cfg=False), kv))
    coded = given.z[0, :, :, 0]
    decode, one = (count_memory(lambda n=n: model.codec.decode(coded[:1].expand(n, -1, -1, -1))) for n in (8, 1))
    weights = {name: weight_bytes(network) for name, network in parts(model).items()}
    stages = (weights["unet"] + apart, weights["codec"] + one)
    return {
        "weights_gb": sum(weights.values()) / 1e9,
        "counted_memory_gb": (sum(weights.values()) + clip + max(both, decode)) / 1e9,
        "counted_memory_offload_gb": (max(*stages, sum(weights.values())) + clip) / 1e9,
    }
