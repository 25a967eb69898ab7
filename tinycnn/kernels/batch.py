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

    x: (B, C, H + 2 ph, W + 2 pw)   images: (N, C, H, W), uint8 or float   target: (B,), or (0,) for no labels
    labels: (N,), or (0,)   order: at least cursor[0] + B image numbers   cursor: (1,)   scale, shift: (C,)
    The padding has the value of a zero pixel, shift[c].
    """
    for b in prange(len(x)):
        n = order[cursor[0] + b]
        if len(target) > 0:
            target[b] = labels[n]
        for c in range(x.shape[1]):
            a, s = x.dtype.type(scale[c]), x.dtype.type(shift[c])
            gather_plane(x[b, c], images[n, c], a, s, padding[0], padding[1])


@kernel
def gather_rows(rows, values, order, cursor):
    """rows[b] = values[order[cursor[0] + b]]

    rows: (B, F)   values: (N, F)   order: at least cursor[0] + B numbers of rows   cursor: (1,)
    """
    for b in prange(len(rows)):
        n = order[cursor[0] + b]
        for f in range(rows.shape[1]):
            rows[b, f] = values[n, f]


@serial_kernel
def accumulate_metrics(totals, cursor, loss, predicted, score, target, class_weight, sample_weight):
    """Add a batch to the totals of the epoch; move the cursor to the next batch.

    totals: (5,) float64: loss (times the batch's weight, if there are class weights), correct predictions or scores,
    images, batches before the first with a non-finite loss, and weight   cursor: (1,), incremented by B
    loss, target: (B,)   predicted: (B,) classes, or (0,) for none   score: (B,) another metric, or (0,) for none
    class_weight: (K,) float64, the weight of an image of each class in a mean, (1,) for the same weight of all images,
    or (0,) for a loss that is a sum   sample_weight: (B,), or (0,) for none
    """
    total, metric, weight = 0.0, 0.0, 0.0
    for n in range(len(loss)):
        total += loss[n]
    for n in range(len(predicted)):
        metric += predicted[n] == target[n]
    for n in range(len(score)):
        metric += score[n]
    if len(class_weight) == 1 and len(sample_weight) == 0:
        weight = class_weight[0] * len(loss)
    elif len(sample_weight) == 0:
        for n in range(len(loss) if len(class_weight) > 0 else 0):
            weight += class_weight[target[n]]
    else:
        for n in range(len(loss) if len(class_weight) > 0 else 0):
            weight += class_weight[target[n] if len(class_weight) > 1 else 0] * sample_weight[n]
    totals[0] += total * weight if len(class_weight) else total
    totals[1] += metric
    totals[2] += len(loss)
    totals[3] += abs(totals[0]) < math.inf  # not `isfinite`: it tests x - x, which reassociation turns into 0
    totals[4] += weight
    cursor[0] += len(loss)


@kernel
def weight_samples(loss, dx, target, class_weight, sample_weight):
    """Multiply the losses and gradients of a batch by the weights of its images.

    loss, target, sample_weight: (B,)   dx: (B, F)   class_weight: as for `accumulate_metrics`
    For a mean, with c[b] the class weight of image b, the factor of its row is sample_weight[b] * sum(c) / sum(c *
    sample_weight): a mean weighted by c becomes one weighted by c * sample_weight.  0 if all weights are 0.  For a sum
    it is sample_weight[b].
    """
    before, after = 0.0, 0.0
    for b in range(len(loss) if len(class_weight) > 0 else 0):
        c = class_weight[target[b] if len(class_weight) > 1 else 0]
        before += c
        after += c * sample_weight[b]
    scale = 1.0
    if len(class_weight) > 0:
        scale = before / after if after != 0.0 else 0.0
    for b in prange(len(loss)):
        factor = loss.dtype.type(sample_weight[b] * scale)
        loss[b] *= factor
        for f in range(dx.shape[1]):
            dx[b, f] *= factor
