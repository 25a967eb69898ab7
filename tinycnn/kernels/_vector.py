"""Vectors as values of compiled code, for the few loops whose sums must stay in registers.

LLVM vectorises loops by itself, but keeps an array that a loop adds to in memory, and 512-bit registers unused.  With
these functions a kernel says which numbers are a register:

    v = load(array, i)           array[i : i + W], W = width(array) numbers
    v = fma(s, u, v)             s*u + v, s a number or a vector
    store(array, i, v)
    transpose(dst, d, dstep, src, s, sstep)     dst[d + j*dstep + k] = src[s + k*sstep + j] for j, k < W

They compile to an instruction each (the last one to a few for each vector), and check no index.  Without the compiler
they are NumPy.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model


def _bytes():
    """Of a vector register of this processor."""
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


BYTES = _bytes()


class Vector(types.Type):
    """The type of a register full of `dtype`."""

    def __init__(self, dtype):
        self.dtype, self.size = dtype, BYTES // (dtype.bitwidth // 8)
        super().__init__(f"Vector({dtype}, {self.size})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _llvm(vector))


def _llvm(vector):
    return ir.VectorType(ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType(), vector.size)


def _name(kind):
    """As LLVM's intrinsics are called after their type: v16f32."""
    return f"v{kind.count}f{32 if isinstance(kind.element, ir.FloatType) else 64}"


def _place(context, builder, arrays, array, index, kind):
    data = context.make_array(arrays)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _call(builder, name, result, arguments):
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _spread(builder, number, kind):
    """A vector of one number."""
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, none, zeros)


@intrinsic
def _width(context, array):
    size = Vector(array.dtype).size
    return types.intp(array), lambda context, builder, signature, arguments: ir.Constant(ir.IntType(64), size)


@intrinsic
def _zero(context, array):
    vector = Vector(array.dtype)

    def code(context, builder, signature, arguments):
        return ir.Constant(_llvm(vector), [0.0] * vector.size)

    return vector(array), code


@intrinsic
def _spread_number(context, array, number):
    vector = Vector(array.dtype)

    def code(context, builder, signature, arguments):
        return _spread(builder, arguments[1], _llvm(vector))

    return vector(array, array.dtype), code


@intrinsic
def _load(context, array, index):
    vector = Vector(array.dtype)

    def code(context, builder, signature, arguments):
        array, index = arguments
        place = _place(context, builder, signature.args[0], array, index, _llvm(vector))
        return builder.load(place, align=vector.dtype.bitwidth // 8)

    return vector(array, types.intp), code


@intrinsic
def _store(context, array, index, vector):
    def code(context, builder, signature, arguments):
        array, index, v = arguments
        place = _place(context, builder, signature.args[0], array, index, v.type)
        builder.store(v, place, align=vector.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def _fma(context, a, u, v):
    def code(context, builder, signature, arguments):
        a, u, v = arguments
        a = a if isinstance(a.type, ir.VectorType) else _spread(builder, a, u.type)
        return _call(builder, f"llvm.fma.{_name(u.type)}", u.type, [a, u, v])

    return v(a if isinstance(a, Vector) else u.dtype, u, v), code


@intrinsic
def _total(context, vector):
    def code(context, builder, signature, arguments):
        (v,) = arguments
        while v.type.count > 1:  # the upper half onto the lower: the same order everywhere
            half = v.type.count // 2
            lanes = ir.VectorType(ir.IntType(32), half)
            low, high = (
                builder.shuffle_vector(v, v, ir.Constant(lanes, list(range(at, at + half)))) for at in (0, half)
            )
            v = builder.fadd(low, high)
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), code


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


def _without_compiler():
    """The same in NumPy, for the debugger."""

    def width(array):
        return BYTES // array.itemsize

    def load(array, index):
        return array[index : index + width(array)].copy()

    def store(array, index, v):
        array[index : index + len(v)] = v

    def transpose(dst, d, dstep, src, s, sstep):
        rows = np.array([load(src, s + k * sstep) for k in range(width(src))])
        for j in range(width(src)):
            store(dst, d + j * dstep, rows[:, j])

    return (
        width,
        lambda array: np.zeros(width(array), array.dtype),
        lambda array, number: np.full(width(array), number, array.dtype),
        load,
        store,
        lambda a, u, v: a * u + v,
        lambda v: v.sum(),
        transpose,
    )


_compiled = _width, _zero, _spread_number, _load, _store, _fma, _total, _transpose
_functions: Any = _without_compiler() if numba.config.DISABLE_JIT else _compiled  # type: ignore[attr-defined]
width, zero, spread, load, store, fma, total, transpose = _functions
