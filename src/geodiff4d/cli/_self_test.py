"""The whole path once at debug size, a line a step: what a bug report needs to say where it breaks."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1800.0
"""For one step."""
SHOWN_LINES = 40
"""Of a failing step's log."""


@dataclass(frozen=True)
class Step:
    """One command and the files that it must leave."""

    name: str
    line: str
    """Arguments after `geodiff4d`, in a folder in which the steps before have written."""
    outputs: tuple[str, ...]


STEPS = (
    Step("driver", "synth world --preset debug --subjects 1 --frames 4 --views 1", ("world/train_0/transforms.json",)),
    Step("track", "track portrait.png --size 128 --out portrait", ("portrait/transforms.json", "portrait/overlay.png")),
    Step(
        "synthesize", "synthesize --portrait portrait.png --driving world/train_0 --preset debug --out clip",
        ("clip/transforms.json", "clip/expression_tokens.safetensors"),
    ),
    Step("fit", "fit clip --preset debug --out avatar", ("avatar/avatar.safetensors", "avatar/preview.png")),
    Step("render", "render avatar --frames 4 --out avatar.mp4", ("avatar.mp4",)),
    Step("export", "export avatar avatar.ply", ("avatar.ply",)),
)  # fmt: skip


def self_test(steps: Sequence[Step] = STEPS, say: Callable[[str], None] = print) -> bool:
    """Run portrait → track → synthesize → fit → render → export in a temporary folder; returns whether all went well.

    Every step is a process of its own, so that one that is killed or crashes is a line of the report too. The steps
    after a failing one are left out, and its log is said.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="geodiff4d-self-test-") as name:
        folder = Path(name)
        try:
            _portrait(folder / "portrait.png")
        except Exception as error:  # a broken installation may raise anything
            say(f"failed          portrait: {type(error).__name__}: {error}")
            return False
        for step in steps:
            start = time.monotonic()
            wrong, log = _run(step, folder, environment)
            say(
                f"{'failed' if wrong else 'ok':<7}{time.monotonic() - start:6.1f} s  {step.name}: geodiff4d {step.line}"
            )
            if wrong:
                say(f"{wrong}; the end of its log:")
                say("\n".join(f"    {line}" for line in log.strip().splitlines()[-SHOWN_LINES:]))
                return False
    say(f"ok     {time.monotonic() - begun:6.1f} s  in all")
    return True


def _portrait(path: Path) -> None:
    """Draw somebody of the open world before a background, large enough to be tracked."""
    from geodiff4d.core.images import write_image
    from geodiff4d.evaluate.tracking import make_case

    write_image(path, make_case(1, "val", size=256).image)


def _run(step: Step, folder: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Run one step: (what is wrong with it or nothing, its log)."""
    words = [sys.executable, "-m", "geodiff4d", *step.line.split(), "--debug"]
    try:
        done = subprocess.run(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return f"it took longer than {LIMIT_S:.0f} s", (error.stdout or b"").decode(errors="replace")
    log = done.stdout.decode(errors="replace")
    if done.returncode:
        return f"exit code {done.returncode}", log
    absent = [name for name in step.outputs if not (folder / name).is_file()]
    return (f"it did not write {', '.join(absent)}" if absent else ""), log
