"""Calls of every kernel: name, arguments as NumPy arrays and scalars, and which arguments are outputs.

The CUDA tests compare the results of each call on both backends, and tools/check_kernels.py compiles the kernels that
the calls launch.  Except for small ones, sizes are not multiples of a block or a tile.
"""

import numpy as np
from reference import ACTIVATIONS

from tinycnn import kernels, scalars

SMALL = {"N": 2, "H": 7, "W": 9, "rows": 5, "classes": 10, "features": 37, "outputs": 21, "size": 150}
LARGE = {"N": 9, "H": 17, "W": 13, "rows": 131, "classes": 11, "features": 1201, "outputs": 70, "size": 1031}


def blank(shape, dtype):
    """An output array before the call: NaN, or an integer that no kernel writes."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 12345, dtype)


def calls(dtype, sizes, seed=0):
    """Yield (name, description, arguments, indices of outputs)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    N, H, W = sizes["N"], sizes["H"], sizes["W"]
    rows, classes, size = sizes["rows"], sizes["classes"], sizes["size"]

    conv = [  # C, O, kernel, stride, padding, dilation, groups, bias
        (1, 6, (5, 5), (1, 1), (2, 2), (1, 1), 1, True),
        (3, 17, (3, 2), (1, 1), (0, 0), (1, 1), 1, True),
        (4, 6, (2, 3), (2, 3), (1, 2), (2, 1), 2, False),
        (6, 38, (3, 3), (3, 1), (0, 3), (1, 2), 2, True),
        (16, 3, (2, 2), (1, 1), (0, 0), (1, 1), 1, True),  # the number of taps is a multiple of a tile's columns
    ]
    for C, O, kernel, stride, padding, dilation, groups, bias in conv:
        x, w, b = normal(N, C, H, W), normal(O, C // groups, *kernel), normal(O if bias else 0)
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((H, W), kernel, stride, padding, dilation, strict=True)
        )
        options = stride, padding, dilation, groups
        label = f"{C} to {O}, kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
        dy = normal(N, O, *out)
        yield "conv2d_forward", label, (blank(dy.shape, dtype), x, w, b, *options), (0,)
        gradients = [blank(a.shape, dtype) for a in (x, w, b)]
        yield "conv2d_backward", label, (*gradients, dy, x, w, *options), (0, 1, 2)
        gradients[0] = np.zeros((0, *x.shape[1:]), dtype)
        yield "conv2d_backward", label + ", no dx", (*gradients, dy, x, w, *options), (1, 2)
        gradients = [blank(x.shape, dtype), np.zeros((0, *w.shape[1:]), dtype), np.zeros(0, dtype)]
        yield "conv2d_backward", label + ", dx only", (*gradients, dy, x, w, *options), (0,)
        columns, geometry = normal(N, C * kernel[0] * kernel[1], out[0] * out[1]), (kernel, out, *options[:3])
        yield "im2col", label, (blank(columns.shape, dtype), x, *geometry), (0,)
        yield "col2im", label, (blank(x.shape, dtype), columns, *geometry), (0,)

    pool = [  # kernel, stride, padding, dilation, extra outputs (ceil_mode)
        ((2, 2), (2, 2), (0, 0), (1, 1), 0),
        ((3, 2), (2, 1), (1, 1), (1, 1), 0),
        ((2, 2), (2, 2), (0, 0), (1, 1), 1),
        ((2, 3), (1, 2), (1, 1), (2, 1), 0),
    ]
    for kernel, stride, padding, dilation, extra in pool:
        x = normal(N, 3, H, W)
        x[0, 0] = np.round(x[0, 0])  # ties
        x[N - 1, 2, 3, 3] = np.nan
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1 + extra
            for n, k, s, p, d in zip((H, W), kernel, stride, padding, dilation, strict=True)
        )
        dy, label = (
            normal(N, 3, *out),
            f"kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}",
        )
        if dilation == (1, 1):
            for include, divisor in ((True, 0), (False, 0), (True, 7)):
                options = kernel, stride, padding, include, divisor
                yield "avg_pool2d_forward", label, (blank(dy.shape, dtype), x, *options), (0,)
                yield "avg_pool2d_backward", label, (blank(x.shape, dtype), dy, *options), (0,)
        options = kernel, stride, padding, dilation
        indices = blank(dy.shape, np.int32)
        yield "max_pool2d_forward", label, (blank(dy.shape, dtype), indices, x, *options), (0, 1)
        kernels.max_pool2d_forward(blank(dy.shape, dtype), indices, x, *options)
        yield "max_pool2d_backward", label, (blank(x.shape, dtype), dy, indices, *options), (0,)

    F, O = sizes["features"], sizes["outputs"]
    for n, bias in ((rows, True), (N, False)):
        x, w, b, dy = normal(n, F), normal(O, F), normal(O if bias else 0), normal(n, O)
        yield "linear_forward", f"{n} images", (blank(dy.shape, dtype), x, w, b), (0,)
        gradients = [blank(a.shape, dtype) for a in (x, w, b)]
        yield "linear_backward", f"{n} images", (*gradients, dy, x, w), (0, 1, 2)
        gradients[0] = np.zeros((0, F), dtype)
        yield "linear_backward", f"{n} images, no dx", (*gradients, dy, x, w), (1, 2)

    x, dy = 3 * normal(N, 3, size), normal(N, 3, size)
    x.flat[:3] = 0, np.nan, np.inf
    for name, (*_, constants) in ACTIVATIONS.items():
        activation = scalars.activation(getattr(scalars, name.upper()), *constants)
        yield "activation_forward", name, (blank(x.shape, dtype), x, activation), (0,)
        yield "activation_backward", name, (blank(x.shape, dtype), dy, np.tanh(x), activation), (0,)
    for C, groups in ((4, 2), (5, 5), (6, 1)):
        x, dy = normal(N, C, H, W) + 1, normal(N, C, H, W)
        weight, bias, mean = normal(C), normal(C), normal(C)
        for training in (True, False):
            for affine in (True, False):
                w, b = (weight, bias) if affine else (weight[:0], bias[:0])
                outputs = blank(x.shape, dtype), blank(C, dtype), blank(C, dtype)
                running = mean, mean**2 + 1, np.array([2])
                for momentum in (0.1, -1.0):
                    arguments = (outputs[0], x, w, b, *outputs[1:], *running, momentum, 1e-5, training, N)
                    yield "batch_norm_forward", f"{C}", arguments, (0, 4, 5, 6, 7)
                out = blank(x.shape, dtype), blank(w.shape, dtype), blank(w.shape, dtype)
                yield "batch_norm_backward", f"{C}", (*out, dy, x, w, mean, abs(mean) + 1, training, N), (0, 1, 2)
        for affine in (True, False):
            w, b = (weight, bias) if affine else (weight[:0], bias[:0])
            mean_g, rstd_g = normal(N, groups), abs(normal(N, groups)) + 1
            sets = blank((N, groups), dtype), blank((N, groups), dtype)
            yield "group_norm_forward", f"{C}", (blank(x.shape, dtype), x, w, b, *sets, groups, 1e-5), (0, 4, 5)
            out = blank(x.shape, dtype), blank(w.shape, dtype), blank(w.shape, dtype)
            yield "group_norm_backward", f"{C}", (*out, dy, x, w, mean_g, rstd_g, groups), (0, 1, 2)
        out = np.zeros((0, *x.shape[1:]), dtype), blank(C, dtype), blank(C, dtype)
        yield "batch_norm_backward", "no dx", (*out, dy, x, weight, mean, abs(mean) + 1, True, N), (1, 2)
    vectors, vector_grads = normal(N + 3, 7), normal(N + 3, 7)
    for affine in (True, False):
        w, b = (normal(7), normal(7)) if affine else (normal(0), normal(0))
        for training in (True, False):
            outputs = blank(vectors.shape, dtype), blank(7, dtype), blank(7, dtype)
            running = normal(7), abs(normal(7)) + 1, np.array([2])
            arguments = (outputs[0], vectors, w, b, *outputs[1:], *running, 0.1, 1e-5, training, N + 3)
            yield "batch_norm_forward", "vectors", arguments, (0, 4, 5, 6, 7)
            out = blank(vectors.shape, dtype), blank(w.shape, dtype), blank(w.shape, dtype)
            arguments = (*out, vector_grads, vectors, w, normal(7), abs(normal(7)) + 1, training, N + 3)
            yield "batch_norm_backward", "vectors", arguments, (0, 1, 2)
        statistics = blank(N + 3, dtype), blank(N + 3, dtype)
        yield "layer_norm_forward", "", (blank(vectors.shape, dtype), vectors, w, b, *statistics, 1e-5), (0, 4, 5)
        out = blank(vectors.shape, dtype), blank(w.shape, dtype), blank(w.shape, dtype)
        statistics = normal(N + 3), abs(normal(N + 3)) + 1
        yield "layer_norm_backward", "", (*out, vector_grads, vectors, w, *statistics), (0, 1, 2)
        out = np.zeros((0, 7), dtype), blank(w.shape, dtype), blank(w.shape, dtype)
        yield "layer_norm_backward", "no dx", (*out, vector_grads, vectors, w, *statistics), (1, 2)
    for kernel_size, scale in (((2, 2), 1.0), ((3, 2), 1 / 6)):
        out = H // kernel_size[0], W // kernel_size[1]
        x, dy, weight, bias = normal(N, 3, H, W), normal(N, 3, *out), normal(3), normal(3)
        yield "subsample_forward", "", (blank(dy.shape, dtype), x, weight, bias, kernel_size, scale), (0,)
        outputs = blank(x.shape, dtype), blank(3, dtype), blank(3, dtype)
        yield "subsample_backward", "", (*outputs, dy, x, weight, kernel_size, scale), (0, 1, 2)
    sources, starts = np.array([0, 2, 1, 0, 1, 2]), np.array([0, 2, 3, 6])  # three outputs of three maps
    x, w, b, dy = normal(N, 3, H, W), normal(6, 3, 2), normal(3), normal(N, 3, H - 2, W - 1)
    yield "conv2d_map_forward", "", (blank(dy.shape, dtype), x, w, b, sources, starts), (0,)
    outputs = [blank(a.shape, dtype) for a in (x, w, b)]
    yield "conv2d_map_backward", "", (*outputs, dy, x, w, sources, starts), (0, 1, 2)
    outputs[0] = np.zeros((0, *x.shape[1:]), dtype)
    yield "conv2d_map_backward", "no dx", (*outputs, dy, x, w, sources, starts), (1, 2)
    x, w, dy, target = normal(rows, 21), normal(classes, 21), normal(rows, classes), rng.integers(0, classes, rows)
    yield "squared_distance_forward", "", (blank(dy.shape, dtype), x, w), (0,)
    yield "squared_distance_backward", "", (blank(x.shape, dtype), blank(w.shape, dtype), dy, x, w), (0, 1)
    yield "squared_distance_backward", "no dw", (blank(x.shape, dtype), np.zeros((0, 21), dtype), dy, x, w), (0,)
    for rubbish, factor, mean in ((-1.0, 1.0, True), (1.5, 0.5, False)):
        outputs = blank(rows, dtype), blank(rows, np.int64), blank(dy.shape, dtype)
        yield "rbf_loss", "", (*outputs, 20 + 5 * dy, target, rubbish, factor, mean), (0, 1, 2)
    for p, span in ((0.0, 1), (0.4, 1), (0.5, 7), (1.0, 1)):
        for x in (normal(N, 3, size), normal(N, 3, H, W)):
            arguments = blank(x.shape, dtype), x, np.array([11]), np.array([5]), 2**63 - 12345, p, span
            yield "dropout", f"p {p}, {x.ndim} axes", arguments, (0,)
    yield "increment", "", (np.array([41]),), (0,)

    x, dy = 3 * normal(rows, classes), normal(rows, classes)
    for name in ("softmax", "log_softmax"):
        yield name + "_forward", "", (blank(x.shape, dtype), x), (0,)
        yield name + "_backward", "", (blank(x.shape, dtype), dy, -abs(x)), (0,)

    yield "add", "", (blank(size, dtype), normal(size), normal(size)), (0,)
    yield "add_bias", "", (normal(N, 5, H, W), normal(5)), (0,)
    yield "sum_channels", "", (blank(5, dtype), normal(N, 5, H, W)), (0,)
    for OH, OW in ((1, 1), (3, 4), (H, W), (H + 3, 2 * W)):
        maps, grads = normal(N, 3, H, W), normal(N, 3, OH, OW)
        for name in ("upsample_nearest2d", "adaptive_avg_pool2d"):
            yield name + "_forward", f"to {OH} x {OW}", (blank(grads.shape, dtype), maps), (0,)
            yield name + "_backward", f"to {OH} x {OW}", (blank(maps.shape, dtype), grads), (0,)
    for top, left, bottom, right in ((1, 2, 0, 3), (-2, 1, 3, -1), (0, 0, -1, 0)):
        padded = blank((N, 3, top + H + bottom, left + W + right), dtype)
        yield "zero_pad2d", f"{top, left, bottom, right}", (padded, normal(N, 3, H, W), (top, left)), (0,)

    target, weight = rng.integers(0, classes, rows), rng.uniform(0.5, 2, classes).astype(dtype)
    target[1] = -100
    for mean, smoothing in ((True, 0.0), (False, 0.1)):
        outputs = blank(rows, dtype), blank(rows, np.int64), blank(x.shape, dtype)
        yield "cross_entropy", "", (*outputs, x, target, weight, -100, smoothing, mean), (0, 1, 2)
        yield "mse_loss", "", (blank(rows, dtype), blank(x.shape, dtype), x, dy, mean), (0, 1)

    for mean in (True, False):
        outputs = blank(rows, dtype), blank(rows, np.int64), blank(x.shape, dtype)
        yield "nll_loss", "", (*outputs, x, target, weight, -100, mean), (0, 1, 2)
        outputs = *outputs[:2], blank(rows, dtype), outputs[2]
        yield "soft_cross_entropy", "", (*outputs, x, abs(dy), weight, 0.1, mean), (0, 1, 2, 3)
        for name, options in (("l1_loss", ()), ("huber_loss", (0.7,))):
            yield name, "", (blank(rows, dtype), blank(x.shape, dtype), x, dy, *options, mean), (0, 1)
        labels = (dy > 0).astype(dtype)
        outputs = blank(rows, dtype), blank(rows, dtype), blank(x.shape, dtype)
        for factors in ((weight, abs(weight[:1])), (weight[:1], weight)):
            yield "binary_cross_entropy_with_logits", "", (*outputs, x, labels, *factors, mean), (0, 1, 2)
    yield "absolute_error", "", (blank(rows, dtype), x, dy), (0,)
    order, values = rng.permutation(rows), normal(rows, 3)
    yield "gather_rows", "", (blank((rows - 2, 3), dtype), values, order, np.array([2])), (0,)
    sample_weight = rng.uniform(0, 2, rows).astype(dtype)
    for class_weight in (rng.uniform(0.5, 2, classes), np.ones(1), np.zeros(0)):
        arguments = normal(rows), normal(rows, 7), abs(target) % classes, class_weight, sample_weight
        yield "weight_samples", f"{len(class_weight)} classes", arguments, (0, 1)

    x[1, 2], x[2] = np.nan, 0.5
    yield "one_hot", "", (blank(x.shape, dtype), blank(rows, np.int64), x, abs(target) % classes), (0, 1)

    rates = np.array([0.1, 0.03], dtype)
    starts = np.arange(0, size, 50)
    blocks = np.stack([starts, np.minimum(starts + 50, size)], axis=1)[[0, *range(2, len(starts))]]  # one is frozen
    table = blocks, rng.uniform(0, 1, blocks.shape).astype(dtype)
    for step in (0, 1, 5):
        theta, grad, m, v = normal(4, size)
        state, count = (m, m, v * v), np.array([step])
        for momentum, dampening, nesterov in ((0.0, 0.0, False), (0.9, 0.2, False), (0.9, 0.0, True)):
            options = momentum, dampening, nesterov
            yield "sgd", f"step {step}", (theta, grad, m, rates, count, *table, *options), (0, 2, 4)
        yield "ema_update", f"step {step}", (m, theta, count, 0.9), (0, 2)
        yield "accumulate_grad", f"first {step == 0}", (m, grad, 0.25, step == 0), (0,)
        for decoupled in (False, True):
            options = 0.9, 0.999, 1e-8, decoupled
            yield "adam", f"step {step}", (theta, grad, *state[1:], rates, count, *table, *options), (0, 2, 3, 5)
        for momentum, centered in ((0.0, False), (0.9, True)):
            options = 0.9, 1e-2, momentum, centered
            yield (
                "rmsprop", f"step {step}", (theta, grad, v * v + m * m + 1, m, v, rates, count, *table, *options),
                (0, 2, 3, 4, 6),
            )  # fmt: skip
    for bound in (0.1, 1e6):
        arrays = normal(size), blank(1, dtype), blank(len(blocks), dtype), blocks
        yield "clip_grad_norm", f"to {bound}", (*arrays, bound), (0, 1)
    yield "clip_grad_value", "", (normal(size), 0.5), (0,)

    yield "sgd_per_parameter", "", (normal(size), normal(size), abs(normal(size)), np.array([3])), (0, 3)
    for kind in (np.uint8, np.float32):
        images, labels = rng.integers(0, 256, (9, 2, H, W)).astype(kind), rng.integers(0, 10, 9)
        order, cursor, B = rng.integers(0, 9, rows + 4), np.array([3]), min(rows, 20)
        x, target = blank((B, 2, H + 2, W + 4), dtype), blank(B, np.int64)
        scale, shift = np.array([0.01, 0.02], dtype), np.array([-1, 2], dtype)
        yield "gather", str(kind), (x, target, images, labels, order, cursor, scale, shift, (1, 2)), (0, 1)
        yield "gather", "no labels", (x, labels[:0], images, labels[:0], order, cursor, scale, shift, (1, 2)), (0,)

    counter, offset, seed = np.array([11]), np.array([5]), 2**63 - 12345
    ranges = (30.0, (2.0, 3.0), (0.8, 1.3), (0.7, 1.1), 20.0)
    yield "random_affine", "", (blank((rows, 2, 3), dtype), counter, offset, seed, *ranges), (0,)
    for radius in (0, 3, 20):
        field, weights = blank((N, 2, H, W), dtype), abs(normal(radius + 1))
        yield "elastic_field", f"radius {radius}", (field, weights, counter, offset, seed, 3.0), (0,)
    x, matrices, field, colours = normal(N, 3, H, W), normal(N, 2, 3), 2 * normal(N, 2, H + 1, W - 2), abs(normal(3))
    field[0, :, 1, 2] = np.nan, np.inf
    for m, f in ((matrices, field), (matrices[:0], field), (matrices, field[:0]), (matrices[:0], field[:0])):
        y = blank((N, 3, H + 1, W - 2), dtype)
        yield "warp", f"{len(m)} matrices, {len(f)} fields", (y, x, m, f, colours), (0,)
    for brightness, contrast in ((0.4, 0.3), (2.0, 0.0)):
        options = brightness, contrast, colours + 1, -colours
        yield "jitter", f"{brightness}, {contrast}", (abs(x), counter, offset, seed, *options), (0,)

    predicted = rng.integers(0, 3, rows)
    totals, cursor, shares = np.array([1.0, 2, 3, 4, 5]), np.array([7]), np.array([1, 0.5, 2])
    loss, target = abs(normal(rows)), rng.integers(0, 3, rows)
    none, score, sample_weight = normal(0), abs(normal(rows)), abs(normal(rows))
    no_prediction, one = predicted[:0], np.ones(1)
    for description, arguments in {
        "": (predicted, none, target, shares, none),
        "a sum": (predicted, none, target, shares[:0], none),
        "no classes": (no_prediction, none, target, shares, none),
        "equal weights": (predicted, none, target, one, none),
        "a score": (no_prediction, score, target, one, none),
        "sample weights": (predicted, none, target, shares, sample_weight),
        "sample weights, a score": (no_prediction, score, target, one, sample_weight),
        "sample weights of a sum": (predicted, none, target, shares[:0], sample_weight),
    }.items():
        yield "accumulate_metrics", description, (totals, cursor, loss, *arguments), (0, 1)
    loss[rows // 2] = np.nan
    yield "accumulate_metrics", "NaN", (totals, cursor, loss, predicted, none, target, shares, none), (0, 1)
