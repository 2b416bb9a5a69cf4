"""Gain and cos on series with a known answer; readers; photographs of pairs; videos whose truth is known."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geodiff4d.core.errors import UserError
from geodiff4d.core.images import write_image
from geodiff4d.evaluate import readers
from geodiff4d.evaluate.expression import coefficient_names, coefficients, compared, face_displacements
from geodiff4d.evaluate.expression_gain import REGIONS, Products, change_products, in_region, pooled, video_products
from geodiff4d.evaluate.gain_tables import Scores, tables
from geodiff4d.evaluate.image_pairs import people_of
from geodiff4d.evaluate.readers import JudgesReader, compare_identities, judges_python
from geodiff4d.evaluate.tracking_videos import (
    REST_FRAMES,
    Performance,
    score_video,
    summary,
    table_markdown,
    true_motion,
)
from geodiff4d.heads import load_head
from geodiff4d.world.expressions import ACTIONS, random_expression


def series(seed: int, frames: int = 12, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, count))


@given(st.floats(0.05, 3), st.integers(0, 50))
def test_scaling_by_k_gives_gain_k(k, seed):
    x = series(seed)
    found = video_products(x, k * x)
    assert found.gain == pytest.approx(k) and found.cos == pytest.approx(1)
    assert change_products(x, -k * x).gain == pytest.approx(-k)


@given(st.integers(0, 50))
def test_identity_offsets_change_nothing(seed):
    """Whose face it is adds a constant to every frame, of the driver and of what was made alike."""
    x, y = series(seed), series(seed + 1000)
    moved = video_products(x + series(7, 1), y + series(8, 1))
    assert moved.gain == pytest.approx(video_products(x, y).gain) and moved.cos == pytest.approx(
        video_products(x, y).cos
    )


def test_standing_still_scores_zero_and_noise_no_cos():
    x = series(0)
    still = video_products(x, np.ones_like(x))
    assert still.gain == still.cos == 0
    assert math.isnan(video_products(np.ones_like(x), x).gain)
    apart = x.copy()
    apart[:, :3], x[:, 3:] = 0, 0
    assert video_products(x, apart).cos == pytest.approx(0, abs=1e-12)


def test_frames_without_a_face_do_not_count():
    x = series(1)
    y = 0.5 * x
    y[3] = np.nan
    x[8] = np.nan
    assert video_products(x, y).gain == pytest.approx(0.5)
    assert math.isnan(video_products(x[:2], y[:2]).gain)


def test_gains_are_pooled_by_how_much_a_driver_moves():
    """One who hardly moves weighs little: the mean of their ratios would be 50."""
    found = pooled([Products(1.0, 0.25, 0.5), Products(1e-4, 1.0, 0.01)])
    assert found["gain"] and found["gain"]["mean"] == pytest.approx(0.51 / 1.0001)
    low, high = found["gain"]["interval"]
    assert low <= found["gain"]["mean"] <= high
    assert pooled([]) == pooled([Products(0, 1, 0)]) == {"gain": None, "cos": None}


def test_regions_are_arkits():
    assert set(REGIONS) == {"all", "mouth", "jaw", "lids", "brows", "gaze"}
    for region, count in (("brows", 5), ("lids", 6), ("jaw", 4), ("gaze", 8), ("all", 52)):
        assert in_region(ACTIONS, region).sum() == count


# What tracked parameters say


def test_coefficients_of_a_head_are_named_and_gaze_is_the_eyeballs():
    head = load_head()
    expr, jaw, eyes = random_expression(0, 40)
    params = replace(head.neutral(40), expr=expr, jaw_pose=jaw, eyes_pose=eyes)
    names, x = coefficient_names(head), coefficients(head, params)
    assert x.shape == (40, len(names)) and len(set(names)) == len(names)
    assert in_region(names, "gaze").sum() == 4
    np.testing.assert_allclose(x[:, [n.startswith("eyeLook") for n in names]], eyes[:, [0, 1, 3, 4]], rtol=1e-6)
    half = replace(params, expr=0.5 * expr, jaw_pose=0.5 * jaw, eyes_pose=0.5 * eyes, rotation=torch.ones(40, 3))
    for group, (a, b) in compared(head, params, half).items():
        assert video_products(a, b).gain == pytest.approx(0.5, abs=0.03), group
    assert np.abs(face_displacements(head, head.neutral(1))).max() < 1e-3


def test_videos_are_scored_beside_their_truth(subject):
    head, performance = load_head(), Performance(3, "val", 0.0, 24, 64)
    truth = true_motion(performance, subject)
    assert truth.expr[:REST_FRAMES].abs().sum() == 0 and truth.rotation[:REST_FRAMES].abs().sum() > 0
    perfect = score_video(head, truth, truth, 0)
    assert perfect.products["vertices"].gain == pytest.approx(1) and perfect.aed_mm == perfect.jitter_mm == 0
    still = score_video(head, truth, replace(truth, expr=0 * truth.expr, jaw_pose=0 * truth.jaw_pose), 2)
    assert still.products["vertices"].gain == 0 and still.products["gaze"].gain == pytest.approx(1)
    assert still.aed_mm == pytest.approx(still.still_aed_mm)
    found = summary([perfect, still, None])
    assert found["failed"] == 1 and found["frames_without_face"] == 2
    assert found["vertices"]["gain"]["mean"] == pytest.approx(0.5)
    result = {"split": "val", "people": 1, "frames": 24, "size": 64, "embedded": {"all": found}}
    assert "| vertices | 0.50 [0.00, 1.00] / " in table_markdown(result, ["embedded"])


# Readers


def environment(folder: Path, body: str) -> Path:
    """A Python environment whose interpreter runs `body` instead of the worker."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{body}")
    python.chmod(0o755)
    return python


def test_readers_without_judges_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv(readers.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    each, missing = readers.readers(load_head())
    assert [r.key for r in each] == ["tracker"]
    assert set(missing) == {"blendshapes", "sface", "dlib"} and ".[judges]" in missing["dlib"]
    assert any("n/a: run `pip install" in line for line in tables(Scores().summary(["mesh_warp"]), "cos", missing))
    with pytest.raises(UserError, match="expected bin/python"):
        judges_python(tmp_path)
    monkeypatch.setenv(readers.ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="no Python environment"):
        judges_python()


def test_the_judges_answer_is_read_and_their_failure_is_said(tmp_path):
    answers = environment(
        tmp_path / "good",
        "import json, sys, pathlib, numpy as np\n"
        "f = pathlib.Path(sys.argv[2]); n = json.loads((f / 'request.json').read_text())['count']\n"
        "assert all(np.load(f / f'{i:05d}.npy').dtype == np.uint8 for i in range(n))\n"
        "np.savez(f / 'readings.npz', blendshapes=np.ones((n, 2)), sface=np.ones((n, 4)) / 2, dlib=np.ones((n, 1)))\n"
        "answer = {'names': ['jawOpen', 'browDown'], 'missing': {'dlib': 'no dlib'}}\n"
        "(f / 'answer.json').write_text(json.dumps(answer))\n",
    )
    reading = JudgesReader(answers).read(torch.rand(3, 3, 8, 8))
    assert reading.names == ("jawOpen", "browDown") and reading.expression is not None
    assert reading.expression.shape == (3, 2) and set(reading.identity) == {"sface"}
    assert "no dlib; run `pip install" in reading.missing["dlib"]
    np.testing.assert_allclose(compare_identities("sface", reading.identity["sface"], reading.identity["sface"]), 1)
    np.testing.assert_allclose(compare_identities("dlib", np.zeros((2, 2)), np.array([[3.0, 4.0]])), 5)
    broken = environment(tmp_path / "bad", "raise ImportError(\"No module named 'cv2'\")")
    with pytest.raises(UserError, match=r"failed .*No module named 'cv2'.*pip install"):
        JudgesReader(broken).read(torch.rand(1, 3, 8, 8))
    with pytest.raises(UserError, match="cannot be started"):
        JudgesReader(tmp_path / "nobody").read(torch.rand(1, 3, 8, 8))


def test_photographs_score_by_their_change_from_the_portrait():
    scores, names = Scores(), ("mouthSmileLeft", "jawOpen", "browInnerUp", "eyeBlinkLeft", "eyeLookUpLeft")
    rest, truth = series(0, 4, 5), series(1, 4, 5)
    made = rest + 0.4 * (truth - rest)
    made[1] = np.nan
    scores.add_change("mesh_warp", "tracker", names, rest, truth, made)
    scores.add_change("copy_reference", "tracker", names, rest, truth, rest)
    scores.add_identity("mesh_warp", "sface", [0.8, math.nan, 0.9])
    found = scores.summary(["mesh_warp", "copy_reference"])
    for region in REGIONS:
        assert found["mesh_warp"]["tracker"][region]["gain"]["mean"] == pytest.approx(0.4)
        assert found["copy_reference"]["tracker"][region]["gain"]["mean"] == 0
    assert found["mesh_warp"]["blendshapes"] is None and found["mesh_warp"]["dlib"] is None
    assert found["mesh_warp"]["sface"]["mean"] == pytest.approx(0.85)
    text = "\n".join(tables(found, "cos", {}))
    assert "| mesh warp | 0.40 [0.40, 0.40] / 1.00 [1.00, 1.00] |" in text and "| reference copied | 0.00" in text
    json.dumps(found, allow_nan=False)


def test_people_are_pairs_of_files(tmp_path):
    for name in ("b_smiling.png", "b_neutral.png", "a_1.png", "c_1.jpg", "c_2.jpg", "c_3.jpg", "notes.txt"):
        write_image(tmp_path / name, torch.zeros(3, 4, 4)) if name.endswith("png") else (tmp_path / name).touch()
    people, refused = people_of(tmp_path)
    assert [(p.name, p.portrait.name, p.driver.name) for p in people] == [("b", "b_neutral.png", "b_smiling.png")]
    assert refused == {"a": "number of photographs: 1, expected 2", "c": "number of photographs: 3, expected 2"}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no person with two images"):
        people_of(empty)
    with pytest.raises(UserError, match="is not a folder"):
        people_of(tmp_path / "nowhere")
