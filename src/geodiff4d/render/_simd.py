"""Sixteen float32 lanes as one value inside Numba kernels: `F` (floats), `I` (int32) and `M` (masks).

LLVM lowers them to one AVX-512 register, two of AVX2 or four of SSE and NEON, so one source serves all; a kernel that
is written with them keeps its accumulators in registers, which loops over small arrays do not.
Arrays are addressed flat, from their first element, without bounds checks or negative indices: they must be contiguous.

Numba's cache does not see edits here: delete `__pycache__/*.nb?` after changing this file.
"""

import operator
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.typing import templates
from numba.extending import lower_builtin, models, register_model

# Type checkers cannot follow these decorators.
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
infer_global: Any = templates.infer_global

LANES = 16
OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}
"""Of every kernel. No reassociation, so that results do not depend on the compiler's mood, and no assumption that
numbers are finite, since the broken ones must be found."""
INLINE = {**OPTIONS, "forceinline": True}
"""Of helpers in inner loops: vectors in registers must not be passed through memory."""
_FLAGS = ("contract", "nsz", "arcp")
_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_F, _I, _M = (ir.VectorType(t, LANES) for t in (_FLOAT, _INT, ir.IntType(1)))


class _Floats(types.Type):
    def __init__(self):
        super().__init__(name="float32x16")


class _Ints(types.Type):
    def __init__(self):
        super().__init__(name="int32x16")


class _Masks(types.Type):
    def __init__(self):
        super().__init__(name="mask16")


F, I, M = _Floats(), _Ints(), _Masks()  # noqa: E741

for _type, _lowered in ((_Floats, _F), (_Ints, _I), (_Masks, _M)):

    @register_model(_type)
    class _Model(models.PrimitiveModel):
        def __init__(self, manager, frontend, lowered=_lowered):
            super().__init__(manager, frontend, lowered)


# --- LLVM in small pieces ---------------------------------------------------------------------------------------------


def _constant(values) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(values)), list(values))


def _shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, _constant(lanes))


def _broadcast(b, scalar):
    vector = ir.VectorType(scalar.type, LANES)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return _shuffle(b, one, ir.Constant(vector, ir.Undefined), [0] * LANES)


def _call(b, name, result, args, flags=()):
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args, fastmath=flags)


def _fma(b, x, y, z):
    # fmuladd may fall back to two operations; llvm.fma would call libm where there is no instruction.
    return _call(b, "llvm.fmuladd.v16f32", _F, [x, y, z], _FLAGS)


def _address(ctx, b, array_type, array, *offsets):
    """Pointer to an element of a contiguous array, counted flat."""
    place = cgutils.create_struct_proxy(array_type)(ctx, b, array).data
    for offset in offsets:
        place = b.gep(place, [offset if not isinstance(offset, int) else _LONG(offset)])
    return place


def _read(b, place, vector=_F):
    value = b.load(b.bitcast(place, vector.as_pointer()))
    value.align = 4
    return value


def _write(b, value, place):
    b.store(value, b.bitcast(place, value.type.as_pointer())).align = 4


def _transposed(b, rows):
    """16 rows of 16 to 16 columns, by four rounds of shuffles."""
    rows, width = list(rows), 1
    while width < LANES:
        for k in range(LANES):
            if not k & width:
                x, y = rows[k], rows[k + width]
                rows[k] = _shuffle(b, x, y, [j if not j & width else LANES + j - width for j in range(LANES)])
                rows[k + width] = _shuffle(b, x, y, [j + width if not j & width else LANES + j for j in range(LANES)])
        width *= 2
    return rows


# --- arithmetic: F with F, or with a plain number that fills all lanes ------------------------------------------------


def _operator(symbol, emit, result, kind=F):
    @infer_global(symbol)
    class _Typing(templates.AbstractTemplate):
        def generic(self, args, kws):
            plain = [a for a in args if a != kind]
            if len(args) == 2 and len(plain) < 2 and all(isinstance(a, types.Number) for a in plain):
                return templates.signature(result, *args)
            return None

    def lower(ctx, b, sig, args):
        lane = types.float32 if kind == F else types.int32
        vectors = (
            v if t == kind else _broadcast(b, ctx.cast(b, v, t, lane)) for v, t in zip(args, sig.args, strict=True)
        )
        return emit(b, *vectors)

    for left, right in ((kind, kind), (kind, types.Number), (types.Number, kind)):
        lower_builtin(symbol, left, right)(lower)


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=_FLAGS), F)
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=_FLAGS), F)
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=_FLAGS), F)
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y, flags=_FLAGS), F)
_operator(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), M)
_operator(operator.le, lambda b, x, y: b.fcmp_ordered("<=", x, y), M)
_operator(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), M)
_operator(operator.ge, lambda b, x, y: b.fcmp_ordered(">=", x, y), M)
_operator(operator.eq, lambda b, x, y: b.fcmp_ordered("==", x, y), M)
_operator(operator.add, lambda b, x, y: b.add(x, y), I, I)
_operator(operator.lt, lambda b, x, y: b.icmp_signed("<", x, y), M, I)
_operator(operator.gt, lambda b, x, y: b.icmp_signed(">", x, y), M, I)
_operator(operator.and_, lambda b, x, y: b.and_(x, y), M, M)
_operator(operator.or_, lambda b, x, y: b.or_(x, y), M, M)


@intrinsic
def fill(typing, number):
    """One float in all lanes."""
    return F(number), lambda ctx, b, sig, a: _broadcast(b, ctx.cast(b, a[0], sig.args[0], types.float32))


@intrinsic
def fma(typing, x, y, z):
    """x·y + z."""
    return F(F, F, F), lambda ctx, b, sig, a: _fma(b, *a)


@intrinsic
def minus(typing, x, y, z):
    """z - x·y."""
    return F(F, F, F), lambda ctx, b, sig, a: _fma(b, b.fneg(a[0]), a[1], a[2])


@intrinsic
def low(typing, x, y):
    """The smaller of two; y where x is NaN."""
    return F(F, F), lambda ctx, b, sig, a: b.select(b.fcmp_ordered("<", a[0], a[1]), a[0], a[1])


@intrinsic
def high(typing, x, y):
    """The larger of two; y where x is NaN."""
    return F(F, F), lambda ctx, b, sig, a: b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])


@intrinsic
def root(typing, x):
    return F(F), lambda ctx, b, sig, a: _call(b, "llvm.sqrt.v16f32", _F, a)


@intrinsic
def floored(typing, x):
    return F(F), lambda ctx, b, sig, a: _call(b, "llvm.floor.v16f32", _F, a)


@intrinsic
def truncated(typing, x):
    """To int32; the lanes must fit."""
    return I(F), lambda ctx, b, sig, a: b.fptosi(a[0], _I)


@intrinsic
def choose(typing, mask, x, y):
    """x where the mask is set, else y."""
    return F(M, F, F), lambda ctx, b, sig, a: b.select(*a)


@intrinsic
def some(typing, mask):
    """Whether any lane is set."""

    def emit(ctx, b, sig, a):
        bits = b.bitcast(a[0], ir.IntType(LANES))
        return b.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(M), emit


@intrinsic
def largest(typing, x):
    """The largest lane."""
    return types.float32(F), lambda ctx, b, sig, a: _call(b, "llvm.vector.reduce.fmax.v16f32", _FLOAT, a, ("nnan",))


@intrinsic
def total(typing, x):
    """The sum of the lanes, in a fixed order."""

    def emit(ctx, b, sig, a):
        x, width = a[0], LANES // 2
        while width:
            x = b.fadd(x, _shuffle(b, x, x, [(i + width) % LANES for i in range(LANES)]))
            width //= 2
        return b.extract_element(x, ir.Constant(_INT, 0))

    return types.float32(F), emit


_EXP2 = (0.0013398874, 0.0096184373, 0.0555033721, 0.2402264923, 0.6931471825, 1.0)
"""2^f on [-½, ½], highest power first; relative error 2e-7."""


@intrinsic
def exp2(typing, x):
    """2^x for -126 ≤ x ≤ 126: a polynomial of the fraction, the integer added to the exponent's bits."""

    def emit(ctx, b, sig, a):
        # Adding 1.5·2²³ rounds to an integer, which then stands in the lowest bits.
        magic = ir.Constant(_F, [1.5 * 2.0**23] * LANES)
        shifted = b.fadd(a[0], magic)
        fraction = b.fsub(a[0], b.fsub(shifted, magic))
        power = ir.Constant(_F, [_EXP2[0]] * LANES)
        for c in _EXP2[1:]:
            power = _fma(b, power, fraction, ir.Constant(_F, [c] * LANES))
        exponent = b.shl(b.bitcast(shifted, _I), ir.Constant(_I, [23] * LANES))
        return b.bitcast(b.add(b.bitcast(power, _I), exponent), _F)

    return F(F), emit


@intrinsic
def log2_above(typing, x):
    """An upper bound of log₂ x, at most 0.012 too large, for culling."""

    def emit(ctx, b, sig, a):
        bits = b.bitcast(a[0], _I)
        every = lambda v, t=_I: ir.Constant(t, [v] * LANES)  # noqa: E731
        exponent = b.sitofp(b.sub(b.lshr(bits, every(23)), every(127)), _F)
        mantissa = b.bitcast(b.or_(b.and_(bits, every(0x7FFFFF)), every(127 << 23)), _F)
        # A cubic through log₂ on [1, 2), raised by its largest error.
        y = every(_LOG2[0], _F)
        for c in _LOG2[1:]:
            y = _fma(b, y, mantissa, every(c, _F))
        return b.fadd(exponent, y)

    return F(F), emit


_LOG2 = (0.15824871, -1.0518750, 3.0478842, -2.1496207)


# --- memory -----------------------------------------------------------------------------------------------------------


@intrinsic
def get(typing, array, i):
    """One element."""
    return array.dtype(array, types.intp), lambda ctx, b, sig, a: b.load(_address(ctx, b, sig.args[0], *a))


@intrinsic
def put(typing, array, i, value):
    """Set one element."""

    def emit(ctx, b, sig, a):
        b.store(a[2], _address(ctx, b, sig.args[0], a[0], a[1]))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, array.dtype), emit


@intrinsic
def at(typing, array, i):
    """One float of an array in all lanes."""
    return F(array, types.intp), lambda ctx, b, sig, a: _broadcast(b, b.load(_address(ctx, b, sig.args[0], *a)))


@intrinsic
def load(typing, array, i):
    """16 consecutive numbers."""
    kind, lowered = (F, _F) if array.dtype == types.float32 else (I, _I)
    return kind(array, types.intp), lambda ctx, b, sig, a: _read(b, _address(ctx, b, sig.args[0], *a), lowered)


@intrinsic
def store(typing, array, i, value):
    """Set 16 consecutive numbers."""

    def emit(ctx, b, sig, a):
        _write(b, a[2], _address(ctx, b, sig.args[0], a[0], a[1]))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, value), emit


def _columns(count):
    @intrinsic
    def load_columns(typing, array, i):
        """16 rows of a few numbers each, as columns."""

        def emit(ctx, b, sig, a):
            x = _read(b, _address(ctx, b, sig.args[0], *a), ir.VectorType(_FLOAT, LANES * count))
            columns = [_shuffle(b, x, x, range(k, LANES * count, count)) for k in range(count)]
            return ctx.make_tuple(b, sig.return_type, columns)

        return types.UniTuple(F, count)(array, types.intp), emit

    @intrinsic
    def store_columns(typing, array, i, columns):
        """Set 16 rows of a few numbers each from columns."""

        def emit(ctx, b, sig, a):
            parts = cgutils.unpack_tuple(b, a[2])
            whole = parts[0]
            for k in range(1, count):
                wide = _shuffle(b, parts[k], parts[k], [j % LANES for j in range(LANES * k)])
                whole = _shuffle(b, whole, wide, range(LANES * (k + 1)))
            lanes = [(j % count) * LANES + j // count for j in range(LANES * count)]
            _write(b, _shuffle(b, whole, whole, lanes), _address(ctx, b, sig.args[0], a[0], a[1]))
            return ctx.get_dummy_value()

        return types.void(array, types.intp, columns), emit

    return load_columns, store_columns


load3, store3 = _columns(3)
load4, store4 = _columns(4)


@intrinsic
def load_transposed(typing, array, i):
    """16 rows of 16 numbers, as 16 columns."""

    def emit(ctx, b, sig, a):
        rows = [_read(b, _address(ctx, b, sig.args[0], a[0], a[1], LANES * r)) for r in range(LANES)]
        return ctx.make_tuple(b, sig.return_type, _transposed(b, rows))

    return types.UniTuple(F, LANES)(array, types.intp), emit


@intrinsic
def store_transposed(typing, array, i, columns):
    """Set 16 rows of 16 numbers from up to 16 columns; missing ones are zero."""

    def emit(ctx, b, sig, a):
        columns = cgutils.unpack_tuple(b, a[2])
        columns += [ir.Constant(_F, [0.0] * LANES)] * (LANES - len(columns))
        for r, row in enumerate(_transposed(b, columns)):
            _write(b, row, _address(ctx, b, sig.args[0], a[0], a[1], LANES * r))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, columns), emit
