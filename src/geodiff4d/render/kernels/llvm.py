"""LLVM instructions on sixteen lanes, emitted one small piece at a time: what the intrinsics of `simd` and `blocks` are
made of. `b` is llvmlite's builder, `ctx` Numba's context of code generation.

Numba's cache does not see edits here: delete `__pycache__/*.nb?` after changing this file.
"""

from llvmlite import ir
from numba.core import cgutils

LANES = 16
FLAGS = ("contract", "nsz", "arcp")
"""Of floating-point instructions: no reassociation, and NaN and infinity stay what they are."""
FLOAT, INT, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS, MASKS = (ir.VectorType(t, LANES) for t in (FLOAT, INT, ir.IntType(1)))


def constant(values) -> ir.Constant:
    """Return a constant vector of 32-bit integers."""
    return ir.Constant(ir.VectorType(INT, len(values)), list(values))


def shuffle(b, x, y, lanes):
    """Return the given lanes of x followed by y, as one vector."""
    return b.shuffle_vector(x, y, constant(lanes))


def broadcast(b, scalar):
    """Return a vector with the scalar in all lanes."""
    vector = ir.VectorType(scalar.type, LANES)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(INT, 0))
    return shuffle(b, one, ir.Constant(vector, ir.Undefined), [0] * LANES)


def call(b, name, result, args, flags=()):
    """Call one of LLVM's intrinsics by its name."""
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args, fastmath=flags)


def fma(b, x, y, z):
    """Return x·y + z."""
    # fmuladd may fall back to two operations; llvm.fma would call libm where there is no instruction.
    return call(b, "llvm.fmuladd.v16f32", FLOATS, [x, y, z], FLAGS)


def address(ctx, b, array_type, array, *offsets):
    """Return the pointer to an element of a contiguous array, at the sum of the flat `offsets`."""
    place = cgutils.create_struct_proxy(array_type)(ctx, b, array).data
    for offset in offsets:
        place = b.gep(place, [offset if not isinstance(offset, int) else LONG(offset)])
    return place


def read(b, place, vector=FLOATS):
    """Return the vector at a pointer, which need be aligned to four bytes only."""
    value = b.load(b.bitcast(place, vector.as_pointer()))
    value.align = 4
    return value


def write(b, value, place):
    """Write a vector to a pointer, which need be aligned to four bytes only."""
    b.store(value, b.bitcast(place, value.type.as_pointer())).align = 4


def transpose(b, rows):
    """Return the 16 columns of 16 rows of 16, by four rounds of shuffles."""
    rows, width = list(rows), 1
    while width < LANES:
        for k in range(LANES):
            if not k & width:
                x, y = rows[k], rows[k + width]
                rows[k] = shuffle(b, x, y, [j if not j & width else LANES + j - width for j in range(LANES)])
                rows[k + width] = shuffle(b, x, y, [j + width if not j & width else LANES + j for j in range(LANES)])
        width *= 2
    return rows
