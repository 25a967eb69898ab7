"""The CUDA kernels against the CPU kernels, on a GPU or as PTX on the CPU (see conftest.py)."""

import dataclasses

import cuda_calls
import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tests.test_places import KERNELS
from tinycnn import (
    ColorJitter,
    CrossEntropyLoss,
    DeviceDataset,
    DivergedError,
    ElasticTransform,
    RandomAffine,
    Sequential,
    callbacks,
    cuda,
    data,
    evaluate,
    fit,
    kernels,
    layers,
    losses,
    models,
    optim,
    recipes,
    schedules,
    train,
)
from tinycnn.cuda import _launch
from tinycnn.dataset import DataLoader
from tinycnn.recipes import training

pytestmark = pytest.mark.gpu
ORDERS = ["forward", "backward", "shuffled"]


@pytest.fixture(params=["any order"] if ON_GPU else ORDERS)
def order(request):
    """The order of threads and blocks on the CPU; a GPU chooses its own."""
    if not ON_GPU:
        cuda_on_cpu.set_order(request.param)
        yield request.param
        cuda_on_cpu.set_order("forward")


@pytest.fixture(scope="module", autouse=True)
def device():
    _launch.set_device(0)


def run(backend, name, arguments, outputs):
    """Call a kernel on copies of the arguments; returns the outputs."""
    copies = [backend.to_device(np.array(a)) if isinstance(a, np.ndarray) else a for a in arguments]
    getattr(backend, name)(*copies)
    return [np.array(backend.to_host(copies[i])) for i in outputs]


def assert_close(description, got, want, dtype):
    """Equal up to rounding, relative to the largest entry."""
    assert got.shape == want.shape, description
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, description)
        return
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), description)
    finite = np.isfinite(want)
    scale = np.abs(want[finite]).max(initial=1e-30)
    atol = 100 * np.finfo(dtype).eps * scale
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=atol, err_msg=description)


def compare(kernel, dtype, sizes):
    """Run every call of `kernel` on both backends."""
    for name, description, arguments, outputs in cuda_calls.calls(dtype, sizes):
        if name == kernel:
            results = run(cuda, name, arguments, outputs), run(kernels, name, arguments, outputs)
            for got, want in zip(*results, strict=True):
                assert_close(f"{name}: {description}", got, want, dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_small(name, order):
    compare(name, np.float32, cuda_calls.SMALL)


@pytest.mark.parametrize("name", KERNELS)
def test_large(name, order):
    compare(name, np.float64, cuda_calls.LARGE)


# --- whole steps ------------------------------------------------------------------------------------------------------


def lenet5(device, activation, pool, make_optimizer, images, epochs, batch_size):
    """Train on synthetic digits; returns history, parameters and the optimizer's state."""
    x, labels = data.synthetic_digits(images, rng=0)
    batches = DeviceDataset(x, labels, device=device)
    model = models.lenet5(activation, pool, rng=1, device=device)
    optimizer = make_optimizer(model)
    options = {"epochs": epochs, "batch_size": batch_size, "rng": 3, "progress": False}
    history = fit(model, CrossEntropyLoss(), optimizer, batches, **options)
    return history, model.state_dict(), optimizer.state_dict()


OPTIMIZERS = {
    "sgd": lambda model: optim.SGD(model, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    # eps is larger than the usual 1e-8: the step of a gradient of that size would be rounding noise.
    "adamw": lambda model: optim.AdamW(model, schedules.one_cycle(3e-3, 6), eps=1e-4),
}


@pytest.mark.parametrize(
    ("activation", "pool", "optimizer"), [("tanh", "avg", "adamw"), ("relu", "max", "sgd"), ("sigmoid", "avg", "sgd")]
)
def test_training_lenet5_is_the_cpus(activation, pool, optimizer, order):
    """One epoch with a smaller last batch: loss, accuracy, parameters and the step count."""
    images, batch_size = 131, 64
    arguments = activation, pool, OPTIMIZERS[optimizer], images, 1, batch_size
    (got,), parameters, state = lenet5("cuda", *arguments)
    (want,), parameters_cpu, state_cpu = lenet5("cpu", *arguments)
    assert got["train_accuracy"] == want["train_accuracy"]
    assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-5)
    for name, value in parameters_cpu.items():
        np.testing.assert_allclose(parameters[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)
    assert state["_step"] == state_cpu["_step"] == -(-images // batch_size)


def test_training_gives_the_same_bits_again(monkeypatch):
    """Train three times, without and with capture; on the CPU in three orders of threads and blocks."""
    runs = []
    for number, name in enumerate(ORDERS):
        if not ON_GPU:
            cuda_on_cpu.set_order(name)
        if number == 0:
            monkeypatch.setattr(cuda, "capture", lambda step, outputs=(): step)
        _, parameters, state = lenet5("cuda", "tanh", "avg", OPTIMIZERS["adamw"], 131, 2, 64)
        runs.append([a.tobytes() for a in (*parameters.values(), *state.values())])
        monkeypatch.undo()
    if not ON_GPU:
        cuda_on_cpu.set_order("forward")
    assert runs[0] == runs[1] == runs[2]


NETS = {}  # one recipe for each combination of network, loss, optimizer and augmentation
for _name, _recipe in recipes.builtin().items():
    _options = _recipe.net["layers"], _recipe.training.get("loss"), _recipe.training["optimizer"]
    if not _recipe.space:
        NETS.setdefault((*_options, _recipe.data.get("augment"), "ema" in _recipe.training), _name)


@pytest.mark.parametrize("name", NETS.values())
def test_the_first_steps_of_every_recipe_are_the_cpus(name):
    """Two steps of six images: the loss, and the gradient that the second step leaves."""
    (recipe,) = recipes.find(name)
    recipe = dataclasses.replace(
        recipe,
        data={**recipe.data, "train": 12, "validation": 0},
        training={**recipe.training, "batch": 6, "steps_per_epoch": 2},
    )
    images, labels = data.synthetic_digits(20, rng=0)
    digits = data.Dataset("digits", images[:12], labels[:12], images[12:], labels[12:], tuple("0123456789"))
    train_losses, gradients = [], []
    for device in ("cuda", "cpu"):
        model = training.build_model(recipe, 0, device)
        ready = training.prepare_data(recipe, digits, np.random.default_rng(1), device)
        rule = training.build_optimizer(recipe, model, 2, 1e-4 if "tune_lr" in recipe.training else None)
        (record,) = fit(
            model, training.build_loss(recipe), rule, ready.train, epochs=1, batch_size=6, rng=2, progress=False
        )
        train_losses.append(record["train_loss"])
        gradients.append(np.array(model.ops.to_host(model.grad)))
    assert train_losses[0] == pytest.approx(train_losses[1], rel=1e-3)
    assert np.linalg.norm(gradients[0] - gradients[1]) <= 2e-2 * np.linalg.norm(gradients[1])


RADIAL = [layers.Linear(27, 6), layers.GaussianRBF(6, 4, 0.3)]


@pytest.mark.parametrize(
    ("last", "criterion", "averaged"),
    [([layers.Linear(27, 4)], CrossEntropyLoss(), False), (RADIAL, losses.OneHotMSELoss(), True)],
)
def test_a_step_neither_allocates_nor_copies(last, criterion, averaged, monkeypatch):
    """Required for capture.  The first step may: it compiles and allocates."""
    x, labels = np.random.default_rng(2).integers(0, 256, (9, 8, 8), np.uint8), np.arange(9) % 4
    chain = layers.Conv2d(1, 3, 3), layers.Tanh(), layers.MaxPool2d(2), layers.Flatten(), *last
    distortions = RandomAffine(degrees=10), ElasticTransform(), ColorJitter(brightness=0.1)
    batches = DeviceDataset(x, labels, augment=distortions, device="cuda")
    model = Sequential(*chain, rng=1, device="cuda")
    optimizer = optim.AdamW(model, 1e-3)
    optimizer = optim.EMA(optimizer) if averaged else optimizer
    model.set_input_shape(batches.image_shape)
    step = train.StepRunner(model, criterion, DataLoader(batches, augment=True), optimizer)
    step.step(4)

    def refuse(*arguments):
        raise AssertionError("a step allocates, copies or waits")

    for name in ("empty", "to_device", "to_host", "copy_to"):
        monkeypatch.setattr(cuda, name, refuse)
        monkeypatch.setattr(_launch, name, refuse)
    step.step(4)
    monkeypatch.undo()
    assert cuda.to_host(step.totals)[2] == 8


def test_averaged_training_of_radial_basis_functions_is_the_cpus():
    """With learning rates that change during training, which a captured step reads from the device."""
    x, labels = data.synthetic_digits(70, rng=0)
    results = []
    for device in ("cpu", "cuda"):
        chain = layers.AvgPool2d(4), layers.Flatten(), layers.Linear(49, 8), layers.GaussianRBF(8, 10, 0.3)
        model = Sequential(*chain, rng=1, device=device)
        train_set, validation = (DeviceDataset(x[at], labels[at], device=device) for at in (slice(60), slice(60, 70)))
        optimizer = optim.EMA(optim.SGD(model, 0.5, momentum=0.9), 0.8)
        plateau = callbacks.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.3)
        history = fit(
            model, losses.OneHotMSELoss(), optimizer, train_set, epochs=4, batch_size=20, validation=validation, rng=3,
            on_epoch=lambda record, plateau=plateau: plateau.step(record["val_loss"]), progress=False,
        )  # fmt: skip
        state = optimizer.state_dict()
        results.append([[r["val_loss"] for r in history], [r["lr"] for r in history], *model.state_dict().values(),
                      state["average"], state["rates"], state["velocity"]])  # fmt: skip
        assert optimizer.lr < 0.1
        np.testing.assert_array_equal(np.array(model.ops.to_host(model.theta)), state["average"])
        assert state["_averaged"] == state["_step"] == 12
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_evaluation_and_forward_are_the_cpus():
    x, labels = np.random.default_rng(2).integers(0, 256, (5, 9, 8), np.uint8), np.arange(5)
    logits = []
    for device in ("cpu", "cuda"):
        chain = layers.Conv2d(1, 3, 3), layers.ReLU(), layers.MaxPool2d(2), layers.Flatten(), layers.Linear(27, 5)
        model = Sequential(*chain, rng=1, device=device)
        batches = DeviceDataset(x, labels, mean=0.1, std=0.3, device=device)
        _, _, out = evaluate(model, batches, batch_size=3)
        logits.append(out)
        images = (x[:, None] / 255 - 0.1) / 0.3
        np.testing.assert_allclose(model.forward(images), out, rtol=0, atol=1e-5)
        dx = model.backward(np.ones_like(out))
        assert dx.shape == images.shape
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5)


def test_a_diverged_run_names_step_and_layer():
    x, labels = np.random.default_rng(2).random((6, 4, 4)), np.arange(6)
    model = Sequential(layers.Flatten(), layers.Linear(16, 10), layers.ReLU(), layers.Linear(10, 10), rng=1,
                       device="cuda")  # fmt: skip
    batches = DeviceDataset(x, labels, device="cuda")
    rates = np.array([0.1, 1e38, 0.1, 0.1])
    before = cuda.to_host(model.theta).copy()
    with pytest.raises(DivergedError, match=r"step 3 \(epoch 1\).*layer") as caught:
        fit(model, CrossEntropyLoss(), optim.SGD(model, rates), batches, epochs=2, batch_size=2, rng=0, progress=False)
    assert (caught.value.step, caught.value.epoch) == (3, 1)
    np.testing.assert_array_equal(cuda.to_host(model.theta), before)
