"""What the figures on tracking mean: errors on cases with a known answer."""

import json
from collections.abc import Iterable

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from geodiff4d.core.geometry import axis_angle_to_matrix
from geodiff4d.core.images import to_uint8
from geodiff4d.evaluate.tracking import aligned_error, evaluate_tracking, make_case, score
from geodiff4d.heads import load_head
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.embedded import EmbeddedDetector
from geodiff4d.tracking.live import LiveConfig, live_frames, track_live, track_source
from geodiff4d.tracking.network import SHIPPED
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.track import TrackingConfig, track_frames


@pytest.fixture(scope="module")
def head():
    return load_head("openhead")


def test_errors_do_not_see_what_is_aligned():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(40, 3, generator=g)
    R = axis_angle_to_matrix(torch.tensor([0.3, -0.2, 0.5]))
    moved = 1.7 * truth @ R.T + torch.tensor([1.0, -2.0, 3.0])
    assert aligned_error(moved, truth) < 1e-5
    assert aligned_error(moved, truth, turn=False) > 0.1
    assert aligned_error(2 * truth - 5, truth, turn=False) < 1e-5


class Knowing:
    """A detector that knows the truth of every second picture, and sees nothing in the others."""

    def __init__(self, head):
        self.head, self.markup, self.calls = head, choose_points(head), 0

    def detect(
        self, images: Iterable[Float[Tensor, "3 _height _width"]], video: bool = False
    ) -> list[Detection | None]:
        out: list[Detection | None] = []
        for i, _ in enumerate(images):
            case = make_case(i, "val", size=64)
            vertices = case.subject.vertices(case.params)[0]
            points, _ = case.camera.project(self.markup.on(self.head).on(vertices, self.head.faces))
            box = torch.cat([points.amin(0), points.amax(0)])
            found = Detection(
                points, self.markup.index, 1.0, box, sigma=torch.full((len(points),), 0.3), markup=self.markup
            )
            out.append(None if i % 2 else found)
        return out


def test_failures_count_and_true_points_score_well(head, tmp_path, monkeypatch):
    import geodiff4d.evaluate.tracking as module

    monkeypatch.setattr(module, "make_case", lambda seed, split: make_case(seed, split, size=64))
    result = evaluate_tracking(tmp_path, head, {"knowing": Knowing(head)}, 2, "val", TrackingConfig(size=64))
    s = result["knowing"]
    assert s["pictures"] == 2 and s["failures"] == 1 and s["pictures_with_face"] == 1
    assert s["detected_px"] < 0.01 and s["landmark_px"] < 3 and s["rotation_deg"] < 8
    assert s["vertex_mm"] < s["mean_head_mm"]
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["cases"]["knowing"][1] is None and (tmp_path / "knowing.png").exists()


def test_a_growing_file_is_tracked_by_two_processes_as_by_one(head, tmp_path):
    import av

    case, path = make_case(1, "val", size=256), tmp_path / "face.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for t in range(8):
            image = to_uint8(case.image.roll(t, -1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    config = LiveConfig(warmup=3)
    frames = list(track_source(path, head, config=config, patience_s=0.1))
    assert len(frames) == 8 and all(f.seen and f.error_px < 6 for f in frames)
    for two, one in zip(frames, track_live(live_frames(path, 0.1), head, config=config), strict=True):
        assert torch.equal(two.image, one.image)
        torch.testing.assert_close(two.params.expr, one.params.expr, atol=1e-4, rtol=0)
    assert {f.image for f in track_source(path, head, images=False, config=config, patience_s=0.1)} == {None}


def test_the_shipped_network_tracks_a_render(head):
    size = sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file())
    assert size <= 4_000_000
    case = make_case(1, "val", size=256)
    tracked = track_frames([case.image], head, EmbeddedDetector(), TrackingConfig(size=128), video=False)
    s = score(case, tracked, head)
    assert s.landmark_px < 6 and s.rotation_deg < 12 and s.mask_iou > 0.85 and s.normal_deg < 25
