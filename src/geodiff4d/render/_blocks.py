"""Operations on 4×4 blocks of pixels and on several channels at once, for the blending kernels (see `_simd`)."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from geodiff4d.render._simd import (
    _F,
    _FLAGS,
    _FLOAT,
    _I,
    _LONG,
    LANES,
    F,
    I,
    M,
    _address,
    _broadcast,
    _call,
    _fma,
    _read,
    _shuffle,
    _write,
    intrinsic,
)

SIDE = 4
"""Of a block [px]: 16 pixels, one lane each, row by row."""
CHANNELS = 7
"""Features blended at once. With position, conic, opacity and what culling needs, a Gaussian fills 16 floats; with six
moments its gradient does."""


@intrinsic
def lane(typing, step):
    """0 1 2 … 15, each times `step`."""

    def emit(ctx, b, sig, a):
        count = ir.Constant(_I, list(range(LANES)))
        return b.mul(count, _broadcast(b, ctx.cast(b, a[0], sig.args[0], types.int32)))

    return I(step), emit


def _coordinate(place):
    @intrinsic
    def coordinate(typing, first):
        """Pixel coordinates of a block's lanes, from that of its first lane."""

        def emit(ctx, b, sig, a):
            offset = ir.Constant(_F, [float(place(k)) for k in range(LANES)])
            return b.fadd(_broadcast(b, ctx.cast(b, a[0], sig.args[0], types.float32)), offset)

        return F(first), emit

    return coordinate


block_x, block_y = _coordinate(lambda k: k % SIDE), _coordinate(lambda k: k // SIDE)


def _load_block(ctx, b, array_type, array, start, width):
    four = ir.VectorType(_FLOAT, SIDE)
    parts = [
        _read(b, _address(ctx, b, array_type, array, start, b.mul(width, _LONG(r))), four) for r in range(LANES // SIDE)
    ]
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [_shuffle(b, parts[i], parts[i + 1], lanes) for i in range(0, len(parts), 2)]
    return parts[0]


def _store_block(ctx, b, array_type, array, start, width, value):
    for r in range(LANES // SIDE):
        row = _shuffle(b, value, value, range(r * SIDE, (r + 1) * SIDE))
        _write(b, row, _address(ctx, b, array_type, array, start, b.mul(width, _LONG(r))))


@intrinsic
def load_block(typing, image, start, width):
    """A block of a plane whose rows are `width` apart."""
    return F(image, types.intp, types.intp), lambda ctx, b, sig, a: _load_block(ctx, b, sig.args[0], *a)


@intrinsic
def store_block(typing, image, start, width, value):
    """Set a block of a plane."""

    def emit(ctx, b, sig, a):
        _store_block(ctx, b, sig.args[0], *a)
        return ctx.get_dummy_value()

    return types.void(image, types.intp, types.intp, F), emit


_Planes = types.UniTuple(F, CHANNELS)


@intrinsic
def no_planes(typing):
    """Zero in every lane of every channel."""

    def emit(ctx, b, sig, a):
        return ctx.make_tuple(b, sig.return_type, [ir.Constant(_F, [0.0] * LANES)] * CHANNELS)

    return _Planes(), emit


def _in_plane(b, start, plane, c, channels):
    last = b.sub(channels, _LONG(1))
    index = b.select(b.icmp_signed("<", _LONG(c), last), _LONG(c), last)
    return b.add(start, b.mul(plane, index))


@intrinsic
def load_planes(typing, image, start, width, plane, channels):
    """A block of every channel; planes are `plane` floats apart, and beyond `channels` the last one comes again."""

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
    """Set a block of every one of `channels`."""

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
            _write(b, block, _address(ctx, b, sig.args[0], a[0], a[1], LANES * c))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, _Planes), emit


@intrinsic
def mix(typing, planes, weight, array, i):
    """planes[c] + weight · array[i + c], for every channel."""

    def emit(ctx, b, sig, a):
        planes, weight, array, i = a
        mixed = [
            _fma(b, weight, _broadcast(b, b.load(_address(ctx, b, sig.args[2], array, i, c))), plane)
            for c, plane in enumerate(cgutils.unpack_tuple(b, planes))
        ]
        return ctx.make_tuple(b, sig.return_type, mixed)

    return _Planes(_Planes, F, array, types.intp), emit


@intrinsic
def weigh(typing, columns, array, i):
    """Σₖ columns[k] · array[i + k], in two chains to hide latency."""

    def emit(ctx, b, sig, a):
        chains = [ir.Constant(_F, [0.0] * LANES)] * 2
        for k, column in enumerate(cgutils.unpack_tuple(b, a[0])):
            number = _broadcast(b, b.load(_address(ctx, b, sig.args[1], a[1], a[2], k)))
            chains[k % 2] = _fma(b, column, number, chains[k % 2])
        return b.fadd(*chains, flags=_FLAGS)

    return F(columns, array, types.intp), emit


@intrinsic
def append(typing, array, i, values, mask):
    """Write the masked lanes one after the other from array[i]; returns how many. All 16 places may be overwritten."""

    def emit(ctx, b, sig, a):
        array, i, values, mask = a
        # 32-bit lanes only: LLVM 22 compiles a split 64-bit compress wrongly.
        packed = _call(b, "llvm.experimental.vector.compress.v16i32", _I, [values, mask, ir.Constant(_I, ir.Undefined)])
        _write(b, packed, _address(ctx, b, sig.args[0], array, i))
        bits = b.bitcast(mask, ir.IntType(LANES))
        return b.zext(_call(b, "llvm.ctpop.i16", ir.IntType(16), [bits]), _LONG)

    return types.int64(array, types.intp, I, M), emit


@intrinsic
def next_task(typing, counter):
    """Take a number that no other thread gets: 0, 1, 2, …"""

    def emit(ctx, b, sig, a):
        return b.atomic_rmw("add", _address(ctx, b, sig.args[0], a[0]), _LONG(1), "monotonic")

    return types.int64(counter), emit
