"""Build a recipe's model, data, loss and optimizer, and train one seed."""

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from tinycnn import (
    augment,
    data as datasets,
    hardware,
    init,
    layers,
    lecun98,
    losses,
    metrics,
    optim,
    runs,
    schedules,
    train,
)
from tinycnn._interrupts import defer_interrupt
from tinycnn._typing import Rng
from tinycnn.data import Dataset
from tinycnn.dataset import DeviceDataset
from tinycnn.errors import DivergedError, RecipeError
from tinycnn.model import Sequential
from tinycnn.recipes import Recipe, gradients, results
from tinycnn.recipes._calls import evaluate_calls, suggest


def _subclasses(module: ModuleType, base: type) -> dict[str, Any]:
    """The public subclasses of `base` in a module, by name."""
    classes = {n: v for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and n[0] != "_"}
    return {name: cls for name, cls in classes.items() if cls not in (base, layers.Parametric)}


LAYERS = (
    _subclasses(layers, layers.Layer)
    | _subclasses(lecun98, layers.Layer)
    | {"connections": lecun98.connections, "bitmaps": lecun98.bitmaps}
)
LOSSES = _subclasses(losses, losses.Loss) | _subclasses(lecun98, losses.Loss)
del LOSSES["MSELoss"]  # its targets are not class indices
OPTIMIZERS = _subclasses(optim, optim.Optimizer) | {"SDLM": lecun98.SDLM}
SCHEDULES = {name: getattr(schedules, name) for name in ("constant", "step_decay", "cosine", "one_cycle")}
DATA = ("mnist", "fashion", "kmnist", "synthetic", "auto")
IMAGE_SIZE, CLASSES = 28, 10  # of every data set above
INITS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "truncated_normal", "constant_bias")


def build_model(recipe: Recipe, rng: Rng = None, device: str = "cpu") -> Sequential:
    """The recipe's model with fresh weights. Raises RecipeError if the layers do not fit."""
    rng = np.random.default_rng(rng)
    location, line = recipe.location("net.layers")
    stack = evaluate_calls(recipe.net["layers"], LAYERS, location, line)
    try:
        model = Sequential(*stack, input_shape=tuple(recipe.net["input"]), rng=rng, device=device)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise RecipeError(f"{location}, line {line}: {error}") from None
    location, line = recipe.location("net.init")
    for initialize in _inits(recipe, rng):
        try:
            initialize(model)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{location}, line {line}: {error}") from None
    return model


def _inits(recipe: Recipe, rng: np.random.Generator) -> list[Callable[[Sequential], Any]]:
    """The calls in net.init as functions of the model."""
    deferred: list[Callable[[Sequential], Any]] = []

    def defer(function: Callable[..., Any]) -> Callable[..., Any]:
        generator = {"rng": rng} if "rng" in inspect.signature(function).parameters else {}

        def call(*args: Any, **options: Any) -> Callable[[Sequential], Any]:
            inspect.signature(function).bind(None, *args, **options)  # TypeError for a wrong argument
            deferred.append(lambda model: function(model, *args, **options, **generator))
            return deferred[-1]

        return call

    names = LAYERS | {name: defer(getattr(init, name)) for name in (*INITS, "lecun1998")}
    location, line = recipe.location("net.init")
    for value in evaluate_calls(recipe.net.get("init", ""), names, location, line):
        if value not in deferred:
            raise RecipeError(f"{location}, line {line}: net.init must be calls of {', '.join(INITS)}, got {value!r}")
    return deferred


def build_loss(recipe: Recipe) -> Any:
    """The recipe's loss."""
    return _build_one(recipe, "training.loss", recipe.training.get("loss", "CrossEntropyLoss()"), LOSSES, losses.Loss)


def build_optimizer(recipe: Recipe, model: Sequential, steps: int, lr: float | None = None) -> Any:
    """The recipe's optimizer for `steps` steps per epoch; `lr` replaces the recipe's learning rate."""
    schedule = lr_schedule(recipe, steps) if lr is None else lr

    def bind(cls: type) -> Callable[..., Any]:
        return lambda *args, **options: cls(model, *args, lr=schedule, **options)

    names = {name: bind(cls) for name, cls in OPTIMIZERS.items()}
    optimizer = _build_one(recipe, "training.optimizer", recipe.training["optimizer"], names, optim.Optimizer)
    return optim.EMA(optimizer, recipe.training["ema"]) if "ema" in recipe.training else optimizer


def lr_schedule(recipe: Recipe, steps: int) -> Any:
    """The recipe's learning rate: a number, or an array with one rate per step, for `steps` steps per epoch."""
    lr, epochs = recipe.training["lr"], recipe.training["epochs"]
    location, line = recipe.location("training.lr")
    if isinstance(lr, list):
        if len(lr) != epochs:
            raise RecipeError(f"{location}, line {line}: lr must have {epochs} rates, one per epoch, got {len(lr)}")
        return np.repeat(np.array(lr, float), steps)
    if isinstance(lr, str):

        def over_all_steps(schedule: Callable[..., Any]) -> Callable[..., Any]:
            return lambda lr, *args, **options: schedule(lr, epochs * steps, *args, **options)

        names = {name: over_all_steps(schedule) for name, schedule in SCHEDULES.items()}
        lr = _build_one(recipe, "training.lr", lr, names, (np.ndarray, int, float))
    lr = float(lr) if isinstance(lr, int) else lr  # NumPy rejects integers from 2**63 on
    if not np.isfinite(lr).all() or np.min(lr) < 0:
        raise RecipeError(f"{location}, line {line}: lr must be finite and not negative, got {recipe.training['lr']!r}")
    return lr


def _build_one(recipe: Recipe, key: str, text: str, names: Mapping[str, Any], kind: type | tuple[type, ...]) -> Any:
    """The value of the only call in `text`; RecipeError unless it is of `kind`."""
    location, line = recipe.location(key)
    values = evaluate_calls(text, names, location, line)
    if len(values) != 1 or not isinstance(values[0], kind) or isinstance(values[0], bool):
        raise RecipeError(f"{location}, line {line}: {key} must be one call of {', '.join(names)}; got {text!r}")
    return values[0]


@dataclasses.dataclass
class Splits:
    """Training, validation (None without one) and test set of a recipe on the device."""

    train: DeviceDataset
    validation: DeviceDataset | None
    test: DeviceDataset


def load(
    recipe: Recipe, data_dir: str | None = None, name: str | None = None, on_message: Callable[[str], object] = print
) -> Dataset:
    """The recipe's data set, or the one called `name`."""
    return datasets.load(name or recipe.data.get("name", "mnist"), data_dir, on_message)


def prepare_data(
    recipe: Recipe, dataset: Dataset, rng: np.random.Generator, device: str = "cpu", seed: int = 0
) -> Splits:
    """The data set on the device, split, resized, padded and normalised by the recipe's settings.

    rng draws the split, seed the augmentation.
    """
    settings = recipe.data
    images, labels = dataset.train_images, dataset.train_labels
    n_train, n_validation = split_sizes(recipe, dataset)
    train_index, validation_index = np.arange(len(images)), None
    if n_validation:
        train_index, validation_index = datasets.train_val_split(len(images), n_validation, rng)
    if n_train < len(train_index):
        train_index = np.sort(rng.permutation(train_index)[:n_train])
    if "resize" in settings:
        images = augment.resize(images, settings["resize"])
    options: dict[str, Any] = {"padding": settings.get("padding", 0), "device": device}
    options |= {key: settings[key] for key in ("mean", "std") if key in settings}
    augmentation: dict[str, Any] = {"augment": _transforms(recipe), "seed": seed} if "augment" in settings else {}
    train_set = DeviceDataset(
        images[train_index], labels[train_index], class_names=dataset.classes, **options, **augmentation
    )
    pixels = {"mean": train_set.mean, "std": train_set.std}
    validation_set = None
    if validation_index is not None:
        validation_set = DeviceDataset(images[validation_index], labels[validation_index], **options | pixels)
    return Splits(train_set, validation_set, prepare_test(recipe, dataset, pixels, device))


def split_sizes(recipe: Recipe, dataset: Dataset) -> tuple[int, int]:
    """Number of training and of validation images; RecipeError if the data set is too small."""
    settings, available = recipe.data, len(dataset.train_images)
    n_validation = settings.get("validation", 0)
    n_train = settings.get("train", max(available - n_validation, 1))
    if n_train + n_validation > available:
        location, line = recipe.location("data.train" if "train" in settings else "data.validation")
        needed = f"{n_train} + {n_validation} images are needed"
        raise RecipeError(f"{location}, line {line}: {needed}, {dataset.name} has {available}")
    steps, batch = recipe.training.get("steps_per_epoch", 1), min(recipe.training["batch"], n_train)
    if steps * batch > n_train:
        location, line = recipe.location("training.steps_per_epoch")
        needed = f"{steps} batches of {batch} images are needed"
        raise RecipeError(f"{location}, line {line}: {needed}, there are {n_train} images")
    return n_train, n_validation


def _transforms(recipe: Recipe) -> list[Any]:
    names = {cls.__name__: cls for cls in augment.TRANSFORMS}
    return evaluate_calls(recipe.data.get("augment", ""), names, *recipe.location("data.augment"))


def prepare_test(recipe: Recipe, dataset: Dataset, pixels: dict[str, Any], device: str = "cpu") -> DeviceDataset:
    """The test set, resized and padded by the recipe's settings; pixels: mean and std of the training images."""
    settings, images = recipe.data, dataset.test_images
    if "resize" in settings:
        images = augment.resize(images, settings["resize"])
    options: dict[str, Any] = {"padding": settings.get("padding", 0), "device": device}
    return DeviceDataset(images, dataset.test_labels, **options, **pixels)


def check(recipe: Recipe) -> Sequential:
    """Build model, loss, optimizer and transforms of the recipe, without data or training; returns the model.

    Raises RecipeError, with the line, for the first invalid setting.
    """

    def fail(key: str, problem: object) -> NoReturn:
        location, line = recipe.location(key)
        raise RecipeError(f"{location}, line {line}: {problem}") from None

    settings, shape, name = recipe.data, recipe.net["input"], recipe.data.get("name", "mnist")
    if name not in DATA:
        fail("data.name", f"data.name must be one of {', '.join(DATA)}, got {name!r}{suggest(name, DATA)}")
    size = settings.get("resize", IMAGE_SIZE) + 2 * settings.get("padding", 0)
    model = build_model(recipe, 0)
    if list(shape) != [1, size, size]:
        fail("net.input", f"net.input must be {[1, size, size]} with this data.resize and data.padding, got {shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < CLASSES:
        outputs = f"at least {CLASSES} numbers, one per class"
        fail("net.layers", f"the last layer must give {outputs}, got shape {model.shapes[-1]}")
    transforms = _transforms(recipe)
    try:
        augment.Augmentation(transforms, 0, model.ops, np.ones(1), np.zeros(1))
    except (TypeError, ValueError) as error:
        fail("data.augment", error)
    if "tune_lr" in recipe.training and not settings.get("validation"):
        fail("training.tune_lr", "tune_lr needs data.validation")
    loss = build_loss(recipe)
    try:
        loss.ensure_allocated(model.ops, 1, model.shapes[-1][0], model.dtype)
    except (TypeError, ValueError) as error:
        fail("training.loss", error)
    try:
        optimizer = build_optimizer(recipe, model, 1, 1e-3 if "tune_lr" in recipe.training else None)
    except RecipeError:
        raise
    except ValueError as error:
        fail("training.ema", error)
    if optimizer.patterns:
        try:
            loss.curvature(np.zeros((1, model.shapes[-1][0])), 1.0)
        except (AttributeError, ValueError):
            missing = f"second derivatives, which {type(loss).__name__} with these options does not have"
            fail("training.optimizer", f"{type(optimizer).__name__} needs {missing}")
    return model


def run(
    recipe: Recipe,
    seed: int,
    data: Dataset,
    *,
    device: str = "cpu",
    out: str | Path = "runs",
    on_message: Callable[[str], object] = print,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
    on_result: Callable[[dict[str, Any]], object] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one seed of the recipe on `data` (from `load`) and test it. Returns the result, a dict for JSON.

    Writes a run folder under out/<recipe>. A run that diverges has a result too, with the key "diverged". After the
    training, Ctrl-C is deferred until `on_result` has been called with the result.
    """
    settings = recipe.training
    streams = np.random.SeedSequence(seed).spawn(4)  # weights, split, order, augmentation
    rng_weights, rng_split, rng_order = map(np.random.default_rng, streams[:3])
    model = build_model(recipe, rng_weights, device)
    splits = prepare_data(recipe, data, rng_split, device, int(streams[3].generate_state(1)[0]))
    loss = build_loss(recipe)
    batch = min(settings["batch"], len(splits.train))
    steps = settings.get("steps_per_epoch") or -(-len(splits.train) // batch)
    tuning = tune_lr(recipe, data, device, on_message) if "tune_lr" in settings else {}
    tuned_lr = max(tuning, key=tuning.__getitem__) if tuning else None
    optimizer = build_optimizer(recipe, model, steps, tuned_lr)
    sections = {section: getattr(recipe, section) for section in ("net", "data", "training")}
    folder = runs.RunFolder(Path(out) / recipe.name, f"seed-{seed}", {
        "recipe": recipe.name, "seed": seed, **sections, "rate": tuned_lr, "parameters": len(model.theta),
        "pixels": {"mean": splits.train.mean.tolist(), "std": splits.train.std.tolist()},
        "dataset": {"name": data.name, "sha256": data.sha256}, "environment": hardware.environment(device),
    })  # fmt: skip
    train.warm_up(model, loss, optimizer, splits.train, batch)

    gradient_statistics: dict[str, list[dict[str, Any]]] = {}

    def measure(when: str) -> None:
        if settings.get("gradients"):
            gradient_statistics[when] = gradients.statistics(model, loss, splits.train, optimizer.lr)

    measure("at the start")

    def after_epoch(record: dict[str, Any]) -> None:
        folder.add_epoch(record, model)
        if record["epoch"] in (1, settings["epochs"]):
            measure("after one epoch" if record["epoch"] == 1 else "at the end")
        if on_epoch is not None:
            on_epoch(record)

    start, cpu_start = time.perf_counter(), time.process_time()
    source = results.source_file(recipe)
    result: dict[str, Any] = {
        "recipe": recipe.name, "fingerprint": recipe.fingerprint, "seed": seed, "data": data.name,
        "parameters": len(model.theta), **({"file": source} if source else {}),
    } | ({"rate": tuned_lr, "tuning": tuning} if tuning else {})  # fmt: skip
    try:
        train.fit(
            model, loss, optimizer, splits.train, epochs=settings["epochs"], batch_size=batch,
            steps_per_epoch=settings.get("steps_per_epoch"), reshuffle=settings.get("reshuffle", True),
            validation=splits.validation or splits.test, rng=rng_order, on_epoch=after_epoch, progress=progress,
        )  # fmt: skip
    except DivergedError as error:
        result["diverged"] = str(error)
    # Wall-clock time depends on the load of the machine; processor time hardly depends on it.
    result["seconds"], result["cpu_seconds"] = (
        round(time.perf_counter() - start, 1), round(time.process_time() - cpu_start, 1),
    )  # fmt: skip
    result["training_seconds"] = round(sum(record["seconds"] for record in folder.history), 1)
    with defer_interrupt("interrupted: finishing this seed"):
        test_loss, accuracy, outputs = train.evaluate(model, splits.test, loss)
        logits = loss.logits(outputs)
        matrix = metrics.confusion_matrix(data.test_labels, logits.argmax(axis=1), outputs.shape[1])
        extra = {key: result[key] for key in ("recipe", "seed", "training_seconds")} | {"test_loss": test_loss}
        folder.finish(model, splits.test, logits, data.classes, extra)
        report = metrics.report(matrix, data.classes)
        result |= {
            "accuracy": accuracy, "errors": int(report["errors"]), "loss": test_loss,
            **{name: report["macro"][name] for name in ("precision", "recall", "f1")},
            "held_out": "test" if splits.validation is None else "validation",
            "history": {
                key: [float(f"{record[key]:.6g}") for record in folder.history]
                for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy") if folder.history
            },
            **({"gradients": gradient_statistics} if gradient_statistics else {}), "confusion": matrix.tolist(),
            "environment": environment(device),
            "finished": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        if on_result is not None:
            on_result(result)
        on_message(f"run folder: {folder.path}")
        return result


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that compute a result."""
    record: dict[str, Any] = hardware.environment(device) | {"device": hardware.device_name(device)}
    del record["command"]
    return record


TUNING_SEEDS = 1000, 1001, 1002  # different from the reported seeds
_tuned: dict[tuple[str, str, str], dict[float, float]] = {}  # results of `tune_lr` by recipe, data set and device


def tune_lr(
    recipe: Recipe, data: Dataset, device: str = "cpu", on_message: Callable[[str], object] = print
) -> dict[float, float]:
    """{lr: mean validation accuracy of three full runs} for the candidates in `tune_lr`; cached in the process.

    Full runs are needed: a sigmoid LeNet-5 stays on its first plateau for several epochs. Shorter runs would choose the
    rate that leaves it first, but with large rates some seeds never leave it.
    """
    key = recipe.fingerprint, data.sha256, device
    if key not in _tuned:
        accuracies = {}
        for lr in recipe.training["tune_lr"]:
            runs_of_lr = [_validation_accuracy(recipe, data, float(lr), seed, device) for seed in TUNING_SEEDS]
            accuracies[lr] = float(np.mean(runs_of_lr))
            on_message(f"rate {lr:g}: validation accuracy {accuracies[lr]:.2%}")
        _tuned[key] = accuracies
    return _tuned[key]


def _validation_accuracy(recipe: Recipe, data: Dataset, lr: float, seed: int, device: str) -> float:
    """Validation accuracy after a full run; 0 if it diverges."""
    weights, split, order = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    model, splits = build_model(recipe, weights, device), prepare_data(recipe, data, split, device)
    try:
        history = train.fit(
            model, build_loss(recipe), build_optimizer(recipe, model, 1, lr), splits.train,
            epochs=recipe.training["epochs"], batch_size=recipe.training["batch"], validation=splits.validation,
            rng=order, progress=False,
        )  # fmt: skip
    except DivergedError:
        return 0.0
    return float(history[-1]["val_accuracy"])
