"""The one error a user is meant to read."""


class UserError(ValueError):
    """Bad input, reported by the command line as a single line with exit code 2.

    The message says what was wrong, what was expected, what was got and what to do next, in one sentence or two:
    `UserError("portrait.txt is not an image: expected PNG, JPEG or WebP, got text; pass a picture with --portrait")`.
    """


def install_extra(extra: str) -> str:
    """Return the command that installs one of pyproject.toml's extras, at the versions the project is tested with."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"
