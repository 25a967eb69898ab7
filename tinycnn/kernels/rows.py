"""The two inner loops of convolutions on single images; batches have others, see tiled_conv.py.

Forward and backward, each is one of two things, done to *rows*: long contiguous runs of one flat array `src`, each
named by the offset at which it starts.

    combine   out[r, j]  += sum_t weight[r, t] * src[offset[t] + j]      many rows, weighted, summed into one
    correlate out[r, t]  += sum_j row[r, j]    * src[offset[t] + j]      one row against many, entry by entry

With offsets k*M the rows are those of a column matrix made by im2col; with offsets kh*W + kw they are the image itself,
shifted, and the column matrix need not be made at all.

Both are unrolled by hand so that each value loaded is used several times (6 x 5 and 3 x 5 products an iteration), which
is what keeps the multiply-add units busy.  LLVM vectorises along j.
"""

from tinycnn.kernels._jit import inner

TAPS = 5  # rows of `src` an iteration takes; callers fill their lists of rows up to a multiple of it
SUMS = 6  # output rows of `combine`
DOTS = 3  # rows of `correlate`
PITCH = 856  # distance of the output rows of `combine`, and the longest run it takes.  A constant, because two arrays
# in one loop make LLVM give up on its alias checks; this one, because 856 floats are 3424 bytes, whose
# multiples lie well apart modulo 4096: a load that follows a store 4096 bytes away has to wait for it.


@inner
def ceil_to(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple


@inner
def combine(out, src, base, offset, weight, r, t0, t1, m):
    """Add weighted rows to six output rows: out[i*PITCH + j] += sum_t weight[r + i, t] * src[base + offset[t] + j].

    out: (6*PITCH,)   src: flat   offset: (T,)   weight: (R, T)   i < 6   j < m <= PITCH
    t0 <= t < t1: which taps, their number a multiple of TAPS
    """
    P2, P3, P4, P5 = 2 * PITCH, 3 * PITCH, 4 * PITCH, 5 * PITCH
    for t in range(t0, t1, TAPS):
        s0 = src[base + offset[t] :]
        s1 = src[base + offset[t + 1] :]
        s2 = src[base + offset[t + 2] :]
        s3 = src[base + offset[t + 3] :]
        s4 = src[base + offset[t + 4] :]
        w = weight[r, t:]
        a0, a1, a2, a3, a4 = w[0], w[1], w[2], w[3], w[4]
        w = weight[r + 1, t:]
        b0, b1, b2, b3, b4 = w[0], w[1], w[2], w[3], w[4]
        w = weight[r + 2, t:]
        c0, c1, c2, c3, c4 = w[0], w[1], w[2], w[3], w[4]
        w = weight[r + 3, t:]
        d0, d1, d2, d3, d4 = w[0], w[1], w[2], w[3], w[4]
        w = weight[r + 4, t:]
        e0, e1, e2, e3, e4 = w[0], w[1], w[2], w[3], w[4]
        w = weight[r + 5, t:]
        f0, f1, f2, f3, f4 = w[0], w[1], w[2], w[3], w[4]
        for j in range(m):
            v0, v1, v2, v3, v4 = s0[j], s1[j], s2[j], s3[j], s4[j]
            # Starting each sum with the old value makes five fused multiply-adds of it.
            out[j] = out[j] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3 + a4 * v4
            out[PITCH + j] = out[PITCH + j] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3 + b4 * v4
            out[P2 + j] = out[P2 + j] + c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3 + c4 * v4
            out[P3 + j] = out[P3 + j] + d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3 + d4 * v4
            out[P4 + j] = out[P4 + j] + e0 * v0 + e1 * v1 + e2 * v2 + e3 * v3 + e4 * v4
            out[P5 + j] = out[P5 + j] + f0 * v0 + f1 * v1 + f2 * v2 + f3 * v3 + f4 * v4


@inner
def correlate(out, src, offset, rows, start, r, t, m):
    """Add the products of three rows with five: out[i, t + k] += sum_j rows[i, start + j] * src[offset[t + k] + j].

    out: (R, T)   src: flat   offset: (T,)   rows: (R, >= start + m)   i = r ... r+2   k < 5   j < m
    """
    s0 = src[offset[t] :]
    s1 = src[offset[t + 1] :]
    s2 = src[offset[t + 2] :]
    s3 = src[offset[t + 3] :]
    s4 = src[offset[t + 4] :]
    d0, d1, d2 = rows[r, start:], rows[r + 1, start:], rows[r + 2, start:]
    zero = src.dtype.type(0)
    a0 = a1 = a2 = a3 = a4 = zero
    b0 = b1 = b2 = b3 = b4 = zero
    c0 = c1 = c2 = c3 = c4 = zero
    for j in range(m):
        v0, v1, v2, v3, v4 = s0[j], s1[j], s2[j], s3[j], s4[j]
        d = d0[j]
        a0, a1, a2, a3, a4 = a0 + d * v0, a1 + d * v1, a2 + d * v2, a3 + d * v3, a4 + d * v4
        d = d1[j]
        b0, b1, b2, b3, b4 = b0 + d * v0, b1 + d * v1, b2 + d * v2, b3 + d * v3, b4 + d * v4
        d = d2[j]
        c0, c1, c2, c3, c4 = c0 + d * v0, c1 + d * v1, c2 + d * v2, c3 + d * v3, c4 + d * v4
    o = out[r, t:]
    o[0], o[1], o[2], o[3], o[4] = o[0] + a0, o[1] + a1, o[2] + a2, o[3] + a3, o[4] + a4
    o = out[r + 1, t:]
    o[0], o[1], o[2], o[3], o[4] = o[0] + b0, o[1] + b1, o[2] + b2, o[3] + b3, o[4] + b4
    o = out[r + 2, t:]
    o[0], o[1], o[2], o[3], o[4] = o[0] + c0, o[1] + c1, o[2] + c2, o[3] + c3, o[4] + c4
