"""Ready-made networks."""

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from tinycnn import _check, init
from tinycnn._typing import Rng, Shape
from tinycnn.containers import Residual
from tinycnn.layers import AvgPool2d, BatchNorm2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Sigmoid, Tanh
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


def resnet20(
    *,
    classes: int = 10,
    input_shape: Shape = (3, 32, 32),
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
    device: str = "cpu",
) -> Sequential:
    """ResNet-20 for CIFAR-shaped images (He, Zhang, Ren and Sun 2016, section 4.2): 272,474 parameters.

    Three stages of three residual blocks with 16, 32 and 64 maps; each block is two 3x3 convolutions with batch norm.
    Where the shape changes, the shortcut is a 1x1 convolution with stride 2 and batch norm (option B of the paper,
    section 4.1; its CIFAR nets pad with zeros, option A).  Weights are drawn as in He et al. 2015: N(0, 2 / fan_in).

    input_shape: (C, H, W), any size
    """
    channels, height, width = _check.image_shape("input_shape", input_shape)
    rng = _check.generator("rng", rng)

    def block(inputs: int, maps: int) -> list[Layer]:
        stride = maps // inputs
        body = (
            Conv2d(inputs, maps, 3, stride, padding=1, bias=False), BatchNorm2d(maps), ReLU(),
            Conv2d(maps, maps, 3, padding=1, bias=False), BatchNorm2d(maps),
        )  # fmt: skip
        projection = () if stride == 1 else (Conv2d(inputs, maps, 1, stride, bias=False), BatchNorm2d(maps))
        return [Residual(*body, projection=projection), ReLU()]

    maps = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [layer for pair in itertools.pairwise(maps) for layer in block(*pair)]
    model = Sequential(
        Conv2d(channels, 16, 3, padding=1, bias=False), BatchNorm2d(16), ReLU(),
        *blocks,
        AvgPool2d((-(-height // 4), -(-width // 4))), Flatten(),
        Linear(64, classes),
        input_shape=(channels, height, width), rng=rng, dtype=dtype, device=device,
    )  # fmt: skip
    init.kaiming_normal(model, only=Conv2d, rng=rng)
    return model
