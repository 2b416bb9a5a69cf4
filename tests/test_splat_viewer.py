"""A posed .ply in a splat viewer that we did not write (Spark, WebGL, headless Chromium) beside our own render.

Needs Chromium and an npm folder with `three` and `@sparkjsdev/spark`, named by GEODIFF4D_NODE_MODULES:

    npm install --prefix viewers three @sparkjsdev/spark
    GEODIFF4D_NODE_MODULES=viewers/node_modules pytest -m slow tests/test_splat_viewer.py
"""

import base64
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from avatars import painted_avatar
from geodiff4d.avatar.drive import own_performance
from geodiff4d.avatar.export_ply import export_ply
from geodiff4d.avatar.model import Avatar
from geodiff4d.core.camera import OPENGL_FROM_OPENCV, Camera
from geodiff4d.core.images import decode_image, write_image
from geodiff4d.heads import load_head

PAGE = Path(__file__).parent / "splat_page.html"
MODULES = os.environ.get("GEODIFF4D_NODE_MODULES", "")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SECONDS = 400
pytestmark = pytest.mark.slow


def view_of(camera: Camera) -> dict:
    """Return the camera as three.js wants it: c2w in OpenGL's axes and a projection matrix, row by row."""
    near, far = 0.05, 10.0
    fx, fy, cx, cy = (float(camera.K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
    w, h = camera.width, camera.height
    projection = [
        2 * fx / w, 0, 1 - 2 * cx / w, 0, 0, 2 * fy / h, 2 * cy / h - 1, 0,
        0, 0, -(far + near) / (far - near), -2 * far * near / (far - near), 0, 0, -1, 0,
    ]  # fmt: skip
    c2w = torch.linalg.inv(camera.T_cam_world) @ OPENGL_FROM_OPENCV
    return {"width": w, "height": h, "c2w": c2w.flatten().tolist(), "projection": projection}


def drawn_by_spark(ply: Path, camera: Camera, modules: Path, folder: Path) -> torch.Tensor:
    """Serve the page on this machine alone, let Chromium draw it and return the image."""
    got: list[str] = []
    finished = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            local = {"/": PAGE, "/scene.ply": ply}.get(path)
            if path.startswith("/modules/"):
                local = modules / path.removeprefix("/modules/")
            data = json.dumps(view_of(camera)).encode() if path == "/camera.json" else None
            if data is None:
                if local is None or not local.is_file():
                    self.send_error(404)
                    return
                data = local.read_bytes()
            kinds = {".html": "text/html", ".js": "text/javascript", "": "text/html", ".wasm": "application/wasm"}
            self.send_response(200)
            self.send_header("Content-Type", kinds.get(Path(path).suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            got.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()
            finished.set()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    flags += ["--no-first-run", f"--user-data-dir={folder / 'profile'}", "--disable-extensions"]
    assert CHROMIUM
    browser = subprocess.Popen(
        [CHROMIUM, *flags, f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert finished.wait(SECONDS), "the viewer drew nothing"
    finally:
        browser.terminate()
        browser.wait(20)
        server.shutdown()
        server.server_close()
    assert got[0].startswith("data:image/png;base64,"), got[0]
    return decode_image(base64.b64decode(got[0].partition(",")[2]), "Spark's image")


def side_by_side(avatar: Avatar, modules: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (our render, Spark's, PSNR inside the silhouette [dB])."""
    export_ply(avatar, own_performance(avatar), folder / "scene.ply")
    with torch.no_grad():
        ours = avatar.render(avatar.sequence[0], avatar.camera, 0.5)
    theirs = drawn_by_spark(folder / "scene.ply", avatar.camera, modules, folder)
    inside = ours.alpha[0] > 0.5
    error = (ours.rgb.clamp(0, 1) - theirs)[:, inside].square().mean()
    return ours.rgb.clamp(0, 1), theirs, float(-10 * error.log10())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.skipif(not MODULES, reason="no viewer: GEODIFF4D_NODE_MODULES names no npm folder with Spark and three")
def test_a_viewer_of_others_shows_the_same(tmp_path):
    head = load_head()
    avatar = painted_avatar(head, head.neutral(1), gaussians=14_000, size=320)
    ours, theirs, psnr = side_by_side(avatar, Path(MODULES).resolve(), tmp_path)
    write_image(tmp_path / "both.png", torch.cat([ours, theirs], -1))
    print(f"{psnr:.1f} dB, {tmp_path / 'both.png'}")
    assert psnr > 32
