"""The studio: projects that outlive the server, bounded uploads, strangers refused; and a browser that goes through."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint
from geodiff4d.launch.jobs import DONE, Outcome
from geodiff4d.provenance.seal import verify
from geodiff4d.provenance.verdict import State
from geodiff4d.studio import lanes, projects
from geodiff4d.studio.projects import Store, plain_name
from geodiff4d.studio.server import COOKIE, StudioServer
from geodiff4d.studio.steps import StudioConfig, looking, making, progress
from geodiff4d.studio.tour import tour
from geodiff4d.world.expressions import ACTIONS


class Work:
    """Stands for the commands: each leaves its mark, waits at `held`, or fails as it is told."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.done: list[str] = []
        self.held, self.fails = "", ""
        patch.setattr(lanes, "run_job", self.run)

    def run(self, job, folder, environment, stop):
        place = folder / job.name
        if job.done(folder):
            return Outcome(job.name, 0, 0.0, "")
        (place / "out").mkdir(parents=True, exist_ok=True)
        (place / "log.txt").write_text("tracking: 1/4 in 1 s\nnoise\n")
        if job.name == self.held:
            stop.wait(20)
            return Outcome(job.name, -9, 0.0, "")
        if job.name == self.fails:
            return Outcome(job.name, 2, 0.0, f"geodiff4d track: {folder}/uploads/portraits/me.jpg shows no face")
        (place / "out" / "avatar.html").write_text("the page")
        (place / DONE).write_text(json.dumps({"job": fingerprint(job)}))
        self.done.append(job.name)
        return Outcome(job.name, 0, 0.0, "")


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


@contextmanager
def serving(folder: Path):
    with StudioServer(folder, "127.0.0.1", 0, StudioConfig()) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def ask(server, method: str, path: str, body: bytes | str | None = None, **headers: str):
    """Return (status, JSON or bytes)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    given = {"Cookie": f"{COOKIE}={server.store.token}", "Content-Type": "application/json"}
    given |= {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, {k: v for k, v in given.items() if v})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    kind = answer.getheader("Content-Type") or ""
    return answer.status, json.loads(data) if "json" in kind else data


def dropped(server) -> str:
    """Return the name of a project whose portrait was dropped and is looked at."""
    name = ask(server, "POST", "/projects", "{}")[1]["name"]
    assert ask(server, "PUT", f"/projects/{name}/portraits/me.jpg", b"a portrait")[0] == 200
    assert ask(server, "POST", f"/projects/{name}/look", "{}")[0] == 200
    return name


def until(server, name: str, stage: str, problem: bool = False) -> dict:
    """Wait for a project to be somewhere; returns what the page sees of it."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = next(p for p in ask(server, "GET", "/state")[1]["projects"] if p["name"] == name)
        if found["stage"] == stage and bool(found["problem"]) == problem:
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def test_from_a_portrait_to_an_avatar_over_two_servers(work, tmp_path):
    work.held = "avatar"
    with serving(tmp_path) as server:
        name, token = dropped(server), server.store.token
        until(server, name, "check")
        assert ask(server, "POST", f"/projects/{name}/make", '{"driver": false}')[0] == 400  # without consent
        assert ask(server, "POST", f"/projects/{name}/make", '{"driver": true, "consent": "self"}')[0] == 409
        assert ask(server, "POST", f"/projects/{name}/make", '{"consent": "self"}')[0] == 200
        while "clip" not in work.done:
            time.sleep(0.01)
        seen = until(server, name, "make")
        assert seen["consent"] == "self" and 0 < seen["progress"]["share"] < 1
    work.held = ""
    with serving(tmp_path) as server:
        assert server.store.token == token
        seen = until(server, name, "done")
        assert "page" in seen["files"] and seen["title"] == "me"
        assert ask(server, "GET", f"/projects/{name}/files/page")[1] == b"the page"
        assert ask(server, "GET", f"/projects/{name}/files/video")[0] == 404
    assert work.done == ["portrait", "clip", "avatar", "page", "glb", "ply", "video"]


def test_cancelling_going_on_going_back_and_deleting(work, tmp_path):
    work.held = "portrait"
    with serving(tmp_path) as server:
        name, other = dropped(server), dropped(server)
        assert ask(server, "POST", f"/projects/{name}/cancel", "{}")[0] == 200
        assert until(server, name, "look", problem=True)["cancelled"]
        work.held, work.fails = "", "portrait"
        ask(server, "POST", f"/projects/{other}/cancel", "{}")
        assert ask(server, "POST", f"/projects/{name}/again", "{}")[0] == 200
        # The last line of the command, without its name and without folders.
        assert until(server, name, "look", problem=True)["problem"] == "me.jpg shows no face"
        assert ask(server, "POST", f"/projects/{name}/back", "{}")[0] == 200
        assert until(server, name, "portrait")["portraits"] == []
        assert not (tmp_path / "projects" / name / "uploads").exists()
        assert ask(server, "POST", f"/projects/{name}/again", "{}")[0] == 409
        assert ask(server, "POST", f"/projects/{name}/delete", "{}")[0] == 200
        assert [p["name"] for p in ask(server, "GET", "/state")[1]["projects"]] == [other]
        assert not (tmp_path / "projects" / name).exists()


def test_what_was_found_can_be_corrected(work, tmp_path):
    with serving(tmp_path) as server:
        name = dropped(server)
        until(server, name, "check")
        place = tmp_path / "projects" / name
        extra = {"notes": [], "points": {"chin": [40, 60]}, "crop": [1, 2, 90], "source_size": [100, 120]}
        (place / "portrait/out/transforms.json").write_text(json.dumps({"geodiff4d": {"extra": extra}}))
        found = until(server, name, "check")["found"]
        assert found == {"points": {"chin": [40, 60]}, "crop": [1, 2, 90], "size": [100, 120]}
        for bad in ("{}", '{"points": [1]}', '{"points": {"chin": [1]}}', '{"points": {"chin": ["a", 2]}}'):
            assert ask(server, "POST", f"/projects/{name}/correct", bad)[0] == 400
        assert (place / "portrait/out/transforms.json").exists(), "a refused request removes nothing"
        assert ask(server, "PUT", f"/projects/{name}/mask/mask.png", b"a cut-out")[0] == 200
        assert ask(server, "POST", f"/projects/{name}/correct", '{"points": {"chin": [41.5, 60]}}')[0] == 200
        until(server, name, "check")
        assert work.done == ["portrait", "portrait"], "the face is looked for again"
        assert json.loads((place / "uploads/points.json").read_text()) == {"chin": [41.5, 60]}
        words = looking(server.store.get(name), place, StudioConfig())[0].job.command
        assert words[words.index("--points") + 1] == str(place / "uploads/points.json")
        assert words[words.index("--mask") + 1] == str(place / "uploads/mask/mask.png")
        # Going back to another portrait forgets both.
        assert ask(server, "POST", f"/projects/{name}/back", "{}")[0] == 200
        project = server.store.get(name)
        assert not project.mask and not project.points and not (place / "uploads").exists()
        assert ask(server, "POST", f"/projects/{name}/correct", '{"points": {"chin": [1, 2]}}')[0] == 409


def test_a_driver_that_is_exchanged_is_followed_anew(work, tmp_path):
    with serving(tmp_path) as server:
        name = dropped(server)
        until(server, name, "check")
        assert ask(server, "PUT", f"/projects/{name}/driver/talk.mp4", b"a video")[0] == 200
        work.fails = "avatar"
        ask(server, "POST", f"/projects/{name}/make", '{"consent": "permitted", "driver": true}')
        until(server, name, "make", problem=True)
        assert work.done == ["portrait", "driver", "clip"]
        ask(server, "POST", f"/projects/{name}/back", "{}")
        assert sorted(p.name for p in (tmp_path / "projects" / name).iterdir() if p.is_dir()) == ["portrait", "uploads"]


def test_bad_uploads(work, tmp_path, monkeypatch):
    monkeypatch.setitem(projects.MAX_BYTES, "portraits", 100)
    monkeypatch.setattr(projects, "MAX_PORTRAITS", 3)
    with serving(tmp_path) as server:
        name = ask(server, "POST", "/projects", "{}")[1]["name"]
        put = f"/projects/{name}/portraits"
        assert ask(server, "PUT", f"{put}/a.jpg", b"x" * 101) == (
            413,
            {"error": "the file has 101 bytes: expected 1 to 100"},
        )
        assert ask(server, "PUT", f"{put}/a.jpg", b"")[0] == 413
        assert ask(server, "PUT", f"{put}/a.jpg", b"x", Content_Length="many")[0] == 411
        assert ask(server, "PUT", f"/projects/{name}/driver/a.mp4", b"x")[0] == 409
        assert ask(server, "PUT", "/projects/000000000000/portraits/a.jpg", b"x")[0] == 404
        assert ask(server, "PUT", "/projects/../portraits/a.jpg", b"x")[0] == 404
        assert ask(server, "POST", f"/projects/{name}/look", "{}")[0] == 409  # nothing there yet
        with socket.create_connection(("127.0.0.1", server.server_port)) as cut:
            head = f"PUT {put}/cut.jpg HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {COOKIE}={server.store.token}\r\n"
            cut.sendall(f"{head}Content-Length: 50\r\n\r\nonly this".encode())
            cut.shutdown(socket.SHUT_WR)
            assert b" 400 " in cut.recv(1000)
        for given in ("a.jpg", "a.jpg", "..%2F..%2Fetc%2Fpasswd"):
            assert ask(server, "PUT", f"{put}/{given}", b"x")[0] == 200
        assert ask(server, "PUT", f"{put}/d.jpg", b"x")[0] == 413  # a fourth
        names = ["a.jpg", "2-a.jpg", "passwd"]
        assert ask(server, "GET", "/state")[1]["projects"][0]["portraits"] == names
        assert {p.name for p in (tmp_path / "projects" / name / "uploads" / "portraits").iterdir()} == set(names)


def test_strangers_and_their_requests(work, tmp_path):
    with serving(tmp_path) as server:
        name = ask(server, "POST", "/projects", "{}")[1]["name"]
        for headers in (
            {"Cookie": ""},
            {"Cookie": f"{COOKIE}=wrong"},
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
        ):
            for method, path in (
                ("GET", "/"),
                ("GET", "/state"),
                ("POST", "/projects"),
                ("PUT", f"/projects/{name}/portraits/a.jpg"),
            ):
                assert ask(server, method, path, "{}" if method == "POST" else None, **headers)[0] == 403
        status, page = ask(server, "GET", f"/?token={server.store.token}", Cookie="")
        assert status == 200 and b"studio.js" in page
        for path in ("/studio.css", "/studio.js", "/camera.js"):
            assert ask(server, "GET", path)[0] == 200
        assert ask(server, "GET", "/projects/../../token")[0] == 404
        assert ask(server, "GET", f"/projects/{name}/files/token")[0] == 404
        assert ask(server, "POST", "/projects", "{}", Content_Type="text/plain")[0] == 415
        assert ask(server, "POST", "/projects", "x" * 5000)[0] == 413
        for body in ("{", "[]", "[" * 3000):
            assert ask(server, "POST", "/projects", body)[0] == 400
        assert ask(server, "POST", f"/projects/{name}/rm", "{}")[0] == 404
        assert (tmp_path / "token").stat().st_mode & 0o077 == 0


def test_one_studio_a_folder_and_damaged_files(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="another studio"):
        Store(tmp_path)
    place = store.place(store.new().name)
    store.close()
    (place / "project.json").write_text('{"name": "elsewhere", "stage": "look"}')
    with pytest.raises(UserError, match="damaged"):
        Store(tmp_path).close()


def test_portraits_are_tracked_at_the_size_of_the_frames(tmp_path):
    """Tracked smaller, they would only be enlarged."""
    project = projects.Project("0" * 12, portraits=("a.jpg",), consent="self")
    for size in (None, 512):
        for step in looking(project, tmp_path, StudioConfig(size=size)):
            assert ("--size" in step.job.command) == (size is not None)
            assert size is None or "512" in step.job.command


def test_how_far_a_project_is(work, tmp_path):
    steps = making(projects.Project("0" * 12, consent="self"), tmp_path, StudioConfig())
    assert progress(steps, tmp_path)["share"] == 0
    work.run(steps[0].job, tmp_path, {}, threading.Event())
    (tmp_path / "avatar").mkdir()
    (tmp_path / "avatar" / "log.txt").write_text("fitting: 24.1 dB: 300/600 in 12 s\nheld out\n")
    known = progress(steps, tmp_path)
    assert [s["state"] for s in known["steps"][:3]] == ["done", "running", "waiting"]
    assert known["steps"][1]["detail"] == "fitting: 24.1 dB: 300 of 600"
    weights = [s.weight for s in steps]
    assert known["share"] == pytest.approx((weights[0] + weights[1] / 2) / sum(weights))


def test_names_of_files_are_harmless():
    given = {
        "me.jpg": "me.jpg",
        "../../x": "x",
        "C:\\a\\b.png": "b.png",
        ".bashrc": "bashrc",
        "ä ö.jpg": "jpg",
        "": "file",
    }
    assert {name: plain_name(name) for name in given} == given
    assert len(plain_name("a" * 500 + ".jpeg")) <= 80


def test_the_tour_names_expressions_and_ends_at_rest():
    frames, names = tour(), set(ACTIONS)
    assert all({*frame} - {"neck"} <= names for frame in frames)
    assert all(0 <= w <= 1 for frame in frames for n, w in frame.items() if n != "neck")
    assert set(frames[0]) == set(frames[-1]) == {"neck"} and len(frames) > 200


def started(folder: Path, port: int) -> tuple[subprocess.Popen, str]:
    """Start the command; returns it and the address that it prints."""
    said = folder.with_suffix(".txt")
    line = ["--out", str(folder), "--port", str(port), "--no-browser", "--preset", "debug", "--generator", "warp"]
    with said.open("w") as file:
        child = subprocess.Popen([sys.executable, "-m", "geodiff4d", "studio", *line], stdout=file)
    while "token" not in said.read_text():
        assert child.poll() is None
        time.sleep(0.05)
    return child, said.read_text().split()[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_from_a_dropped_portrait_to_its_downloads(tmp_path):
    """With a reload while the face is looked for, and a server that is killed while the avatar is fitted."""
    from geodiff4d.core.images import write_image
    from geodiff4d.evaluate.tracking import make_case

    write_image(tmp_path / "me.png", make_case(1, "val", size=256).image)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child, link = started(tmp_path / "studio", port)
    state = "fetch('/state').then((r) => r.json()).then((s) => s.projects[0] ?? {stage: ''})"

    def wait(browser: Browser, condition: str) -> dict:
        end = time.monotonic() + 600
        while not browser.run(f"{state}.then((p) => Boolean({condition}))"):
            assert not (problem := browser.run(f"{state}.then((p) => p.problem)")), problem
            assert time.monotonic() < end, condition
            time.sleep(0.2)
        return browser.run(state)

    try:
        with Browser(tmp_path / "profile") as browser:
            browser.open(link, "document.querySelector('#portraits') !== null")
            assert "token" not in browser.run("location.href")
            root = browser.call("DOM.getDocument")["root"]["nodeId"]
            node = browser.call("DOM.querySelector", nodeId=root, selector="#portraits")["nodeId"]
            browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "me.png")])
            wait(browser, "p.stage === 'look'")
            browser.call("Page.reload")
            wait(browser, "p.stage === 'check'")
            while not browser.run("document.querySelector('input[value=self]') !== null"):
                time.sleep(0.1)
            assert browser.run("document.querySelector('form button[type=submit]').disabled")
            # A point is put elsewhere, by the keyboard, and the face is looked for again.
            browser.run("document.getElementById('correct').click()")
            while not browser.run("document.querySelector('.handle[title=chin]') !== null"):
                time.sleep(0.1)
            down = "new KeyboardEvent('keydown', { key: 'ArrowDown', shiftKey: true })"
            browser.run(f"document.querySelector('.handle[title=chin]').dispatchEvent({down})")
            browser.run("document.getElementById('again').click()")
            name = wait(browser, "p.stage === 'look'")["name"]
            told = json.loads((tmp_path / "studio" / "projects" / name / "uploads" / "points.json").read_text())
            found = wait(browser, "p.stage === 'check'")["found"]["points"]
            assert abs(found["chin"][1] - told["chin"][1]) < 0.1
            while not browser.run("document.querySelector('input[value=self]') !== null"):
                time.sleep(0.1)
            browser.run("document.querySelector('input[value=self]').click()")
            browser.run("document.querySelector('form button[type=submit]').click()")
            name = wait(browser, "p.stage === 'make' && p.progress.steps[1].state === 'running'")["name"]
            place = tmp_path / "studio" / "projects" / name
            child.send_signal(signal.SIGKILL)
            child.wait()
            while browser.run("document.getElementById('lost').hidden"):
                time.sleep(0.1)
            clip = (place / "clip" / "job.json").stat().st_mtime
            child, _ = started(tmp_path / "studio", port)
            wait(browser, "p.stage === 'done'")
            assert (place / "clip" / "job.json").stat().st_mtime == clip  # what was done was not done again
            while not browser.run("document.querySelector('iframe') !== null"):
                time.sleep(0.1)
            links = browser.run("[...document.querySelectorAll('.avatar a')].map((a) => a.href)")
            cookie = f"{COOKIE}={(tmp_path / 'studio' / 'token').read_text()}"
            sizes = {}
            for one in links:
                with urllib.request.urlopen(urllib.request.Request(one, headers={"Cookie": cookie})) as answer:
                    sizes[answer.headers["Content-Disposition"].rpartition(".")[2]] = len(answer.read())
            assert sorted(sizes) == ["glb", "html", "mp4", "ply"] and min(sizes.values()) > 1000
            # The very page that the studio shows, driven.
            browser.open(f"http://127.0.0.1:{port}/projects/{name}/files/page", "document.body?.className === 'ready'")
            browser.run("geodiff4d.act({ set: { jawOpen: 0.7 } })")
            assert not browser.messages
            asked = {r.split("/")[2] for r in browser.requests if r.startswith("http")}
            assert asked == {f"127.0.0.1:{port}"}
        made = [place / "page/out/avatar.html", place / "glb/out/avatar.glb", place / "video/out/avatar.mp4"]
        found = verify(made)
        assert {v.state for v in found} == {State.UNTOUCHED}
        assert {v.statement.consent for v in found if v.statement} == {"self"}
        assert all(v.statement and len(v.statement.portrait_sha256) == 1 for v in found)
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGTERM)
        child.wait(30)
