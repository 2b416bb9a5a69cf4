"""What a face reader says, as the prior of the fit: steadied over time, believed by its own doubt."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import rigid
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import HeadParams
from geodiff4d.tracking.blend import FIT_ALONE, fitted_blend
from geodiff4d.tracking.blinks import completed_blinks
from geodiff4d.tracking.detect import Detection
from geodiff4d.tracking.fit import fit
from geodiff4d.tracking.layout import Layout
from geodiff4d.tracking.observe import readings_of
from geodiff4d.tracking.points import choose_points
from geodiff4d.tracking.projection import FRONT
from geodiff4d.tracking.reading import Reading, frame_noise, steadied

FRAMES, SIZE = 24, 512


@pytest.fixture(scope="module")
def head():
    return load_head("openhead")


def noise(*shape: int, sigma: float, seed: int = 0) -> torch.Tensor:
    return sigma * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blink(frames: int = FRAMES) -> torch.Tensor:
    """Closed within two frames, for one, and open again in two."""
    out = torch.zeros(frames, 1)
    out[10:13, 0] = torch.tensor([0.6, 1.0, 0.5])
    return out


def test_rest_becomes_still_and_a_blink_stays():
    seen = blink() + noise(FRAMES, 1, sigma=0.03)
    out = steadied(seen, frame_noise(seen))
    assert out[11] > 0.9 and out[10] > 0.5
    rest = torch.cat([out[:8], out[15:]])
    before = torch.cat([seen[:8], seen[15:]])
    assert rest.diff(dim=0).std() < 0.5 * before.diff(dim=0).std()


def test_noise_is_measured_beside_events():
    quiet = noise(200, 1, sigma=0.05)
    assert_close(frame_noise(quiet), torch.tensor([0.05]), rtol=0.25, atol=0)
    assert_close(frame_noise(quiet + blink(200)), frame_noise(quiet), rtol=0.2, atol=0)
    assert frame_noise(quiet[:2]) == 0


def lids(head, left: torch.Tensor, right: torch.Tensor | None = None) -> tuple[Layout, torch.Tensor]:
    """Unknowns of frames in which only the lids move."""
    layout = Layout(head)
    frame = torch.zeros(len(left), layout.slices["expr"].stop + 20)
    for side, values in (("Left", left), ("Right", left if right is None else right)):
        frame[:, layout.slices["expr"].start + layout.names.index(f"eyeBlink{side}")] = values
    return layout, frame


def risen(frames: int, at: int, length: int, height: float) -> torch.Tensor:
    out = torch.zeros(frames)
    out[at : at + length] = height
    return out


def test_a_blink_closes_the_eyes(head):
    """One that was read to two thirds, on lids that rest a tenth shut."""
    seen = 0.1 + risen(60, 20, 4, 0.55) + risen(60, 40, 3, 0.2)
    layout, frame = lids(head, seen)
    out = completed_blinks(layout, frame)
    moved = (out != frame).any(0).nonzero()[:, 0].tolist()
    names = [layout.names[k - layout.slices["expr"].start] for k in moved]
    assert names == ["eyeBlinkLeft", "eyeBlinkRight"]
    assert_close(out[20:24, moved[0]], torch.full((4,), 0.95), atol=0.02, rtol=0)
    rest = [t for t in range(60) if not 18 <= t < 26]
    assert torch.equal(out[rest], frame[rest]), "what is too little to be a blink stays what it is"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (risen(80, 20, 40, 0.6), None),
        (risen(80, 20, 4, 0.6), torch.zeros(80)),
        (risen(80, 20, 4, 1.1), None),
        (torch.full((80,), 0.7), None),
        (risen(1, 0, 1, 0.6), None),
    ],
    ids=["a squint lasts", "a wink", "shut already", "eyes that stay shut", "an image"],
)
def test_what_is_no_blink_stays_what_it_is(head, left, right):
    layout, frame = lids(head, left, right)
    assert torch.equal(completed_blinks(layout, frame), frame)


@given(st.floats(-2, 2), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_a_constant_stays_what_it_is(value, frames):
    series = torch.full((frames, 2), value)
    assert_close(steadied(series, frame_noise(series)), series)


def observed(head, params: HeadParams, reading: Reading | None) -> list[Detection]:
    """Points of a head as a detector that sees nobody blink would give them: those of the face at rest."""
    markup = choose_points(head, 192)
    camera = Camera(rigid(FRONT.float(), torch.tensor([0.0, 0.0, 1.2])), pinhole(900.0, SIZE, SIZE), SIZE, SIZE)
    at_rest = head.pose(replace(params, expr=0 * params.expr))
    xy = camera.expand(len(params.expr)).project(markup.on(head).on(at_rest.vertices, head.faces))[0]
    return [
        Detection(
            xy[t], markup.index, 1.0, torch.cat([xy[t].amin(0), xy[t].amax(0)]), sigma=torch.full((192,), 1.5),
            markup=markup, reading=None if reading is None else Reading(
                *(getattr(reading, name)[t : t + 1] for name in Reading.__dataclass_fields__)
            ),
        )
        for t in range(len(xy))
    ]  # fmt: skip


def says(expr: torch.Tensor, eyes: torch.Tensor, sigma: float) -> Reading:
    n = len(expr)
    doubt = torch.full_like
    return Reading(
        expr, torch.zeros(n, 3), eyes, doubt(expr, sigma), torch.full((n, 3), sigma), doubt(eyes, sigma),
        FIT_ALONE.expand(n, 2, 3, 61),
    )  # fmt: skip


def blinking(head) -> tuple[HeadParams, torch.Tensor, torch.Tensor]:
    params = head.neutral(FRAMES)
    expr, eyes = torch.zeros_like(params.expr), torch.zeros(FRAMES, 6)
    for side in ("Left", "Right"):
        expr[:, head.expression_names.index(f"eyeBlink{side}")] = blink()[:, 0]
    eyes[:, [1, 4]] = 0.35
    return params, expr, eyes


def test_a_sure_reader_is_believed(head):
    """Lids and eyes move as it says, though the points say that they rest."""
    params, expr, eyes = blinking(head)
    got = fit(head, observed(head, params, says(expr, eyes, 0.03)), SIZE, SIZE, 900.0).params
    left = head.expression_names.index("eyeBlinkLeft")
    assert_close(got.expr[:, left], expr[:, left], atol=0.15, rtol=0)
    assert_close(got.eyes_pose[:, [1, 4]], eyes[:, [1, 4]], atol=0.07, rtol=0)


def test_a_reader_in_doubt_is_not(head):
    params, expr, eyes = blinking(head)
    got = fit(head, observed(head, params, says(expr, eyes, 3.0)), SIZE, SIZE, 900.0).params
    assert got.expr[:, head.expression_names.index("eyeBlinkLeft")].max() < 0.4


def test_without_a_reader_eyes_and_lids_follow_the_points(head):
    params, _, _ = blinking(head)
    got = fit(head, observed(head, params, None), SIZE, SIZE, 900.0).params
    assert got.expr[:, head.expression_names.index("eyeBlinkLeft")].max() < 0.2
    assert got.eyes_pose.abs().max() < 0.1


def test_frames_without_a_face_are_in_nobodys_prior(head):
    params, expr, eyes = blinking(head)
    detections: list[Detection | None] = list(observed(head, params, says(expr, eyes, 0.03)))
    detections[11] = None
    got = fit(head, detections, SIZE, SIZE, 900.0).params
    assert got.expr.isfinite().all() and got.eyes_pose.isfinite().all()


def test_fit_and_reading_are_blended(head):
    """A reading's slopes decide; frames without a face stay as they were interpolated."""
    params, expr, eyes = blinking(head)
    said = says(expr, eyes, 3.0)
    blend = torch.zeros(FRAMES, 2, 3, 61)
    blend[:, 0, 1] = 0.8
    blend[:, 0, 2, :52] = 0.05
    found = observed(head, params, replace(said, blend=blend))
    found[3] = None
    got = fit(head, found, SIZE, SIZE, 900.0).params
    left, there = head.expression_names.index("eyeBlinkLeft"), torch.arange(FRAMES) != 3
    both = readings_of(found).expr[:, left] * 0.8 + 0.05
    shutting = both > 0.3
    assert_close(got.expr[there & ~shutting, left], both[there & ~shutting], atol=1e-4, rtol=0)
    assert (got.expr[shutting, left] > both[shutting]).all(), "a blink goes all the way"
    assert got.expr[3].abs().max() < 0.3 and (got.expr >= 0).all()
    alone = fit(head, observed(head, params, said), SIZE, SIZE, 900.0)
    blended = fit(head, observed(head, params, replace(said, blend=blend)), SIZE, SIZE, 900.0)
    assert_close(blended.error_px, alone.error_px, msg="the error is the fit's own, whatever the reader says then")


def test_the_blend_finds_the_shares_of_a_known_mixture():
    """Oracle: truth = 0.9 fit + 0.3 reading − 0.1, per target; at rest it says rest, whatever the ridge."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 40, 5, generator=g)
    x[:, :8], y[:, :8] = 0.2, 0.4
    blend = fitted_blend(x, y, 0.9 * x + 0.3 * y - 0.1, rest=8)
    assert_close(blend[:2], torch.tensor([[0.9], [0.3]]).expand(2, 5), atol=0.02, rtol=0)
    assert_close(blend[0] * 0.2 + blend[1] * 0.4 + blend[2], torch.full((5,), 0.9 * 0.2 + 0.3 * 0.4 - 0.1))
