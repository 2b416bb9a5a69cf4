"""Write random but well-formed files in FLAME's formats, as Python 2 with chumpy wrote them: no FLAME data needed."""

import struct
from pathlib import Path

import numpy as np

VERTS, FACES = 5023, 9976


def arrays(verts: int = VERTS, faces: int = FACES, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays of a FLAME model: a lumpy ball with eyes, a jaw and a neck, every part of it float64."""
    rng = np.random.default_rng(seed)
    template = rng.normal(size=(verts, 3))
    template *= np.array([0.08, 0.13, 0.1]) / np.linalg.norm(template, axis=1, keepdims=True)
    f = np.stack([rng.permutation(verts) for _ in range(3 * faces // verts + 1)]).ravel()[: 3 * faces].reshape(-1, 3)
    weights = rng.dirichlet(np.full(5, 0.3), verts)
    for joint, count in ((3, verts // 20), (4, verts // 20), (2, verts // 10), (0, verts // 10)):
        rigid = rng.choice(verts, count, replace=False)
        weights[rigid] = np.eye(5)[joint]
    regressor = np.zeros((5, verts))
    for row in regressor:
        row[rng.choice(verts, 12, replace=False)] = rng.dirichlet(np.ones(12))
    return {
        "v_template": template, "f": f.astype(np.uint32), "weights": weights, "J_regressor": regressor,
        "shapedirs": 1e-3 * rng.standard_normal((verts, 3, 400)),
        "posedirs": 1e-3 * rng.standard_normal((verts, 3, 36)),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.uint32),
        "J": regressor @ template,
    }  # fmt: skip


def write_model(path: Path, a: dict[str, np.ndarray], **more: object) -> Path:
    """Write a model as FLAME's: a Python 2 pickle, most arrays chumpy's, the regressor sparse; plus `more`."""
    wrapped = ("v_template", "shapedirs", "posedirs", "weights", "J")
    items = {k: Chumpy(v) if k in wrapped else v for k, v in a.items()}
    items |= {"J_regressor": Sparse(a["J_regressor"]), "bs_style": "lbs", "bs_type": "lrotmin"} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2(items))
    return path


class Chumpy:
    """Writes its array as chumpy.ch.Ch keeps it."""

    def __init__(self, array: np.ndarray):
        self.array = array


class Sparse:
    """Writes its array as scipy.sparse's csc_matrix of old."""

    def __init__(self, array: np.ndarray):
        self.array = array


def python2(value: object) -> bytes:
    """Pickle as Python 2 did (protocol 2): text and raw bytes are the same kind of string."""
    return b"\x80\x02" + _emit(value) + b"."


def _emit(v: object) -> bytes:
    if isinstance(v, dict):
        return b"}(" + b"".join(_emit(k) + _emit(x) for k, x in v.items()) + b"u"
    if isinstance(v, list):
        return b"](" + b"".join(map(_emit, v)) + b"e"
    if isinstance(v, tuple):
        return b"(" + b"".join(map(_emit, v)) + b"t"
    if isinstance(v, bool) or v is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[v]
    if isinstance(v, int):
        return b"J" + struct.pack("<i", v)
    if isinstance(v, str | bytes):
        raw = v.encode("latin-1") if isinstance(v, str) else v
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw
    if isinstance(v, np.ndarray):
        code = v.dtype.str[1:]
        dtype = b"cnumpy\ndtype\n" + _emit((code, 0, 1)) + b"R" + _emit((3, "<", None, None, None, -1, -1, 0)) + b"b"
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _emit((0,)) + _emit("b") + b"tR"
        return head + b"(" + _emit(1) + _emit(v.shape) + dtype + _emit(False) + _emit(v.tobytes()) + b"tb"
    if isinstance(v, Chumpy):
        dirty = b"c__builtin__\nset\n(]tR"
        state = _emit("x") + _emit(v.array) + _emit("_itr") + _emit(None) + _emit("_dirty_vars") + dirty
        return b"cchumpy.ch\nCh\n)\x81}(" + state + b"ub"
    if isinstance(v, Sparse):
        columns, rows = np.nonzero(v.array.T)
        starts = np.concatenate([[0], np.bincount(columns, minlength=v.array.shape[1]).cumsum()])
        state = {
            "_shape": v.array.shape, "maxprint": 50, "indices": rows.astype(np.int32),
            "indptr": starts.astype(np.int32), "data": v.array[rows, columns],
        }  # fmt: skip
        return b"cscipy.sparse.csc\ncsc_matrix\n)\x81" + _emit(state) + b"b"
    raise TypeError(type(v))


def write_beside(folder: Path, a: dict[str, np.ndarray], seed: int = 1) -> None:
    """Write what people keep beside a model: embeddings, masks, a template mesh with an atlas, eyelids."""
    rng = np.random.default_rng(seed)
    verts, faces = len(a["v_template"]), len(a["f"])

    def points(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, faces, shape), rng.dirichlet(np.ones(3), shape)

    full, static, dynamic, mediapipe = points(1, 70), points(51), points(79, 17), points(105)
    embedding = {
        "full_lmk_faces_idx": full[0], "full_lmk_bary_coords": full[1], "static_lmk_faces_idx": static[0],
        "static_lmk_bary_coords": static[1], "dynamic_lmk_faces_idx": dynamic[0], "dynamic_lmk_bary_coords": dynamic[1],
    }  # fmt: skip
    np.save(folder / "landmark_embedding_with_eyes.npy", np.array(embedding, dtype=object), allow_pickle=True)
    static_file = {"lmk_face_idx": static[0], "lmk_b_coords": static[1]}
    (folder / "flame_static_embedding.pkl").write_bytes(python2(static_file))
    contour = {"lmk_face_idx": dynamic[0], "lmk_b_coords": dynamic[1]}
    np.save(folder / "flame_dynamic_embedding.npy", np.array(contour, dtype=object), allow_pickle=True)
    names = np.sort(rng.choice(478, 105, replace=False))
    np.savez(
        folder / "mediapipe_landmark_embedding.npz",
        lmk_face_idx=mediapipe[0], lmk_b_coords=mediapipe[1], landmark_indices=names,
    )  # fmt: skip
    masks = {}
    for name in ("face", "neck", "scalp", "boundary", "lips", "left_ear", "right_ear", "forehead", "nose"):
        masks[name] = rng.choice(verts, verts // 12, replace=False)
    (folder / "FLAME_masks.pkl").write_bytes(python2(masks))
    uv = rng.random((verts + 95, 2))
    write_obj(folder / "head_template_mesh.obj", a["v_template"], uv, a["f"], rng.integers(0, len(uv), (faces, 3)))
    for name in ("l_eyelid.npy", "r_eyelid.npy"):
        lid = np.zeros((verts, 3))
        lid[rng.choice(verts, verts // 30, replace=False)] = rng.normal(scale=5e-3, size=(verts // 30, 3))
        np.save(folder / name, lid)


def write_obj(path: Path, vertices: np.ndarray, uv: np.ndarray, faces: np.ndarray, uv_faces: np.ndarray) -> None:
    lines = [f"v {x} {y} {z}" for x, y, z in vertices] + [f"vt {u:.6f} {v:.6f}" for u, v in uv]
    both = np.stack([faces.astype(np.int64), uv_faces], -1) + 1
    lines += ["f " + " ".join(f"{a}/{b}" for a, b in face) for face in both]
    path.write_text("\n".join(lines) + "\n")
