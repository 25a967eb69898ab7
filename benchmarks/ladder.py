"""One operation, step by step from its definition to the kernel in use: read it to learn how a kernel becomes fast.

    python -m benchmarks ladder [--images 64] [--threads 1 2]

The operation is the forward pass of C3, LeNet-5's second convolution: 6 channels of 14 x 14 pixels become 16 of
10 x 10, with kernels of 5 x 5:

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i + u, j + v]

Read this file from top to bottom.  All versions compute the same; each removes the bottleneck of its predecessor, and
its docstring names the bottleneck that is left.  Before timing, each output is compared with the second version's in
float64.  The last three are imports from `tinycnn.kernels`, not copies; training calls the last one.
"""

import sys
from collections.abc import Callable

import numpy as np
from numba import njit, prange

from benchmarks import _ceilings, _harness as harness, _report
from tinycnn import kernels, set_num_threads
from tinycnn.kernels.conv import run_forward

C, O, K, SIZE, OUT = 6, 16, 5, 14, 10
FLOPS = 2 * O * OUT * OUT * C * K * K  # per image
TOLERANCE = 1e-6  # relative to the largest output
OPTIONS = (1, 1), (0, 0), (1, 1), 1  # stride, padding, dilation, groups


def python_loops(y, x, w, b):
    """The definition.  Each multiplication creates Python objects: about a hundred instructions per useful one."""
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
    """One tap of the window at a time, as array operations: no Python objects per pixel.  But the output is loaded and
    stored 150 times, once per tap, and with 64 images it does not fit in the L1 cache."""
    y[...] = b[:, None, None]
    for c in range(C):
        for u in range(K):
            for v in range(K):
                y += w[:, c, u, v, None, None] * x[:, c, None, u : u + OUT, v : v + OUT]


def numpy_im2col(y, x, w, b):
    """im2col (Chellapilla et al. 2006): every window is copied into a row, and one matrix product computes all outputs.
    The product is BLAS's GEMM, which is fast; now the copy, nearly 13 times the size of the input, takes the time."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (K, K), (2, 3))  # (N, C, OUT, OUT, K, K), no copy yet
    columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, C * K * K)  # the copy
    rows = columns @ w.reshape(O, C * K * K).T + b
    y[...] = rows.reshape(len(x), OUT, OUT, O).transpose(0, 3, 1, 2)


# The source of the first version, compiled: no Python objects, no copy, sums in registers.  But each addition waits for
# the previous one, since floating-point sums must not be reordered: latency-bound, and not vectorised.
numba_naive = njit(cache=True)(python_loops)


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def numba_parallel(y, x, w, b):
    """Images are divided among the threads, multiply-adds are fused, and sums may be reordered.  But the innermost loop
    has 5 iterations, one per tap of a kernel row: too few for vectors of 8 or 16 lanes."""
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
    """Loop interchange: the innermost loop runs along a row of the output.  Its pixels are independent, so LLVM
    vectorises it.  But each multiply-add now loads and stores its sum, and rows of ten pixels leave lanes empty."""
    for n in prange(len(x)):
        for o in range(O):
            y[n, o] = b[o]
            for c in range(C):
                for u in range(K):
                    for v in range(K):
                        weight = w[o, c, u, v]
                        for i in range(OUT):
                            out, row = y[n, o, i], x[n, c, i + u, v:]
                            for j in range(OUT):
                                out[j] += weight * row[j]


def im2col(y, x, w, b):
    """im2col as a kernel, and the product as a convolution of 1 x 1, for which the columns of an image are a matrix.
    Register blocking: the sums of MR = 8 output channels at two vectors of positions stay in registers for all 150
    taps, and each loaded vector is used 8 times.  But the copy is still there, and does not fit in the cache."""
    columns = np.empty((len(x), C * K * K, OUT * OUT), x.dtype)
    kernels.im2col(columns, x, (K, K), (OUT, OUT), *OPTIONS[:3])
    run_forward(y, columns.reshape(len(x), C * K * K, OUT, OUT), w.reshape(O, C * K * K, 1, 1), b, None, None, *OPTIONS)


def lowered(y, x, w, b):
    """kernels/conv.py, used for small batches (MEC, Cho and Brand 2017): windows are copied along their columns only, 5
    times instead of 25, one image at a time, so that the copy stays in the L1 cache.  But 100 positions are no multiple
    of two vectors, and the copies of short rows take a fifth of the time."""
    run_forward(y, x, w, b, None, None, *OPTIONS)


def in_use(y, x, w, b):
    """What training calls: direct convolution in the batch-blocked layout (kernels/layout.py, kernels/direct_conv.py).
    A vector holds one pixel of 8 or 16 images, so that rows of any length fill all lanes.  A register block is 8 output
    channels x 2 pixels; weights are packed in panels, and the input in bands that stay in the L2 cache."""
    kernels.conv2d_forward(y, x, w, b, *OPTIONS)


VERSIONS: dict[str, Callable] = {
    "Python loops": python_loops,
    "NumPy, tap by tap": numpy_taps,
    "NumPy, im2col": numpy_im2col,
    "Numba, the same loops": numba_naive,
    "Numba, parallel": numba_parallel,
    "Numba, rows inside": numba_rows,
    "im2col, our GEMM": im2col,
    "MEC": lowered,
    "in use: direct": in_use,
}


class Ladder:
    """All versions, in one process.  With enough images, the last one gets its arrays in the batch-blocked layout."""

    def __init__(self, threads, images):
        set_num_threads(threads)
        rng = np.random.default_rng(0)
        self.x, self.w, self.b = (
            rng.standard_normal(shape, dtype=np.float32) for shape in ((images, C, SIZE, SIZE), (O, C, K, K), (O,))
        )
        self.lanes = kernels.layout.lanes_for(images, np.float32)
        self.blocked_y, self.blocked_x = self.blocks(O, OUT), self.blocks(C, SIZE)
        if self.lanes > 1:
            kernels.layout.to_blocked(self.blocked_x, self.x)
        self.y = np.empty((images, O, OUT, OUT), np.float32)

    def blocks(self, channels, size):
        count = -(-len(self.x) // self.lanes)
        return kernels.empty((count, channels, size, size, self.lanes), np.float32)

    def images(self, name):
        """Number of images: one for the Python loops, which take a quarter of a second for it."""
        return 1 if name == "Python loops" else len(self.x)

    def is_blocked(self, name):
        return VERSIONS[name] is in_use and self.lanes > 1

    def run(self, name):
        if self.is_blocked(name):
            VERSIONS[name](self.blocked_y, self.blocked_x, self.w, self.b)
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
        y = kernels.layout.as_nchw(self.blocked_y) if self.is_blocked(name) else self.y
        return y[: self.images(name)].copy()


def measure(args, threads):
    ladder = harness.Worker(threads, Ladder, threads, args.images)
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    print(f"\n{args.images} images, {threads} threads; {FLOPS / 1e6:.2f} MFLOP an image")
    want = ladder.call("reference")
    for name in VERSIONS:
        got = ladder.call("answer", name)
        harness.assert_agree("the output", {"float64": want[: len(got)], name: got}, "float64", TOLERANCE)
    jobs = _ceilings.with_ceilings({name: (ladder, "run", name) for name in VERSIONS}, ceilings)
    times, rows = harness.round_robin(jobs, args.turns, args.seconds), []
    figures = _ceilings.ceiling_rates(times)
    head = ["version", "µs an image", "GFLOP/s", "of GEMM", "x before", "x first"]
    print_row = _report.table(head, [22, 12, 9, 8, 9, 10])
    for name in VERSIONS:
        seconds = harness.median(times[name]) / (1 if name == "Python loops" else args.images)
        gflops = FLOPS / seconds / 1e9
        rows.append({"threads": threads, "version": name, "seconds_an_image": seconds, "gflops": gflops} | figures)
        previous, first = (rows[k]["seconds_an_image"] / seconds for k in (max(0, len(rows) - 2), 0))
        share = gflops / figures["gemm_gflops"]
        print_row(name, f"{seconds * 1e6:,.2f}", f"{gflops:,.3f}", f"{share:.2%}", f"{previous:.2f}", f"{first:,.0f}")
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
