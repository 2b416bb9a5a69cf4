"""The shape checks are on: without this test a broken import hook would make every other test a little quieter."""

import pytest
import torch
from jaxtyping import TypeCheckError

from geodiff4d.core import geometry
from geodiff4d.core.camera import Camera


def test_a_wrong_shape_raises():
    with pytest.raises(TypeCheckError):
        geometry.skew(torch.zeros(2, 4))


def test_a_wrong_dtype_raises():
    with pytest.raises(TypeCheckError):
        geometry.skew(torch.zeros(2, 3, dtype=torch.int64))


def test_shapes_are_checked_against_each_other():
    with pytest.raises(TypeCheckError):
        geometry.transform(torch.eye(4).expand(2, 4, 4), torch.zeros(3, 5, 3))


def test_a_dataclass_is_checked():
    with pytest.raises(TypeCheckError):
        Camera(torch.eye(4), torch.eye(4), 8, 8)
