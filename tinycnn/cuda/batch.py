"""Gather batches, and accumulate the metrics of an epoch.  GPU version of tinycnn/kernels/batch.py."""

import numpy as np

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


@phase
def gather_pixel(tid, nt, first, x, target, images, labels, order, cursor, scale, shift, shape, size, padding):
    """One pixel of x; the thread of an image's first pixel also copies the label."""
    e = first + tid
    if e < x.size:
        C, H, W = shape
        row, j = divmod32(e, W)
        plane, i = divmod32(row, H)
        b, c = divmod32(plane, C)
        n = order[cursor[0] + b]
        value, first_of_image = shift[c], c + i + j == 0
        i, j = i - padding[0], j - padding[1]
        if i >= 0 and i < size[0] and j >= 0 and j < size[1]:
            pixel = images[((n * C + c) * size[0] + i) * size[1] + j]
            value = x.dtype.type(pixel) * scale[c] + shift[c]
        x[e] = value
        if first_of_image:
            target[b] = labels[n]


@kernel(THREADS, registers=64)
def gather_kernel(x, target, images, labels, order, cursor, scale, shift, shape, size, padding):
    first = cuda.blockIdx.x * THREADS
    gather_pixel(
        cuda.threadIdx.x, THREADS, first, x, target, images, labels, order, cursor, scale, shift, shape, size, padding
    )  # fmt: skip


def gather(x, target, images, labels, order, cursor, scale, shift, padding):
    """x[b, c, i + ph, j + pw] = images[n, c, i, j] * scale[c] + shift[c] and target[b] = labels[n], with n =
    order[cursor[0] + b]; the CPU version has the shapes."""
    gather_kernel[blocks(x.size)](
        ravel(x), target, ravel(images), labels, order, cursor, scale, shift, x.shape[1:], images.shape[2:], padding
    )


@phase
def sum_batch(tid, nt, losses, corrects, weights, loss, predicted, target, class_weight):
    """This thread's part of the sums over the batch."""
    loss_sum, correct, weight = 0.0, 0.0, 0.0
    for b in range(tid, loss.size, nt):
        loss_sum += loss[b]
        if predicted.size > 0 and predicted[b] == target[b]:
            correct += 1.0
        if class_weight.size > 0:
            weight += class_weight[target[b]]
    losses[tid], corrects[tid], weights[tid] = loss_sum, correct, weight


@phase
def add_to_totals(tid, nt, loss_partials, correct_partials, weight_partials, totals, cursor, images, mean):
    if tid == 0:
        loss, correct, weight = reduce(loss_partials), reduce(correct_partials), reduce(weight_partials)
        totals[0] += loss * weight if mean else loss
        totals[1] += correct
        totals[2] += images
        if totals[0] - totals[0] == 0.0:  # finite
            totals[3] += 1.0
        totals[4] += weight
        cursor[0] += images


@kernel(THREADS, registers=64, double="sums over a whole epoch, one term per batch")
def accumulate_metrics_kernel(totals, cursor, loss, predicted, target, class_weight):
    losses = cuda.shared.array(THREADS, np.float64)
    corrects = cuda.shared.array(THREADS, np.float64)
    weights = cuda.shared.array(THREADS, np.float64)
    loss_partials = cuda.shared.array(PARTIALS, np.float64)
    correct_partials = cuda.shared.array(PARTIALS, np.float64)
    weight_partials = cuda.shared.array(PARTIALS, np.float64)
    tid = cuda.threadIdx.x
    sum_batch(tid, THREADS, losses, corrects, weights, loss, predicted, target, class_weight)
    cuda.syncthreads()
    block_reduce(tid, THREADS, loss_partials, losses)
    block_reduce(tid, THREADS, correct_partials, corrects)
    block_reduce(tid, THREADS, weight_partials, weights)
    cuda.syncthreads()
    add_to_totals(
        tid, THREADS, loss_partials, correct_partials, weight_partials, totals, cursor, loss.size, class_weight.size > 0
    )


def accumulate_metrics(totals, cursor, loss, predicted, target, class_weight):
    """Add a batch to the totals of the epoch; the CPU version has the formulas."""
    accumulate_metrics_kernel[1](totals, cursor, loss, predicted, target, class_weight)
