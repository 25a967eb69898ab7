"""`tinycnn.onnx.load`: graphs of torch's exporters and of other writers, equal to onnxruntime; what is refused."""

import contextlib
import inspect
import io
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import tinycnn.onnx  # noqa: E402
from tinycnn import Residual  # noqa: E402
from tinycnn.errors import OnnxError  # noqa: E402
from tinycnn.onnx import load  # noqa: E402

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.uniform(-0.5, 0.5, shape).astype(np.float32)


class G:
    """A graph that is being written: `G(shape)("Relu", "x")` adds a node and returns the name of its output."""

    def __init__(self, shape, opset=17, kind=TensorProto.FLOAT, batch="N"):
        self.input = helper.make_tensor_value_info("x", kind, [batch, *shape])
        self.opset, self.nodes, self.arrays = opset, [], []

    def constant(self, values, dtype=None):
        values = np.asarray(values)
        dtype = dtype or (np.int64 if values.dtype.kind in "iu" else np.float32)
        name = f"c{len(self.arrays)}"
        self.arrays.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def __call__(self, op, *inputs, **attributes):
        names = [v if isinstance(v, str) else self.constant(v) for v in inputs]
        output = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], name=f"{op}_{len(self.nodes)}", **attributes))
        return output

    def proto(self, output=None, metadata=None, kind=TensorProto.FLOAT):
        out = helper.make_tensor_value_info(output or self.nodes[-1].output[0], kind, None)
        graph = helper.make_graph(self.nodes, "g", [self.input], [out], self.arrays)
        opsets = [helper.make_opsetid("", self.opset)]
        ir_version = max(4, helper.find_min_ir_version_for(opsets))  # initializers are no inputs
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        helper.set_model_props(proto, metadata or {})
        return proto


def images(shape, n=3):
    return RNG.uniform(-1, 1, (n, *shape)).astype(np.float32)


def run(proto, x):
    """onnxruntime's outputs."""
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def check(graph, n=3, x=None, nhwc=False, model_x=None):
    """Load a graph, and compare with onnxruntime; returns the model."""
    proto = graph.proto() if isinstance(graph, G) else graph
    model = load(proto.SerializeToString())
    if x is None:
        sizes = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
        x = images(sizes, n)
    if model_x is None:
        model_x = x.transpose(0, 3, 1, 2) if nhwc else x
    expected = run(proto, x)
    got = model.outputs(model_x)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    return model


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def refused(graph, *parts):
    """The message of the refusal, which is one line and has all the parts."""
    with pytest.raises(OnnxError) as caught:
        load(graph.proto() if isinstance(graph, G) else graph)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_nets():
    from torch import nn

    class Block(nn.Module):
        def __init__(self, project):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
            )  # fmt: skip
            self.short = nn.Conv2d(4, 4, 1) if project else nn.Identity()

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.short(x))

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return {
        "lenet5": (nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
        ), (1, 28, 28)),
        "conv_bn_relu": (nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4),
            nn.Flatten(), nn.Dropout(), nn.Linear(100, 5), nn.BatchNorm1d(5), nn.LogSoftmax(1),
        ), (1, 12, 12)),
        "residual": (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Block(False), Block(True), *head), (1, 12, 12)),
        "norms": (nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.SiLU(),
            nn.LayerNorm([4, 10, 10]), nn.GELU(approximate="tanh"), nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(), nn.Linear(400, 5), nn.LayerNorm(5), nn.Hardtanh(-0.5, 0.7), nn.Softplus(beta=2),
        ), (1, 12, 12)),
        "decoder": (nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ELU(), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1),
            nn.LeakyReLU(0.2), nn.ReLU6(), nn.ZeroPad2d((1, 0, 2, 1)), nn.Sigmoid(),
        ), (1, 6, 6)),
    }  # fmt: skip


def torch_export(module, shape, dynamo, opset=None):
    torch = pytest.importorskip("torch")
    x, options = torch.randn(2, *shape), {} if opset is None else {"opset_version": opset}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = dynamo
    elif dynamo:
        pytest.skip("torch before 2.5 has the older exporter only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter is deprecated
        if dynamo:
            pytest.importorskip("onnxscript")
            dynamic = ({0: torch.export.Dim.AUTO},)
            return torch.onnx.export(module, (x,), dynamic_shapes=dynamic, verbose=False, **options).model_proto
        buffer = io.BytesIO()
        torch.onnx.export(module, (x,), buffer, input_names=["x"], dynamic_axes={"x": {0: "N"}}, **options)
        return onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["lenet5", "conv_bn_relu", "residual", "norms", "decoder"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch(name, dynamo):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module, shape = torch_nets()[name]
    for layer in module.modules():
        if isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    proto = torch_export(module.eval(), shape, dynamo)
    x = images(shape)
    model = check(proto, x=x)
    with torch.no_grad():
        np.testing.assert_allclose(model.outputs(x), module(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-5)
    assert not model.training
    if name == "residual":
        assert kinds(model).count("Residual") == 2
        assert len(next(layer for layer in model.layers[2:] if isinstance(layer, Residual)).projection) == 1
    if name == "norms":
        assert kinds(model)[:3] == ["Conv2d", "GELU", "GroupNorm"]
        assert kinds(model)[-1] == "Softplus"
        assert model.layers[-1].beta == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("opset", [9, 11, 13, 16])
def test_torch_formulas_of_old_opsets(opset):
    """GELU and SiLU are formulas there; Clip, Pad, Dropout and ReduceMean have attributes that became inputs later."""
    torch = pytest.importorskip("torch")
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GELU(), nn.Conv2d(2, 2, 3), nn.GELU(approximate="tanh"), nn.ReLU6(), nn.SiLU(),
        nn.ConstantPad2d((1, 0, 0, 2), 0.0), nn.Flatten(), nn.Linear(2 * 10 * 9, 3), nn.Softmax(1),
    ).eval()  # fmt: skip
    torch.manual_seed(1)
    model = check(torch_export(net, (1, 12, 12), False, opset), x=images((1, 12, 12)))
    assert kinds(model) == [
        "Conv2d", "GELU", "Conv2d", "GELU", "ReLU6", "SiLU", "ZeroPad2d", "Flatten", "Linear", "Softmax"
    ]  # fmt: skip
    assert (model.layers[1].approximate, model.layers[3].approximate) == ("none", "tanh")


# --- other writers ----------------------------------------------------------------------------------------------------


def test_tf2onnx_style_nhwc():
    """NHWC input, transposes around convolutions, bias added in NHWC, and a Flatten that permutes the dense weight."""
    g = G((8, 6, 2))
    x = g("Transpose", "x", perm=[0, 3, 1, 2])
    x = g("Conv", x, draw(3, 2, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 3])
    x = g("Transpose", x, perm=[0, 2, 3, 1])
    x = g("Add", x, draw(3))
    x = g("Relu", x)
    x = g("Mul", x, np.float32(1))
    shape = g("Shape", x)
    batch = g("Unsqueeze", g("Gather", g("Cast", shape, to=TensorProto.INT32), 0, axis=0), [0])
    shape = g("Concat", batch, g("Cast", [-1], to=TensorProto.INT32), axis=0)
    x = g("Reshape", x, g("Cast", shape, to=TensorProto.INT64))
    x = g("MatMul", x, draw(36, 5))
    x = g("Add", x, draw(5))
    x = g("Tanh", x)
    g("Softmax", g("MatMul", x, draw(5, 4)), axis=-1)
    model = check(g, nhwc=True)
    assert model.input_shape == (2, 8, 6)
    assert kinds(model) == ["ZeroPad2d", "Conv2d", "ReLU", "Flatten", "Linear", "Tanh", "Linear", "Softmax"]


def test_keras2onnx_style_nhwc():
    """Batch norm and global pooling in NHWC, a dense layer on every pixel, one channel moved by a Reshape."""
    g = G((8, 8, 1))
    x = g("Reshape", "x", [-1, 1, 8, 8])
    x = g("Conv", x, draw(4, 1, 3, 3), draw(4), pads=[1, 0, 1, 2], kernel_shape=[3, 3])
    x = g("BatchNormalization", x, 1 + draw(4), draw(4), draw(4), 1 + draw(4), epsilon=1e-3)
    x = g("LeakyRelu", x, alpha=0.3)
    x = g("Transpose", x, perm=[0, 2, 3, 1])
    x = g("Add", g("MatMul", x, draw(4, 3)), draw(3))
    x = g("ReduceMean", x, axes=[1, 2], keepdims=0)
    g("Add", g("MatMul", x, draw(3, 2)), draw(2))
    model = check(g, nhwc=True)
    assert model.input_shape == (1, 8, 8)
    assert kinds(model) == [
        "ZeroPad2d", "Conv2d", "BatchNorm2d", "LeakyReLU", "Conv2d", "AdaptiveAvgPool2d", "Flatten", "Linear"
    ]  # fmt: skip


def test_nhwc_batch_norm_of_the_flattened_vector():
    g = G((4, 4, 3))
    x = g("Conv", g("Transpose", "x", perm=[0, 3, 1, 2]), draw(2, 3, 1, 1))
    x = g("Flatten", g("Transpose", x, perm=[0, 2, 3, 1]))
    x = g("BatchNormalization", x, 1 + draw(32), draw(32), draw(32), 1 + draw(32))
    x = g("Mul", x, draw(32))
    x = g("LayerNormalization", x, draw(32), draw(32))
    g("Gemm", x, draw(32, 3), draw(3), alpha=0.5, beta=2.0)
    assert kinds(check(g, nhwc=True)) == ["Conv2d", "Flatten", "BatchNorm1d", "LayerNorm", "Linear"]


def test_cntk_style():
    """The structure of the MNIST model in the ONNX model zoo: batch of one, Reshape of the data and of the weight."""
    g = G((1, 28, 28), opset=8, batch=1)
    x = g("Conv", "x", draw(8, 1, 5, 5), auto_pad="SAME_UPPER", kernel_shape=[5, 5], strides=[1, 1], dilations=[1, 1])
    x = g("Relu", g("Add", x, draw(8, 1, 1)))
    x = g("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0], auto_pad="NOTSET")
    x = g("Conv", x, draw(16, 8, 5, 5), auto_pad="SAME_UPPER", kernel_shape=[5, 5])
    x = g("Relu", g("Add", x, draw(16, 1, 1)))
    x = g("MaxPool", x, kernel_shape=[3, 3], strides=[3, 3])
    x = g("Reshape", x, [1, 256])
    weight = g("Reshape", draw(16, 4, 4, 10), [256, 10])
    g("Add", g("MatMul", x, weight), draw(1, 10))
    model = check(g, n=1)
    assert kinds(model) == ["Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    x = images((1, 28, 28), 5)  # a batch that the graph does not take
    np.testing.assert_allclose(model.outputs(x)[:1], run(g.proto(), x[:1]), rtol=1e-5, atol=1e-5)


def test_paddle_style():
    """scale and assign as Identity or Mul by one, Flatten by its axis, MatMul and Add, bias of a Conv as a Reshape."""
    g = G((1, 10, 10), opset=11)
    x = g("Identity", g("Conv", "x", draw(3, 1, 3, 3), strides=[1, 1], pads=[0, 0, 0, 0], group=1))
    x = g("Add", x, g("Reshape", draw(3), [1, 3, 1, 1]))
    x = g("Add", g("Mul", x, np.float32(1)), np.float32(0))
    x = g("Clip", x, np.float32(0), np.float32(6))
    x = g("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = g("Flatten", x, axis=1)
    x = g("Add", g("MatMul", x, draw(48, 4)), draw(4))
    g("Softmax", g("Identity", x), axis=1)
    model = check(g)
    assert kinds(model) == ["Conv2d", "ReLU6", "AvgPool2d", "Flatten", "Linear", "Softmax"]
    assert not model.layers[2].count_include_pad


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"auto_pad": "SAME_UPPER"}, ["Conv2d"]),
        ({"auto_pad": "SAME_LOWER"}, ["ZeroPad2d", "Conv2d"]),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 3]}, ["ZeroPad2d", "Conv2d"]),
        ({"auto_pad": "VALID"}, ["Conv2d"]),
        ({"pads": [1, 2, 1, 2], "dilations": [2, 1]}, ["Conv2d"]),
        ({"pads": [0, 1, 2, 3]}, ["ZeroPad2d", "Conv2d"]),
        ({"group": 2}, ["Conv2d"]),
    ],
)
def test_conv_padding(options, expected):
    g = G((2, 9, 10))
    weight = draw(4, 1, 4, 3) if "group" in options else draw(4, 2, 4, 3)
    g("Conv", "x", weight, draw(4), **options)
    assert kinds(check(g)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [2, 2], "pads": [0, 1, 1, 0]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [3, 2], "auto_pad": "SAME_LOWER"},
        {"strides": [2, 2], "output_shape": [9, 10]},
        {"dilations": [2, 1], "group": 2},
    ],
)
def test_conv_transpose_padding(options):
    g = G((2, 4, 5))
    weight = draw(2, 2, 3, 3) if "group" in options else draw(2, 3, 3, 3)
    g("ConvTranspose", "x", weight, draw(4 if "group" in options else 3), kernel_shape=[3, 3], **options)
    check(g)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_shape": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"},
        {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
        {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 0, 0, 1], "ceil_mode": 1},
    ],
)
def test_pooling_windows(op, options):
    g = G((2, 9, 8))
    g(op, "x", **options)
    check(g)
    if op == "AveragePool" and "ceil_mode" not in options:
        g = G((2, 9, 8))
        g(op, "x", count_include_pad=1, **options)
        check(g)


def test_global_pools_and_reductions():
    for op in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"):
        for keep in (0, 1):
            reduction = {} if op.startswith("G") else {"axes": [-2, -1], "keepdims": keep}
            g = G((3, 5, 4))
            x = g(op, "x", **reduction)
            if op.startswith("G") or keep:
                x = g("Squeeze", x, [2, 3])
            g("Gemm", x, draw(2, 3), transB=1)
            assert kinds(check(g))[-2:] == ["Flatten", "Linear"]
    g = G((3, 5, 4), opset=18)
    g("ReduceMean", "x", [2, 3])
    assert kinds(check(g)) == ["AdaptiveAvgPool2d"]


def half_of_one_plus(g, x, y):
    return g("Mul", g("Mul", x, np.float32(0.5)), g("Add", y, np.float32(1)))


def gelu_inner(g, x):
    cube = g("Mul", g("Pow", x, np.float32(3)), np.float32(0.044715))
    return g("Mul", g("Add", x, cube), np.float32(math.sqrt(2 / math.pi)))


ACTIVATIONS = {
    "relu": (lambda g, x: g("Relu", x), "ReLU"),
    "max": (lambda g, x: g("Max", x, np.float32(0)), "ReLU"),
    "clip": (lambda g, x: g("Clip", x, np.float32(0)), "ReLU"),
    "relu6": (lambda g, x: g("Min", g("Max", x, np.float32(0)), np.float32(6)), "ReLU6"),
    "hardtanh": (lambda g, x: g("Clip", x, np.float32(-0.5), np.float32(0.25)), "Hardtanh"),
    "leaky": (lambda g, x: g("Sub", g("Relu", x), g("Mul", g("Relu", g("Neg", x)), np.float32(0.2))), "LeakyReLU"),
    "prelu": (lambda g, x: g("PRelu", x, np.full((2, 1, 1), 0.25)), "LeakyReLU"),
    "silu": (lambda g, x: g("Mul", g("Sigmoid", x), x), "SiLU"),
    "silu_div": (lambda g, x: g("Div", x, g("Add", np.float32(1), g("Exp", g("Neg", x)))), "SiLU"),
    "gelu": (lambda g, x: half_of_one_plus(g, x, g("Erf", g("Div", x, np.float32(math.sqrt(2))))), "GELU"),
    "gelu_tanh": (lambda g, x: half_of_one_plus(g, x, g("Tanh", gelu_inner(g, x))), "GELU"),
    "scaled_tanh": (lambda g, x: g("Mul", g("Tanh", g("Mul", x, np.float32(2 / 3))), np.float32(1.7159)), "ScaledTanh"),
    "softplus": (lambda g, x: g("Log", g("Add", g("Exp", x), np.float32(1))), "Softplus"),
    "softplus_beta": (lambda g, x: g("Div", g("Softplus", g("Mul", x, np.float32(3))), np.float32(3)), "Softplus"),
    "elu": (lambda g, x: g("Where", g("Greater", x, np.float32(0)), x, g("Sub", g("Exp", x), np.float32(1))), "ELU"),
    "sigmoid": (lambda g, x: g("Reciprocal", g("Add", g("Exp", g("Neg", x)), np.float32(1))), "Sigmoid"),
    "swish": (lambda g, x: g("Mul", x, g("Sigmoid", x)), "SiLU"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("after", ["input", "Conv", "MaxPool"])
def test_activations_and_their_formulas(name, after):
    formula, expected = ACTIVATIONS[name]
    g = G((2, 6, 6))
    x = "x"
    if after == "Conv":
        x = g("Conv", x, draw(2, 2, 1, 1))
    if after == "MaxPool":
        x = g("MaxPool", x, kernel_shape=[2, 2])
    x = formula(g, x)
    g("Conv", x, draw(3, 2, 1, 1))
    model = check(g)
    before = {"input": [], "Conv": ["Conv2d"], "MaxPool": ["MaxPool2d"]}[after]
    assert kinds(model) == [*before, expected, "Conv2d"]


def test_a_formula_that_is_no_activation_is_refused():
    g = G((2, 6, 6))
    x = g("Mul", "x", g("Clip", g("Add", "x", np.float32(3)), np.float32(0), np.float32(6)))
    g("Conv", g("Div", x, np.float32(6)), draw(2, 2, 1, 1))  # x * relu6(x + 3) / 6
    refused(g, "(Conv)", "element-wise")
    g = G((2, 6, 6), opset=14)
    g("HardSwish", "x")
    refused(g, "'HardSwish_0' (HardSwish)", "known operators: Abs, Add,")


@pytest.mark.skipif(ort.__version__.startswith("1.17."), reason="onnxruntime 1.17 has no opset 21")
def test_batch_norm_group_norm_layer_norm_and_scales():
    g = G((4, 6, 6), opset=21)
    x = g("BatchNormalization", "x", 1 + draw(4), draw(4), draw(4), 1 + draw(4), epsilon=1e-3, momentum=0.8)
    x = g("GroupNormalization", x, 1 + draw(4), draw(4), num_groups=2, epsilon=1e-3)
    x = g("Add", g("Mul", x, draw(4, 1, 1)), draw(1, 4, 1, 1))  # into the norm
    x = g("LayerNormalization", x, 1 + draw(6), axis=-1)
    x = g("Mul", g("Conv", x, draw(2, 4, 3, 3)), draw(2, 1, 1))  # into the convolution
    x = g("Div", x, np.float32(3))
    x = g("Sub", np.float32(1), x)
    g("Tanh", x)
    model = check(g)
    assert kinds(model) == ["BatchNorm2d", "GroupNorm", "LayerNorm", "Conv2d", "Tanh"]
    assert model.layers[0].momentum == pytest.approx(0.2)
    assert model.layers[0].eps == 1e-3


def test_group_norm_of_a_number_a_group():
    g = G((4, 4, 4), opset=18)
    g("GroupNormalization", "x", np.float32([1, 2]), np.float32([0.5, -1]), num_groups=2)
    assert kinds(check(g)) == ["GroupNorm"]


def test_scale_after_an_activation_goes_into_the_next_layer():
    for nodes in (1, 2):
        g = G((2, 5, 5))
        x = g("Mul", g("Relu", "x"), draw(2, 1, 1))
        if nodes == 2:
            x = g("Add", x, draw(2, 1, 1))
        g("Conv", x, draw(4, 1, 3, 3), group=2)
        assert kinds(check(g)) == ["ReLU", "Conv2d"]
    g = G((2, 5, 5))
    x = g("Add", g("Mul", g("Relu", "x"), draw(2, 1, 1)), draw(2, 1, 1))
    g("Gemm", g("Flatten", x), draw(50, 3), draw(3))
    assert kinds(check(g)) == ["ReLU", "Flatten", "Linear"]
    g = G((2, 5, 5))
    g("Conv", g("Add", g("Relu", "x"), draw(2, 1, 1)), draw(3, 2, 3, 3), pads=[1, 1, 1, 1])
    refused(g, "(Conv)", "padded with zeros")


def test_resize_and_upsample():
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for opset, op, inputs, options in (
        (9, "Upsample", [np.float32([1, 1, 2, 3])], {"mode": "nearest"}),
        (10, "Resize", [np.float32([1, 1, 2, 3])], {"mode": "nearest"}),
        (13, "Resize", ["", np.float32([1, 1, 2, 3])], old),
        (13, "Resize", ["", np.float32([1, 1, 2, 3])], {"mode": "nearest"}),
    ):  # fmt: skip
        g = G((2, 3, 4), opset)
        g(op, "x", *inputs, **options)
        model = check(g)
        assert model.layers[0].scale_factor == (2, 3)
    g = G((2, 3, 4), 13)
    g("Resize", "x", "", np.float32([1, 1, 2, 2]), mode="linear")
    refused(g, "(Resize)", "mode must be nearest, got 'linear'")


def test_resize_by_sizes_of_a_batch_of_one():
    g = G((2, 4, 4), 13, batch=1)
    g("Resize", "x", "", "", [1, 2, 7, 12], coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    assert check(g, n=1).layers[0].size == (7, 12)
    g = G((2, 4, 4), 13, batch=1)
    g("Resize", "x", "", "", [2, 2, 8, 8])
    refused(g, "(Resize)", "leave the batch axis alone")


def test_pad():
    g = G((2, 4, 5))
    g("Pad", "x", [0, 0, 1, 2, 0, 0, 0, -1])
    assert check(g).layers[0].padding == (2, -1, 1, 0)
    g = G((2, 4, 5))
    g("Conv", g("Pad", "x", [0, 0, 1, 2, 0, 0, 0, 1], np.float32(1)), draw(1, 2, 1, 1))
    refused(g, "(Pad)", "value must be 0")


def test_shapes_and_dropout():
    g = G((12,), opset=13)
    x = g("Unsqueeze", "x", [1])
    x = g("Reshape", x, [0, 3, 2, 2])
    x = g("Dropout", g("Conv", x, draw(2, 3, 1, 1)), np.float32(0.25))
    x = g("Softmax", g("Flatten", x), axis=1)
    x = g("Reshape", x, g("Concat", g("Slice", g("Shape", x), [0], [1]), [-1], axis=0))
    g("LogSoftmax", g("Gemm", x, draw(8, 3)))
    model = check(g)
    assert kinds(model) == ["Unflatten", "Conv2d", "Dropout", "Flatten", "Softmax", "Linear", "LogSoftmax"]
    assert model.layers[2].p == 0.25


def test_residual_sums():
    """Identity and projection shortcuts, sums of sums, a formula as shortcut, and pre-activation blocks."""
    g = G((2, 6, 6))
    x = g("Conv", "x", draw(2, 2, 3, 3), pads=[1] * 4)
    inner = g("Add", g("Relu", g("Conv", x, draw(2, 2, 1, 1))), x)
    x = g("Sum", g("Conv", inner, draw(2, 2, 1, 1)), x)
    y = g("Mul", x, g("Sigmoid", x))
    x = g("Add", g("Conv", y, draw(3, 2, 3, 3), pads=[1] * 4), g("Conv", y, draw(3, 2, 1, 1)))
    x = g("Relu", g("Sub", x, g("Conv", x, draw(3, 3, 1, 1))))
    g("Flatten", x)
    model = check(g)
    assert kinds(model) == ["Conv2d", "Residual", "SiLU", "Residual", "Residual", "ReLU", "Flatten"]
    assert isinstance(model.layers[1].layers[0], Residual)
    assert model.layers[3].projection


def test_a_tensor_that_is_used_elsewhere_is_refused():
    g = G((2, 6, 6))
    a = g("Relu", g("Conv", "x", draw(2, 2, 1, 1)))
    b = g("Add", a, "x")
    g("Add", g("Conv", b, draw(2, 2, 1, 1)), a)
    refused(g, "used more than once")
    g = G((2, 6, 6))
    g("Add", g("Relu", "x"), g("Tanh", g("Reshape", "x", [0, 2, 36])))
    refused(g, "(Add)", "shapes")
    g = G((2, 6, 6))
    g("Concat", "x", g("Relu", "x"), axis=1)
    refused(g, "'Concat_1' (Concat)", "not known, other than of constants")
    g = G((2, 6, 6))
    g("Mul", g("Conv", "x", draw(2, 2, 1, 1)), g("Conv", "x", draw(2, 2, 1, 1)))
    refused(g, "(Mul)", "element")


# --- normalisation of pixels and metadata -----------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["unit_first", "one_step", "multiply", "nhwc"])
def test_integer_pixels_become_the_normalization(style):
    mean, std = np.float32([0.4, 0.5]), np.float32([0.2, 0.3])
    shape = (6, 6, 2) if style == "nhwc" else (2, 6, 6)
    g = G(shape, kind=TensorProto.UINT8)
    column = (2,) if style == "nhwc" else (2, 1, 1)
    x = g("Cast", "x", to=TensorProto.FLOAT)
    if style in ("unit_first", "nhwc"):
        x = g("Div", g("Sub", g("Div", x, np.float32(255)), mean.reshape(column)), std.reshape(column))
    elif style == "one_step":
        x = g("Div", g("Sub", x, 255 * mean.reshape(column)), 255 * std.reshape(column))
    else:
        x = g("Add", g("Mul", x, 1 / (255 * std.reshape(column))), (-mean / std).reshape(column))
    if style == "nhwc":
        x = g("Transpose", x, perm=[0, 3, 1, 2])
    g("Flatten", g("Conv", x, draw(3, 2, 3, 3), pads=[1] * 4))
    pixels = RNG.integers(0, 256, (3, *shape), dtype=np.uint8)
    model = check(g, x=pixels, nhwc=style == "nhwc")
    assert kinds(model) == ["Conv2d", "Flatten"]
    np.testing.assert_allclose(model.normalization.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(model.normalization.std, std, rtol=1e-5)
    assert model.normalization.unit == 255
    with pytest.raises(TypeError, match="was trained on uint8 pixels"):
        model.outputs(np.int16(pixels) if style != "nhwc" else np.zeros((1, 2, 6, 6), np.int16))


def test_other_integers_become_the_normalization():
    g = G((4,), kind=TensorProto.INT16)
    x = g("Mul", g("Cast", "x", to=TensorProto.FLOAT), np.float32(0.01))
    g("Gemm", x, draw(4, 2))
    model = check(g, x=RNG.integers(-300, 300, (3, 4), dtype=np.int16))
    assert (model.normalization.unit, model.normalization.integers) == (1, True)


def test_scaled_floating_point_input_goes_into_the_first_layer():
    g = G((1, 6, 6))
    x = g("Div", g("Sub", g("Div", "x", np.float32(255)), np.float32(0.13)), np.float32(0.3))
    g("Conv", x, draw(3, 1, 3, 3), draw(3))
    model = check(g)
    assert kinds(model) == ["Conv2d"]
    assert model.normalization is None
    g = G((1, 6, 6))
    g("Conv", g("Sub", "x", np.float32(0.5)), draw(3, 1, 3, 3), pads=[1] * 4)
    refused(g, "(Conv)", "padded")
    g = G((1, 6, 6))
    g("Conv", g("Sub", "x", draw(6, 6)), draw(3, 1, 3, 3))  # a mean image
    refused(g, "(Sub)", "one a channel, got one a pixel")
    g = G((1, 6, 6))
    g("MaxPool", g("Sub", "x", np.float32(0.5)), kernel_shape=[2, 2])
    refused(g, "(MaxPool)", "the output of the input 'x' is scaled or shifted")
    g = G((1, 6, 6))
    g("Relu", g("Sub", "x", np.float32(0.5)))
    refused(g, "the output of node 'Relu_1' is a formula")


def test_metadata_is_restored():
    names = ["ein", "zwei", "3"]
    metadata = {"class_names": json.dumps(names), "output_kind": "logits"}
    metadata["normalization"] = json.dumps({"mean": [0.1], "std": [0.3], "unit": 255})
    g = G((4,))
    g("Gemm", "x", draw(4, 3))
    model = load(g.proto(metadata=metadata))
    assert model.class_names == tuple(names)
    assert model.output_kind == "logits"
    assert model.normalization.unit == 255
    for key, value in (("class_names", "[1, 2]"), ("class_names", "{"), ("output_kind", "x"), ("normalization", "[]")):
        refused(g.proto(metadata=metadata | {key: value}), "its metadata is damaged")


def test_float64_and_half_precision():
    g = G((4,), kind=TensorProto.DOUBLE)
    g("MatMul", "x", g.constant(draw(4, 3), np.float64))
    proto = g.proto(kind=TensorProto.DOUBLE)
    model = load(proto)
    assert model.dtype == np.float64
    x = images((4,)).astype(np.float64)
    np.testing.assert_allclose(model.outputs(x), run(proto, x), rtol=1e-12)
    g = G((4,))
    g("MatMul", "x", g("Cast", g.constant(draw(4, 3), np.float16), to=TensorProto.FLOAT))
    check(g)


def test_sources_and_devices(tmp_path):
    g = G((4,))
    g("MatMul", "x", draw(4, 3))
    path = tmp_path / "m.onnx"
    onnx.save(g.proto(), path)
    x = images((4,))
    expected = load(g.proto()).outputs(x)
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        np.testing.assert_array_equal(load(source).outputs(x), expected)
    with pytest.raises(ValueError, match="device must be"):
        load(path, device="tpu")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="source must be a path, bytes or a ModelProto, got 3"):
        load(3)
    trained = load(path)
    trained.train()
    tinycnn.SGD(trained, 0.1)  # it can be trained


def test_without_onnx(monkeypatch):
    """The message says what to install; the module itself does not import onnx."""
    command = "import sys, tinycnn.onnx; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: load(b""), lambda: tinycnn.onnx.prepare(None)):
        with pytest.raises(ImportError, match=r'pip install "tinycnn\[onnx\]"'):
            call()


def test_sizes_that_the_graph_does_not_say():
    g = G(("C", "H", "W"))
    g("Conv", "x", draw(2, 3, 3, 3))
    refused(g, "sizes that are not known", "input_shape=(C, H, W)")
    assert load(g.proto(), input_shape=(3, 8, 8)).shapes[-1] == (2, 6, 6)


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def valid():
    g = G((1, 6, 6))
    g("Flatten", g("Relu", g("Conv", "x", draw(2, 1, 3, 3), draw(2))))
    return g.proto()


def test_truncated_and_empty_files(tmp_path):
    content = valid().SerializeToString()
    for cut in (0, 1, 10, len(content) // 2, len(content) - 1):
        path = tmp_path / f"{cut}.onnx"
        path.write_bytes(content[:cut])
        assert refused(path).startswith(str(path))
    with pytest.raises(OnnxError, match="got a folder"):
        load(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_model_or_one_line(data):
    content = bytearray(valid().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(OnnxError):  # no other exception
        load(bytes(content))


def test_cycles_and_orders():
    g = G((4,))
    g.nodes = [helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"])]
    refused(g.proto("b"), "'first' (Add)", "'b' is not computed before it", "cycle")
    g = G((4,))
    g.nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Tanh", ["x"], ["a"])]
    refused(g.proto("a"), "two nodes have an output 'a'")


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((-3,), "positive sizes"),
        ((0,), "positive sizes"),
        ((1, 1 << 20, 1 << 20), "numbers an image"),
        ((), "batch axis"),
    ],
)
def test_impossible_input_shapes(shape, part):
    g = G(shape)
    g("Relu", "x")
    refused(g, "input 'x'", part)


@pytest.mark.parametrize("batch", ["N", None, 0, -1, 3])
def test_batch_axes(batch):
    g = G((4,), batch=batch)
    g("Flatten", g("Relu", "x"))
    assert load(g.proto()).outputs(images((4,), 5)).shape == (5, 4)


def test_negative_batch():
    g = G((4,), batch=-2)
    g("Relu", "x")
    refused(g, "positive sizes, got -2")


def test_impossible_arrays():
    for dims, part in (
        ([-1, 4], "sizes that are possible"),
        ([1 << 40, 4], "possible"),
        ([5, 4], "must have 80 bytes"),
    ):
        g = G((4,))
        g.arrays = [TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 8)]
        g.nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        refused(g.proto(), "initializer 'w'", part)
    g.arrays = [TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], float_data=[1.0] * 5)]
    refused(g.proto(), "initializer 'w'")
    g.arrays = [TensorProto(name="w", data_type=TensorProto.STRING, dims=[4, 3], string_data=[b"a"] * 12)]
    refused(g.proto(), "initializer 'w'", "real numbers, got type STRING")
    g = G((4,), kind=TensorProto.STRING)
    g("Relu", "x")
    refused(g, "input 'x'", "STRING")
    g = G((4,))
    g("MatMul", "x", np.full((4, 3), np.nan))
    refused(g, "(MatMul)", "weight must be finite")


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Range", "Add", "Gather"])
def test_constants_that_would_need_much_memory(op):
    g = G((4,))
    big = [1 << 20, 1 << 20]
    column, row = np.zeros((1 << 16, 1), np.float32), np.zeros((1, 1 << 16), np.float32)
    if op == "ConstantOfShape":
        c = g(op, big)
    elif op == "Expand":
        c = g(op, np.float32(0), big)
    elif op == "Range":
        c = g(op, 0, 1 << 50, 1)
    elif op == "Add":
        c = g(op, column, row)
    else:
        c = g(op, np.zeros((1, 1 << 12), np.float32), np.zeros(1 << 20, np.int64))
    g("MatMul", "x", c)
    refused(g, f"({op})", "more memory")


def test_many_large_layers_of_one_array_are_refused():
    g = G((512,))
    weight = g.constant(np.zeros((512, 512), np.float32))
    x = "x"
    for _ in range(200):
        x = g("MatMul", x, weight)
    refused(g, "(MatMul)", "more memory")


def test_huge_windows():
    for op, options in (
        ("MaxPool", {"kernel_shape": [1 << 60, 1], "pads": [0, 0, 1 << 60, 0]}),
        ("AveragePool", {"kernel_shape": [1, 1], "pads": [1 << 60] * 4, "count_include_pad": 1}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [0, 1]}),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [1 << 62, 1]}),
    ):
        g = G((1, 6, 6))
        g(op, "x", **options)
        refused(g, f"({op})")
    g = G((1, 6, 6))
    g("Conv", "x", draw(1, 1, 3, 3), pads=[1 << 40] * 4)
    refused(g, "(Conv)", "numbers an image")
    g = G((1, 6, 6))
    g("Resize", "x", "", np.float32([1, 1, 1e9, 1]))
    refused(g, "(Resize)")
    g = G((1, 6, 6))
    g("Pad", "x", [0, 0, 1 << 60, 0, 0, 0, 0, 0])
    refused(g, "(Pad)", "numbers an image")


def test_deeply_nested_sums():
    g = G((4,))
    x = "x"
    for _ in range(1500):
        x = g("Add", g("Relu", x), "x")
    refused(g, "recursion")


def test_opsets_domains_functions_and_unknown_types():
    proto = valid()
    proto.opset_import[0].version = 10_000
    refused(proto, "expected an opset in 1 ...", "got 10000")
    proto = valid()
    del proto.opset_import[:]
    refused(proto, "opset")
    proto = valid()
    proto.graph.node[1].domain = "com.microsoft"
    refused(proto, "(Relu)", "its domain 'com.microsoft' is not known")
    proto = valid()
    proto.functions.add(name="f", domain="d")
    refused(proto, "functions (d.f)")
    proto = valid()
    proto.graph.output.add(name="z")
    refused(proto, "expected one output, got 2")
    proto = valid()
    proto.graph.input.add(name="z")
    refused(proto, "expected one input that is no initializer, got 2")
    proto = valid()
    proto.graph.sparse_initializer.add()
    refused(proto, "sparse")
    proto = valid()
    proto.graph.node[0].attribute.add(name="strides", type=onnx.AttributeProto.FLOAT, f=2.0)
    refused(proto, "(Conv)", "attribute strides must be INTS, got FLOAT")
    g = G((4, 4, 2))
    g("Transpose", "x", perm=2.0)
    refused(g, "(Transpose)", "attribute perm must be INTS, got FLOAT")
    proto = valid()
    del proto.graph.node[0].input[1:]
    refused(proto, "(Conv)", "too few inputs")


def test_what_the_graph_does_not_need_is_not_read():
    proto = valid()
    proto.graph.node.add(op_type="Unknown", input=["x"], output=["nobody"])
    load(proto)


def external(tmp_path, location, **fields):
    proto = valid()
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    size = len(tensor.raw_data)
    (tmp_path / "w.bin").write_bytes(b"\0" * 16 + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location, "offset": 16, "length": size} | fields).items():
        tensor.external_data.add(key=key, value=str(value))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder, "w.bin")
    assert np.asarray(load(path).layers[0].weight).any()
    refused(path.read_bytes(), "in another file", "load the model by its path")
    (tmp_path / "outside.bin").write_bytes(b"\0" * 88)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    absolute = str(tmp_path / "outside.bin")
    relative = "../outside.bin", "a/../../outside.bin", "..\\w.bin", "link.bin", "", ".", "w\0.bin"
    for location in (*relative, absolute, "C:\\w.bin"):
        refused(external(folder, location), "inside the file's folder")
    refused(external(folder, "none.bin"), "No such file")
    refused(external(folder, "w.bin", offset=40), "ends before that")
    refused(external(folder, "w.bin", offset=-1), "offset")
    refused(external(folder, "w.bin", offset="a"), "whole numbers")
    refused(external(folder, "w.bin", length=8), "must have 72 bytes")


REFUSALS = {
    "gemm_data": (lambda g: g("Gemm", "x", "x"), "(Gemm)", "must be a constant"),
    "gemm_transposed": (lambda g: g("Gemm", "x", draw(4, 3), transA=1), "(Gemm)", "transA"),
    "matmul_size": (lambda g: g("MatMul", "x", draw(5, 3)), "(MatMul)", "does not fit 4 inputs"),
    "matmul_left": (lambda g: g("MatMul", draw(3, 4), "x"), "(MatMul)", "must be a constant"),
    "batch": (lambda g: g("Reshape", "x", [4, -1]), "(Reshape)", "must keep the batch axis"),
    "transpose": (lambda g: g("Transpose", "x", perm=[1, 0]), "(Transpose)", "batch axis"),
    "cast": (lambda g: g("Cast", "x", to=TensorProto.INT64), "(Cast)", "INT64"),
    "divide": (lambda g: g("Div", "x", np.float32(0)), "(Div)", "zero"),
    "vector": (lambda g: g("MaxPool", "x", kernel_shape=[2, 2]), "(MaxPool)", "must be maps (channels, height, width)"),
    "conv1d": (lambda g: g("Conv", g("Reshape", "x", [0, 2, 2]), draw(1, 2, 1)), "(Conv)", "only 2-D layers"),
    "if": (lambda g: g("If", "x"), "(If)", "not known"),
    "flatten": (lambda g: g("Flatten", "x", axis=0), "(Flatten)", "axis must be 1"),
    "softmax": (lambda g: g("Softmax", "x", axis=0), "(Softmax)", "over the classes"),
    "training": (lambda g: g("BatchNormalization", "x", *[np.ones(4)] * 4, training_mode=1), "training mode"),
    "variance": (lambda g: g("BatchNormalization", "x", *[np.ones(4)] * 3, -np.ones(4)), "variance"),
    "axis": (lambda g: g("LayerNormalization", "x", np.ones(4), axis=0), "axis 0 is the batch"),
    "constant": (lambda g: g("Relu", np.ones(3)), "(Relu)", "its input is a constant"),
    "wide": (lambda g: g("Add", "x", np.ones((3, 4))), "(Add)", "one a channel"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, *parts = REFUSALS[name]
    g = G((4,))
    make(g)
    refused(g, *parts)


def test_graphs_without_layers():
    g = G((4,))
    g("Identity", "x")
    refused(g, "no layers")
    g = G((4,))
    g("Identity", np.ones(3))
    refused(g, "does not depend on the input")


# --- layers that are written as several operators ---------------------------------------------------------------------


def standardized(g, x, axes, eps=1e-3):
    centred = g("Sub", x, g("ReduceMean", x, axes=axes))
    variance = g("ReduceMean", g("Pow", centred, np.float32(2)), axes=axes)
    return g("Div", centred, g("Sqrt", g("Add", variance, np.float32(eps))))


@pytest.mark.parametrize(("axes", "sizes"), [([-1], (6,)), ([2, 3], (5, 6)), ([-3, -2, -1], (4, 5, 6))])
def test_layer_normalization_as_in_old_opsets(axes, sizes):
    g = G((4, 5, 6), opset=13)
    x = standardized(g, "x", axes)
    x = g("Add", g("Mul", x, draw(*sizes)), draw(*sizes))
    g("Conv", x, draw(2, 4, 1, 1))
    model = check(g)
    assert kinds(model) == ["LayerNorm", "Conv2d"]
    assert (model.layers[0].normalized_shape, model.layers[0].eps) == (sizes, 1e-3)


def test_layer_normalization_of_vectors_and_its_incomplete_forms():
    g = G((2, 4, 4), opset=13)
    x = g("Mul", g("Sigmoid", "x"), "x")
    x = standardized(g, g("Flatten", x), [-1])
    g("Gemm", g("Add", g("Mul", x, draw(32)), draw(32)), draw(32, 2))
    assert kinds(check(g)) == ["SiLU", "Flatten", "LayerNorm", "Linear"]
    g = G((8,), opset=13)
    g("Relu", g("ReduceMean", "x", axes=[-1]))
    refused(g, "(Relu)", "part of a layer normalisation")
    g = G((8,), opset=13)
    g("Div", g("Sub", "x", g("ReduceMean", "x", axes=[-1])), g("Sqrt", g("ReduceMean", "x", axes=[-1])))
    refused(g, "(Sqrt)", "part of a layer normalisation")
    g = G((8,), opset=13)
    standardized(g, "x", [0])
    refused(g, "(ReduceMean)", "height and width")


def test_distances_from_centres():
    for gaussian in (False, True):
        g = G((2, 2, 3))
        flat = g("Flatten", g("Relu", "x"))
        x = g("ReduceSumSquare", g("Sub", g("Unsqueeze", flat, [1]), draw(4, 12)), axes=[2], keepdims=0)
        if gaussian:
            g("Exp", g("Mul", x, np.float32(-0.5)))
        model = check(g)
        assert kinds(model) == ["ReLU", "Flatten", "GaussianRBF" if gaussian else "EuclideanRBF"]
    model.train()  # the centres are arrays of the model's own
    model.layers[-1].weight[...] = 0


def test_uneven_pooling_resizing_and_subsampling():
    from tinycnn.onnx._patterns import means

    g = G((2, 5, 7))
    x = g("MatMul", g("MatMul", means(5, 3), "x"), means(7, 9).T)
    x = g("Gather", g("Gather", x, np.arange(4) * 3 // 4, axis=2), np.arange(10) * 9 // 10, axis=3)
    x = g("AveragePool", x, kernel_shape=[2, 5], strides=[2, 5])
    x = g("Add", g("Mul", g("Mul", x, np.float32(10)), draw(2, 1, 1)), draw(2, 1, 1))
    g("Relu", x)
    model = check(g)
    assert kinds(model) == ["AdaptiveAvgPool2d", "Upsample", "Subsample", "ReLU"]
    assert model.layers[0].output_size == (3, 9)
    assert model.layers[1].size == (4, 10)
    g = G((2, 5, 7))
    g("MatMul", draw(3, 5), "x")
    refused(g, "(MatMul)", "means of an adaptive pooling")
    g = G((2, 5, 7))
    g("Gather", "x", np.arange(3), axis=2)
    refused(g, "(Gather)", "pixel i*H // OH")


def test_border_of_the_lowest_number_before_a_max_pooling():
    g = G((2, 6, 7))
    x = g("Pad", "x", [0, 0, 1, 0, 0, 0, 1, 1], np.float32(-np.inf))
    g("MaxPool", x, kernel_shape=[3, 2], strides=[2, 2])
    assert kinds(check(g)) == ["MaxPool2d", "ZeroPad2d"]  # the last row of windows is cropped
    g = G((2, 6, 7))
    x = g("Pad", "x", [0, 0, 1, 0, 0, 0, 1, 1], np.float32(-np.inf))
    g("Conv", x, draw(2, 2, 1, 1))
    refused(g, "(Conv)", "part of")
