"""The statement that everything made here carries: by what it was made, out of whose portrait, with what consent."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from geodiff4d import __version__
from geodiff4d.core.errors import UserError

GENERATOR = "geodiff4d"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model made, which readers of content credentials look for."""
Consent = Literal["self", "permitted", "not stated"]
CONSENTS: dict[Consent, str] = {
    "self": "the portrait shows whoever made this",
    "permitted": "whoever made this may use the portrait",
    "not stated": "nothing was said about consent",
}


@dataclass(frozen=True)
class Statement:
    """What is said about a file. The portrait itself is never part of it."""

    portrait_sha256: tuple[str, ...] = ()
    """SHA-256 of each portrait file, in hexadecimal; empty where it is not known."""
    model: str = ""
    """Fingerprint of the video model and of how it was sampled; empty where it is not known."""
    consent: Consent = "not stated"
    made: str = ""
    """Time of making, ISO 8601 in UTC."""
    version: str = __version__
    """Version of geodiff4d."""

    def now(self) -> "Statement":
        """Return the same statement for something that this version makes at this moment."""
        return replace(self, made=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__)

    def described(self) -> dict[str, Any]:
        """Return the statement as it is written, for JSON."""
        return {
            "generator": GENERATOR, "version": self.version, "digitalSourceType": SOURCE_TYPE,
            "portrait_sha256": list(self.portrait_sha256), "model": self.model, "consent": self.consent,
            "made": self.made,
        }  # fmt: skip


def read_statement(value: Mapping[str, Any]) -> Statement:
    """Return the statement that was written as `value`, whose fields a stranger may have chosen; unknown ones are left.

    Raises:
        ValueError: a field is not of its type.
    """
    hashes, consent = value.get("portrait_sha256", []), value.get("consent", "not stated")
    texts = [value.get(name, "") for name in ("model", "made", "version")]
    if not isinstance(hashes, list) or not all(isinstance(text, str) for text in (*hashes, *texts)):
        raise ValueError("a statement's fields are texts")
    if consent not in CONSENTS:
        raise ValueError(f"consent is {str(consent)[:40]!r}")
    return Statement(tuple(hashes), texts[0], consent, texts[1], texts[2])


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_portraits(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return the SHA-256 of each portrait; of a tracked folder, that of its first image.

    Raises:
        UserError: a folder has no images.
    """
    files = []
    for path in paths:
        images = sorted((path / "images").glob("*")) if path.is_dir() else [path]
        if not images:
            raise UserError(f"{path} has no images: expected a tracked folder, from geodiff4d track")
        files.append(images[0])
    return tuple(hash_file(file) for file in files)
