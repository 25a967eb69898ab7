"""ONNX: `load` reads a graph as a model.  Needs `pip install "tinycnn[onnx]"`."""

from tinycnn.onnx._load import load as load
