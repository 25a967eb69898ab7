"""Gathering a batch from the data set, and keeping count, both on the device.  Twin of tinycnn/kernels/batch.py."""

import numpy as np

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


@phase
def take(tid, nt, first, x, target, images, labels, order, cursor, scale, shift, shape, size, padding):
    """One pixel of x, and with an image's first pixel its label."""
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
    take(
        cuda.threadIdx.x, THREADS, first, x, target, images, labels, order, cursor, scale, shift, shape, size, padding
    )  # fmt: skip


def gather(x, target, images, labels, order, cursor, scale, shift, padding):
    """x[b, c, i + ph, j + pw] = images[n, c, i, j] * scale[c] + shift[c] and target[b] = labels[n], with n =
    order[cursor[0] + b]; shapes are at the twin's."""
    gather_kernel[blocks(x.size)](
        ravel(x), target, ravel(images), labels, order, cursor, scale, shift, x.shape[1:], images.shape[2:], padding
    )


@phase
def add_up(tid, nt, losses, hits, counts, loss, predicted, target, class_weight):
    """This thread's share of the batch."""
    loss_sum, right, share = 0.0, 0.0, 0.0
    for b in range(tid, loss.size, nt):
        loss_sum += loss[b]
        if predicted.size > 0 and predicted[b] == target[b]:
            right += 1.0
        if class_weight.size > 0:
            share += class_weight[target[b]]
    losses[tid], hits[tid], counts[tid] = loss_sum, right, share


@phase
def move_on(tid, nt, few_losses, few_hits, few_counts, totals, cursor, images, mean):
    if tid == 0:
        loss, right, share = reduce(few_losses), reduce(few_hits), reduce(few_counts)
        totals[0] += loss * share if mean else loss
        totals[1] += right
        totals[2] += images
        if totals[0] - totals[0] == 0.0:  # neither NaN nor infinite
            totals[3] += 1.0
        totals[4] += share
        cursor[0] += images


@kernel(THREADS, registers=64, double="the sums over an epoch, one number a batch")
def accumulate_metrics_kernel(totals, cursor, loss, predicted, target, class_weight):
    losses = cuda.shared.array(THREADS, np.float64)
    hits = cuda.shared.array(THREADS, np.float64)
    counts = cuda.shared.array(THREADS, np.float64)
    few_losses = cuda.shared.array(PARTIALS, np.float64)
    few_hits = cuda.shared.array(PARTIALS, np.float64)
    few_counts = cuda.shared.array(PARTIALS, np.float64)
    tid = cuda.threadIdx.x
    add_up(tid, THREADS, losses, hits, counts, loss, predicted, target, class_weight)
    cuda.syncthreads()
    block_reduce(tid, THREADS, few_losses, losses)
    block_reduce(tid, THREADS, few_hits, hits)
    block_reduce(tid, THREADS, few_counts, counts)
    cuda.syncthreads()
    move_on(tid, THREADS, few_losses, few_hits, few_counts, totals, cursor, loss.size, class_weight.size > 0)


def accumulate_metrics(totals, cursor, loss, predicted, target, class_weight):
    """Count a batch; see the twin."""
    accumulate_metrics_kernel[1](totals, cursor, loss, predicted, target, class_weight)
