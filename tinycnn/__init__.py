"""tinycnn: a convolutional network engine whose every kernel can be read.

    from tinycnn import Adam, CrossEntropyLoss, data, fit, models

Names are looked up when first used, so that importing the package costs next to nothing: Numba and matplotlib load with
the first thing that needs them.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "layers": (
        "AvgPool2d BatchNorm2d Conv2d Dropout Dropout2d Flatten GaussianRBF GroupNorm Layer LeakyReLU Linear "
        "LogSoftmax MaxPool2d ReLU ScaledTanh Sigmoid Softmax Tanh"
    ),
    "model": "Sequential",
    "losses": "CrossEntropyLoss MSELoss OneHotMSELoss",
    "optim": "SGD Adam AdamW EMA",
    "_gradcheck": "gradcheck gradcheck_model",
    "dataset": "DeviceDataset",
    "callbacks": "EarlyStopping ReduceLROnPlateau",
    "errors": "DivergedError",
    "train": "evaluate fit train_step",
    "augment": "ColorJitter ElasticTransform RandomAffine",
    "devices": "set_num_threads",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
_MODULES = (
    "augment",
    "callbacks",
    "checkpoint",
    "data",
    "errors",
    "experiment",
    "functional",
    "init",
    "kernels",
    "lecun98",
    "metrics",
    "models",
    "optim",
    "plot",
    "runs",
    "schedules",
)

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name):
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"tinycnn.{_MODULE_OF[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"tinycnn.{name}")
    else:
        raise AttributeError(f"module 'tinycnn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
