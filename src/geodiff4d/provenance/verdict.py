"""What is found when a file is looked at: whether it is as it was when somebody signed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from geodiff4d.provenance.statement import CONSENTS, Statement


class State(Enum):
    """What a signature says about a file."""

    UNTOUCHED = "untouched"
    ALTERED = "altered"
    UNSIGNED = "unsigned"


@dataclass(frozen=True)
class Verdict:
    """What one file or folder carries."""

    path: Path
    state: State
    why: str = ""
    """What was altered; empty if nothing was."""
    signer: str = ""
    """Holder's name in the certificate, which anybody may choose who makes a certificate."""
    trusted: bool = False
    """Whether somebody who is trusted vouches for the signer."""
    generator: str = ""
    """Program that made the file."""
    statement: Statement | None = None
    added: tuple[str, ...] = ()
    """Files of a folder that its statement does not know."""

    def lines(self) -> list[str]:
        """Return the verdict for a reader: a line, and indented lines with what the statement says."""
        if self.state is State.UNSIGNED:
            return [f"{self.path}: unsigned: {self.why or 'never signed, or re-encoded since, which loses it'}"]
        vouched = "trusted" if self.trusted else "untrusted: nobody that you trust vouches for it"
        since = f"{self.state.value} since it was signed" if self.state is State.UNTOUCHED else f"altered: {self.why}"
        said = [f"{self.path}: {since}"]
        if self.added:
            said.append(f"  says nothing of {len(self.added)} file(s) that were added: {named(self.added)}")
        if self.signer:
            said.append(f"  signed with the certificate of {self.signer} ({vouched})")
        if self.generator:
            said.append(f"  made by {self.generator}" + (f" at {self.statement.made}" if self.statement else ""))
        if self.statement is not None:
            hashes = ", ".join(self.statement.portrait_sha256) or "not known"
            said.append(f"  portrait (SHA-256): {hashes}")
            said.append(f"  model: {self.statement.model or 'not known'}")
            said.append(f"  consent: {self.statement.consent} ({CONSENTS[self.statement.consent]})")
        return said


def named(files: Sequence[str]) -> str:
    """Name the first few files."""
    return ", ".join(files[:3]) + (" …" if len(files) > 3 else "")
