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

from geodiff4d.render.kernels import llvm
from geodiff4d.render.kernels.llvm import LANES

# Type checkers cannot follow these decorators.
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
infer_global: Any = templates.infer_global

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": set(llvm.FLAGS)}
"""Options of `njit` for every kernel. No reassociation, so that results do not depend on the compiler, and no
assumption that numbers are finite, since broken Gaussians must be found."""
INLINE = {**OPTIONS, "forceinline": True}
"""Options of `njit` for helpers in inner loops, which must not pass vectors through memory."""


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

for _type, _lowered in ((_Floats, llvm.FLOATS), (_Ints, llvm.INTS), (_Masks, llvm.MASKS)):

    @register_model(_type)
    class _Model(models.PrimitiveModel):
        def __init__(self, manager, frontend, lowered=_lowered):
            super().__init__(manager, frontend, lowered)


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
            v if t == kind else llvm.broadcast(b, ctx.cast(b, v, t, lane)) for v, t in zip(args, sig.args, strict=True)
        )
        return emit(b, *vectors)

    for left, right in ((kind, kind), (kind, types.Number), (types.Number, kind)):
        lower_builtin(symbol, left, right)(lower)


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=llvm.FLAGS), F)
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=llvm.FLAGS), F)
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=llvm.FLAGS), F)
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y, flags=llvm.FLAGS), F)
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
    """Return one number in all lanes, as float32."""
    return F(number), lambda ctx, b, sig, a: llvm.broadcast(b, ctx.cast(b, a[0], sig.args[0], types.float32))


@intrinsic
def fma(typing, x, y, z):
    """Return x·y + z, rounded once where the machine can."""
    return F(F, F, F), lambda ctx, b, sig, a: llvm.fma(b, *a)


@intrinsic
def minus(typing, x, y, z):
    """Return z - x·y, rounded once where the machine can."""
    return F(F, F, F), lambda ctx, b, sig, a: llvm.fma(b, b.fneg(a[0]), a[1], a[2])


@intrinsic
def low(typing, x, y):
    """Return the smaller of two; y where x is NaN."""
    return F(F, F), lambda ctx, b, sig, a: b.select(b.fcmp_ordered("<", a[0], a[1]), a[0], a[1])


@intrinsic
def high(typing, x, y):
    """Return the larger of two; y where x is NaN."""
    return F(F, F), lambda ctx, b, sig, a: b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])


@intrinsic
def root(typing, x):
    """Return the square root."""
    return F(F), lambda ctx, b, sig, a: llvm.call(b, "llvm.sqrt.v16f32", llvm.FLOATS, a)


@intrinsic
def floored(typing, x):
    """Return the largest integer that is not above x, as a float."""
    return F(F), lambda ctx, b, sig, a: llvm.call(b, "llvm.floor.v16f32", llvm.FLOATS, a)


@intrinsic
def truncated(typing, x):
    """Return the lanes as int32, rounded toward zero; they must fit."""
    return I(F), lambda ctx, b, sig, a: b.fptosi(a[0], llvm.INTS)


@intrinsic
def choose(typing, mask, x, y):
    """Return x where the mask is set, else y."""
    return F(M, F, F), lambda ctx, b, sig, a: b.select(*a)


@intrinsic
def some(typing, mask):
    """Return whether any lane is set."""

    def emit(ctx, b, sig, a):
        bits = b.bitcast(a[0], ir.IntType(LANES))
        return b.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(M), emit


@intrinsic
def largest(typing, x):
    """Return the largest lane; no lane may be NaN."""
    return types.float32(F), lambda ctx, b, sig, a: llvm.call(
        b, "llvm.vector.reduce.fmax.v16f32", llvm.FLOAT, a, ("nnan",)
    )


@intrinsic
def total(typing, x):
    """Return the sum of the lanes, added in a fixed order."""

    def emit(ctx, b, sig, a):
        x, width = a[0], LANES // 2
        while width:
            x = b.fadd(x, llvm.shuffle(b, x, x, [(i + width) % LANES for i in range(LANES)]))
            width //= 2
        return b.extract_element(x, ir.Constant(llvm.INT, 0))

    return types.float32(F), emit


_EXP2 = (0.0013398874, 0.0096184373, 0.0555033721, 0.2402264923, 0.6931471825, 1.0)
"""2^f on [-½, ½], highest power first; relative error 2e-7."""


@intrinsic
def exp2(typing, x):
    """Return 2^x for -126 ≤ x ≤ 126: a polynomial of the fraction, the integer added to the exponent's bits."""

    def emit(ctx, b, sig, a):
        # Adding 1.5·2²³ rounds to an integer, which then stands in the lowest bits.
        magic = ir.Constant(llvm.FLOATS, [1.5 * 2.0**23] * LANES)
        shifted = b.fadd(a[0], magic)
        fraction = b.fsub(a[0], b.fsub(shifted, magic))
        power = ir.Constant(llvm.FLOATS, [_EXP2[0]] * LANES)
        for c in _EXP2[1:]:
            power = llvm.fma(b, power, fraction, ir.Constant(llvm.FLOATS, [c] * LANES))
        exponent = b.shl(b.bitcast(shifted, llvm.INTS), ir.Constant(llvm.INTS, [23] * LANES))
        return b.bitcast(b.add(b.bitcast(power, llvm.INTS), exponent), llvm.FLOATS)

    return F(F), emit


@intrinsic
def log2_above(typing, x):
    """Return an upper bound of log₂ x, at most 0.012 too large; culling uses it."""

    def emit(ctx, b, sig, a):
        bits = b.bitcast(a[0], llvm.INTS)
        every = lambda v, t=llvm.INTS: ir.Constant(t, [v] * LANES)  # noqa: E731
        exponent = b.sitofp(b.sub(b.lshr(bits, every(23)), every(127)), llvm.FLOATS)
        mantissa = b.bitcast(b.or_(b.and_(bits, every(0x7FFFFF)), every(127 << 23)), llvm.FLOATS)
        # A cubic through log₂ on [1, 2), raised by its largest error.
        y = every(_LOG2[0], llvm.FLOATS)
        for c in _LOG2[1:]:
            y = llvm.fma(b, y, mantissa, every(c, llvm.FLOATS))
        return b.fadd(exponent, y)

    return F(F), emit


_LOG2 = (0.15824871, -1.0518750, 3.0478842, -2.1496207)


# --- memory -----------------------------------------------------------------------------------------------------------


@intrinsic
def get(typing, array, i):
    """Return one element."""
    return array.dtype(array, types.intp), lambda ctx, b, sig, a: b.load(llvm.address(ctx, b, sig.args[0], *a))


@intrinsic
def put(typing, array, i, value):
    """Write one element."""

    def emit(ctx, b, sig, a):
        b.store(a[2], llvm.address(ctx, b, sig.args[0], a[0], a[1]))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, array.dtype), emit


@intrinsic
def at(typing, array, i):
    """Return one float of an array, in all lanes."""
    return F(array, types.intp), lambda ctx, b, sig, a: llvm.broadcast(b, b.load(llvm.address(ctx, b, sig.args[0], *a)))


@intrinsic
def load(typing, array, i):
    """Return 16 consecutive numbers, float32 or int32 as the array is."""
    kind, lowered = (F, llvm.FLOATS) if array.dtype == types.float32 else (I, llvm.INTS)
    return kind(array, types.intp), lambda ctx, b, sig, a: llvm.read(b, llvm.address(ctx, b, sig.args[0], *a), lowered)


@intrinsic
def store(typing, array, i, value):
    """Write 16 consecutive numbers."""

    def emit(ctx, b, sig, a):
        llvm.write(b, a[2], llvm.address(ctx, b, sig.args[0], a[0], a[1]))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, value), emit


def _columns(count):
    @intrinsic
    def load_columns(typing, array, i):
        """Return 16 rows of `count` numbers as `count` vectors, the columns."""

        def emit(ctx, b, sig, a):
            x = llvm.read(b, llvm.address(ctx, b, sig.args[0], *a), ir.VectorType(llvm.FLOAT, LANES * count))
            columns = [llvm.shuffle(b, x, x, range(k, LANES * count, count)) for k in range(count)]
            return ctx.make_tuple(b, sig.return_type, columns)

        return types.UniTuple(F, count)(array, types.intp), emit

    @intrinsic
    def store_columns(typing, array, i, columns):
        """Write 16 rows of `count` numbers from `count` vectors, the columns."""

        def emit(ctx, b, sig, a):
            parts = cgutils.unpack_tuple(b, a[2])
            whole = parts[0]
            for k in range(1, count):
                wide = llvm.shuffle(b, parts[k], parts[k], [j % LANES for j in range(LANES * k)])
                whole = llvm.shuffle(b, whole, wide, range(LANES * (k + 1)))
            lanes = [(j % count) * LANES + j // count for j in range(LANES * count)]
            llvm.write(b, llvm.shuffle(b, whole, whole, lanes), llvm.address(ctx, b, sig.args[0], a[0], a[1]))
            return ctx.get_dummy_value()

        return types.void(array, types.intp, columns), emit

    return load_columns, store_columns


load3, store3 = _columns(3)
load4, store4 = _columns(4)


@intrinsic
def load_transposed(typing, array, i):
    """Return 16 rows of 16 numbers as 16 columns."""

    def emit(ctx, b, sig, a):
        rows = [llvm.read(b, llvm.address(ctx, b, sig.args[0], a[0], a[1], LANES * r)) for r in range(LANES)]
        return ctx.make_tuple(b, sig.return_type, llvm.transpose(b, rows))

    return types.UniTuple(F, LANES)(array, types.intp), emit


@intrinsic
def store_transposed(typing, array, i, columns):
    """Write 16 rows of 16 numbers from up to 16 columns; missing ones are zero."""

    def emit(ctx, b, sig, a):
        columns = cgutils.unpack_tuple(b, a[2])
        columns += [ir.Constant(llvm.FLOATS, [0.0] * LANES)] * (LANES - len(columns))
        for r, row in enumerate(llvm.transpose(b, columns)):
            llvm.write(b, row, llvm.address(ctx, b, sig.args[0], a[0], a[1], LANES * r))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, columns), emit
