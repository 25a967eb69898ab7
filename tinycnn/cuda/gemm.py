"""Products of two matrices, tile by tile: what convolutions and fully connected layers spend their time on.

    out[m, c] = sum over k of A[k, m] * B[k, c]

A block of 128 threads computes a tile of 16 rows and 64 columns.  It goes along k in steps of 32: all threads copy a
slice of A and one of B into shared memory (where the entries come from is what tells one product from another; a matrix
need not exist anywhere), wait, and multiply.  Warp w owns rows 4w ... 4w + 3, lane l columns l and l + 32, so that its
eight sums stay in registers, a row's entry is one broadcast for the whole warp, and columns are read without conflicts.

Sums over many k are cut into parts of fixed length, one a block, and added in order by a second kernel: how they are
rounded depends on shapes alone, and a small batch fills the GPU too.
"""

from tinycnn.cuda._launch import ALIGN, THREADS, U32, cuda, divmod32, kernel, phase, workspace

TILE_M, TILE_N, TILE_K = 16, 64, 32
PITCH_A, PITCH_B = 20, 65  # between two k in shared memory: one that keeps fours aligned, one without bank conflicts
SIZE_A, SIZE_B = TILE_K * PITCH_A, TILE_K * PITCH_B
ACCUMULATORS = 8
UNROLL = 4  # steps along k that the compiler writes out, with constants for indices
WARPS = THREADS // 32


@phase
def clear_accumulators(tid, nt, acc):
    for i in range(ACCUMULATORS):
        acc[i] = 0


@phase
def multiply_accumulate(tid, nt, acc, a, b):
    """acc[2r + s] += sum over k of a[k, row + r] * b[k, column + 32 s].  a: (32, 16) b: (32, 64), pitched."""
    for k0 in range(0, TILE_K, UNROLL):
        row, column = a[k0 * PITCH_A + tid // 32 * 4 :], b[k0 * PITCH_B + tid % 32 :]
        for k in range(UNROLL):
            b0, b1 = column[k * PITCH_B], column[k * PITCH_B + 32]
            for r in range(4):
                w = row[k * PITCH_A + r]
                acc[2 * r] += w * b0
                acc[2 * r + 1] += w * b1


@phase
def store_tile(tid, nt, acc, out, ones, bias, with_ones, with_bias, m0, m1, c0, C, part, M):
    """Rows m0 ... m1 - 1 of part `part` of out: (parts, M, C), with bias[c] added if wanted; column C of the product
    goes to ones: (parts, M), if wanted."""
    for s in range(2):
        c = c0 + tid % 32 + 32 * s
        for r in range(4):
            m = m0 + tid // 32 * 4 + r
            if m < m1:
                at = part * M + m
                if c < C:
                    out[at * C + c] = acc[2 * r + s] + bias[c] if with_bias else acc[2 * r + s]
                elif c == C and with_ones:
                    ones[at] = acc[2 * r + s]


# --- the sum of parts -------------------------------------------------------------------------------------------------

LANES, ROWS = 32, 8
ADDERS = LANES * ROWS  # threads


@phase
def add_some(tid, nt, some, part, part_ones, first, size, size_ones, parts):
    """Thread (row, lane) adds parts row, row + 8, ... of element first + lane, or of the ones beyond."""
    e = first + tid % LANES
    total = part.dtype.type(0)
    if e < size:
        for i in range(tid // LANES, parts, ROWS):
            total += part[i * size + e]
    elif e < size + size_ones:
        for i in range(tid // LANES, parts, ROWS):
            total += part_ones[i * size_ones + e - size]
    some[tid] = total


@phase
def add_rows(tid, nt, some, out, ones, bias, with_bias, first, size, size_ones, C):
    if tid < LANES:
        e = first + tid
        total = some[tid]
        for row in range(1, ROWS):
            total += some[row * LANES + tid]
        if e < size:
            out[e] = total + bias[divmod32(e, C)[1]] if with_bias else total
        elif e < size + size_ones:
            ones[e - size] = total


@kernel(ADDERS, registers=40)
def split_k_reduce_kernel(out, ones, part, part_ones, bias, with_bias, size, size_ones, parts, C):
    """Block x: elements 32 x ... of out, followed by ones."""
    some = cuda.shared.array(ADDERS, out.dtype)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * LANES
    add_some(tid, ADDERS, some, part, part_ones, first, size, size_ones, parts)
    cuda.syncthreads()
    add_rows(tid, ADDERS, some, out, ones, bias, with_bias, first, size, size_ones, C)


def split_k(K, shortest, most):
    """(length of a part, number of parts) of a sum over K: none shorter than `shortest`, at most `most`."""
    length = max(shortest, -(-K // most))
    length = -(-length // TILE_K) * TILE_K
    return length, -(-K // length)


def run_split_k(tiles, size, size_ones, parts, C, out, ones, bias):
    """Let `tiles(out, ones, bias, with_ones, with_bias)` write its parts, and add them if there are several.

    out: `size` numbers in rows of C   ones: `size_ones`   bias: (C,)   ones and bias may be None
    """
    with_ones, with_bias = ones is not None, bias is not None
    ones, bias = ones if with_ones else out, bias if with_bias else out  # what is not wanted is not touched
    if parts == 1:
        tiles(out, ones, bias, with_ones, with_bias)
        return
    size_ones = size_ones if with_ones else 0
    part = workspace(parts * size, out.dtype, "parts")
    part_ones = workspace(parts * size_ones, out.dtype, "ones") if with_ones else part
    tiles(part, part_ones, bias, with_ones, False)
    count = -(-(size + size_ones) // LANES)
    split_k_reduce_kernel[count](out, ones, part, part_ones, bias, with_bias, size, size_ones, parts, C)


# --- two matrices in memory -------------------------------------------------------------------------------------------


@phase
def load_rows(tid, nt, a, p, k0, k1, m0, M, step_k, step_m):
    """a[k, m] = p[(k0 + k)*step_k + (m0 + m)*step_m], zero outside; neighbouring threads read neighbouring entries."""
    along_k = step_k == 1
    k, m = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_M, tid % TILE_M)
    more_k, more_m = (0, WARPS) if along_k else (THREADS // TILE_M, 0)
    for _ in range(TILE_K * TILE_M // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(m0 + m) < U32(M)
        a[U32(k * PITCH_A + m)] = p[U32((k0 + k) * step_k + (m0 + m) * step_m)] if inside else p.dtype.type(0)
        k, m = k + more_k, m + more_m


@phase
def load_columns(tid, nt, b, q, k0, k1, c0, C, step_k, step_c):
    """b[k, c] = q[(k0 + k)*step_k + (c0 + c)*step_c]; column C is all ones, what is beyond is zero."""
    along_k = step_k == 1
    k, c = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_N, tid % TILE_N)
    more_k, more_c = (0, WARPS) if along_k else (THREADS // TILE_N, 0)
    for _ in range(TILE_K * TILE_N // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(c0 + c) < U32(C)
        b[U32(k * PITCH_B + c)] = q[U32((k0 + k) * step_k + (c0 + c) * step_c)] if inside else q.dtype.type(c0 + c == C)
        k, c = k + more_k, c + more_c


@kernel(THREADS, registers=168)
def gemm_kernel(
    out, ones, bias, with_ones, with_bias, p, q, M, C, K, step_pk, step_pm, step_qk, step_qc, span
):  # fmt: skip
    """Block (x, y, z): columns 64 x ..., rows 16 y ..., part z of the sum, `span` long."""
    a = cuda.shared.array(SIZE_A, p.dtype, alignment=ALIGN)
    b = cuda.shared.array(SIZE_B, p.dtype, alignment=ALIGN)
    acc = cuda.local.array(ACCUMULATORS, p.dtype)
    tid, part = cuda.threadIdx.x, cuda.blockIdx.z
    c0, m0 = cuda.blockIdx.x * TILE_N, cuda.blockIdx.y * TILE_M
    k1 = min(K, (part + 1) * span)
    clear_accumulators(tid, THREADS, acc)
    for k0 in range(part * span, k1, TILE_K):
        load_rows(tid, THREADS, a, p, k0, k1, m0, M, step_pk, step_pm)
        load_columns(tid, THREADS, b, q, k0, k1, c0, C, step_qk, step_qc)
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a, b)
        cuda.syncthreads()
    store_tile(tid, THREADS, acc, out, ones, bias, with_ones, with_bias, m0, M, c0, C, part, M)


def gemm(out, p, q, shape, steps_p, steps_q, ones=None, bias=None):
    """out[m, c] = sum_k p[k*steps_p[0] + m*steps_p[1]] * q[k*steps_q[0] + c*steps_q[1]] + bias[c], and in
    ones[m] the sum of the p alone.

    All arrays are flat.  out: M*C   ones: M, or None   bias: C, or None   shape: (M, C, K)
    """
    M, C, K = shape
    span, parts = split_k(K, 128, 64)
    grid = (-(-(C + (ones is not None)) // TILE_N), -(-M // TILE_M), parts)

    def tiles(*outputs):
        gemm_kernel[grid](*outputs, p, q, M, C, K, *steps_p, *steps_q, span)

    run_split_k(tiles, M * C, M, parts, C, out, ones, bias)
