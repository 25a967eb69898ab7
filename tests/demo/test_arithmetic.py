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
from random_nets import random_input, random_net

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
    scripts = [(SCRIPTS / name).read_text(encoding="utf-8") for name in ("layers.js",)]
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
