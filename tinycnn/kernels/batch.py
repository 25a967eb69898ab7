"""Gathering a batch: pick images by index, convert, normalise, pad, in one pass."""

from numba import prange

from tinycnn.kernels._jit import kernel


@kernel
def gather(x, target, images, labels, index, scale, shift, padding):
    """x[b, c, i + ph, j + pw] = images[index[b], c, i, j] * scale[c] + shift[c] and target[b] = labels[index[b]].

    x: (B, C, H + 2 ph, W + 2 pw)   images: (N, C, H, W), uint8 or float   target: (B,)   labels: (N,)   index: (B,)
    scale, shift: (C,).  Padding is what a pixel of zero becomes: shift[c].
    """
    B, C, PH, PW = x.shape
    H, W = images.shape[2], images.shape[3]
    ph, pw = padding
    T = x.dtype.type
    for b in prange(B):
        n = index[b]
        target[b] = labels[n]
        for c in range(C):
            a, s = T(scale[c]), T(shift[c])
            if ph > 0 or pw > 0:
                for i in range(PH):
                    for j in range(PW):
                        x[b, c, i, j] = s
            for i in range(H):
                row, to = images[n, c, i], x[b, c, i + ph, pw:]
                for j in range(W):
                    to[j] = T(row[j]) * a + s
