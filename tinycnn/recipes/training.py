"""The runner: trains one seed of a recipe in a run folder, or continues such a run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import calibration, hardware, metrics, runs, train
from tinycnn._interrupts import defer_interrupt
from tinycnn.data import Dataset
from tinycnn.distributed import ALONE, Group
from tinycnn.errors import DivergedError
from tinycnn.lecun98 import SDLM
from tinycnn.recipes import Recipe, gradients, results
from tinycnn.recipes.build import (
    build_callbacks,
    build_loss,
    build_model,
    build_optimizer,
    prepare_data,
)
from tinycnn.resume import TrainingCheckpoint


class Run:
    """One seed of a recipe: model, data, loss, optimizer and run folder.

    folder  of a run to continue; a new one under out/<recipe> by default
    force   continue although something differs: see `TrainingCheckpoint`
    tuning  accuracies of the candidates of `tune_lr`, if they are known
    group   the processes that train together.  All make the `Run` and call `fit`; rank 0 has and writes the folder

    `fit` trains, up to the recipe's number of epochs; `finish` tests the model and returns the result.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        data: Dataset,
        *,
        device: str = "cpu",
        out: str | Path = "runs",
        folder: runs.RunFolder | None = None,
        force: bool = False,
        tuning: dict[str, float] | None = None,
        on_message: Callable[[str], object] = print,
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.recipe, self.seed, self.data, self.device, self.on_message = recipe, seed, data, device, on_message
        settings = recipe.training
        streams = np.random.SeedSequence(seed).spawn(4)  # weights, split, order, augmentation
        rng_weights, rng_split, self.rng_order = map(np.random.default_rng, streams[:3])
        self.model = build_model(recipe, rng_weights, device)
        self.splits = prepare_data(recipe, data, rng_split, device, int(streams[3].generate_state(1)[0]))
        self.loss = build_loss(recipe)
        self.batch = min(settings["batch"], len(self.splits.train))
        steps = settings.get("steps_per_epoch") or -(-len(self.splits.train) // self.batch)
        if "tune_lr" not in settings:
            tuning = {}
        elif folder is not None:
            tuning = folder.config["tuning"]
        elif tuning is None:
            tuning = group.on_root(lambda: tune_lr(recipe, data, device, on_message))
        rate = float(max(tuning, key=tuning.__getitem__)) if tuning else None
        self.optimizer = build_optimizer(recipe, self.model, steps, rate)
        self.callbacks = build_callbacks(recipe, self.optimizer)
        self.tuned = {"rate": rate, "tuning": tuning}
        root, name = Path(out) / recipe.name, f"seed-{seed}"
        self.folder = folder or runs.RunFolder.of_ranks(group, lambda: runs.RunFolder.create(root, name, self.config()))
        self.checkpoint = TrainingCheckpoint(self.folder.checkpoint, force)
        self.measurements = Measurements(self)
        self.diverged: str | None = None
        self.problems: list[str] = []  # pictures that could not be written

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        recipe, train_set, data = self.recipe, self.splits.train, self.data
        return {
            "recipe": recipe.name, "title": recipe.title, "fingerprint": recipe.fingerprint, "seed": self.seed,
            "net": recipe.net, "data": recipe.data, "training": recipe.training, **self.tuned,
            "parameters": len(self.model.theta),
            "pixels": {"mean": train_set.mean.tolist(), "std": train_set.std.tolist()},
            "dataset": {"name": data.name, "sha256": data.sha256, "classes": list(data.classes), **self.sizes()},
            "device": self.device, "environment": hardware.environment(self.device),
            **({"ranks": self.group.size} if self.group.size > 1 else {}),
        }  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """Number of images for training, validation (0 without it) and testing."""
        validation = 0 if self.splits.validation is None else len(self.splits.validation)
        return {"train": len(self.splits.train), "validation": validation, "test": len(self.splits.test)}

    def fit(
        self,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
        callbacks: Sequence[Any] = (),
        progress: bool = True,
        on_compile: Callable[[int], object] | None = None,
    ) -> None:
        """Train, from the folder's checkpoint if it has one.  A training that diverges ends without an exception.

        on_epoch   called with the record of each epoch
        callbacks  more of them: see `fit`
        on_compile called with the number of kernels that have to be compiled first, if there are any
        """
        settings = self.recipe.training
        if not self.group.on_root(self.folder.checkpoint.exists):
            start, stop = self.group.part(self.batch)
            batch, shown = max(1, stop - start), progress and self.group.rank == 0
            with self.group.together(), self.group.node_first(), train.compile_bar(shown) as show:

                def on_progress(done: int, total: int, name: str, seconds: float) -> None:
                    if done == 0 and on_compile is not None:
                        on_compile(total)
                    show(done, total, name, seconds)

                train.warm_up(self.model, self.loss, self.optimizer, self.splits.train, batch, on_progress)
            self.measurements.gradients("at the start")
        self.measurements.start()
        try:
            train.fit(
                self.model, self.loss, self.optimizer, self.splits.train, epochs=settings["epochs"],
                batch_size=self.batch, steps_per_epoch=settings.get("steps_per_epoch"),
                reshuffle=settings.get("reshuffle", True), validation=self.splits.validation or self.splits.test,
                rng=self.rng_order, on_epoch=on_epoch,
                callbacks=[*self.callbacks, self.measurements, *callbacks, self.folder],
                checkpoint=self.checkpoint, progress=progress, comm=self.group,
                sync_batch_norm=settings.get("sync_batch_norm", False),
            )  # fmt: skip
        except DivergedError as error:
            self.diverged = str(error)

    def finish(
        self, on_result: Callable[[dict[str, Any]], object] | None = None, interrupted: bool = False
    ) -> dict[str, Any]:
        """Test the model, and write report and pictures.  Returns the result, a dict for JSON.

        on_result    called with the result before anything else is written
        interrupted  whether the training was interrupted: the result is that of the last complete epoch
        """
        recipe, splits, history = self.recipe, self.splits, self.folder.history
        test_loss, accuracy, outputs = train.evaluate(self.model, splits.test, self.loss)
        logits = self.loss.logits(outputs)
        matrix = metrics.confusion_matrix(self.data.test_labels, logits.argmax(axis=1), outputs.shape[1])
        report = metrics.report(matrix, self.data.classes)
        source = results.source_file(recipe)
        result: dict[str, Any] = {
            "recipe": recipe.name, "fingerprint": recipe.fingerprint, "seed": self.seed, "data": self.data.name,
            "parameters": len(self.model.theta), **({"file": source} if source else {}),
            **(self.tuned if self.tuned["tuning"] else {}), **({"diverged": self.diverged} if self.diverged else {}),
            **({"interrupted": True} if interrupted else {}), **self.measurements.seconds(),
            "training_seconds": round(sum(record["seconds"] for record in history), 1),
            "accuracy": accuracy, "errors": int(report["errors"]), "loss": test_loss,
            **{name: report["macro"][name] for name in ("precision", "recall", "f1")},
            **({} if self.diverged else {"rejected": metrics.rejection_rate(logits, self.data.test_labels)}),
            "held_out": "test" if splits.validation is None else "validation",
            "history": {
                key: [float(f"{record[key]:.6g}") for record in history]
                for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy") if history
            },
            **({"gradients": self.measurements.statistics} if self.measurements.statistics else {}),
            **({"step_sizes": self.measurements.step_sizes} if self.measurements.step_sizes else {}),
            "confusion": matrix.tolist(), "environment": environment(self.device),
            "finished": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        if on_result is not None:
            on_result(result)
        extra = {key: result[key] for key in ("recipe", "seed", "data", "training_seconds")}
        extra |= {"test_loss": test_loss, "epochs": len(history), "interrupted": interrupted}
        fitted, bins = self.calibrate()
        names, report = self.data.classes, extra | report | ({"calibration": fitted} if fitted else {})
        self.problems = self.folder.finish(self.model, splits.test, logits, names, report, bins) or []
        for problem in self.problems:
            self.on_message(problem)
        self.folder.close()
        return result

    def calibrate(self) -> tuple[dict[str, float] | None, Any]:
        """Temperature, calibration errors and rejection threshold from the validation set, and the bins of the
        reliability diagrams before and after; None without a validation set."""
        if self.splits.validation is None or self.diverged:
            return None, None
        validation = self.splits.validation
        logits = self.loss.logits(train.evaluate(self.model, validation, self.loss)[2]).astype(np.float64)
        labels = validation.ops.to_host(validation.labels)
        temperature = calibration.fit_temperature(logits, labels)
        probabilities = [metrics.softmax(logits), metrics.softmax(logits / temperature)]
        before, after = (calibration.expected_calibration_error(p, labels) for p in probabilities)
        fitted = {
            "images": len(labels), "temperature": temperature, "ece": before, "ece_calibrated": after,
            "reject_below": calibration.fit_threshold(calibration.rejection_score(logits)),
        }  # fmt: skip
        return fitted, [calibration.reliability(p, labels) for p in probabilities]


class Measurements:
    """What a run measures besides `fit`: times, gradient statistics, and the range of SDLM's step sizes in each epoch.
    A callback of `fit`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.statistics: dict[str, list[dict[str, Any]]] = {}
        self.step_sizes: list[list[float]] = []  # smallest and largest, by epoch
        self.before = (0.0, 0.0)  # seconds, and processor seconds, before the training was interrupted
        self.start()

    def start(self) -> None:
        """Start the clocks."""
        self.clocks = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Wall-clock time, which depends on the load of the machine; processor time, which hardly does."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (b + n - c for b, n, c in zip(self.before, now, self.clocks, strict=True))
        return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}

    def gradients(self, when: str) -> None:
        """Measure the gradient statistics, if the recipe asks for it."""
        run = self.run
        if run.recipe.training.get("gradients"):
            self.statistics[when] = gradients.statistics(run.model, run.loss, run.splits.train, run.optimizer.lr)

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        if record["epoch"] in (1, self.run.recipe.training["epochs"]):
            self.gradients("after one epoch" if record["epoch"] == 1 else "at the end")
        if isinstance(self.run.optimizer, SDLM):
            sizes = self.run.optimizer.ops.to_host(self.run.optimizer.step_sizes)
            self.step_sizes.append([float(f"{size:.6g}") for size in (sizes.min(), sizes.max())])

    def state_dict(self) -> dict[str, Any]:
        before = list(self.seconds().values())
        return {"statistics": self.statistics, "step_sizes": self.step_sizes, "before": before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics, self.step_sizes = state["statistics"], state["step_sizes"]
        self.before = tuple(state["before"])
        self.start()


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
    callbacks: Sequence[Any] = (),
    tuning: dict[str, float] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one seed of the recipe on `data` (from `build.load`) and test it.  Returns the result, a dict for JSON.

    Continues a run of the same recipe and seed in a folder under out/<recipe> that was interrupted; otherwise writes a
    new folder.  A run that diverges has a result too, with the key "diverged".  After the training, Ctrl-C is deferred
    until `on_result` has been called with the result.

    callbacks  more of them for `fit`
    tuning     accuracies of the candidates of `tune_lr`, if they are known
    """
    folder = _unfinished(recipe, seed, data, device, Path(out))
    if folder is not None:
        on_message(f"continuing {folder.path}")
    one = Run(recipe, seed, data, device=device, out=out, folder=folder, tuning=tuning, on_message=on_message)
    try:
        one.fit(on_epoch, callbacks, progress)
        with defer_interrupt("interrupted: finishing this seed"):
            result = one.finish(on_result)
            on_message(f"run folder: {one.folder.path}")
            return result
    finally:
        one.folder.close()


def _unfinished(recipe: Recipe, seed: int, data: Dataset, device: str, out: Path) -> runs.RunFolder | None:
    """The newest run of the recipe and seed under out/<recipe> that was interrupted and can be continued."""
    same = {"fingerprint": recipe.fingerprint, "seed": seed, "device": device}
    versions = hardware.versions()
    for path in runs.unfinished(out / recipe.name, seed):
        try:
            config = runs.read_config(path)
            written = {name: config["environment"].get(name) for name in versions}
            if same.items() <= config.items() and config["dataset"]["sha256"] == data.sha256 and written == versions:
                return runs.RunFolder.open(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged, or in use by another process
    return None


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that compute a result."""
    record: dict[str, Any] = hardware.environment(device) | {"device": hardware.device_name(device)}
    del record["command"]
    return record


TUNING_SEEDS = 1000, 1001, 1002  # different from the reported seeds


def tune_lr(
    recipe: Recipe, data: Dataset, device: str = "cpu", on_message: Callable[[str], object] = print
) -> dict[str, float]:
    """{lr: mean validation accuracy of three full runs} for the candidates in `tune_lr`.

    Full runs are needed: a sigmoid LeNet-5 stays on its first plateau for several epochs. Shorter runs would choose the
    rate that leaves it first, but with large rates some seeds never leave it.
    """
    accuracies = {}
    for lr in recipe.training["tune_lr"]:
        runs_of_lr = [_validation_accuracy(recipe, data, float(lr), seed, device) for seed in TUNING_SEEDS]
        accuracies[str(lr)] = float(np.mean(runs_of_lr))
        on_message(f"rate {lr:g}: validation accuracy {accuracies[str(lr)]:.2%}")
    return accuracies


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
