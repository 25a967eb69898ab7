"""Training: one step, the loop over epochs, evaluation."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, _streams
from tinycnn._tracked import Replay, Tracked, is_replayable
from tinycnn._typing import Array, Rng, State
from tinycnn.dataset import DataLoader, DeviceDataset, check_indices
from tinycnn.errors import DeviceError, DivergedError
from tinycnn.losses import CrossEntropyLoss, Loss
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer
from tinycnn.plan import Plan

__all__ = ["DivergedError", "StepRunner", "evaluate", "fit", "train_step", "warm_up"]

EVALUATION_BATCH = 250

Record: TypeAlias = dict[str, Any]  # of an epoch: see `fit`
Snapshot: TypeAlias = tuple[list[Array], State]  # of a model and its optimizer


class StepRunner:
    """Runs a model and a loss on a data set, batch by batch.  All training and evaluation goes through it.

    loader     reads the images
    optimizer  None if nothing is trained
    totals     (5,) float64 on the device: see the kernel `accumulate_metrics`

    `step(n)` and its halves, `compute_loss(n)` and `update(n)`, are the implementation.  `replay(n)` and
    `replay_loss(n)` replay captures of them, one per batch size, if all parts are known to call only kernels.
    """

    def __init__(
        self, model: Sequential, criterion: Loss, loader: DataLoader, optimizer: Optimizer | EMA | None = None
    ) -> None:
        self.model, self.criterion, self.loader = model, criterion, loader
        self.optimizer: Any = optimizer
        self.totals = model.ops.empty((5,), np.float64)
        self.target = loader.target
        self.captures: dict[tuple[int, str, bool], tuple[Plan, Replay]] = {}
        self.augment_settings = loader.augment_settings()

    def matches(self, model: Sequential, criterion: Loss, dataset: DeviceDataset) -> bool:
        """Whether the runner was made for exactly these objects."""
        return self.model is model and self.criterion is criterion and self.loader.data is dataset

    def reserve(self, n: int) -> None:
        """Allocate the loss's buffers for n images."""
        self.criterion.ensure_allocated(self.model.ops, n, self.model.shapes[-1][-1], self.model.dtype)

    def compute_loss(self, n: int, dry_run: bool = False) -> None:
        """Forward pass and loss of the next n images.  Leaves the outputs and their gradient in the plan's buffers."""
        plan, criterion = self.model.plan(n), self.criterion
        self.reserve(n)
        self.target = self.loader.next(plan.x)
        plan.forward(dry_run)
        if not dry_run or is_replayable(criterion):
            criterion.forward_backward(plan.dy, plan.y, self.target)

    def update(self, n: int, dry_run: bool = False) -> None:
        """Backward pass and optimizer step; advance to the next images."""
        self.model.plan(n).backward(dry_run=dry_run)
        if not dry_run or is_replayable(self.optimizer):
            self.optimizer.step()
        self.criterion.accumulate_metrics(self.totals, self.loader.cursor, self.target)

    def step(self, n: int, dry_run: bool = False) -> None:
        """A training step on the next n images.  It neither allocates nor synchronises, so a GPU can capture it.

        dry_run  see `Plan.forward`
        """
        self.compute_loss(n, dry_run)
        self.update(n, dry_run)

    def replay(self, n: int) -> None:
        """`step`, replayed."""
        self._replay(n, self.step)

    def replay_loss(self, n: int) -> None:
        """`compute_loss`, replayed."""
        self._replay(n, self.compute_loss)

    def _replay(self, n: int, step: Callable[[int], None]) -> None:
        key, plan = (n, step.__name__, self.model.training), self.model.plan(n)
        captured_plan, replay = self.captures.get(key, (None, None))
        if replay is None or captured_plan is not plan:  # a capture uses the buffers of its plan
            self.reserve(n)
            parts = *(layer for _, layer in self.model.leaves), self.criterion, self.loader.data, self.optimizer
            replay = Replay(self.model.ops, lambda: step(n), *(part for part in parts if part is not None))
            self.captures[key] = plan, replay
        replay()

    def checked_step(self, n: int, epoch: int | None = None) -> float:
        """`step`, but a non-finite loss raises DivergedError before anything is updated.  Returns the loss."""
        self.replay_loss(n)
        loss = self.criterion.batch_loss(n)
        if not math.isfinite(loss):
            layer = self.model.find_non_finite(self.model.plan(n)) or "the loss"
            raise DivergedError(layer, self.optimizer.steps + 1, epoch)
        self._replay(n, self.update)
        return loss

    def start_epoch(self, order: Array, repeat: bool = False) -> None:
        """Begin an epoch over the images `order`.  repeat: see `DataLoader.start_epoch`"""
        if self.augment_settings != (settings := self.loader.augment_settings()):
            self.augment_settings, self.captures = settings, {}
        self.loader.start_epoch(order, repeat)
        self.model.ops.copy_to(self.totals, np.zeros(5))

    def read_metrics(self) -> tuple[float, float]:
        """(loss, accuracy) of the epoch so far.  ArithmeticError if the loss is not finite."""
        loss, correct, count, _, weights = self.model.ops.to_host(self.totals)
        if not math.isfinite(loss):
            raise ArithmeticError
        accuracy = float(correct / count) if self.criterion.predicts_classes() else math.nan
        return _mean_loss(self.criterion, loss, weights), accuracy

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the locks of the model and the loss."""
        with self.model.lock, getattr(self.criterion, "lock", contextlib.nullcontext()):
            self.model.discard_forward()
            self.model.begin_run()
            try:
                yield
            finally:
                self.model.end_run()


def train_step(
    model: Sequential, criterion: Loss, optimizer: Optimizer | EMA, dataset: DeviceDataset, index: ArrayLike
) -> float:
    """One training step on the images `index` (n,) int64 of `dataset`.  Returns the loss before the step.

    Raises DivergedError for a loss that is not finite, before anything is updated; ValueError or TypeError for an
    index that is not the number of an image.
    """
    check_arguments(model, dataset, "dataset", criterion, optimizer)
    numbers = check_indices(dataset, index)
    cache = vars(optimizer) if isinstance(optimizer, Tracked) else {}
    with model.lock:
        runner = cache.get("_runner")  # of the last call, with its captures
        if runner is None or len(numbers) > len(runner.loader.order) or not runner.matches(model, criterion, dataset):
            loader = DataLoader(dataset, longest=len(numbers))
            runner = cache["_runner"] = StepRunner(model, criterion, loader, optimizer)
        with runner.exclusive():
            model.normalization = dataset.normalization
            runner.loader.start_epoch(numbers)
            return runner.checked_step(len(numbers))


def fit(
    model: Sequential,
    criterion: Loss,
    optimizer: Optimizer | EMA,
    train: DeviceDataset,
    *,
    epochs: int,
    batch_size: int = 64,
    steps_per_epoch: int | None = None,
    reshuffle: bool = True,
    validation: DeviceDataset | None = None,
    rng: Rng = None,
    on_epoch: Callable[[Record], object] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train for `epochs` passes over `train`, in a new random order each, and return the history.

    train, validation  `DeviceDataset`.  The validation set is evaluated after every epoch, with `criterion`, or with
                       plain cross entropy if the criterion is a cross entropy with options
    steps_per_epoch    number of batches in an epoch, instead of all of `train`; the next epoch continues where the last
                       one ended
    reshuffle          False: all epochs use the random order of the first
    rng                seed or generator of the orders
    on_epoch           called with each epoch's record; training stops if it returns True (see `EarlyStopping`)
    progress           show a progress bar on stderr, if that is a terminal

    The history has one record (a dict) for each epoch: epoch, train_loss, train_accuracy (both measured during
    training), val_loss, val_accuracy (with a validation set), lr (at the end), seconds (of training),
    images_per_second.

    `fit` first dry-runs a step to find the kernels it needs, and compiles the missing ones.  An optimizer that was used
    before continues its count of epochs; an exhausted schedule raises ValueError.  `model.normalization` becomes that
    of `train`.

    After an exception (Ctrl-C, DivergedError) the model holds the weights of the last complete epoch.  With `EMA` these
    are the averaged weights, as are the final weights, the validated ones and those that `on_epoch` sees.  If
    `on_epoch` has a method `at_end`, it is called at the end of a training without an exception.
    """
    epochs, batch_size = _check.integer("epochs", epochs, 1), _check.integer("batch_size", batch_size, 1)
    _check.optional_callable("on_epoch", on_epoch)
    check_arguments(model, train, "train", criterion, optimizer)
    if validation is not None:
        check_arguments(model, validation, "validation")
    if getattr(optimizer, "schedule_exhausted", bool)():
        raise ValueError(
            f"optimizer: its schedule of {len(optimizer.lr_schedule)} rates is used up after {optimizer.steps} steps, "
            f"and training would continue with the last rate, {optimizer.lr_schedule[-1]:g}; assign a number or an "
            "array of rates for the next steps to optimizer.lr"
        )
    generator: np.random.Generator = _check.generator("rng", rng)
    batch_size = min(batch_size, len(train))
    epoch_size = len(train)
    if steps_per_epoch is not None:
        epoch_size = _check.integer("steps_per_epoch", steps_per_epoch, 1) * batch_size
        if epoch_size > len(train):
            raise ValueError(
                f"steps_per_epoch must be at most {len(train) // batch_size} with batches of {batch_size} of "
                f"{len(train)} images, got {steps_per_epoch}"
            )
    val_batch = 0 if validation is None else min(EVALUATION_BATCH, len(validation))
    max_batch = max(batch_size, val_batch, optimizer.patterns)
    runner = StepRunner(model, criterion, DataLoader(train, augment=True), optimizer)
    val_criterion = CrossEntropyLoss() if type(criterion) is CrossEntropyLoss else criterion
    validator = None if validation is None else StepRunner(model, val_criterion, DataLoader(validation))
    with runner.exclusive():
        model.reserve(max(max_batch, model.max_batch))  # the largest buffers first: all plans share them
        runner.reserve(max_batch)
        _compile(runner, {batch_size, epoch_size % batch_size or batch_size})
    model.normalization = train.normalization
    epoch_count = getattr(optimizer, "_epochs", np.zeros(1, np.int64))
    last_epoch = int(epoch_count[0]) + epochs
    history: list[Record] = []
    last_good, order, upcoming = _snapshot(model, optimizer), None, np.empty(0, np.int64)
    try:
        for epoch in range(last_epoch - epochs + 1, last_epoch + 1):
            if order is None or reshuffle:
                if len(upcoming) < epoch_size:
                    upcoming = np.concatenate([upcoming, generator.permutation(len(train))])
                order, upcoming = upcoming[:epoch_size], upcoming[epoch_size:]
            with runner.exclusive():
                model.train()
                optimizer.before_epoch(criterion, train, generator)
                epoch_start = _snapshot(model, optimizer)
                try:
                    title = f"{epoch}/{last_epoch}"
                    record: Record = {"epoch": epoch} | _train_epoch(runner, order, batch_size, title, progress)
                except ArithmeticError:
                    # Repeat the epoch to find the layer: the same steps from the same state give the same bits.
                    _restore(model, optimizer, epoch_start)
                    _repeat_checked(runner, order, batch_size, epoch)
                    raise
                if not np.isfinite(model.ops.to_host(model.theta)).all():
                    layer = model.find_non_finite(model.plan(batch_size)) or "the parameters"
                    raise DivergedError(layer, optimizer.steps, epoch)
            epoch_count[0] += 1
            epoch_end, stop = _snapshot(model, optimizer), False
            with optimizer.average_parameters():
                if validator is not None:
                    record["val_loss"], record["val_accuracy"], _ = _evaluate(validator, EVALUATION_BATCH)
                last_good = epoch_end
                history.append(record)
                if on_epoch is not None:
                    result = on_epoch(record)
                    stop = isinstance(result, (bool, np.bool_)) and bool(result)  # a lambda may return anything
            last_good = _snapshot(model, optimizer)  # again, since on_epoch may have changed the learning rates
            if stop:
                break
        optimizer.use_average()
        if hasattr(on_epoch, "at_end"):
            on_epoch.at_end()  # type: ignore[union-attr]
    except BaseException:
        with contextlib.suppress(DeviceError):  # after a fault the GPU refuses this too: report the first error
            _restore(model, optimizer, last_good)
            optimizer.use_average()
        raise
    finally:
        runner.loader.close()
    return history


def _snapshot(model: Sequential, optimizer: Any) -> Snapshot:
    return model.snapshot(), optimizer.state_dict()


def _restore(model: Sequential, optimizer: Any, snapshot: Snapshot) -> None:
    model.restore(snapshot[0])
    optimizer.load_state_dict(snapshot[1])


def _train_epoch(runner: StepRunner, order: Array, batch_size: int, title: str, progress: bool) -> Record:
    """Train on the images `order` and return the record.  ArithmeticError if the loss is not finite.

    The totals are read at the end, and a few times a second for the progress bar: on a GPU, reading synchronises.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        total=len(order), desc=f"epoch {title}", unit=" images", unit_scale=True, leave=False,
        disable=None if progress else True, mininterval=0.2, file=_streams.SafeStream(sys.stderr),
    )  # fmt: skip
    runner.start_epoch(order)
    start = last_shown = time.perf_counter()
    with bar:
        for position in range(0, len(order), batch_size):
            n = min(batch_size, len(order) - position)
            runner.replay(n)
            now = time.perf_counter()
            if now - last_shown > 0.2:
                last_shown = now
                bar.set_postfix_str("loss {:.4f}, accuracy {:.2%}".format(*runner.read_metrics()), refresh=False)
            bar.update(n)
        loss, accuracy = runner.read_metrics()
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "lr": runner.optimizer.lr,
        "seconds": seconds,
        "images_per_second": len(order) / seconds,
    }


def _repeat_checked(runner: StepRunner, order: Array, batch_size: int, epoch: int) -> None:
    """Repeat the steps of an epoch with `checked_step`, which raises DivergedError where the loss is not finite."""
    runner.start_epoch(order, repeat=True)
    for position in range(0, len(order), batch_size):
        runner.checked_step(min(batch_size, len(order) - position), epoch)


def evaluate(
    model: Sequential, dataset: DeviceDataset, criterion: Loss | None = None, batch_size: int = EVALUATION_BATCH
) -> tuple[float, float, Array]:
    """(loss, accuracy, logits) of the model in eval mode on all of `dataset`; logits: (N, K) NumPy.

    The loss is plain cross entropy unless another criterion is given.  It is the loss of all images together, whatever
    the batch size: their (weighted) mean, or their sum if the criterion's reduction is "sum" or "none".
    """
    check_arguments(model, dataset, "dataset", criterion)
    criterion = CrossEntropyLoss() if criterion is None else criterion
    batch_size = _check.integer("batch_size", batch_size, 1)
    return _evaluate(StepRunner(model, criterion, DataLoader(dataset)), batch_size)


def _evaluate(runner: StepRunner, batch_size: int) -> tuple[float, float, Array]:
    """`evaluate` with a reusable `StepRunner`."""
    model, criterion, dataset = runner.model, runner.criterion, runner.loader.data
    loss_sum, weight_sum, outputs, correct = 0.0, 0.0, [], 0
    labels = model.ops.to_host(dataset.labels)
    with runner.exclusive(), model.evaluating():
        for start in range(0, len(dataset), batch_size):
            n = min(batch_size, len(dataset) - start)
            batch_labels = labels[start : start + n]
            runner.loader.seek(start)
            runner.replay_loss(n)
            loss, weight = criterion.weighted_sum(criterion.batch_loss(n), batch_labels)
            loss_sum, weight_sum = loss_sum + loss, weight_sum + weight
            outputs.append(np.array(model.ops.to_host(model.plan(n).y)))
            predicted = criterion.predictions(n)
            predicted = outputs[-1].argmax(axis=1) if predicted is None else predicted
            correct += np.count_nonzero(predicted == batch_labels)
    return _mean_loss(criterion, loss_sum, weight_sum), correct / len(dataset), np.concatenate(outputs)


def _mean_loss(criterion: Loss, loss_sum: float, weight_sum: float) -> float:
    """The loss of a data set from its sums; NaN if every target is ignored, as in torch."""
    if criterion.reduction != "mean":
        return float(loss_sum)
    return float(loss_sum / weight_sum) if weight_sum else math.nan


def warm_up(
    model: Sequential, criterion: Loss, optimizer: Optimizer | EMA, dataset: DeviceDataset, batch_size: int
) -> float:
    """Compile (or load) every kernel that a step needs, run a step and undo it.  Returns the seconds it took."""
    start, n = time.perf_counter(), min(batch_size, len(dataset))
    check_arguments(model, dataset, "dataset", criterion, optimizer)
    runner = StepRunner(model, criterion, DataLoader(dataset), optimizer)
    before = _snapshot(model, optimizer)
    with runner.exclusive():
        _compile(runner, {n})
        with contextlib.suppress(DivergedError):  # training will raise it with the right step
            runner.checked_step(n)
        _restore(model, optimizer, before)
    return time.perf_counter() - start


def _compile(runner: StepRunner, batch_sizes: set[int]) -> None:
    """Compile the kernels of a step on each of the batch sizes.  Restores model and optimizer."""
    model, optimizer = runner.model, runner.optimizer
    before, training = _snapshot(model, optimizer), model.training

    def dry_run() -> None:
        for n in batch_sizes:
            runner.step(n, dry_run=True)

    model.train()
    try:
        model.ops.precompile(dry_run)
    finally:
        model.train(training)
        _restore(model, optimizer, before)


def check_arguments(
    model: Sequential, dataset: DeviceDataset, name: str, criterion: Any = None, optimizer: Any = None
) -> None:
    """ValueError or TypeError unless these are a model, a data set, a loss and an optimizer that fit together.

    name  the name of the argument `dataset`
    """
    _check.instance("model", model, Sequential, "a Sequential")
    hint = "make one of images and labels: DeviceDataset(images, labels)"
    _check.instance(name, dataset, DeviceDataset, "a DeviceDataset", hint)
    for part, role, method, expected in (
        (criterion, "criterion", "forward_backward", "a loss such as CrossEntropyLoss()"),
        (optimizer, "optimizer", "step", "an optimizer such as Adam(model)"),
    ):
        if part is not None and (isinstance(part, type) or not hasattr(part, method)):
            hint = "; criterion comes before optimizer" if isinstance(part, (Optimizer, EMA, Loss)) else ""
            raise TypeError(f"{role} must be {expected}, got {_check.describe(part)}{hint}")
    if type(model).forward is not Sequential.forward or type(model).backward is not Sequential.backward:
        raise TypeError(
            f"model: {type(model).__name__} overrides forward or backward, which training and evaluation do not call; "
            "make it a layer"
        )
    if getattr(optimizer, "model", model) is not model:
        raise ValueError("optimizer: it was created for another model")
    if model.input_shape is None:
        model.set_input_shape(dataset.image_shape)
    if model.input_shape != dataset.image_shape:
        raise ValueError(f"{name}: the model takes images {model.input_shape}, got {dataset.image_shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < dataset.classes:
        raise ValueError(
            f"{name}: labels go up to {dataset.classes - 1}, but the model's output has shape {model.shapes[-1]}"
        )
