"""Signing what was made, and looking at what somebody signed."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from geodiff4d.core.errors import UserError, install_extra
from geodiff4d.provenance.beside import place_of, read_above, read_beside, write_beside
from geodiff4d.provenance.credentials import Credentials, local_credentials, read_certificates, read_credentials
from geodiff4d.provenance.manifest import FORMATS, embed, read_manifest
from geodiff4d.provenance.statement import Statement
from geodiff4d.provenance.verdict import State, Verdict

PACKAGES = ("c2pa", "cryptography")
IMAGES = "images"
"""Folder of a clip's generated images, which get statements of their own, as a folder's files on top do."""


def available() -> bool:
    """Return whether the extra that signing and verifying need is installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def require_extra(what: str) -> None:
    """Check that the extra is installed.

    Raises:
        UserError: it is not.
    """
    if not available():
        raise UserError(f"{what} needs c2pa-python: {install_extra('provenance')}")


@dataclass(frozen=True)
class Sealer:
    """Signs what a command made; without credentials, nothing."""

    credentials: Credentials | None = None

    def seal(self, path: Path, statement: Statement) -> None:
        """Sign a file, or a folder: inside images and videos, beside everything else.

        Raises:
            UserError: the certificate is none that C2PA allows.
        """
        if self.credentials is None:
            return
        said = statement.now()
        for file in media(path) if path.is_dir() else [path] if is_media(path) else []:
            embed(file, said, self.credentials)
        if not is_media(path):
            write_beside(path, said, self.credentials)

    def seal_stage(self, folder: Path, statement: Statement) -> None:
        """Sign a folder that this run may have found finished: a statement that is there stays, whether it holds or
        not.

        Raises:
            UserError: as `seal`.
        """
        if not place_of(folder).exists():
            self.seal(folder, statement)


def chosen(own: tuple[Path, Path] | None) -> Sealer:
    """Return what signs: with the user's (certificate, key), else with the local ones, which are made on first use.

    Raises:
        UserError: they cannot be read, or the extra is missing and they were given.
        OSError: the local ones cannot be written.
    """
    if own is not None:
        require_extra("--credentials")
        return Sealer(read_credentials(*own))
    return Sealer(local_credentials()) if available() else Sealer()


def origin(path: Path) -> Statement:
    """Return what is said of a clip or an avatar, for what is made of it; an empty statement where nothing holds.

    What is made of people that were drawn is no drawing: it was fitted.
    """
    verdict = read_beside(path) if available() else None
    if verdict is None or verdict.state is not State.UNTOUCHED or verdict.statement is None:
        return Statement()
    return replace(verdict.statement, source="trainedAlgorithmicMedia")


def is_media(path: Path) -> bool:
    """Return whether a file carries its statement inside."""
    return path.suffix.lower() in FORMATS and path.is_file()


def media(folder: Path) -> list[Path]:
    """Return a folder's images and videos that get statements of their own: those on top, and a clip's images."""
    return sorted(p for p in (*folder.iterdir(), *(folder / IMAGES).glob("*")) if is_media(p))


def verify(paths: Sequence[Path], trust: Path | None = None) -> list[Verdict]:
    """Say of each file or folder what it carries, and whether it is as it was signed.

    Args:
        trust: file with the certificates (PEM) of those who are trusted.

    Raises:
        UserError: one does not exist, the extra is missing, or `trust` cannot be read.
    """
    require_extra("verify")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: expected a file or a folder that geodiff4d wrote")
    anchors = [] if trust is None else read_certificates(trust)
    pem = None if trust is None else trust.read_bytes()
    return [
        (read_manifest(path, pem) if is_media(path) else None)
        or read_beside(path, anchors)
        or read_above(path, anchors)
        or Verdict(path, State.UNSIGNED)
        for path in paths
    ]
