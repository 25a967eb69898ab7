"""Models as torch modules, and back.  Needs `pip install "tinycnn[torch]"`."""

from typing import Any

from tinycnn import _check
from tinycnn._typing import Shape
from tinycnn.model import Sequential


def to_module(model: Sequential) -> Any:
    """The model as a `torch.nn.Sequential`, on the CPU: copies of its weights and buffers under the same keys, the same
    dtype, mode and frozen layers.

    Layers that torch does not have, such as `Residual` and `ScaledTanh`, become modules of tinycnn.  The normalization
    of pixels is not part of the module.  Raises ImportError without torch, TypeError for a layer of a user's class.
    """
    _check.instance("model", model, Sequential, "a Sequential")
    with model.lock:
        return _modules().to_module(model)


def from_module(module: Any, input_shape: Shape | None = None) -> Sequential:
    """The model of a torch module: a `torch.nn.Sequential`, also with others inside, of modules that tinycnn has, or
    what `to_module` gives.  Its weights and buffers are copied; it is float64 if one of them is, otherwise float32.

    input_shape  of one image, (C, H, W), if known

    The layers are numbered anew: those of a nested Sequential are layers of the chain, and `nn.Identity` is left out.
    A layer is frozen if none of its module's parameters requires a gradient.

    Raises ImportError without torch; TypeError, with its position, for a module that tinycnn does not have, that has an
    option which tinycnn does not have, or whose parameters are also another module's; ValueError if a layer does not
    fit the one before it.
    """
    modules = _modules()
    _check.instance("module", module, modules.nn.Module, "a torch module")
    model: Sequential = modules.from_module(module, input_shape)
    return model


def _modules() -> Any:
    try:
        from tinycnn import _torch_modules
    except ImportError as error:
        if error.name != "torch":
            raise
        raise ImportError('tinycnn.torch needs torch: pip install "tinycnn[torch]"') from None
    return _torch_modules
