"""What the documentation shows holds: API.md's blocks run, links lead somewhere, lines and log entries are short."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from geodiff4d.data.world_clips import write_clip

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOG = sorted((ROOT / "docs/log").glob("*.md"))
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


def prose(page: Path) -> str:
    """Return a page without its code blocks, fenced or indented."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"(?<=\n)\n(?: {4}.*\n)+", "\n", text)


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings can be linked by, as GitHub makes them (of one text, the first only)."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", LOG, ids=lambda p: p.name)
def test_log_entries_have_one_short_paragraph(page: Path):
    for entry in re.split(r"^### ", page.read_text(), flags=re.M)[1:]:
        heading, *blocks = re.sub(r"\n## .*", "", entry, flags=re.S).strip().split("\n\n")
        paragraphs = [b for b in blocks if not b.startswith("|")]
        assert len(paragraphs) == 1 and len(paragraphs[0].splitlines()) <= 5, heading


def test_extras_that_are_named_exist():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    code = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    written = "".join(p.read_text() for p in (*PAGES, *(ROOT / "tools").glob("*.py")))
    named = re.findall(r"install_extra\('(\w+)'\)", code) + re.findall(r"\.\[([\w,]+)\]'", written)
    assert len(named) > 8
    assert {extra for names in named for extra in names.split(",")} <= known


def figures(page: str) -> list[str]:
    """Return the rows of a page's table of the demo, between the marks `figures: begin` and `figures: end`."""
    block = (ROOT / page).read_text().split("<!-- figures: begin -->")[1].split("<!-- figures: end -->")[0]
    return [line for line in block.splitlines() if line.startswith("|")]


def test_the_readmes_figures_are_those_of_the_results():
    short, whole = figures("README.md"), figures("docs/RESULTS.md")
    assert len(short) == 5 and set(short) < set(whole)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_prose_has_short_lines(page: Path):
    lines = [line for line in prose(page).splitlines() if not line.startswith(("|", "!["))]
    assert not [line for line in lines if len(line) > 120]


def test_files_that_are_named_exist():
    """Paths of the repository or below the package; the log may name what was there at its time."""
    package = ROOT / "src/geodiff4d"
    known = {p.name for p in (*ROOT.iterdir(), *package.iterdir()) if p.is_dir()}
    named = {name for page in PAGES if page not in LOG for name in re.findall(r"`([\w./-]+\.\w+)`", page.read_text())}
    paths = {n for n in named if "/" in n and n.split("/")[0] in known and "NAME" not in n}
    assert len(paths) > 50
    assert not [n for n in sorted(paths) if not (ROOT / n).exists() and not (package / n).exists()]
