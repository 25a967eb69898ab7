"""The arithmetic of the page of `tinycnn demo`, run in Node: layers and digits as the engine and digits.py have them.

TINYCNN_CHAINS is the number of random chains, 60 if it is not set.  With it, MNIST's images are all ten thousand, not
500, and the pictures of digits 300, not 24.
"""

import base64
import copy
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from random_nets import pick, random_input, random_net, randomize

import tinycnn
from tinycnn import Adam, CrossEntropyLoss, Residual, Sequential, data, digits, fit, layers, lecun98, models
from tinycnn.data import DataUnavailableError
from tinycnn.demo._layers import describe
from tinycnn.onnx import _export

SCRIPTS = Path(tinycnn.__file__).parent / "demo"
NODE = shutil.which("node")
CHAINS, IMAGES, PICTURES = 60, 500, 24
if "TINYCNN_CHAINS" in os.environ:
    CHAINS, IMAGES, PICTURES = int(os.environ["TINYCNN_CHAINS"]), 10_000, 300
LAYERS = importlib.import_module("tests.test_gradients").LAYERS  # test_places.py sees that every layer has a row
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")

# A line of JSON is a request, and gets a line.  Numbers of float32 arrays are base64.
SERVER = """
function decode({shape, data}) {
    const bytes = new Uint8Array(Buffer.from(data, "base64"));
    return {shape, data: new Float32Array(bytes.buffer)};
}

function encode({shape, data}) {
    return {shape, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64")};
}

const SERVICES = {
    names: () => Object.keys(LAYERS),
    windows: ({layers}) => layers.map(windowOf),
    prepare({pictures, size}) {
        return pictures.map(({shape: [h, w], data}) => {
            const digit = prepareDigit(new Uint8Array(Buffer.from(data, "base64")), h, w, size);
            return digit && Buffer.from(digit).toString("base64");
        });
    },
    run({layers, arrays, inputs, gradients}) {
        const decoded = Object.entries(arrays).map(([name, tensor]) => [name, decode(tensor)]);
        const chain = buildLayers(layers, Object.fromEntries(decoded));
        return inputs.map((x, n) => {
            const activations = forward(chain, decode(x));
            if (!gradients[n]) {
                return {activations: [encode(activations.pop())], gradients: []};
            }
            const found = backward(chain, activations, decode(gradients[n]));
            return {activations: activations.map(encode), gradients: found.map(encode)};
        });
    },
};

require("readline").createInterface({input: process.stdin}).on("line", line => {
    const request = JSON.parse(line);
    console.log(JSON.stringify(SERVICES[request.service](request)));
});
"""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A function: call(service, **arguments) asks the page's scripts in Node."""
    path = tmp_path_factory.mktemp("node") / "page.js"
    scripts = [(SCRIPTS / name).read_text(encoding="utf-8") for name in ("layers.js", "digits.js")]
    path.write_text("\n".join(['"use strict";', *scripts, SERVER]), encoding="utf-8")
    with subprocess.Popen([NODE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as node:

        def call(service, **arguments):
            node.stdin.write(json.dumps({"service": service, **arguments}) + "\n")
            node.stdin.flush()
            return json.loads(node.stdout.readline())

        yield call
        node.stdin.close()


@pytest.fixture(scope="module")
def mnist():
    try:
        return data.load("mnist")
    except DataUnavailableError:
        pytest.skip("needs MNIST")


def encode(array):
    return {"shape": array.shape, "data": base64.b64encode(array.astype(np.float32).tobytes()).decode()}


def decode(tensor):
    return np.frombuffer(base64.b64decode(tensor["data"]), np.float32).reshape(tensor["shape"])


def run(call, model, x, dy=()):
    """For each of the images x: the page's activations and their gradients for dy, or without dy only the output."""
    described, arrays = describe(model)
    tensors = {name: encode(array) for name, array in arrays.items()}
    answers = call(
        "run", layers=described, arrays=tensors, inputs=[encode(image) for image in x],
        gradients=[encode(g) for g in dy],
    )  # fmt: skip
    return [([decode(t) for t in a["activations"]], [decode(t) for t in a["gradients"]]) for a in answers]


def check(call, model, images=None):
    """Outputs and input gradients are the engine's, to 1e-4 of the largest."""
    for image in random_input(model, 2) if images is None else np.asarray(images, np.float32):
        y = model.forward(image[None])
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
        dx = model.backward(dy)
        [(activations, gradients)] = run(call, model, image[None], dy)
        assert [a.shape for a in activations] == [tuple(shape) for shape in model.shapes]
        assert [g.shape for g in gradients] == [tuple(shape) for shape in model.shapes]
        for got, want in ((activations[-1], y[0]), (gradients[0], dx[0])):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_every_layer_is_in_the_table(call):
    assert set(call("names")) == {layer.__name__ for layer in _export.WRITERS}


@pytest.mark.parametrize("seed", range(CHAINS))
def test_random_chain(call, seed):
    check(call, random_net(seed))


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=8)
@given(data=st.data())
def test_layer(call, name, data):
    layer, shape, draw_input = data.draw(LAYERS[name])
    model = randomize(Sequential(layer, input_shape=shape, rng=0), np.random.default_rng(1))
    x = draw_input(np.random.default_rng(2), shape)
    if getattr(layer, "track_running_stats", True):
        check(call, model, [x])


MODELS = {
    "lenet5": models.lenet5,
    "lenet5-relu-max": lambda rng: models.lenet5("relu", "max", rng=rng),
    "resnet20": models.resnet20,
    "1998": lecun98.lenet5,
}


@pytest.mark.parametrize("name", MODELS)
def test_model(call, name):
    check(call, randomize(MODELS[name](rng=0), np.random.default_rng(1)))


def test_statistics_of_one_image(call):
    """A norm without running statistics has those of the image."""
    check(call, Sequential(layers.BatchNorm2d(3, track_running_stats=False), input_shape=(3, 4, 5), rng=0).eval())


def test_the_first_of_equal_numbers_is_the_largest(call):
    model = Sequential(layers.MaxPool2d(3, 2, 1), input_shape=(2, 7, 8)).eval()
    check(call, model, np.random.default_rng(0).integers(0, 3, (3, 2, 7, 8)))


def test_activations_and_gradients_of_all_layers(call):
    model = Sequential(layers.Conv2d(1, 2, 3), layers.Tanh(), layers.Flatten(), input_shape=(1, 6, 5), rng=0)
    x, dy = random_input(model, 1), np.arange(24, dtype=np.float32)[None]
    [(activations, gradients)] = run(call, model, x, dy)
    y = model.forward(x)
    np.testing.assert_array_equal(activations[0], x[0])
    np.testing.assert_allclose(activations[2].ravel(), y[0], atol=1e-6)
    np.testing.assert_allclose(np.tanh(activations[1]), activations[2], atol=1e-6)
    np.testing.assert_array_equal(gradients[2].ravel(), dy[0])
    np.testing.assert_allclose(gradients[1], gradients[2] * (1 - activations[2] ** 2), atol=1e-5)
    np.testing.assert_allclose(gradients[0], model.backward(dy)[0], atol=1e-5)


WINDOWS = {
    "Conv2d": layers.Conv2d(1, 1, (3, 2), (2, 1), (1, 0), (1, 2)),
    "Conv2d-same": layers.Conv2d(1, 1, 4, padding="same"),
    "MappedConv2d": lecun98.MappedConv2d([[True]], 3),
    "AvgPool2d": layers.AvgPool2d(3, 2, 1),
    "MaxPool2d": layers.MaxPool2d((2, 3), (1, 2), dilation=2),
    "Subsample": lecun98.Subsample(1, (2, 3)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_window(call, name):
    """A change of a pixel changes those outputs in whose window it lies."""
    model = Sequential(copy.deepcopy(WINDOWS[name]), input_shape=(1, 9, 8), rng=0).eval()
    [window] = call("windows", layers=describe(model)[0])
    base = random_input(model, 1)
    y, want = model.forward(base)[0, 0], np.zeros((*model.shapes[-1][1:], 9, 8), bool)
    for i, j, u, v in np.ndindex(*y.shape, *window["kernel"]):
        at = np.array((i, j)) * window["stride"] + np.array((u, v)) * window["dilation"] - window["padding"]
        if (at >= 0).all() and (at < (9, 8)).all():
            want[i, j, at[0], at[1]] = True
    for row, column in np.ndindex(9, 8):
        x = base.copy()
        x[0, 0, row, column] += 100  # the largest of every window
        np.testing.assert_array_equal(model.forward(x)[0, 0] != y, want[:, :, row, column])


def test_layers_without_a_window(call):
    chain = layers.ConvTranspose2d(1, 2, 3), layers.Tanh(), layers.AdaptiveAvgPool2d(2)
    assert call("windows", layers=describe(Sequential(*chain, input_shape=(1, 5, 5)))[0]) == [None] * 3


def test_classes_of_mnist(call, mnist):
    """Every test image gets the class that the engine gives it."""
    model = models.lenet5("relu", "max", rng=0)
    fit(
        model,
        CrossEntropyLoss(),
        Adam(model),
        (mnist.train_images[:12_000, None], mnist.train_labels[:12_000]),
        epochs=1,
    )
    images = mnist.test_images[:IMAGES, None]
    x, want = model.normalization.apply("images", images), model.predict(images)
    assert (want == mnist.test_labels[:IMAGES]).mean() > 0.8
    outputs = [y for part in np.split(x, 20) for y in run(call, model, part)]
    np.testing.assert_array_equal([activations[-1].argmax() for activations, _ in outputs], want)


# --- models that a page cannot compute --------------------------------------------------------------------------------


class Mine(layers.Tanh):
    pass


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Mine(), r"layer 0, Mine\(\), .*must be a layer of tinycnn, unchanged, got .*Mine"),
        (Residual(layers.Tanh(), Mine()), r"layer 0\.layers\.1, Mine"),
        (layers.BatchNorm1d(4, track_running_stats=False), "layer 0, BatchNorm1d.*needs a batch"),
    ],
)
def test_refused_layer(layer, reason):
    with pytest.raises(TypeError, match=reason):
        describe(Sequential(copy.deepcopy(layer), input_shape=(4,)))


def test_input_shape_must_be_known():
    with pytest.raises(ValueError, match="input_shape is not known yet"):
        describe(Sequential(layers.Flatten()))


# --- digits -----------------------------------------------------------------------------------------------------------


def drawing(rng):
    """Grey levels (h, w): up to three strokes of one width, on light or dark paper, mostly with a little noise."""
    h, w = int(rng.integers(200, 301)), int(rng.integers(200, 401))
    y, x = np.mgrid[:h, :w].astype(np.float32)
    scale, radius = rng.uniform(0.3, 0.9) * min(h, w), rng.uniform(1.5, 14)
    corner = np.array([h - scale, w - scale]) * rng.uniform(0.05, 0.95, 2)
    distance = np.full((h, w), np.inf)
    for _ in range(rng.integers(1, 4)):
        a, b, c = corner + scale * rng.random((3, 2))
        for t in np.linspace(0, 1, 60):  # a quadratic curve
            py, px = a * (1 - t) ** 2 + 2 * b * t * (1 - t) + c * t**2
            np.minimum(distance, np.hypot(y - py, x - px), out=distance)
    return place(rng, np.clip(radius - distance + 0.5, 0, 1))


def enlarged(rng, image):
    """A digit of 28 x 28, bilinearly enlarged, anywhere in a picture."""
    h, w = int(rng.integers(200, 301)), int(rng.integers(200, 401))
    side = int(rng.integers(90, min(h, w) + 1))
    digit = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) / 255
    ink = np.zeros((h, w))
    top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
    ink[top : top + side, left : left + side] = digit
    return place(rng, ink)


def place(rng, ink):
    """Ink, 0 ... 1, as a uint8 picture."""
    paper, black = pick(rng, (255, 0), (0, 255), (225, 50), (30, 200))
    noise = pick(rng, 0, 0, 3, 8)
    return np.rint(np.clip(paper + (black - paper) * ink + noise * rng.standard_normal(ink.shape), 0, 255)).astype(
        np.uint8
    )


def prepared(call, pictures, size=28):
    """The page's digits, and None for a blank picture."""
    sent = [{"shape": p.shape, "data": base64.b64encode(p.tobytes()).decode()} for p in pictures]
    answers = call("prepare", pictures=sent, size=size)
    return [None if a is None else np.frombuffer(base64.b64decode(a), np.uint8).reshape(size, size) for a in answers]


def compare(call, pictures, size=28):
    """The page prepares them as digits.py, to one grey level."""
    for picture, got in zip(pictures, prepared(call, pictures, size), strict=True):
        assert got is not None
        assert np.abs(got.astype(int) - digits.prepare(picture, size)).max() <= 1


def test_drawn_digits(call):
    rng = np.random.default_rng(0)
    compare(call, [drawing(rng) for _ in range(PICTURES // 2)])


def test_enlarged_digits_of_mnist(call, mnist):
    rng = np.random.default_rng(1)
    chosen = rng.integers(0, len(mnist.test_images), PICTURES // 2)
    compare(call, [enlarged(rng, mnist.test_images[n]) for n in chosen])


def test_another_size_and_large_pictures(call):
    rng = np.random.default_rng(2)
    compare(call, [drawing(rng)], 32)
    compare(call, [np.kron(drawing(rng), np.ones((6, 5), np.uint8))])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (200, 200)])
@pytest.mark.parametrize("level", [0, 255])
def test_blank_picture(call, shape, level):
    picture = np.full(shape, level, np.uint8)
    with pytest.raises(ValueError, match="blank picture"):
        digits.prepare(picture)
    assert prepared(call, [picture]) == [None]


def test_specks_are_no_digit(call):
    picture = np.full((200, 220), 255, np.uint8)
    picture[50:53, 60:63] = 0
    with pytest.raises(ValueError, match="blank picture"):
        digits.prepare(picture)
    assert prepared(call, [picture]) == [None]


OTHERS = {
    "a second stroke": np.s_[60:66, 150:190],
    "a line as light as a speck": np.s_[60:61, 150:190],
    "a short stroke": np.s_[60:80, 170:190],
    "a shadow at the edge": np.s_[0:150, 195:200],
    "a stroke two pixels away": np.s_[60:66, 122:160],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts_of_the_picture(call, name):
    picture = np.full((180, 200), 255, np.uint8)
    picture[30:150, 100:120] = 0
    picture[30:50, 60:100] = 0
    picture[OTHERS[name]] = 0
    compare(call, [picture, 255 - picture])
