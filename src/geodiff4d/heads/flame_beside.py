"""Files beside a FLAME model: landmark embeddings, region masks, texture coordinates, eyelids.

They are read under the names that their owners distribute them with, in the model's folder or one below. All FLAME
years share one topology, which is what these files number; each is checked against the model's vertices and faces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from geodiff4d.core.errors import UserError
from geodiff4d.heads.pickles import read_npy, read_pickle

FULL_EMBEDDINGS = ("landmark_embedding_with_eyes.npy", "landmark_embedding.npy")
STATIC_EMBEDDINGS = ("flame_static_embedding_68.pkl", "flame_static_embedding.pkl")
CONTOUR = "flame_dynamic_embedding.npy"
MEDIAPIPE = "mediapipe_landmark_embedding.npz"
MASKS = "FLAME_masks.pkl"
TEMPLATES = ("head_template_mesh.obj", "head_template.obj", "template.obj")
TEXTURE = "FLAME_texture.npz"
EYELIDS = ("l_eyelid.npy", "r_eyelid.npy")
NAMES = (*FULL_EMBEDDINGS, *STATIC_EMBEDDINGS, CONTOUR, MEDIAPIPE, MASKS, *TEMPLATES, TEXTURE, *EYELIDS)


@dataclass(frozen=True)
class Points:
    """Landmarks of a file: faces and barycentric coordinates."""

    face_index: Int[np.ndarray, " points"]
    bary: Float[np.ndarray, "points 3"]


class Beside:
    """The files next to a model, found by name and read on request.

    Every method returns None where there is no file.

    Raises:
        UserError: a file is damaged, or numbers vertices or faces that the model does not have.
    """

    def __init__(self, model: Path, verts: int, faces: Int[np.ndarray, "faces 3"]):
        self.model, self.verts, self.faces = model, verts, faces
        self.files = beside(model)

    def landmarks68(self) -> Points | None:
        """Return iBUG's 68: a full embedding, or the static 51 after the contour of a head seen from the front."""
        for name in FULL_EMBEDDINGS:
            if name in self.files:
                data = self._dict(read_npy(self.files[name]), name)
                index, bary = np.ravel(self._get(data, "full_lmk_faces_idx", name)), data.get("full_lmk_bary_coords")
                # Those with eyes have the two irises after the 68.
                return self._points(index[:68], np.reshape(np.asarray(bary), (-1, 3))[:68], name, 68)
        for name in STATIC_EMBEDDINGS:
            if name in self.files:
                data = self._dict(read_pickle(self.files[name]), name)
                index, bary = (np.asarray(self._get(data, k, name)) for k in ("lmk_face_idx", "lmk_b_coords"))
                if len(index) == 51 and CONTOUR in self.files:
                    front = self._dict(read_npy(self.files[CONTOUR]), CONTOUR)
                    contour = [np.asarray(self._get(front, k, CONTOUR))[0] for k in ("lmk_face_idx", "lmk_b_coords")]
                    index, bary = np.concatenate([contour[0], index]), np.concatenate([contour[1], bary])
                if len(index) == 68:
                    return self._points(index, bary, name, 68)
        return None

    def mediapipe(self) -> tuple[Points, Int[np.ndarray, " points"]] | None:
        """Return the 105 of MediaPipe's points that MPI embedded, and their numbers."""
        if MEDIAPIPE not in self.files:
            return None
        data = self._npz(MEDIAPIPE, ("lmk_face_idx", "lmk_b_coords", "landmark_indices"))
        index = data["landmark_indices"].astype(np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < 478:
            raise UserError(f"{self.files[MEDIAPIPE]}: landmark_indices are not MediaPipe's: download it again")
        return self._points(data["lmk_face_idx"], data["lmk_b_coords"], MEDIAPIPE, len(index)), index

    def masks(self) -> dict[str, Bool[np.ndarray, " verts"]] | None:
        """Return FLAME's vertex masks, by their own names."""
        if MASKS not in self.files:
            return None
        out = {}
        for name, listed in self._dict(read_pickle(self.files[MASKS]), MASKS).items():
            index = np.asarray(listed)
            if index.dtype.kind not in "iu" or index.ndim != 1:
                raise UserError(f"{self.files[MASKS]}: {name} is not a list of vertices: download FLAME's masks again")
            self._inside(index, self.verts, "vertices", MASKS)
            out[name] = np.zeros(self.verts, bool)
            out[name][index] = True
        return out

    def texture_coordinates(self) -> tuple[Float[np.ndarray, "uvs 2"], Int[np.ndarray, "faces 3"]] | None:
        """Return FLAME's atlas, v down: of a template mesh, or of the texture space."""
        for name in TEMPLATES:
            if name in self.files:
                uv, uv_faces = self._template(self.files[name])
                if len(uv):
                    return np.stack([uv[:, 0], 1 - uv[:, 1]], 1), uv_faces
        if TEXTURE not in self.files:
            return None
        data = self._npz(TEXTURE, ("vt", "ft"))
        uv, uv_faces = data["vt"].astype(np.float64), data["ft"].astype(np.int64)
        if uv.ndim != 2 or uv.shape[1] != 2 or uv_faces.shape != self.faces.shape:
            raise self._foreign(TEXTURE, f"texture faces {uv_faces.shape[0]}, the model has {len(self.faces)}")
        self._inside(uv_faces, len(uv), "texture coordinates", TEXTURE)
        return np.stack([uv[:, 0], 1 - uv[:, 1]], 1), uv_faces

    def eyelids(self) -> Float[np.ndarray, "verts 3 2"] | None:
        """Return Pixel3DMM's displacements of the left and right lid, closed at weight 1 [m]."""
        found = [self.files[name] for name in EYELIDS if name in self.files]
        if len(found) == 1:
            raise UserError(f"{found[0]} is alone: expected both {' and '.join(EYELIDS)} beside the FLAME model")
        if not found:
            return None
        lids = [np.asarray(read_npy(path)) for path in found]
        for path, lid in zip(found, lids, strict=True):
            if lid.shape != (self.verts, 3) or not np.isfinite(lid).all():
                raise self._foreign(path.name, f"{'×'.join(map(str, lid.shape))} numbers for {self.verts} vertices")
        return np.stack(lids, -1)

    def _points(self, index: Any, bary: Any, name: str, count: int) -> Points:
        index, bary = np.asarray(index), np.asarray(bary, np.float64)
        if index.dtype.kind not in "iu" or index.shape != (count,) or bary.shape != (count, 3):
            raise UserError(f"{self.files[name]}: expected {count} landmarks, got {index.shape}: download it again")
        self._inside(index, len(self.faces), "faces", name)
        if not np.isfinite(bary).all() or np.abs(bary.sum(1) - 1).max(initial=0) > 1e-2:
            raise UserError(f"{self.files[name]}: its barycentric coordinates do not add up to 1: download it again")
        return Points(index.astype(np.int64), bary)

    def _inside(self, index: np.ndarray, count: int, what: str, name: str) -> None:
        if index.size and not 0 <= index.min() <= index.max() < count:
            raise self._foreign(name, f"{what} up to {index.max()}, there are {count}")

    def _foreign(self, name: str, why: str) -> UserError:
        return UserError(
            f"{self.files[name]} does not belong to {self.model} ({why}): files of different models do not mix; "
            "keep each model in a folder of its own"
        )

    def _dict(self, value: Any, name: str) -> dict:
        if not isinstance(value, dict):
            raise UserError(f"{self.files[name]} is not what its name says: expected a dict; download it again")
        return value

    def _get(self, data: dict, key: str, name: str) -> Any:
        if key not in data:
            raise UserError(f"{self.files[name]} lacks `{key}`: expected FLAME's embedding; download it again")
        return data[key]

    def _npz(self, name: str, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
        return read_npz(self.files[name], keys)

    def _template(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        verts, uv, faces, uv_faces = read_obj(path)
        if verts != self.verts or len(faces) != len(self.faces):
            raise self._foreign(path.name, f"{verts} vertices, {len(faces)} faces")
        if not len(uv):
            return uv, uv_faces
        if np.array_equal(faces, self.faces):
            return uv, uv_faces
        # The same triangles in another order: find each by its corners.
        order = {tuple(sorted(f)): i for i, f in enumerate(faces.tolist())}
        rows = [order.get(tuple(sorted(f)), -1) for f in self.faces.tolist()]
        if -1 in rows:
            raise self._foreign(path.name, "other triangles")
        corner = (faces[rows][:, None, :] == self.faces[:, :, None]).argmax(-1)
        return uv, np.take_along_axis(uv_faces[rows], corner, 1)


def beside(model: Path) -> dict[str, Path]:
    """Return the known files in a model's folder or one below it, by name; the model's own folder takes precedence."""
    folders = [model.parent, *sorted(p for p in model.parent.iterdir() if p.is_dir())]
    found: dict[str, Path] = {}
    for folder in folders:
        for name in NAMES:
            if name not in found and (folder / name).is_file():
                found[name] = folder / name
    return found


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in keys}
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: expected {', '.join(keys)}; download it again") from None
    except Exception as error:  # damaged archives raise what they like
        raise UserError(f"{path} is damaged or holds objects ({error}): download it again") from None


def read_obj(path: Path) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Return an .obj of triangles: number of vertices, texture coordinates (v up), faces, texture faces."""
    verts, uv, corners = 0, [], []
    try:
        for line in path.read_text(errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "v":
                verts += 1
            elif kind == "vt":
                uv.append([float(x) for x in rest.split()[:2]])
            elif kind == "f":
                corners.append([[int(i or 0) for i in [*c.split("/"), ""][:2]] for c in rest.split()])
        table = np.array(corners, np.int64).reshape(-1, 3, 2) - 1
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not an .obj of triangles ({error}): download it again") from None
    coordinates = np.array(uv, np.float64).reshape(-1, 2)
    faces, uv_faces = table[..., 0], table[..., 1]
    inside = not uv or (uv_faces.size and 0 <= uv_faces.min() <= uv_faces.max() < len(uv))
    if not len(table) or faces.min() < 0 or faces.max() >= verts or not inside:
        raise UserError(f"{path} has faces that point outside the file: download it again")
    return verts, coordinates, faces, uv_faces
