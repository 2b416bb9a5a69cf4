"""What commands that make something share: who signs it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiff4d.provenance.seal import Sealer


@dataclass(frozen=True, kw_only=True)
class SigningArgs:
    """Options about content credentials, which need the extra `provenance` (docs/PROVENANCE.md)."""

    sign: bool = True
    """Sign what is written, where the extra is installed: that it was generated, by what and when."""
    credentials: tuple[Path, Path] | None = None
    """Your certificate and private key to sign with (two PEM files); by default a local one, made on first use."""


def sealer(args: SigningArgs) -> "Sealer":
    """Return what signs a command's results. Called first, so that wrong credentials are known before the work.

    Raises:
        UserError: credentials cannot be read, are not valid, or were given together with --no-sign.
    """
    from geodiff4d.core.errors import UserError
    from geodiff4d.provenance.seal import Sealer, chosen

    if not args.sign:
        if args.credentials is not None:
            raise UserError("--credentials and --no-sign were both given: expected one of them")
        return Sealer()
    try:
        return chosen(args.credentials)
    except OSError as error:
        print(f"note: not signed: the local certificate cannot be written ({error})", file=sys.stderr)
        return Sealer()
