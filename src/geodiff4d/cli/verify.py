"""Say what files carry about their making: whether they were signed, by whom, and whether they were altered since."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d verify`. Exit code 0: all are as they were signed. 1: one is altered or unsigned, or its
    signer is not among those that --trust names. 2: one cannot be read."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, videos, web pages, other files and folders."""
    trust: Path | None = None
    """Certificates (PEM) of those whom you trust: who signed must be among them, or be vouched for by one of them."""


def run(args: Args) -> None:
    from geodiff4d.core.errors import UserError
    from geodiff4d.provenance.seal import verify
    from geodiff4d.provenance.verdict import State

    if not args.files:
        raise UserError("no files: expected at least one image, video, page or folder")
    verdicts = verify(args.files, args.trust)
    for verdict in verdicts:
        print("\n".join(verdict.lines()))
    if any(v.state is not State.UNTOUCHED or (args.trust and not v.trusted) for v in verdicts):
        raise SystemExit(1)
