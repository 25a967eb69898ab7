"""Ready-made networks."""

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from tinycnn import _check
from tinycnn._typing import Rng
from tinycnn.layers import AvgPool2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Sigmoid, Tanh
from tinycnn.model import Sequential

ACTIVATIONS: dict[str, Callable[[], Layer]] = {"tanh": Tanh, "sigmoid": Sigmoid, "relu": ReLU}
POOLS: dict[str, Callable[[int], Layer]] = {"avg": AvgPool2d, "max": MaxPool2d}


def lenet5(
    activation: str = "tanh",
    pool: str = "avg",
    *,
    classes: int = 10,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
    device: str = "cpu",
) -> Sequential:
    """The modern form of LeNet-5, for images (1, 28, 28): 61,706 parameters with ten classes.

    It differs from LeCun, Bottou, Bengio and Haffner 1998, section II.B (`lecun98.lenet5`): C3 is connected to all
    maps, subsampling has no parameters, the activation follows the convolution, and the output is linear with a
    softmax in the loss.

    activation: "tanh", "sigmoid" or "relu"    pool: "avg" or "max"
    """
    Activation = ACTIVATIONS[_check.choice("activation", activation, tuple(ACTIVATIONS))]
    Pool = POOLS[_check.choice("pool", pool, tuple(POOLS))]
    return Sequential(
        Conv2d(1, 6, 5, padding=2), Activation(), Pool(2),  # C1, S2 -> (6, 14, 14)
        Conv2d(6, 16, 5), Activation(), Pool(2),            # C3, S4 -> (16, 5, 5)
        Flatten(),
        Linear(400, 120), Activation(),                     # C5
        Linear(120, 84), Activation(),                      # F6
        Linear(84, classes),
        input_shape=(1, 28, 28), rng=rng, dtype=dtype, device=device,
    )  # fmt: skip
