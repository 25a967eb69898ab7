"""Gather batches (index, convert, normalise and pad in one pass) and accumulate the metrics of an epoch."""

import math

from numba import prange

from tinycnn.kernels._jit import device_function, kernel, serial_kernel


@device_function
def gather_plane(x, image, scale, shift, ph, pw):
    """x[i + ph, j + pw] = image[i, j]*scale + shift, and shift elsewhere."""
    if ph > 0 or pw > 0:
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[i, j] = shift
    for i in range(image.shape[0]):
        row, out = image[i], x[i + ph, pw:]
        for j in range(image.shape[1]):
            out[j] = x.dtype.type(row[j]) * scale + shift


@kernel
def gather(x, target, images, labels, order, cursor, scale, shift, padding):
    """x[b, c, i + ph, j + pw] = images[n, c, i, j] * scale[c] + shift[c] and target[b] = labels[n], where n =
    order[cursor[0] + b].

    x: (B, C, H + 2 ph, W + 2 pw)   images: (N, C, H, W), uint8 or float   target: (B,)   labels: (N,)
    order: at least cursor[0] + B image numbers   cursor: (1,)   scale, shift: (C,)
    The padding has the value of a zero pixel, shift[c].
    """
    for b in prange(len(x)):
        n = order[cursor[0] + b]
        target[b] = labels[n]
        for c in range(x.shape[1]):
            a, s = x.dtype.type(scale[c]), x.dtype.type(shift[c])
            gather_plane(x[b, c], images[n, c], a, s, padding[0], padding[1])


@serial_kernel
def accumulate_metrics(totals, cursor, loss, predicted, target, class_weight):
    """Add a batch to the totals of the epoch; move the cursor to the next batch.

    totals: (5,) float64: loss (times the batch's weight, if there are class weights), correct predictions, images,
    batches before the first with a non-finite loss, and weight   cursor: (1,), incremented by B
    loss, target: (B,)   predicted: (B,), or (0,) for none
    class_weight: (K,) float64, the weight of an image of each class in a mean, or (0,) for a loss that is a sum
    """
    total, correct, weight = 0.0, 0, 0.0
    for n in range(len(loss)):
        total += loss[n]
    for n in range(len(predicted)):
        correct += predicted[n] == target[n]
    for n in range(len(target) if len(class_weight) else 0):
        weight += class_weight[target[n]]
    totals[0] += total * weight if len(class_weight) else total
    totals[1] += correct
    totals[2] += len(loss)
    totals[3] += abs(totals[0]) < math.inf  # not `isfinite`: it tests x - x, which reassociation turns into 0
    totals[4] += weight
    cursor[0] += len(loss)
