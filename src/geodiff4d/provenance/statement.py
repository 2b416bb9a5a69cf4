"""The statement that everything made here carries: by what it was made, out of whose portrait, with what consent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from geodiff4d import __version__
from geodiff4d.core.digest import sha256_of
from geodiff4d.core.jsontext import parse_json

GENERATOR = "geodiff4d"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
"""IPTC's terms for how media were made, which readers of content credentials look for."""
Source = Literal["trainedAlgorithmicMedia", "algorithmicMedia"]
"""By a trained model, or by a program that no one was photographed for."""
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
    source: Source = "trainedAlgorithmicMedia"
    """How it was made."""

    @property
    def source_type(self) -> str:
        """Return IPTC's term for how it was made."""
        return SOURCE_TYPES + self.source

    def now(self) -> "Statement":
        """Return the same statement for something that this version makes at this moment."""
        return replace(self, made=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__)

    def described(self) -> dict[str, Any]:
        """Return the statement as it is written, for JSON."""
        return {
            "generator": GENERATOR, "version": self.version, "digitalSourceType": self.source_type,
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
    drawn = value.get("digitalSourceType") == SOURCE_TYPES + "algorithmicMedia"
    source: Source = "algorithmicMedia" if drawn else "trainedAlgorithmicMedia"
    return Statement(tuple(hashes), texts[0], consent, texts[1], texts[2], source)


def hash_portraits(paths: Iterable[Path]) -> tuple[str, ...]:
    """Return the SHA-256 of each portrait; of a tracked folder, those of the files that were tracked, if it tells."""
    found: list[str] = []
    for path in paths:
        found += _tracked_from(path) if path.is_dir() else [sha256_of(path)]
    return tuple(found)


def _tracked_from(folder: Path) -> list[str]:
    try:
        extra = parse_json((folder / "transforms.json").read_text())["geodiff4d"]["extra"]
        return [str(one) for one in extra["source_sha256"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
