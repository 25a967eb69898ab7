"""Ready-made networks."""

import numpy as np

from tinycnn import _check
from tinycnn.layers import AvgPool2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sigmoid, Tanh
from tinycnn.model import Sequential

ACTIVATIONS = {"tanh": Tanh, "sigmoid": Sigmoid, "relu": ReLU}
POOLS = {"avg": AvgPool2d, "max": MaxPool2d}


def lenet5(activation="tanh", pool="avg", *, classes=10, rng=None, dtype=np.float32, device="cpu"):
    """LeNet-5 as it is built today, for images (1, 28, 28): 61,706 parameters with ten classes.

    After LeCun, Bottou, Bengio and Haffner 1998, section II.B.  Today's form, used by nearly every framework's example,
    differs from the paper's in that C3 is connected to all maps, subsampling has no parameters, the activation follows
    the convolution, and the output is linear with a softmax in the loss.

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
