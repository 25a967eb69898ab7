"""Vectors as values of compiled code, for the few loops whose sums must stay in registers.

LLVM vectorises loops by itself, but keeps an array that a loop adds to in memory, and 512-bit registers unused.  With
these functions a kernel says which numbers are a register; W = width(array) of them are one.

    transpose(dst, d, dstep, src, s, sstep)  dst[d + j*dstep + k] = src[s + k*sstep + j] for j, k < W

Sums are kept in tuples of vectors, a block of rows and columns laid out row by row, and blocks are multiplied:

    like = zeros(array, n)                                n vectors of zeros, n a constant
    sums = broadcast_rows(array, i, like)                 sums[r, c] = array[i + r] in all lanes; `like`: for its size
    sums = fma_broadcast(sums, array, i, step, vectors)   sums[r, c] += array[i + r*step] * vectors[c]
    sums = fma_outer(sums, left, right)                   sums[r, c] += left[r] * right[c]
    load_strided(array, i, step, like)                    as many vectors as `like` has, from i, i + step, ...
    load_indexed(array, i, offset, k, like)               the same from i + offset[k], i + offset[k + 1], ...
    store_contiguous(array, i, sums)                      the vectors one after the other
    store_block(array, i, rstep, cstep, sums, rows)       array[i + r*rstep + c*cstep ...] = sums[r, c], r < rows
    reduce_add(array, i, sums)                            array[i + k] += the sum of the lanes of vector k

`reduce_add` writes whole registers: beyond the last sum it adds zeros.

Loops that do the same to the pixels of tiles and of images (see layout.py) say what a pixel is:

    none = pixel_zero(plane)                      zero: a vector in the plane (H, W, W) of a tile, a number in (H, W)
    v = load(array, i, none)                 one pixel, and store(array, i, v)
    v = load_where(array, i, places, p, none)    the same, but zero where the numbers `places` (int32) are not p
    v = splat(number, none)                 the number in all lanes
    v = fma(a, b, c)                         a*b + c

They compile to an instruction or a few for each vector, and check no index.  Without the compiler they are NumPy.
So are two more:

    ravel(array)             all numbers of a C-contiguous array in a row.  `reshape` does that too, in the time of a
                             row of an image: it is a call, and looks at every stride.  Not for what a `prange` loop
                             writes to itself: Numba does not know that it is the same memory, and drops the loop.
    full_width()        loops of this function that LLVM vectorises by itself use whole registers.  Of 512 bits it
                             would use half: on the first processors that had them, the other half slowed all else down.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, imputils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from numba.np import arrayobj


def _bytes():
    """Of a vector register of this processor."""
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


BYTES = _bytes()
NR_VECTORS = 2  # of the blocks that `broadcast_rows` makes and `store_block` takes


class Vector(types.Type):
    """The type of a register full of `dtype`."""

    def __init__(self, dtype):
        self.dtype, self.size = dtype, BYTES // (dtype.bitwidth // 8)
        super().__init__(f"Vector({dtype}, {self.size})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _llvm(vector))


def _llvm(kind):
    """Of a vector or of a number."""
    if isinstance(kind, Vector):
        return ir.VectorType(_llvm(kind.dtype), kind.size)
    return ir.FloatType() if kind == types.float32 else ir.DoubleType()


def _name(kind):
    """As LLVM's intrinsics are called after their type: v16f32."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_name(kind.element)}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


def _place(context, builder, arrays, array, index, kind):
    data = context.make_array(arrays)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _call(builder, name, result, arguments):
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _everywhere(builder, number, kind):
    """A vector of one number."""
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, none, zeros)


@intrinsic
def _ravel(context, array):
    if array.layout != "C":
        return None
    row = array.copy(ndim=1)

    def code(context, builder, signature, arguments):
        whole = context.make_array(array)(context, builder, arguments[0])
        view = context.make_array(row)(context, builder)
        size, step = [whole.nitems], [whole.itemsize]
        arrayobj.populate_array(view, whole.data, size, step, whole.itemsize, whole.meminfo, whole.parent)
        return imputils.impl_ret_borrowed(context, builder, row, view._getvalue())

    return row(array), code


@intrinsic
def _full_width(context):
    def code(context, builder, signature, arguments):
        # llvmlite checks names against a list of attributes without values.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * BYTES}"')
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _width(context, array):
    size = Vector(array.dtype).size
    return types.intp(array), lambda context, builder, signature, arguments: ir.Constant(ir.IntType(64), size)


@intrinsic
def _pixel_zero(context, plane):
    kind = Vector(plane.dtype) if plane.ndim == 3 else plane.dtype

    def code(context, builder, signature, arguments):
        return ir.Constant(_llvm(kind), [0.0] * kind.size if isinstance(kind, Vector) else 0.0)

    return kind(plane), code


@intrinsic
def _load(context, array, index, like):
    def code(context, builder, signature, arguments):
        array, index, _ = arguments
        place = _place(context, builder, signature.args[0], array, index, _llvm(like))
        return builder.load(place, align=signature.args[0].dtype.bitwidth // 8)

    return like(array, types.intp, like), code


@intrinsic
def _load_where(context, array, index, places, place, like):
    def code(context, builder, signature, arguments):
        array, index, places, place, _ = arguments
        kind, whole = _llvm(like), ir.IntType(32)
        integers = ir.VectorType(whole, kind.count) if isinstance(kind, ir.VectorType) else whole
        there = builder.load(_place(context, builder, signature.args[2], places, index, integers), align=4)
        place = _everywhere(builder, place, integers) if isinstance(kind, ir.VectorType) else place
        numbers = _place(context, builder, signature.args[0], array, index, kind)
        v = builder.load(numbers, align=signature.args[0].dtype.bitwidth // 8)
        zero = ir.Constant(kind, [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0)
        return builder.select(builder.icmp_signed("==", there, place), v, zero)

    return like(array, types.intp, places, types.int32, like), code


@intrinsic
def _store(context, array, index, v):
    def code(context, builder, signature, arguments):
        array, index, v = arguments
        place = _place(context, builder, signature.args[0], array, index, v.type)
        builder.store(v, place, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, v), code


@intrinsic
def _splat(context, number, like):
    def code(context, builder, signature, arguments):
        return _everywhere(builder, arguments[0], _llvm(like)) if isinstance(like, Vector) else arguments[0]

    return like(like.dtype if isinstance(like, Vector) else like, like), code


@intrinsic
def _fma(context, a, b, c):
    return c(c, c, c), lambda context, builder, signature, arguments: _multiply_add(builder, *arguments)


@intrinsic
def _transpose(context, dst, d, dstep, src, s, sstep):
    vector = Vector(src.dtype)

    def code(context, builder, signature, arguments):
        dst, d, dstep, src, s, sstep = arguments
        kind, n, align = _llvm(vector), vector.size, vector.dtype.bitwidth // 8

        def place(arrays, array, start, step, k):
            index = builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))
            return _place(context, builder, arrays, array, index, kind)

        rows = [builder.load(place(signature.args[3], src, s, sstep, k), align=align) for k in range(n)]
        # A vector's first half interleaved with that of the vector half the way on, then the second halves: after
        # log2(n) rounds rows are columns.
        lanes = ir.VectorType(ir.IntType(32), n)
        low, high = (
            ir.Constant(lanes, [lane for k in range(at, at + n // 2) for lane in (k, k + n)]) for at in (0, n // 2)
        )
        for _ in range(n.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[k // 2], rows[k // 2 + n // 2], high if k % 2 else low) for k in range(n)
            ]
        for k in range(n):
            builder.store(rows[k], place(signature.args[0], dst, d, dstep, k), align=align)
        return context.get_dummy_value()

    return types.void(dst, types.intp, types.intp, src, types.intp, types.intp), code


def _block(context, builder, kind, vectors):
    return context.make_tuple(builder, types.UniTuple(kind, len(vectors)), vectors)


def _multiply_add(builder, a, u, v):
    return _call(builder, f"llvm.fma.{_name(u.type)}", u.type, [a, u, v])


def _at(builder, start, step, k):
    return builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))


@intrinsic(prefer_literal=True)
def _zeros(context, array, n):
    vector, size = Vector(array.dtype), n.literal_value

    def code(context, builder, signature, arguments):
        none = ir.Constant(_llvm(vector), [0.0] * vector.size)
        return _block(context, builder, vector, [none] * size)

    return types.UniTuple(vector, size)(array, n), code


@intrinsic
def _broadcast_rows(context, array, index, like):
    def code(context, builder, signature, arguments):
        array, index, _ = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        vectors = []
        for row in range(like.count // NR_VECTORS):
            number = builder.load(builder.gep(data, [builder.add(index, ir.Constant(ir.IntType(64), row))]))
            vectors += [_everywhere(builder, number, _llvm(like.dtype))] * NR_VECTORS
        return _block(context, builder, like.dtype, vectors)

    return like(array, types.intp, like), code


@intrinsic
def _fma_broadcast(context, sums, array, index, step, vectors):
    def code(context, builder, signature, arguments):
        sums, array, index, step, vectors = arguments
        sums = cgutils.unpack_tuple(builder, sums, signature.args[0].count)
        vectors = cgutils.unpack_tuple(builder, vectors, signature.args[4].count)
        data = context.make_array(signature.args[1])(context, builder, array).data
        new: list = []
        for row in range(len(sums) // len(vectors)):
            number = builder.load(builder.gep(data, [_at(builder, index, step, row)]))
            factor = _everywhere(builder, number, vectors[0].type)
            new += [_multiply_add(builder, factor, v, sums[len(new) + c]) for c, v in enumerate(vectors)]
        return _block(context, builder, signature.return_type.dtype, new)

    return sums(sums, array, types.intp, types.intp, vectors), code


@intrinsic
def _fma_outer(context, sums, left, right):
    def code(context, builder, signature, arguments):
        sums, left, right = (
            cgutils.unpack_tuple(builder, a, t.count) for a, t in zip(arguments, signature.args, strict=True)
        )
        pairs = [(a, b) for a in left for b in right]
        new = [_multiply_add(builder, a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]
        return _block(context, builder, signature.return_type.dtype, new)

    return sums(sums, left, right), code


@intrinsic
def _load_strided(context, array, index, step, like):
    vector, size = like.dtype, like.count

    def code(context, builder, signature, arguments):
        array, index, step, _ = arguments
        places = [
            _place(context, builder, signature.args[0], array, _at(builder, index, step, k), _llvm(vector))
            for k in range(size)
        ]
        loaded = [builder.load(place, align=vector.dtype.bitwidth // 8) for place in places]
        return _block(context, builder, vector, loaded)

    return like(array, types.intp, types.intp, like), code


@intrinsic
def _load_indexed(context, array, index, offset, first, like):
    vector, size = like.dtype, like.count

    def code(context, builder, signature, arguments):
        array, index, offset, first, _ = arguments
        offsets, loaded = context.make_array(signature.args[2])(context, builder, offset).data, []
        for k in range(size):
            more = builder.load(builder.gep(offsets, [builder.add(first, ir.Constant(ir.IntType(64), k))]))
            place = _place(context, builder, signature.args[0], array, builder.add(index, more), _llvm(vector))
            loaded.append(builder.load(place, align=vector.dtype.bitwidth // 8))
        return _block(context, builder, vector, loaded)

    return like(array, types.intp, offset, types.intp, like), code


@intrinsic
def _store_contiguous(context, array, index, sums):
    vector = sums.dtype

    def code(context, builder, signature, arguments):
        array, index, sums = arguments
        for k, v in enumerate(cgutils.unpack_tuple(builder, sums, signature.args[2].count)):
            at = builder.add(index, ir.Constant(ir.IntType(64), k * vector.size))
            place = _place(context, builder, signature.args[0], array, at, v.type)
            builder.store(v, place, align=vector.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, sums), code


@intrinsic
def _store_block(context, array, index, rstep, cstep, sums, rows):
    def code(context, builder, signature, arguments):
        array, index, rstep, cstep, sums, rows = arguments
        sums = cgutils.unpack_tuple(builder, sums, signature.args[4].count)
        for row in range(len(sums) // NR_VECTORS):
            wanted = builder.icmp_signed("<", ir.Constant(ir.IntType(64), row), rows)
            with builder.if_then(wanted, likely=True):
                for c in range(NR_VECTORS):
                    at = _at(builder, _at(builder, index, rstep, row), cstep, c)
                    v = sums[row * NR_VECTORS + c]
                    place = _place(context, builder, signature.args[0], array, at, v.type)
                    builder.store(v, place, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, sums, types.intp), code


@intrinsic
def _reduce_add(context, array, index, sums):
    vector = sums.dtype

    def halves(builder, a, b, step):
        """Of every run of `step` lanes the two halves added: first those of a, then those of b."""
        n = vector.size
        lanes = [k for k in range(2 * n) if k % step < step // 2]
        low, high = (
            builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), n), [k + more for k in lanes]))
            for more in (0, step // 2)
        )
        return builder.fadd(low, high)

    def code(context, builder, signature, arguments):
        array, index, sums = arguments
        sums = cgutils.unpack_tuple(builder, sums, signature.args[2].count)
        kind, align = _llvm(vector), vector.dtype.bitwidth // 8
        for first in range(0, len(sums), vector.size):
            # A register's worth of sums at a time, two into one until all lanes of one are totals.
            group = sums[first : first + vector.size]
            group += [ir.Constant(kind, [0.0] * vector.size)] * (vector.size - len(group))
            step = vector.size
            while len(group) > 1:
                group = [halves(builder, group[k], group[k + 1], step) for k in range(0, len(group), 2)]
                step //= 2
            at = builder.add(index, ir.Constant(ir.IntType(64), first))
            place = _place(context, builder, signature.args[0], array, at, kind)
            builder.store(builder.fadd(builder.load(place, align=align), group[0]), place, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, sums), code


def _without_compiler():
    """The same in NumPy, for the debugger."""

    def ravel(array):
        return array.reshape(array.size)

    def full_width():
        pass

    def width(array):
        return BYTES // array.itemsize

    def pixel_zero(plane):
        return np.zeros(width(plane), plane.dtype) if plane.ndim == 3 else plane.dtype.type(0)

    def load(array, index, like):
        return array[index : index + len(like)].copy() if np.ndim(like) else array[index]

    def load_where(array, index, places, place, like):
        return np.where(load(places, index, like) == place, load(array, index, like), array.dtype.type(0))[()]

    def store(array, index, v):
        array[index : index + np.size(v)] = v

    def splat(number, like):
        return np.full_like(like, number)[()]

    def fma(a, b, c):
        return a * b + c

    def transpose(dst, d, dstep, src, s, sstep):
        rows = np.array([src[s + k * sstep :][: width(src)] for k in range(width(src))])
        for j in range(width(src)):
            store(dst, d + j * dstep, rows[:, j])

    def zeros(array, n):
        return (np.zeros(width(array), array.dtype),) * n

    def broadcast_rows(array, index, like):
        return tuple(np.full(len(like[0]), array[index + k // NR_VECTORS], array.dtype) for k in range(len(like)))

    def fma_broadcast(sums, array, index, step, vectors):
        n = len(vectors)
        return tuple(s + array[index + k // n * step] * vectors[k % n] for k, s in enumerate(sums))

    def fma_outer(sums, left, right):
        n = len(right)
        return tuple(s + left[k // n] * right[k % n] for k, s in enumerate(sums))

    def load_strided(array, index, step, like):
        return tuple(load(array, index + k * step, like[0]) for k in range(len(like)))

    def load_indexed(array, index, offset, first, like):
        return tuple(load(array, index + offset[first + k], like[0]) for k in range(len(like)))

    def store_contiguous(array, index, sums):
        for k, v in enumerate(sums):
            store(array, index + k * len(v), v)

    def store_block(array, index, rstep, cstep, sums, rows):
        for k in range(min(rows, len(sums) // NR_VECTORS) * NR_VECTORS):
            store(array, index + k // NR_VECTORS * rstep + k % NR_VECTORS * cstep, sums[k])

    def reduce_add(array, index, sums):
        for k, v in enumerate(sums):
            array[index + k] += v.sum()

    pixels = pixel_zero, load, load_where, store, splat, fma
    blocks = zeros, broadcast_rows, load_strided, load_indexed, store_contiguous, store_block
    return ravel, full_width, width, transpose, *pixels, *blocks, fma_broadcast, fma_outer, reduce_add


_compiled = (
    _ravel, _full_width, _width, _transpose, _pixel_zero, _load, _load_where, _store, _splat, _fma, _zeros,
    _broadcast_rows, _load_strided, _load_indexed, _store_contiguous, _store_block, _fma_broadcast, _fma_outer,
    _reduce_add,
)  # fmt: skip
_functions: Any = _without_compiler() if numba.config.DISABLE_JIT else _compiled  # type: ignore[attr-defined]
ravel, full_width, width, transpose = _functions[:4]
pixel_zero, load, load_where, store, splat, fma = _functions[4:10]
zeros, broadcast_rows, load_strided, load_indexed, store_contiguous, store_block = _functions[10:16]
fma_broadcast, fma_outer, reduce_add = _functions[16:]
