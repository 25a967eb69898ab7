"""Type aliases that several modules use."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # NumPy's
DeviceArray: TypeAlias = Any  # a backend's array: NumPy's on the CPU, numba-cuda's on a GPU
Views: TypeAlias = dict[str, DeviceArray]  # of a layer, into the flat vectors, by name
DType: TypeAlias = np.dtype[Any]
Backend: TypeAlias = ModuleType  # tinycnn.kernels or tinycnn.cuda
Shape: TypeAlias = tuple[int, ...]
Pair: TypeAlias = int | tuple[int, int]  # one number for both directions, or one each
Padding: TypeAlias = Pair | str  # or "same" or "valid"
Rng: TypeAlias = int | np.random.SeedSequence | np.random.Generator | None  # what np.random.default_rng takes
CompileProgress: TypeAlias = Callable[[int, int, str, float], object]  # see `train.warm_up`
State: TypeAlias = dict[str, Array]  # a state_dict
