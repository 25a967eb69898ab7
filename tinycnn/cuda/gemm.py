"""Matrix multiplication in tiles: convolutions and fully connected layers spend their time here.

    out[m, n] = sum over k of A[k, m] * B[k, n]

A block of 128 threads computes a tile of 16 rows and 64 columns.  It moves along k in steps of 32.  In each step all
threads load a tile of A and a tile of B into shared memory, synchronise, and multiply the tiles.  The loading phase
defines the matrices, so a matrix need not exist in memory (see conv.py).  Warp w owns rows 4w ... 4w + 3, lane l
columns l and l + 32: eight accumulators in registers, A's entries broadcast to the warp, no bank conflicts on B.

Split-K: a long sum over k is cut into splits of fixed length, one per block, and a second kernel adds the partial
results in order.  So small batches fill the GPU too, and the rounding depends only on the shapes.
"""

from tinycnn.cuda._launch import ALIGN, THREADS, U32, cuda, divmod32, kernel, phase, workspace

TILE_M, TILE_N, TILE_K = 16, 64, 32
PITCH_A, PITCH_B = 20, 65  # between rows in shared memory: A keeps groups of 4 aligned, B avoids bank conflicts
SIZE_A, SIZE_B = TILE_K * PITCH_A, TILE_K * PITCH_B
ACCUMULATORS = 8  # of a thread
UNROLL = 4  # steps along k that are unrolled, with constant indices
WARPS = THREADS // 32


@phase
def clear_accumulators(tid, nt, acc):
    for i in range(ACCUMULATORS):
        acc[i] = 0


@phase
def multiply_accumulate(tid, nt, acc, a_tile, b_tile):
    """acc[2r + s] += sum over k of A[k, row + r] * B[k, column + 32 s].  a_tile: (32, 16) b_tile: (32, 64), pitched."""
    for k0 in range(0, TILE_K, UNROLL):
        a, b = a_tile[k0 * PITCH_A + tid // 32 * 4 :], b_tile[k0 * PITCH_B + tid % 32 :]
        for k in range(UNROLL):
            b0, b1 = b[k * PITCH_B], b[k * PITCH_B + 32]
            for r in range(4):
                w = a[k * PITCH_A + r]
                acc[2 * r] += w * b0
                acc[2 * r + 1] += w * b1


@phase
def store_tile(tid, nt, acc, out, row_sums, bias, with_sums, with_bias, m0, m1, n0, N, split, M):
    """Store rows m0 ... m1 - 1 of split `split` of out: (splits, M, N), with bias[n] added if `with_bias`.  Column N of
    the product goes to row_sums: (splits, M) if `with_sums`."""
    for s in range(2):
        n = n0 + tid % 32 + 32 * s
        for r in range(4):
            m = m0 + tid // 32 * 4 + r
            if m < m1:
                row = split * M + m
                if n < N:
                    out[row * N + n] = acc[2 * r + s] + bias[n] if with_bias else acc[2 * r + s]
                elif n == N and with_sums:
                    row_sums[row] = acc[2 * r + s]


# --- split-K ----------------------------------------------------------------------------------------------------------

REDUCE_COLUMNS, REDUCE_ROWS = 32, 8
REDUCE_THREADS = REDUCE_COLUMNS * REDUCE_ROWS


@phase
def add_splits(tid, nt, values, partial, partial_sums, first, size, sums_size, splits):
    """Thread (row, column) adds splits row, row + 8, ... of element first + column; row sums follow the elements."""
    e = first + tid % REDUCE_COLUMNS
    total = partial.dtype.type(0)
    if e < size:
        for i in range(tid // REDUCE_COLUMNS, splits, REDUCE_ROWS):
            total += partial[i * size + e]
    elif e < size + sums_size:
        for i in range(tid // REDUCE_COLUMNS, splits, REDUCE_ROWS):
            total += partial_sums[i * sums_size + e - size]
    values[tid] = total


@phase
def add_rows(tid, nt, values, out, row_sums, bias, with_bias, first, size, sums_size, N):
    if tid < REDUCE_COLUMNS:
        e = first + tid
        total = values[tid]
        for row in range(1, REDUCE_ROWS):
            total += values[row * REDUCE_COLUMNS + tid]
        if e < size:
            out[e] = total + bias[divmod32(e, N)[1]] if with_bias else total
        elif e < size + sums_size:
            row_sums[e - size] = total


@kernel(REDUCE_THREADS, registers=40)
def split_k_reduce_kernel(out, row_sums, partial, partial_sums, bias, with_bias, size, sums_size, splits, N):
    """Block x: elements 32 x ... of out, followed by those of row_sums."""
    values = cuda.shared.array(REDUCE_THREADS, out.dtype)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * REDUCE_COLUMNS
    add_splits(tid, REDUCE_THREADS, values, partial, partial_sums, first, size, sums_size, splits)
    cuda.syncthreads()
    add_rows(tid, REDUCE_THREADS, values, out, row_sums, bias, with_bias, first, size, sums_size, N)


def split_k(K, min_length, max_splits):
    """(length, number) of the splits of a sum over K; the length is a multiple of TILE_K."""
    length = max(min_length, -(-K // max_splits))
    length = -(-length // TILE_K) * TILE_K
    return length, -(-K // length)


def run_split_k(compute, size, sums_size, splits, N, out, row_sums, bias):
    """Run `compute(out, row_sums, bias, with_sums, with_bias)`, which writes all splits, and add the splits.

    out: `size` entries in rows of N   row_sums: `sums_size` entries   bias: (N,)   row_sums and bias may be None
    """
    with_sums, with_bias = row_sums is not None, bias is not None
    row_sums, bias = row_sums if with_sums else out, bias if with_bias else out  # placeholders, not accessed
    if splits == 1:
        compute(out, row_sums, bias, with_sums, with_bias)
        return
    sums_size = sums_size if with_sums else 0
    partial = workspace(splits * size, out.dtype, "split-K")
    partial_sums = workspace(splits * sums_size, out.dtype, "split-K row sums") if with_sums else partial
    compute(partial, partial_sums, bias, with_sums, False)
    count = -(-(size + sums_size) // REDUCE_COLUMNS)
    split_k_reduce_kernel[count](out, row_sums, partial, partial_sums, bias, with_bias, size, sums_size, splits, N)


# --- two matrices in memory -------------------------------------------------------------------------------------------


@phase
def load_a(tid, nt, a_tile, a, k0, k1, m0, M, stride_k, stride_m):
    """a_tile[k, m] = a[(k0 + k)*stride_k + (m0 + m)*stride_m], zero outside.  Neighbouring threads read neighbouring
    entries."""
    along_k = stride_k == 1
    k, m = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_M, tid % TILE_M)
    step_k, step_m = (0, WARPS) if along_k else (THREADS // TILE_M, 0)
    for _ in range(TILE_K * TILE_M // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(m0 + m) < U32(M)
        value = a[U32((k0 + k) * stride_k + (m0 + m) * stride_m)] if inside else a.dtype.type(0)
        a_tile[U32(k * PITCH_A + m)] = value
        k, m = k + step_k, m + step_m


@phase
def load_b(tid, nt, b_tile, b, k0, k1, n0, N, stride_k, stride_n):
    """b_tile[k, n] = b[(k0 + k)*stride_k + (n0 + n)*stride_n], ones in column N, zero beyond."""
    along_k = stride_k == 1
    k, n = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_N, tid % TILE_N)
    step_k, step_n = (0, WARPS) if along_k else (THREADS // TILE_N, 0)
    for _ in range(TILE_K * TILE_N // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(n0 + n) < U32(N)
        value = b[U32((k0 + k) * stride_k + (n0 + n) * stride_n)] if inside else b.dtype.type(n0 + n == N)
        b_tile[U32(k * PITCH_B + n)] = value
        k, n = k + step_k, n + step_n


@kernel(THREADS, registers=168)
def gemm_kernel(
    out, row_sums, bias, with_sums, with_bias, a, b, M, N, K, stride_ak, stride_am, stride_bk, stride_bn, length
):  # fmt: skip
    """Block (x, y, z): columns 64 x ..., rows 16 y ..., split z of the sum, `length` long."""
    a_tile = cuda.shared.array(SIZE_A, a.dtype, alignment=ALIGN)
    b_tile = cuda.shared.array(SIZE_B, a.dtype, alignment=ALIGN)
    acc = cuda.local.array(ACCUMULATORS, a.dtype)
    tid, split = cuda.threadIdx.x, cuda.blockIdx.z
    n0, m0 = cuda.blockIdx.x * TILE_N, cuda.blockIdx.y * TILE_M
    k1 = min(K, (split + 1) * length)
    clear_accumulators(tid, THREADS, acc)
    for k0 in range(split * length, k1, TILE_K):
        load_a(tid, THREADS, a_tile, a, k0, k1, m0, M, stride_ak, stride_am)
        load_b(tid, THREADS, b_tile, b, k0, k1, n0, N, stride_bk, stride_bn)
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a_tile, b_tile)
        cuda.syncthreads()
    store_tile(tid, THREADS, acc, out, row_sums, bias, with_sums, with_bias, m0, M, n0, N, split, M)


def gemm(out, a, b, shape, strides_a, strides_b, row_sums=None, bias=None):
    """out[m, n] = sum_k a[k*strides_a[0] + m*strides_a[1]] * b[k*strides_b[0] + n*strides_b[1]] + bias[n], and
    row_sums[m] = the sum of a alone.

    All arrays are flat.  out: M*N   row_sums: M, or None   bias: N, or None   shape: (M, N, K)
    """
    M, N, K = shape
    length, splits = split_k(K, 128, 64)
    grid = (-(-(N + (row_sums is not None)) // TILE_N), -(-M // TILE_M), splits)

    def compute(*outputs):
        gemm_kernel[grid](*outputs, a, b, M, N, K, *strides_a, *strides_b, length)

    run_split_k(compute, M * N, M, splits, N, out, row_sums, bias)
