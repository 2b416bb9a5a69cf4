"""Fleets of jobs: each is done once and whole, whatever fails, dies or is given again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.launch.fleet import LocalCrew, run_fleet
from geodiff4d.launch.jobs import Job, Outcome, read_jobs

QUICK = ("--version", "{out}")
"""The cheapest command there is."""


class Pretended:
    """A crew that carries nothing out: `answer` says what comes of a job's attempt, None being a lost machine."""

    places = 2

    def __init__(self, folder: Path, answer: Callable[[str, int], int | None]):
        self.folder, self.answer, self.attempts = folder, answer, []

    def start(self, job):
        self.attempts.append(job.name)
        return len(self.attempts) - 1, job

    def finished(self, tickets):
        number, job = tickets[0]
        code = self.answer(job.name, self.attempts[: number + 1].count(job.name))
        if code == 0:
            (self.folder / job.name).mkdir(parents=True, exist_ok=True)
            (self.folder / job.name / "job.json").write_text(json.dumps({"job": fingerprint(job)}))
        return [(tickets[0], None if code is None else Outcome(job.name, code, 0.1, f"said {code}"))]

    def close(self) -> None: ...


def test_what_fails_is_tried_again_and_then_told(tmp_path):
    answers = {"good": [0], "late": [1, -11, 0], "never": [1, 1, 1], "wrong": [2], "lost": [None, 0]}
    crew = Pretended(tmp_path, lambda name, attempt: answers[name][attempt - 1])
    jobs = [Job(name, QUICK) for name in answers]
    tally = run_fleet(jobs, tmp_path, crew, retries=2)
    assert tally.done == 3 and tally.skipped == 0 and sorted(tally.failed) == ["never", "wrong"]
    assert {name: crew.attempts.count(name) for name in answers} == {k: len(v) for k, v in answers.items()}
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert failed["never"]["attempts"] == 3 and failed["never"]["said"] == "said 1" and failed["wrong"]["code"] == 2
    attempts = [json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines()]
    assert len(attempts) == 10 and [a["code"] for a in attempts if a["name"] == "lost"] == [-9, 0]
    again = Pretended(tmp_path, lambda name, attempt: 0)
    changed = [replace(job, command=("doctor", "{out}")) if job.name == "good" else job for job in jobs]
    tally = run_fleet(changed, tmp_path, again)
    assert sorted(again.attempts) == ["good", "never", "wrong"], "another command under a name is another job"
    assert (tally.done, tally.skipped) == (5, 2) and json.loads((tmp_path / "failed.json").read_text()) == {}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is no job"),
        ('{"name": "a"}', "is no job"),
        ('{"name": "../a", "run": "track a --out {out}"}', "no name for a folder"),
        ('{"name": "a", "run": "dance {out}"}', "no command of a fleet"),
        ('{"name": "a", "run": "track a --out b"}', "does not write to"),
        ('{"name": "x", "run": "track a --out {out}"}', "stands twice"),
        ("", "no jobs"),
    ],
)
def test_files_of_jobs_that_make_no_sense_are_told_by_their_line(tmp_path, line, says):
    first = '{"name": "x", "run": ["track", "my face.png", "--out", "{out}"]}\n\n'
    (tmp_path / "jobs.jsonl").write_text((first if line else "") + line)
    with pytest.raises(UserError, match=says) as error:
        read_jobs(tmp_path / "jobs.jsonl", ["track"])
    assert ", line 3" in str(error.value) or not line


def test_words_go_to_the_jobs_own_folder(tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"name": "x", "run": "track \'my face.png\' --out {out}/clip"}')
    (job,) = read_jobs(tmp_path / "jobs.jsonl", ["track"])
    assert job.words(Path("/f")) == ["track", "my face.png", "--out", "/f/x/out/clip"]


def test_jobs_run_in_processes_of_their_own(tmp_path):
    jobs = [Job("good", QUICK), Job("bad", ("no such command", "{out}"))]
    crew = LocalCrew(tmp_path, 2)
    try:
        tally = run_fleet(jobs, tmp_path, crew, retries=1)
    finally:
        crew.close()
    assert tally.done == 1 and tally.failed["bad"]["attempts"] == 1 and "unknown command" in tally.failed["bad"]["said"]
    assert "geodiff4d" in (tmp_path / "good/log.txt").read_text()
    assert json.loads((tmp_path / "good/job.json").read_text())["command"][0] == "--version"


def test_a_fleet_ends_with_what_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        LocalCrew, "__new__", lambda cls, folder, workers: Pretended(folder, lambda n, a: int(n == "a"))
    )
    lines = [json.dumps({"name": n, "run": "track x --out {out}"}) for n in "ab"]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    given = ["fleet", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*given, "--retries", "0"]) == 2
    said = capsys.readouterr()
    assert "1 of 2 jobs done" in said.out and "a first (said 1)" in said.err and "failed.json" in said.err
    assert main([*given, "--workers", "0"]) == 2 and main([*given, "--workers", "1", "--ray", "auto"]) == 2


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_when_the_driver_dies(tmp_path):
    """The driver is killed in mid-run; jobs end with it, and the next one does what is left."""
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command) as driver:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("*/job.json"))) < 10 and time.monotonic() < until:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    time.sleep(1)
    finished = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/job.json")}
    assert 10 <= len(finished) < 40
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in p.read_text(errors="replace")]
    done = subprocess.run(command, check=False, timeout=300)
    assert done.returncode == 0
    records = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/job.json")}
    assert len(records) == 40 and all(records[name] == when for name, when in finished.items())
    assert not list(tmp_path.glob("*/*.part"))


def _drive(folder: Path) -> None:
    crew = LocalCrew(folder, 3)
    tally = run_fleet([Job(f"job{i}", QUICK) for i in range(40)], folder, crew)
    crew.close()
    sys.exit(tally.done != 40)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _drive(Path(sys.argv[1]))
