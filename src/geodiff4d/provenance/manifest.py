"""Statements inside images and videos, as C2PA manifests (https://spec.c2pa.org), which other programs read too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiff4d.core.errors import UserError
from geodiff4d.provenance.credentials import Credentials
from geodiff4d.provenance.statement import GENERATOR, Statement, read_statement
from geodiff4d.provenance.verdict import State, Verdict

if TYPE_CHECKING:
    import c2pa

FORMATS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4"}
"""Endings of the files that carry a manifest inside, and their types."""
LABEL = "geodiff4d.statement"
UNTRUSTED = ("signingCredential.untrusted",)


def embed(path: Path, statement: Statement, credentials: Credentials) -> None:
    """Put a signed manifest into an image or a video, in place of one that it has; whole or not at all.

    Raises:
        UserError: the certificate is none that C2PA allows.
    """
    import c2pa

    from geodiff4d.core.files import fresh_file

    agent = {"name": GENERATOR, "version": statement.version}
    created = {
        "action": "c2pa.created", "digitalSourceType": statement.source_type, "when": statement.made,
        "softwareAgent": agent,
    }  # fmt: skip
    manifest = {
        "claim_generator_info": [agent],
        "title": path.name,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": LABEL, "data": statement.described()},
        ],
    }
    kind, parts = FORMATS[path.suffix.lower()], (credentials.chain, credentials.key)
    try:
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(credentials.algorithm.encode(), *parts, None))
        with fresh_file(path) as temporary, path.open("rb") as source, temporary.open("w+b") as target:
            c2pa.Builder(manifest, context=_context(None)).sign(signer, kind, source, target)
    except c2pa.C2paError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be signed ({reason}): expected a certificate that C2PA allows") from None


def read_manifest(path: Path, anchors: bytes | None = None) -> Verdict | None:
    """Say what an image or a video carries; None if it carries nothing.

    Args:
        anchors: certificates (PEM) whose holders are trusted.
    """
    import c2pa

    try:
        with path.open("rb") as file:
            reader = c2pa.Reader(FORMATS[path.suffix.lower()], file, context=_context(anchors))
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        text = " ".join(str(error).split())
        return None if "ManifestNotFound" in text else Verdict(path, State.ALTERED, f"its manifest is damaged: {text}")
    manifest = found["manifests"][found["active_manifest"]]
    failures = [f for f in found.get("validation_status", []) if f["code"] not in UNTRUSTED]
    signer = manifest.get("signature_info", {})
    state = State.ALTERED if failures else State.UNTOUCHED
    maker = manifest.get("claim_generator_info") or [{}]
    return Verdict(
        path, state, "; ".join(f"{f['code']} ({f.get('explanation', '')})" for f in failures),
        signer=", ".join(filter(None, (signer.get("issuer"), signer.get("common_name")))),
        trusted=found.get("validation_state") == "Trusted",
        generator=" ".join(str(maker[0].get(key, "")) for key in ("name", "version")).strip(),
        statement=_statement(manifest),
    )  # fmt: skip


def _statement(manifest: Mapping[str, Any]) -> Statement | None:
    """Return what we said in a manifest; None in one of another program's."""
    for assertion in manifest.get("assertions", []):
        if assertion["label"] == LABEL and isinstance(assertion["data"], dict):
            try:
                return read_statement(assertion["data"])
            except ValueError:
                return None
    return None


def _context(anchors: bytes | None) -> "c2pa.Context":
    """Return settings under which nothing is fetched from anywhere."""
    import c2pa

    settings: dict[str, Any] = {
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
        "builder": {"thumbnail": {"enabled": False}},
    }
    if anchors is not None:
        settings["trust"] = {"trust_anchors": anchors.decode()}
    return c2pa.Context.from_dict(settings)
