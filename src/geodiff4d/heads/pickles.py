"""Read the arrays out of a pickle without running it.

A pickle is a program: loading one calls whatever it names. This reader decodes its instructions (pickletools, which
calls nothing) and follows those that build plain data. A name is never imported, it only picks one of the few kinds
below: numpy arrays, scipy.sparse matrices and chumpy's array, whose numbers stand in its state. Anything else is an
error. So a file made by Python 2 with chumpy opens without either, and a hostile one does nothing.
"""

import math
import pickletools
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geodiff4d.core.errors import UserError

MAX_FILE_BYTES = 512 * 1024**2
"""The largest file read; FLAME's are 53 MB."""
MAX_STEPS = 100_000
"""Largest number of instructions in a pickle; FLAME's files have hundreds."""
MAX_DEPTH = 32
SPARE_BYTES = 16 * 1024**2
"""Memory that arrays may take beyond four times the file, for dense copies of sparse matrices."""
BYTES_PER_ITEM = 16

KINDS = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"{n}.multiarray _reconstruct": "reconstruct" for n in ("numpy.core", "numpy._core")},
    **{f"{n}.multiarray scalar": "scalar" for n in ("numpy.core", "numpy._core")},
    **{f"{n}.numeric _frombuffer": "frombuffer" for n in ("numpy.core", "numpy._core")},
    **{f"scipy.sparse{m} csc_matrix": "csc" for m in ("", ".csc", "._csc")},
    **{f"scipy.sparse{m} csr_matrix": "csr" for m in ("", ".csr", "._csr")},
    **{f"{m} Ch": "chumpy" for m in ("chumpy", "chumpy.ch")},
    **{f"{m} _reconstructor": "reconstructor" for m in ("copy_reg", "copyreg")},
    **{f"{m} {n}": n for m in ("__builtin__", "builtins") for n in ("object", "set", "frozenset", "bytes")},
    "collections OrderedDict": "dict",
    "_codecs encode": "encode",
    # DECA's landmark file has a few torch tensors beside the arrays; they are passed over, not read.
    **{f"torch._utils {n}": "unread" for n in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    "torch.storage _load_from_bytes": "unread",
}
"""Every name that may occur ("module name"), and the kind of data that it makes."""

LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBER = re.compile(r"[biuf][1248]|[SU]\d{1,3}")


class Refused(Exception):
    """Raised for a pickle that holds something that is not plain data."""


class Unread:
    """Placeholder for an object of the pickle that is skipped."""


@dataclass(eq=False)
class Name:
    """A global that the pickle names."""

    text: str
    kind: str


@dataclass(eq=False)
class Built:
    """An object under construction: its kind, its arguments and its state."""

    kind: str
    arguments: tuple = ()
    state: Any = None


MARK = Name("mark", "mark")


def read_pickle(path: Path | str) -> Any:
    """Read a pickle's plain data: dicts, lists, tuples, numbers, text and numpy arrays (sparse ones made dense).

    Nothing in the file is imported or called. Text of Python 2 is read as latin-1.

    Raises:
        UserError: missing, too large, damaged, or it holds anything but data.

    Example:
        >>> read_pickle("flame2023.pkl")["v_template"].shape  # doctest: +SKIP
        (5023, 3)
    """
    path = Path(path)
    return read_bytes(path, _bytes(path))


def read_npy(path: Path | str) -> Any:
    """Read an .npy file that may hold a pickled object (FLAME's landmark files do), by the rules of `read_pickle`.

    Raises:
        UserError: as `read_pickle`.
    """
    path = Path(path)
    _bytes(path, 0)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            dtype = read(file)[2]
            if not dtype.hasobject:
                return np.load(path, allow_pickle=False)
            data = file.read()
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not an .npy file that can be read ({error}): download it again") from None
    return read_bytes(path, data)


def _bytes(path: Path, count: int = -1) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a file with FLAME's data; check the path")
    if path.stat().st_size > MAX_FILE_BYTES:
        size = path.stat().st_size / 1024**2
        raise UserError(f"{path} has {size:.0f} MiB: at most {MAX_FILE_BYTES // 1024**2} are read; is it FLAME's?")
    with path.open("rb") as file:
        return file.read(count)


def read_bytes(path: Path, data: bytes) -> Any:
    """Read a pickle that was found in `path`, by the rules of `read_pickle`.

    Raises:
        UserError: as `read_pickle`.
    """
    try:
        return _Plain(4 * len(data) + SPARE_BYTES).of(_run(data))
    except Refused as error:
        raise UserError(
            f"{path} is not read: {error}; expected arrays only (nothing in the file was run). "
            "Download it again from its official page"
        ) from None
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, struct.error, MemoryError) as error:
        raise UserError(f"{path} is damaged or not a pickle ({str(error)[:120]}): download it again") from None


def _run(data: bytes) -> Any:
    """Follow the pickle's instructions on a stack of plain data and `Built` objects."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if step > MAX_STEPS:
            raise Refused(f"it has more than {MAX_STEPS:,} instructions")
        op = opcode.name
        if op in LITERALS:
            stack.append(argument)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            _build(op, argument, stack)
    raise ValueError("no end")


def _build(op: str, argument: Any, stack: list[Any]) -> None:
    match op:
        case "MARK":
            stack.append(MARK)
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
        case "EMPTY_TUPLE":
            stack.append(())
        case "EMPTY_DICT":
            stack.append({})
        case "LIST" | "FROZENSET":
            stack.append(_since_mark(stack))
        case "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "DICT":
            stack.append(_pairs({}, _since_mark(stack)))
        case "APPEND":
            item = stack.pop()
            _list(stack[-1]).append(item)
        case "APPENDS" | "ADDITEMS":
            items = _since_mark(stack)
            _list(stack[-1]).extend(items)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            _pairs(stack[-1], [key, value])
        case "SETITEMS":
            items = _since_mark(stack)
            _pairs(stack[-1], items)
        case "POP":
            stack.pop()
        case "POP_MARK":
            _since_mark(stack)
        case "DUP":
            stack.append(stack[-1])
        case "GLOBAL":
            stack.append(_name(argument))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_name(f"{module} {name}"))
        case "REDUCE" | "NEWOBJ":
            arguments, made = stack.pop(), stack.pop()
            if not isinstance(made, Name) or not isinstance(arguments, tuple):
                raise Refused("it calls something that is not a name")
            stack.append(_made(made, arguments, new=op == "NEWOBJ"))
        case "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Built):
                raise Refused("it sets the state of plain data")
            stack[-1].state = state
        case _:
            raise Refused(f"it has the instruction {op}")


def _since_mark(stack: list[Any]) -> list[Any]:
    for i in range(len(stack) - 1, -1, -1):
        if stack[i] is MARK:
            items = stack[i + 1 :]
            del stack[i:]
            return items
    raise ValueError("a mark is missing")


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise Refused("it appends to something that is not a list")
    return value


def _pairs(target: Any, items: list[Any]) -> dict:
    if not isinstance(target, dict):
        raise Refused("it sets items of something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | bytes):
            raise Refused("it has a dict whose keys are not text")
        target[key.decode("latin-1") if isinstance(key, bytes) else key] = value
    return target


def _name(text: str) -> Name:
    if text not in KINDS:
        raise Refused(f"it holds {text.replace(' ', '.')[:80]}")
    return Name(text, KINDS[text])


def _made(name: Name, arguments: tuple, new: bool) -> Any:
    """Return what calling `name` would have made, if it is one of the kinds that mean data."""
    kind = name.kind
    if new and kind not in ("csc", "csr", "chumpy", "dict"):
        raise Refused(f"it makes a bare {name.text.replace(' ', '.')}")
    if kind in ("csc", "csr", "chumpy") and new:
        return Built(kind)
    if kind == "reconstructor" and len(arguments) == 3 and isinstance(arguments[0], Name):
        if arguments[0].kind in ("csc", "csr", "chumpy"):
            return Built(arguments[0].kind)
    elif kind == "reconstruct" and arguments and isinstance(arguments[0], Name) and arguments[0].kind == "ndarray":
        return Built("ndarray")
    elif kind in ("dtype", "scalar", "frombuffer"):
        return Built(kind, arguments)
    elif kind == "bytes" and not arguments:
        return b""
    elif kind in ("set", "frozenset"):
        return _list(arguments[0]) if arguments else []
    elif kind == "dict" and not arguments:
        return {}
    # Copies wait until the bytes are counted: the same long text may be named a million times.
    elif kind in ("encode", "dict", "unread"):
        return Built(kind, arguments)
    raise Refused(f"it calls {name.text.replace(' ', '.')}")


class _Plain:
    """Turn what the instructions built into plain data, within a budget of bytes."""

    def __init__(self, budget: int):
        self.budget = budget
        self.done: dict[int, Any] = {}
        self.cost: dict[int, int] = {}
        """What each container took of the budget, with all that is in it."""

    def of(self, value: Any, depth: int = 0) -> Any:
        if not isinstance(value, list | tuple | dict | Built | Name):
            return value
        if depth > MAX_DEPTH:
            raise Refused(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, Name):
            raise Refused(f"it holds the name {value.text.replace(' ', '.')} as data")
        if id(value) not in self.done:
            self.done[id(value)] = None  # a container inside itself reads as None
            before = self.budget
            self.done[id(value)] = self._convert(value, depth + 1)
            self.cost[id(value)] = before - self.budget
        elif isinstance(self.done[id(value)], list | tuple):
            # Whoever reads nested lists, as numpy does, goes through a shared one each time.
            self.spend(self.cost.get(id(value), 0))
        return self.done[id(value)]

    def _convert(self, value: Any, depth: int) -> Any:
        if not isinstance(value, Built):
            self.spend(BYTES_PER_ITEM * len(value))
        if isinstance(value, dict):
            return {k: self.of(v, depth) for k, v in value.items()}
        if isinstance(value, list):
            return [self.of(v, depth) for v in value]
        if isinstance(value, tuple):
            return tuple(self.of(v, depth) for v in value)
        state = value.state
        if value.kind == "ndarray":
            _, shape, dtype, fortran, raw = state
            return self.array(raw, dtype, shape, bool(fortran), depth)
        if value.kind == "frombuffer":
            raw, dtype, shape, order = value.arguments
            return self.array(raw, dtype, shape, order == "F", depth)
        if value.kind == "scalar":
            dtype, raw = value.arguments
            return self.array(raw, dtype, (), False, depth)[()]
        if value.kind == "chumpy":
            if not isinstance(state, dict) or "x" not in state:
                raise Refused("it has a chumpy object without numbers")
            return self.of(state["x"], depth)
        if value.kind in ("csc", "csr"):
            return self.dense(value.kind, {k: self.of(v, depth) for k, v in state.items()})
        if value.kind == "unread":
            return Unread()
        if value.kind == "encode":
            return self.encoded(value)
        if value.kind == "dict":
            return dict(self.of(value.arguments[0], depth))
        raise Refused(f"it holds a {value.kind} as data")

    def array(self, raw: Any, dtype: Any, shape: Any, fortran: bool, depth: int) -> Any:
        """Return an array of numbers or fixed-width text; of an array of objects, its items (alone if it has no axes).

        The bytes must be exactly as many as the shape asks for.
        """
        if not isinstance(dtype, Built) or dtype.kind != "dtype":
            raise Refused("it has an array without a type")
        shape = tuple(int(n) for n in shape)
        if len(shape) > 8 or any(n < 0 for n in shape):
            raise Refused("it has an array of a senseless shape")
        code, order = dtype.arguments[0], dtype.state[1] if dtype.state else "="
        if not isinstance(code, str | bytes) or not isinstance(order, str | bytes):
            raise Refused("it has an array whose type is not text")
        code, order = str(code), str(order)
        if re.fullmatch(r"O[48]?", code) and isinstance(raw, list):
            items = [self.of(item, depth) for item in raw]
            return items[0] if shape == () and len(items) == 1 else items
        if not re.fullmatch(NUMBER, code.lstrip("<>|=")) or order not in "<>|=":
            raise Refused(f"it has an array of type {code[:20]}")
        kind = np.dtype((order if code[0] not in "<>|=" else "") + code)
        if isinstance(raw, Built):
            raw = raw.arguments[0] if raw.kind == "encode" else None
        if not isinstance(raw, str | bytes | bytearray):
            raise Refused("it has an array without bytes")
        if math.prod(shape) * kind.itemsize != len(raw):
            raise Refused(f"it has an array of {len(raw)} bytes for {math.prod(shape)} × {kind.itemsize}")
        self.spend(len(raw))
        data = raw.encode("latin-1") if isinstance(raw, str) else raw
        return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")

    def encoded(self, value: Built) -> bytes:
        text, codec = value.arguments
        if codec not in ("latin1", "latin-1"):
            raise Refused("it has bytes in another code than latin1")
        self.spend(len(text))
        return text.encode("latin-1")

    def dense(self, kind: str, state: dict) -> np.ndarray:
        """Spread a compressed sparse matrix (columns for csc, rows for csr)."""
        rows, columns = (int(n) for n in (state.get("_shape") or state["shape"]))
        values, inner, starts = (state[k] for k in ("data", "indices", "indptr"))
        if not all(isinstance(x, np.ndarray) for x in (values, inner, starts)):
            raise Refused("it has a sparse matrix of other things than arrays")
        major, minor = (columns, rows) if kind == "csc" else (rows, columns)
        counts = np.diff(starts)
        sound = len(starts) == major + 1 and (counts >= 0).all() and counts.sum() == len(values) == len(inner)
        if not sound or (len(inner) and not 0 <= inner.min() <= inner.max() < minor):
            raise Refused("it has a sparse matrix that points outside itself")
        self.spend(rows * columns * 8)
        out = np.zeros((major, minor))
        np.add.at(out, (np.repeat(np.arange(major), counts), inner), values)
        return out.T if kind == "csc" else out

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise Refused("its arrays are far larger than the file")
