"""Benchmarks count what is known by hand, and their rows have their keys."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, linear, relu, scaled_dot_product_attention

from geodiff4d.bench.count import count_memory, count_work, training_peaks
from geodiff4d.bench.machine import Clock, Rates
from geodiff4d.bench.splat import SplatBench
from geodiff4d.bench.unet import UnetBench, ladder, roofline_seconds
from geodiff4d.presets import PRESETS, preset


def there(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_operations_are_counted_by_kind():
    def run() -> None:
        conv2d(there(2, 4, 8, 8), there(6, 4, 3, 3), padding=1)
        linear(there(5, 7), there(3, 7), there(3))
        q, k, v = there(2, 3, 10, 4), there(2, 3, 12, 4), there(2, 3, 12, 4)
        assert scaled_dot_product_attention(q, k, v).shape == (2, 3, 10, 4)

    work = count_work(run)
    assert work.conv == 2 * 2 * 8 * 8 * 4 * 6 * 9
    assert work.linear == 2 * 5 * 7 * 3
    assert work.attention == 4 * 2 * 3 * 10 * 12 * 4 and work.largest == (2, 3, 10, 12, 4)
    assert roofline_seconds(work, Rates(work.linear, work.conv, work.attention)) == pytest.approx(3)


def test_memory_is_what_is_alive_at_once():
    x = there(1000)

    def run() -> torch.Tensor:
        a = relu(x)
        b = relu(a)
        del a
        c = b.view(10, 100)  # no memory of its own
        return relu(c)

    assert count_memory(run) == 2 * 4000
    assert count_memory(lambda: x.add_(1)) == 0


def test_gradients_that_are_let_go_take_no_memory():
    """Four layers of 4 kB: all their gradients, or the one that is being made, and activations of 128 bytes."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(4))).to("meta")
    whole, peak = training_peaks(
        lambda: layers(torch.empty(1, 32, device="meta")).sum().backward(), layers.parameters()
    )
    assert 3 * 4096 - 8 * 128 <= whole - peak <= 4 * 4096 and peak >= 4096


@pytest.mark.slow
def test_training_takes_the_memory_that_is_documented():
    """A change that adds four per cent fails."""
    from geodiff4d.bench.training_memory import count_step

    page = Path(__file__).parents[1] / "docs/TRAINING.md"
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if re.match(r"\| stage \d", line)]
    assert rows
    for name, given, *gb, _ in rows:
        stage, processes = ("image" if "stage 1" in name else "video"), int(re.findall(r"(\d+) GPUs", name)[0])
        step = count_step(preset("paper"), stage, int(given.split()[0]))
        counted = [step.peak(on_gpu, shares) for shares in (1, processes) for on_gpu in (True, False)]
        assert counted == pytest.approx([float(x) for x in gb], rel=0.04)


def test_each_rung_adds_one_measure():
    for half, compiled in ((False, False), (True, True)):
        rungs = [m for _, m in ladder(half, compiled)]
        on = [sum(vars(m).values()) for m in rungs]
        assert on == list(range(len(rungs))) and len(rungs) == 5 + half + compiled


def test_clocks_take_the_median():
    ticks = iter([0, 1, 1, 11, 11, 14])
    assert Clock(torch.device("cpu"), 3, lambda: next(ticks)).seconds(lambda: None) == 3


def test_the_unets_row_has_its_keys():
    row = UnetBench(PRESETS["debug"], threads=1, repeats=1).run()
    for key in ("seconds_per_frame", "gflop_per_frame_step", "fraction_of_peak", "peak_memory_gb"):
        assert row[key] > 0, key
    assert row["baseline"]["seconds_per_frame"] > 0
    assert row["rows"][0]["measure"] == "plain" and row["rows"][0]["gain_over_plain"] == 1
    assert all(r["seconds_per_frame"] > 0 for r in row["rows"])
    assert any(r["measure"].startswith("shortcut") for r in row["rows"])


def test_the_rasterisers_row_has_its_keys():
    row = SplatBench(PRESETS["debug"], threads=1, clock=Clock(torch.device("cpu"), 1)).run()
    for key in ("ms_forward", "ms_forward_backward", "ms_forward_64", "ms_forward_backward_64", "ms_loss"):
        assert row[key] > 0, key
    assert sum(r["what"].startswith("baseline") for r in row["rows"]) == 2
