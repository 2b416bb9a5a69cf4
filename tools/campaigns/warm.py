"""Run commands of geodiff4d in forked copies of one warm process, watched from outside.

Starting Python and importing torch takes seconds; a fork of a process that has done so takes milliseconds. Every call
gets a session, a log and limits of its own, and is killed with all its children when its time is over. What it did
comes back as an `Outcome`: the exit code, the traceback of a defect, memory, processes that outlived it, and files that
it opened where it had no business.
"""

import importlib
import io
import json
import os
import pickle
import pkgutil
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from os import _exit as leave
from pathlib import Path

# numba's own thread pool survives a fork, OpenMP's does not.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PRINTED = 4000
"""Characters of a command's output that are kept."""
MEMORY_BYTES = 6 * 1024**3
"""What a command may map beyond what the warm process has."""
PATIENCE = 10
"""How much longer than its limit of processor time a command may take by the clock."""
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int | None
    """Its exit code; negative: the signal that ended it; None: its time was over."""
    seconds: float
    peak_bytes: int
    """Memory at its peak, without what the warm process had."""
    text: str
    """The end of its output."""
    traceback: str = ""
    """Of an exception that no user should see."""
    left: list[str] = field(default_factory=list)
    """Processes that were still there after it ended."""
    trespasses: list[str] = field(default_factory=list)
    """Files outside its folders that it opened, programs and connections."""

    @property
    def where(self) -> str:
        """Return the defect's kind and the package's line that it came from."""
        lines = self.traceback.strip().splitlines()
        inside = [line.strip() for line in lines if "/geodiff4d/" in line and "cli/__init__" not in line]
        return f"{lines[-1][:160]} @ {inside[-1].split('/geodiff4d/')[-1]}" if lines and inside else "".join(lines[-1:])


def import_everything() -> None:
    """Import the package's modules, so that forks have them."""
    import geodiff4d

    for module in pkgutil.walk_packages(geodiff4d.__path__, "geodiff4d."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # an extra that is not installed
                continue
    import torch

    torch.set_num_threads(1)


def warm_up(corpus: Path) -> None:
    """Run a few commands here, so that forks find kernels compiled, networks loaded and lazy imports done."""
    from geodiff4d.cli import main

    people = f"--portrait {corpus}/world/train_0 --driving {corpus}/world/train_1 --preset debug"
    lines = (
        f"track {corpus}/me.mp4 --size 64 --limit 2 --out track", f"animate {people} --generator warp --out warp",
        f"animate {people} --model {corpus}/runs/image/model --frames 1 --out animate",
        f"fit {corpus}/warp --preset debug --iterations 2 --out fit", f"export {corpus}/avatar a.ply",
        f"train vae --preset debug --data {corpus}/stores --workers 0 --steps 1 --out vae",
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as name,
        chdir(name),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        for line in lines:
            assert main(line.split()) == 0, line


@dataclass(frozen=True)
class Job:
    """One command line for `Runner`."""

    words: Sequence[str]
    folder: Path
    """Its working directory; files may be opened in it, in `allowed` and in the installation."""
    allowed: Sequence[Path] = ()
    before: Callable[[], None] | None = None
    """Called in the fork."""


class Runner:
    """A fork of the warm process that does jobs one after another; a new one takes its place when it ends."""

    def __init__(self, jobs: int = 1, memory: bool = True):
        self.jobs, self.memory = jobs, memory
        """How many jobs a fork does, and whether its memory is limited."""
        self.log = Path(tempfile.gettempdir()) / f"campaign-{os.getpid()}-{id(self)}.log"
        self.pid, self.done = 0, 0

    def call(self, job: Job, limit_s: float = 60.0, kill_at_s: float | None = None) -> Outcome:
        """Do one job and wait for it; `kill_at_s` is when to kill it, as a power cut would.

        `limit_s` is of the processor's time; of the clock's, a machine that does other things needs `PATIENCE` times
        as much.
        """
        log = self.log
        if not self.pid:
            self.start()
        start = time.monotonic()
        os.write(self.writing, pickle.dumps((list(job.words), job.folder, log, job.allowed, job.before)))
        begun, ready = _processor_s(self.pid), []
        deadline = start + (PATIENCE * limit_s if kill_at_s is None else kill_at_s)
        while not ready and time.monotonic() < deadline and _processor_s(self.pid) - begun < limit_s:
            ready, _, _ = select.select([self.reading], [], [], min(1.0, max(0.0, deadline - time.monotonic())))
        said = os.read(self.reading, 1 << 16) if ready else b""
        about, code = json.loads(said) if said else {}, None
        if said:
            code = about["code"]
        else:
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            code = None if not ready and kill_at_s is None else os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        self.done += 1
        # A fork that has children, as one that is through, is looked at after its end: so a command's process ends too.
        # Looking through all processes takes longer than many a job.
        pid = self.pid
        over = not said or self.done >= self.jobs or bool(about["traceback"]) or bool(_children(pid))
        if over:
            self.close()
        left = _end_session(pid) if over else []
        text = log.read_text(errors="replace")[-PRINTED:] if log.exists() else ""
        log.unlink(missing_ok=True)
        peak = about.get("peak", 0)
        return Outcome(code, seconds, peak, text, about.get("traceback", ""), left, about.get("trespasses", []))

    def start(self) -> None:
        """Fork."""
        reading, self.writing = os.pipe()
        self.reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid, self.done = os.fork(), 0
        if self.pid == 0:
            os.close(self.reading)
            os.close(self.writing)
            _serve(reading, writing, self.memory)
        os.close(reading)
        os.close(writing)

    def close(self) -> None:
        """End the fork."""
        for end in (self.reading, self.writing):
            os.close(end)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        self.pid = 0


def call(words: Sequence[str], folder: Path, limit_s: float = 600.0, kill_at_s: float | None = None) -> Outcome:
    """Run `geodiff4d WORDS` in `folder`, in a fork of its own, without a limit on memory."""
    runner = Runner(memory=False)
    try:
        return runner.call(Job(words, folder), limit_s, kill_at_s)
    finally:
        if runner.pid:
            runner.close()


def _serve(reading: int, writing: int, memory: bool) -> None:
    """Be the fork: never returns."""
    try:
        os.setsid()
        _keep_niceness()
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
        if memory:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))
        watch = Watch()
        while said := os.read(reading, 1 << 16):
            words, folder, log, allowed, before = pickle.loads(said)  # noqa: S301 (our own)
            os.write(writing, json.dumps(_do(words, folder, log, allowed, before, watch)).encode()[: 1 << 16])
    finally:
        leave(70)


def _keep_niceness() -> None:
    """Let a new session be as nice as its processes: Linux shares the processor out among sessions first."""
    try:
        Path("/proc/self/autogroup").write_text(str(os.nice(0)))
    except OSError:  # a kernel without such groups
        return


def _do(words, folder: Path, log: Path, allowed, before, watch: "Watch") -> dict:
    os.chdir(folder)
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.close(to)
    code, trace = 70, ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = _memory("VmRSS")
    try:
        if before:
            before()
        with watch.over([str(p.resolve()) for p in (folder, *allowed)]):
            code, trace = _main(words)
    except BaseException:
        trace = traceback.format_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    peak = max(0, _memory("VmHWM") - base)
    trespasses = sorted(set(watch.seen))[:20]
    return {"code": code, "traceback": trace[-12_000:], "trespasses": trespasses, "peak": peak}


def _memory(what: str) -> int:
    """Return a line of the process's status [bytes]."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{what}:")[2].split()[0])


def _main(words: list[str]) -> tuple[int, str]:
    """Call the command line as `geodiff4d` does, and keep the traceback of what it would call a defect."""
    from geodiff4d.cli import explain, main

    warnings.simplefilter("always", append=True)
    try:
        return main([*words, "--debug"]), ""
    except KeyboardInterrupt:
        return 130, ""
    except Exception as error:
        text, code = explain(error)
        print(text, file=sys.stderr)
        return code, traceback.format_exc() if code == 1 else ""


class Watch:
    """Notes files that are opened elsewhere than in the allowed folders and the installation, and programs."""

    def __init__(self):
        import numpy as np

        import geodiff4d
        from geodiff4d.provenance.credentials import local_path

        ours = (
            Path(geodiff4d.__file__).parents[2],
            np.__path__[0] + "/..",
            sys.prefix,
            sys.base_prefix,
            Path.home() / ".cache",
            local_path().parent,
        )
        self.installed = (*map(os.path.realpath, ours), "/proc", "/sys", "/dev", "/usr", "/lib", "/etc", "/opt")
        self.on, self.fine, self.seen = False, (), []
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, allowed: list[str]):
        """Watch while the block runs."""
        self.on, self.fine, self.seen = True, (*allowed, *self.installed), []
        try:
            yield
        finally:
            self.on = False

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0])
            if not path.startswith(self.fine):
                self.seen.append(f"open {path}")
        elif event in WATCHED and arguments[0] not in ("git", "uname"):
            self.seen.append(f"{event} {str(arguments)[:120]}")


def _end_session(session: int, grace_s: float = 2.0) -> list[str]:
    """Wait a moment for what a command started to end with it; kill and name what does not."""
    deadline = time.monotonic() + grace_s
    while (members := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in members:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return [f"{pid} {name}" for pid, name in members.items()]


def _processor_s(pid: int) -> float:
    """Return the processor time of a process [s], without its children's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[str]:
    """Return the numbers of a process's children."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _members(session: int) -> dict[int, str]:
    """Return the living processes of a session by number."""
    out = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text(errors="replace").partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, _, _, of = rest.split()[:4]
        if int(of) == session and state not in "ZX":
            out[int(stat.parent.name)] = name
    return out
