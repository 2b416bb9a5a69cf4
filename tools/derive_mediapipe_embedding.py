"""Place MediaPipe's landmarks on OpenHead: detect them on renders, cast them back onto the mesh, keep those that agree.

Training subjects of the open world (their true meshes are known) are rendered in many poses, half of them with the jaw
open so that upper and lower lip part. Every detected point is a ray to a face and barycentrics, hence a place on the
template. A point is kept where its places agree: their median is snapped to the nearest surface of its part (lips and
lids to skin, irises to the eyeballs) and written into the asset; its other arrays stay as they are.

    .venv/bin/python tools/derive_mediapipe_embedding.py [--renders 160] [--preview preview.png]
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geodiff4d.core.images import encode_normals, to_uint8, write_image
from geodiff4d.heads import Head, Landmarks, load_head
from geodiff4d.heads.openhead import OPENHEAD
from geodiff4d.render.crops import canonical_crop, head_region
from geodiff4d.render.meshes import Fragments, rasterize, render_normals
from geodiff4d.render.viewpoints import FRONT_CAMERA, capture_cameras
from geodiff4d.tracking.detect import Detection, MediaPipeDetector
from geodiff4d.tracking.points import CONTOUR
from geodiff4d.world.subject import SyntheticSubject

SIZE, FINER = 512, 2
MAX_SPREAD_M = 0.005
"""Median distance of a point's places from their median; contour and lip points may have twice as much."""
MAX_SNAP_M = 0.006
MIN_HITS = 0.4
"""Share of the usable renders in which a point must hit the head."""
IRIS = range(468, 478)


def person(head: Head, seed: int) -> tuple[Tensor, Fragments, float]:
    """Render a training subject [3, size, size]; also what each pixel, finer, sees of the bare head, and its yaw [rad].

    Odd seeds have their jaw open.
    """
    rng, subject = np.random.default_rng(seed), SyntheticSubject(seed, "train")
    expr = torch.zeros(1, len(head.expression_names))
    if seed % 2:
        expr[0, head.expression_names.index("jawOpen")] = float(rng.uniform(0.3, 0.6))
    turn = np.deg2rad([rng.uniform(-12, 12), rng.uniform(-30, 30), rng.uniform(-5, 5)])
    params = subject.params(expr, rotation=torch.from_numpy(turn).float()[None])
    vertices = subject.vertices(params)
    front = capture_cameras(SIZE)[FRONT_CAMERA : FRONT_CAMERA + 1]
    camera = canonical_crop(front, vertices[0, head_region(head)])
    fine = camera.resized(SIZE * FINER, SIZE * FINER)
    return subject.render(params, camera, 1).rgb[0], rasterize(vertices, head.faces, fine)[0], abs(float(turn[1]))


def cast(head: Head, detection: Detection, fragments: Fragments) -> Tensor:
    """Return each detected point's place on the template [points, 3], NaN where it misses the head."""
    at = (detection.points * FINER).floor().long().clamp(0, SIZE * FINER - 1)
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
    parser.add_argument("--renders", type=int, default=160)
    parser.add_argument("--preview", type=Path, default=None, help="picture of the kept points on the neutral head")
    parser.add_argument("--dry-run", action="store_true", help="do not write the asset")
    args = parser.parse_args()
    head = load_head("openhead")

    people = [person(head, seed) for seed in range(args.renders)]
    detections = MediaPipeDetector(masks=False).detect([image for image, _, _ in people])
    known = {i: d for i, d in enumerate(detections) if d is not None}
    seen = list(known)
    print(f"faces found in {len(seen)} of {len(people)} renders")
    places = torch.stack([cast(head, d, people[i][1]) for i, d in known.items()])
    frontal = torch.tensor([people[i][2] < np.deg2rad(10) for i in seen])
    index, landmarks = agreed(head, places, frontal, opened=torch.tensor(seen) % 2 == 1)
    print(f"lips without a place: {sorted(set(LIPS) - set(index.tolist()))}")
    print(moved(head, index, landmarks))
    if args.preview:
        preview(head, landmarks, index, args.preview)
    if not args.dry_run:
        write(index, landmarks)


def moved(head: Head, index: Tensor, landmarks: Landmarks) -> str:
    """Say how far the points lie from those that the asset has now."""
    was = dict(zip(head.mediapipe_index.tolist(), head.mediapipe.on(head.template, head.faces), strict=True))
    now = dict(zip(index.tolist(), landmarks.on(head.template, head.faces), strict=True))
    both = sorted(was.keys() & now.keys())
    if not both:
        return "the asset has no points yet"
    mm = 1e3 * torch.stack([(now[i] - was[i]).norm() for i in both])
    far = [f"{both[k]} {mm[k]:.1f}" for k in mm.argsort(descending=True)[:8].tolist()]
    return (
        f"against the asset: {len(both)} points moved by {mm.median():.2f} mm (median), {mm.quantile(0.9):.2f} (90 %), "
        f"most {', '.join(far)}; new {sorted(now.keys() - was.keys())}, lost {sorted(was.keys() - now.keys())}"
    )


def agreed(head: Head, places: Tensor, frontal: Tensor, opened: Tensor) -> tuple[Tensor, Landmarks]:
    """Return the points whose places [renders, points, 3] agree, and where they are on the mesh.

    Lips count only in renders with an open mouth, the outline only in frontal ones.
    """
    lips, contour = set(LIPS), set(CONTOUR)
    median, spread, share = [], [], []
    for p in range(places.shape[1]):
        use = opened if p in lips else frontal if p in contour else torch.ones_like(opened)
        x = places[use, p]
        x = x[x.isfinite().all(-1)]
        centre = x.median(0).values if len(x) else torch.full((3,), torch.nan)
        median.append(centre)
        spread.append((x - centre).norm(dim=-1).median() if len(x) else torch.tensor(torch.inf))
        share.append(len(x) / max(int(use.sum()), 1))
    centres, spreads = symmetric(torch.stack(median)), torch.stack(spread)
    limit = torch.tensor([2 * MAX_SPREAD_M if p in contour | lips else MAX_SPREAD_M for p in range(len(spreads))])
    keep = (spreads < limit) & (torch.tensor(share) > MIN_HITS)
    index = keep.nonzero()[:, 0]
    landmarks, distance = snap(head, index, centres[index])
    good = distance < MAX_SNAP_M
    index, landmarks = index[good], Landmarks(landmarks.face_index[good], landmarks.bary[good])
    print(f"kept {len(index)} of {len(keep)} points, median spread {1e3 * spreads[index].median():.2f} mm")
    return index, landmarks


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
        mesh = head.pose(params)
        camera = canonical_crop(
            capture_cameras(1024)[FRONT_CAMERA : FRONT_CAMERA + 1], mesh.vertices[0, head_region(head)]
        )
        picture = Image.fromarray(to_uint8(encode_normals(*render_normals(mesh, camera))[0]))
        draw = ImageDraw.Draw(picture)
        xy, _ = camera.project(landmarks.on(mesh.vertices, head.faces))
        for i, (x, y) in zip(index.tolist(), xy[0].tolist(), strict=True):
            fill = (255, 0, 0) if i in IRIS else (0, 80, 255) if i in CONTOUR else (0, 255, 0)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=fill)
        views.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
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
