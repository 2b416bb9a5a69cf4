"""Normals as an estimator would give them."""

import numpy as np
import torch
from torch.testing import assert_close

from geodiff4d.core.images import decode_normals, encode_normals
from geodiff4d.data.estimated import as_estimated
from geodiff4d.data.footage.rendered import RenderedFootage
from geodiff4d.evaluate.metrics import normal_deg
from geodiff4d.presets import ablated, preset
from geodiff4d.video.encode import encode_store
from tiny import TinyStore, tiny_codec


def test_estimated_normals_lose_relief_lean_and_keep_the_outline():
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    mask = (x**2 + y**2 < 0.8)[None, None].float().expand(2, -1, -1, -1)
    z = (1 - x**2 - y**2).clamp(min=0.05).sqrt()
    wrinkles = 0.4 * torch.sin(40 * x)
    n = torch.stack([x + wrinkles, -y, z])[None].expand(2, -1, -1, -1)
    exact = encode_normals(n / n.norm(dim=1, keepdim=True), mask)
    found = as_estimated(exact, seed=3)
    assert torch.equal(found, as_estimated(exact, seed=3)) and not torch.equal(found, as_estimated(exact, seed=4))
    assert_close(found[mask.expand_as(found) == 0], torch.full_like(found[mask.expand_as(found) == 0], 0.5))
    degrees = normal_deg(decode_normals(found) * mask, decode_normals(exact) * mask, mask)
    assert 6 < degrees.mean() < 25
    assert not torch.equal(found[0], found[1]), "every picture leans its own way"


def test_ablated_synthetic_data_has_no_exact_normals(tmp_path):
    codec, path, z = tiny_codec(), tmp_path / "z.npy", {}
    for estimated in (False, True):
        assert encode_store(RenderedFootage(TinyStore(), estimated), codec, path)
        z[estimated] = np.split(np.array(np.load(path)), 3, 3)
    same = [(exact == degraded).all() for exact, degraded in zip(z[False], z[True], strict=True)]
    assert same == [True, False, True], "the file of exact normals is not taken for the other"
    p = preset("embedded")
    assert ablated(p, ("synthetic",)) == (p.model, p.image.pairs), "it is the data's switch, not the model's"
