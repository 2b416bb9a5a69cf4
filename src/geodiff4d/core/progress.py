"""How long work tells how far it is: what it does is passed through something that looks (`cli.progress.track`)."""

from collections.abc import Callable, Iterable
from typing import Any

Track = Callable[..., Iterable[Any]]
"""`progress(items, description, total)`: passes items through and shows how far they are."""


def unchanged(items: Iterable[Any], description: object = "", total: int | None = None) -> Iterable[Any]:
    """Show no progress."""
    return items
