"""Sums of arrays."""

import numpy as np
import pytest

from tinycnn import kernels

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def _case(name, dtype):
    a, b = np.random.default_rng(1).standard_normal((2, 70_003)).astype(dtype)
    return getattr(kernels, name), (np.full(70_003, np.nan, dtype), a, b), (0,)


CASES = ["add"]


@both_dtypes
def test_add(dtype):
    _, (y, a, b), _ = _case("add", dtype)
    b[3] = np.nan
    kernels.add(y, a, b)
    np.testing.assert_array_equal(y, a + b)
    kernels.add(a, a, b)  # in place
    np.testing.assert_array_equal(y, a)


@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))
