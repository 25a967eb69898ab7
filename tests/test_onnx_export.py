"""ONNX graphs of all layers, models and recipes, and of random nets, give the model's outputs in onnxruntime, and when
they are loaded."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from random_nets import random_input, random_net, randomize

import tinycnn
from tinycnn import Residual, Sequential, layers, lecun98, models, recipes, saving
from tinycnn.dataset import Normalization
from tinycnn.onnx import _export
from tinycnn.recipes import build

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
# Its LayerNormalization (opset 17) has errors of 3e-5 before 1.28; before 1.18 it has no opset 21.
OPSETS = (13, 17, 21) if VERSION >= (1, 28) else (13, 14, 16)
LAYERS = importlib.import_module("tests.test_gradients").LAYERS  # test_places.py sees that every layer has a row
MODELS = {
    f"lenet5-{activation}-{pool}": (models.lenet5, (activation, pool))
    for activation in models.ACTIVATIONS
    for pool in models.POOLS
}
MODELS |= {"resnet20": (models.resnet20, ())}
MODELS |= {f"lenet5-1998-{pool}": (lecun98.lenet5, (pool,)) for pool in ("sum", "mean")}


def run(proto, x):
    """Output of onnxruntime for images x; the graph must pass the checker."""
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": x})[0]


def close(got, want):
    """Equal to 1e-5 of the largest."""
    assert got.shape == want.shape
    assert got.dtype == np.float32
    finite = want[np.isfinite(want)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(finite).max(initial=0))


def check(model, opset=17, batches=(1, 3), loads=True):
    """The graph gives the model's outputs, and so does the model that it is loaded as."""
    proto = tinycnn.onnx.export(model, opset=opset)
    loaded = tinycnn.onnx.load(proto) if loads else None
    for n in batches:
        x = random_input(model, n)
        want = model.outputs(x)
        close(run(proto, x), want)
        if loaded is not None:
            close(loaded.outputs(x), want)
    return proto


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12)
@given(data=st.data())
def test_layer(name, data):
    layer, shape, _ = data.draw(LAYERS[name])
    model = randomize(Sequential(layer, input_shape=shape, rng=0), np.random.default_rng(1))
    # The statistics of a batch of one vector are not defined.
    untracked = getattr(layer, "track_running_stats", True) is False
    idle = isinstance(layer, (layers.Dropout, layers.Dropout2d, layers.Flatten, layers.ZeroPad2d))  # may do nothing
    batches = (3,) if untracked else (1, 3)
    check(model, data.draw(st.sampled_from(OPSETS)), batches, loads=not (untracked or idle))


def test_every_layer_has_a_writer_and_a_row():
    known = {name: saving._builtin(name) for module in (layers, lecun98) for name in vars(module)}
    classes = {c for n, c in known.items() if c is not None and c not in (layers.Layer, layers.Parametric)}
    assert classes | {Residual} == set(_export.WRITERS)
    assert {c.__name__ for c in classes} == set(LAYERS)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    function, arguments = MODELS[name]
    check(randomize(function(*arguments, rng=0), np.random.default_rng(1)))


@pytest.mark.parametrize("name", recipes.builtin())
def test_recipe(name):
    recipe = recipes.builtin()[name]
    for choice in (0, -1) if recipe.space else (0,):
        point = {name: values[choice] for name, values in recipe.space.items()}
        check(randomize(build.build_model(recipe.substitute(point), rng=0), np.random.default_rng(1)))


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_nets(first):
    for seed in range(first, first + 20):
        check(random_net(seed), OPSETS[seed % 3])


FORMULAS = [
    lambda: [layers.ScaledTanh(1.2, 0.7), layers.GELU("tanh")],
    lambda: [layers.SiLU(), layers.Softplus(2, threshold=1)],
    lambda: [layers.SiLU(), layers.Softplus(2), layers.ScaledTanh()],
    lambda: [lecun98.Subsample(1, 2), layers.GELU(), layers.Flatten(), layers.ELU(0.3)],
    lambda: [layers.BatchNorm2d(1), Residual(layers.ScaledTanh(1.2, 0.7), layers.Dropout2d())],
    lambda: [layers.ScaledTanh(1.2, 0.7), Residual(layers.SiLU(), layers.Dropout2d())],
]


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("chain", FORMULAS)
def test_formulas_of_formulas(chain, opset):
    """Activations that are written as several nodes, whose input is the output of such nodes, or scaled."""
    check(randomize(Sequential(*chain(), input_shape=(1, 2, 2), rng=0), np.random.default_rng(1)), opset)


@pytest.mark.parametrize("opset", [13, 17, 18, 20, *([21] if VERSION >= (1, 18) else [])])
def test_opsets(opset):
    chain = [
        layers.GroupNorm(2, 4), layers.GELU(), layers.GELU("tanh"), layers.LayerNorm((6, 6)), layers.Flatten(),
        layers.BatchNorm1d(144, track_running_stats=False), layers.LayerNorm(144, bias=False), layers.Linear(144, 3),
        lecun98.EuclideanRBF(np.ones((2, 3))),
    ]  # fmt: skip
    model = randomize(Sequential(*chain, input_shape=(4, 6, 6), rng=0), np.random.default_rng(1))
    proto = check(model, opset, (3,), loads=False)  # statistics of a batch
    assert [entry.version for entry in proto.opset_import] == [opset]
    assert ("GroupNormalization" in {node.op_type for node in proto.graph.node}) == (opset >= 21)


@pytest.mark.parametrize("mean", [[0.3], [0.3, 0.5, 0.1]])
def test_pixels(mean):
    """With uint8_input the graph normalises as the model does."""
    model = Sequential(layers.Conv2d(3, 2, 3), layers.Flatten(), input_shape=(3, 7, 8), rng=0).eval()
    model.normalization = Normalization(np.array(mean), np.array(mean) / 2, 255)
    proto = tinycnn.onnx.export(model, uint8_input=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 7, 8), np.uint8)
    want = model.outputs(images)
    np.testing.assert_allclose(run(proto, images), want, rtol=0, atol=1e-5 * np.abs(want).max())
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(entries["normalization"]) == {"mean": mean, "std": [m / 2 for m in mean], "unit": 255}


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (None, []),
        (None, [layers.Softmax]),
        ("logits", []),
        ("log_probabilities", [layers.LogSoftmax]),
        ("label_logits", []),
    ],
)
def test_probabilities(kind, head):
    model = Sequential(layers.Linear(5, 4), *(layer() for layer in head), input_shape=(5,), rng=0).eval()
    model.output_kind = kind
    x = random_input(model, 3)
    np.testing.assert_allclose(
        run(tinycnn.onnx.export(model, probabilities=True), x), model.predict_proba(x), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(run(tinycnn.onnx.export(model), x), model.outputs(x), rtol=0, atol=1e-5)


def test_names_and_metadata(tmp_path):
    model = models.resnet20(rng=0).eval()
    model.class_names, model.output_kind = [f"Zahl {n}, größer" for n in range(10)], "logits"
    path = tmp_path / "model.onnx"
    proto = tinycnn.onnx.export(model, path)
    assert onnx.load(path) == proto
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in proto.graph.initializer}
    assert list(arrays) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(arrays[name], value)
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(entries["class_names"]) == list(model.class_names)
    assert entries["output_kind"] == "logits"
    assert entries["tinycnn_version"] == proto.producer_version == tinycnn.__version__
    batch, *shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, [axis.dim_value for axis in shape]) == ("N", [3, 32, 32])
    assert path.read_bytes() == tinycnn.onnx.export(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("net", [models.lenet5, models.resnet20])
def test_loaded_models_have_the_layers_and_the_bits(net):
    model = randomize(net(rng=0), np.random.default_rng(1))
    loaded = tinycnn.onnx.load(tinycnn.onnx.export(model))
    assert str(loaded) == str(model)
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(state[name], value)


def test_slice_of_a_model():
    """A feature extractor, and a model whose layers do nothing."""
    check(models.lenet5(rng=0)[:-2])
    check(Sequential(layers.Dropout(), input_shape=(4,)), loads=False)  # the graph has no layers
    check(Sequential(Residual(layers.Dropout(), projection=[layers.Tanh()]), layers.Dropout(), input_shape=(4,)))


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("divisor", [None, 4])
def test_windows_beyond_the_padding(include, divisor):
    """The last windows of ceil_mode count the pixels of the padding only."""
    options = {"ceil_mode": True, "count_include_pad": include, "divisor_override": divisor}
    for shape in ((1, 2, 1), (1, 6, 7)):
        model = Sequential(layers.AvgPool2d((3, 2), (2, 3), (1, 0), **options), input_shape=shape)
        check(model)
    x = np.ones((1, 1, 6, 7), np.float32)
    np.testing.assert_allclose(run(tinycnn.onnx.export(model), x), model.outputs(x), rtol=1e-6)


def test_zeros_around_a_max_pooling():
    """A border of zeros, which onnxruntime before 1.32 takes for the pooling's own."""
    chain = layers.ZeroPad2d(1), layers.Dropout2d(), layers.MaxPool2d(2)
    proto = check(Sequential(*chain, input_shape=(1, 4, 4)))
    (border,) = (a for a in proto.graph.initializer if a.name == proto.graph.node[0].input[2])
    assert 0 < onnx.numpy_helper.to_array(border) < 1e-37


class Doubled(layers.Linear):
    def forward(self, y, x):
        y[...] = 2 * x


def test_refusals(tmp_path):
    def refused(error, message, *chain, shape=(3,), **options):
        path = tmp_path / "refused.onnx"
        with pytest.raises(error, match=message):
            tinycnn.onnx.export(Sequential(*chain, input_shape=shape, rng=0), path, **options)
        assert not path.exists()

    nested = Residual(layers.Tanh(), Doubled(3, 3))
    refused(
        TypeError,
        r"layer 1.layers.1, Doubled\(3, 3\), cannot be exported.*test_onnx_export.Doubled",
        layers.Tanh(),
        nested,
    )
    replaced = layers.Tanh()
    replaced.forward = lambda y, x: None
    refused(TypeError, r"layer 0, Tanh\(\), cannot be exported", replaced)
    refused(ValueError, "input_shape is not known yet", layers.Tanh(), shape=None)
    refused(ValueError, "opset must be in 13 ... .*, got 12", layers.Tanh(), opset=12)
    refused(ValueError, "opset must be in .*, got 99", layers.Tanh(), opset=99)
    refused(ValueError, "uint8_input must be False for a model that was not trained", layers.Tanh(), uint8_input=True)
    refused(ValueError, "needs a model of classes", layers.AvgPool2d(2), shape=(1, 4, 4), probabilities=True)
    with pytest.raises(TypeError, match="model must be a Sequential"):
        tinycnn.onnx.export(layers.Tanh())
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        tinycnn.onnx.export(Sequential(layers.Tanh(), input_shape=(3,)), tmp_path / "no" / "model.onnx")
