"""Every recipe trains the same bits as when bits.json was written: a rename or rewrite must not change a number.

Each recipe is cut to a few steps on synthetic digits and goes through `training.run`, as in `reproduce`. The test
compares statistics of the parameters and the losses with bits.json to 1e-4, on every machine. It also compares the
SHA-256 of the parameters if the processor's features and the versions of Numba, llvmlite, NumPy and libc are those that
bits.json was written with. LLVM chooses instructions by the processor's features, so other features may round
differently. A recipe that was added on another machine has no hash: null.

`python tests/recipes/test_bits.py` writes bits.json anew, after a change that is meant to change numbers.
"""

import dataclasses
import hashlib
import json
import math
import platform
import sys
import tempfile
from pathlib import Path

import llvmlite
import numba
import numpy as np
import pytest
from numba.core.registry import cpu_target

from tinycnn import BatchNorm2d, data, recipes, runs
from tinycnn.recipes import build, training

FILE = Path(__file__).with_name("bits.json")
TOLERANCE = 1e-4
TRAIN, TEST, VALIDATION = 520, 40, 20  # images; SDLM looks at 500 before an epoch
EPOCHS = 2


def machine():
    """What the bits depend on beside the source."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    return {
        "target": triple, "processor": processor, "features": hashlib.sha256(features.encode()).hexdigest()[:16],
        "libc": "-".join(platform.libc_ver()), "numba": numba.__version__, "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
    }  # fmt: skip


def digits():
    images, labels = data.synthetic_digits(TRAIN + TEST, rng=0)
    classes = tuple("0123456789")
    return data.Dataset("digits", images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:], classes)


def shortened(recipe):
    """The recipe with few images and steps; a search at the last point of its space, a tuned rate at its middle."""
    if recipe.space:
        recipe = recipe.substitute({name: values[-1] for name, values in recipe.space.items()})
    cut = {key: value for key, value in recipe.data.items() if key != "train"}
    if "validation" in cut:
        cut["validation"] = VALIDATION
    more = dict(recipe.training)
    rates = more.pop("tune_lr", None)
    if rates:
        more["lr"] = rates[len(rates) // 2]
    if isinstance(more["lr"], list):
        more["lr"] = more["lr"][:EPOCHS]
    large = len(build.build_model(recipe, 0).theta) > 10**6
    more |= {"epochs": EPOCHS, "steps_per_epoch": 2 if large else 10 if more["batch"] == 1 else 5}
    return dataclasses.replace(recipe, data=cut, training=more)


def trained(recipe, dataset, patch, out):
    """Statistics of the parameters and losses after the training, and the hash of the parameters."""
    models = []
    patch.setattr(runs.RunFolder, "finish", lambda folder, model, *rest: models.append(model))
    result = training.run(shortened(recipe), 0, dataset, out=out, on_message=lambda text: None, progress=False)
    theta = np.asarray(models[0].theta)
    wide = theta.astype(np.float64)
    signs = np.random.default_rng(1).choice((-1.0, 1.0), len(wide))
    statistics = {
        "sha256": hashlib.sha256(theta.astype("<f4").tobytes()).hexdigest(), "parameters": len(theta),
        "mean": wide.mean(), "rms": math.sqrt(np.mean(wide**2)), "max": np.abs(wide).max(),
        "projection": signs @ wide / math.sqrt(len(wide)), "train_loss": result["history"]["train_loss"][-1],
        "test_loss": result["loss"],
    }  # fmt: skip
    if any(isinstance(layer, BatchNorm2d) for layer in models[0].layers):
        # The gradient of a bias before a batch norm is 0 up to rounding, and Adam scales that to full steps: on another
        # processor such biases differ. The training loss does not depend on them, these two statistics do.
        del statistics["projection"], statistics["test_loss"]
    return statistics


RECORD = json.loads(FILE.read_text()) if FILE.exists() else {"machine": {}, "recipes": {}}


@pytest.fixture(scope="module")
def dataset():
    return digits()


def test_every_recipe_is_recorded():
    assert list(RECORD["recipes"]) == list(recipes.builtin())


@pytest.mark.parametrize("name", recipes.builtin())
def test_a_recipe_trains_the_same_bits(name, dataset, monkeypatch, tmp_path):
    expected = RECORD["recipes"][name]
    found = trained(recipes.builtin()[name], dataset, monkeypatch, tmp_path)
    assert found.keys() == expected.keys()
    assert found["parameters"] == expected["parameters"]
    for key in found.keys() - {"sha256", "parameters"}:
        np.testing.assert_allclose(found[key], expected[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)
    if machine() == RECORD["machine"] and expected["sha256"] is not None:
        assert found["sha256"] == expected["sha256"]


if __name__ == "__main__":
    found = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        dataset = digits()
        for name, recipe in recipes.builtin().items():
            found[name] = trained(recipe, dataset, patch, folder)
            print(name, found[name], file=sys.stderr)
    FILE.write_text(json.dumps({"machine": machine(), "recipes": found}, indent=1) + "\n")
