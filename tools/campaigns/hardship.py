"""A full disk, a folder that turns read-only, two commands at once, odd clocks and locales, at every stage that writes.

Usage: `.venv/bin/python tools/campaigns/hardship.py --moments 3 --seed 0 --work FOLDER`. The stages, and the quiet runs
that they are compared with, are kill.py's.

- full: the command writes to a tmpfs of a size drawn between nothing and what the quiet run wrote. Every other time a
  finished result lies there already, and the space beside it is what is short.
- read-only: that tmpfs is remounted read-only at a random moment.
- two: the same command twice into one place, the second at a random distance; one of them may be refused.
- clock: 1970, 2040, a clock that runs backwards, and time zones 14 hours ahead and 12 behind.
- locale: ASCII alone (LC_ALL=C, and POSIX, without Python's UTF-8 mode) and Turkish, in folders of odd names.

A command may end with exit code 0, or with 2 and one line. Nothing half-written stays, a finished result is as it was,
and the same command, given space and rights again, ends as the quiet run did. Exit code 1 if anything was otherwise.
Mounts need root and Linux; they are made in a mount namespace of their own, and end with this process.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import corpus
from kill import STAGES, Stage, contents, fresh
from warm import Job, Outcome, Runner, call, import_everything, warm_up

CLONE_NEWNS = 0x20000
CLOCKS: tuple[float | None, ...] = (0.0, 2208988800.0, None)
"""What `time.time` gives [s since 1970]; None: it runs backwards from now."""
ZONES = ("AHEAD-14", "BEHIND12")
LOCALES = ("C", "POSIX", "tr_TR.UTF-8")
FOLDERS = ("Straße ñ", "人", "tab\tand 'quotes'")
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@dataclass(frozen=True)
class Trial:
    """One stage under one hardship."""

    stage: Stage
    words: list[str]
    work: Path
    seconds: float
    """Of the quiet run, whose files are in `work/quiet`."""
    expected: dict[str, str]
    random: Random
    number: int

    def wrong(self, folder: Path) -> list[str]:
        """Return how a folder differs from the quiet run's."""
        found, expected = contents(folder), self.expected
        names = sorted(expected.keys() | found.keys())
        return [f"different: {name}" for name in names if expected.get(name) != found.get(name)][:4]

    def spoilt(self, folder: Path) -> list[str]:
        """Return which files of a finished result are gone or others than the quiet run's."""
        found = contents(folder)
        return [f"different: {name}" for name, value in self.expected.items() if found.get(name) != value][:4]

    def again(self, folder: Path) -> list[str]:
        """Give the same command again, without hardship; returns what is wrong then."""
        done = call(self.words, folder)
        # Some commands take new names only: what was finished before is refused, and stays.
        fine = done.code == 0 or (done.code == 2 and f"{self.stage.out} exists" in done.text)
        ended = [] if fine else [f"then {done.code}: {done.text[-300:]} {done.where}"]
        return ended + half_written(folder) + self.wrong(folder)


Tried = tuple[list[Outcome], list[str]]
"""What the commands did, and what is wrong beside their exit codes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--only", nargs="*", default=[], help="names of stages")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    mounts = own_mounts()
    import_everything()
    source = corpus.make((args.work / "corpus").resolve())
    warm_up(source)
    work, bad = args.work.resolve() / "hardship", 0
    kinds = [kind for kind in args.kinds if mounts or kind not in ("full", "read-only")]
    if kinds != args.kinds:
        print("not root: full disks and read-only folders are left out")
    print("| stage | hardship | commands | done | refused in one line | wrong |\n|---|---|---|---|---|---|", flush=True)
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        words = stage.line.format(c=source).split()
        quiet = call(words, fresh(work / "quiet"))
        assert quiet.code == 0, (stage.name, quiet)
        expected = contents(work / "quiet")
        for kind in kinds:
            tally, wrongs = Counter(), []
            for n in range(args.moments):
                random = Random(f"{args.seed} {stage.name} {kind} {n}")
                trial = Trial(stage, words, work, quiet.seconds, expected, random, n)
                outcomes, wrong = KINDS[kind](trial)
                tally.update(str(o.code) for o in outcomes)
                wrongs += [f"{n}: {w}" for w in [*wrong, *judged(outcomes)]]
            row = (sum(tally.values()), tally["0"], tally["2"], len(wrongs))
            print(f"| {stage.name} | {kind} | {' | '.join(map(str, row))} |", flush=True)
            for w in wrongs[:6]:
                print(f"  - {w}", flush=True)
            bad += len(wrongs)
    return 1 if bad else 0


def judged(outcomes: list[Outcome]) -> list[str]:
    """Return what is wrong with how commands ended."""
    wrong = [f"exit code {o.code}: {o.where or o.text[-300:]}" for o in outcomes if o.code not in (0, 2)]
    wrong += [f"no clear line: {o.text[-300:]!r}" for o in outcomes if o.code == 2 and not clear(o.text)]
    return wrong + [f"left process {p}" for o in outcomes for p in o.left]


def clear(text: str) -> bool:
    """Say whether a command ended with one line that says something, and no traceback."""
    last = text.strip().splitlines()[-1:]
    return bool(last) and len(last[0]) > 20 and "Traceback" not in text and "Exception ignored" not in text


def half_written(folder: Path) -> list[str]:
    return [f"half-written: {p.relative_to(folder)}" for p in folder.rglob("*") if p.name.endswith((".part", ".old"))]


# A file system of one's own


def own_mounts() -> bool:
    """Give this process a mount namespace of its own; returns whether the system lets it."""
    if os.geteuid() or not sys.platform.startswith("linux"):
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode == 0


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", folder], check=True)


def remount(folder: Path, option: str) -> bool:
    """Change a mount; it is refused, for one, while a file is open for writing that is to become read-only."""
    command = ["mount", "-o", f"remount,{option}", folder]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def full(t: Trial) -> Tried:
    """Run on a disk that is too small, then on one that is not."""
    files = [p for p in (t.work / "quiet").rglob("*") if p.is_file()]
    needed = sum(-(-p.stat().st_size // 4096) * 4096 for p in files)
    folder, before = t.work / "full", t.number % 2 == 1
    fresh(folder)
    room = int(needed * t.random.uniform(0, 0.95))
    mount(folder, f"size={2 * needed + 2**26}")
    try:
        if before:
            shutil.copytree(t.work / "quiet", folder, dirs_exist_ok=True)
        used = shutil.disk_usage(folder).used
        assert remount(folder, f"size={max(used + room, 4096)}")
        first = call(t.words, folder)
        wrong = half_written(folder)
        if first.code == 0:
            wrong += t.wrong(folder)
        elif before:
            # A run that the same command goes on with may lie beside what was finished.
            wrong += t.spoilt(folder)
        assert remount(folder, f"size={8 * needed + 2**28}")
        return [first], wrong + ([] if first.code == 0 else t.again(folder))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def read_only(t: Trial) -> Tried:
    """Take the right to write away at a random moment, and give it back for another try."""
    folder, over = fresh(t.work / "read_only"), threading.Event()
    mount(folder, "size=2g")

    def take() -> None:
        time.sleep(t.random.uniform(0, t.seconds))
        while not over.is_set() and not remount(folder, "ro"):
            time.sleep(0.01)

    thread, runner = threading.Thread(target=take), Runner(memory=False)
    try:
        runner.start()  # forks while there is no thread yet
        thread.start()
        first = runner.call(Job(t.words, folder), 600.0)
        over.set()
        thread.join()
        assert remount(folder, "rw")
        # What was written before is not removed either: the next run does that.
        return [first], t.wrong(folder) if first.code == 0 else t.again(folder)
    finally:
        if runner.pid:
            runner.close()
        subprocess.run(["umount", "-l", folder], check=True)


def two(t: Trial) -> Tried:
    """Run the same command twice at once."""
    folder, outcomes = fresh(t.work / "two"), []
    runners = [Runner(memory=False) for _ in range(2)]
    for runner in runners:
        runner.start()

    def follow(runner: Runner, wait_s: float) -> None:
        time.sleep(wait_s)
        outcomes.append(runner.call(Job(t.words, folder), 600.0))

    waits = (0.0, 0.0 if t.number % 2 == 0 else t.random.uniform(0, t.seconds))
    threads = [threading.Thread(target=follow, args=pair) for pair in zip(runners, waits, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runner in runners:
        if runner.pid:
            runner.close()
    wrong = [] if any(o.code == 0 for o in outcomes) else [f"neither ended: {[o.text[-150:] for o in outcomes]}"]
    return outcomes, wrong + half_written(folder) + t.wrong(folder)


@dataclass(frozen=True)
class Clock:
    """Gives the process that it is called in another time of the day, and another zone."""

    at: float | None
    zone: str

    def __call__(self) -> None:
        os.environ["TZ"] = self.zone
        time.tzset()
        real, start, at = time.time, time.time(), self.at
        time.time = (lambda: 2 * start - real()) if at is None else (lambda: at + real() - start)
        local, utc = time.localtime, time.gmtime
        time.localtime = lambda s=None: local(time.time() if s is None else s)
        time.gmtime = lambda s=None: utc(time.time() if s is None else s)


def clock(t: Trial) -> Tried:
    """Run in another year and zone."""
    folder, runner = fresh(t.work / "clock"), Runner(memory=False)
    before = Clock(CLOCKS[t.number % len(CLOCKS)], ZONES[t.number % len(ZONES)])
    done = runner.call(Job(t.words, folder, before=before), 600.0)
    if runner.pid:
        runner.close()
    return [done], t.wrong(folder) if done.code == 0 else [f"refused: {done.text[-300:]}"]


def locale(t: Trial) -> Tried:
    """Run in a new process, in a folder of an odd name."""
    folder = fresh(t.work / "locale" / FOLDERS[t.number % len(FOLDERS)])
    name = LOCALES[t.number % len(LOCALES)]
    chosen = {"LC_ALL": name, "LOCPATH": str(t.work)} if "_" in name else {"LC_ALL": name, **ASCII}
    if "LOCPATH" in chosen and not (t.work / name).exists():
        subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", t.work / name], check=False, capture_output=True)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "geodiff4d", *t.words], cwd=folder, env=os.environ | chosen, capture_output=True,
        timeout=900, check=False,
    )  # fmt: skip
    text = (done.stdout + done.stderr).decode(errors="replace")
    outcome = Outcome(done.returncode, time.monotonic() - start, 0, text)
    return [outcome], t.wrong(folder) if done.returncode == 0 else [f"refused: {text[-300:]}"]


KINDS: dict[str, Callable[[Trial], Tried]] = {
    "full": full, "read-only": read_only, "two": two, "clock": clock, "locale": locale,
}  # fmt: skip


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s")
    raise SystemExit(code)
