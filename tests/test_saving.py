"""A model as a file: every layer, what is kept, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tinycnn
from tests.test_gradients import LAYERS
from tinycnn import (
    SGD,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Dropout,
    Flatten,
    Layer,
    Linear,
    LogSoftmax,
    ReLU,
    Residual,
    Sequential,
    Softmax,
    Tanh,
    checkpoint,
    fit,
    models,
)
from tinycnn.errors import DamagedCheckpointError, UnknownLayerError
from tinycnn.saving import decode, encode

RNG = np.random.default_rng(0)


def net():
    return Sequential(
        Conv2d(1, 2, 3, padding="same", bias=False), ReLU(),
        Residual(Conv2d(2, 3, 3, padding=1), Tanh(), projection=Conv2d(2, 3, 1)),
        Flatten(), Dropout(0.25), Linear(192, 4), input_shape=(1, 8, 8), rng=3,
    )  # fmt: skip


def digits(n=40):
    return DeviceDataset(RNG.integers(0, 256, (n, 8, 8), dtype=np.uint8), np.arange(n) % 4)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_layer_is_rebuilt_from_its_arguments(name, data):
    layer = data.draw(LAYERS[name])[0]
    again = decode(json.loads(json.dumps(encode(layer))), {})
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert repr(again.config()) == repr(layer.config())


def test_all_is_kept(tmp_path):
    model, data = net(), digits()
    model[0].requires_grad = False
    fit(model, CrossEntropyLoss(), SGD(model, lr=0.1), data, epochs=1, rng=0, progress=False)
    model.class_names = ["a", "b", "c", "d"]
    model.save(tmp_path / "model.safetensors")
    again = tinycnn.load(tmp_path / "model.safetensors")
    raw = RNG.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    assert not again.training
    np.testing.assert_array_equal(again(raw), model.eval()(raw))
    np.testing.assert_array_equal(again.predict(raw), model.outputs(raw).argmax(axis=1))
    assert again.class_names == ("a", "b", "c", "d")
    assert again.output_kind == model.output_kind
    assert repr(again) == repr(model)
    assert [layer.requires_grad for layer in again] == [layer.requires_grad for layer in model]
    assert str(again.normalization) == str(model.normalization)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    fit(again, CrossEntropyLoss(), SGD(again, lr=0.1), data, epochs=1, rng=0, progress=False)


def test_float64_and_no_input_shape(tmp_path):
    model = Sequential(Flatten(), Linear(4, 2), dtype=np.float64)
    model.save(tmp_path / "m.safetensors")
    again = tinycnn.load(tmp_path / "m.safetensors")
    assert again.input_shape is None
    assert again.dtype == np.float64
    x = RNG.normal(size=(3, 1, 2, 2))
    np.testing.assert_array_equal(again(x), model(x))


class Shift(Layer):
    """A user's layer with an argument."""

    def __init__(self, by):
        self.by = by

    def forward(self, y, x):
        y[...] = x + self.by

    def backward(self, dx, dy, x, y):
        dx[...] = dy


class Secret(Layer):
    """A user's layer that does not keep its argument."""

    def __init__(self, key):
        self.hidden = key


def test_layers_of_users(tmp_path):
    model = Sequential(Shift(2.0), Flatten(), Linear(4, 2), input_shape=(1, 2, 2))
    model.save(tmp_path / "m.safetensors")
    x = RNG.normal(size=(3, 1, 2, 2))
    again = tinycnn.load(tmp_path / "m.safetensors", custom_layers={"Shift": Shift})
    np.testing.assert_array_equal(again(x), model(x))
    with pytest.raises(UnknownLayerError, match="a layer Shift, which is not known; give its class: custom_layers"):
        tinycnn.load(tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="has no attribute key"):
        Sequential(Secret(3), input_shape=(1, 2, 2)).save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_users_class_does_not_pass_for_ours(tmp_path):
    """A class of the same name as one of this library's."""
    mine = type("Tanh", (Layer,), {"forward": Shift.forward, "backward": Shift.backward, "by": 1.0})
    model = Sequential(mine(), input_shape=(1, 2, 2))
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(UnknownLayerError):
        tinycnn.load(tmp_path / "m.safetensors")


BATCH_NORM = {"layer": "BatchNorm2d", "num_features": 10**12, "affine": False, "track_running_stats": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("format"), "holds no model"),
        (lambda m: m.update(version=99), "expected version 1, got 99"),
        (lambda m: m.pop("layers"), "layers"),
        (lambda m: m["layers"].pop(), "state does not fit the model"),
        (lambda m: m["layers"][0].update(stride="x"), "stride"),
        (lambda m: m["layers"][0].update(surprise=1), "surprise"),
        (lambda m: m["layers"].__setitem__(1, 5), "tinycnn layers, got 5"),
        (lambda m: m.update(dtype="object"), "dtype"),
        (lambda m: m.update(frozen=["17"]), "17"),
        (lambda m: m.update(output_kind="?"), "output_kind"),
        (lambda m: m.update(input_shape=[1, 9]), "layer 0"),
        (lambda m: m["layers"][-1].update(layer="os.system"), "os.system"),
        (
            lambda m: m["layers"][-1].update(out_features=10**12),
            r"5\.weight must have shape \(1000000000000, 192\), got",
        ),
        (lambda m: m["layers"][0].update(kernel_size=10**6), r"0\.weight must have shape"),
        (lambda m: m["layers"].insert(0, BATCH_NORM), "BatchNorm2d.* more channels than the file has numbers"),
        (lambda m: m["layers"][-1].update(in_features=10**400), "in_features|digits|shape"),
        (lambda m: m["layers"].insert(0, {"layer": "LeakyReLU", "negative_slope": 10**400}), "negative_slope"),
        (lambda m: m["layers"].insert(0, {"layer": "x\n\x1b[31m" * 1000}), "a layer x"),
        (lambda m: m.update(version="x" * 10_000), "expected version 1, got 'xxx"),
        (lambda m: m.update(output_kind="\n" * 10_000), "output_kind"),
        (lambda m: m["layers"][-1].update(layer="Layer"), "Layer"),
        (lambda m: m["layers"][-1].update(layer="np"), "np"),
    ],
)
def test_a_changed_file_is_refused_by_name(tmp_path, change, message):
    net().save(tmp_path / "m.safetensors")
    arrays, metadata = checkpoint.load(tmp_path / "m.safetensors")
    change(metadata)
    checkpoint.save(tmp_path / "m.safetensors", arrays, metadata)
    with pytest.raises((DamagedCheckpointError, UnknownLayerError), match=message) as caught:
        tinycnn.load(tmp_path / "m.safetensors")
    text = str(caught.value)
    assert str(tmp_path / "m.safetensors") in text
    assert len(text) < 1000
    assert text.isprintable()


def test_a_state_dict_is_not_a_model(tmp_path):
    checkpoint.save(tmp_path / "w.safetensors", net().state_dict())
    with pytest.raises(DamagedCheckpointError, match=r"holds no model, but \d+ arrays: \['0\.weight'"):
        tinycnn.load(tmp_path / "w.safetensors")


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predictions_and_probabilities():
    model = models.lenet5(rng=0)
    x = RNG.normal(size=(7, 1, 28, 28))
    logits = model.outputs(x)
    np.testing.assert_array_equal(model.predict(x, batch_size=3), logits.argmax(axis=1))
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(x), expected, rtol=1e-5)
    model.output_kind = "label_logits"
    np.testing.assert_array_equal(model.predict(x), logits > 0)
    np.testing.assert_allclose(model.predict_proba(x), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    model.output_kind = "distances"
    np.testing.assert_array_equal(model.predict(x), logits.argmin(axis=1))
    model.output_kind = "values"
    np.testing.assert_array_equal(model.predict(x), logits)
    with pytest.raises(ValueError, match=r"predict_proba needs a model of classes or labels; .* are values"):
        model.predict_proba(x)


@pytest.mark.parametrize("last", [Softmax, LogSoftmax])
def test_probabilities_of_a_model_that_ends_in_a_softmax(last):
    plain = Sequential(Flatten(), Linear(4, 3), input_shape=(1, 2, 2), rng=1)
    model = Sequential(Flatten(), Linear(4, 3), last(), input_shape=(1, 2, 2), rng=1)
    x = RNG.normal(size=(7, 1, 2, 2))
    np.testing.assert_allclose(model.predict_proba(x), plain.predict_proba(x), rtol=1e-5)


def test_predictions_of_other_outputs():
    one = Sequential(Flatten(), Linear(4, 1), input_shape=(1, 2, 2))
    maps = Sequential(Tanh(), input_shape=(1, 2, 2))
    x = RNG.normal(size=(7, 1, 2, 2))
    np.testing.assert_array_equal(one.predict(x), one.outputs(x))
    np.testing.assert_array_equal(maps.predict(x), maps.outputs(x))
    with pytest.raises(ValueError, match="no vectors"):
        maps.predict_proba(x)


@pytest.mark.parametrize("names", ["abc", [1, 2], ["a", "a"], []])
def test_class_names_are_checked(names):
    with pytest.raises((TypeError, ValueError), match="class_names must be"):
        net().class_names = names
