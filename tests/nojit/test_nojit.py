"""The kernels as plain Python, without the compiler, as in a debugger.

Run by .ci/run with NUMBA_DISABLE_JIT=1; otherwise skipped.
"""

import os

import numpy as np
import pytest

from tinycnn import (
    Adam,
    AvgPool2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    Tanh,
    gradcheck_model,
    train_step,
)
from tinycnn.kernels import conv, winograd
from tinycnn.kernels._simd import BYTES

pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") != "1", reason="NUMBA_DISABLE_JIT is not 1")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("activation", "pool"), [(Tanh, AvgPool2d), (ReLU, MaxPool2d), (Sigmoid, AvgPool2d)])
def test_gradients_of_a_tiny_net(stride, activation, pool):
    model = Sequential(
        Conv2d(2, 3, 3, stride=stride, padding=1), activation(), pool(2),
        Flatten(), Linear(27 if stride == 1 else 12, 4), rng=0, dtype=np.float64,
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((2, 2, 7, 7))
    assert gradcheck_model(model, x, rng=2) < 1e-6


def test_a_step_in_float32_lowers_the_loss():
    rng = np.random.default_rng(0)
    batches = DeviceDataset(rng.integers(0, 256, (9, 6, 6), dtype=np.uint8), rng.integers(0, 3, 9))
    model = Sequential(Conv2d(1, 2, 3), Tanh(), AvgPool2d(2), Flatten(), Linear(8, 3), rng=0)
    optimizer, criterion = Adam(model, 0.05), CrossEntropyLoss()
    losses = [train_step(model, criterion, optimizer, batches, np.arange(9)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert model.theta.dtype == np.float32


@pytest.mark.parametrize(("height", "columns"), [(14, 3), (5, 5), (16, 1)])
def test_winograd_of_a_few_images_stays_inside_its_arrays(height, columns):
    """Slices of NumPy beyond the end of an array would be too short."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 16, height, columns * BYTES // 4)).astype(np.float32)
    w, b = rng.standard_normal((16, 16, 3, 3)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    y, want, one = np.empty_like(x), np.empty_like(x), (1, 1)
    assert winograd.applies(y, x, w, one, one, 1)
    conv.conv2d_forward(y, x, w, b, one, one, one, 1)
    conv.conv2d_forward_mec(want, x, w, b, None, None, one, one, one, 1)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4)
