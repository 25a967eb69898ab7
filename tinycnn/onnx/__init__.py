"""ONNX: `export` writes a model as a graph that other programs run, `load` reads a graph as a model; `prepare`,
`run_model`, `run_node` and `supports_device` are those of an `onnx.backend.base.Backend`.  Needs
`pip install "tinycnn[onnx]"`."""

from tinycnn.onnx._export import export as export
from tinycnn.onnx._load import load as load
from tinycnn.onnx._serve import (
    is_compatible as is_compatible,
    prepare as prepare,
    run_model as run_model,
    run_node as run_node,
    supports_device as supports_device,
)
