"""Gathering a batch: pick images by index, convert, normalise, pad, in one pass."""

from numba import prange

from tinycnn.kernels._jit import inner, kernel


@inner
def take_plane(x, image, scale, shift, ph, pw):
    """x[i + ph, j + pw] = image[i, j]*scale + shift, and shift elsewhere."""
    if ph > 0 or pw > 0:
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[i, j] = shift
    for i in range(image.shape[0]):
        row, to = image[i], x[i + ph, pw:]
        for j in range(image.shape[1]):
            to[j] = x.dtype.type(row[j]) * scale + shift


@kernel
def gather(x, target, images, labels, index, scale, shift, padding):
    """x[b, c, i + ph, j + pw] = images[index[b], c, i, j] * scale[c] + shift[c] and target[b] = labels[index[b]].

    x: (B, C, H + 2 ph, W + 2 pw)   images: (N, C, H, W), uint8 or float   target: (B,)   labels: (N,)   index: (B,)
    scale, shift: (C,).  Padding is what a pixel of zero becomes: shift[c].
    """
    for b in prange(len(x)):
        n = index[b]
        target[b] = labels[n]
        for c in range(x.shape[1]):
            a, s = x.dtype.type(scale[c]), x.dtype.type(shift[c])
            take_plane(x[b, c], images[n, c], a, s, padding[0], padding[1])
