"""The arithmetic of the page of `tinycnn demo`, run in Node: layers and digits as the engine and digits.py have them.

TINYCNN_CHAINS is the number of random chains, 60 if it is not set; then all test images of MNIST are classified.
"""

import base64
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from random_nets import pick, random_input, random_net

import tinycnn
from tinycnn import data, digits, layers, lecun98, models
from tinycnn.demo._net import describe
from tinycnn.onnx import _export

SCRIPTS = Path(tinycnn.__file__).parent / "demo"
NODE = shutil.which("node")
CHAINS = int(os.environ.get("TINYCNN_CHAINS", "60"))
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
            const dy = gradients[n] ? backward(chain, activations, decode(gradients[n])) : [];
            return {activations: activations.map(encode), gradients: dy.map(encode)};
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


def encode(array):
    return {"shape": array.shape, "data": base64.b64encode(array.astype(np.float32).tobytes()).decode()}


def decode(tensor):
    return np.frombuffer(base64.b64decode(tensor["data"]), np.float32).reshape(tensor["shape"])


def run(call, model, x, dy=()):
    """Activations of the page for each of the images x, and their gradients for dy."""
    described, arrays = describe(model)
    tensors = {name: encode(array) for name, array in arrays.items()}
    answers = call(
        "run", layers=described, arrays=tensors, inputs=[encode(image) for image in x],
        gradients=[encode(g) for g in dy],
    )  # fmt: skip
    return [([decode(t) for t in a["activations"]], [decode(t) for t in a["gradients"]]) for a in answers]


def check(call, model, images=2):
    """Outputs and input gradients are the engine's, to 1e-4 of the largest."""
    x = random_input(model, images)
    for image in x:
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
    from PIL import Image

    digit = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) / 255
    ink = np.zeros((h, w))
    top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
    ink[top : top + side, left : left + side] = digit
    return place(rng, ink)


def place(rng, ink):
    """Ink, 0 ... 1, as a uint8 picture."""
    paper, black = pick(rng, (255, 0), (0, 255), (225, 50), (30, 200))
    noise = pick(rng, 0, 0, 3, 8)
    return np.rint(np.clip(paper + (black - paper) * ink + noise * rng.standard_normal(ink.shape), 0, 255)).astype(np.uint8)


def prepared(call, pictures, size=28):
    """The page's digits, and None for a blank picture."""
    sent = [{"shape": p.shape, "data": base64.b64encode(p.tobytes()).decode()} for p in pictures]
    answers = call("prepare", pictures=sent, size=size)
    return [None if a is None else np.frombuffer(base64.b64decode(a), np.uint8).reshape(size, size) for a in answers]
