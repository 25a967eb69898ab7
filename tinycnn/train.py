"""Training: batches of a data set, one step, the loop over epochs, evaluation."""

import contextlib
import functools
import math
import sys
import time

import numpy as np

from tinycnn import _check, _streams, backend
from tinycnn._shown import Shown
from tinycnn.augment import Augmentation
from tinycnn.losses import CrossEntropyLoss, Loss
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer

EVALUATION_BATCH = 250


class DivergedError(ArithmeticError):
    """The loss or a parameter stopped being finite.

    step, epoch: where, counted from 1 (epoch is None outside `fit`)    layer: name of the first layer with a non-finite
    number    The model holds the last good weights: in `fit` those of the end of the last complete epoch.
    """

    def __init__(self, layer, step, epoch=None):
        self.layer, self.step, self.epoch = layer, step, epoch
        where = f"step {step}" + (f" (epoch {epoch})" if epoch else "")
        super().__init__(
            f"training diverged at {where}: {layer} is the first to hold numbers that are not finite; "
            "try a smaller learning rate"
        )


class Batches:
    """A data set on the device, handed out as normalised batches.

    images     (N, H, W) or (N, C, H, W); uint8 is read as 0 ... 1, other types as they are
    labels     (N,) class numbers
    mean, std  a number, or one a channel: pixels become (pixel - mean) / std.  Found from the images if not given;
               give a validation or test set those of the training set
    padding    this many pixels of zero (before normalising) are put round every image
    augment    transformations (`RandomAffine`, `ElasticTransform`, `ColorJitter`) that `fit` sees the images through,
               new ones in every epoch; `evaluate`, and whatever else asks for images by number, sees them as they are
    seed       where the transformations' random numbers begin
    """

    def __init__(self, images, labels, *, mean=None, std=None, padding=0, augment=(), seed=0, device="cpu"):
        device = backend.choose(device)
        images, labels = backend.local("images", images, device)[0], backend.local("labels", labels, device)[0]
        images = _check.array("images", images)
        if images.ndim == 3:
            images = images[:, None]
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, H, W) or (N, C, H, W), got {images.shape}")
        if images.dtype != np.uint8:
            images = _check.finite("images", images.astype(np.float32))
        labels = _check.labels("labels", labels, len(images))
        channels, height, width = images.shape[1:]
        unit = 255 if images.dtype == np.uint8 else 1
        if mean is None:
            mean = images.mean(axis=(0, 2, 3), dtype=np.float64) / unit
        if std is None:
            std = images.std(axis=(0, 2, 3), dtype=np.float64) / unit
            std[std == 0] = 1  # a constant channel becomes zero
        self.mean, self.std = _check.per_channel("mean", mean, channels), _check.per_channel("std", std, channels)
        if (self.std <= 0).any():
            raise ValueError(f"std must be positive, got {self.std.min()}")
        self.padding = _check.pair("padding", padding, 0)
        self.k = backend.get(device)
        self._options = {"augment": augment, "device": "" if device == "cpu" else repr(device)}
        self.images, self.labels = self.k.to_device(images), self.k.to_device(labels)
        self.scale, self.shift = 1 / (unit * self.std), -self.mean / self.std
        # In a batch a pixel of zero is -mean/std, and one of `unit` is 1/std more.
        self.augmentation = Augmentation(augment, seed, self.k, 1 / self.std, self.shift)
        self._factors = {}  # scale and shift on the device, by dtype
        self.classes = int(labels.max()) + 1
        self.image_shape = (channels, height + 2 * self.padding[0], width + 2 * self.padding[1])
        # An epoch's order, and how far it has been gone through, are on the device, where a recorded step reads them.
        self.order, self.cursor = self.k.to_device(np.arange(len(images))), self.k.empty((1,), np.int64)
        self._start = self.k.empty((1,), np.int64)
        self._target = self.k.empty((0,), np.int64)

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        shape = " x ".join(map(str, self.image_shape))
        more = "".join(f", {name}={value}" for name, value in self._options.items() if value)
        return f"Batches({len(self):,} images of {shape}, {self.classes} classes{more})"

    def gather(self, x, index):
        """Write the images `index` (n,) int64 into x (n, *image_shape); returns their labels (n,), valid until the next
        call."""
        return self._gather(x, index, self._start)

    def shuffle(self, order, again=False):
        """Begin an epoch: `gather_next` will give the images in the order `order`, at most all of them.

        again   not a new epoch, but the last one with the same random numbers
        """
        self.augmentation.begin(again)
        self.k.write(self.order[: len(order)], order)
        self.move_to(0)

    def move_to(self, position):
        """Let the epoch go on with the image at `position`."""
        self.k.write(self.cursor, np.array([position]))

    def gather_next(self, x):
        """`gather` for the next len(x) images of the epoch, augmented.  The kernel `tally` moves on."""
        target = self._gather(self.augmentation.input_buffer(x), self.order, self.cursor)
        self.augmentation.run(x)
        return target

    def _gather(self, x, order, cursor):
        n = len(x)
        if n > len(self._target):
            self._target = self.k.empty((n,), np.int64)
        if x.dtype not in self._factors:
            self._factors[x.dtype] = [self.k.to_device(a.astype(x.dtype)) for a in (self.scale, self.shift)]
        target = self._target[:n]
        self.k.gather(x, target, self.images, self.labels, order, cursor, *self._factors[x.dtype], self.padding)
        return target


def forward_step(model, criterion, batches, index):
    """The loss on the images `index`; leaves the outputs and their gradient in the model's buffers."""
    return _loss(model, criterion, batches.gather(model.input_buffer(len(index)), index))


def _loss(model, criterion, target):
    """The loss on the images that have been gathered, whose labels are `target`."""
    n = len(target)
    model.run_forward(n)
    y, dy = model.output_buffers(n)
    criterion.prepare(model.k, n, model.shapes[-1][-1], model.dtype)
    criterion.run(dy, y, target)
    return criterion.value(n)


def train_step(model, criterion, optimizer, batches, index):
    """One step on the images `index` (n,) int64 of `batches`.  Returns the loss before the step.

    A loss that is not finite raises DivergedError, and nothing is updated.
    """
    _check_roles(model, criterion, optimizer)
    _check_data("batches", batches)
    if model.input_shape is None:
        check_fit(model, batches, "batches")
    return _learn(model, criterion, optimizer, batches.gather(model.input_buffer(len(index)), index))


def _learn(model, criterion, optimizer, target):
    """`train_step` on the images that have been gathered."""
    n = len(target)
    loss = _loss(model, criterion, target)
    if not math.isfinite(loss):
        raise DivergedError(model.first_not_finite(n) or "the loss", optimizer.steps + 1)
    model.run_backward(n)
    optimizer.step()
    return loss


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

    train, validation  `Batches`; the validation set is evaluated after every epoch, by `criterion`, or by plain cross
                       entropy where it is one with options of its own
    steps_per_epoch    so many batches make an epoch, in place of the whole of `train`; the next goes on where it ended
    reshuffle          False: the first epoch's random order in all of them
    rng                seed or generator of the orders
    on_epoch           called with each epoch's record; where it returns True (`EarlyStopping`), training ends there
    progress           show a bar on stderr, where that is a terminal

    At the beginning it finds out which kernels a step needs, and compiles what is missing, by going through a step in
    which no kernel runs: Python code in it, a loss of one's own say, is called once more, on numbers without meaning.

    The history is a list of records, one an epoch: epoch, train_loss, train_accuracy (both while training), val_loss,
    val_accuracy (if there is a validation set), lr (at the end), seconds (of training), images_per_second.

    Whatever stops the training (Ctrl-C, DivergedError), the model is left with the weights of the last complete epoch.
    With an optimizer that averages (`optim.EMA`) these are the averaged weights, and so are those at the end of a
    training that nothing stops, those that are validated, and those that `on_epoch` finds in the model.  If `on_epoch`
    has a method `at_end`, that is called when training ends otherwise than by an error.
    """
    _check_roles(model, criterion, optimizer)
    epochs, batch_size = _check.integer("epochs", epochs, 1), _check.integer("batch_size", batch_size, 1)
    _check.function("on_epoch", on_epoch)
    check_fit(model, train, "train")
    if validation is not None:
        check_fit(model, validation, "validation")
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
    # Buffers for the evaluation too: a recorded step would hold on to smaller ones that are replaced later.
    evaluated = 0 if validation is None else min(EVALUATION_BATCH, len(validation))
    most = max(batch_size, evaluated, optimizer.patterns)
    model.reserve(max(most, model.reserved))
    criterion.prepare(model.k, most, model.shapes[-1][-1], model.dtype)
    measure = None if isinstance(criterion, CrossEntropyLoss) else criterion
    totals = model.k.empty((4,), np.float64)
    sizes = {batch_size, each % batch_size or batch_size}

    def record():
        return {n: recorded_step(model, criterion, optimizer, train, totals, n) for n in sizes}

    _compile(model, criterion, optimizer, train, sizes)
    steps = record()
    history, good, order, ahead = [], _state(model, optimizer), None, np.empty(0, np.int64)
    try:
        for epoch in range(1, epochs + 1):
            if order is None or reshuffle:
                if len(ahead) < each:
                    ahead = np.concatenate([ahead, rng.permutation(len(train))])
                order, ahead = ahead[:each], ahead[each:]
            model.train()
            optimizer.before_epoch(criterion, train, rng)
            begun = _state(model, optimizer)
            try:
                told = {"epoch": epoch} | _epoch(steps, optimizer, train, totals, order, f"{epoch}/{epochs}", progress)
            except ArithmeticError:
                # Which layer was it?  The same steps again, from the same state, have the same bits.
                _restore(model, optimizer, begun)
                _look_at_every_step(model, criterion, optimizer, train, order, batch_size, epoch)
                raise
            if not np.isfinite(model.k.to_host(model.theta)).all():
                raise DivergedError(model.first_not_finite(0) or "the parameters", optimizer.steps, epoch)
            complete, stop = _state(model, optimizer), False
            with optimizer.evaluated():
                if validation is not None:
                    told["val_loss"], told["val_accuracy"], _ = evaluate(model, validation, measure)
                good = complete
                history.append(told)
                if on_epoch is not None:
                    stop = on_epoch(told) is True  # not just anything: a lambda may return what it likes
                    steps = record()  # it may have changed the numbers in them
            good = _state(model, optimizer)  # once more: on_epoch may have changed the learning rates to come
            if stop:
                break
        optimizer.settle()
        if hasattr(on_epoch, "at_end"):
            on_epoch.at_end()
    except BaseException:
        _restore(model, optimizer, good)
        optimizer.settle()
        raise
    return history


class EarlyStopping(Shown):
    """Ends a training that no longer gets better: ``fit(..., on_epoch=EarlyStopping(...))``.  One for each training.

    monitor       the number in the epochs' records that is watched
    patience      after so many epochs in a row that were not better than the best, training ends
    min_delta     less than this is not better
    mode          "min" or "max": which way is better
    restore_best  a model: at the end it is given the weights of the best epoch

    best, best_epoch: the best number so far, and when.  Names and definition are those of Keras.
    """

    def __init__(self, monitor="val_loss", patience=5, min_delta=0.0, mode="min", restore_best=None):
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a number in the record, got {monitor!r}")
        if restore_best is not None and not isinstance(restore_best, Sequential):
            raise TypeError(f"restore_best must be the model that is trained, or None, got {restore_best!r}")
        self.monitor, self.patience = monitor, _check.integer("patience", patience, 0)
        self.min_delta = _check.number("min_delta", min_delta, 0)
        self.mode = _check.choice("mode", mode, ("min", "max"))
        self.best, self.best_epoch = math.inf if mode == "min" else -math.inf, 0
        self._model, self._weights, self._waited = restore_best, None, 0

    def __call__(self, record):
        """Whether to stop after the epoch of this record; NaN is not better.  ValueError if `monitor` is not in it."""
        if self.monitor not in record:
            raise ValueError(f"monitor must be one of {', '.join(map(repr, record))}, got {self.monitor!r}")
        value = record[self.monitor]
        better = self.best - value if self.mode == "min" else value - self.best
        if better > self.min_delta:
            self.best, self.best_epoch, self._waited = value, record["epoch"], 0
            if self._model is not None:
                self._weights = self._model.snapshot()
            return False
        self._waited += 1
        return self._waited >= self.patience

    def at_end(self):
        """Put the weights of the best epoch into the model `restore_best`; `fit` calls this when training ends."""
        if self._model is not None and self._weights is not None:
            self._model.restore(self._weights)


def _state(model, optimizer):
    return model.snapshot(), optimizer.state_dict()


def _restore(model, optimizer, state):
    model.restore(state[0])
    optimizer.load_state_dict(state[1])


def _step(model, criterion, optimizer, train, totals, n):
    """One whole step on the next n images of the epoch; the loss is added to `totals`.

    It allocates nothing and waits for nothing, so that on a GPU it can be recorded.
    """
    target = train.gather_next(model.input_buffer(n))
    model.run_forward(n)
    y, dy = model.output_buffers(n)
    criterion.run(dy, y, target)
    model.run_backward(n)
    optimizer.step()
    criterion.tally(totals, train.cursor, target)


def recorded_step(model, criterion, optimizer, train, totals, n):
    """`_step` as the backend replays it."""
    return model.k.capture(functools.partial(_step, model, criterion, optimizer, train, totals, n))


def _epoch(steps, optimizer, train, totals, order, title, progress):
    """Go through `train` in the order `order` and return the record.  ArithmeticError if the loss stops being finite.

    The totals are read at the end, and for the progress bar a few times a second, but not after every step: on a GPU
    that would mean waiting for it.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        total=len(order), desc=f"epoch {title}", unit=" images", unit_scale=True, leave=False,
        disable=None if progress else True, mininterval=0.2, file=_streams.Forgiving(sys.stderr),
    )  # fmt: skip

    def read():
        loss, right, seen, _ = train.k.to_host(totals)
        if not math.isfinite(loss):
            raise ArithmeticError
        return float(loss / seen), float(right / seen)

    train.shuffle(order)
    train.k.write(totals, np.zeros(4))
    start = shown = time.perf_counter()
    batch_size = max(steps)
    with bar:
        for at in range(0, len(order), batch_size):
            n = min(batch_size, len(order) - at)
            steps[n]()
            now = time.perf_counter()
            if now - shown > 0.2:
                shown = now
                bar.set_postfix_str("loss {:.4f}, accuracy {:.2%}".format(*read()), refresh=False)
            bar.update(n)
        loss, accuracy = read()
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "lr": optimizer.lr,
        "seconds": seconds,
        "images_per_second": len(order) / seconds,
    }


def _look_at_every_step(model, criterion, optimizer, train, order, batch_size, epoch):
    """The steps of an epoch one by one, until the first whose loss is not finite raises DivergedError."""
    train.shuffle(order, again=True)
    for at in range(0, len(order), batch_size):
        train.move_to(at)
        target = train.gather_next(model.input_buffer(min(batch_size, len(order) - at)))
        try:
            _learn(model, criterion, optimizer, target)
        except DivergedError as error:
            raise DivergedError(error.layer, error.step, epoch) from None


def evaluate(model, batches, criterion=None, batch_size=EVALUATION_BATCH):
    """(loss, accuracy, logits) of the model in eval mode on all of `batches`; logits: (N, K) NumPy.

    The loss is plain cross entropy unless another criterion is given.
    """
    criterion = CrossEntropyLoss() if criterion is None else criterion
    _check_roles(model, criterion)
    check_fit(model, batches, "batches")
    batch_size = _check.integer("batch_size", batch_size, 1)
    was, total, outputs, right = model.training, 0.0, [], 0
    labels = model.k.to_host(batches.labels)
    model.eval()
    for at in range(0, len(batches), batch_size):
        index = model.k.to_device(np.arange(at, min(at + batch_size, len(batches))))
        total += forward_step(model, criterion, batches, index) * len(index)
        outputs.append(np.array(model.k.to_host(model.output_buffers(len(index))[0])))
        predicted = criterion.predicted(len(index))
        predicted = outputs[-1].argmax(axis=1) if predicted is None else predicted
        right += np.count_nonzero(predicted == labels[at : at + len(index)])
    model.train(was)
    return total / len(batches), right / len(batches), np.concatenate(outputs)


def warm_up(model, criterion, optimizer, batches, batch_size):
    """Compile (or load) every kernel that a step needs, and take one and undo it.  Returns the seconds it took."""
    start, n = time.perf_counter(), min(batch_size, len(batches))
    check_fit(model, batches, "batches")
    _compile(model, criterion, optimizer, batches, {n})
    before, index = _state(model, optimizer), model.k.to_device(np.arange(n))
    with contextlib.suppress(DivergedError):  # the training itself will say so, with the right step
        train_step(model, criterion, optimizer, batches, index)
    _restore(model, optimizer, before)
    return time.perf_counter() - start


def _compile(model, criterion, optimizer, batches, sizes):
    """Compile what `_step` on so many images needs, before it is taken."""
    before, was, totals = _state(model, optimizer), model.training, model.k.empty((4,), np.float64)
    criterion.prepare(model.k, max(sizes), model.shapes[-1][-1], model.dtype)

    def steps():
        for n in sizes:
            _step(model, criterion, optimizer, batches, totals, n)

    model.train()
    try:
        model.k.compile_for(steps)
    finally:
        model.train(was)
        _restore(model, optimizer, before)


def _check_roles(model, criterion, optimizer=None):
    """TypeError unless each of them is what it is called."""
    _check.instance("model", model, Sequential, "a Sequential")
    swapped = "criterion comes before optimizer" if isinstance(criterion, (Optimizer, EMA)) else ""
    _check.instance("criterion", criterion, Loss, "a tinycnn loss", swapped)
    if optimizer is not None:
        _check.instance("optimizer", optimizer, (Optimizer, EMA), "a tinycnn optimizer")


def _check_data(name, batches):
    hint = "make one of images and labels: Batches(images, labels)"
    _check.instance(name, batches, Batches, "a data set, of the class Batches", hint)


def check_fit(model, batches, name):
    """ValueError unless the model takes the images of `batches` and has an output for each of its classes."""
    _check_data(name, batches)
    if model.input_shape is None:
        model.set_input_shape(batches.image_shape)
    if model.input_shape != batches.image_shape:
        raise ValueError(f"{name}: the model takes images {model.input_shape}, got {batches.image_shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < batches.classes:
        raise ValueError(
            f"{name}: labels go up to {batches.classes - 1}, but the model's output has shape {model.shapes[-1]}"
        )
