"""Keys and certificates to sign with: the user's own, or a local certificate that is made on first use.

C2PA wants a certificate that another one issued: the local one comes from an issuer whose key is thrown away. Nobody
else vouches for either, so that readers call it untrusted, which is right: it tells that files come from the same
place, not from whose.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiff4d.core.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

LOCAL_YEARS = 10
RENEW_DAYS = 30
"""A local certificate that ends within so many days is made anew."""
LOCAL_NAME = "local certificate"
MAX_PEM_BYTES = 1_000_000


@dataclass(frozen=True)
class Credentials:
    """A private key and the certificates that speak for it."""

    chain: bytes
    """Certificates as PEM: the signer's, then its issuers'."""
    key: bytes
    """The signer's private key, unencrypted PKCS #8 PEM."""

    def sign(self, data: bytes) -> bytes:
        """Return a detached signature over some bytes."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key: Any = load_pem_private_key(self.key, None)
        return key.sign(data, *scheme(key)[1])

    @property
    def algorithm(self) -> str:
        """The signature's name in COSE and C2PA, in lower case."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        return scheme(load_pem_private_key(self.key, None))[0]


def scheme(key: Any) -> tuple[str, tuple[Any, ...]]:
    """Return a private or public key's (algorithm, what its `sign` and `verify` want besides data).

    Raises:
        UserError: no kind of key that C2PA signs with.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        kinds = {256: ("es256", hashes.SHA256()), 384: ("es384", hashes.SHA384()), 521: ("es512", hashes.SHA512())}
        if key.curve.name.startswith("secp") and key.curve.name.endswith("r1") and key.curve.key_size in kinds:
            name, digest = kinds[key.curve.key_size]
            return name, (ec.ECDSA(digest),)
    elif isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        return "ed25519", ()
    elif isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey) and key.key_size >= 2048:
        return "ps256", (padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size), hashes.SHA256())
    raise UserError("the key is of no kind that signs: expected ECDSA on P-256, P-384 or P-521, Ed25519 or RSA")


def read_credentials(certificate: Path, key: Path) -> Credentials:
    """Read a certificate chain and its private key, both PEM, the key without a password.

    Raises:
        UserError: one cannot be read, the key is not the certificate's, or the certificate is not valid today.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

    chain = read_certificates(certificate)
    try:
        secret: Any = load_pem_private_key(_read(key), None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{key} is no private key in PEM without a password ({reason})") from None
    if secret.public_key() != chain[0].public_key():
        raise UserError(f"{key} is not the key of {certificate}, whose first certificate must be the signer's")
    if not chain[0].not_valid_before_utc <= datetime.now(UTC) <= chain[0].not_valid_after_utc:
        ends = chain[0].not_valid_after_utc.date()
        raise UserError(f"{certificate} is not valid today (until {ends}): expected one that is")
    scheme(secret)
    pem = b"".join(c.public_bytes(Encoding.PEM) for c in chain)
    return Credentials(pem, secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def read_certificates(path: Path) -> "list[Certificate]":
    """Read one or more certificates in PEM.

    Raises:
        UserError: missing, or none.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no certificate in PEM ({' '.join(str(error).split())[:80]})") from None


def local_path() -> Path:
    """Return where this user's local key and certificate are: one PEM that only its owner may read."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "geodiff4d" / "credentials.pem"


def local_credentials() -> Credentials:
    """Return the local key and certificate, made if there are none yet or if they end soon.

    Raises:
        UserError: what is there is damaged.
        OSError: they cannot be written.
    """
    path = local_path()
    if path.exists():
        try:
            known = read_credentials(path, path)
            ends = read_certificates(path)[0].not_valid_after_utc
        except UserError as error:
            raise UserError(f"{path} is damaged, or ended ({error}): remove it, it is made again") from None
        if ends > datetime.now(UTC) + timedelta(days=RENEW_DAYS):
            return known
    made = self_made()
    from geodiff4d.core.files import fresh_file

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with fresh_file(path) as temporary:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(made.key + made.chain)
    return made


def self_made(name: str = LOCAL_NAME) -> Credentials:
    """Make a key and a certificate for it, by an issuer whose key is not kept."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        parts = {NameOID.ORGANIZATION_NAME: "geodiff4d", NameOID.COMMON_NAME: text}
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])

    def usage(signs: bool) -> x509.KeyUsage:
        return x509.KeyUsage(signs, False, False, False, False, not signs, not signs, False, False)

    issuer, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    begin = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    end, subject = begin + timedelta(days=365 * LOCAL_YEARS), issuer.public_key()

    def certificate(text: str, key: ec.EllipticCurvePublicKey, authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(named(f"{name}, issuer"), named(text), key, x509.random_serial_number(), begin, end)
            .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
            .add_extension(usage(not authority), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    root = certificate(f"{name}, issuer", subject, True).sign(issuer, hashes.SHA256())
    leaf = (
        certificate(name, own.public_key(), False)
        # The purpose that C2PA's readers accept of any certificate.
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(subject), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    chain = leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
    return Credentials(chain, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a PEM file") from None
