"""One operation, step by step from the definition to the kernel in use: the page to learn from.

    python -m benchmarks ladder [--images 64] [--threads 1 2]

The operation is the forward pass of LeNet-5's second convolution, C3: 6 maps of 14 x 14 pixels become 16 of 10 x 10,
through windows of 5 x 5:

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i + u, j + v]

Read this file from top to bottom.  Each version computes the same numbers and removes what kept the one before it slow;
its docstring says what.  All are checked against the second, in float64, before a time is taken.  The last three are
not copies: they are imported from `tinycnn.kernels`, the last one is what training calls.
"""

import sys
from collections.abc import Callable

import numpy as np
from numba import njit, prange

from benchmarks import _ceilings
from benchmarks import _harness as harness
from tinycnn import kernels, set_num_threads
from tinycnn.kernels.conv import conv2d_forward_im2col, conv2d_forward_shifted

C, O, K, SIZE, OUT = 6, 16, 5, 14, 10
FLOPS = 2 * O * OUT * OUT * C * K * K  # of an image
TOLERANCE = 1e-6  # of the largest output
PLAIN = (1, 1), (0, 0), (1, 1), 1  # stride, padding, dilation, groups


def python_loops(y, x, w, b):
    """The definition.  Every multiplication makes Python objects: some hundred instructions around each useful one."""
    for n in range(len(x)):
        for o in range(O):
            for i in range(OUT):
                for j in range(OUT):
                    total = b[o]
                    for c in range(C):
                        for u in range(K):
                            for v in range(K):
                                total += w[o, c, u, v] * x[n, c, i + u, j + v]
                    y[n, o, i, j] = total


def numpy_taps(y, x, w, b):
    """NumPy, one tap of the window at a time: 150 passes over the output, each in C, each through memory."""
    y[...] = b[:, None, None]
    for c in range(C):
        for u in range(K):
            for v in range(K):
                y += w[:, c, u, v, None, None] * x[:, c, None, u : u + OUT, v : v + OUT]


def numpy_im2col(y, x, w, b):
    """The textbook's trick: copy every window into a row, and one matrix product does the rest (Chellapilla et al.
    2006).  The product is the BLAS's and fast; now the copy, 25 times the image, takes the time."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (K, K), (2, 3))  # (N, C, OUT, OUT, K, K), no copy yet
    columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, C * K * K)  # here it is
    rows = columns @ w.reshape(O, C * K * K).T + b
    y[...] = rows.reshape(len(x), OUT, OUT, O).transpose(0, 3, 1, 2)


# The same source as the first, compiled: no Python objects are left, but one sum waits for the addition before it,
# since additions must not be reordered, and so nothing is vectorised.
numba_naive = njit(cache=True)(python_loops)


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def numba_parallel(y, x, w, b):
    """Images on all threads, multiply-adds fused, and sums may be reordered.  The innermost loop is over 5 taps: too
    short for vectors of 8 or 16."""
    for n in prange(len(x)):
        for o in range(O):
            for i in range(OUT):
                for j in range(OUT):
                    total = b[o]
                    for c in range(C):
                        for u in range(K):
                            for v in range(K):
                                total += w[o, c, u, v] * x[n, c, i + u, j + v]
                    y[n, o, i, j] = total


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def numba_rows(y, x, w, b):
    """The loops in another order: innermost is a row of the output, whose pixels do not depend on one another.  That is
    vectorised, but each multiply-add now loads and stores its sum, and rows have ten pixels only."""
    for n in prange(len(x)):
        for o in range(O):
            y[n, o] = b[o]
            for c in range(C):
                for u in range(K):
                    for v in range(K):
                        weight = w[o, c, u, v]
                        for i in range(OUT):
                            to, row = y[n, o, i], x[n, c, i + u, v:]
                            for j in range(OUT):
                                to[j] += weight * row[j]


def im2col(y, x, w, b):
    """kernels/conv.py, for strides above one: im2col of one image at a time, which stays in the cache, and a product of
    our own, which keeps the sums of several output rows in registers, so that every load serves several of them."""
    conv2d_forward_im2col(y, x, w, b, *PLAIN)


def shifted_rows(y, x, w, b):
    """kernels/conv.py, for one image: rows of the column matrix are the image itself, shifted, so that nothing is
    copied, and all rows of an image make one long run of vectors."""
    conv2d_forward_shifted(y, x, w, b, *PLAIN)


def in_use(y, x, w, b):
    """What training calls.  Batches are interleaved (kernels/layout.py), an image a lane of the vector: no row is too
    short, no lane empty, and the sums of up to eight maps at two pixels stay in registers (kernels/direct_conv.py)."""
    kernels.conv2d_forward(y, x, w, b, *PLAIN)


VERSIONS: dict[str, Callable] = {
    "Python loops": python_loops,
    "NumPy, tap by tap": numpy_taps,
    "NumPy, im2col": numpy_im2col,
    "Numba, the same loops": numba_naive,
    "Numba, parallel": numba_parallel,
    "Numba, rows inside": numba_rows,
    "im2col, our GEMM": im2col,
    "shifted rows": shifted_rows,
    "in use: direct, blocked": in_use,
}


class Ladder:
    """All versions, in one process."""

    def __init__(self, threads, images):
        set_num_threads(threads)
        rng = np.random.default_rng(0)
        self.x, self.w, self.b = (
            rng.standard_normal(shape, dtype=np.float32) for shape in ((images, C, SIZE, SIZE), (O, C, K, K), (O,))
        )
        self.lanes = kernels.layout.lanes_for(images, np.float32)
        self.tiles = [self.tiled(channels, size) for channels, size in ((O, OUT), (C, SIZE))]
        if self.lanes > 1:
            kernels.layout.to_blocked(self.tiles[1], self.x)
        self.y = np.empty((images, O, OUT, OUT), np.float32)

    def tiled(self, channels, size):
        count = -(-len(self.x) // self.lanes)
        return kernels.empty((count, channels, size, size, self.lanes), np.float32)

    def images(self, name):
        """One for Python's loops, which take a second for four."""
        return 1 if name == "Python loops" else len(self.x)

    def run(self, name):
        if name.startswith("in use") and self.lanes > 1:
            VERSIONS[name](*self.tiles, self.w, self.b)
        else:
            count = self.images(name)
            VERSIONS[name](self.y[:count], self.x[:count], self.w, self.b)

    def reference(self):
        y = np.empty(self.y.shape)
        numpy_taps(y, *(a.astype(np.float64) for a in (self.x, self.w, self.b)))
        return y

    def answer(self, name):
        self.y[...] = np.nan
        self.run(name)
        tiled = name.startswith("in use") and self.lanes > 1
        return (kernels.layout.as_nchw(self.tiles[0]) if tiled else self.y)[: self.images(name)].copy()


def measure(args, threads):
    ladder = harness.Worker(threads, Ladder, threads, args.images)
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    print(f"\n{args.images} images, {threads} threads; {FLOPS / 1e6:.2f} MFLOP an image")
    want = ladder.call("reference")
    for name in VERSIONS:
        got = ladder.call("answer", name)
        harness.assert_agree("the output", {"float64": want[: len(got)], name: got}, "float64", TOLERANCE)
    jobs = _ceilings.with_ceilings({name: (ladder, "run", name) for name in VERSIONS}, ceilings)
    times, figures, rows = harness.round_robin(jobs, args.turns, args.seconds), {}, []
    figures = _ceilings.ceiling_rates(times)
    line = harness.table(["version", "µs an image", "GFLOP/s", "of GEMM", "x before", "x first"], [22, 12, 9, 8, 9, 10])
    for name in VERSIONS:
        seconds = harness.median(times[name]) / (1 if name == "Python loops" else args.images)
        gflops = FLOPS / seconds / 1e9
        rows.append({"threads": threads, "version": name, "seconds_an_image": seconds, "gflops": gflops} | figures)
        before, first = (rows[k]["seconds_an_image"] / seconds for k in (max(0, len(rows) - 2), 0))
        share = gflops / figures["gemm_gflops"]
        line(name, f"{seconds * 1e6:,.2f}", f"{gflops:,.3f}", f"{share:.2%}", f"{before:.2f}", f"{first:,.0f}")
    harness.stop_workers({"ladder": ladder, "ceilings": ceilings})
    return rows


def main(argv=None):
    parser = harness.options("ladder", __doc__, {})
    parser.add_argument("--images", type=int, default=64)
    args = harness.parse(parser, argv, {})
    if args.images < 1:
        sys.exit("--images must be at least 1")
    harness.run("ladder", args, measure)


if __name__ == "__main__":
    main()
