"""Training: batches of a data set, one step, the loop over epochs, evaluation."""

import contextlib
import math
import time

import numpy as np

from tinycnn import _check, backend
from tinycnn.losses import CrossEntropyLoss


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
    """

    def __init__(self, images, labels, *, mean=None, std=None, padding=0, device="cpu"):
        images = _check.array("images", images)
        if images.ndim == 3:
            images = images[:, None]
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, H, W) or (N, C, H, W), got {images.shape}")
        if images.dtype != np.uint8:
            images = _check.finite("images", images.astype(np.float32))
        labels = _check.labels("labels", labels, len(images), np.iinfo(np.int64).max)
        channels, height, width = images.shape[1:]
        unit = 255 if images.dtype == np.uint8 else 1
        if mean is None:
            mean = images.mean(axis=(0, 2, 3), dtype=np.float64) / unit
        if std is None:
            std = images.std(axis=(0, 2, 3), dtype=np.float64) / unit
            std[std == 0] = 1  # a constant channel becomes zero
        self.mean = np.broadcast_to(_check.finite("mean", np.asarray(mean, np.float64)), (channels,))
        self.std = np.broadcast_to(_check.finite("std", np.asarray(std, np.float64)), (channels,))
        if (self.std <= 0).any():
            raise ValueError(f"std must be positive, got {self.std.min()}")
        self.padding = _check.pair("padding", padding, 0)
        self.k = backend.get(device)
        self.images, self.labels = self.k.to_device(images), self.k.to_device(labels)
        self.scale, self.shift = (
            self.k.to_device(1 / (unit * self.std)),
            self.k.to_device(-self.mean / self.std),
        )
        self.classes = int(labels.max()) + 1
        self.image_shape = (channels, height + 2 * self.padding[0], width + 2 * self.padding[1])
        self._target = self.k.empty((0,), np.int64)

    def __len__(self):
        return len(self.images)

    def gather(self, x, index):
        """Write the images `index` (n,) int64 into x (n, *image_shape); returns their labels (n,), valid until the next
        call."""
        if len(index) > len(self._target):
            self._target = self.k.empty((len(index),), np.int64)
        target = self._target[: len(index)]
        self.k.gather(x, target, self.images, self.labels, index, self.scale, self.shift, self.padding)
        return target


def forward_step(model, criterion, batches, index):
    """The loss on the images `index`; leaves the outputs and their gradient in the model's buffers."""
    n = len(index)
    target = batches.gather(model.input_buffer(n), index)
    model.run_forward(n)
    y, dy = model.output_buffers(n)
    criterion.prepare(model.k, n, y.shape[-1], model.dtype)
    criterion.run(dy, y, target)
    return criterion.value(n)


def train_step(model, criterion, optimizer, batches, index):
    """One step on the images `index` (n,) int64 of `batches`.  Returns the loss before the step.

    A loss that is not finite raises DivergedError, and nothing is updated.
    """
    n = len(index)
    if model.input_shape is None:
        check_fit(model, batches, "batches")
    loss = forward_step(model, criterion, batches, index)
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
    validation=None,
    rng=None,
    on_epoch=None,
    progress=True,
):
    """Train for `epochs` passes over `train`, in a new random order each, and return the history.

    train, validation  `Batches`; the validation set is evaluated after every epoch
    rng                seed or generator of the orders
    on_epoch           called with each epoch's record
    progress           show a bar on stderr, where that is a terminal

    The history is a list of records, one an epoch: epoch, train_loss, train_accuracy (both while training), val_loss,
    val_accuracy (if there is a validation set), lr (at the end), seconds (of training), images_per_second.

    Whatever stops the training (Ctrl-C, DivergedError), the model is left with the weights of the last complete epoch.
    """
    epochs, batch_size = _check.integer("epochs", epochs, 1), _check.integer("batch_size", batch_size, 1)
    check_fit(model, train, "train")
    if validation is not None:
        check_fit(model, validation, "validation")
    rng = np.random.default_rng(rng)
    history, good = [], np.array(model.theta)
    batch_size = min(batch_size, len(train))
    model.reserve(max(batch_size, model.reserved))
    try:
        for epoch in range(1, epochs + 1):
            record = {
                "epoch": epoch,
                **_epoch(model, criterion, optimizer, train, batch_size, epoch, epochs, rng, progress),
            }
            if not np.isfinite(model.k.to_host(model.theta)).all():
                raise DivergedError(model.first_not_finite(0) or "the parameters", optimizer.steps, epoch)
            if validation is not None:
                record["val_loss"], record["val_accuracy"], _ = evaluate(model, validation)
            good[...] = model.k.to_host(model.theta)
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
    except BaseException:
        model.theta[...] = model.k.to_device(good)
        raise
    return history


def _epoch(model, criterion, optimizer, train, batch_size, epoch, epochs, rng, progress):
    from tqdm.auto import tqdm

    order = rng.permutation(len(train))
    bar = tqdm(
        total=len(train), desc=f"epoch {epoch}/{epochs}", unit=" images", unit_scale=True, leave=False,
        disable=None if progress else True, mininterval=0.2,
    )  # fmt: skip
    losses, right, seen, shown, start = 0.0, 0, 0, 0.0, time.perf_counter()
    model.train()
    with bar:
        for at in range(0, len(train), batch_size):
            index = model.k.to_device(order[at : at + batch_size])
            try:
                loss = train_step(model, criterion, optimizer, train, index)
            except DivergedError as error:
                raise DivergedError(error.layer, error.step, epoch) from None
            n = len(index)
            losses, seen = losses + loss * n, seen + n
            right += criterion.count_right(train.labels[index]) if hasattr(criterion, "count_right") else 0
            now = time.perf_counter()
            if now - shown > 0.2:
                shown = now
                bar.set_postfix_str(f"loss {losses / seen:.4f}, accuracy {right / seen:.2%}", refresh=False)
            bar.update(n)
    seconds = time.perf_counter() - start
    return {
        "train_loss": losses / seen,
        "train_accuracy": right / seen,
        "lr": optimizer.lr,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def evaluate(model, batches, criterion=None, batch_size=250):
    """(loss, accuracy, logits) of the model in eval mode on all of `batches`; logits: (N, K) NumPy.

    The loss is plain cross entropy unless another criterion is given.
    """
    check_fit(model, batches, "batches")
    criterion = CrossEntropyLoss() if criterion is None else criterion
    batch_size = _check.integer("batch_size", batch_size, 1)
    was, total, outputs = model.training, 0.0, []
    model.eval()
    for at in range(0, len(batches), batch_size):
        index = model.k.to_device(np.arange(at, min(at + batch_size, len(batches))))
        total += forward_step(model, criterion, batches, index) * len(index)
        outputs.append(np.array(model.k.to_host(model.output_buffers(len(index))[0])))
    model.train(was)
    logits = np.concatenate(outputs)
    accuracy = float((logits.argmax(axis=1) == model.k.to_host(batches.labels)).mean())
    return total / len(batches), accuracy, logits


def warm_up(model, criterion, optimizer, batches, batch_size):
    """Compile (or load) every kernel that a step needs, by taking one and undoing it.  Returns the seconds it took."""
    start = time.perf_counter()
    theta, state = np.array(model.theta), optimizer.state_dict()
    index = model.k.to_device(np.arange(min(batch_size, len(batches))))
    with contextlib.suppress(DivergedError):  # the training itself will say so, with the right step
        train_step(model, criterion, optimizer, batches, index)
    model.theta[...] = model.k.to_device(theta)
    optimizer.load_state_dict(state)
    return time.perf_counter() - start


def check_fit(model, batches, name):
    """ValueError unless the model takes the images of `batches` and has an output for each of its classes."""
    if model.input_shape is None:
        model.set_input_shape(batches.image_shape)
    if model.input_shape != batches.image_shape:
        raise ValueError(f"{name}: the model takes images {model.input_shape}, got {batches.image_shape}")
    if len(model.shapes[-1]) != 1 or model.shapes[-1][0] < batches.classes:
        raise ValueError(
            f"{name}: labels go up to {batches.classes - 1}, but the model's output has shape {model.shapes[-1]}"
        )
