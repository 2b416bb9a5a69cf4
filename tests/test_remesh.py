"""The remesh: no triangle bridges what the head does not join, and every region keeps its area."""

import pytest
import torch
from scipy.spatial import KDTree
from torch.nn.functional import normalize

from geodiff4d.avatar.surface import RemeshConfig, Surface, kept, own_surface, remesh, texels, within_hops
from geodiff4d.core.topology import face_normals
from geodiff4d.heads import load_head
from geodiff4d.heads.rig import Head


@pytest.fixture(scope="module")
def head() -> Head:
    return load_head("openhead")


@pytest.fixture(scope="module")
def surface(head) -> Surface:
    return remesh(head, RemeshConfig(128))


def neighbours(head: Head) -> list[set[int]]:
    """Faces that share an edge, by brute force."""
    owners: dict[frozenset[int], list[int]] = {}
    for f, corners in enumerate(head.faces.tolist()):
        for a, b in ((0, 1), (1, 2), (2, 0)):
            owners.setdefault(frozenset((corners[a], corners[b])), []).append(f)
    out: list[set[int]] = [set() for _ in range(len(head.faces))]
    for faces in owners.values():
        for f in faces:
            out[f] |= set(faces) - {f}
    return out


def ball(near: list[set[int]], start: int, hops: int) -> set[int]:
    """Breadth-first search."""
    seen, edge = {start}, {start}
    for _ in range(hops):
        edge = set().union(*(near[f] for f in edge)) - seen
        seen |= edge
    return seen


def test_no_triangle_bridges(head, surface):
    near = neighbours(head)
    where = {tuple(f): i for i, f in enumerate(head.faces.tolist())}
    on = [where.get(tuple(c), -1) for c in surface.corners.tolist()]
    balls: dict[int, set[int]] = {}
    for a, b, c in surface.faces[surface.of_grid].tolist():
        for f, g in ((on[a], on[b]), (on[b], on[c]), (on[c], on[a])):
            if f != g:
                if f not in balls:
                    balls[f] = ball(near, f, 5)
                assert g in balls[f]


def test_the_hop_test_is_needed(head):
    """The plain raster of CAP4D bridges: cells have covered corners whose faces are far apart on the head."""
    face = texels(head, 128)[0]
    a, b = face[:, :-1].flatten(), face[:, 1:].flatten()
    covered = (a >= 0) & (b >= 0)
    near = within_hops(head.faces, 5)[a[covered].numpy().copy(), b[covered].numpy().copy()]
    assert (~torch.as_tensor(near)).sum() > 100


@pytest.mark.parametrize("size", [64, 128])
def test_every_region_keeps_its_area(head, surface, size):
    mesh = surface if size == 128 else remesh(head, RemeshConfig(size))
    area = face_normals(head.template, head.faces).norm(dim=-1)
    covered = kept(head, mesh) * area
    assert covered.sum() > 0.99 * area.sum()
    parts = {n: r[head.faces].all(-1) for n, r in head.regions.items()}
    assert not [n for n, ours in parts.items() if covered[ours].sum() < 0.99 * area[ours].sum()]


def test_it_lies_on_the_head(head, surface):
    """Points are the head's own surface, triangles face as it does, and none reaches across the head."""
    vertices = surface.on(head.template)
    normals = normalize(face_normals(vertices, surface.faces), dim=-1)
    theirs = normalize(face_normals(head.template, head.faces), dim=-1)[surface.head_face]
    assert ((normals * theirs).sum(-1) > 0).float().mean() > 0.995
    corners, own = vertices[surface.faces], head.template[head.faces]
    longest = (corners - corners.roll(1, 1)).norm(dim=-1)
    assert longest.max() <= (own - own.roll(1, 1)).norm(dim=-1).max()
    visible = ~head.regions["cap"][head.faces].all(-1)[surface.head_face]
    assert longest[surface.of_grid & visible].max() < 0.03
    assert surface.faces.unique().numel() == len(vertices)
    distance, _ = KDTree(vertices.numpy()).query(head.template[head.regions["lids"] | head.regions["lips"]].numpy())
    assert distance.max() < 0.004


def test_it_moves_with_the_head(head, surface):
    values = head.template @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) + 0.1
    turned = surface.on(values)
    torch.testing.assert_close(
        turned, surface.on(head.template) @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) + 0.1
    )
    own = own_surface(head)
    assert torch.equal(own.on(values), values) and torch.equal(own.faces, head.faces) and not own.remeshed
