"""Statements beside files that C2PA does not know: folders, web pages, glTF and splats.

`provenance.json` in a folder, `NAME.provenance.json` beside a file: the statement and each file's SHA-256, signed as a
whole. The signature is over the claim as JSON with sorted keys and no spaces.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from geodiff4d.core.digest import sha256_of
from geodiff4d.core.jsontext import parse_json
from geodiff4d.provenance.credentials import Credentials, scheme
from geodiff4d.provenance.statement import GENERATOR, Statement, read_statement
from geodiff4d.provenance.verdict import State, Verdict, named

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

FORMAT, VERSION = "geodiff4d provenance", 1
NAME = "provenance.json"
MAX_BYTES = 64_000_000
"""What is read of a stranger's file; a clip of 100,000 images stays below."""


def place_of(path: Path) -> Path:
    """Return where the statement of a file or folder is."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def write_beside(path: Path, statement: Statement, credentials: Credentials) -> None:
    """Write the signed statement of a file, or of a folder with everything in it that is not hidden."""
    from geodiff4d.core.files import write_json

    files = {name: sha256_of(file) for name, file in covered(path).items()}
    claim = statement.described() | {"files": files}
    signature = base64.b64encode(credentials.sign(_canonical(claim))).decode()
    known = {"format": FORMAT, "version": VERSION, "claim": claim}
    write_json(place_of(path), known | {"certificates": credentials.chain.decode(), "signature": signature})


def covered(path: Path) -> dict[str, Path]:
    """Return the files that a statement is about, by their names below the folder (or the file's own name)."""
    if not path.is_dir():
        return {path.name: path}
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {
        name: file
        for name, file in found.items()
        if not any(part.startswith(".") for part in PurePosixPath(name).parts) and not name.endswith(NAME)
    }


@dataclass(frozen=True)
class Signed:
    """A statement whose signature holds."""

    statement: Statement
    files: Mapping[str, str]
    """SHA-256 by name."""
    chain: "Sequence[Certificate]"

    def verdict(self, path: Path, problems: Sequence[str], anchors: "Sequence[Certificate]") -> Verdict:
        """Return the verdict on what the statement is about."""
        return Verdict(
            path, State.ALTERED if problems else State.UNTOUCHED, "; ".join(problems), signer=_holder(self.chain[0]),
            trusted=is_trusted(self.chain, anchors), generator=f"{GENERATOR} {self.statement.version}",
            statement=self.statement,
        )  # fmt: skip


def read_beside(path: Path, anchors: "Sequence[Certificate]" = ()) -> Verdict | None:
    """Say what the statement beside a file, or in a folder, says and whether it still holds; None if there is none.

    Args:
        anchors: certificates whose holders are trusted.
    """
    place = place_of(path)
    if not place.is_file():
        return None
    try:
        signed = read_signed(place)
    except ValueError as error:
        return Verdict(path, State.ALTERED, str(error))
    if not path.is_dir():
        # A file may have been renamed together with its statement.
        same = list(signed.files.values()) == [sha256_of(path)]
        return signed.verdict(path, [] if same else ["its content changed"], anchors)
    files = covered(path)
    changed = [name for name, digest in signed.files.items() if name in files and sha256_of(files[name]) != digest]
    missing = [name for name in signed.files if name not in files]
    problems = [f"{what}: {named(names)}" for what, names in (("changed", changed), ("missing", missing)) if names]
    added = tuple(name for name in files if name not in signed.files)
    return replace(signed.verdict(path, problems, anchors), added=added)


def read_above(path: Path, anchors: "Sequence[Certificate]" = ()) -> Verdict | None:
    """Say what the statement of a folder that a file lies in says about this file; None if no folder speaks of it."""
    whole = path.resolve()
    for folder in whole.parents:
        if (place := folder / NAME).is_file():
            name = whole.relative_to(folder).as_posix()
            try:
                signed = read_signed(place)
            except ValueError as error:
                return Verdict(path, State.ALTERED, str(error))
            if name in signed.files and path.is_file():
                same = sha256_of(path) == signed.files[name]
                return signed.verdict(path, [] if same else ["its content changed"], anchors)
    return None


def read_signed(place: Path) -> Signed:
    """Read a statement and check its signature.

    Raises:
        ValueError: it is damaged, or is not what was signed.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        with place.open("rb") as file:
            known = parse_json(file.read(MAX_BYTES))
        claim, files = known["claim"], known["claim"]["files"]
        if known["format"] != FORMAT or known["version"] != VERSION or not isinstance(files, dict):
            raise ValueError(f"no {FORMAT} of version {VERSION}")
        chain = x509.load_pem_x509_certificates(known["certificates"].encode())
        statement, signature = read_statement(claim), base64.b64decode(known["signature"], validate=True)
        key: Any = chain[0].public_key()
        key.verify(signature, _canonical(claim), *scheme(key)[1])
    except InvalidSignature:
        raise ValueError(f"{place.name} is not what was signed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{place.name} is damaged ({' '.join(str(error).split())[:80]})") from None
    return Signed(statement, files, chain)


def is_trusted(chain: "Sequence[Certificate]", anchors: "Sequence[Certificate]") -> bool:
    """Return whether a chain of certificates, all valid today, leads from the signer to somebody who is trusted."""
    now = datetime.now(UTC)
    for i, one in enumerate(chain):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc or (i and not _may_issue(one)):
            return False
        if any(one == anchor or (_may_issue(anchor) and _issued(one, anchor)) for anchor in anchors):
            return True
        if i + 1 < len(chain) and not _issued(one, chain[i + 1]):
            return False
    return False


def _issued(one: "Certificate", issuer: "Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        one.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _may_issue(certificate: "Certificate") -> bool:
    """Return whether a certificate may vouch for others: a signer's own may not."""
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _holder(certificate: "Certificate") -> str:
    from cryptography.x509.oid import NameOID

    oids = (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
    values = [a.value for oid in oids for a in certificate.subject.get_attributes_for_oid(oid)]
    return ", ".join(str(value) for value in values)


def _canonical(claim: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed: JSON with sorted keys, ASCII, no spaces."""
    return json.dumps(claim, sort_keys=True, separators=(",", ":")).encode()
