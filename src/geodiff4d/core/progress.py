"""The one protocol for progress: long work passes its items through a callable that may show how far it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
Description = str | Callable[[], str]
"""What the work is; a function is asked again at every item, so that it can tell the latest figures (a loss)."""


@runtime_checkable
class Progress(Protocol):
    """Anything that passes items through, one by one, and may show how many there were.

    Library functions take `progress: Progress = silent` and know nothing of terminals; commands give
    `cli.progress.bar`. Two forms serve all long work:

    - a loop over known items: `for frame in progress(frames, "rendering"): …`. A training loop is one too:
      `for step in progress(range(first, steps), latest_loss, steps - first): …`;
    - work that several processes finish, or several items at a time: `with advancing(progress, "people", total) as
      advance: …; advance(n)`.
    """

    def __call__(
        self, items: Iterable[Item], description: Description = "", total: int | None = None
    ) -> Iterable[Item]:
        """Return the items, unchanged and in order; `total` says how many there are where `len` cannot."""
        ...


def silent(items: Iterable[Item], description: Description = "", total: int | None = None) -> Iterable[Item]:
    """Return the items and show nothing."""
    return items


@contextmanager
def advancing(progress: Progress, description: Description, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which tells `progress` that `n` more of `total` items are finished.

    Example:
        >>> with advancing(silent, "rendering people", total=3) as advance:
        ...     advance(1)
        ...     advance(2)
    """
    shown = iter(progress(range(total), description, total))
    # An item counts as finished when the next one is asked for.
    next(shown, None)

    def advance(n: int) -> None:
        for _ in range(n):
            next(shown, None)

    yield advance


def in_passes(advance: Callable[[int], None], passes: int) -> Callable[[int], None]:
    """Return an `advance` for work that goes over all its items several times: so many steps are an item."""
    done = 0

    def step(n: int) -> None:
        nonlocal done
        before = done // passes
        done += n
        advance(done // passes - before)

    return step


def passed_on(advance: Callable[[int], None]) -> Progress:
    """Return a progress whose finished items advance another's."""

    def shown(items: Iterable[Item], description: Description = "", total: int | None = None) -> Iterable[Item]:
        for item in items:
            yield item
            advance(1)

    return shown
