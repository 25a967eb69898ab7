"""The functions of an `onnx.backend.base.Backend`, as those of modules such as onnxruntime.backend."""

from typing import Any


def _backend() -> Any:
    from tinycnn.onnx._graph import import_onnx

    import_onnx()
    from tinycnn.onnx._backend import Backend

    return Backend


def is_compatible(model: Any, device: str = "CPU", **kwargs: Any) -> bool:
    """Whether `prepare` takes the model."""
    return bool(_backend().is_compatible(model, device, **kwargs))


def prepare(model: Any, device: str = "CPU", **kwargs: Any) -> Any:
    """A graph as an object with a method `run(inputs)`: see `Backend`."""
    return _backend().prepare(model, device, **kwargs)


def run_model(model: Any, inputs: Any, device: str = "CPU", **kwargs: Any) -> Any:
    """The outputs of a graph."""
    return _backend().run_model(model, inputs, device, **kwargs)


def run_node(node: Any, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any) -> Any:
    """The outputs of one node."""
    return _backend().run_node(node, inputs, device, outputs_info, **kwargs)


def supports_device(device: str) -> bool:
    """Whether a device is "CPU": a graph's nodes run on it.  `load(..., device="cuda")` is for GPUs."""
    return device.partition(":")[0] == "CPU"
