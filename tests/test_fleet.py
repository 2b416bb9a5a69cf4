"""Fleets of jobs, and recipes of weights: each is done once and whole, whatever fails, dies or is given again."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from geodiff4d.cli import COMMANDS, _recipe, main
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import save_model
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.core.weights import MOST_BYTES, weights_folder
from geodiff4d.data.footage.clips import clips_below
from geodiff4d.data.sampling import open_footage
from geodiff4d.launch import fleet
from geodiff4d.launch.fleet import LocalCrew, run_fleet
from geodiff4d.launch.jobs import Job, Outcome, lost, read_jobs
from geodiff4d.launch.ray_cluster import RayCrew
from geodiff4d.launch.recipe import RECIPES, RecipeRun, plan_lines, read_recipe
from mini_datasets import COLOUR_MATRIX, make_nersemble, performance

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
        return [(tickets[0], lost(job, "no power") if code is None else Outcome(job.name, code, 0.1, f"said {code}"))]

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
    assert any("was lost (no power)" in a["said"] for a in attempts)
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
        ('{"name": "failed.json", "run": "track a --out {out}"}', "a file of the fleet's own"),
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


def test_jobs_stay_on_the_gpus_that_were_given(tmp_path, monkeypatch):
    """A scheduler may give two of a machine's eight, by number or by name."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fleet, "run_job", lambda job, folder, env, stop: told.append(env["CUDA_VISIBLE_DEVICES"]))
    for given, expected in (("3,GPU-8f", {"3", "GPU-8f"}), (None, {"0", "1"})):
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        crew = LocalCrew(tmp_path)
        for ticket in [crew.start(Job(f"{i}", QUICK)) for i in range(8)]:
            ticket.result()
        crew.close()
        assert set(told) <= expected and told
        told.clear()


@pytest.mark.parametrize("name", ["studio", "view", "live", "fleet"])
def test_what_never_ends_is_no_job(tmp_path, capsys, name):
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"name": "x", "run": f"{name} --out {{out}}"}))
    assert main(["fleet", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "no command of a fleet" in capsys.readouterr().err


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


@pytest.mark.slow
def test_what_a_lab_has_many_of_are_jobs(tmp_path):
    """Data sets, people of the open world, stores and evaluations, each two jobs; what they leave is one folder."""
    make_nersemble(tmp_path / "sets", performance(timesteps=2), COLOUR_MATRIX)
    people = "synth {out} --preset debug --subjects 1 --frames 2 --views 2 --workers 1"
    measure = "--preset debug --subjects 1 --sequences 1 --cameras 1 --frames 2 --methods mesh_warp --workers 1"
    rounds = {
        "clips": {
            "set": f"import nersemble {tmp_path}/sets {{out}} --size 96 --workers 1",
            "limited": f"import nersemble {tmp_path}/sets {{out}} --size 96 --limit 1 --workers 1",
            "w0": f"{people} --seed 0", "w1": f"{people} --seed 1",
        },
        "rest": {
            "stored": f"encode {tmp_path}/clips/w0/out --out {{out}} --workers 1",
            "stored_too": f"encode {tmp_path}/clips/w1/out --out {{out}} --workers 1",
            "self": f"evaluate self --data {tmp_path}/clips/w0/out {measure} --out {{out}}",
            "cross": f"evaluate self --data {tmp_path}/clips/w1/out {measure} --out {{out}}",
        },
    }  # fmt: skip
    for name, jobs in rounds.items():
        lines = [json.dumps({"name": k, "run": v}) for k, v in jobs.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        given = ["fleet", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / name), "--workers", "2"]
        assert main(given) == 0, (tmp_path / name / "failed.json").read_text()
        assert {p.parent.name for p in (tmp_path / name).glob("*/job.json")} == set(jobs)
    assert len(open_footage(tmp_path / "rest").takes) == 2, "stores of two jobs are one"
    assert len(clips_below(tmp_path / "clips")) == 4
    assert all(list((tmp_path / "rest" / name / "out").glob("*.json")) for name in ("self", "cross"))


PATIENT = {
    "RAY_raylet_start_wait_time_s": "300", "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_gcs_server_request_timeout_seconds": "120", "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "30000", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
"""Ray on a machine that does other things: its own limits are five seconds."""


class RayNodes:
    """Node processes of a Ray cluster on this machine, each with all that it starts in a process group of its own."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.folders: list[str] = []

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start a node and wait until it says that it runs."""
        given = ["start", "--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", *words]
        number, until = len(self.nodes), time.monotonic() + 300
        with (self.folder / f"node{number}.log").open("xb") as log:
            node = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", *given], stdout=log, stderr=log,
                                    env=os.environ | PATIENT,
                                    start_new_session=True)  # fmt: skip
        self.nodes.append(node)
        while "Ray runtime started" not in (said := (self.folder / f"node{number}.log").read_text()):
            assert node.poll() is None and time.monotonic() < until, said[-2000:]
            time.sleep(0.2)
        return node

    def head(self) -> "subprocess.Popen[bytes]":
        # A folder of its own (paths in it must be short): Ray believes the last head that a folder knows to be running.
        self.folders.append(tempfile.mkdtemp(prefix="ray"))
        words = "--head", f"--port={self.port}", f"--temp-dir={self.folders[-1]}", "--include-dashboard=false"
        return self.start(*words)

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.start(f"--address=127.0.0.1:{self.port}")

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """Kill a node with all that it started, some of which left its process group."""
        with suppress(psutil.NoSuchProcess):
            for process in (*psutil.Process(node.pid).children(recursive=True), node):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        node.wait()

    def close(self) -> None:
        for node in self.nodes:
            self.kill(node)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray_nodes(tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    nodes = RayNodes(tmp_path, port)
    yield nodes
    nodes.close()


@pytest.mark.slow
def test_a_ray_cluster_may_lose_a_machine_and_its_head(tmp_path, ray_nodes):
    """Three nodes; one is killed in mid-run, then the head, which comes back with new ones: nothing is done twice.

    GEODIFF4D_FLEET_JOB is another command for the jobs, with `{out}`.
    """
    job = os.environ.get("GEODIFF4D_FLEET_JOB", "synth {out} --help")
    lines = [json.dumps({"name": f"job{i}", "run": job}) for i in range(60)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    head, workers = ray_nodes.head(), [ray_nodes.worker() for _ in range(2)]
    words = ["fleet", tmp_path / "jobs.jsonl", "--out", tmp_path / "out", "--ray", f"127.0.0.1:{ray_nodes.port}"]
    command = [sys.executable, "-m", "geodiff4d", *map(str, words)]

    def wait_for(done: int) -> dict[str, int]:
        until = time.monotonic() + 3600
        while len(list(tmp_path.glob("out/*/job.json"))) < done and fleet.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("out/*/job.json")}

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | PATIENT, **pipes) as fleet:
        try:
            wait_for(15)
            ray_nodes.kill(workers[0])
            first = wait_for(30)
            ray_nodes.kill(head)
            time.sleep(2)
            ray_nodes.head()
            ray_nodes.worker()
            out, err = fleet.communicate(timeout=3600)
        finally:
            fleet.kill()
    assert fleet.returncode == 0, err[-2000:]
    assert "60 of 60 jobs done" in out and "was lost: waiting for its head" in err and "is back" in err
    records = wait_for(60)
    assert len(records) == 60 and 30 <= len(first) < 60
    assert all(records[name] == when for name, when in first.items()), "done twice"
    attempts = [json.loads(line) for line in (tmp_path / "out/fleet.jsonl").read_text().splitlines()]
    assert sorted(a["name"] for a in attempts if a["code"] == 0) == sorted(records)
    print(f"{len(attempts)} attempts, {sum(a['code'] == -9 for a in attempts)} lost with their machine")


@pytest.mark.slow
def test_a_ray_cluster_that_stays_away_ends_the_fleet_in_one_line(tmp_path, ray_nodes):
    with pytest.raises(UserError, match="no cluster answers") as error:
        RayCrew(tmp_path / "out", f"127.0.0.1:{ray_nodes.port}", patience_s=0)
    assert "\n" not in str(error.value)
    head = ray_nodes.head()
    crew = RayCrew(tmp_path / "out", f"127.0.0.1:{ray_nodes.port}", patience_s=1)
    try:
        ticket = crew.start(Job("a", QUICK))
        assert crew.finished([ticket])[0][1].code == 0
        ray_nodes.kill(head)
        with pytest.raises(UserError, match=r"did not come back.*same command again"):
            crew.finished([crew.start(Job("b", QUICK))])
    finally:
        crew.close()
    assert Job("a", QUICK).done(tmp_path / "out") and not Job("b", QUICK).done(tmp_path / "out")


SLURM = Path(__file__).parents[1] / "configs/slurm"


@pytest.fixture
def slurm(tmp_path):
    """A SLURM that only notes what it is asked, and steps that run until they are told to end."""
    tools = tmp_path / "bin"
    tools.mkdir()
    noted = f'echo "$(basename "$0") $*" >> {tmp_path}/calls\n'
    # A fleet outlives the beginning of the nodes that it runs on.
    begun = f'for i in {{1..200}}; do [[ $(grep -c "ray start" {tmp_path}/calls) == 2 ]] && break; sleep 0.02; done\n'
    ends = 'trap "exit 143" TERM INT\n[[ $LASTS ]] && for i in {1..200}; do sleep 0.05; done\nexit ${CODE:-0}\n'
    for name, does in {
        "scontrol": f'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else {noted.strip()}; fi\n',
        "srun": noted + ends, "geodiff4d": noted + begun + ends,
    }.items():  # fmt: skip
        (tools / name).write_text("#!/bin/bash\n" + does)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "4242", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}

    def start(script: str, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
        path = {"PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", SLURM / script, *words], env=os.environ | job | path | environment)

    return start, tmp_path / "calls"


@pytest.mark.parametrize(("script", "lasts"), [("train.sh", "torchrun"), ("fleet.sh", "geodiff4d fleet")])
def test_slurm_jobs_begin_everywhere_and_go_back_into_the_queue(slurm, script, lasts):
    start, calls = slurm
    assert start(script, "a file", "--out", "b").wait(20) == 0
    said = calls.read_text()
    assert "requeue" not in said and "a file --out b" in said and "node1:24242" in said
    if script == "train.sh":
        assert "--nnodes 2 --nproc-per-node 8" in said and "-m -- geodiff4d train a file" in said
    else:
        heads, workers = (
            line for line in sorted(said.splitlines(), key=lambda x: "--address" in x) if "ray start" in line
        )
        assert "--nodes=1" in heads and "--nodelist node1" in heads and "--num-gpus 8" in heads
        assert "--nodes=1 --ntasks=1 --overlap --exclude node1" in workers
    assert start(script, CODE="2").wait(20) == 2 and "requeue" not in calls.read_text(), "a mistake is not tried again"
    calls.unlink()
    job = start(script, LASTS="yes")
    until = time.monotonic() + 20
    while (not calls.exists() or lasts not in calls.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 143 and "scontrol requeue 4242" in calls.read_text()


def _drive(folder: Path) -> None:
    crew = LocalCrew(folder, 3)
    tally = run_fleet([Job(f"job{i}", QUICK) for i in range(40)], folder, crew)
    crew.close()
    sys.exit(tally.done != 40)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _drive(Path(sys.argv[1]))
