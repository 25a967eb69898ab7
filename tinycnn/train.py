"""Training: one step, the loop over epochs, evaluation."""

import contextlib
import math
import sys
import time
from typing import Any

import numpy as np

from tinycnn import _check, _streams
from tinycnn._tracked import Replay, Tracked, is_replayable
from tinycnn.dataset import DataLoader, DeviceDataset, check_indices
from tinycnn.errors import DeviceError, DivergedError
from tinycnn.losses import CrossEntropyLoss, Loss
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer

__all__ = ["DivergedError", "StepRunner", "evaluate", "fit", "train_step", "warm_up"]

EVALUATION_BATCH = 250


class StepRunner:
    """A model, a loss and a data set, gone through batch by batch: all training and evaluation does it this way.

    loader     reads the images
    optimizer  None where nothing is trained
    totals     (5,) float64 on the device: see the kernel `accumulate_metrics`

    `step(n)`, or its halves `compute_loss(n)` and `update(n)`, run as they are written here; `replay(n)` and
    `replay_loss(n)` do the same by captures, one for each batch size, where everything is known to be made of kernels.
    """

    def __init__(self, model, criterion, loader, optimizer=None):
        self.model, self.criterion, self.loader, self.optimizer = model, criterion, loader, optimizer
        self.totals = model.ops.empty((5,), np.float64)
        self.target = loader.target
        self.captures: dict[tuple, Any] = {}
        self.settings = loader.augment_settings()

    def matches(self, model, criterion, batches):
        """Whether it is of these."""
        return self.model is model and self.criterion is criterion and self.loader.data is batches

    def reserve(self, n):
        """Let the loss have buffers for n images."""
        self.criterion.ensure_allocated(self.model.ops, n, self.model.shapes[-1][-1], self.model.dtype)

    def compute_loss(self, n, dry=False):
        """The loss of the next n images; leaves the outputs and their gradient in the plan's buffers."""
        plan, criterion = self.model.plan(n), self.criterion
        self.reserve(n)
        self.target = self.loader.next(plan.x)
        plan.forward(dry)
        if not dry or is_replayable(criterion):
            criterion.forward_backward(plan.dy, plan.y, self.target)

    def update(self, n, dry=False):
        """The gradient, a step of the optimizer, and on to the next images."""
        self.model.plan(n).backward(dry_run=dry)
        if not dry or is_replayable(self.optimizer):
            self.optimizer.step()
        self.criterion.accumulate_metrics(self.totals, self.loader.cursor, self.target)

    def step(self, n, dry=False):
        """A training step on the next n images.

        It allocates nothing and waits for nothing, so that on a GPU it can be captured.   dry: see `Plan.forward`
        """
        self.compute_loss(n, dry)
        self.update(n, dry)

    def replay(self, n):
        """`step`."""
        self._replay(n, self.step)

    def replay_loss(self, n):
        """`compute_loss`."""
        self._replay(n, self.compute_loss)

    def _replay(self, n, step):
        key, plan = (n, step.__name__, self.model.training), self.model.plan(n)
        made, replay = self.captures.get(key, (None, None))
        if made is not plan:  # whose buffers it uses
            self.reserve(n)
            parts = *self.model.layers, self.criterion, self.loader.data, self.optimizer
            replay = Replay(self.model.ops, lambda: step(n), *(part for part in parts if part is not None))
            self.captures[key] = plan, replay
        replay()

    def checked_step(self, n, epoch=None):
        """`step`, but a loss that is not finite raises DivergedError, and nothing is updated.  Returns the loss."""
        self.replay_loss(n)
        loss = self.criterion.batch_loss(n)
        if not math.isfinite(loss):
            where = self.model.find_non_finite(self.model.plan(n)) or "the loss"
            raise DivergedError(where, self.optimizer.steps + 1, epoch)
        self._replay(n, self.update)
        return loss

    def start_epoch(self, order, repeat=False):
        """Begin to go through the images `order`."""
        if self.settings != (settings := self.loader.augment_settings()):
            self.settings, self.captures = settings, {}
        self.loader.start_epoch(order, repeat)
        self.model.ops.copy_to(self.totals, np.zeros(5))

    def read_metrics(self):
        """(loss, accuracy) of the epoch so far.  ArithmeticError if the loss is not finite."""
        loss, right, seen, _, shares = self.model.ops.to_host(self.totals)
        if not math.isfinite(loss):
            raise ArithmeticError
        knows_classes = self.criterion.predicts_classes()
        return _mean(self.criterion, loss, shares), float(right / seen) if knows_classes else math.nan

    @contextlib.contextmanager
    def exclusive(self):
        """Nobody else runs the model, or the loss, within it."""
        with self.model.lock, getattr(self.criterion, "lock", contextlib.nullcontext()):
            self.model.discard_forward()
            self.model.begin_run()
            try:
                yield
            finally:
                self.model.end_run()


def train_step(model, criterion, optimizer, batches, index):
    """One step on the images `index` (n,) int64 of `batches`.  Returns the loss before the step.

    A loss that is not finite raises DivergedError, and nothing is updated; numbers that are none of an image
    ValueError or TypeError.
    """
    check_fit(model, batches, "batches", criterion, optimizer)
    index, kept = check_indices(batches, index), vars(optimizer) if isinstance(optimizer, Tracked) else {}
    with model.lock:
        run = kept.get("_run")  # of the last call, with its captures
        if run is None or len(index) > len(run.loader.order) or not run.matches(model, criterion, batches):
            run = kept["_run"] = StepRunner(model, criterion, DataLoader(batches, longest=len(index)), optimizer)
        with run.exclusive():
            model.normalization = batches.normalization
            run.loader.start_epoch(index)
            return run.checked_step(len(index))


def fit(
    model,
    criterion,
    optimizer,
    train,
    *,
    epochs,
    batch_size=64,
    steps_per_epoch=None,
    reshuffle=True,
    validation=None,
    rng=None,
    on_epoch=None,
    progress=True,
):
    """Train for `epochs` passes over `train`, in a new random order each, and return the history.

    train, validation  `DeviceDataset`; the validation set is evaluated after every epoch, by `criterion`, or by plain
                       cross entropy where it is one with options of its own
    steps_per_epoch    so many batches make an epoch, in place of the whole of `train`; the next goes on where it ended
    reshuffle          False: the first epoch's random order in all of them
    rng                seed or generator of the orders
    on_epoch           called with each epoch's record; where it returns True (`EarlyStopping`), training ends there
    progress           show a bar on stderr, where that is a terminal

    At the beginning it finds out which kernels a step needs, and compiles what is missing.  Epochs are counted on where
    the optimizer has trained before; a schedule that is used up is refused (ValueError).  What is trained on says how
    the model scales raw pixels from then on (`model.normalization`).

    The history is a list of records, one an epoch: epoch, train_loss, train_accuracy (both while training), val_loss,
    val_accuracy (if there is a validation set), lr (at the end), seconds (of training), images_per_second.

    Whatever stops the training (Ctrl-C, DivergedError), the model is left with the weights of the last complete epoch.
    With an optimizer that averages (`optim.EMA`) these are the averaged weights, and so are those at the end of a
    training that nothing stops, those that are validated, and those that `on_epoch` finds in the model.  If `on_epoch`
    has a method `at_end`, that is called when training ends otherwise than by an error.
    """
    epochs, batch_size = _check.integer("epochs", epochs, 1), _check.integer("batch_size", batch_size, 1)
    _check.optional_callable("on_epoch", on_epoch)
    check_fit(model, train, "train", criterion, optimizer)
    if validation is not None:
        check_fit(model, validation, "validation")
    if getattr(optimizer, "schedule_exhausted", bool)():
        raise ValueError(
            f"optimizer: its schedule of {len(optimizer.lr_schedule)} rates is used up after {optimizer.steps} steps, "
            f"and the last one, {optimizer.lr_schedule[-1]:g}, would stay; assign the rates to come, a number or an array, "
            "to optimizer.lr"
        )
    rng = _check.generator("rng", rng)
    batch_size = min(batch_size, len(train))
    each = len(train)  # images an epoch
    if steps_per_epoch is not None:
        each = _check.integer("steps_per_epoch", steps_per_epoch, 1) * batch_size
        if each > len(train):
            raise ValueError(
                f"steps_per_epoch must be at most {len(train) // batch_size} with batches of {batch_size} of "
                f"{len(train)} images, got {steps_per_epoch}"
            )
    # The largest buffers first, so that all plans share them.
    evaluated = 0 if validation is None else min(EVALUATION_BATCH, len(validation))
    most = max(batch_size, evaluated, optimizer.patterns)
    run = StepRunner(model, criterion, DataLoader(train, augment=True), optimizer)
    measure = CrossEntropyLoss() if type(criterion) is CrossEntropyLoss else criterion
    check = None if validation is None else StepRunner(model, measure, DataLoader(validation))
    with run.exclusive():
        model.reserve(max(most, model.max_batch))
        run.reserve(most)
        _compile(run, {batch_size, each % batch_size or batch_size})
    model.normalization = train.normalization
    counted = getattr(optimizer, "_epochs", np.zeros(1, np.int64))
    before = int(counted[0])
    history, good, order, ahead = [], _state(model, optimizer), None, np.empty(0, np.int64)
    try:
        for epoch in range(before + 1, before + epochs + 1):
            if order is None or reshuffle:
                if len(ahead) < each:
                    ahead = np.concatenate([ahead, rng.permutation(len(train))])
                order, ahead = ahead[:each], ahead[each:]
            with run.exclusive():
                model.train()
                optimizer.before_epoch(criterion, train, rng)
                begun = _state(model, optimizer)
                try:
                    title = f"{epoch}/{before + epochs}"
                    told = {"epoch": epoch} | _epoch(run, optimizer, order, batch_size, title, progress)
                except ArithmeticError:
                    # Which layer was it?  The same steps again, from the same state, have the same bits.
                    _restore(model, optimizer, begun)
                    _look_at_every_step(run, order, batch_size, epoch)
                    raise
                if not np.isfinite(model.ops.to_host(model.theta)).all():
                    where = model.find_non_finite(model.plan(batch_size)) or "the parameters"
                    raise DivergedError(where, optimizer.steps, epoch)
            counted[0] += 1
            complete, stop = _state(model, optimizer), False
            with optimizer.average_parameters():
                if check is not None:
                    told["val_loss"], told["val_accuracy"], _ = _evaluate(check, EVALUATION_BATCH)
                good = complete
                history.append(told)
                if on_epoch is not None:
                    stop = on_epoch(
                        told
                    )  # True, of Python or NumPy, and not just anything: a lambda may return what it likes
                    stop = isinstance(stop, (bool, np.bool_)) and bool(stop)
            good = _state(model, optimizer)  # once more: on_epoch may have changed the learning rates to come
            if stop:
                break
        optimizer.use_average()
        if hasattr(on_epoch, "at_end"):
            on_epoch.at_end()
    except BaseException:
        with contextlib.suppress(DeviceError):  # a GPU that has failed takes nothing any more: its error is the news
            _restore(model, optimizer, good)
            optimizer.use_average()
        raise
    finally:
        run.loader.close()
    return history


def _state(model, optimizer):
    return model.snapshot(), optimizer.state_dict()


def _restore(model, optimizer, state):
    model.restore(state[0])
    optimizer.load_state_dict(state[1])


def _epoch(run, optimizer, order, batch_size, title, progress):
    """Go through the images `order` and return the record.  ArithmeticError if the loss stops being finite.

    The totals are read at the end, and for the progress bar a few times a second, but not after every step: on a GPU
    that would mean waiting for it.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        total=len(order), desc=f"epoch {title}", unit=" images", unit_scale=True, leave=False,
        disable=None if progress else True, mininterval=0.2, file=_streams.SafeStream(sys.stderr),
    )  # fmt: skip
    run.start_epoch(order)
    start = shown = time.perf_counter()
    with bar:
        for at in range(0, len(order), batch_size):
            n = min(batch_size, len(order) - at)
            run.replay(n)
            now = time.perf_counter()
            if now - shown > 0.2:
                shown = now
                bar.set_postfix_str("loss {:.4f}, accuracy {:.2%}".format(*run.read_metrics()), refresh=False)
            bar.update(n)
        loss, accuracy = run.read_metrics()
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "lr": optimizer.lr,
        "seconds": seconds,
        "images_per_second": len(order) / seconds,
    }


def _look_at_every_step(run, order, batch_size, epoch):
    """The steps of an epoch one by one, until the first whose loss is not finite raises DivergedError."""
    run.start_epoch(order, repeat=True)
    for at in range(0, len(order), batch_size):
        run.checked_step(min(batch_size, len(order) - at), epoch)


def evaluate(model, batches, criterion=None, batch_size=EVALUATION_BATCH):
    """(loss, accuracy, logits) of the model in eval mode on all of `batches`; logits: (N, K) NumPy.

    The loss is plain cross entropy unless another criterion is given, and that of all images together, whatever the
    batch size: their (weighted) mean, or their sum where the criterion's reduction is "sum" or "none".
    """
    check_fit(model, batches, "batches", criterion)
    criterion = CrossEntropyLoss() if criterion is None else criterion
    batch_size = _check.integer("batch_size", batch_size, 1)
    return _evaluate(StepRunner(model, criterion, DataLoader(batches)), batch_size)


def _evaluate(run, batch_size):
    """`evaluate` by a `StepRunner`, which may be used again."""
    model, criterion, batches = run.model, run.criterion, run.loader.data
    total, whole, outputs, right = 0.0, 0.0, [], 0
    labels = model.ops.to_host(batches.labels)
    with run.exclusive(), model.evaluating():
        for at in range(0, len(batches), batch_size):
            n = min(batch_size, len(batches) - at)
            run.loader.seek(at)
            run.replay_loss(n)
            loss, share = criterion.weighted_sum(criterion.batch_loss(n), labels[at : at + n])
            total, whole = total + loss, whole + share
            outputs.append(np.array(model.ops.to_host(model.plan(n).y)))
            predicted = criterion.predictions(n)
            predicted = outputs[-1].argmax(axis=1) if predicted is None else predicted
            right += np.count_nonzero(predicted == labels[at : at + n])
    return _mean(criterion, total, whole), right / len(batches), np.concatenate(outputs)


def _mean(criterion, total, shares):
    """The loss of a data set from its sum; NaN where every target is ignored, as in torch."""
    if criterion.reduction != "mean":
        return float(total)
    return float(total / shares) if shares else math.nan


def warm_up(model, criterion, optimizer, batches, batch_size):
    """Compile (or load) every kernel that a step needs, and take one and undo it.  Returns the seconds it took."""
    start, n = time.perf_counter(), min(batch_size, len(batches))
    check_fit(model, batches, "batches", criterion, optimizer)
    run = StepRunner(model, criterion, DataLoader(batches), optimizer)
    before = _state(model, optimizer)
    with run.exclusive():
        _compile(run, {n})
        with contextlib.suppress(DivergedError):  # the training itself will say so, with the right step
            run.checked_step(n)
        _restore(model, optimizer, before)
    return time.perf_counter() - start


def _compile(run, sizes):
    """Compile what `step` on so many images needs, before it is taken."""
    model, optimizer = run.model, run.optimizer
    before, training = _state(model, optimizer), model.training
    model.train()
    try:
        model.ops.precompile(lambda: [run.step(n, dry=True) for n in sizes])
    finally:
        model.train(training)
        _restore(model, optimizer, before)


def check_fit(model, batches, name, criterion=None, optimizer=None):
    """ValueError or TypeError unless the parts of a training are what they are called, and fit together."""
    _check.instance("model", model, Sequential, "a Sequential")
    hint = "make one of images and labels: DeviceDataset(images, labels)"
    _check.instance(name, batches, DeviceDataset, "a data set, of the class DeviceDataset", hint)
    for part, what, method in ((criterion, "criterion", "forward_backward"), (optimizer, "optimizer", "step")):
        if part is not None and (isinstance(part, type) or not hasattr(part, method)):
            words = (
                "a loss, CrossEntropyLoss() say" if method == "forward_backward" else "an optimizer, Adam(model) say"
            )
            swapped = "; criterion comes before optimizer" if isinstance(part, (Optimizer, EMA, Loss)) else ""
            raise TypeError(f"{what} must be {words}, got {_check.describe(part)}{swapped}")
    if type(model).forward is not Sequential.forward or type(model).backward is not Sequential.backward:
        raise TypeError(
            f"model: {type(model).__name__} has a forward or backward of its own, which training and evaluation would "
            "not call; make it a layer"
        )
    if getattr(optimizer, "model", model) is not model:
        raise ValueError("optimizer: it was made for another model than the one that is to be trained")
    if model.input_shape is None:
        model.set_input_shape(batches.image_shape)
    if model.input_shape != batches.image_shape:
        raise ValueError(f"{name}: the model takes images {model.input_shape}, got {batches.image_shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < batches.classes:
        raise ValueError(
            f"{name}: labels go up to {batches.classes - 1}, but the model's output has shape {model.shapes[-1]}"
        )
