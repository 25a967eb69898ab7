"""Fully connected layer: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)

All three products have rows that are weighted sums of rows: those of y of the columns of w, those of dx of the rows of
w, those of dw of the rows of x.  What is weighted is laid out first, a strip of two vectors at a time, and blocks of
sums stay in vector registers until they are complete (see _simd.py).
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import (
    BYTES,
    fma_broadcast,
    fma_outer,
    load_strided,
    ravel,
    reduce_add,
    store_block,
    transpose,
    width,
    zeros,
)

ALONE = 10  # outputs a block of images that are too few for such sums
ROWS = 8 if BYTES == 64 else 6  # of a block of sums, each two vectors long; as many as there are registers for
SUMS = 2 * ROWS

alone_block = device_function(lambda x: zeros(x, ALONE))
rows_block = device_function(lambda x: zeros(x, SUMS))


@device_function
def at_least(array, rows, columns):
    """The array, (R, C), with zeros added where it has fewer rows or columns."""
    if len(array) >= rows and array.shape[1] >= columns:
        return array
    larger = np.zeros((max(rows, len(array)), max(columns, array.shape[1])), array.dtype)
    put(larger, array, array.shape[1])
    return larger


@device_function
def put(to, rows, columns):
    """to[i, j] = rows[i, j] for j < columns.  (As an assignment of slices it takes the compiler seconds longer.)"""
    for i in range(min(len(to), len(rows))):
        for j in range(columns):
            to[i, j] = rows[i, j]


@device_function
def one_image(y, x, w, b):
    """y: (O,)   x: (F,)   w: (>= O, F), at least ALONE rows"""
    O, F, W = y.size, x.size, width(x)
    whole, flat, none, left = F // W * W, ravel(w), alone_block(x), zeros(x, 1)
    out = np.empty((ALONE + W - 1) // W * W, x.dtype)
    for first in range(0, O, ALONE):
        o, sums = max(0, min(first, O - ALONE)), none  # the last block reaches back
        for f in range(0, whole, W):
            sums = fma_outer(sums, load_strided(x, f, F, left), load_strided(flat, o * F + f, F, none))
        for k in range(out.size):
            out[k] = 0
        reduce_add(out, 0, sums)
        for k in range(min(ALONE, O)):
            total = out[k] + (b[o + k] if b.size else x.dtype.type(0))
            for f in range(whole, F):
                total += x[f] * w[o + k, f]
            y[o + k] = total


@device_function
def strip_of_rows(b, count, length, j):
    """The numbers j ... j + 2W of `length` rows in one piece, since they lie on as many pages.  b: rows of `count`"""
    W, pair = width(b), zeros(b, 2)
    strip = np.empty(length * 2 * W, b.dtype)
    for k in range(length):
        store_block(strip, k * 2 * W, 0, W, load_strided(b, k * count + j, W, pair), 1)
    return strip


@device_function
def strip_of_columns(b, length, j):
    """The rows j ... j + 2W as columns.  b: rows of `length`, at least W"""
    W = width(b)
    strip = np.empty(length * 2 * W, b.dtype)
    for first in range(0, length, W):
        k = min(first, length - W)  # the last square reaches back
        for half in range(2):
            transpose(strip, k * 2 * W + half * W, 2 * W, b, (j + half * W) * length + k, length)
    return strip


@device_function
def weigh(out, first, last, count, a, row_step, step, strip, j, start):
    """out[i, j + l] = start[j + l] + sum over k of a[i*row_step + k*step] * strip[k, l], two vectors of l wide.

    first <= i < last   out: flat, rows of `count`   strip: see above   start: (1 + count,), which begins with a one
    """
    W, pair = width(out), zeros(out, 2)
    begin, length = load_strided(start, 1 + j, W, pair), strip.size // (2 * W)
    if last - first < ROWS:
        for i in range(first, last):
            one = begin
            for k in range(length):
                one = fma_broadcast(one, a, i * row_step + k * step, 0, load_strided(strip, k * 2 * W, W, pair))
            store_block(out, i * count + j, 0, W, one, 1)
        return
    none = fma_broadcast(rows_block(out), start, 0, 0, begin)
    for near in range(first, last, ROWS):
        i, sums = min(near, last - ROWS), none  # the last block reaches back, and so does the last strip
        for k in range(length):
            sums = fma_broadcast(sums, a, i * row_step + k * step, row_step, load_strided(strip, k * 2 * W, W, pair))
        store_block(out, i * count + j, count, W, sums, ROWS)


@device_function
def start_of(b, count):
    """What `weigh` broadcast_rows from: b, (O,) or (0,), filled up with zeros, after a one."""
    start = np.zeros(1 + count, b.dtype)
    start[0] = 1
    for o in range(b.size):
        start[1 + o] = b[o]
    return start


@kernel
def linear_forward(y, x, w, b):
    (N, O), W = y.shape, width(x)
    if N < ROWS:
        rows = at_least(w, ALONE, 0)
        for n in range(N):
            one_image(y[n], x[n], rows, b)
        return
    count, short = max(O, 2 * W), O < 2 * W
    x, w, start = at_least(x, 0, W), at_least(w, count, W), start_of(b, count)
    out = np.empty((N, count), x.dtype) if short else y
    F, flat_out, flat_x, flat_w = x.shape[1], ravel(out), ravel(x), ravel(w)
    strips = (count + 2 * W - 1) // (2 * W)
    parts = 2 if strips < 4 and N >= 4 * ROWS else 1  # of the images, where there are few strips
    for task in prange(strips * parts):
        j, part = min(task // parts * 2 * W, count - 2 * W), task % parts
        strip = strip_of_columns(flat_w, F, j)
        weigh(flat_out, part * N // parts, (part + 1) * N // parts, count, flat_x, F, 1, strip, j, start)
    if short:
        put(y, out, O)


@kernel
def linear_backward(dx, dw, db, dy, x, w):
    """Gradients of all three arguments of `linear_forward`; dx and db of size 0 are not computed."""
    (N, O), F, W = dy.shape, max(x.shape[1], 2 * width(x)), width(x)
    short = x.shape[1] < F
    rows, weights = at_least(x, 0, F), at_least(w, 0, F)
    slopes = np.empty((N if dx.size else 0, F), x.dtype) if short else dx
    gradient = np.empty((O, F), x.dtype) if short else dw
    flat_dy, flat_x, flat_w = ravel(dy), ravel(rows), ravel(weights)
    flat_dx, flat_dw = ravel(slopes), ravel(gradient)
    strips, start = (F + 2 * W - 1) // (2 * W), start_of(db[:0], F)
    tasks = 2 * strips if dx.size else strips
    for task in prange(tasks):
        j = min(task % strips * 2 * W, F - 2 * W)
        if task < strips:
            weigh(flat_dw, 0, O, F, flat_dy, 1, O, strip_of_rows(flat_x, F, N, j), j, start)
        else:
            weigh(flat_dx, 0, N, F, flat_dy, O, 1, strip_of_rows(flat_w, F, O, j), j, start)
    if short:
        put(dw, gradient, x.shape[1])
        put(dx, slopes, x.shape[1])
    for o in range(db.size):
        db[o] = 0
    for n in range(N):
        for o in range(db.size):
            db[o] += dy[n, o]
