"""Types that several modules name."""

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # NumPy's
DeviceArray: TypeAlias = Any  # a backend's array: NumPy's on the CPU, numba-cuda's on a GPU
Backend: TypeAlias = ModuleType  # tinycnn.kernels or tinycnn.cuda
Shape: TypeAlias = tuple[int, ...]
Pair: TypeAlias = int | tuple[int, int]  # one number for both directions, or one each
Rng: TypeAlias = int | np.random.SeedSequence | np.random.Generator | None  # what np.random.default_rng takes
