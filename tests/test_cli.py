"""The command line: fast help, one-line errors, exit codes."""

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from geodiff4d import cli
from geodiff4d.cli import COMMANDS, doctor, main, progress
from geodiff4d.core.camera import Camera
from geodiff4d.core.errors import UserError
from geodiff4d.data.clip import ClipWriter


@dataclass(frozen=True)
class Args:
    """A command that exists in this test only."""

    path: str = "nothing"


@pytest.fixture
def command(monkeypatch):
    """Register a command `probe` whose `run` is the given function."""

    def register(run):
        module = ModuleType("geodiff4d_probe")
        vars(module).update(Args=Args, run=run)
        monkeypatch.setitem(sys.modules, "geodiff4d_probe", module)
        monkeypatch.setitem(COMMANDS, "probe", ("geodiff4d_probe", "exists in this test only"))

    return register


def raising(error):
    def run(args):
        raise error

    return run


def test_help_lists_every_command_without_torch():
    code = "import sys, json; from geodiff4d.cli import main; main(['--help']); print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *text, modules = out.splitlines()
    assert all(any(line.split()[:1] == [name] for line in text) for name in COMMANDS)
    assert not {"torch", "numpy", "tyro", "rich", "numba"} & set(json.loads(modules))


def test_each_command_has_help_without_torch():
    """One process for all of them: `Args` may not need torch, `run` imports it."""
    code = (
        "import sys, json; from geodiff4d.cli import COMMANDS, main\n"
        "codes = {name: main([name, '--help']) for name in COMMANDS}\n"
        "print(json.dumps([codes, sorted({'torch', 'numba', 'diffusers'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert codes == dict.fromkeys(COMMANDS, 0)
    assert heavy == [], f"`--help` imports {heavy}: import it inside run()"
    assert done.stdout.count("usage: geodiff4d ") == len(COMMANDS)


def test_every_command_names_its_module():
    root = Path(cli.__file__).parent
    for name, (module, text) in COMMANDS.items():
        assert (root / f"{module.rsplit('.', 1)[1]}.py").is_file(), name
        assert len(text) <= 80, name


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("geodiff4d 0.")


def test_arguments_reach_the_command(command, capsys):
    command(lambda args: print(f"got {args.path}"))
    assert main(["probe", "--path", "here"]) == 0
    assert capsys.readouterr().out == "got here\n"


def test_unknown_commands_suggest_the_nearest(capsys):
    assert main(["docter"]) == 2
    assert capsys.readouterr().err == "geodiff4d: unknown command 'docter': did you mean doctor?\n"
    assert main(["zzzzzz"]) == 2
    assert "expected one of studio, demo" in capsys.readouterr().err


def test_unknown_options_exit_with_2(command, capsys):
    command(lambda args: None)
    assert main(["probe", "--nope", "1"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.txt is not an image:\n expected PNG"), 2, "a.txt is not an image: expected PNG"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), 2, "no space left on device (x.png): free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "permission denied (/root/x): "),
        (RuntimeError("wrapped: No space left on device (os error 28)"), 2, "no space left on device (RuntimeError): "),
        (MemoryError(), 2, "out of memory (no detail): choose a smaller --preset"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero; this is a defect"),
    ],
)
def test_errors_are_one_line(command, capsys, error, code, message):
    command(raising(error))
    assert main(["probe"]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"geodiff4d probe: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"), (errno.EACCES, "check its permissions"), (errno.EEXIST, "expected a folder"),
        (errno.ENOTDIR, "expected a folder"), (errno.EISDIR, "expected a folder"), (errno.ENAMETOOLONG, "shorter name"),
    ],
)  # fmt: skip
def test_advice_fits_the_failure(command, capsys, number, advice):
    command(raising(OSError(number, "Something failed", "some/path")))
    assert main(["probe"]) == 2
    line = capsys.readouterr().err
    assert advice in line and "some/path" in line and ("space" in line) == (number == errno.ENOSPC)


@pytest.mark.parametrize(
    "line", ["track {0}/me.jpg", "fit {0}/clip", "animate --portrait {0}/me.jpg --driving {0}/clip",
             "synthesize --portrait {0}/me.jpg --driving {0}/clip"],
)  # fmt: skip
def test_no_command_replaces_what_it_reads(capsys, tmp_path, line):
    with ClipWriter(tmp_path / "clip") as clip:
        clip.add(0, 0, torch.zeros(3, 4, 4), Camera(torch.eye(4), torch.eye(3), 4, 4))
    (tmp_path / "me.jpg").write_bytes(b"a picture")
    for out in (tmp_path, tmp_path / "clip"):
        if out == tmp_path or not line.startswith("track"):
            assert main([*line.format(tmp_path).split(), "--out", str(out)]) == 2
            assert "give --out a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "me.jpg").exists() and (tmp_path / "clip/transforms.json").exists()


def test_debug_lets_the_traceback_through(command):
    command(raising(UserError("bad")))
    for argv in (["--debug", "probe"], ["probe", "--debug"]):
        with pytest.raises(UserError, match="bad"):
            main(argv)


def test_a_reader_that_leaves_is_no_error():
    """`geodiff4d COMMAND | head` ends quietly, without a traceback."""
    code = "import sys; sys.argv = ['geodiff4d', 'doctor', '--help']; from geodiff4d.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err


def test_doctor_survives_broken_probes(monkeypatch, capsys):
    def broken():
        """Device: broken on purpose."""
        raise RuntimeError("[no] device")

    for name in ("torch_device", "numba_compiler"):
        monkeypatch.setattr(doctor, name, broken)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "needs attention: Device, Device" in out
    assert "[no] device" in out
    assert "extra gpu" in out and "extra data" in out


def test_doctor_looks_where_the_detector_does(monkeypatch, tmp_path):
    monkeypatch.setenv("GEODIFF4D_TRACK_ENV", str(tmp_path))
    (finding,) = doctor.mediapipe()
    assert finding.state == "missing" and "optional: a second detector" in finding.detail
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    (finding,) = doctor.mediapipe()
    assert (finding.state, finding.detail) == ("ok", str(tmp_path / "bin/python"))


def test_doctor_names_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ["numpy", "no-such-package"])
    (finding,) = doctor.core_packages()
    assert (finding.state, finding.detail) == ("failed", "missing: no-such-package")


def test_progress_is_quiet_when_fast_and_speaks_when_slow(monkeypatch, capsys):
    assert list(progress.bar(range(3), "rendering")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    assert list(progress.bar(iter("abcd"), "rendering", total=4)) == list("abcd")
    assert capsys.readouterr().err.splitlines() == ["rendering: 2/4 in 12 s", "rendering: 4/4 in 30 s"]


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.bar([1, 2], "rendering")) == [1, 2]
    assert "2/2" in capsys.readouterr().err
