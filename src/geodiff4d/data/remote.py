"""Folders that are not on this machine, read through fsspec: object stores, web servers, whatever has a URL.

A path that begins with a protocol is such a folder (`s3://bucket/store`). pathlib joins the two slashes into one, which
no other path looks like, so that such paths may be given wherever a store may.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodiff4d.core.errors import UserError

TRIES = 4
"""How often a read is tried; between two tries one, two and four seconds pass."""
GONE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""What another try does not mend."""


def remote_url(folder: Path | str) -> str | None:
    """Return the URL that a path stands for, None for one on this machine."""
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.\-]+):/+(.*)", str(folder))
    return f"{found[1]}://{found[2]}" if found else None


class RemoteFolder:
    """A folder somewhere else."""

    def __init__(self, url: str):
        """Connect to it.

        Raises:
            UserError: the protocol is unknown, needs a package that is not installed, or nobody answers.
        """
        import fsspec

        self.url, protocol = url.rstrip("/"), url.split(":")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{url}: {protocol}:// needs another package: {_reason(error)}") from None
        except Exception as error:  # every protocol has its own
            raise UserError(f"{url} cannot be opened ({_reason(error)}): check the address and your access") from None

    def has(self, name: str) -> bool:
        """Say whether there is a file of this name."""
        try:
            return self._tried(lambda: bool(self._files.exists(f"{self._root}/{name}")), name)
        except FileNotFoundError:
            return False

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return a file, or some bytes of it.

        Raises:
            UserError: it cannot be read.
        """
        return self.read_parts(name, [(start, stop)])[0]

    def read_parts(self, name: str, parts: Sequence[tuple[int | None, int | None]]) -> list[bytes]:
        """Return several ranges of a file, at once where the protocol can.

        Raises:
            UserError: they cannot be read.
        """
        path = f"{self._root}/{name}"
        starts, stops = zip(*parts, strict=True)
        get = self._files.cat_ranges
        return self._tried(lambda: get([path] * len(parts), list(starts), list(stops), on_error="raise"), name)

    def _tried(self, act: Any, name: str) -> Any:
        for attempt in range(TRIES):
            try:
                return act()
            except Exception as error:  # every protocol has its own
                if isinstance(error, GONE) or attempt == TRIES - 1:
                    reason = "there is no such file" if isinstance(error, FileNotFoundError) else _reason(error)
                    raise UserError(
                        f"{self.url}/{name} cannot be read ({reason}): check the address and your access"
                    ) from None
                time.sleep(2.0**attempt)
        raise AssertionError


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
