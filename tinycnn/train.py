"""Training: one step, the loop over epochs, evaluation."""

import bisect
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, _streams
from tinycnn._tracked import Replay, Tracked, is_builtin, is_replayable
from tinycnn._typing import Array, CompileProgress, DeviceArray, Rng, State
from tinycnn.batches import Batches, Stream, as_source, make_dataset, make_loader
from tinycnn.dataset import DataLoader, DeviceDataset, check_indices
from tinycnn.distributed import ALONE, Group, as_group
from tinycnn.errors import DeviceError, DivergedError, RankError
from tinycnn.layers import BatchNorm2d, Dropout
from tinycnn.losses import CrossEntropyLoss, Loss
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer
from tinycnn.plan import Plan
from tinycnn.resume import Saver, TrainingCheckpoint, training_settings

__all__ = ["DivergedError", "StepRunner", "evaluate", "fit", "train_step", "warm_up"]

EVALUATION_BATCH = 250
PIECE = 256  # images; the activations of many more leave the caches, and take memory
LANES = 16  # the most images in a vector register: the sizes of pieces are multiples of it

Record: TypeAlias = dict[str, Any]  # of an epoch: see `fit`
Data: TypeAlias = (  # what `fit` takes
    DeviceDataset | tuple[ArrayLike, ...] | Batches | Iterable[Any] | Callable[[], Iterable[Any]]
)
Snapshot: TypeAlias = tuple[list[Array], State]  # of a model and its optimizer


class Piece(NamedTuple):
    """A part of a batch that runs at once.

    start, size    first image in the batch, and number of images
    number, offset  number of the piece in the batch, and the first image in it: other ranks may have the rest of it
    """

    start: int
    size: int
    number: int
    offset: int


class StepRunner:
    """Runs a model and a loss on a data set, batch by batch.  All training and evaluation goes through it.

    loader     reads the images
    optimizer  None if nothing is trained
    totals     (5,) float64 on the device: see the kernel `accumulate_metrics`
    accumulation_steps
               number of batches whose gradients are added up for an update
    group      the processes that train: each runs its part of a batch, and the gradients are summed before an update

    `step(n)` and its halves, `compute_loss(n)` and `update(n)`, are the implementation.  `replay(n)` and
    `replay_loss(n)` replay captures of them, one per batch size, if all parts are known to call only kernels.

    A window of `accumulation_steps` batches makes one update.  Large batches run in `pieces`, one after the other.  If
    a window has more than one piece, or there are several ranks, each is an `accumulate(n, first)`, and the last is
    followed by `apply(images)`.
    """

    def __init__(
        self,
        model: Sequential,
        criterion: Loss,
        loader: DataLoader,
        optimizer: Optimizer | EMA | None = None,
        accumulation_steps: int = 1,
        group: Group = ALONE,
    ) -> None:
        self.model, self.criterion, self.loader, self.group = model, criterion, loader, group
        self.optimizer: Any = optimizer
        self.totals = model.ops.empty((5,), np.float64)
        self.target = loader.target
        self.targets: dict[int, tuple[DeviceArray, DeviceArray | None]] = {}  # and sample weights, by batch size
        self.captures: dict[tuple[Any, ...], tuple[Plan | None, Replay]] = {}
        self.augment_settings = loader.augment_settings()
        self.accumulation_steps, self.last_piece = accumulation_steps, 0  # last_piece: number of images
        self.window: list[float] = []  # weights (sizes, as a rule) of the pieces since the last update
        self.window_images = self.window_batches = 0  # of all ranks
        self.piece_weight = self.batch_weight = 0.0  # of this rank's images, in a mean
        self.pieces_so_far: list[int] = []  # of the epoch, up to and with each of its batches
        self.grad_sum: DeviceArray = model.ops.empty(0, model.dtype)

    def matches(self, model: Sequential, criterion: Loss, dataset: DeviceDataset) -> bool:
        """Whether the runner was made for exactly these objects."""
        return self.model is model and self.criterion is criterion and self.loader.dataset is dataset

    def plan(self, n: int) -> Plan:
        """The plan of n images; one with a backward if there is an optimizer, also of a model in evaluation mode."""
        return self.model.plan(n, evaluation=None if self.optimizer is None else False)

    def pieces(self, n: int) -> list[int]:
        """Sizes of the pieces in which a training step on n images runs: at most `PIECE` images, about equal.  [n] if a
        batch must be whole: if batch norm computes its statistics, images have weights in a mean, or a user's layer or
        loss may compare images."""
        count = -(-n // PIECE)
        if count == 1 or not self._can_split():
            return [n]
        size = -(-n // (count * LANES)) * LANES
        return [size] * (n // size) + [n % size] * (n % size > 0)

    def rank_pieces(self, n: int) -> list[Piece]:
        """The pieces of a batch of n images, or what of them is in this rank's part."""
        found, position = [], 0
        start, stop = self.group.part(n)
        for number, size in enumerate(self.pieces(n)):
            first, last = max(start, position), min(stop, position + size)
            if first < last:
                found.append(Piece(first, last - first, number, first - position))
            position += size
        return found

    def _can_split(self) -> bool:
        layers, criterion = [layer for _, layer in self.model.leaves], self.criterion
        statistics = any(isinstance(layer, BatchNorm2d) for layer in layers)
        if statistics or not all(map(is_builtin, (*layers, criterion))) or self.loader.data.sample_weight is not None:
            return False
        return not self._has_weights()

    def _has_weights(self) -> bool:
        """Whether images have different weights in the mean over a batch."""
        weights = self.criterion.class_weights(self.model.shapes[-1][-1])
        equal = self.loader.data.sample_weight is None and bool(np.all(weights == weights[0]))
        return self.criterion.reduction == "mean" and not equal

    def reserve(self, n: int) -> None:
        """Allocate the loss's buffers for n images."""
        self.criterion.ensure_allocated(self.model.ops, n, self.model.shapes[-1][-1], self.model.dtype)

    def compute_loss(self, n: int, dry_run: bool = False) -> None:
        """Forward pass and loss of the next n images.  Leaves the outputs and their gradient in the plan's buffers."""
        plan, criterion = self.plan(n), self.criterion
        self.reserve(n)
        self.target = self.loader.next(plan.x)
        self.targets[n] = self.target, self.loader.sample_weight
        plan.forward(dry_run)
        if not dry_run or is_replayable(criterion):
            criterion.forward_backward(plan.dy, plan.y, self.target)
        if self.loader.sample_weight is not None:
            criterion.weight_samples(plan.dy, self.target, self.loader.sample_weight)

    def update(self, n: int, dry_run: bool = False) -> None:
        """Backward pass and optimizer step; advance to the next images."""
        self.plan(n).backward(dry_run=dry_run)
        if not dry_run or is_replayable(self.optimizer):
            self.optimizer.step()
        self._accumulate_metrics()

    def step(self, n: int, dry_run: bool = False) -> None:
        """A training step on the next n images.  It neither allocates nor synchronises, so a GPU can capture it.

        dry_run  see `Plan.forward`
        """
        self.compute_loss(n, dry_run)
        self.update(n, dry_run)

    def replay(self, n: int) -> None:
        """`step`, replayed."""
        self._replay(n, self.step, n)

    def replay_loss(self, n: int) -> None:
        """`compute_loss`, replayed."""
        self._replay(n, self.compute_loss, n)
        self.target, self.loader.sample_weight = self.targets[n]

    def _replay(self, n: int, step: Callable[..., None], *arguments: Any) -> None:
        """`step(*arguments)`, replayed.  n: its batch size, 0 for none"""
        key, plan = (step.__name__, *arguments, self.model.training), self.plan(n) if n else None
        captured_plan, replay = self.captures.get(key, (None, None))
        if replay is None or captured_plan is not plan:  # a capture uses the buffers of its plan
            if n:
                self.reserve(n)
            parts = *(layer for _, layer in self.model.leaves), self.criterion, self.loader.data, self.optimizer
            replay = Replay(self.model.ops, lambda: step(*arguments), *(part for part in parts if part is not None))
            self.captures[key] = plan, replay
        replay()

    def train_batch(self, n: int, read_loss: bool = False) -> float:
        """Train on the next n images: a step, or its part for one batch of a window.  Returns the loss, if it is to be
        read, which synchronises; otherwise 0."""
        pieces, loss = self._start_batch(n), 0.0
        if self.is_whole(pieces):
            self.replay(n)
            return self.criterion.batch_loss(n) if read_loss else loss
        for piece in self._run_pieces(pieces, n):
            loss += self._loss_term(piece, n) if read_loss else 0
            self._accumulate(piece)
        self._end_batch(n)
        return self._batch_loss(loss) if read_loss else loss

    def is_whole(self, pieces: list[Piece]) -> bool:
        """Whether a batch is a single step."""
        return self.accumulation_steps == len(pieces) == self.group.size == 1

    def _start_batch(self, n: int) -> list[Piece]:
        pieces = self.rank_pieces(n)
        self.pieces_so_far.append((self.pieces_so_far or [0])[-1] + len(pieces))
        self.last_piece = pieces[-1].size if pieces else self.last_piece
        self.batch_weight = 0.0
        return pieces

    def _run_pieces(self, pieces: list[Piece], n: int) -> Iterator[int]:
        """Forward pass and loss of this rank's pieces of the next n images, one after the other.  Yields the size of
        each."""
        if self.group.size == 1:
            for piece in pieces:
                self.replay_loss(piece.size)
                yield piece.size
            return
        ops, position = self.model.ops, int(self.model.ops.to_host(self.loader.cursor)[0])
        draws = [(counter, offset, int(ops.to_host(counter)[0])) for counter, offset in self._random_numbers()]
        with self.group.batch():
            for piece in pieces:
                self.loader.seek(position + piece.start)
                for counter, offset, count in draws:
                    ops.copy_to(counter, np.array([count + piece.number]))
                    ops.copy_to(offset, np.array([piece.offset]))
                self.replay_loss(piece.size)
                self._sum_losses(piece.size)
                yield piece.size
            if not pieces and self.group.synchronized:
                self._join_batch_norm()
        self.loader.seek(position + n)
        for counter, offset, count in draws:
            ops.copy_to(counter, np.array([count + len(self.pieces(n))]))
            ops.copy_to(offset, np.array([0]))

    def _random_numbers(self) -> list[tuple[DeviceArray, DeviceArray]]:
        """(counter of steps, index in a batch of the first image) of all that draws random numbers in a step."""
        dropouts = [layer for _, layer in self.model.leaves if isinstance(layer, Dropout) and layer.training]
        augmentation = self.loader.augmentation
        drawing = [] if augmentation is None or not augmentation.draws else [augmentation]
        return [(d._counter, d._offset) for d in dropouts] + [(a.counter, a.offset) for a in drawing]

    def _sum_losses(self, n: int) -> None:
        """Turn the gradient of a mean over n images into that of the sum of their losses: ranks have different n."""
        self.piece_weight = self._weight(n)
        self.batch_weight += self.piece_weight
        dy = self.plan(n).dy.reshape(-1)
        if self.piece_weight == 0:  # the mean is 0/0
            self.model.ops.copy_to(dy, np.zeros(dy.shape, self.model.dtype))
            self.model.ops.copy_to(self.criterion._loss[:n], np.zeros(n, self.model.dtype))
        elif self.criterion.reduction == "mean":
            self.model.ops.accumulate_grad(dy, dy, self.piece_weight, True)

    def _weight(self, n: int) -> float:
        """Weight of the last n images in a mean: their number, unless they have weights."""
        if not self._has_weights():
            return n
        data, to_host = self.loader.data, self.model.ops.to_host
        labels = to_host(self.target) if data.classes is not None else None
        weights = None if data.sample_weight is None else to_host(self.loader.sample_weight)
        return self.criterion.weighted_sum(0.0, labels, weights, n)[1]

    def _join_batch_norm(self) -> None:
        """Take part in the sums of batch norm, although none of the images of the batch is this rank's."""
        self.group.absent = True
        self.loader.seek(0)
        self.compute_loss(1)
        plan = self.plan(1)
        self.model.ops.copy_to(plan.dy, np.zeros(plan.dy.shape, self.model.dtype))
        plan.backward()

    def _end_batch(self, n: int) -> None:
        self.window_batches, self.window_images = self.window_batches + 1, self.window_images + n
        if self.window_batches == self.accumulation_steps:
            self.end_window()

    def _loss_term(self, piece: int, n: int) -> float:
        """The part of the last `piece` images in the loss of their batch, of n images."""
        loss = self.criterion.batch_loss(piece)
        if self.criterion.reduction != "mean":
            return loss
        return loss * (piece / n if self.group.size == 1 else self.piece_weight)

    def _batch_loss(self, loss: float) -> float:
        """The loss of a batch from the sum of `_loss_term` over this rank's pieces."""
        if self.group.size == 1:
            return loss
        total, weight = self.group.sum(np.array([loss, self.batch_weight]))
        return float(total / weight if self.criterion.reduction == "mean" and weight else total)

    def _accumulate(self, n: int) -> None:
        self._allocate_grad_sum()
        self._replay(n, self.accumulate, n, not self.window)
        self.window.append(n if self.group.size == 1 else self.piece_weight)

    def _allocate_grad_sum(self) -> None:
        if not self.grad_sum.size:
            size = len(self.model.theta)
            self.grad_buffer = self.model.ops.empty((size + 1,), self.model.dtype)  # see `Group.sum_gradient`
            self.grad_sum = self.grad_buffer[:size]

    def end_window(self) -> None:
        """Update with the gradients of the batches since the last update, if there are any."""
        window, images = self.window, self.window_images
        self.window, self.window_images, self.window_batches = [], 0, 0
        if not images:
            return
        weight = sum(window)
        if self.group.size > 1:
            self._allocate_grad_sum()
            if not window:  # no image was this rank's
                self.model.ops.copy_to(self.grad_sum, np.zeros(len(self.model.theta), self.model.dtype))
            weight = self.group.sum_gradient(self.grad_buffer, weight)
            if self._has_weights():
                self.apply(weight)  # not captured: each window has another
                return
            if weight != images:
                raise RankError(f"rank {self.group.rank} got batches of {images} images, but all ranks have {weight:g}")
        self._replay(0, self.apply, images)

    def accumulate(self, n: int, first: bool, dry_run: bool = False) -> None:
        """Backward pass after `compute_loss(n)`; add the gradient to those of the window, of which n images are the
        `first` piece or a later one; advance to the next images.  Gradients of means are weighted by the number of
        images."""
        self.plan(n).backward(dry_run=dry_run)
        scale = n if self.criterion.reduction == "mean" and self.group.size == 1 else 1
        self.model.ops.accumulate_grad(self.grad_sum, self.model.grad, scale, first)
        self._accumulate_metrics()

    def apply(self, weight: float, dry_run: bool = False) -> None:
        """Optimizer step with the gradients of a window, whose images have this weight in all: their number, as a
        rule."""
        scale = 1.0 if self.criterion.reduction != "mean" else 1 / weight if weight else 0.0
        self.model.ops.accumulate_grad(self.model.grad, self.grad_sum, scale, True)
        if not dry_run or is_replayable(self.optimizer):
            self.optimizer.step()

    def checked_step(self, n: int, epoch: int | None = None) -> float:
        """`train_batch`, but a non-finite loss raises DivergedError before anything is updated.  Returns the loss."""
        pieces, loss, layer = self._start_batch(n), 0.0, None
        for piece in self._run_pieces(pieces, n):
            loss += self._loss_term(piece, n)
            if not math.isfinite(loss):
                layer = layer or self._find_non_finite(piece) or "the loss"
                if self.group.size == 1:
                    break
            if self.is_whole(pieces):
                self._replay(n, self.update, n)
                return loss
            self._accumulate(piece)
        layer = self.group.first(layer)
        if layer is not None:
            raise DivergedError(layer, self.optimizer.steps + 1, epoch)
        self._end_batch(n)
        return self._batch_loss(loss)

    def start_epoch(self, order: Array, repeat: bool = False) -> None:
        """Begin an epoch over the images `order`.  repeat: see `DataLoader.start_epoch`"""
        if self.augment_settings != (settings := self.loader.augment_settings()):
            self.augment_settings, self.captures = settings, {}
        self.loader.start_epoch(order, repeat)
        self.window, self.window_images, self.window_batches, self.pieces_so_far = [], 0, 0, []
        self.model.ops.copy_to(self.totals, np.zeros(5))

    def batches_before_divergence(self) -> int:
        """Number of batches of the epoch before the first with a loss that is not finite."""
        pieces = int(self.model.ops.to_host(self.totals)[3])
        return min(self.group.gather(bisect.bisect_right(self.pieces_so_far, pieces)))

    def find_non_finite(self) -> str | None:
        """Description of the first array with a NaN or infinity in the last piece; None if all are finite."""
        return self.group.first(self._find_non_finite(self.last_piece) if self.last_piece else None)

    def _find_non_finite(self, piece: int) -> str | None:
        with self.group.apart():
            return self.model.find_non_finite(self.plan(piece))

    def metric_name(self) -> str | None:
        """Name of the metric that the loss computes besides its value, such as "accuracy"; None for none."""
        return self.criterion.metric_name(self.loader.data.classes is not None)

    def _accumulate_metrics(self) -> None:
        weights = () if self.loader.sample_weight is None else (self.loader.sample_weight,)
        self.criterion.accumulate_metrics(self.totals, self.loader.cursor, self.target, *weights)

    def read_metrics(self, own: bool = False) -> tuple[float, float | None]:
        """(loss, metric) of the epoch so far; the metric is None if the loss has none.  ArithmeticError if the loss is
        not finite.   own: only of this rank's images"""
        totals = self.model.ops.to_host(self.totals)
        loss, metric, count, _, weights = totals if own else self.group.sum(totals)
        if not math.isfinite(loss) and (not own or self.group.size == 1):
            raise ArithmeticError
        value = None if self.metric_name() is None else float(metric / count)
        return _mean_loss(self.criterion, loss, weights), value

    def locks(
        self, each_batch: bool
    ) -> tuple[contextlib.AbstractContextManager[None], Callable[[], contextlib.AbstractContextManager[None]]]:
        """(context for all batches, function that gives the context of one).  `exclusive` is one of them, the other
        does nothing.   each_batch: callbacks, or the thread that reads, may run the model between the batches"""
        return (contextlib.nullcontext(), self.exclusive) if each_batch else (self.exclusive(), contextlib.nullcontext)

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
            loader = make_loader(dataset, longest=len(numbers))
            runner = cache["_runner"] = StepRunner(model, criterion, loader, optimizer)
        with runner.exclusive():
            model.normalization = dataset.normalization
            model.output_kind = getattr(criterion, "output_kind", None)
            runner.loader.start_epoch(numbers)
            return _first_step(runner, len(numbers))


def _first_step(runner: StepRunner, n: int) -> float:
    """`StepRunner.checked_step` on the first n images of the order."""
    with contextlib.closing(runner.loader.batches(n)) as batches:
        next(batches)
        return runner.checked_step(n)


def fit(
    model: Sequential,
    criterion: Loss,
    optimizer: Optimizer | EMA,
    train: Data,
    *,
    epochs: int,
    batch_size: int = 64,
    steps_per_epoch: int | None = None,
    reshuffle: bool = True,
    validation: Data | None = None,
    rng: Rng = None,
    on_epoch: Callable[[Record], object] | None = None,
    callbacks: Sequence[Any] = (),
    accumulation_steps: int = 1,
    checkpoint: str | os.PathLike[str] | TrainingCheckpoint | None = None,
    progress: bool = True,
    comm: Any = None,
    sync_batch_norm: bool = False,
) -> list[Record]:
    """Train for `epochs` passes over `train`, in a new random order each, and return the history.

    train, validation  a `DeviceDataset`; a tuple of arrays (images, labels) or (images, labels, sample_weight); or an
                       iterable of batches (images, labels): see `Batches`.  The validation set is evaluated after every
                       epoch, with `criterion`, or with plain cross entropy if the criterion is a cross entropy with
                       options.  Its mean and std are those of `train`, unless it is a `DeviceDataset`
    batch_size         of data sets and arrays; batches of an iterable stay as they are.  A batch of more than 256
                       images runs in pieces that fit into the caches, with one update, unless the model has batch norm,
                       images have weights in a mean, or a layer or the loss is a user's
    steps_per_epoch    number of batches in an epoch, instead of all of `train`; the next epoch continues where the last
                       one ended
    reshuffle          False: all epochs use the random order of the first.  An iterable decides the order itself
    rng                seed or generator of the orders
    on_epoch           called with each epoch's record; training stops if it returns True
    callbacks          objects such as `EarlyStopping`: see `tinycnn.callbacks`
    accumulation_steps
                       so many batches make one update, with the gradient of one batch of that size (the mean of means
                       is weighted by the numbers of images).  The last update of an epoch may be of fewer.  Schedules
                       and `optimizer.steps` count updates; batch norm sees the small batches
    checkpoint         file name ending in .safetensors, or a `TrainingCheckpoint`.  It gets everything that the
                       training needs to continue, before the first epoch and after each.  If the file exists, the
                       training continues from there, up to `epochs` epochs in total, bit for bit as if it had not been
                       interrupted.  Larger `epochs` than before extend it; a schedule must have the rates of the old
                       one for the steps already taken.  Raises ResumeError, with every difference, if the file is of
                       another model, loss, optimizer, data set or version
    progress           show a progress bar on stderr, if that is a terminal: of the kernels that have to be compiled
                       first, then of each epoch
    comm               an mpi4py communicator: its processes train together, each on a part of every batch, and all end
                       with the same weights.  All call `fit` with the same arguments, and start with the weights and
                       the `rng` of rank 0.  Callbacks run on all ranks, except those with a true attribute
                       `rank_zero_only`.  See docs/distributed.md
    sync_batch_norm    with `comm`: batch norm has the statistics of all ranks' images, not of each rank's own

    The history has one record (a dict) for each epoch: epoch, train_loss, train_accuracy (both measured during
    training), val_loss, val_accuracy (with a validation set), lr (at the end), seconds (of training),
    images_per_second.  The accuracy is that of class predictions.  Other losses have train_mae and val_mae, the mean
    absolute error (`MSELoss`, `L1Loss`, `HuberLoss`), or train_binary_accuracy and val_binary_accuracy, the fraction
    of right labels (`BCEWithLogitsLoss`); a user's loss that predicts no classes has none.

    Memory-mapped arrays and iterables are read in a thread ahead of the step; only a few batches are in memory.  The
    thread ends with `fit`.

    `fit` first dry-runs a step, and a batch of the validation, to find the kernels it needs, and compiles the missing
    ones.  An optimizer that was used before continues its count of epochs; an exhausted schedule raises ValueError.
    `model.normalization` becomes that of `train`, and `model.class_names` its class names, if it has any.

    After an exception (Ctrl-C, DivergedError) the model holds the weights of the last complete epoch.  With `EMA` these
    are the averaged weights, as are the final weights, the validated ones and those that `on_epoch` sees.  If
    `on_epoch` has a method `at_end`, it is called at the end of a training without an exception.
    """
    group = as_group(comm)
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(group.guard())
        cleanup.enter_context(group.limit_threads())
        with group.together():
            epochs, batch_size = _check.integer("epochs", epochs, 1), _check.integer("batch_size", batch_size, 1)
            accumulation_steps = _check.integer("accumulation_steps", accumulation_steps, 1)
            steps = None if steps_per_epoch is None else _check.integer("steps_per_epoch", steps_per_epoch, 1)
            hooks = Hooks(callbacks, on_epoch, group)
            generator: np.random.Generator = _check.generator("rng", rng)
            check = functools.partial(check_arguments, model, criterion=criterion, optimizer=optimizer)
            loader = _open_loader("train", train, model, check, steps, None, augment=True)
            cleanup.callback(loader.close)
            dataset = loader.dataset
            _require_rates(optimizer)
            runner = StepRunner(model, criterion, loader, optimizer, accumulation_steps, group)
            validator = None
            if validation is not None:
                val_criterion = CrossEntropyLoss() if type(criterion) is CrossEntropyLoss else criterion
                val_check = functools.partial(check_arguments, model, criterion=val_criterion)
                val_loader = _open_loader("validation", validation, model, val_check, None, dataset)
                cleanup.callback(val_loader.close)
                validator = StepRunner(model, val_criterion, val_loader, group=group)
            if checkpoint is not None and not loader.repeatable and steps is not None:
                raise TypeError(
                    "checkpoint: an iterable of batches cannot be continued within a pass (steps_per_epoch)"
                )
            batch_size = min(batch_size, len(dataset)) if loader.repeatable else len(dataset)
            if batch_size < group.size:
                raise ValueError(f"batch_size must be at least {group.size}, an image for each rank, got {batch_size}")
            if optimizer.patterns and not loader.repeatable:
                raise TypeError(
                    f"train must be a DeviceDataset or arrays for {type(optimizer).__name__}, which draws images of "
                    "all of it before each epoch, got an iterable of batches"
                )
            epoch_size = len(dataset)
            if steps is not None and loader.repeatable:
                epoch_size = steps * batch_size
                if epoch_size > len(dataset):
                    raise ValueError(
                        f"steps_per_epoch must be at most {len(dataset) // batch_size} with batches of {batch_size} of "
                        f"{len(dataset)} images, got {steps}"
                    )
        options = {"batch_size": batch_size, "steps_per_epoch": steps, "reshuffle": reshuffle}
        options["accumulation_steps"] = accumulation_steps
        describe = functools.partial(training_settings, runner, validator, hooks, options)
        group.start(model, optimizer, generator, lambda: describe() | {"epochs": epochs, "sync": sync_batch_norm})
        if sync_batch_norm:
            cleanup.enter_context(group.synchronize_batch_norm(model))
        with group.together(), group.node_first():
            sizes = {batch_size, epoch_size % batch_size or batch_size}
            largest_piece = max([1, *(piece.size for n in sizes for piece in runner.rank_pieces(n))])
            val_batch = 0 if validator is None else min(EVALUATION_BATCH, len(validator.loader.dataset))
            max_batch = max(largest_piece, val_batch, optimizer.patterns)
            with runner.exclusive():
                model.reserve(max(max_batch, model.max_batch))  # the largest buffers first: all plans share them
                runner.reserve(max_batch)
                loader.reserve(batch_size)
                with compile_bar(progress and group.rank == 0) as show:
                    _compile(runner, sizes, show, validator)
        model.normalization = dataset.normalization
        model.output_kind = getattr(criterion, "output_kind", None)
        if dataset.class_names is not None:
            model.class_names = dataset.class_names
        orders = Orders(len(dataset), epoch_size, reshuffle, generator) if loader.repeatable else None
        saver = None
        if checkpoint is not None:
            with group.together():
                saver = Saver(checkpoint, runner, orders, generator, hooks, describe())
        return _run_epochs(runner, validator, epochs, batch_size, orders, generator, hooks, saver, progress)


def _require_rates(optimizer: Any) -> None:
    """ValueError if the schedule of `optimizer` has ended."""
    if getattr(optimizer, "schedule_exhausted", bool)():
        raise ValueError(
            f"optimizer: its schedule of {len(optimizer.lr_schedule)} rates is used up after {optimizer.steps} "
            f"steps, and training would continue with the last rate, {optimizer.lr_schedule[-1]:g}; assign a "
            "number or an array of rates for the next steps to optimizer.lr"
        )


def _open_loader(
    name: str,
    data: Any,
    model: Sequential,
    check: Callable[[DeviceDataset, str], object],
    steps: int | None,
    like: DeviceDataset | None,
    augment: bool = False,
) -> DataLoader:
    """The loader of the argument `name` of `fit`, checked.  like: the training set, for validation data"""
    _check.instance("model", model, Sequential, "a Sequential")
    source = as_source(name, data, model.device, like)
    if isinstance(source, Batches):
        return make_loader(Stream(name, source, model.device, steps, check, like), augment)
    check(source, name)
    return make_loader(source, augment)


class Orders:
    """The order of each epoch: `epoch_size` of `count` images, every image once before one is repeated.

    upcoming  the images of later epochs that are drawn already; without `reshuffle`, the order of all epochs
    """

    def __init__(self, count: int, epoch_size: int, reshuffle: bool, rng: np.random.Generator) -> None:
        self.count, self.epoch_size, self.reshuffle, self.rng = count, epoch_size, reshuffle, rng
        self.upcoming = np.empty(0, np.int64)

    def __next__(self) -> Array:
        if len(self.upcoming) < self.epoch_size:
            self.upcoming = np.concatenate([self.upcoming, self.rng.permutation(self.count)])
        order = self.upcoming[: self.epoch_size]
        if self.reshuffle:
            self.upcoming = self.upcoming[self.epoch_size :]
        return order


class Hooks:
    """The callbacks of a training.  `on_epoch` is one more of them, with a method `at_end`."""

    METHODS = ("on_train_begin", "on_batch_end", "on_epoch_end", "on_checkpoint", "on_train_end")

    def __init__(self, callbacks: Sequence[Any], on_epoch: Any, group: Group = ALONE) -> None:
        self.group = group
        _check.optional_callable("on_epoch", on_epoch)
        if not isinstance(callbacks, (list, tuple)):
            raise TypeError(f"callbacks must be a list, got {_check.describe(callbacks)}")
        self.calls: dict[str, list[Any]] = {name: [] for name in self.METHODS}
        self.stateful = [part for part in (*callbacks, on_epoch) if hasattr(part, "load_state_dict")]
        for index, callback in enumerate(callbacks):
            methods = {name: getattr(callback, name) for name in self.METHODS if hasattr(callback, name)}
            if not methods or isinstance(callback, type) or not all(map(callable, methods.values())):
                hint = "; a function goes to on_epoch" if not methods and callable(callback) else ""
                raise TypeError(
                    f"callbacks[{index}] must be an object with a method {' or '.join(self.METHODS)}, "
                    f"got {_check.describe(callback)}{hint}"
                )
            for name, method in methods.items():
                self._add(name, callback, method)
        if on_epoch is not None:
            self._add("on_epoch_end", on_epoch, on_epoch)
            if hasattr(on_epoch, "at_end"):
                self._add("on_train_end", on_epoch, on_epoch.at_end)

    def _add(self, name: str, callback: Any, method: Callable[..., object]) -> None:
        runs = self.group.rank == 0 or not getattr(callback, "rank_zero_only", False)
        self.calls[name].append(method if runs else lambda *_: None)

    def __call__(self, name: str, *arguments: Any) -> bool:
        """Call a method of all callbacks.  Returns whether one of them returned True, on any rank."""
        results = [method(*arguments) for method in self.calls[name]]
        own = any(isinstance(r, (bool, np.bool_)) and bool(r) for r in results)  # a lambda may return anything
        return any(self.group.gather(own))


def _run_epochs(
    runner: StepRunner,
    validator: StepRunner | None,
    epochs: int,
    batch_size: int,
    orders: Orders | None,
    generator: np.random.Generator,
    hooks: Hooks,
    saver: Saver | None,
    progress: bool,
) -> list[Record]:
    """The loop of `fit`.  orders: of a data set's images; None for a stream"""
    model, criterion, optimizer, dataset = runner.model, runner.criterion, runner.optimizer, runner.loader.dataset
    group = runner.group
    epoch_count = getattr(optimizer, "_epochs", np.zeros(1, np.int64))
    history: list[Record] = []
    stop, last_good = False, _snapshot(model, optimizer)
    try:
        hooks("on_train_begin", model)
        if saver is not None:
            saved = group.on_root(saver.file.read)
            with group.together():
                history, stop = saver.load(saved)
            last_good = _snapshot(model, optimizer)
            saver.save(last_good, history, stop)
            if len(history) < epochs and not stop:
                _require_rates(optimizer)
        last_epoch = int(epoch_count[0]) - len(history) + epochs
        for epoch in range(int(epoch_count[0]) + 1, last_epoch + 1):
            if stop:
                break
            order = np.empty(0, np.int64) if orders is None else next(orders)
            whole, turn = runner.locks(each_batch=runner.loader.staged or bool(hooks.calls["on_batch_end"]))
            with whole:
                model.train()
                optimizer.before_epoch(criterion, dataset, generator)
                epoch_start, first_step = _snapshot(model, optimizer), optimizer.steps + 1
                runner.start_epoch(order)
                try:
                    record: Record = {"epoch": epoch}
                    metrics, stop = _train_epoch(runner, batch_size, epoch, last_epoch, turn, hooks, progress)
                    record |= metrics
                except ArithmeticError as error:
                    if type(error) is not ArithmeticError:  # by a user's code
                        raise
                    if runner.loader.repeatable and not hooks.calls["on_batch_end"]:
                        # Repeat the epoch to find the layer: the same steps from the same state give the same bits.
                        _restore(model, optimizer, epoch_start)
                        _repeat_checked(runner, order, batch_size, turn, epoch)
                        raise
                    step = first_step + runner.batches_before_divergence() // runner.accumulation_steps
                    raise DivergedError(runner.find_non_finite() or "the loss", step, epoch) from None
                if not np.isfinite(model.ops.to_host(model.theta)).all():
                    raise DivergedError(runner.find_non_finite() or "the parameters", optimizer.steps, epoch)
                group.end_epoch(model, epoch)
            epoch_count[0] += 1
            epoch_end = _snapshot(model, optimizer)
            with optimizer.average_parameters():
                if validator is not None:
                    record["val_loss"], metric, _ = _evaluate(validator, EVALUATION_BATCH)
                    record |= _metric_entry("val", validator, metric)
                last_good = epoch_end
                record = group.share(record)  # the seconds are rank 0's
                history.append(record)
                stop = hooks("on_epoch_end", record) or stop
            last_good = _snapshot(model, optimizer)  # again, since a callback may have changed the learning rates
            if saver is not None:
                saver.save(last_good, history, stop)
        optimizer.use_average()
        hooks("on_train_end")
    except BaseException:
        with contextlib.suppress(DeviceError):  # after a fault the GPU refuses this too: report the first error
            _restore(model, optimizer, last_good)
            optimizer.use_average()
        raise
    return history


def _snapshot(model: Sequential, optimizer: Any) -> Snapshot:
    return model.snapshot(), optimizer.state_dict()


def _restore(model: Sequential, optimizer: Any, snapshot: Snapshot) -> None:
    model.restore(snapshot[0])
    optimizer.load_state_dict(snapshot[1])


def _train_epoch(
    runner: StepRunner,
    batch_size: int,
    epoch: int,
    last_epoch: int,
    turn: Callable[[], contextlib.AbstractContextManager[None]],
    hooks: Hooks,
    progress: bool,
) -> tuple[Record, bool]:
    """Train for the epoch that was started.  Returns the record, and whether a callback stops the training.
    ArithmeticError if the loss is not finite.   turn: gives the context of each batch (`StepRunner.locks`)

    The totals are read at the end, and a few times a second for the progress bar: on a GPU, reading synchronises.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        total=runner.loader.length, desc=f"epoch {epoch}/{last_epoch}", unit=" images", unit_scale=True, leave=False,
        disable=None if progress and runner.group.rank == 0 else True, mininterval=0.2,
        file=_streams.SafeStream(sys.stderr),
    )  # fmt: skip
    images, stop, start = 0, False, time.perf_counter()
    last_shown = start
    with bar, contextlib.closing(runner.loader.batches(batch_size)) as batches:
        for number, (_, n) in enumerate(batches, 1):
            with turn():
                if not runner.model.training:
                    runner.model.train()
                if hooks.calls["on_batch_end"]:
                    record = {"epoch": epoch, "batch": number, "lr": runner.optimizer.lr, "images": n}
                loss = runner.train_batch(n, read_loss=bool(hooks.calls["on_batch_end"]))
                if hooks.calls["on_batch_end"]:
                    record["loss"] = loss
                    if not math.isfinite(record["loss"]):
                        raise ArithmeticError
            images += n
            if hooks.calls["on_batch_end"] and (stop := hooks("on_batch_end", record)):
                break
            now = time.perf_counter()
            if now - last_shown > 0.2:
                last_shown = now
                bar.set_postfix_str(
                    _format_metrics(runner.metric_name(), *runner.read_metrics(own=True)), refresh=False
                )
            bar.update(n)
        with turn():
            runner.end_window()
        loss, metric = runner.read_metrics()
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        **_metric_entry("train", runner, metric),
        "lr": runner.optimizer.lr,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }, stop


def _metric_entry(part: str, runner: StepRunner, value: float | None) -> Record:
    """The entry of the metric in a record, {"train_accuracy": value}; empty if there is none."""
    return {} if value is None else {f"{part}_{runner.metric_name()}": value}


def _format_metrics(name: str | None, loss: float, value: float | None) -> str:
    """Loss and metric for the progress bar."""
    if value is None or name is None:
        return f"loss {loss:.4f}"
    return f"loss {loss:.4f}, {name.replace('_', ' ')} {value:{'.2%' if 'accuracy' in name else '.4f'}}"


def _repeat_checked(
    runner: StepRunner,
    order: Array,
    batch_size: int,
    turn: Callable[[], contextlib.AbstractContextManager[None]],
    epoch: int,
) -> None:
    """Repeat the steps of an epoch with `checked_step`, which raises DivergedError where the loss is not finite."""
    runner.start_epoch(order, repeat=True)
    with contextlib.closing(runner.loader.batches(batch_size)) as batches:
        for _, n in batches:
            with turn():
                runner.checked_step(n, epoch)


def evaluate(
    model: Sequential,
    dataset: DeviceDataset | tuple[ArrayLike, ...],
    criterion: Loss | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> tuple[float, float | None, Array]:
    """(loss, metric, outputs) of the model in eval mode on all of `dataset`; outputs: (N, ...) NumPy.

    The data set may be a tuple of arrays (images, labels) or (images, labels, sample_weight), whose pixels are scaled
    as those that the model was trained on.
    The loss is plain cross entropy unless another criterion is given.  It is the loss of all images together, whatever
    the batch size: their (weighted) mean, or their sum if the criterion's reduction is "sum" or "none".  The metric is
    the accuracy, or what else `fit` records for this loss; None if that is nothing.
    """
    criterion = CrossEntropyLoss() if criterion is None else criterion
    data: Any = dataset
    known = getattr(model, "normalization", None)
    if isinstance(dataset, tuple) and len(dataset) in (2, 3) and known is not None:
        data = make_dataset(dataset, {"device": model.device, "mean": known.mean, "std": known.std})
    check_arguments(model, data, "dataset", criterion)
    batch_size = _check.integer("batch_size", batch_size, 1)
    return _evaluate(StepRunner(model, criterion, make_loader(data)), batch_size)


def _evaluate(runner: StepRunner, batch_size: int) -> tuple[float, float | None, Array]:
    """`evaluate` with a reusable `StepRunner`.  Several ranks share the images; each returns the outputs of its own."""
    model, criterion, loader = runner.model, runner.criterion, runner.loader
    loss_sum, weight_sum, outputs, metric_sum, has_metric = 0.0, 0.0, [], 0.0, False
    whole, turn = runner.locks(each_batch=loader.staged)
    with whole, contextlib.closing(loader.batches(batch_size * runner.group.size)) as batches:
        for first, size in batches:
            start, stop = runner.group.part(size)
            position, n = first + start, stop - start
            if not n:
                continue
            with turn(), model.evaluating():
                loader.seek(position)
                runner.replay_loss(n)
                data = loader.data
                labels, weights = (
                    None if array is None else model.ops.to_host(array)[position : position + n]
                    for array in (data.labels if data.classes is not None else None, data.sample_weight)
                )
                loss, weight = criterion.weighted_sum(criterion.batch_loss(n), labels, weights, n)
                loss_sum, weight_sum = loss_sum + loss, weight_sum + weight
                outputs.append(np.array(model.ops.to_host(runner.plan(n).y)))
                has_metric = runner.metric_name() is not None
                metric_sum += criterion.batch_metric(n, labels) if has_metric else 0.0
    sums = np.array([loss_sum, weight_sum, metric_sum, sum(map(len, outputs)), has_metric], np.float64)
    loss_sum, weight_sum, metric_sum, count, metrics = map(float, runner.group.sum(sums))
    metric = metric_sum / count if metrics else None
    return _mean_loss(criterion, loss_sum, weight_sum), metric, np.concatenate(outputs or [np.empty(0)])


def _evaluation_sizes(runner: StepRunner) -> set[int]:
    """The sizes of this rank's parts of the batches of `_evaluate`."""
    count, whole = len(runner.loader.dataset), EVALUATION_BATCH * runner.group.size
    parts = [runner.group.part(size) for size in (min(whole, count), count % whole)]
    return {stop - start for start, stop in parts}


def _mean_loss(criterion: Loss, loss_sum: float, weight_sum: float) -> float:
    """The loss of a data set from its sums; NaN if every target is ignored, as in torch."""
    if criterion.reduction != "mean":
        return float(loss_sum)
    return float(loss_sum / weight_sum) if weight_sum else math.nan


def warm_up(
    model: Sequential,
    criterion: Loss,
    optimizer: Optimizer | EMA,
    dataset: DeviceDataset,
    batch_size: int,
    on_progress: CompileProgress | None = None,
) -> float:
    """Compile (or load) every kernel that a step needs, run a step and undo it.  Returns the seconds it took.

    on_progress  called as on_progress(done, total, name, seconds) for each kernel that is compiled, and before the
                 first as on_progress(0, total, "", 0.0), maybe by another thread
    """
    start, n = time.perf_counter(), min(batch_size, len(dataset))
    check_arguments(model, dataset, "dataset", criterion, optimizer)
    runner = StepRunner(model, criterion, make_loader(dataset), optimizer)
    before = _snapshot(model, optimizer)
    with runner.exclusive():
        runner.loader.reserve(n)
        _compile(runner, {n}, on_progress)
        with contextlib.suppress(DivergedError):  # training will raise it with the right step
            _first_step(runner, n)
        _restore(model, optimizer, before)
    return time.perf_counter() - start


@contextlib.contextmanager
def compile_bar(shown: bool = True) -> Iterator[CompileProgress]:
    """A progress bar for kernels that are compiled in the block, on stderr, if that is a terminal and there are any.
    Yields a function for `warm_up`."""
    from tqdm.auto import tqdm

    with contextlib.ExitStack() as stack:
        bar: Any = None

        def show(done: int, total: int, name: str, seconds: float) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(tqdm(
                    total=total, desc="compiling kernels", unit=" kernels", leave=False,
                    disable=None if shown else True, mininterval=0, file=_streams.SafeStream(sys.stderr),
                ))  # fmt: skip
            bar.update(done - bar.n)

        yield show


def _compile(
    runner: StepRunner,
    batch_sizes: set[int],
    on_progress: CompileProgress | None = None,
    validator: StepRunner | None = None,
) -> None:
    """Compile the kernels of a step on each of the batch sizes, and of the validation.  Restores model and
    optimizer."""
    model, optimizer = runner.model, runner.optimizer
    validation_sizes = set() if validator is None else _evaluation_sizes(validator)
    before, training = _snapshot(model, optimizer), model.training

    def dry_run() -> None:
        for pieces in map(runner.rank_pieces, batch_sizes):
            for n in {piece.size for piece in pieces}:
                runner.step(n, dry_run=True)
                if not runner.is_whole(pieces):
                    runner.accumulate(n, True, dry_run=True)
                    runner.apply(n, dry_run=True)
        with model.evaluating():
            for n in validation_sizes - {0}:
                validator.compute_loss(n, dry_run=True)  # type: ignore[union-attr]

    model.train()
    try:
        model.ops.precompile(dry_run, on_progress)
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
    if hasattr(criterion, "check_targets"):
        criterion.check_targets(name, dataset, model.shapes[-1])
