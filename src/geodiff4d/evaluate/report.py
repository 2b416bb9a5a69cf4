"""A report as one HTML file that needs nothing else: pictures, videos and plots are inside it.

It opens from a disk, a mail or a phone, in light and dark, and asks no server for anything: its own content security
policy forbids it. A report is data (`Report`, `Section` and five kinds of block); `build_report` writes it whole.
"""

import base64
import html
import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import geodiff4d
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file
from geodiff4d.core.images import read_image, to_uint8
from geodiff4d.evaluate.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(geodiff4d.__file__).parent / "assets" / "report.css"
MAX_SIDE = 1024
"""Larger pictures are scaled down: a report is read on phones, and the files lie beside it."""
JPEG_QUALITY = 93
ACCENT = "#b04a26"
"""In plots it becomes the page's accent of the reader's colour scheme, as black becomes its ink."""
VIDEO_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, from memory or a file, with a few words below it."""

    image: Float[Tensor, "channels height width"] | Path
    """1 or 3 channels in [0, 1]; a Path is read."""
    label: str = ""


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows of pictures below column headers; it scrolls sideways where it does not fit."""

    rows: Sequence[tuple[str, Sequence[Picture | Tensor | Path | None]]]
    """(label, cells); None leaves a cell empty, short rows end early."""
    columns: Sequence[str] = ()
    caption: str = ""
    cell_px: int = 112
    """A cell is at least this wide."""
    max_cell_px: int = 240
    """And at most this: small pictures should not be blown up."""


Cell = str | int | float | Estimate | None
"""None and NaN show as a dash, an Estimate as its mean above its interval."""


@dataclass(frozen=True, eq=False)
class Table:
    """Figures by row; the best of a column stands out."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int | Sequence[int] = 2
    """Behind the point, everywhere or by column."""
    better: Sequence[Literal["high", "low", ""]] = ()
    """By column: which end is better; empty means the column has no winner."""
    aside: Sequence[str] = ()
    """First cells of rows that do not compete, such as ceilings: shown muted."""


@dataclass(frozen=True)
class Video:
    """A clip that plays in a loop, without sound."""

    path: Path
    caption: str = ""
    width_px: int = 512
    """At most this wide."""


@dataclass(frozen=True, eq=False)
class Plot:
    """A matplotlib figure as inline SVG; black and `ACCENT` in it follow the reader's colour scheme."""

    figure: "Figure"
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """A remark that should not be overlooked."""

    text: str
    kind: Literal["info", "warn"] = "info"


Block = Grid | Table | Video | Plot | Note


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, paragraphs (parted by blank lines, `code` in backticks) and what they speak of."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True, eq=False)
class Report:
    """A whole report."""

    title: str
    lead: str
    """The first paragraph: what this is, in two or three sentences."""
    sections: Sequence[Section]
    footer: str = ""
    """How it was made: the command, the machine, the seconds."""


def build_report(path: Path, report: Report) -> None:
    """Write the report as one self-contained HTML file; it appears whole or not at all.

    Raises:
        UserError: a picture or video it should contain is missing or cannot be read.
    """
    path = Path(path)
    sections = "\n".join(_section(section) for section in report.sections)
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escape(report.title)}</title>
<style>{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<h1>{_escape(report.title)}</h1>
{_paragraphs(report.lead, "lead")}
</header>
{sections}
<footer>{_paragraphs(report.footer)}<p>geodiff4d {_escape(geodiff4d.__version__)}</p></footer>
</main>
</body>
</html>
"""
    with fresh_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def interval_plot(estimates: dict[str, Estimate], axis: str, accent: Sequence[str] = ()) -> "Figure":
    """Draw a dot with its 95 % interval per name, top to bottom; names in `accent` are coloured.

    Dots and not bars: nothing about decibels or degrees starts at zero.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 0.55 + 0.36 * len(estimates)), layout="constrained")
    ax = figure.subplots()
    for i, (name, e) in enumerate(estimates.items()):
        colour = ACCENT if name in accent else "#000000"
        ax.plot([e.low, e.high], [i, i], color=colour, linewidth=2.2, solid_capstyle="round", alpha=0.45)
        ax.plot([e.mean], [i], "o", color=colour, markersize=6.5)
        text = _signed(e.mean, 2) if math.isfinite(e.mean) else "–"
        ax.text(1.02, i, text, transform=ax.get_yaxis_transform(), va="center", fontsize=11.5, color=colour)
    ax.set_yticks(range(len(estimates)), list(estimates), fontsize=11.5)
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.set_xlabel(axis, fontsize=11)
    ax.tick_params(length=0, labelsize=11)
    ax.grid(axis="x", color="#000000", alpha=0.12, linewidth=0.8)
    ax.spines[["left", "right", "top", "bottom"]].set_visible(False)
    ax.margins(x=0.05)
    return figure


def _section(section: Section) -> str:
    blocks = "\n".join(_RENDER[type(block)](block) for block in section.blocks)
    return f"<section>\n<h2>{_escape(section.title)}</h2>\n{_paragraphs(section.text)}\n{blocks}\n</section>"


def _grid(grid: Grid) -> str:
    count = max([len(grid.columns), *(len(cells) for _, cells in grid.rows)], default=0)
    if not count:
        return ""
    labelled = any(label for label, _ in grid.rows)
    parts = []
    if grid.columns:
        parts += ['<div class="corner"></div>'] * labelled
        parts += [f'<div class="column">{_escape(name)}</div>' for name in _filled(grid.columns, count, "")]
    for label, cells in grid.rows:
        parts += [f'<div class="row"><span>{_escape(label)}</span></div>'] * labelled
        where = " · ".join(filter(None, [label, "{}"]))
        for column, cell in zip(_filled(grid.columns, count, ""), _filled(cells, count, None), strict=True):
            parts.append(f'<div class="cell">{_picture(cell, where.format(column).strip(" ·"))}</div>')
    style = f"--n:{count};--cell:{grid.cell_px}px;--most:{grid.max_cell_px}px"
    strip = count > 1 and len(grid.rows) == 1 and not grid.columns
    kind = "grid labelled" if labelled else "grid strip" if strip else "grid"
    return _figure(
        f'<div class="scroll"><div class="{kind}" style="{style}">{"".join(parts)}</div></div>', grid.caption, "wide"
    )


def _picture(cell: Picture | Tensor | Path | None, where: str) -> str:
    if cell is None:
        return ""
    picture = cell if isinstance(cell, Picture) else Picture(cell)
    image = picture.image if isinstance(picture.image, Tensor) else read_image(picture.image)
    data, height, width = _jpeg(image)
    label = f"<small>{_escape(picture.label)}</small>" if picture.label else ""
    size = f'width="{width}" height="{height}"'
    alt = _escape(where or picture.label)
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{alt}" loading="lazy">{label}'


def _jpeg(image: Float[Tensor, "channels height width"]) -> tuple[str, int, int]:
    """Return (base64 JPEG without chroma subsampling, height, width)."""
    scale = MAX_SIDE / max(image.shape[1:])
    picture = Image.fromarray(to_uint8(image.detach().to(torch.float32)))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode(), picture.height, picture.width


def _table(table: Table) -> str:
    better = _filled(table.better, len(table.header), "")
    digits = [table.digits] * len(table.header) if isinstance(table.digits, int) else list(table.digits)
    best = [_best(table, column, end) for column, end in enumerate(better)]
    arrow = {
        "high": '&nbsp;<span class="arrow" title="higher is better">↑</span>',
        "low": '&nbsp;<span class="arrow" title="lower is better">↓</span>',
    }
    head = "".join(
        f'<th scope="col">{_escape(name)}{arrow.get(end, "")}</th>'
        for name, end in zip(table.header, better, strict=True)
    )
    body = []
    for row in table.rows:
        cells = [f'<th scope="row">{_cell(row[0], digits[0])}</th>'] if row else []
        for column, cell in enumerate(row[1:], 1):
            wins = row[0] not in table.aside and best[column] is not None and _number(cell) == best[column]
            cells.append(f"<td{' class=best' if wins else ''}>{_cell(cell, digits[column])}</td>")
        kind = ' class="aside"' if row and row[0] in table.aside else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    markup = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return _figure(f'<div class="scroll">{markup}</div>', table.caption, "wide")


def _best(table: Table, column: int, end: str) -> float | None:
    numbers = [_number(row[column]) for row in table.rows if row[0] not in table.aside and column < len(row)]
    known = [n for n in numbers if n is not None]
    if not end or len(known) < 2:
        return None
    return max(known) if end == "high" else min(known)


def _number(cell: Cell) -> float | None:
    value = cell.mean if isinstance(cell, Estimate) else cell
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _cell(cell: Cell, digits: int) -> str:
    if isinstance(cell, str):
        return _inline(cell)
    number = _number(cell)
    if number is None:
        return '<span class="none">–</span>'
    if isinstance(cell, int):
        return f"{cell:,}".replace(",", "\u2009")
    text = _signed(number, digits)
    if isinstance(cell, Estimate) and math.isfinite(cell.low):
        text += f"<small>{_signed(cell.low, digits)} to {_signed(cell.high, digits)}</small>"
    return text


def _signed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "\u2212")


def _video(video: Video) -> str:
    path = Path(video.path)
    kind = VIDEO_TYPES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} cannot be embedded: expected a video ending in {', '.join(VIDEO_TYPES)}")
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be embedded ({error.strerror}): expected a video file") from None
    tag = (
        f'<video controls autoplay loop muted playsinline style="max-width:{video.width_px}px" '
        f'src="data:{kind};base64,{data}">{_escape(path.name)} lies beside this file.</video>'
    )
    return _figure(tag, video.caption)


def _plot(plot: Plot) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "geodiff4d"}):
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML neither namespaces nor the file's own metadata are needed, and comments repeat every label.
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(?::xlink)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href").replace("#000000", "currentColor").replace(ACCENT, "var(--accent)")
    width = re.search(r'width="([\d.]+)pt"', svg)
    limit = f' style="max-width:{float(width[1]) * 4 / 3:.0f}px"' if width else ""
    # Two plots of a report may name their parts alike.
    unique = f"p{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda hit: hit[1] + unique, svg)
    return _figure(
        f'<div class="plot" role="img" aria-label="{_escape(plot.caption)}"{limit}>{svg}</div>', plot.caption
    )


def _note(note: Note) -> str:
    return f'<aside class="note {note.kind}">{_paragraphs(note.text)}</aside>'


_RENDER: dict[type, Callable] = {Grid: _grid, Table: _table, Video: _video, Plot: _plot, Note: _note}


def _figure(content: str, caption: str, kind: str = "") -> str:
    below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
    return f"<figure{f' class={kind}' if kind else ''}>{content}{below}</figure>"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _inline(text: str) -> str:
    """Escape, then turn `backticks` into code: the only markup there is."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))


def _paragraphs(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "\n".join(
        f"<p{attribute}>{_inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _filled(values: Sequence, count: int, empty: object) -> list:
    return [*values, *[empty] * (count - len(values))]
