"""Gather batches, and accumulate the metrics of an epoch.  GPU version of tinycnn/kernels/batch.py."""

import numpy as np

from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, divmod32, kernel, phase, ravel
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
        if first_of_image and target.size > 0:
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
def gather_number(tid, nt, first, rows, values, order, cursor, F):
    e = first + tid
    if e < rows.size:
        b, f = divmod32(e, F)
        rows[e] = values[order[cursor[0] + b] * F + f]


@kernel(THREADS, registers=40)
def gather_rows_kernel(rows, values, order, cursor, F):
    gather_number(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, rows, values, order, cursor, F)


def gather_rows(rows, values, order, cursor):
    """rows[b] = values[order[cursor[0] + b]]; rows: (B, F)   values: (N, F)"""
    gather_rows_kernel[blocks(rows.size)](ravel(rows), ravel(values), order, cursor, rows.shape[1])


@device_function
def class_weight_of(target, class_weight, b):
    """The class weight of an image; (1,) is the same weight for all."""
    return class_weight[target[b] if class_weight.size > 1 else 0]


@phase
def sum_batch(tid, nt, losses, metrics, weights, loss, predicted, score, target, class_weight, sample_weight):
    """This thread's part of the sums over the batch."""
    loss_sum, metric, weight = 0.0, 0.0, 0.0
    for b in range(tid, loss.size, nt):
        loss_sum += loss[b]
        if predicted.size > 0 and predicted[b] == target[b]:
            metric += 1.0
        if score.size > 0:
            metric += score[b]
        if class_weight.size > 0:
            c = class_weight_of(target, class_weight, b)
            weight += c * sample_weight[b] if sample_weight.size > 0 else c
    losses[tid], metrics[tid], weights[tid] = loss_sum, metric, weight


@phase
def add_to_totals(tid, nt, loss_partials, metric_partials, weight_partials, totals, cursor, images, mean):
    if tid == 0:
        loss, metric, weight = reduce(loss_partials), reduce(metric_partials), reduce(weight_partials)
        totals[0] += loss * weight if mean else loss
        totals[1] += metric
        totals[2] += images
        if totals[0] - totals[0] == 0.0:  # finite
            totals[3] += 1.0
        totals[4] += weight
        cursor[0] += images


@kernel(THREADS, registers=64, double="sums over a whole epoch, one term per batch")
def accumulate_metrics_kernel(totals, cursor, loss, predicted, score, target, class_weight, sample_weight):
    losses = cuda.shared.array(THREADS, np.float64)
    metrics = cuda.shared.array(THREADS, np.float64)
    weights = cuda.shared.array(THREADS, np.float64)
    loss_partials = cuda.shared.array(PARTIALS, np.float64)
    metric_partials = cuda.shared.array(PARTIALS, np.float64)
    weight_partials = cuda.shared.array(PARTIALS, np.float64)
    tid = cuda.threadIdx.x
    sum_batch(
        tid, THREADS, losses, metrics, weights, loss, predicted, score, target, class_weight, sample_weight
    )  # fmt: skip
    cuda.syncthreads()
    block_reduce(tid, THREADS, loss_partials, losses)
    block_reduce(tid, THREADS, metric_partials, metrics)
    block_reduce(tid, THREADS, weight_partials, weights)
    cuda.syncthreads()
    add_to_totals(
        tid, THREADS, loss_partials, metric_partials, weight_partials, totals, cursor, loss.size, class_weight.size > 0
    )


def accumulate_metrics(totals, cursor, loss, predicted, score, target, class_weight, sample_weight):
    """Add a batch to the totals of the epoch; the CPU version has the formulas."""
    accumulate_metrics_kernel[1](totals, cursor, loss, predicted, score, target, class_weight, sample_weight)


@phase
def sum_sample_weights(tid, nt, before, after, target, class_weight, sample_weight):
    """This thread's part of the sums of the weights, without and with those of the images."""
    total, weighted = 0.0, 0.0
    if class_weight.size > 0:
        for b in range(tid, sample_weight.size, nt):
            c = class_weight_of(target, class_weight, b)
            total += c
            weighted += c * sample_weight[b]
    before[tid], after[tid] = total, weighted


@phase
def scale_number(tid, nt, first, before, after, loss, dx, class_weight, sample_weight, F):
    e = first + tid
    if e < dx.size:
        b, f = divmod32(e, F)
        factor = sample_weight[b]
        if class_weight.size > 0:
            weighted = reduce(after)
            factor = loss.dtype.type(factor * (reduce(before) / weighted)) if weighted != 0.0 else loss.dtype.type(0)
        dx[e] *= factor
        if f == 0:
            loss[b] *= factor


@kernel(THREADS, registers=64, double="sums of class weights, which are float64")
def weight_samples_kernel(loss, dx, target, class_weight, sample_weight, F):
    """Every block sums the weights of the whole batch in the same order, then scales its own numbers."""
    before, after = cuda.shared.array(THREADS, np.float64), cuda.shared.array(THREADS, np.float64)
    before_partials, after_partials = cuda.shared.array(PARTIALS, np.float64), cuda.shared.array(PARTIALS, np.float64)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * THREADS
    sum_sample_weights(tid, THREADS, before, after, target, class_weight, sample_weight)
    cuda.syncthreads()
    block_reduce(tid, THREADS, before_partials, before)
    block_reduce(tid, THREADS, after_partials, after)
    cuda.syncthreads()
    scale_number(tid, THREADS, first, before_partials, after_partials, loss, dx, class_weight, sample_weight, F)


def weight_samples(loss, dx, target, class_weight, sample_weight):
    """Multiply the losses and gradients of a batch by the weights of its images; the CPU version has the formula."""
    F = dx.shape[1]
    weight_samples_kernel[blocks(dx.size)](loss, ravel(dx), target, class_weight, sample_weight, F)
