"""ONNX: `export` writes a model as a graph that other programs run.  Needs `pip install "tinycnn[onnx]"`."""

from tinycnn.onnx._export import export as export
