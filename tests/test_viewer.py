"""The live viewer: images that follow the view, limits, and a server that strangers cannot reach."""

import http.client
import io
import json
import socket
import threading
import urllib.request

import pytest
import torch
from PIL import Image

from avatars import painted_avatar, talking
from geodiff4d.avatar.drive import held, own_performance
from geodiff4d.avatar.stream import Line
from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.heads import load_head
from geodiff4d.viewer.live import Feed, newest
from geodiff4d.viewer.live_renderer import LiveRenderer, View
from geodiff4d.viewer.scene import pose_rows
from geodiff4d.viewer.server import Server, view_from


@pytest.fixture(scope="module")
def avatar():
    head = load_head()
    return painted_avatar(head, talking(head), size=64)


@pytest.fixture(scope="module")
def server(avatar):
    with LiveRenderer(avatar, own_performance(avatar), 64) as renderer, Server(renderer, "127.0.0.1", 0) as server:
        renderer.show(View(play=False))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def test_page_and_images(server, avatar):
    status, page = ask(server, "GET", "/")
    assert status == 200 and b"/stream" in page and b"http" not in page.replace(b"http-equiv", b"")
    about = json.loads(ask(server, "GET", "/about")[1])
    assert about["sliders"] == list(avatar.head.expression_names) and (about["low"], about["high"]) == (0, 1)
    status, first = ask(server, "GET", "/image.jpg")
    assert status == 200 and Image.open(io.BytesIO(first)).size == (64, 64)
    seen = server.source.number
    change = json.dumps({"yaw": 40, "expressions": {"jawOpen": 1}})
    assert ask(server, "POST", "/view", change, Content_Type="application/json")[0] == 204
    assert server.source.wait(seen, 60)[0] != first and server.source.view.expressions == {"jawOpen": 1.0}


def test_stream_sends_what_comes(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", "/stream")
    answer = connection.getresponse()
    assert "multipart/x-mixed-replace" in (answer.getheader("Content-Type") or "")
    head = [answer.readline() for _ in range(4)]
    length = int(head[2].split(b":")[1])
    assert Image.open(io.BytesIO(answer.read(length))).format == "JPEG"
    connection.close()


def test_strangers_are_refused(server):
    good = {"Content_Type": "application/json"}
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/view", "{}", Origin="http://evil.example", **good)[0] == 403
    assert ask(server, "POST", "/view", "{}", Content_Type="text/plain")[0] == 415
    assert ask(server, "POST", "/view", "x" * 20_000, **good)[0] == 413
    assert ask(server, "GET", "/../server.py")[0] == 404
    for body in ("{", "[]", '{"yaw": "a"}', '{"zoom": NaN}', '{"expressions": {"nose": 1}}'):
        assert ask(server, "POST", "/view", body, **good)[0] == 400


def test_views(server, avatar):
    renderer = server.source
    wild = view_from({"pitch": 1e9, "zoom": -4, "expressions": {"jawOpen": 7}}, renderer)
    assert (wild.pitch_deg, wild.zoom, wild.expressions["jawOpen"]) == (80, 0.3, 1)
    front = renderer.render(View(play=False), 0)
    away = front.shape[1:] == (64, 64) and (front - 0.5).abs().amax(0) > 0.03
    assert isinstance(away, torch.Tensor)
    closer = (renderer.render(View(play=False, zoom=0.7), 0) - 0.5).abs().amax(0) > 0.03
    assert closer.sum() > 1.3 * away.sum()
    # From above, more of the head's top: its highest point moves down in the image less than its chin moves up.
    tilted = renderer.turned(View(pitch_deg=40))
    below = renderer.turned(View(pitch_deg=-40))
    assert tilted.position[1] > renderer.camera.position[1] > below.position[1]
    pivot = torch.stack([c.project(renderer.pivot[None])[0][0] for c in (tilted, below, renderer.camera)])
    assert (pivot - pivot[0]).abs().max() < 0.05
    assert (renderer.render(View(play=True), 5) - front).abs().max() > 0.05


def test_lines_move_the_face(avatar):
    renderer = LiveRenderer(avatar, own_performance(avatar), 64)
    before = renderer.render(View(play=False), 0)
    weights = torch.zeros(52)
    weights[avatar.head.expression_names.index("jawOpen")] = 1
    renderer.follow([Line(weights, torch.zeros(3))])
    assert (renderer.render(View(play=True), 0) - before).abs().max() > 0.1
    renderer.follow(iter([avatar.head.neutral()]))
    assert (renderer.render(View(play=True), 0) - before).abs().max() < 0.01


def test_command(avatar, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    avatar.save(tmp_path / "a")
    assert main(["view", str(tmp_path / "a"), "--port", "0", "--size", "64", "--seconds", "0.3"]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out
    renderer = LiveRenderer(avatar, own_performance(avatar), 64)
    with Server(renderer, "127.0.0.1", 0) as first, pytest.raises(UserError, match="cannot listen"):
        Server(renderer, "127.0.0.1", first.server_port)
    assert main(["view", str(tmp_path / "a"), "--port", "99999"]) == 2


def test_an_image_that_fails_ends_the_server(avatar, monkeypatch):
    def fails(*_: object) -> None:
        raise ZeroDivisionError("no rate")

    monkeypatch.setattr(LiveRenderer, "render", fails)
    with LiveRenderer(avatar, own_performance(avatar), 64) as renderer, Server(renderer, "127.0.0.1", 0) as server:
        with pytest.raises(ZeroDivisionError, match="no rate"):
            server.serve_forever(0.01)
        assert renderer.stopped


def test_numbers_without_end_are_refused(server):
    status, _ = ask(server, "POST", "/view", '{"yaw": 1' + "0" * 400 + "}", Content_Type="application/json")
    assert status == 400


@pytest.mark.parametrize(("host", "shown"), [
    ("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:"),
])  # fmt: skip
def test_the_link_that_is_printed_works(avatar, host, shown):
    if ":" in host and not socket.has_ipv6:
        return
    with LiveRenderer(avatar, own_performance(avatar), 64) as renderer, Server(renderer, host, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        link = server.link(host)
        assert link.startswith(shown)
        with urllib.request.urlopen(link + "about", timeout=30) as answer:
            assert answer.status == 200
        server.shutdown()


@pytest.mark.parametrize(("host", "status"), [
    ("192.168.1.7:80", 200), ("[fe80::1]:80", 200), ("localhost", 200), (socket.gethostname(), 200),
    ("evil.example", 403), ("127.0.0.1.evil.example:80", 403),
])  # fmt: skip
def test_a_server_for_the_network_answers_to_addresses_and_its_own_names(avatar, host, status):
    with LiveRenderer(avatar, own_performance(avatar), 64) as renderer, Server(renderer, "0.0.0.0", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert ask(server, "GET", "/about", Host=host)[0] == status
        server.shutdown()


def test_whoever_is_slow_gets_the_newest_moment():
    """Five moments come while one is worked on: the last is next, then what the stream raised."""
    asked, more = threading.Event(), threading.Event()

    def stream():
        yield 0
        asked.wait(20)
        yield from range(1, 6)
        more.set()
        raise UserError("line 7 is bad")

    moments = newest(stream())
    assert next(moments) == 0
    asked.set()
    assert more.wait(20) and next(moments) == 5
    with pytest.raises(UserError, match="line 7"):
        next(moments)


def test_a_page_that_draws_by_itself_gets_live_poses(avatar):
    """Each browser gets the latest pose; one that never reads delays nobody; strangers get nothing."""
    weights = torch.linspace(0, 1, 52)
    line = Line(weights, torch.tensor([0.0, 0.2, 0.0]))
    with Feed(avatar, own_performance(avatar), "me", live=True) as feed, Server(feed, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        status, page = ask(server, "GET", "/")
        assert status == 200 and b"connect-src 'self'" in page and b"<title>me</title>" in page
        assert ask(server, "GET", "/live", Host="evil.example")[0] == 403
        assert ask(server, "GET", "/live", Origin="http://evil.example")[0] == 403
        assert ask(server, "GET", "/../live.py")[0] == 404
        stalled = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(5)]
        for one in stalled:
            one.sendall(f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        feed.follow([line] * 3)
        with urllib.request.urlopen(f"{server.link('127.0.0.1')}live", timeout=30) as events:
            assert events.headers["Content-Type"] == "text/event-stream"
            got = torch.tensor(json.loads(events.readline().removeprefix(b"data: ")))
        asked = torch.from_numpy(pose_rows(held(avatar, weights[None]).params)[0])
        asked[52 + 3 : 52 + 6] += line.neck
        assert (got - asked).abs().max() < 2e-5
        for one in stalled:
            one.close()
        server.shutdown()
