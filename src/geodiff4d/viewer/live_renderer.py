"""Rendering for avatars that the page cannot draw: a view that can be changed, and the latest image of it."""

import io
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from geodiff4d.avatar.drive import Performance, held, normal_image
from geodiff4d.avatar.drive import head_centre as centre_of
from geodiff4d.avatar.model import Avatar
from geodiff4d.avatar.relative import has_weights
from geodiff4d.avatar.stream import Line
from geodiff4d.core.camera import Camera, turned
from geodiff4d.core.geometry import rigid
from geodiff4d.core.images import to_uint8
from geodiff4d.heads.rig import HeadParams
from geodiff4d.viewer.live import live_poses

MAX_PITCH_DEG = 80.0
ZOOM = (0.3, 3.0)
COEFFICIENT_SLIDERS = 10
"""Number of sliders of heads without named expressions, one for each of the first coefficients."""
COEFFICIENT_RANGE = 2.0
"""Range of these sliders: ± this many standard deviations."""
JPEG_QUALITY = 88


@dataclass(frozen=True)
class View:
    """The camera's position around the head, and the expression to show."""

    yaw_deg: float = 0.0
    pitch_deg: float = 0.0
    zoom: float = 1.0
    """Distance to the head, relative to the avatar's own camera."""
    expressions: dict[str, float] = field(default_factory=dict)
    """Weights by name, added to the performance's."""
    play: bool = True
    """Whether the performance plays; otherwise the head is at rest."""
    normals: bool = False


class LiveRenderer:
    """Renders the current view in its own thread, whenever it changes or a performance plays."""

    def __init__(self, avatar: Avatar, performance: Performance, size: int = 384):
        self.avatar, self.performance = avatar, performance
        self.view = View(play=len(performance) > 1)
        self.camera = avatar.camera.of_height(size)
        self.pivot = centre_of(avatar)
        names = avatar.head.expression_names
        named = has_weights(avatar.head)
        self.sliders = names if named else names[:COEFFICIENT_SLIDERS]
        self.range = (0.0, 1.0) if named else (-COEFFICIENT_RANGE, COEFFICIENT_RANGE)
        self._rest = held(avatar, torch.zeros(1, len(names))).params[0]
        self._live: HeadParams | None = None
        self._changed, self._stopped, self._dirty = threading.Condition(), False, True
        self.image, self.number, self.rate = b"", 0, 0.0
        self.failure: Exception | None = None
        """Exception that ended the rendering thread."""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "LiveRenderer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def show(self, view: View) -> None:
        """Change the view."""
        with self._changed:
            self.view, self._dirty = view, True
            self._changed.notify_all()

    def follow(self, performance: Iterable[Line | HeadParams]) -> None:
        """Move the head by a stream of weights, or of a tracker's parameters, as they come; returns when it ends."""
        for live in live_poses(self.avatar, performance):
            with self._changed:
                self._live, self._dirty = live, True
                self._changed.notify_all()
            if self._stopped:
                return

    def wait(self, seen: int, seconds: float = 5.0) -> tuple[bytes, int]:
        """Return the first image (JPEG) after number `seen`, or the latest after `seconds`, and its number."""
        with self._changed:
            self._changed.wait_for(lambda: self.number > seen or self._stopped, seconds)
            return self.image, self.number

    @property
    def stopped(self) -> bool:
        return self._stopped

    def render(self, view: View, frame: int) -> Float[Tensor, "3 height width"]:
        """Render one frame of the performance, or the head at rest, as a view asks."""
        params, tokens = self._posed(view, frame)
        with torch.no_grad():
            shown = self.avatar.render(params, self.turned(view), tokens=tokens)
        return normal_image(shown) if view.normals else shown.rgb.clamp(0, 1)

    def _posed(self, view: View, frame: int) -> tuple[HeadParams, Tensor | None]:
        params, tokens = self._rest, None
        if self._live is not None:
            params = self._live
        elif view.play:
            params, tokens = self.performance.frame(frame % len(self.performance))
        moved = {k: v for k, v in view.expressions.items() if v}
        if not moved:
            return params, tokens
        expr, names = params.expr.clone(), self.avatar.head.expression_names
        for name, value in moved.items():
            expr[names.index(name)] += value
        # What an encoder saw is no longer what is shown: tokens are made out of the parameters.
        return replace(params, expr=expr.clamp(0, 1) if self.range[0] == 0 else expr), None

    def turned(self, view: View) -> Camera:
        """Swing the camera around the head: yaw about the world's y, then pitch about the camera's x."""
        pivot, T = self.pivot, turned(self.camera, self.pivot, view.yaw_deg, view.pitch_deg).T_cam_world
        away = (T[:3, :3] @ pivot + T[:3, 3])[2] * (view.zoom - 1)
        step = rigid(torch.eye(3), torch.stack([away.new_zeros(()), away.new_zeros(()), away]))
        return replace(self.camera, T_cam_world=step @ T)

    def _run(self) -> None:
        try:
            self._render_on()
        except Exception as error:
            with self._changed:
                self.failure, self._stopped = error, True
                self._changed.notify_all()

    def _render_on(self) -> None:
        began, played = time.monotonic(), -1
        while True:
            with self._changed:
                playing = self.view.play and self._live is None and len(self.performance) > 1
                if not playing:
                    self._changed.wait_for(lambda: self._dirty or self._stopped)
                if self._stopped:
                    return
                view, self._dirty = self.view, False
            start = time.monotonic()
            frame = int((start - began) * self.performance.fps) if playing else max(played, 0)
            if frame == played and playing:
                time.sleep(0.5 / self.performance.fps)
                continue
            played = frame
            file = io.BytesIO()
            Image.fromarray(to_uint8(self.render(view, frame))).save(file, "JPEG", quality=JPEG_QUALITY)
            with self._changed:
                self.image, self.number = file.getvalue(), self.number + 1
                self.rate = 1 / max(time.monotonic() - start, 1e-3)
                self._changed.notify_all()
