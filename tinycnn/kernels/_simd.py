"""SIMD vectors as values of compiled code, for the loops whose accumulators must stay in registers.

LLVM vectorises loops by itself, but keeps arrays that a loop adds to in memory, and uses half of a 512-bit register.
With these functions a kernel works on registers of W = width(array) elements.

    transpose(dst, d, dstep, src, s, sstep)  dst[d + j*dstep + k] = src[s + k*sstep + j] for j, k < W

Accumulators are tuples of vectors: a block of rows and columns, row by row.  `like` stands for the number of vectors:

    acc = zeros(array, n)                               n vectors of zeros, n a constant
    acc = broadcast_rows(array, i, like)                acc[r, c] = array[i + r] in all lanes
    acc = fma_broadcast(acc, array, i, step, vectors)   acc[r, c] += array[i + r*step] * vectors[c]
    acc = fma_outer(acc, left, right)                   acc[r, c] += left[r] * right[c]
    load_strided(array, i, step, like)                  vectors from i, i + step, ...
    load_indexed(array, i, offsets, k, like)            vectors from i + offsets[k], i + offsets[k + 1], ...
    store_contiguous(array, i, acc)                     one vector after the other
    interleave(u, v)                                    u[0], v[0], u[1], v[1] and so on: two vectors
    deinterleave(u, v)                                  the opposite: u[0], u[2] ... v[0], v[2] ... and the rest
    store_block(array, i, rstep, cstep, acc, rows)      array[i + r*rstep + c*cstep ...] = acc[r, c] for r < rows
    store_epilogue(..., rows, table, n, k, residual)    the same of acc[r, c]*scale[k + r] + shift[k + r] +
                                                        residual[i + r*rstep + c*cstep ...], at least low and at most
                                                        high; a NaN stays.  table: n scales, n shifts, low at 2*n, high
                                                        at 3*n   residual: may be None
    reduce_add(array, i, acc)                           array[i + k] += sum of the lanes of vector k; adds zeros to the
                                                        elements after them, up to a whole number of registers

`broadcast_rows`, `store_block` and `store_epilogue` take blocks of NR_VECTORS columns.

Loops over the pixels of both layouts, NCHW and batch-blocked (see layout.py), use pixels: a pixel is a number in a
plane (H, W) and a vector in a plane (H, W, L):

    zero = pixel_zero(plane)                 a pixel of zeros, which also stands for the type in `load` and `splat`
    v = load(array, i, zero)                 one pixel; store(array, i, v)
    v = load_where(array, i, keys, k, zero)  the same, but zero where keys[i ...] (int32) differ from k
    store_max(array, positions, i, vs, ks)   array[i ...] = the largest of a tuple of pixels, positions[i ...] = its key
                                             in a tuple of int32; of equal ones the first, of NaNs the last.  Both may
                                             be None
    update_max(array, positions, i, v, k)    array[i ...] = v and positions[i ...] = k, an int32, where v is larger or a
                                             NaN, or the position is negative
    v = splat(number, zero)                  the number in all lanes
    v = fma(a, b, c)                         a*b + c

Each vector costs one or a few instructions; indices are not checked.  With NUMBA_DISABLE_JIT these functions are NumPy.
Three more:

    ravel(array)             a flat view of a C-contiguous array.  `reshape` is a call that examines every stride, and
                             takes as long as a row of an image.  Not for arrays that the body of a `prange` loop
                             writes to itself: Numba does not know that the memory is shared, and drops the loop.
    prefetch(array, i)       loads the cache line of an element ahead of its use
    full_width()             LLVM uses whole registers in this function.  By default it uses half of 512 bits, since
                             the first processors with AVX-512 lowered their clock for more.
"""

import functools
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, imputils, types
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_model
from numba.np import arrayobj

ADDITION = """
define <16 x float> @add(<16 x float> %a, <16 x float> %b) {
  %sum = fadd <16 x float> %a, %b
  ret <16 x float> %sum
}
"""


def _register_bytes() -> int:
    """The size of a vector register of the processor that Numba compiles for: of those that LLVM adds 16 floats in."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    target = llvmlite.binding.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=processor, features=features)
    assembly = machine.emit_assembly(llvmlite.binding.parse_assembly(ADDITION))
    return 64 if "zmm" in assembly else 32 if "ymm" in assembly else 16


BYTES = _register_bytes()
NR_VECTORS = 2  # columns of a register block


class Vector(types.Type):
    """Numba's type of a register of `dtype`."""

    def __init__(self, dtype):
        self.dtype, self.size = dtype, BYTES // (dtype.bitwidth // 8)
        super().__init__(f"Vector({dtype}, {self.size})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _llvm_type(vector))


def _llvm_type(kind):
    """LLVM's type of a vector or a number."""
    if isinstance(kind, Vector):
        return ir.VectorType(_llvm_type(kind.dtype), kind.size)
    return ir.FloatType() if kind == types.float32 else ir.DoubleType()


def _intrinsic_type(kind):
    """The type in the name of an LLVM intrinsic: v16f32."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_intrinsic_type(kind.element)}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


def _address(context, builder, arrays, array, index, kind):
    data = context.make_array(arrays)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _call(builder, name, result, arguments):
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _broadcast(builder, number, kind):
    """The number in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, undefined, zeros)


@intrinsic
def _ravel(context, array):
    if array.layout != "C":
        return None
    flat = array.copy(ndim=1)

    def code(context, builder, signature, arguments):
        whole = context.make_array(array)(context, builder, arguments[0])
        view = context.make_array(flat)(context, builder)
        size, step = [whole.nitems], [whole.itemsize]
        arrayobj.populate_array(view, whole.data, size, step, whole.itemsize, whole.meminfo, whole.parent)
        return imputils.impl_ret_borrowed(context, builder, flat, view._getvalue())

    return flat(array), code


@intrinsic
def _full_width(context):
    def code(context, builder, signature, arguments):
        # set.add, since llvmlite's own check knows only attributes without values.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * BYTES}"')
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _prefetch(context, array, index):
    def code(context, builder, signature, arguments):
        pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        array, index = arguments
        address = _address(context, builder, signature.args[0], array, index, ir.IntType(8))
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        builder.call(prefetch, [address, *(ir.Constant(int32, n) for n in (0, 3, 1))])  # to read; L1; data
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def _width(context, array):
    size = Vector(array.dtype).size
    return types.intp(array), lambda context, builder, signature, arguments: ir.Constant(ir.IntType(64), size)


@intrinsic
def _pixel_zero(context, plane):
    kind = Vector(plane.dtype) if plane.ndim == 3 else plane.dtype

    def code(context, builder, signature, arguments):
        return ir.Constant(_llvm_type(kind), [0.0] * kind.size if isinstance(kind, Vector) else 0.0)

    return kind(plane), code


@intrinsic
def _load(context, array, index, like):
    def code(context, builder, signature, arguments):
        array, index, _ = arguments
        address = _address(context, builder, signature.args[0], array, index, _llvm_type(like))
        return builder.load(address, align=signature.args[0].dtype.bitwidth // 8)

    return like(array, types.intp, like), code


@intrinsic
def _load_where(context, array, index, keys, key, like):
    def code(context, builder, signature, arguments):
        array, index, keys, key, _ = arguments
        kind, int32 = _llvm_type(like), ir.IntType(32)
        key_type = ir.VectorType(int32, kind.count) if isinstance(kind, ir.VectorType) else int32
        loaded = builder.load(_address(context, builder, signature.args[2], keys, index, key_type), align=4)
        key = _broadcast(builder, key, key_type) if isinstance(kind, ir.VectorType) else key
        address = _address(context, builder, signature.args[0], array, index, kind)
        v = builder.load(address, align=signature.args[0].dtype.bitwidth // 8)
        zero = ir.Constant(kind, [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0)
        return builder.select(builder.icmp_signed("==", loaded, key), v, zero)

    return like(array, types.intp, keys, types.int32, like), code


@intrinsic
def _store(context, array, index, v):
    def code(context, builder, signature, arguments):
        array, index, v = arguments
        address = _address(context, builder, signature.args[0], array, index, v.type)
        builder.store(v, address, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, v), code


def _is_larger(builder, v, best):
    """Whether v > best or v is a NaN."""
    return builder.or_(builder.fcmp_ordered(">", v, best), builder.fcmp_unordered("uno", v, v))


@intrinsic
def _update_max(context, array, positions, index, v, key):
    def code(context, builder, signature, arguments):
        array, positions, index, v, key = arguments
        key_type = ir.IntType(32)
        if isinstance(v.type, ir.VectorType):
            key_type = ir.VectorType(key_type, v.type.count)
            key = _broadcast(builder, key, key_type)
        address = _address(context, builder, signature.args[0], array, index, v.type)
        position = _address(context, builder, signature.args[1], positions, index, key_type)
        align = signature.args[0].dtype.bitwidth // 8
        best, where = builder.load(address, align=align), builder.load(position, align=4)
        none = ir.Constant(key_type, [0] * key_type.count if isinstance(key_type, ir.VectorType) else 0)
        better = builder.or_(_is_larger(builder, v, best), builder.icmp_signed("<", where, none))
        builder.store(builder.select(better, v, best), address, align=align)
        builder.store(builder.select(better, key, where), position, align=4)
        return context.get_dummy_value()

    return types.void(array, positions, types.intp, v, types.int32), code


@intrinsic
def _store_max(context, array, positions, index, pixels, keys):
    def code(context, builder, signature, arguments):
        array, positions, index, pixels, keys = arguments
        pixels = cgutils.unpack_tuple(builder, pixels, signature.args[3].count)
        kind, best, better = pixels[0].type, pixels[0], []
        for v in pixels[1:]:
            better.append(_is_larger(builder, v, best))
            best = builder.select(better[-1], v, best)
        address = _address(context, builder, signature.args[0], array, index, kind)
        builder.store(best, address, align=signature.args[0].dtype.bitwidth // 8)
        if indexed:
            keys, key_type = cgutils.unpack_tuple(builder, keys, len(pixels)), ir.IntType(32)
            if isinstance(kind, ir.VectorType):
                key_type = ir.VectorType(key_type, kind.count)
                keys = [_broadcast(builder, key, key_type) for key in keys]
            where = keys[0]
            for key, is_better in zip(keys[1:], better, strict=True):
                where = builder.select(is_better, key, where)
            builder.store(where, _address(context, builder, signature.args[1], positions, index, key_type), align=4)
        return context.get_dummy_value()

    indexed = positions != types.none
    key_types = types.UniTuple(types.int32, pixels.count) if indexed else keys
    return types.void(array, positions, types.intp, pixels, key_types), code


@intrinsic
def _splat(context, number, like):
    def code(context, builder, signature, arguments):
        return _broadcast(builder, arguments[0], _llvm_type(like)) if isinstance(like, Vector) else arguments[0]

    return like(like.dtype if isinstance(like, Vector) else like, like), code


@intrinsic
def _fma(context, a, b, c):
    return c(c, c, c), lambda context, builder, signature, arguments: _fma_call(builder, *arguments)


@intrinsic
def _transpose(context, dst, d, dstep, src, s, sstep):
    vector = Vector(src.dtype)

    def code(context, builder, signature, arguments):
        dst, d, dstep, src, s, sstep = arguments
        kind, n, align = _llvm_type(vector), vector.size, vector.dtype.bitwidth // 8

        def address(arrays, array, start, step, k):
            index = builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))
            return _address(context, builder, arrays, array, index, kind)

        rows = [builder.load(address(signature.args[3], src, s, sstep, k), align=align) for k in range(n)]
        # Each round interleaves vector k with vector k + n/2: the lower halves, then the upper halves.  log2(n) rounds
        # transpose the square.
        lanes = ir.VectorType(ir.IntType(32), n)
        low, high = (
            ir.Constant(lanes, [lane for k in range(at, at + n // 2) for lane in (k, k + n)]) for at in (0, n // 2)
        )
        for _ in range(n.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[k // 2], rows[k // 2 + n // 2], high if k % 2 else low) for k in range(n)
            ]
        for k in range(n):
            builder.store(rows[k], address(signature.args[0], dst, d, dstep, k), align=align)
        return context.get_dummy_value()

    return types.void(dst, types.intp, types.intp, src, types.intp, types.intp), code


def _tuple_of(context, builder, kind, vectors):
    return context.make_tuple(builder, types.UniTuple(kind, len(vectors)), vectors)


def _fma_call(builder, a, u, v):
    # Not llvm.fma, which is a call of a C function for each lane on processors without this instruction.
    return _call(builder, f"llvm.fmuladd.{_intrinsic_type(u.type)}", u.type, [a, u, v])


def _index(builder, start, step, k):
    return builder.add(start, builder.mul(step, ir.Constant(ir.IntType(64), k)))


@intrinsic(prefer_literal=True)
def _zeros(context, array, n):
    vector, size = Vector(array.dtype), n.literal_value

    def code(context, builder, signature, arguments):
        zero = ir.Constant(_llvm_type(vector), [0.0] * vector.size)
        return _tuple_of(context, builder, vector, [zero] * size)

    return types.UniTuple(vector, size)(array, n), code


@intrinsic
def _broadcast_rows(context, array, index, like):
    def code(context, builder, signature, arguments):
        array, index, _ = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        vectors = []
        for row in range(like.count // NR_VECTORS):
            number = builder.load(builder.gep(data, [builder.add(index, ir.Constant(ir.IntType(64), row))]))
            vectors += [_broadcast(builder, number, _llvm_type(like.dtype))] * NR_VECTORS
        return _tuple_of(context, builder, like.dtype, vectors)

    return like(array, types.intp, like), code


@intrinsic
def _fma_broadcast(context, acc, array, index, step, vectors):
    def code(context, builder, signature, arguments):
        acc, array, index, step, vectors = arguments
        acc = cgutils.unpack_tuple(builder, acc, signature.args[0].count)
        vectors = cgutils.unpack_tuple(builder, vectors, signature.args[4].count)
        data = context.make_array(signature.args[1])(context, builder, array).data
        new: list[Any] = []
        for row in range(len(acc) // len(vectors)):
            number = builder.load(builder.gep(data, [_index(builder, index, step, row)]))
            factor = _broadcast(builder, number, vectors[0].type)
            new += [_fma_call(builder, factor, v, acc[len(new) + c]) for c, v in enumerate(vectors)]
        return _tuple_of(context, builder, signature.return_type.dtype, new)

    return acc(acc, array, types.intp, types.intp, vectors), code


@intrinsic
def _fma_outer(context, acc, left, right):
    def code(context, builder, signature, arguments):
        acc, left, right = (
            cgutils.unpack_tuple(builder, a, t.count) for a, t in zip(arguments, signature.args, strict=True)
        )
        pairs = [(a, b) for a in left for b in right]
        new = [_fma_call(builder, a, b, s) for (a, b), s in zip(pairs, acc, strict=True)]
        return _tuple_of(context, builder, signature.return_type.dtype, new)

    return acc(acc, left, right), code


@intrinsic
def _load_strided(context, array, index, step, like):
    vector, size = like.dtype, like.count

    def code(context, builder, signature, arguments):
        array, index, step, _ = arguments
        addresses = [
            _address(context, builder, signature.args[0], array, _index(builder, index, step, k), _llvm_type(vector))
            for k in range(size)
        ]
        loaded = [builder.load(address, align=vector.dtype.bitwidth // 8) for address in addresses]
        return _tuple_of(context, builder, vector, loaded)

    return like(array, types.intp, types.intp, like), code


@intrinsic
def _load_indexed(context, array, index, offsets, first, like):
    vector, size = like.dtype, like.count

    def code(context, builder, signature, arguments):
        array, index, offsets, first, _ = arguments
        data, loaded = context.make_array(signature.args[2])(context, builder, offsets).data, []
        for k in range(size):
            offset = builder.load(builder.gep(data, [builder.add(first, ir.Constant(ir.IntType(64), k))]))
            address = _address(
                context, builder, signature.args[0], array, builder.add(index, offset), _llvm_type(vector)
            )
            loaded.append(builder.load(address, align=vector.dtype.bitwidth // 8))
        return _tuple_of(context, builder, vector, loaded)

    return like(array, types.intp, offsets, types.intp, like), code


@intrinsic
def _store_contiguous(context, array, index, acc):
    vector = acc.dtype

    def code(context, builder, signature, arguments):
        array, index, acc = arguments
        for k, v in enumerate(cgutils.unpack_tuple(builder, acc, signature.args[2].count)):
            position = builder.add(index, ir.Constant(ir.IntType(64), k * vector.size))
            address = _address(context, builder, signature.args[0], array, position, v.type)
            builder.store(v, address, align=vector.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, acc), code


def _shuffle_pair(order):
    """An intrinsic of two vectors of n lanes: the lanes order(n), of 2*n, as two vectors."""

    @intrinsic
    def shuffle(context, u, v):
        def code(context, builder, signature, arguments):
            kind, n = signature.args[0], signature.args[0].size
            lanes, index = order(n), ir.VectorType(ir.IntType(32), n)
            halves = [ir.Constant(index, lanes[k : k + n]) for k in (0, n)]
            return _tuple_of(context, builder, kind, [builder.shuffle_vector(*arguments, half) for half in halves])

        return types.UniTuple(u, 2)(u, v), code

    return shuffle


_interleave = _shuffle_pair(lambda n: [lane for k in range(n) for lane in (k, n + k)])
_deinterleave = _shuffle_pair(lambda n: [*range(0, 2 * n, 2), *range(1, 2 * n, 2)])


@intrinsic
def _store_block(context, array, index, rstep, cstep, acc, rows):
    def code(context, builder, signature, arguments):
        array, index, rstep, cstep, acc, rows = arguments
        acc = cgutils.unpack_tuple(builder, acc, signature.args[4].count)
        for row in range(len(acc) // NR_VECTORS):
            in_range = builder.icmp_signed("<", ir.Constant(ir.IntType(64), row), rows)
            with builder.if_then(in_range, likely=True):
                for c in range(NR_VECTORS):
                    position = _index(builder, _index(builder, index, rstep, row), cstep, c)
                    v = acc[row * NR_VECTORS + c]
                    address = _address(context, builder, signature.args[0], array, position, v.type)
                    builder.store(v, address, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, acc, types.intp), code


@intrinsic
def _store_epilogue(context, array, index, rstep, cstep, acc, rows, table, count, first, residual):
    def code(context, builder, signature, arguments):
        array, index, rstep, cstep, acc, rows, table, count, first, residual = arguments
        acc, align = cgutils.unpack_tuple(builder, acc, signature.args[4].count), signature.args[0].dtype.bitwidth // 8
        data = context.make_array(signature.args[6])(context, builder, table).data

        def entry(start, line):
            return _broadcast(
                builder, builder.load(builder.gep(data, [_index(builder, start, count, line)])), acc[0].type
            )

        low, high = (entry(ir.Constant(ir.IntType(64), 0), line) for line in (2, 3))
        for row in range(len(acc) // NR_VECTORS):
            in_range = builder.icmp_signed("<", ir.Constant(ir.IntType(64), row), rows)
            with builder.if_then(in_range, likely=True):
                scale, shift = (entry(builder.add(first, ir.Constant(ir.IntType(64), row)), line) for line in (0, 1))
                for c in range(NR_VECTORS):
                    position = _index(builder, _index(builder, index, rstep, row), cstep, c)
                    v = _fma_call(builder, acc[row * NR_VECTORS + c], scale, shift)
                    if signature.args[9] != types.none:
                        address = _address(context, builder, signature.args[9], residual, position, v.type)
                        v = builder.fadd(v, builder.load(address, align=align))
                    v = builder.select(builder.fcmp_ordered("<", v, low), low, v)
                    v = builder.select(builder.fcmp_ordered(">", v, high), high, v)
                    builder.store(
                        v, _address(context, builder, signature.args[0], array, position, v.type), align=align
                    )
        return context.get_dummy_value()

    steps = types.intp, types.intp, types.intp
    return types.void(array, *steps, acc, types.intp, table, types.intp, types.intp, residual), code


@intrinsic
def _reduce_add(context, array, index, acc):
    vector = acc.dtype

    def add_halves(builder, a, b, step):
        """Add the two halves of each run of `step` lanes: first those of a, then those of b."""
        n = vector.size
        lanes = [k for k in range(2 * n) if k % step < step // 2]
        low, high = (
            builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), n), [k + shift for k in lanes]))
            for shift in (0, step // 2)
        )
        return builder.fadd(low, high)

    def code(context, builder, signature, arguments):
        array, index, acc = arguments
        acc = cgutils.unpack_tuple(builder, acc, signature.args[2].count)
        kind, align = _llvm_type(vector), vector.dtype.bitwidth // 8
        for first in range(0, len(acc), vector.size):
            # Halve the number of vectors until the lanes of the last one are the totals of the group.
            group = acc[first : first + vector.size]
            group += [ir.Constant(kind, [0.0] * vector.size)] * (vector.size - len(group))
            step = vector.size
            while len(group) > 1:
                group = [add_halves(builder, group[k], group[k + 1], step) for k in range(0, len(group), 2)]
                step //= 2
            position = builder.add(index, ir.Constant(ir.IntType(64), first))
            address = _address(context, builder, signature.args[0], array, position, kind)
            builder.store(builder.fadd(builder.load(address, align=align), group[0]), address, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, acc), code


def _without_compiler():
    """These functions in NumPy, for the debugger."""

    def ravel(array):
        return array.reshape(array.size)

    def full_width():
        pass

    def prefetch(array, index):
        pass

    def width(array):
        return BYTES // array.itemsize

    def pixel_zero(plane):
        return np.zeros(width(plane), plane.dtype) if plane.ndim == 3 else plane.dtype.type(0)

    def load(array, index, like):
        return array[index : index + len(like)].copy() if np.ndim(like) else array[index]

    def load_where(array, index, keys, key, like):
        return np.where(load(keys, index, like) == key, load(array, index, like), array.dtype.type(0))[()]

    def store(array, index, v):
        array[index : index + np.size(v)] = v

    def store_max(array, positions, index, pixels, keys):
        if positions is None:
            store(array, index, functools.reduce(lambda best, v: np.where((v > best) | (v != v), v, best), pixels))
            return
        best, where = pixels[0], np.full(np.shape(pixels[0]), keys[0], np.int32)
        for v, key in zip(pixels[1:], keys[1:], strict=True):
            better = (v > best) | (v != v)
            best, where = np.where(better, v, best), np.where(better, key, where)
        store(array, index, best)
        store(positions, index, where)

    def update_max(array, positions, index, v, key):
        best, where = load(array, index, v), load(positions, index, v)
        better = (v > best) | (v != v) | (where < 0)
        store(array, index, np.where(better, v, best))
        store(positions, index, np.where(better, key, where))

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

    def fma_broadcast(acc, array, index, step, vectors):
        n = len(vectors)
        return tuple(s + array[index + k // n * step] * vectors[k % n] for k, s in enumerate(acc))

    def fma_outer(acc, left, right):
        n = len(right)
        return tuple(s + left[k // n] * right[k % n] for k, s in enumerate(acc))

    def load_strided(array, index, step, like):
        return tuple(load(array, index + k * step, like[0]) for k in range(len(like)))

    def load_indexed(array, index, offsets, first, like):
        return tuple(load(array, index + offsets[first + k], like[0]) for k in range(len(like)))

    def store_contiguous(array, index, acc):
        for k, v in enumerate(acc):
            store(array, index + k * len(v), v)

    def interleave(u, v):
        return tuple(np.stack([u, v], 1).reshape(2, len(u)))

    def deinterleave(u, v):
        return tuple(np.concatenate([u, v]).reshape(len(u), 2).T.copy())

    def store_block(array, index, rstep, cstep, acc, rows):
        for k in range(min(rows, len(acc) // NR_VECTORS) * NR_VECTORS):
            store(array, index + k // NR_VECTORS * rstep + k % NR_VECTORS * cstep, acc[k])

    def store_epilogue(array, index, rstep, cstep, acc, rows, table, count, first, residual):
        for k in range(min(rows, len(acc) // NR_VECTORS) * NR_VECTORS):
            at, row = index + k // NR_VECTORS * rstep + k % NR_VECTORS * cstep, first + k // NR_VECTORS
            v = acc[k] * table[row] + table[count + row]
            v = v if residual is None else v + load(residual, at, v)
            store(array, at, np.minimum(np.maximum(v, table[2 * count]), table[3 * count]))

    def reduce_add(array, index, acc):
        for k, v in enumerate(acc):
            array[index + k] += v.sum()

    pixels = pixel_zero, load, load_where, store, store_max, update_max, splat, fma
    blocks = zeros, broadcast_rows, load_strided, load_indexed, store_contiguous, store_block, store_epilogue
    others = fma_broadcast, fma_outer, reduce_add, interleave, deinterleave
    return ravel, full_width, prefetch, width, transpose, *pixels, *blocks, *others


_compiled = (
    _ravel, _full_width, _prefetch, _width, _transpose, _pixel_zero, _load, _load_where, _store, _store_max,
    _update_max, _splat, _fma, _zeros, _broadcast_rows, _load_strided, _load_indexed, _store_contiguous, _store_block,
    _store_epilogue, _fma_broadcast, _fma_outer, _reduce_add, _interleave, _deinterleave,
)  # fmt: skip
_functions: Any = _without_compiler() if numba.config.DISABLE_JIT else _compiled  # type: ignore[attr-defined]
ravel, full_width, prefetch, width, transpose = _functions[:5]
pixel_zero, load, load_where, store, store_max, update_max, splat, fma = _functions[5:13]
zeros, broadcast_rows, load_strided, load_indexed, store_contiguous, store_block, store_epilogue = _functions[13:20]
fma_broadcast, fma_outer, reduce_add, interleave, deinterleave = _functions[20:]
