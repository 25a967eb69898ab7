"""The machine's ceilings, with one interface for the CPU and the GPU: `multiply` for arithmetic, `copy` for bandwidth.

`flops` is the number of floating-point operations of a `multiply`, `bytes` the number of bytes that a `copy` reads and
writes; `rates` converts measured seconds.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks._harness import median


class CpuCeilings:
    """A product of two large matrices by NumPy's BLAS, and a copy by all threads."""

    SIZE, ENTRIES = 1024, 2**25  # source and target of the copy are larger than the caches
    flops, bytes = 2 * SIZE**3, 2 * 4 * ENTRIES

    def __init__(self, threads):
        self.a = np.random.default_rng(0).random((self.SIZE, self.SIZE), dtype=np.float32)
        self.product = np.empty_like(self.a)
        self.pool = ThreadPoolExecutor(threads)
        source, target = (np.array_split(np.ones(self.ENTRIES, np.float32), threads) for _ in range(2))
        self.chunks = list(zip(target, source, strict=True))

    def multiply(self):
        np.matmul(self.a, self.a, out=self.product)

    def copy(self):
        list(self.pool.map(lambda chunk: np.copyto(*chunk), self.chunks))


class GpuCeilings:
    """Fused multiply-adds in registers, and a copy, by kernels compiled like tinycnn's.

    entries   of the array that is copied        chains   number of threads that multiply and add
    """

    def __init__(self, entries, chains):
        from benchmarks import _ceilings_cuda
        from tinycnn import cuda

        self.kernels = _ceilings_cuda
        self.source = cuda.to_device(np.random.default_rng(0).random(entries, dtype=np.float32))
        self.target, self.sums = cuda.empty((entries,), np.float32), cuda.empty((chains,), np.float32)
        self.flops, self.bytes = 2 * chains * self.kernels.FMAS_PER_THREAD, 2 * 4 * entries

    def multiply(self):
        self.kernels.multiply_adds(self.sums, self.source)

    def copy(self):
        self.kernels.copy(self.target, self.source)


def rates(ceilings, multiply_seconds, copy_seconds):
    """GFLOP/s of `multiply` and GB/s, read and written, of `copy`; ceilings: an object, or `CpuCeilings` itself."""
    return {
        "gemm_gflops": ceilings.flops / multiply_seconds / 1e9,
        "copy_gb_per_s": ceilings.bytes / copy_seconds / 1e9,
    }


def with_ceilings(jobs, worker):
    """`jobs` of `_harness.round_robin`, and those of a worker with `CpuCeilings`."""
    return jobs | {"multiply": (worker, "multiply"), "copy": (worker, "copy")}


def ceiling_rates(times):
    """`rates` of the turns that `_harness.round_robin` returns."""
    return rates(CpuCeilings, median(times["multiply"]), median(times["copy"]))
