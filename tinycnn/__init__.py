"""tinycnn: a convolutional network engine whose every kernel can be read.

    from tinycnn import Adam, CrossEntropyLoss, data, fit, models

Submodules load when first used: Numba with `tinycnn.kernels`, matplotlib with the first picture of `tinycnn.plot`.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# "X as X" marks what is exported, for type checkers and editors.
# isort: off
from tinycnn._gradcheck import gradcheck as gradcheck, gradcheck_model as gradcheck_model
from tinycnn.augment import (
    ColorJitter as ColorJitter,
    ElasticTransform as ElasticTransform,
    RandomAffine as RandomAffine,
)
from tinycnn.callbacks import EarlyStopping as EarlyStopping, ReduceLROnPlateau as ReduceLROnPlateau
from tinycnn.dataset import DeviceDataset as DeviceDataset
from tinycnn.devices import set_num_threads as set_num_threads
from tinycnn.errors import DivergedError as DivergedError
from tinycnn.layers import (
    AvgPool2d as AvgPool2d,
    BatchNorm2d as BatchNorm2d,
    Conv2d as Conv2d,
    Dropout as Dropout,
    Dropout2d as Dropout2d,
    Flatten as Flatten,
    GaussianRBF as GaussianRBF,
    GroupNorm as GroupNorm,
    Layer as Layer,
    LeakyReLU as LeakyReLU,
    Linear as Linear,
    LogSoftmax as LogSoftmax,
    MaxPool2d as MaxPool2d,
    ReLU as ReLU,
    ScaledTanh as ScaledTanh,
    Sigmoid as Sigmoid,
    Softmax as Softmax,
    Tanh as Tanh,
)
from tinycnn.losses import CrossEntropyLoss as CrossEntropyLoss, MSELoss as MSELoss, OneHotMSELoss as OneHotMSELoss
from tinycnn.model import Sequential as Sequential
from tinycnn.optim import EMA as EMA, SGD as SGD, Adam as Adam, AdamW as AdamW
from tinycnn.train import evaluate as evaluate, fit as fit, train_step as train_step

if TYPE_CHECKING:
    from tinycnn import (
        checkpoint as checkpoint,
        data as data,
        experiment as experiment,
        functional as functional,
        init as init,
        kernels as kernels,
        lecun98 as lecun98,
        metrics as metrics,
        models as models,
        plot as plot,
        runs as runs,
        schedules as schedules,
    )
else:

    def __getattr__(name: str) -> Any:
        """`tinycnn.name` for a submodule that is not loaded yet."""
        if not name.startswith("_") and importlib.util.find_spec(f"tinycnn.{name}"):
            return importlib.import_module(f"tinycnn.{name}")
        raise AttributeError(f"module 'tinycnn' has no attribute {name!r}")
