"""The batch-blocked layout: each kernel computes the same as in NCHW, whatever the lanes without an image hold."""

import cuda_calls
import numpy as np
import pytest
from blocks import lanes, to_blocked, to_nchw
from hypothesis import given, strategies as st

from tinycnn import Sequential, kernels, layers
from tinycnn.kernels import _simd, direct_conv, layout

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@both_dtypes
@given(
    images=st.integers(1, 40), maps=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9)
)  # fmt: skip
def test_reorder_and_back(images, maps, height, width, dtype):
    x = np.random.default_rng(0).standard_normal((images, maps, height, width)).astype(dtype)
    want = to_blocked(x, lanes(dtype))
    got = np.full(want.shape, np.nan, dtype)
    layout.to_blocked(got, x)
    np.testing.assert_array_equal(got, want)
    back = np.full(x.shape, np.nan, dtype)
    layout.to_nchw(back, got)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 4), (np.float64, 8)])
def test_few_images_are_not_blocked(dtype, size):
    L = _simd.BYTES // size
    assert [layout.lanes_for(n, dtype) for n in (1, L // 2 - 1, L // 2, L, 1000)] == [1, 1, L, L, L]
    assert [layout.lanes_for(n, dtype, True) for n in (1, 3 * L // 4 - 1, 3 * L // 4, L, 1000)] == [1, 1, L, L, L]


# Positions of the arguments that are maps: y or dx first; for backward dy next; then input or output of forward.
MAPS = {
    "avg_pool2d_forward": (0, 1),
    "avg_pool2d_backward": (0, 1),
    "batch_norm_forward": (0, 1),
    "batch_norm_backward": (0, 3, 4),
    "conv2d_forward": (0, 1),
    "conv2d_backward": (0, 3, 4),
    "conv2d_map_forward": (0, 1),
    "conv2d_map_backward": (0, 3, 4),
    "dropout": (0, 1),
    "group_norm_forward": (0, 1),
    "group_norm_backward": (0, 3, 4),
    "max_pool2d_forward": (0, 1, 2),
    "max_pool2d_backward": (0, 1, 2),
    "subsample_forward": (0, 1),
    "subsample_backward": (0, 3, 4),
}
STATISTICS = {"group_norm_forward": (4, 5), "group_norm_backward": (6, 7)}  # (N, groups)


def blocked_arguments(name, arguments, outputs, dtype):
    """The arguments of a call in NCHW, converted for a call in the batch-blocked layout."""
    L, backward = lanes(dtype), name.endswith("backward")
    converted = [np.array(a) if isinstance(a, np.ndarray) else a for a in arguments]
    for i in MAPS[name]:
        # Lanes without an image may hold any finite number; their gradients are zero.
        a = converted[i]
        fill = np.nan if i in outputs and a.dtype.kind == "f" else 0 if backward and i == MAPS[name][1] else 3
        converted[i] = to_blocked(a, L, fill) if a.size else np.empty((0, *a.shape[1:], L), dtype)
    for i in STATISTICS.get(name, ()):
        a = converted[i]
        converted[i] = np.concatenate([a, np.ones((-len(a) % L, a.shape[1]), dtype)])
    return converted


@both_dtypes
@pytest.mark.parametrize("name", MAPS)
def test_as_in_nchw(name, dtype):
    compared = 0
    for images in (9, 32, 101):  # a partial last block, full blocks, more blocks than chunks
        for kernel, about, arguments, outputs in cuda_calls.calls(dtype, cuda_calls.SMALL | {"N": images}):
            if kernel != name or arguments[MAPS[name][1]].ndim != 4:
                continue
            compared += 1
            want = [np.array(a) if isinstance(a, np.ndarray) else a for a in arguments]
            got = blocked_arguments(name, arguments, outputs, dtype)
            getattr(kernels, name)(*want)
            getattr(kernels, name)(*got)
            for i in outputs:
                result = to_nchw(got[i], images) if i in MAPS[name] else got[i][: len(want[i])]
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(want[i]))
                scale = np.abs(want[i][np.isfinite(want[i])]).max(initial=1e-30)
                np.testing.assert_allclose(
                    result, want[i], rtol=0, atol=200 * np.finfo(dtype).eps * scale, err_msg=f"{about}, argument {i}"
                )
                if i in MAPS[name] and name.endswith("backward"):
                    np.testing.assert_array_equal(to_nchw(got[i], None)[images:], 0, f"{about}: lanes without an image")
    assert compared


@both_dtypes
@pytest.mark.parametrize("images", [9, 16, 101])
def test_a_model_gives_the_same_for_one_image_and_for_many(images, dtype):
    """Layers on maps, forward and backward, in blocks and image by image; the output is a map too."""
    model = Sequential(
        layers.Conv2d(2, 6, 3, padding=1), layers.BatchNorm2d(6), layers.ReLU(), layers.MaxPool2d(2),
        layers.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), layers.GroupNorm(2, 4), layers.Tanh(),
        layers.AvgPool2d(3, 1, padding=1), layers.Conv2d(4, 5, 1), input_shape=(2, 9, 8), rng=0, dtype=dtype,
    ).eval()  # fmt: skip
    x = np.random.default_rng(1).standard_normal((images, 2, 9, 8)).astype(dtype)
    y = model.forward(x)
    dx = model.backward(np.cos(y))
    gradient = model.grad.copy()
    outputs, grads, total = [], [], np.zeros_like(gradient)
    for n in range(images):
        outputs.append(model.forward(x[n : n + 1]))
        grads.append(model.backward(np.cos(outputs[-1])))
        total += model.grad
    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == np.float32 else 1e-13}
    np.testing.assert_allclose(y, np.concatenate(outputs), **tolerance)
    np.testing.assert_allclose(dx, np.concatenate(grads), **tolerance)
    np.testing.assert_allclose(gradient, total, rtol=0, atol=tolerance["atol"] * np.abs(total).max())
    activations = [layer.output for layer in model.activations(x)]
    assert [a.shape for a in activations] == [(images, *shape) for shape in model.shapes[1:]]
    np.testing.assert_allclose(activations[-1], y, **tolerance)  # y: batch norm is folded into the convolution


@pytest.mark.parametrize("images", [16, 70])  # few blocks, each in two bands; and enough blocks for one band each
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride"),
    [(1, 6, (28, 28), (1, 1)), (6, 16, (27, 20), (1, 1)), (3, 5, (30, 33), (2, 1)), (2, 4, (3, 130), (1, 1))],
)
def test_gradients_summed_in_strips(channels, outputs, size, stride, images):
    """Maps of more than L1_PIXELS pixels; register blocks of weight gradients of both sizes."""
    rng, dtype = np.random.default_rng(7), np.float64
    x, w = rng.standard_normal((images, channels, *size)), rng.standard_normal((outputs, channels, 5, 5))
    options = stride, (2, 2), (1, 1), 1
    dy = rng.standard_normal((images, outputs, *(-(-n // s) for n, s in zip(size, stride, strict=True))))
    assert dy[0, 0].size > direct_conv.L1_PIXELS
    want, got = ([np.empty_like(x), np.empty_like(w), np.empty(outputs)] for _ in range(2))
    kernels.conv2d_backward(*want, dy, x, w, *options)
    L = lanes(dtype)
    dx = to_blocked(np.full_like(x, np.nan), L)
    kernels.conv2d_backward(dx, *got[1:], to_blocked(dy, L), to_blocked(x, L), w, *options)
    for a, b in zip((to_nchw(dx, images), *got[1:]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())
