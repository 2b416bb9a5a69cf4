"""Place MediaPipe's landmarks on OpenHead: detect them on renders, cast them back onto the mesh, keep those that agree.

Many people (random identities), poses and half of them with the jaw open (so that upper and lower lip part) are
rendered with simple colours: dark brows, lips, irises, hair. Every detected point is a ray to a face and barycentrics,
hence a place on the template. A point is kept where its places agree: its median is snapped to the nearest surface of
its part (lips and lids to skin, irises to the eyeballs) and written into the asset; its other arrays stay as they are.

    .venv/bin/python tools/derive_mediapipe_embedding.py [--renders 96] [--preview preview.png]
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geodiff4d.core.camera import Camera, pinhole
from geodiff4d.core.geometry import look_at
from geodiff4d.core.images import write_image
from geodiff4d.heads import Head, HeadParams, Landmarks, load_head
from geodiff4d.heads.openhead import OPENHEAD
from geodiff4d.render.meshes import Fragments, interpolate, rasterize
from geodiff4d.tracking.detect import Detection, MediaPipeDetector
from geodiff4d.tracking.fit import CONTOUR

SIZE, SUPERSAMPLING = 512, 2
MAX_SPREAD_M = 0.0035
"""Median distance of a point's places from their median; contour and lip points may have twice as much."""
MIN_HITS = 0.4
"""Share of the usable renders in which a point must hit the head."""
IRIS = range(468, 478)


def person(head: Head, rng: np.random.Generator, open_jaw: bool) -> tuple[HeadParams, Camera]:
    """Draw an identity, a small head turn and a camera in front of it."""
    params = head.neutral(1)
    shape = torch.from_numpy(rng.normal(0, 0.8, params.shape.shape)).float()
    turn = torch.from_numpy(np.deg2rad([rng.uniform(-10, 10), rng.uniform(-30, 30), rng.uniform(-5, 5)])).float()[None]
    expr = params.expr.clone()
    if open_jaw:
        expr[:, head.expression_names.index("jawOpen")] = float(rng.uniform(0.3, 0.6))
    target = torch.tensor([0.0, 0.0, 0.02])
    T = look_at(target + torch.tensor([0.0, 0.0, 1.0]), target, torch.tensor([0.0, 1.0, 0.0]))
    camera = Camera(T, pinhole(2.3 * SIZE, SIZE, SIZE), SIZE, SIZE)
    return replace(params, shape=shape, rotation=turn, expr=expr), camera


def colours(head: Head, rng: np.random.Generator) -> Tensor:
    """Draw a skin, lip, brow, hair and iris colour, and spread them over the vertices [verts, 3]."""
    tone = rng.uniform(0.25, 0.9)
    skin = torch.tensor([0.95, 0.76, 0.66]) * tone + torch.tensor([0.30, 0.18, 0.12]) * (1 - tone)
    dark = torch.tensor([0.12, 0.08, 0.06]) * float(rng.uniform(0.4, 1.5))
    out = skin.repeat(len(head.template), 1)
    # Brows are few vertices: soften them by distance, to lines of a few millimetres.
    brow = head.template[head.regions["brows"]]
    near = torch.cdist(head.template, brow).amin(1)
    out = _mix(out, dark, (-(near / 0.004).square()).exp() * 0.85)
    out = _mix(out, skin * torch.tensor([0.8, 0.45, 0.45]), head.regions["lips"].float())
    _, y, z = head.template.T
    hair = torch.sigmoid((y - 0.075 + (0.06 - z).clamp(min=0) * -0.9) / 0.004) * ~head.regions["ears"]
    out = _mix(out, dark, hair * (0 if rng.random() < 0.2 else 1))
    for inner in ("mouth", "sockets"):
        out = _mix(out, skin * torch.tensor([0.35, 0.12, 0.12]), (head.regions[inner] & ~head.regions["lips"]).float())
    out = _mix(out, torch.tensor([0.85, 0.82, 0.75]), head.regions["teeth"].float())
    return _mix(out, torch.tensor([0.7, 0.35, 0.35]), head.regions["tongue"].float())


def _mix(a: Tensor, colour: Tensor, weight: Tensor) -> Tensor:
    return a * (1 - weight[:, None]) + colour * weight[:, None]


def eye_axes(head: Head) -> Tensor:
    """Unit direction of each eyeball vertex from its eye's centre at rest [verts, 3], zero elsewhere."""
    out = torch.zeros_like(head.template)
    for side in ("left_eye", "right_eye"):
        region = head.regions[side]
        points = head.template[region]
        centre = (points.amin(0) + points.amax(0)) / 2
        out[region] = torch.nn.functional.normalize(points - centre, dim=-1)
    return out


def render(head: Head, params: HeadParams, camera: Camera, rng: np.random.Generator) -> tuple[Tensor, Fragments]:
    """Render one person [3, size, size] and say what each supersampled pixel sees."""
    camera = camera.resized(SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING).expand(1)
    mesh = head.pose(params)
    fragments = rasterize(mesh.vertices, mesh.faces, camera)
    attributes = torch.cat([colours(head, rng), eye_axes(head), mesh.normals[0]], -1)
    colour, axis, normal = interpolate(fragments, mesh.faces, attributes)[0].split(3)
    # Irises are drawn per pixel: the eyeballs are too coarse for them.
    angle = torch.rad2deg(torch.acos((axis[2] / axis.norm(dim=0).clamp(min=1e-6)).clamp(-1, 1)))
    iris = torch.from_numpy(rng.uniform(0.05, 0.4, 3)).float()[:, None, None]
    eye = torch.where(angle < 12, 0.02, torch.where(angle < 29, iris, torch.full_like(iris, 0.9)))
    colour = torch.where(axis.norm(dim=0) > 0.5, eye, colour)
    light = torch.nn.functional.normalize(
        torch.tensor([rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.8), 1.0]), dim=0
    ).float()
    shade = 0.45 + 0.6 * (torch.nn.functional.normalize(normal, dim=0) * light[:, None, None]).sum(0).clamp(min=0)
    image = torch.where(fragments.mask, colour * shade, float(rng.uniform(0.2, 0.8))).clamp(0, 1).pow(0.75)
    return torch.nn.functional.avg_pool2d(image, SUPERSAMPLING), fragments[0]


def cast(head: Head, detection: Detection, fragments: Fragments) -> Tensor:
    """Return each detected point's place on the template [points, 3], NaN where it misses the head."""
    at = (detection.points * SUPERSAMPLING).floor().long().clamp(0, SIZE * SUPERSAMPLING - 1)
    face = fragments.face_index[at[:, 1], at[:, 0]]
    places = Landmarks(face.clamp(min=0), fragments.bary[at[:, 1], at[:, 0]]).on(head.template, head.faces)
    return torch.where((face >= 0)[:, None], places, torch.nan)


def nearest_on_mesh(points: Tensor, head: Head, faces: Tensor) -> tuple[Landmarks, Tensor]:
    """Snap points to the nearest of the chosen faces; returns (landmarks, distances [m])."""
    a, b, c = (head.template[head.faces[faces][:, i]] for i in range(3))
    samples, bary = [], []
    n = 8
    for i in range(n + 1):
        for j in range(n + 1 - i):
            w = torch.tensor([i, j, n - i - j]) / n
            samples.append(w[0] * a + w[1] * b + w[2] * c)
            bary.append(w)
    # A dense sample of each face (1/8 of its edge, a third of a millimetre) stands in for an exact projection.
    distance, best = torch.cdist(points, torch.stack(samples).reshape(-1, 3)).min(1)
    return Landmarks(faces[best % len(faces)], torch.stack(bary)[best // len(faces)]), distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=int, default=96)
    parser.add_argument("--preview", type=Path, default=None, help="picture of the kept points on the neutral head")
    parser.add_argument("--dry-run", action="store_true", help="do not write the asset")
    args = parser.parse_args()
    head, rng = load_head("openhead"), np.random.default_rng(0)

    people = [person(head, rng, open_jaw=i % 2 == 1) for i in range(args.renders)]
    looks = [render(head, *p, rng) for p in people]
    detections = MediaPipeDetector(masks=False).detect([image for image, _ in looks])
    seen = [i for i, d in enumerate(detections) if d is not None]
    print(f"faces found in {len(seen)} of {len(looks)} renders")
    places = torch.stack([cast(head, detections[i], looks[i][1]) for i in seen])
    yaw = torch.tensor([float(people[i][0].rotation[0, 1].abs()) for i in seen])
    opened = torch.tensor([i % 2 == 1 for i in seen])

    lips = set(LIPS)
    contour = set(CONTOUR)
    median, spread, share = [], [], []
    for p in range(places.shape[1]):
        use = torch.ones_like(opened)
        if p in lips:
            use = opened
        if p in contour:
            use = use & (yaw < np.deg2rad(10))
        x = places[use, p]
        x = x[x.isfinite().all(-1)]
        centre = x.median(0).values if len(x) else torch.full((3,), torch.nan)
        median.append(centre)
        spread.append((x - centre).norm(dim=-1).median() if len(x) else torch.tensor(torch.inf))
        share.append(len(x) / max(int(use.sum()), 1))
    median, spread, share = torch.stack(median), torch.stack(spread), torch.tensor(share)
    median = symmetric(median)
    limit = torch.tensor([2 * MAX_SPREAD_M if p in contour | lips else MAX_SPREAD_M for p in range(len(spread))])
    keep = (spread < limit) & (share > MIN_HITS)

    index = torch.arange(places.shape[1])[keep]
    landmarks, distance = snap(head, index, median[keep])
    good = distance < 0.006
    index, landmarks = index[good], Landmarks(landmarks.face_index[good], landmarks.bary[good])
    print(f"kept {len(index)} of {places.shape[1]} points, median spread {1e3 * spread[index].median():.2f} mm,")
    missing = sorted(lips - set(index.tolist()))
    print(f"lips without a place: {missing}, spread [mm] {[round(1e3 * float(spread[i]), 1) for i in missing]}")
    print(f"irises {sum(int(i) in IRIS for i in index)}, lips {sum(int(i) in lips for i in index)}/{len(lips)}")
    if args.preview:
        preview(head, landmarks, index, args.preview)
    if not args.dry_run:
        write(index, landmarks)


def symmetric(places: Tensor) -> Tensor:
    """Average each point with the mirror image of its twin: faces and the template are symmetric, lights are not."""
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    known = places.nan_to_num(9.0)
    distance = torch.cdist(known * mirror, known)
    twin = distance.argmin(1)
    mutual = (twin[twin] == torch.arange(len(twin))) & (distance.amin(1) < 0.008)
    return torch.where(mutual[:, None], (places + places[twin] * mirror) / 2, places)


def snap(head: Head, index: Tensor, places: Tensor) -> tuple[Landmarks, Tensor]:
    """Snap each point to the part of the mesh it belongs to: irises to the eyeballs, the rest to skin and lips."""
    eyes = head.regions["eyes"][head.faces].any(1)
    inner = torch.stack([head.regions[r] for r in ("teeth", "tongue", "mouth", "sockets")]).any(0)
    inner = inner & ~head.regions["lips"] & ~head.regions["lids"]
    skin = ~eyes & ~inner[head.faces].any(1)
    iris = torch.isin(index, torch.tensor(IRIS))
    face, bary, distance = torch.zeros_like(index), torch.zeros(len(index), 3), torch.zeros(len(index))
    for which, faces in ((iris, eyes), (~iris, skin)):
        part, d = nearest_on_mesh(places[which], head, faces.nonzero()[:, 0])
        face[which], bary[which], distance[which] = part.face_index, part.bary, d
    return Landmarks(face, bary), distance


def preview(head: Head, landmarks: Landmarks, index: Tensor, path: Path) -> None:
    """Draw the kept points (green; irises red, contour blue) on the neutral head, from the front and turned by 35°."""
    from PIL import Image, ImageDraw

    views = []
    for yaw in (0.0, 35.0):
        params = replace(head.neutral(1), rotation=torch.tensor([[0.0, float(np.deg2rad(yaw)), 0.0]]))
        _, camera = person(head, np.random.default_rng(0), False)
        image, _ = render(head, params, camera, np.random.default_rng(3))
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).resize((1024, 1024))
        draw = ImageDraw.Draw(picture)
        xy, _ = camera.project(landmarks.on(head.pose(params).vertices[0], head.faces))
        for i, (x, y) in zip(index.tolist(), (2 * xy).tolist(), strict=True):
            fill = (255, 0, 0) if i in IRIS else (0, 80, 255) if i in CONTOUR else (0, 255, 0)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=fill)
        views.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255)
    write_image(path, torch.cat(views, -1))


def write(index: Tensor, landmarks: Landmarks) -> None:
    """Replace the asset's three MediaPipe arrays and keep every other byte of data."""
    with np.load(OPENHEAD, allow_pickle=False) as data:
        arrays = {k: data[k] for k in data.files}
    arrays |= {
        "mediapipe_face_index": landmarks.face_index.numpy().astype(np.int32),
        "mediapipe_bary": landmarks.bary.numpy().astype(np.float32),
        "mediapipe_index": index.numpy().astype(np.int32),
    }
    temporary = OPENHEAD.with_name(".openhead.part.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, OPENHEAD)


# MediaPipe's lip loops, outer then inner, upper and lower (its published topology).
LIPS = (
    61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 146, 91, 181, 84, 17, 314, 405, 321, 375,
    78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
