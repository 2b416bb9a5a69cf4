"""Find faces and people with MediaPipe, inside its own environment.

A separate program, which runs in `.track-env` (`make track-env`) and imports nothing of this package. It is called with
a folder, so that one start serves many images:

    FOLDER/request.json          {"count": n, "video": bool, "masks": bool}
    FOLDER/00000.npy …           uint8 H×W×3 RGB, one per image
    FOLDER/detections.npz        points float32 [n, 478, 2] px (NaN where no face), score [n], faces int [n]
    FOLDER/00000_mask.npy …      uint8 H×W, 255 where a person is (only with masks)

In a video the face nearest to the last one is followed; in photographs the largest is taken.
"""

import json
import sys
from pathlib import Path

import numpy as np

POINTS = 478
MAX_FACES = 4
MASK_SIDE = 2.8
"""Side of the square that is segmented a second time, in face heights: it contains hair and shoulders."""


def box(points):
    """Return [left, top, right, bottom] of points [n, 2]."""
    return np.concatenate([points.min(0), points.max(0)])


def choose(faces, previous):
    """Return the index of the face to use: the nearest to `previous` (a box, or None), else the largest."""
    boxes = np.stack([box(f) for f in faces])
    sizes = boxes[:, 2:] - boxes[:, :2]
    if previous is None:
        return int(sizes.prod(1).argmax())
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    last = (previous[:2] + previous[2:]) / 2
    # A face of another size is another person, even when near.
    grown = np.abs(np.log(sizes[:, 1] / (previous[3] - previous[1])))
    return int((np.linalg.norm(centres - last, axis=1) / sizes[:, 1] + grown).argmin())


def square(box_px, scale):
    """Return (left, top, side) of the square around a box, integers; it may reach beyond the image."""
    centre, side = (box_px[:2] + box_px[2:]) / 2, scale * (box_px[2:] - box_px[:2]).max()
    left, top = np.floor(centre - side / 2).astype(int)
    return int(left), int(top), max(int(np.ceil(side)), 8)


def cut(image, left, top, side):
    """Return a square of an image, whose edge is repeated beyond the border."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, width - 1)
    return np.ascontiguousarray(image[rows][:, columns])


class Faces:
    """MediaPipe's face mesh, run on crops where the whole image shows no face."""

    def __init__(self, video):
        import mediapipe

        solutions = mediapipe.solutions
        self.mesh = solutions.face_mesh.FaceMesh(
            static_image_mode=not video, max_num_faces=MAX_FACES, refine_landmarks=True, min_detection_confidence=0.4
        )
        self.still = self.mesh
        if video:
            self.still = solutions.face_mesh.FaceMesh(
                static_image_mode=True, max_num_faces=MAX_FACES, refine_landmarks=True, min_detection_confidence=0.4
            )
        self.near = solutions.face_detection.FaceDetection(model_selection=0, min_detection_confidence=0.3)
        self.far = solutions.face_detection.FaceDetection(model_selection=1, min_detection_confidence=0.3)

    def in_image(self, mesh, image):
        """Return all faces' points [478, 2] [px]."""
        height, width = image.shape[:2]
        found = mesh.process(image).multi_face_landmarks or []
        return [np.array([[p.x * width, p.y * height] for p in face.landmark], np.float32) for face in found]

    def boxes(self, detector, image):
        """Return [(box [px], score)] of detected faces."""
        height, width = image.shape[:2]
        out = []
        for d in detector.process(image).detections or []:
            b = d.location_data.relative_bounding_box
            corners = np.array([b.xmin, b.ymin, b.xmin + b.width, b.ymin + b.height])
            out.append((corners * [width, height, width, height], float(d.score[0])))
        return out

    def __call__(self, image, previous):
        """Return the points of all faces, and their scores."""
        faces = self.in_image(self.mesh, image)
        seen = self.boxes(self.near, image) + self.boxes(self.far, image)
        if not faces:
            # A face that is small, or that fills the image: look again at squares around it.
            tries = [square(b, 2.0) for b, _ in sorted(seen, key=lambda x: -x[1])[:MAX_FACES]]
            if previous is not None:
                tries.insert(0, square(previous, 1.6))
            height, width = image.shape[:2]
            tries.append(square(np.array([0.0, 0.0, width, height]), 1.5))
            for left, top, side in tries:
                faces = [
                    f + np.array([left, top], np.float32)
                    for f in self.in_image(self.still, cut(image, left, top, side))
                ]
                if faces:
                    break
        return faces, [score_of(f, seen) for f in faces]


def score_of(points, seen):
    """Return the confidence of the detection whose centre is in the face's box; 0.5, a neutral score, without one."""
    left, top, right, bottom = box(points)
    inside = [s for b, s in seen if left < (b[0] + b[2]) / 2 < right and top < (b[1] + b[3]) / 2 < bottom]
    return max(inside, default=0.5)


class People:
    """MediaPipe's selfie segmentation, run on the whole image and on a square around the face."""

    def __init__(self):
        import mediapipe

        self.model = mediapipe.solutions.selfie_segmentation.SelfieSegmentation(model_selection=0)

    def __call__(self, image, points):
        import cv2

        whole = self.model.process(image).segmentation_mask
        if points is None:
            return whole
        left, top, side = square(box(points), MASK_SIDE)
        closer = self.model.process(cv2.resize(cut(image, left, top, side), (512, 512), interpolation=cv2.INTER_AREA))
        closer = cv2.resize(closer.segmentation_mask, (side, side), interpolation=cv2.INTER_LINEAR)
        # The close look fades into the whole towards its border.
        ramp = np.clip(np.minimum(np.arange(side), np.arange(side)[::-1]) / (0.12 * side), 0, 1)
        weight = np.minimum(ramp[:, None], ramp[None])
        height, width = image.shape[:2]
        y0, y1, x0, x1 = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
        inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        # Beyond the image there is nothing to fade into.
        outer = whole[y0:y1, x0:x1]
        w = weight[inner]
        out = whole.copy()
        out[y0:y1, x0:x1] = closer[inner] * w + outer * (1 - w)
        return out


def serve(folder):
    """Read the request in a folder and write its results there."""
    request = json.loads((folder / "request.json").read_text())
    n = int(request["count"])
    find, segment = Faces(request["video"]), People() if request["masks"] else None
    points = np.full((n, POINTS, 2), np.nan, np.float32)
    scores, counts = np.zeros(n, np.float32), np.zeros(n, np.int64)
    previous = None
    for i in range(n):
        image = np.load(folder / f"{i:05d}.npy", allow_pickle=False)
        faces, face_scores = find(image, previous)
        counts[i] = len(faces)
        if faces:
            k = choose(faces, previous)
            points[i], scores[i] = faces[k], face_scores[k]
            previous = box(faces[k]) if request["video"] else None
        if segment:
            mask = segment(image, points[i] if faces else None)
            np.save(
                folder / f"{i:05d}_mask.npy", (np.clip(mask, 0, 1) * 255).round().astype(np.uint8), allow_pickle=False
            )
        print(f"done {i + 1}", flush=True)
    np.savez(folder / "detections.npz", points=points, scores=scores, faces=counts)


def self_test():
    """Run every model once on an empty image, in which no face may be found."""
    image = np.full((128, 96, 3), 128, np.uint8)
    faces, _ = Faces(video=False)(image, None)
    mask = People()(image, None)
    if faces or mask.shape != image.shape[:2]:
        raise SystemExit("the landmark detector does not behave: remove .track-env and run `make track-env` again")
    print("landmark detector: ready")


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        self_test()
    else:
        serve(Path(sys.argv[1]))
