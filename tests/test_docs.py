"""What the documentation shows holds: docs/API.md's blocks run as they stand, and links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from geodiff4d.data.world_clips import write_clip

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATE, GAUSSIANS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/API.md").read_text(), re.M | re.S)


def test_generate(subject, tmp_path, monkeypatch):
    for name in ("me", "talking"):
        write_clip(tmp_path / "runs" / name, subject, "speech", frames=2, views=1, size=256)
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(GENERATE, made)
    # The first frame is the portrait itself; sampled with `SampleConfig()` it would be 0.06 away.
    off = (made["made"].rgb[0] - made["portrait"].on_grey).abs().mean()
    assert off < 0.03


def test_gaussians():
    torch.manual_seed(0)
    made = {}
    exec(GAUSSIANS, made)
    assert made["out"].image.shape == (3, 6, 64, 64) and made["out"].dropped == 0
    assert made["coefficients"].grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s#]+)", re.sub(r"`[^`\n]*`", "", text)):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_extras_that_are_named_exist():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    code = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    written = "".join(p.read_text() for p in (*PAGES, *(ROOT / "tools").glob("*.py")))
    named = re.findall(r"install_extra\('(\w+)'\)", code) + re.findall(r"\.\[([\w,]+)\]'", written)
    assert len(named) > 8
    assert {extra for names in named for extra in names.split(",")} <= known
