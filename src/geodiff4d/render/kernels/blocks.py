"""Operations on 4×4 blocks of pixels and on several channels at once, for the blending kernels (see `simd`)."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from geodiff4d.render.kernels import llvm
from geodiff4d.render.kernels.llvm import LANES
from geodiff4d.render.kernels.simd import F, I, M, intrinsic

SIDE = 4
"""Side of a block [px]; its 16 pixels are the lanes of one vector, row by row."""
CHANNELS = 7
"""Features blended at once. A Gaussian fills 16 floats: position, conic, opacity, features and numbers for culling; so
does its gradient, with six moments."""


@intrinsic
def lane(typing, step):
    """Return 0 1 2 … 15, each times `step`."""

    def emit(ctx, b, sig, a):
        count = ir.Constant(llvm.INTS, list(range(LANES)))
        return b.mul(count, llvm.broadcast(b, ctx.cast(b, a[0], sig.args[0], types.int32)))

    return I(step), emit


def _coordinate(place):
    @intrinsic
    def coordinate(typing, first):
        """Return the pixel coordinate of every lane of a block, given that of the first."""

        def emit(ctx, b, sig, a):
            offset = ir.Constant(llvm.FLOATS, [float(place(k)) for k in range(LANES)])
            return b.fadd(llvm.broadcast(b, ctx.cast(b, a[0], sig.args[0], types.float32)), offset)

        return F(first), emit

    return coordinate


block_x, block_y = _coordinate(lambda k: k % SIDE), _coordinate(lambda k: k // SIDE)


def _load_block(ctx, b, array_type, array, start, width):
    four = ir.VectorType(llvm.FLOAT, SIDE)
    parts = [
        llvm.read(b, llvm.address(ctx, b, array_type, array, start, b.mul(width, llvm.LONG(r))), four)
        for r in range(LANES // SIDE)
    ]
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [llvm.shuffle(b, parts[i], parts[i + 1], lanes) for i in range(0, len(parts), 2)]
    return parts[0]


def _store_block(ctx, b, array_type, array, start, width, value):
    for r in range(LANES // SIDE):
        row = llvm.shuffle(b, value, value, range(r * SIDE, (r + 1) * SIDE))
        llvm.write(b, row, llvm.address(ctx, b, array_type, array, start, b.mul(width, llvm.LONG(r))))


@intrinsic
def load_block(typing, image, start, width):
    """Return a block of a plane whose rows are `width` floats apart."""
    return F(image, types.intp, types.intp), lambda ctx, b, sig, a: _load_block(ctx, b, sig.args[0], *a)


@intrinsic
def store_block(typing, image, start, width, value):
    """Write a block of a plane whose rows are `width` floats apart."""

    def emit(ctx, b, sig, a):
        _store_block(ctx, b, sig.args[0], *a)
        return ctx.get_dummy_value()

    return types.void(image, types.intp, types.intp, F), emit


_Planes = types.UniTuple(F, CHANNELS)


@intrinsic
def no_planes(typing):
    """Return zero in every lane of every channel."""

    def emit(ctx, b, sig, a):
        return ctx.make_tuple(b, sig.return_type, [ir.Constant(llvm.FLOATS, [0.0] * LANES)] * CHANNELS)

    return _Planes(), emit


def _in_plane(b, start, plane, c, channels):
    last = b.sub(channels, llvm.LONG(1))
    index = b.select(b.icmp_signed("<", llvm.LONG(c), last), llvm.LONG(c), last)
    return b.add(start, b.mul(plane, index))


@intrinsic
def load_planes(typing, image, start, width, plane, channels):
    """Return a block of every channel; planes are `plane` floats apart, and beyond `channels` the last one repeats."""

    def emit(ctx, b, sig, a):
        image, start, width, plane, channels = a
        blocks = [
            _load_block(ctx, b, sig.args[0], image, _in_plane(b, start, plane, c, channels), width)
            for c in range(CHANNELS)
        ]
        return ctx.make_tuple(b, sig.return_type, blocks)

    return _Planes(image, types.intp, types.intp, types.intp, types.intp), emit


@intrinsic
def store_planes(typing, image, start, width, plane, channels, planes):
    """Write a block of each of the first `channels` planes, which are `plane` floats apart."""

    def emit(ctx, b, sig, a):
        image, start, width, plane, channels, planes = a
        # Channels that are not there go first, to the last one's place.
        for c, block in reversed(list(enumerate(cgutils.unpack_tuple(b, planes)))):
            _store_block(ctx, b, sig.args[0], image, _in_plane(b, start, plane, c, channels), width, block)
        return ctx.get_dummy_value()

    return types.void(image, types.intp, types.intp, types.intp, types.intp, _Planes), emit


@intrinsic
def keep_planes(typing, array, i, planes):
    """Write all channels' lanes one after the other."""

    def emit(ctx, b, sig, a):
        for c, block in enumerate(cgutils.unpack_tuple(b, a[2])):
            llvm.write(b, block, llvm.address(ctx, b, sig.args[0], a[0], a[1], LANES * c))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, _Planes), emit


@intrinsic
def mix(typing, planes, weight, array, i):
    """Return planes[c] + weight · array[i + c], for every channel c."""

    def emit(ctx, b, sig, a):
        planes, weight, array, i = a
        mixed = [
            llvm.fma(b, weight, llvm.broadcast(b, b.load(llvm.address(ctx, b, sig.args[2], array, i, c))), plane)
            for c, plane in enumerate(cgutils.unpack_tuple(b, planes))
        ]
        return ctx.make_tuple(b, sig.return_type, mixed)

    return _Planes(_Planes, F, array, types.intp), emit


@intrinsic
def weigh(typing, columns, array, i):
    """Return Σₖ columns[k] · array[i + k], summed in two chains to hide latency."""

    def emit(ctx, b, sig, a):
        chains = [ir.Constant(llvm.FLOATS, [0.0] * LANES)] * 2
        for k, column in enumerate(cgutils.unpack_tuple(b, a[0])):
            number = llvm.broadcast(b, b.load(llvm.address(ctx, b, sig.args[1], a[1], a[2], k)))
            chains[k % 2] = llvm.fma(b, column, number, chains[k % 2])
        return b.fadd(*chains, flags=llvm.FLAGS)

    return F(columns, array, types.intp), emit


@intrinsic
def append(typing, array, i, values, mask):
    """Write the masked lanes one after the other from array[i]; returns how many. All 16 places may be overwritten."""

    def emit(ctx, b, sig, a):
        array, i, values, mask = a
        # 32-bit lanes only: LLVM 22 compiles a split 64-bit compress wrongly.
        packed = llvm.call(
            b,
            "llvm.experimental.vector.compress.v16i32",
            llvm.INTS,
            [values, mask, ir.Constant(llvm.INTS, ir.Undefined)],
        )
        llvm.write(b, packed, llvm.address(ctx, b, sig.args[0], array, i))
        bits = b.bitcast(mask, ir.IntType(LANES))
        return b.zext(llvm.call(b, "llvm.ctpop.i16", ir.IntType(16), [bits]), llvm.LONG)

    return types.int64(array, types.intp, I, M), emit


@intrinsic
def next_task(typing, counter):
    """Return a number that no other thread gets: 0, 1, 2, … `counter` is incremented atomically."""

    def emit(ctx, b, sig, a):
        return b.atomic_rmw("add", llvm.address(ctx, b, sig.args[0], a[0]), llvm.LONG(1), "monotonic")

    return types.int64(counter), emit
