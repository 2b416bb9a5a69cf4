"""The restricted unpickler: what numpy, scipy and chumpy write is read, and nothing else happens."""

import io
import os
import pickle
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from flame_files import Chumpy, Sparse, python2
from geodiff4d.core.errors import UserError
from geodiff4d.heads.pickles import MAX_FILE_BYTES, read_npy, read_pickle


@pytest.fixture
def read(tmp_path):
    def reader(data: bytes):
        path = tmp_path / "file.pkl"
        path.write_bytes(data)
        return read_pickle(path)

    return reader


@pytest.mark.parametrize("protocol", range(6))
def test_data_of_every_protocol_is_read(read, protocol):
    g = np.random.default_rng(0)
    data = {
        "real": g.normal(size=(4, 3, 2)), "columns first": np.asfortranarray(g.normal(size=(3, 4))),
        "whole": np.arange(6, dtype=np.uint32).reshape(2, 3), "empty": np.zeros((0, 3), np.float32),
        "swapped": np.arange(3, dtype=">i4"), "one": np.float32(2.5), "flags": np.array([True, False]),
        "list": [1, (2, "drei"), None, 2.5, -(10**20)], "bytes": b"\x00\xff", "nested": {"n_expr": 100},
    }  # fmt: skip
    matrices = {"csc": scipy.sparse.csc_matrix(np.eye(4)[:, :3]), "csr": scipy.sparse.csr_matrix(np.eye(4)[:, :3])}
    back = read(pickle.dumps(data | matrices, protocol))
    for key, value in data.items():
        np.testing.assert_equal(back[key], value)
    for key in matrices:
        np.testing.assert_array_equal(back[key], np.eye(4)[:, :3])


def test_python2_and_chumpy_are_read_without_either(read):
    a = np.random.default_rng(1).normal(size=(5, 7))
    back = read(python2({"plain": a, "wrapped": Chumpy(a), "sparse": Sparse(np.round(a)), "name": "caf\xe9"}))
    for key, want in (("plain", a), ("wrapped", a), ("sparse", np.round(a))):
        np.testing.assert_array_equal(back[key], want)
    assert back["name"] == "caf\xe9"
    old_style = (
        b"ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\nc__builtin__\nobject\nNtR}(U\x01x" + python2(a)[2:-1] + b"ub."
    )
    np.testing.assert_array_equal(read(b"\x80\x02" + old_style), a)


def test_npy_files_with_an_object_inside(tmp_path):
    np.save(tmp_path / "d.npy", np.array({"k": np.arange(3), "l": "x"}, dtype=object), allow_pickle=True)
    back = read_npy(tmp_path / "d.npy")
    assert back["l"] == "x" and back["k"].tolist() == [0, 1, 2]
    np.save(tmp_path / "a.npy", np.eye(2))
    assert read_npy(tmp_path / "a.npy").tolist() == np.eye(2).tolist()
    (tmp_path / "t.npy").write_text("hello")
    with pytest.raises(UserError, match=r"not an \.npy file"):
        read_npy(tmp_path / "t.npy")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def reference(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def hostile(marker: Path) -> dict[str, bytes]:
    """Files that would make `marker`, take the memory or worse, if anything in them ran."""
    touch = f"open({str(marker)!r}, 'w').close()"
    shell = b"(S'touch " + str(marker).encode() + b"'\ntR."
    array = pickle.dumps(np.zeros(4), 2)
    frame = array[: array.index(b"R")]
    out = {
        "os.system": pickle.dumps(Calls(os.system, f"touch {marker}")),
        "posix.system, protocol 0": reference("posix", "system") + shell,
        "eval": pickle.dumps(Calls(eval, touch)),
        "exec": pickle.dumps(Calls(exec, touch)),
        "__import__": pickle.dumps(Calls(__import__, "antigravity")),
        "getattr": pickle.dumps(Calls(getattr, "text", "format")),
        "python 2's eval": reference("__builtin__", "eval") + b"(S'1'\ntR.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10lib.format.fopen\x93.",
        "numpy's own loader": reference("numpy", "load") + b"(S'/etc/passwd'\ntR.",
        "numpy's own loader, by its module": reference("numpy.core.multiarray", "fromfile") + b"(S'/etc/passwd'\ntR.",
        "numpy's shell": reference("numpy.distutils.exec_command", "exec_command") + shell,
        "numpy's runner": reference("numpy.testing._private.utils", "runstring") + b"(S'1'\n}tR.",
        "numpy's import": reference("numpy.core.multiarray", "_reconstruct.__globals__") + b".",
        "chumpy's other names": reference("chumpy.ch", "pickle") + b".",
        "scipy's loader": reference("scipy.sparse", "load_npz") + b"(S'/etc/passwd'\ntR.",
        "a class of an instruction": b"(S'x'\nios\nsystem\n.",
        "an object instruction": b"(" + reference("os", "system") + b"S'true'\no.",
        "a call of data": b"(S'x'\n(S'y'\ntR.",
        "a call of what was built": frame + b"R(S'x'\ntR.",
        "reconstructing another class": reference("numpy.core.multiarray", "_reconstruct")
        + b"("
        + reference("__builtin__", "set")
        + b"(K\x00tS'b'\ntR.",
        "copy_reg of another class": reference("copy_reg", "_reconstructor")
        + b"("
        + reference("__builtin__", "set")
        + reference("__builtin__", "object")
        + b"NtR.",
        "a bare ndarray": b"\x80\x02" + reference("numpy", "ndarray") + b"(J\xff\xff\xff\x7ft\x81.",
        "a codec": reference("_codecs", "encode") + b"(S'x'\nS'zlib'\ntR.",
        "a name as data": b"\x80\x02}S'f'\n" + reference("numpy", "ndarray") + b"s.",
        "the state of data": b"\x80\x02}}S'__class__'\nNsb.",
        "a persistent id": b"Pid\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "torch": reference("torch.serialization", "load") + b"(S'x'\ntR.",
        "objects in an array of text": pickle.dumps(np.array([Calls(os.system, f"touch {marker}")], dtype=object)),
        "a structured type": pickle.dumps(np.zeros(3, [("a", "f8")])),
        "a set with a state": reference("__builtin__", "set") + b"(]tR}b.",
    }
    shape = python2(np.zeros(4)).replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\x7f")
    sparse = python2(Sparse(np.eye(3)))
    return out | {
        "an array larger than its bytes": shape,
        "a negative shape": python2(np.zeros(4)).replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\xff"),
        "a huge sparse shape": sparse.replace(
            b"_shape(J\x03\x00\x00\x00J\x03\x00\x00\x00", b"_shape(J\xff\xff\xff\x7fJ\x03\x00\x00\x00"
        ),
        "a sparse index outside": sparse.replace(struct.pack("<3i", 0, 1, 2), struct.pack("<3i", 0, 1, 9), 1),
        "a huge string": b"\x80\x02T\xff\xff\xff\x7fabc.",
        "a huge byte count": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "endless nesting": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
        "many calls": b"\x80\x02]" + b"]0" * 55_000 + b".",
    }


def copies(times: int) -> bytes:
    """One megabyte of text, asked for as bytes again and again."""
    text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20
    again = reference("_codecs", "encode") + b"(h\x00X\x06\x00\x00\x00latin1tR"
    return b"\x80\x02]" + text + b"q\x000(" + again * times + b"e."


def test_hostile_pickles_do_nothing(read, tmp_path):
    marker = tmp_path / "ran"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, data in hostile(marker).items():
        with pytest.raises(UserError, match=r"is not read|damaged") as caught:
            read(data)
        assert "\n" not in str(caught.value), what
        assert not marker.exists(), what
    with pytest.raises(UserError, match="far larger than the file"):
        read(copies(2000))
    assert read(b"\x80\x02]r\xff\xff\xff\x7f.") == [], "a huge memo takes no room"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MiB were taken"
    # What the check is worth: the standard reader runs the first of them.
    pickle.loads(hostile(marker)["os.system"])  # noqa: S301
    assert marker.exists()


def doubled(times: int) -> bytes:
    """A list of a list twice, and so on: some hundred bytes that stand for two to the power of `times` items."""
    levels = b"".join(b"(h%ch%clq%c0" % (159 + n, 159 + n, 160 + n) for n in range(1, times))
    return b"]q\xa00" + levels + b"h%c" % (159 + times)


@pytest.mark.parametrize("where", ["a list", "a type", "a sparse matrix"])
def test_shared_nesting_is_not_spread(read, where):
    array = pickle.dumps(np.zeros(4), 2)
    text = b"X\x02\x00\x00\x00f8"
    assert text in array
    matrix = scipy.sparse.csc_matrix(np.eye(2))
    matrix.data = "here"  # pyright: ignore[reportAttributeAccessIssue]
    sparse = pickle.dumps(matrix, 2)
    here = b"X\x04\x00\x00\x00here"
    assert here in sparse
    data = {
        "a list": b"\x80\x02" + doubled(60) + b".",
        "a type": array.replace(text, doubled(60)),
        "a sparse matrix": sparse.replace(here, doubled(60)),
    }[where]
    began = time.monotonic()
    with pytest.raises(UserError, match="is not read"):
        read(data)
    assert time.monotonic() - began < 2


def test_nothing_is_imported(read):
    """The names in the file are not looked up."""
    data = python2({"a": Chumpy(np.eye(2)), "b": Sparse(np.eye(2))})
    before = set(sys.modules)
    read(data)
    assert set(sys.modules) == before and "chumpy" not in before


def test_torch_tensors_beside_arrays_are_passed_over(read):
    """DECA's landmark_embedding.npy has some: they are not needed, and not opened."""
    import torch

    back = read(pickle.dumps({"array": np.arange(3), "tensor": torch.arange(3)}, 2))
    assert back["array"].tolist() == [0, 1, 2] and not hasattr(back["tensor"], "shape")


def test_damage_is_one_line(read, tmp_path):
    whole = python2({"a": np.eye(3)})
    for data in (
        b"",
        b"hello",
        whole[: len(whole) // 2],
        whole[:-1],
        io.BytesIO(whole).read(7),
        b"\x80\x02h\x05.",
        b"\x80\x02.",
    ):
        with pytest.raises(UserError, match="damaged"):
            read(data)
    with pytest.raises(UserError, match="does not exist"):
        read_pickle(tmp_path / "no.pkl")
    large = tmp_path / "large.pkl"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="at most 512 are read"):
        read_pickle(large)


def test_containers_may_share_and_hold_themselves(read):
    shared = [np.arange(2)]
    nested: dict = {"a": shared, "b": shared}
    nested["self"] = nested
    back = read(pickle.dumps(nested))
    assert back["a"] is back["b"] and back["self"] is None
