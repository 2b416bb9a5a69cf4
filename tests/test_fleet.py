"""Fleets of jobs, and recipes of weights: each is done once and whole, whatever fails, dies or is given again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geodiff4d.cli import COMMANDS, _recipe, main
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import save_model
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.weights import MOST_BYTES, weights_folder
from geodiff4d.launch.fleet import LocalCrew, run_fleet
from geodiff4d.launch.jobs import Job, Outcome, read_jobs
from geodiff4d.launch.recipe import RECIPES, RecipeRun, plan_lines, read_recipe

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


STAGES = """
[stage.codec]
command = "train vae --data {data} --out {out} --seed {seed} --workers {workers}"
makes = "codec"
data = "people"
steps = "6"
hours = 0.5
machine = "one core"

[stage.model]
command = "train image --vae {codec}/vae --out {out}"
makes = "model"
data = "the same"
steps = "4"
hours = 2
machine = "one core"
needs = ["codec"]
photographs = true
weights = { "embedded" = "model" }
figures = [{ key = "psnr", what = "PSNR [dB]", shipped = 30.5 }]
"""


@pytest.fixture
def pretended_stages(monkeypatch):
    """Stages that write networks of one matrix; returns what was run, and the exit codes of those that are to fail."""
    ran: list[Job] = []
    codes: dict[str, int] = {}

    def run_job(job: Job, folder: Path, environment, stop):
        ran.append(job)
        out = folder / job.name / "out"
        for part in {"codec": ["vae"], "model": ["model/unet", "model/vae"]}[job.name]:
            save_model(out / part, {}, {"w": torch.linspace(-1, 1, 8192).view(64, 128)})
        (out / "log.jsonl").write_text('{"psnr": 29.5}\n{"psnr": 31.0}\n{"step": 9}\n{"ps')
        code = codes.get(job.name, 0)
        return Outcome(job.name, code, 36.0, "no space left on device" if code else "")

    monkeypatch.setattr(_recipe, "run_job", run_job)
    return ran, codes


def test_a_recipe_is_carried_out_once_and_goes_on_where_it_failed(tmp_path, capsys, pretended_stages):
    ran, codes = pretended_stages
    (tmp_path / "r.toml").write_text(STAGES)
    (tmp_path / "people").mkdir()
    out, codes["model"] = tmp_path / "out", 2
    given = ["train", "all", "--recipe", str(tmp_path / "r.toml"), "--out", str(out), "--seed", "7"]
    given += ["--photographs", str(tmp_path / "people")]
    assert main([*given, "--dry-run"]) == 0 and not ran and not out.exists()
    assert "2 stages, 2.5 h, 2.5 h left" in capsys.readouterr().out
    assert main(given) == 2
    assert "stage model failed (no space left on device)" in capsys.readouterr().err
    codes.clear()
    assert main(given) == 0
    assert [job.name for job in ran] == ["codec", "model", "model"], "what is done is not done again"
    assert ran[0].command[-3:] == ("7", "--workers", "2") and f"{out / 'codec/out'}/vae" in ran[1].command
    assert ran[1].command[-2:] == ("--photographs", str(tmp_path / "people"))
    assert "| model | PSNR [dB] | 31 | 30.5 |" in (out / "figures.md").read_text()
    assert json.loads((out / "figures.json").read_text())["stages"]["model"]["figures"]["psnr"]["value"] == 31.0
    assert sorted(p.name for p in (out / "weights/embedded").glob("*/")) == ["unet", "vae"]
    sizes = [(out / f"weights/embedded/{part}/model.safetensors").stat().st_size for part in ("unet", "vae")]
    assert sizes[0] < sizes[1] / 3, "the denoiser is packed, the codec is not"
    capsys.readouterr()
    assert main(["train", "all", "--recipe", str(tmp_path / "r.toml"), "--out", str(out)]) == 2
    assert "made by another recipe" in capsys.readouterr().err, "another seed makes other networks"
    assert main([*given, "--steps", "3"]) == 2 and len(ran) == 3


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        (STAGES, "", "has no stages"),
        (STAGES, "stage", "cannot be read as TOML"),
        ('"train vae', '"dance', "cannot be a stage"),
        ('"train vae', '"train all', "cannot be a stage"),
        ("--vae {codec}/vae --out {out}", "--vae {codec}/vae", "does not write to"),
        ('needs = ["codec"]', "", "{codec} is neither"),
        ('needs = ["codec"]', 'needs = ["codek"]', "needs codek, which does not come before it"),
        ("hours = 2", "hours = 'long'", "is no stage"),
        ('"embedded" =', '"embedded/vae" =', "no name for a folder of weights"),
        ("hours = 2", "hours = 2\nhuors = 3", "unknown huors"),
        ("[stage.codec]", "[stage.weights]", "cannot be a stage's name"),
        ("[stage.codec]", "networks = 'mine'\n[stage.codec]", 'expected "own" or "shipped"'),
    ],
)
def test_recipes_that_make_no_sense_are_told(tmp_path, was, now, says):
    (tmp_path / "r.toml").write_text(STAGES.replace(was, now))
    with pytest.raises(UserError, match=re.escape(says)):
        read_recipe(tmp_path / "r.toml", ["train"])


@pytest.mark.parametrize("name", ["debug", "embedded"])
def test_the_recipes_make_every_network_that_ships(tmp_path, name):
    run = RecipeRun(read_recipe(RECIPES / f"{name}.toml", list(COMMANDS)), tmp_path)
    made = {folder for stage in run.recipe.stages for folder in stage.weights}
    assert made >= {p.name for p in weights_folder("").glob("*/") if any(p.rglob("*.safetensors"))}
    assert len(plan_lines(run)) == len(run.recipe.stages) + 1


def test_all_weights_that_ship_are_small(monkeypatch):
    sizes = [file.stat().st_size for file in weights_folder("").rglob("*.safetensors")]
    assert len(sizes) >= 8 and sum(sizes) <= MOST_BYTES
    monkeypatch.setenv("GEODIFF4D_WEIGHTS", "/mine")
    assert weights_folder("reader") == Path("/mine/reader")


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
