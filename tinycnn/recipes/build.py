"""Build a recipe's model, data, loss, optimizer and callbacks."""

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from tinycnn import (
    augment,
    callbacks,
    data as datasets,
    init,
    layers,
    lecun98,
    losses,
    optim,
    schedules,
    train,
)
from tinycnn._typing import Array, CompileProgress, Rng
from tinycnn.data import Dataset
from tinycnn.dataset import DeviceDataset
from tinycnn.errors import RecipeError
from tinycnn.model import Sequential
from tinycnn.recipes import Recipe
from tinycnn.recipes._calls import evaluate_calls, suggest


def _subclasses(module: ModuleType, base: type) -> dict[str, Any]:
    """The public subclasses of `base` in a module, by name."""
    classes = {n: v for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and n[0] != "_"}
    return {name: cls for name, cls in classes.items() if cls not in (base, layers.Parametric)}


LAYERS = (
    _subclasses(layers, layers.Layer)
    | _subclasses(lecun98, layers.Layer)
    | {"connections": lecun98.connections, "bitmaps": lecun98.bitmaps}
    | {"places": lecun98.places, "cyclic": lecun98.cyclic}
)
LOSSES = _subclasses(losses, losses.Loss) | _subclasses(lecun98, losses.Loss)
del LOSSES["MSELoss"]  # its targets are not class indices
OPTIMIZERS = _subclasses(optim, optim.Optimizer) | {"SDLM": lecun98.SDLM}
SCHEDULES = {name: getattr(schedules, name) for name in ("constant", "step_decay", "cosine", "one_cycle")}
DATA = ("mnist", "fashion", "kmnist", "synthetic", "auto")
DIGITS = ("mnist", "synthetic", "auto")  # those of them that were prepared as `digits.prepare` does
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


def build_callbacks(recipe: Recipe, optimizer: Any) -> list[Any]:
    """The recipe's callbacks."""
    location, line = recipe.location("training.callbacks")
    names = {
        "EarlyStopping": callbacks.EarlyStopping,
        "ReduceLROnPlateau": functools.partial(callbacks.ReduceLROnPlateau, optimizer),
    }
    made = evaluate_calls(recipe.training.get("callbacks", ""), names, location, line)
    for callback in made:
        if callback.monitor.startswith("val_") and not recipe.data.get("validation"):
            raise RecipeError(f"{location}, line {line}: {type(callback).__name__} needs data.validation")
    return made


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
    recipe: Recipe,
    data_dir: str | None = None,
    name: str | None = None,
    on_message: Callable[[str], object] = print,
    download: bool = True,
) -> Dataset:
    """The recipe's data set, or the one called `name`: a name of `DATA`, or a path of the user's own images."""
    settings, name = recipe.data, name or recipe.data.get("name", "mnist")
    if name in DATA:
        return datasets.load(name, data_dir, on_message, download)
    return datasets.from_files(
        name, shape=picture_shape(recipe), fit=settings.get("fit", "pad"),
        skip_bad=settings.get("skip_bad", False), on_message=on_message,
    )  # fmt: skip


def picture_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(channels, height, width) of a picture before data.resize and data.padding."""
    if len(recipe.net["input"]) != 3:
        location, line = recipe.location("net.input")
        raise RecipeError(
            f"{location}, line {line}: net.input must be [channels, height, width], got {recipe.net['input']}"
        )
    channels, height, width = recipe.net["input"]
    border = 2 * recipe.data.get("padding", 0)
    if "resize" in recipe.data:
        return channels, IMAGE_SIZE, IMAGE_SIZE
    return channels, height - border, width - border


def is_own(name: str) -> bool:
    """Whether the name of a data set is a path.  ValueError for what is neither a known name nor an existing path."""
    if name in DATA:
        return False
    if not Path(name).exists():
        looks_like_a_path = {os.sep, "."} & set(name)
        hint = "" if looks_like_a_path else suggest(name, DATA)
        raise ValueError(f"--data must be one of {', '.join(DATA)}, or a folder or a file, got {name!r}{hint}")
    return True


def load_for(
    recipe: Recipe, name: str, data_dir: str | None = None, on_message: Callable[[str], object] = print
) -> tuple[Recipe, Dataset]:
    """(recipe, data set) for a training on the data set `name`.

    For the user's own images the recipe gets their path, one output for each class if its last layer is `Linear`, a
    validation set of a sixth, and all training images, unless these are set by hand.
    """
    if not is_own(name):
        recipe = dataclasses.replace(recipe, data=recipe.data | {"name": name})
        return recipe, load(recipe, data_dir, on_message=on_message)
    net, settings = dict(recipe.net), recipe.data | {"name": str(Path(name).resolve())}
    settings = {key: value for key, value in settings.items() if key not in ("resize", "mean", "std")}
    recipe = dataclasses.replace(recipe, data=settings)
    dataset = load(recipe, on_message=on_message)
    count, classes = len(dataset.train_images), len(dataset.classes)
    for key, value in (("train", None), ("validation", count // 6)):
        if f"data.{key}" not in recipe.overridden:
            settings.pop(key, None)
            settings |= {} if value is None else {key: value}
    last = re.search(r"Linear\((\w+=)?(\d+), *(\w+=)?(\d+)([^()]*)\)[\s,]*$", net["layers"])
    if last and int(last[4]) != classes and "net.layers" not in recipe.overridden:
        net["layers"] = f"{net['layers'][: last.start()]}Linear({last[2]}, {classes}{last[5]})"
        on_message(f"{classes} classes: the last layer is Linear({last[2]}, {classes}{last[5]})")
    return dataclasses.replace(recipe, net=net, data=settings), dataset


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


def validation_set(recipe: Recipe, dataset: Dataset, pixels: dict[str, Any], seed: int) -> DeviceDataset:
    """The validation set of a run with this seed, on the CPU."""
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(4)[1])
    images, labels = dataset.train_images, dataset.train_labels
    _, index = datasets.train_val_split(len(images), recipe.data["validation"], rng)
    return _prepare(recipe, images[index], labels[index], pixels, "cpu")


def prepare_test(recipe: Recipe, dataset: Dataset, pixels: dict[str, Any], device: str = "cpu") -> DeviceDataset:
    """The test set, resized and padded by the recipe's settings; pixels: mean and std of the training images."""
    return _prepare(recipe, dataset.test_images, dataset.test_labels, pixels, device)


def _prepare(recipe: Recipe, images: Array, labels: Array, pixels: dict[str, Any], device: str) -> DeviceDataset:
    settings = recipe.data
    if "resize" in settings:
        images = augment.resize(images, settings["resize"])
    return DeviceDataset(images, labels, padding=settings.get("padding", 0), device=device, **pixels)


def outputs(recipe: Recipe, model: Sequential, images: Array, pixels: dict[str, Any], device: str = "cpu") -> Array:
    """The model's outputs (N, K) for images (N, H, W) or (N, C, H, W) uint8 that are prepared like the test set."""
    dataset = _prepare(recipe, images, np.zeros(len(images), np.int64), pixels, device)
    return train.evaluate(model, dataset, build_loss(recipe))[2]


def warm_up(recipe: Recipe, device: str = "cpu", on_progress: CompileProgress | None = None) -> float:
    """Compile the kernels of the recipe's steps.  Returns the seconds it took.   on_progress: see `train.warm_up`"""
    model, batch = build_model(recipe, 0, device), recipe.training["batch"]
    shape = list(recipe.net["input"])
    shape[1:] = [size - 2 * recipe.data.get("padding", 0) for size in shape[1:]]
    augmentation: dict[str, Any] = {"augment": _transforms(recipe)} if "augment" in recipe.data else {}
    images = np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)
    labels = np.arange(batch) % model.shapes[-1][0]
    dataset = DeviceDataset(images, labels, padding=recipe.data.get("padding", 0), device=device, **augmentation)
    optimizer = build_optimizer(recipe, model, 1, 1e-3 if "tune_lr" in recipe.training else None)
    return train.warm_up(model, build_loss(recipe), optimizer, dataset, batch, on_progress)


def check(recipe: Recipe, classes: int = CLASSES) -> Sequential:
    """Build model, loss, optimizer and transforms of the recipe, without data or training; returns the model.

    classes  of the data set

    Raises RecipeError, with the line, for the first invalid setting.
    """

    def fail(key: str, problem: object) -> NoReturn:
        location, line = recipe.location(key)
        raise RecipeError(f"{location}, line {line}: {problem}") from None

    settings, shape, name = recipe.data, recipe.net["input"], recipe.data.get("name", "mnist")
    if name not in DATA and not Path(name).exists():
        fail("data.name", f"data.name must be one of {', '.join(DATA)}, got {name!r}{suggest(name, DATA)}")
    size = settings.get("resize", IMAGE_SIZE) + 2 * settings.get("padding", 0)
    picture_shape(recipe)
    model = build_model(recipe, 0)
    if name in DATA and list(shape) != [1, size, size]:
        fail("net.input", f"net.input must be {[1, size, size]} with this data.resize and data.padding, got {shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] != classes:
        outputs = f"{classes} numbers, one per class"
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
    build_callbacks(recipe, optimizer)
    if optimizer.patterns:
        try:
            loss.curvature(np.zeros((1, model.shapes[-1][0])), 1.0)
        except (AttributeError, ValueError):
            missing = f"second derivatives, which {type(loss).__name__} with these options does not have"
            fail("training.optimizer", f"{type(optimizer).__name__} needs {missing}")
    return model
