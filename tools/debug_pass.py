"""Run every command once at its smallest size, in order, in one temporary folder.

Usage: `.venv/bin/python tools/debug_pass.py`. A command that is in the CLI's table but in no recipe here fails
the pass, and so does one that writes less than it promised.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from geodiff4d.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Recipe:
    """One command line, what it must leave behind and what it must not."""

    line: str
    """Arguments after `geodiff4d`; the working directory is the pass's temporary folder, `{repo}` is the repository."""
    outputs: tuple[str, ...] = ()
    """Files that must exist afterwards and not be empty (globs allowed)."""
    says: str = ""
    """Text that must appear in the output."""
    code: int = 0
    absent: tuple[str, ...] = ()
    """What must not exist afterwards: a failing command leaves nothing half-written."""


RECIPES = [
    # In the order of the pipeline: later lines read what earlier ones wrote.
    Recipe("doctor", says="needs attention|ready"),
]


def check(recipe: Recipe, folder: Path) -> str:
    """Run one recipe and return what is wrong, or nothing."""
    words = [sys.executable, "-m", "geodiff4d", *shlex.split(recipe.line.replace("{repo}", str(ROOT)))]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {LIMIT_SECONDS} s"
    output = done.stdout + done.stderr
    wrong = []
    if done.returncode != recipe.code:
        wrong.append(f"exit code {done.returncode}, expected {recipe.code}")
    if recipe.code == 2 and len(done.stderr.strip().splitlines()) != 1:
        wrong.append("bad input must give exactly one line on stderr")
    if recipe.says and not any(text in output for text in recipe.says.split("|")):
        wrong.append(f"the output does not say {recipe.says!r}")
    for pattern in recipe.outputs:
        if not any(path.is_file() and path.stat().st_size for path in folder.glob(pattern)):
            wrong.append(f"{pattern} is missing or empty")
    wrong += [f"{pattern} should not exist" for pattern in recipe.absent if any(folder.glob(pattern))]
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*.part")]
    if left:
        wrong.append(f"half-written: {', '.join(left)}")
    return "; ".join(wrong) + (f"\n{output.strip()}" if wrong else "")


def main() -> int:
    covered = {shlex.split(recipe.line)[0] for recipe in RECIPES}
    failures = [f"{name}: no recipe in tools/debug_pass.py" for name in COMMANDS if name not in covered]
    with tempfile.TemporaryDirectory(prefix="geodiff4d-") as name:
        for recipe in RECIPES:
            start = time.monotonic()
            wrong = check(recipe, Path(name))
            print(
                f"{'FAIL' if wrong else 'ok':<5}{time.monotonic() - start:6.1f} s  geodiff4d {recipe.line}", flush=True
            )
            if wrong:
                failures.append(f"geodiff4d {recipe.line}: {wrong}")
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    print(f"{len(RECIPES)} recipes, {len(COMMANDS)} commands, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
