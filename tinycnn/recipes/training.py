"""A recipe made flesh: the network, the data, one seed's training."""

import dataclasses
import inspect
import time
from pathlib import Path

import numpy as np

from tinycnn import augment, hardware, init, layers, lecun98, losses, metrics, optim, runs, schedules, train
from tinycnn import data as datasets
from tinycnn._interrupts import defer_interrupt
from tinycnn.dataset import DeviceDataset
from tinycnn.errors import DivergedError, RecipeError
from tinycnn.model import Sequential
from tinycnn.recipes import gradients, results
from tinycnn.recipes._calls import evaluate, suggest


def _classes(module, base):
    mine = {n: v for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and n[0] != "_"}
    return {name: cls for name, cls in mine.items() if cls not in (base, layers.Parametric)}


LAYERS = (
    _classes(layers, layers.Layer)
    | _classes(lecun98, layers.Layer)
    | {"connections": lecun98.connections, "bitmaps": lecun98.bitmaps}
)
LOSSES = _classes(losses, losses.Loss) | _classes(lecun98, losses.Loss)
del LOSSES["MSELoss"]  # its targets are no class numbers
OPTIMIZERS = _classes(optim, optim.Optimizer) | {"SDLM": lecun98.SDLM}
SCHEDULES = {name: getattr(schedules, name) for name in ("constant", "step_decay", "cosine", "one_cycle")}
DATA = ("mnist", "fashion", "kmnist", "synthetic", "auto")
SIDE, CLASSES = 28, 10  # of the images of all of them
INITS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "truncated_normal", "constant_bias")


def build_model(recipe, rng=None, device="cpu"):
    """The recipe's model with fresh weights."""
    rng = np.random.default_rng(rng)
    where, line = recipe.location("net.layers")
    made = evaluate(recipe.net["layers"], LAYERS, where, line)
    try:
        model = Sequential(*made, input_shape=tuple(recipe.net["input"]), rng=rng, device=device)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise RecipeError(f"{where}, line {line}: {error}") from None
    where, line = recipe.location("net.init")
    for rule in _inits(recipe, rng):
        try:
            rule(model)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}, line {line}: {error}") from None
    return model


def _inits(recipe, rng):
    made: list = []

    def later(function):
        given = {"rng": rng} if "rng" in inspect.signature(function).parameters else {}

        def call(*args, **options):
            inspect.signature(function).bind(None, *args, **options)  # TypeError for a wrong argument
            made.append(lambda model: function(model, *args, **options, **given))
            return made[-1]

        return call

    known = LAYERS | {name: later(getattr(init, name)) for name in (*INITS, "lecun1998")}
    where, line = recipe.location("net.init")
    for rule in evaluate(recipe.net.get("init", ""), known, where, line):
        if rule not in made:
            raise RecipeError(f"{where}, line {line}: net.init must be calls of {', '.join(INITS)}, got {rule!r}")
    return made


def build_loss(recipe):
    """The recipe's loss."""
    return _one(recipe, "training.loss", recipe.training.get("loss", "CrossEntropyLoss()"), LOSSES, losses.Loss)


def build_optimizer(recipe, model, steps, rate=None):
    """The recipe's optimizer for `steps` steps of each epoch; `rate` is used where the recipe tunes it."""

    lr = lr_schedule(recipe, steps) if rate is None else rate

    def bound(cls):
        return lambda *args, **options: cls(model, *args, lr=lr, **options)

    known = {name: bound(cls) for name, cls in OPTIMIZERS.items()}
    made = _one(recipe, "training.optimizer", recipe.training["optimizer"], known, optim.Optimizer)
    return optim.EMA(made, recipe.training["ema"]) if "ema" in recipe.training else made


def lr_schedule(recipe, steps):
    """The learning rate of every step, `steps` an epoch."""
    lr, epochs = recipe.training["lr"], recipe.training["epochs"]
    where, line = recipe.location("training.lr")
    if isinstance(lr, list):
        if len(lr) != epochs:
            raise RecipeError(f"{where}, line {line}: lr must have {epochs} rates, one an epoch, got {len(lr)}")
        return np.repeat(np.array(lr, float), steps)
    if isinstance(lr, str):

        def over_all_steps(schedule):
            return lambda lr, *args, **options: schedule(lr, epochs * steps, *args, **options)

        known = {name: over_all_steps(schedule) for name, schedule in SCHEDULES.items()}
        lr = _one(recipe, "training.lr", lr, known, (np.ndarray, int, float))
    lr = float(lr) if isinstance(lr, int) else lr  # beyond 2**63, NumPy would not take it
    if not np.isfinite(lr).all() or np.min(lr) < 0:
        raise RecipeError(f"{where}, line {line}: lr must be finite and not negative, got {recipe.training['lr']!r}")
    return lr


def _one(recipe, key, text, known, kind):
    where, line = recipe.location(key)
    found = evaluate(text, known, where, line)
    if len(found) != 1 or not isinstance(found[0], kind) or isinstance(found[0], bool):
        raise RecipeError(f"{where}, line {line}: {key} must be one of {', '.join(known)}, called; got {text!r}")
    return found[0]


@dataclasses.dataclass
class Splits:
    """What a recipe trains on, holds out (None if nothing) and is tested on: `DeviceDataset`."""

    dataset: datasets.Dataset
    training: DeviceDataset
    held_out: DeviceDataset | None
    test: DeviceDataset


def load(recipe, data_dir=None, name=None, on_message=print):
    """The data set of the recipe, or that called `name` in its place."""
    return datasets.load(name or recipe.data.get("name", "mnist"), data_dir, on_message)


def prepare_data(recipe, dataset, rng, device="cpu", seed=0):
    """`Splits` as the recipe wants it; rng draws the split, seed the augmentation."""
    said = recipe.data
    images, labels = dataset.train_images, dataset.train_labels
    wanted, validation = split_sizes(recipe, dataset)
    chosen, held = np.arange(len(images)), None
    if validation:
        chosen, held = datasets.train_val_split(len(images), validation, rng)
    if wanted < len(chosen):
        chosen = np.sort(rng.permutation(chosen)[:wanted])
    if "resize" in said:
        images = augment.resize(images, said["resize"])
    options = {"padding": said.get("padding", 0), "device": device}
    options |= {key: said[key] for key in ("mean", "std") if key in said}
    more = {"augment": _distortions(recipe), "seed": seed} if "augment" in said else {}
    training = DeviceDataset(images[chosen], labels[chosen], **options, **more)
    pixels = {"mean": training.mean, "std": training.std}
    held_out = None if held is None else DeviceDataset(images[held], labels[held], **options | pixels)
    return Splits(dataset, training, held_out, prepare_test(recipe, dataset, pixels, device))


def split_sizes(recipe, dataset):
    """How many images of the data set to train on, and to hold out; RecipeError if there are not so many."""
    said, there = recipe.data, len(dataset.train_images)
    held = said.get("validation", 0)
    wanted = said.get("train", max(there - held, 1))
    if wanted + held > there:
        where, line = recipe.location("data.train" if "train" in said else "data.validation")
        raise RecipeError(f"{where}, line {line}: {wanted} + {held} images are wanted, {dataset.name} has {there}")
    steps, batch = recipe.training.get("steps_per_epoch", 1), min(recipe.training["batch"], wanted)
    if steps * batch > wanted:
        where, line = recipe.location("training.steps_per_epoch")
        raise RecipeError(f"{where}, line {line}: {steps} batches of {batch} images are wanted, there are {wanted}")
    return wanted, held


def _distortions(recipe):
    known = {cls.__name__: cls for cls in augment.TRANSFORMS}
    return evaluate(recipe.data.get("augment", ""), known, *recipe.location("data.augment"))


def prepare_test(recipe, dataset, pixels, device="cpu"):
    """The test set as the recipe wants it; pixels: mean and std, those of the training images."""
    said, images = recipe.data, dataset.test_images
    if "resize" in said:
        images = augment.resize(images, said["resize"])
    return DeviceDataset(images, dataset.test_labels, **pixels, padding=said.get("padding", 0), device=device)


def check(recipe):
    """RecipeError if anything that the recipe says cannot be; trains nothing, and needs no data.  Returns the model."""

    def fail(key, problem):
        where, line = recipe.location(key)
        raise RecipeError(f"{where}, line {line}: {problem}") from None

    said, shape, name = recipe.data, recipe.net["input"], recipe.data.get("name", "mnist")
    if name not in DATA:
        fail("data.name", f"data.name must be one of {', '.join(DATA)}, got {name!r}{suggest(name, DATA)}")
    side = said.get("resize", SIDE) + 2 * said.get("padding", 0)
    model = build_model(recipe, 0)
    if list(shape) != [1, side, side]:
        fail("net.input", f"net.input must be {[1, side, side]}, as data.resize and data.padding have it, got {shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < CLASSES:
        fail("net.layers", f"the last layer must give {CLASSES} numbers, one a class, got shape {model.shapes[-1]}")
    distortions = _distortions(recipe)
    try:
        augment.Augmentation(distortions, 0, model.ops, np.ones(1), np.zeros(1))
    except (TypeError, ValueError) as error:
        fail("data.augment", error)
    if "tune_lr" in recipe.training and not said.get("validation"):
        fail("training.tune_lr", "tune_lr needs data.validation")
    loss = build_loss(recipe)
    try:
        loss.ensure_allocated(model.ops, 1, model.shapes[-1][0], model.dtype)
    except (TypeError, ValueError) as error:
        fail("training.loss", error)
    try:
        rule = build_optimizer(recipe, model, 1, 1e-3 if "tune_lr" in recipe.training else None)
    except RecipeError:
        raise
    except ValueError as error:
        fail("training.ema", error)
    if rule.patterns:
        try:
            loss.curvature(np.zeros((1, model.shapes[-1][0])), 1.0)
        except (AttributeError, ValueError):
            unknown = f"second derivatives, which are not known of {type(loss).__name__} as it is here"
            fail("training.optimizer", f"{type(rule).__name__} needs {unknown}")
    return model


def run(
    recipe, seed, data, *, device="cpu", out="runs", on_message=print, on_epoch=None, on_result=None, progress=True
):  # fmt: skip
    """Train one seed of the recipe on `data` (from `load`) and test it.  Returns the result, a dict for JSON, after it
    was handed to `on_result`: a Ctrl-C after the training is put off until then.

    Writes a run folder under out/<recipe>.  A run that diverges has a result too, with the key "diverged".
    """
    said = recipe.training
    streams = np.random.SeedSequence(seed).spawn(4)  # weights, split, order, augmentation
    rng_weights, rng_split, rng_order = map(np.random.default_rng, streams[:3])
    model = build_model(recipe, rng_weights, device)
    ready = prepare_data(recipe, data, rng_split, device, int(streams[3].generate_state(1)[0]))
    loss = build_loss(recipe)
    batch = min(said["batch"], len(ready.training))
    steps = said.get("steps_per_epoch") or -(-len(ready.training) // batch)
    tuning = tune_lr(recipe, data, device, on_message) if "tune_lr" in said else {}
    rate = max(tuning, key=tuning.__getitem__) if tuning else None
    rule = build_optimizer(recipe, model, steps, rate)
    told = {section: getattr(recipe, section) for section in ("net", "data", "training")}
    folder = runs.RunFolder(Path(out) / recipe.name, f"seed-{seed}", {
        "recipe": recipe.name, "seed": seed, **told, "rate": rate, "parameters": len(model.theta),
        "pixels": {"mean": ready.training.mean.tolist(), "std": ready.training.std.tolist()},
        "dataset": {"name": data.name, "sha256": data.sha256}, "environment": hardware.environment(device),
    })  # fmt: skip
    train.warm_up(model, loss, rule, ready.training, batch)

    flow: dict[str, list] = {}  # of gradients, if the recipe wants to know

    def measure(when):
        if said.get("gradients"):
            flow[when] = gradients.statistics(model, loss, ready.training, rule.lr)

    measure("at the start")

    def each(record):
        folder.add_epoch(record, model)
        if record["epoch"] in (1, said["epochs"]):
            measure("after one epoch" if record["epoch"] == 1 else "at the end")
        if on_epoch is not None:
            on_epoch(record)

    began, worked = time.perf_counter(), time.process_time()
    source = results.source_file(recipe)
    result = {
        "recipe": recipe.name, "fingerprint": recipe.fingerprint, "seed": seed, "data": data.name,
        "parameters": len(model.theta), **({"file": source} if source else {}),
    } | ({"rate": rate, "tuning": tuning} if tuning else {})  # fmt: skip
    try:
        train.fit(
            model, loss, rule, ready.training, epochs=said["epochs"], batch_size=batch,
            steps_per_epoch=said.get("steps_per_epoch"), reshuffle=said.get("reshuffle", True),
            validation=ready.held_out or ready.test, rng=rng_order, on_epoch=each, progress=progress,
        )  # fmt: skip
    except DivergedError as error:
        result["diverged"] = str(error)
    # Time on the clock depends on what else the machine does; that of the processor hardly does.
    result["seconds"], result["cpu_seconds"] = (
        round(time.perf_counter() - began, 1), round(time.process_time() - worked, 1),
    )  # fmt: skip
    result["training_seconds"] = round(sum(record["seconds"] for record in folder.history), 1)
    with defer_interrupt("interrupted: finishing this seed"):
        test_loss, accuracy, outputs = train.evaluate(model, ready.test, loss)
        scores = loss.logits(outputs)
        matrix = metrics.confusion_matrix(data.test_labels, scores.argmax(axis=1), outputs.shape[1])
        extra = {key: result[key] for key in ("recipe", "seed", "training_seconds")} | {"test_loss": test_loss}
        folder.finish(model, ready.test, scores, data.classes, extra)
        report = metrics.report(matrix, data.classes)
        result |= {
            "accuracy": accuracy, "errors": int(report["errors"]), "loss": test_loss,
            **{name: report["macro"][name] for name in ("precision", "recall", "f1")},
            "held_out": "test" if ready.held_out is None else "validation",
            "history": {
                key: [float(f"{record[key]:.6g}") for record in folder.history]
                for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy") if folder.history
            },
            **({"gradients": flow} if flow else {}), "confusion": matrix.tolist(),
            "environment": environment(device),
            "finished": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        if on_result is not None:
            on_result(result)
        on_message(f"run folder: {folder.path}")
        return result


def environment(device):
    """What a result says of where it was computed."""
    found = hardware.environment(device) | {"device": hardware.device_name(device)}
    del found["command"]
    return found


TUNING_SEEDS = 1000, 1001, 1002  # none of those that are reported
_tuned: dict[str, dict[float, float]] = {}  # by fingerprint: validation accuracy of each rate


def tune_lr(recipe, data, device="cpu", on_message=print):
    """{rate: mean validation accuracy of three whole runs} for the rates of `tune_lr`; measured once a process.

    Shorter runs would choose by who leaves the first plateau sooner: a sigmoid LeNet-5 stays on it for epochs, and with
    large rates some seeds never leave it.
    """
    if recipe.fingerprint not in _tuned:
        found = {}
        for rate in recipe.training["tune_lr"]:
            tried = [_try_rate(recipe, data, float(rate), seed, device) for seed in TUNING_SEEDS]
            found[rate] = float(np.mean(tried))
            on_message(f"rate {rate:g}: {found[rate]:.2%} of the validation set")
        _tuned[recipe.fingerprint] = found
    return _tuned[recipe.fingerprint]


def _try_rate(recipe, data, rate, seed, device):
    weights, split, order = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    model, ready = build_model(recipe, weights, device), prepare_data(recipe, data, split, device)
    try:
        history = train.fit(
            model, build_loss(recipe), build_optimizer(recipe, model, 1, rate), ready.training,
            epochs=recipe.training["epochs"], batch_size=recipe.training["batch"], validation=ready.held_out,
            rng=order, progress=False,
        )  # fmt: skip
    except DivergedError:
        return 0.0
    return history[-1]["val_accuracy"]
