"""The command line: `geodiff4d COMMAND …`.

Every command is one module here with a frozen dataclass `Args` (its options, shown by tyro) and
`run(args: Args) -> None`. Modules load only when their command is called, and import torch inside `run`, so that every
`--help` answers at once.
Exit codes: 0 done, 1 a defect of ours, 2 bad input or a full disk, 130 interrupted, 143 stopped by
SIGTERM.
"""

import difflib
import errno
import importlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, one line of help), in the order a user meets them.
    "studio": ("geodiff4d.cli.studio", "make avatars in the browser: drop a portrait, get the avatar"),
    "demo": ("geodiff4d.cli.demo", "portrait to avatar on the embedded default, with figures and a page"),
    "track": ("geodiff4d.cli.track", "fit the head to a portrait or a video: a clip with masks and parameters"),
    "reconstruct": ("geodiff4d.cli.reconstruct", "portrait and driver in, avatar and video out"),
    "synthesize": ("geodiff4d.cli.synthesize", "make the avatar's training clip from a portrait and a driver"),
    "animate": ("geodiff4d.cli.animate", "animate a portrait by the video model alone"),
    "fit": ("geodiff4d.cli.fit", "fit an avatar to a clip"),
    "render": ("geodiff4d.cli.render", "render an avatar as a video"),
    "view": ("geodiff4d.cli.view", "look at an avatar in the browser, with sliders"),
    "live": ("geodiff4d.cli.live", "track a webcam or a growing video as it comes, and drive an avatar by it"),
    "verify": ("geodiff4d.cli.verify", "say what files carry about their making, and whether they were altered"),
    "synth": ("geodiff4d.cli.synth", "write clips of made-up people"),
    "import": ("geodiff4d.cli.imports", "read data sets or trackers' results into clips, or avatars of others"),
    "encode": ("geodiff4d.cli.encode", "encode clips once, into shards that training reads"),
    "export": (
        "geodiff4d.cli.export",
        "write an avatar or a clip for other programs: 3DGS .ply and more",
    ),
    "train": (
        "geodiff4d.cli.train",
        "train the codec, the video model (two stages), or what tracking sees with",
    ),
    "fleet": ("geodiff4d.cli.fleet", "carry out many of these commands, on this machine or a Ray cluster"),
    "evaluate": ("geodiff4d.cli.evaluate", "measure: the paper's protocols on any clips, and tracking"),
    "bench": ("geodiff4d.cli.bench", "measure a hot path: one row with the figure, the hardware and a baseline"),
    "doctor": ("geodiff4d.cli.doctor", "say what is installed, what is missing and what to do"),
}
ENDLESS = ("studio", "view", "live")
"""Those that end when they are told to: no jobs of a fleet or a recipe."""

USAGE = "usage: geodiff4d [-h] [--version] [--debug] COMMAND …"
SPACE, RIGHTS = "free some space or choose another --out", "choose another --out or check its permissions"
FOLDER = "expected a folder where there is a file, or a file where there is a folder: choose another --out"
ADVICE = {
    errno.ENOSPC: SPACE, errno.EDQUOT: SPACE,
    errno.EROFS: RIGHTS, errno.EACCES: RIGHTS, errno.EPERM: RIGHTS,
    errno.EEXIST: FOLDER, errno.ENOTDIR: FOLDER, errno.EISDIR: FOLDER,
    errno.ELOOP: "expected a file or folder, got a link that leads to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
}  # fmt: skip
"""Failures of the user's machine, not of the program, and what to do: one line is enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    `--debug`, anywhere on the line, lets every error through with its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no "°" or "ä" is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from geodiff4d import __version__

        print(f"geodiff4d {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return fail("geodiff4d", unknown(name))
    try:
        return execute(name, rest)
    except KeyboardInterrupt:
        if debug:
            raise
        return fail(f"geodiff4d {name}", "interrupted", code=130)
    except Exception as error:
        if debug:
            raise
        return fail(f"geodiff4d {name}", *explain(error))


def execute(name: str, rest: list[str]) -> int:
    """Parse a command's options and run it; `--help` and usage errors return tyro's exit code."""
    import tyro

    module = importlib.import_module(COMMANDS[name][0])
    try:
        args = tyro.cli(module.Args, prog=f"geodiff4d {name}", description=module.__doc__, args=rest)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    module.run(args)
    sys.stdout.flush()
    return 0


def explain(error: Exception) -> tuple[str, int]:
    """Turn an exception into (one line, exit code)."""
    from geodiff4d.core.errors import UserError
    from geodiff4d.core.stopping import Stopped

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, 2
    if isinstance(error, Stopped):
        return text, 143
    if isinstance(error, BrokenPipeError):
        # The reader left (`| head`): keep the interpreter from complaining again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the reader of the output went away", 141
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) and _no_temporary_space():
        return f"no space left in {tempfile.gettempdir()}, where temporary files are: free some, or set TMPDIR", 2
    if isinstance(error, OSError) and error.errno in ADVICE:
        where = f" ({error.filename})" if error.filename else ""
        return f"{(error.strerror or text).lower()}{where}: {ADVICE[error.errno]}", 2
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # Python 3.11's words for ELOOP
        return f"{text[0].lower()}{text[1:]}: {ADVICE[errno.ELOOP]}", 2
    if "No space left on device" in text or re.search(r"\d+ requested and \d+ written", text):
        # safetensors, torch and numpy wrap the system's error in their own.
        return f"no space left on device ({type(error).__name__}): {SPACE}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text or 'no detail'}): choose a smaller --preset, or fewer views or frames", 2
    return (
        f"unexpected {type(error).__name__}: {text}; this is a defect, please report it with the output of --debug",
        1,
    )


def _no_temporary_space() -> bool:
    """Say whether it is the folder of temporary files that is full."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free < 1_000_000
    except OSError:
        return False


def fail(who: str, message: str, code: int = 2) -> int:
    print(f"{who}: {message}", file=sys.stderr)
    return code


def unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    return f"unknown command {name!r}: {hint}"


def overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "One portrait image in, one animatable 4D head avatar out.",
            "",
            "commands (each has its own --help):",
            *rows,
            "",
            "options:",
            "  --debug    show tracebacks",
            "  --version  print the version",
        ]
    )
