"""Fully connected layer: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)

Both gradients are products whose rows are weighted sums of rows: dx of those of w, dw of those of x.  Forward, both
factors lie with the axis that is summed over last, and each sum is one of products of two rows.  Blocks of sums stay in
vector registers until they are complete (see _vector.py).
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels._vector import add_totals, cross, loads, outer, stores, width, zeros

IMAGES, OUTPUTS = 4, 5  # a block of sums of products
ALONE = 10  # outputs a block of images that are too few for such blocks
TASK = 20  # outputs that a thread computes at a time, so that it reads the images less often
ROWS = 6  # of a block of weighted sums, each two vectors long

sums_block = inner(lambda x: zeros(x, 20))
alone_block = inner(lambda x: zeros(x, 10))
rows_block = inner(lambda x: zeros(x, 12))


@inner
def at_least(array, rows, columns):
    """The array, (R, C), with zeros added where it has fewer rows or columns."""
    if len(array) >= rows and array.shape[1] >= columns:
        return array
    larger = np.zeros((max(rows, len(array)), max(columns, array.shape[1])), array.dtype)
    larger[: len(array), : array.shape[1]] = array
    return larger


@inner
def dot_block(out, x, w, n, o, F):
    """out[i*OUTPUTS + k] = x[n + i] . w[o + k] of a block; F: a multiple of a vector"""
    W, sums, left, right = width(x), sums_block(x), zeros(x, IMAGES), zeros(x, OUTPUTS)
    for f in range(0, F, W):
        sums = cross(sums, loads(x, n * F + f, F, left), loads(w, o * F + f, F, right))
    for k in range(out.size):
        out[k] = 0
    add_totals(out, 0, sums)


@inner
def one_image(y, x, w, b):
    """y: (O,)   x: (F,)   w: (>= O, F), at least ALONE rows"""
    O, F, W = y.size, x.size, width(x)
    whole, flat, none, left = F // W * W, w.reshape(w.size), alone_block(x), zeros(x, 1)
    out = np.empty((ALONE + W - 1) // W * W, x.dtype)
    for first in range(0, O, ALONE):
        o, sums = max(0, min(first, O - ALONE)), none  # the last block reaches back
        for f in range(0, whole, W):
            sums = cross(sums, loads(x, f, F, left), loads(flat, o * F + f, F, none))
        for k in range(out.size):
            out[k] = 0
        add_totals(out, 0, sums)
        for k in range(min(ALONE, O)):
            total = out[k] + (b[o + k] if b.size else x.dtype.type(0))
            for f in range(whole, F):
                total += x[f] * w[o + k, f]
            y[o + k] = total


@kernel
def linear_forward(y, x, w, b):
    (N, O), W = y.shape, width(x)
    if N < IMAGES:
        rows = at_least(w, ALONE, 0)
        for n in range(N):
            one_image(y[n], x[n], rows, b)
        return
    whole = (x.shape[1] + W - 1) // W * W
    x, w = at_least(x, IMAGES, whole), at_least(w, OUTPUTS, whole)
    F, flat_x, flat_w = x.shape[1], x.reshape(x.size), w.reshape(w.size)
    for task in prange((O + TASK - 1) // TASK):
        out = np.empty((IMAGES * OUTPUTS + W - 1) // W * W, x.dtype)
        for first in range(0, N, IMAGES):
            n = max(0, min(first, N - IMAGES))  # the last block reaches back
            for near in range(task * TASK, min(O, (task + 1) * TASK), OUTPUTS):
                o = max(0, min(near, O - OUTPUTS))
                dot_block(out, flat_x, flat_w, n, o, F)
                for i in range(min(IMAGES, N)):
                    for k in range(min(OUTPUTS, O)):
                        y[n + i, o + k] = out[i * OUTPUTS + k] + (b[o + k] if b.size else x.dtype.type(0))


@inner
def weigh_rows(out, rows, count, a, row_step, step, b, length, strip):
    """out[i, j] = sum over k < length of a[i*row_step + k*step] * b[k, j], for a strip of two vectors of j.

    out: flat, and `rows` rows of `count`   b: flat, rows of `count`
    """
    W, none, pair = width(out), rows_block(out), zeros(out, 2)
    j = min(strip * 2 * W, count - 2 * W)  # the last one reaches back, and so does the last block
    if rows < ROWS:
        for i in range(rows):
            one = pair
            for k in range(length):
                one = outer(one, a, i * row_step + k * step, 0, loads(b, k * count + j, W, pair))
            stores(out, i * count + j, 0, W, one, 1)
        return
    near = np.empty(length * 2 * W, out.dtype)  # the strip, which lies on as many pages as it has rows, in one piece
    for k in range(length):
        stores(near, k * 2 * W, 0, W, loads(b, k * count + j, W, pair), 1)
    for first in range(0, rows, ROWS):
        i, sums = min(first, rows - ROWS), none
        for k in range(length):
            sums = outer(sums, a, i * row_step + k * step, row_step, loads(near, k * 2 * W, W, pair))
        stores(out, i * count + j, count, W, sums, ROWS)


@kernel
def linear_backward(dx, dw, db, dy, x, w):
    """Gradients of all three arguments of `linear_forward`; dx and db of size 0 are not computed."""
    (N, O), F, W = dy.shape, max(x.shape[1], 2 * width(x)), width(x)
    short = x.shape[1] < F
    rows, weights = at_least(x, 0, F), at_least(w, 0, F)
    slopes = np.empty((N if dx.size else 0, F), x.dtype) if short else dx
    gradient = np.empty((O, F), x.dtype) if short else dw
    flat_dy, flat_x, flat_w = dy.reshape(dy.size), rows.reshape(rows.size), weights.reshape(weights.size)
    flat_dx, flat_dw = slopes.reshape(slopes.size), gradient.reshape(gradient.size)
    strips = (F + 2 * W - 1) // (2 * W)
    tasks = 2 * strips if dx.size else strips
    for task in prange(tasks):
        if task < strips:
            weigh_rows(flat_dw, O, F, flat_dy, 1, O, flat_x, N, task)
        else:
            weigh_rows(flat_dx, N, F, flat_dy, O, 1, flat_w, O, task - strips)
    if short:
        dw[:] = gradient[:, : x.shape[1]]
        dx[:] = slopes[:, : x.shape[1]]
    for o in range(db.size):
        total = dy.dtype.type(0)
        for n in range(N):
            total += dy[n, o]
        db[o] = total
