"""Data that does not fit into memory, or comes from elsewhere: batches are read ahead of the step, in a thread.

A step gathers its images from a data set on the device.  `StagingLoader` copies one batch after another into a small
data set, so the step is the same as for a data set that is on the device as a whole, and is captured and replayed.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, devices
from tinycnn._repr import InitRepr
from tinycnn._typing import Array, Pair
from tinycnn.augment import Transform
from tinycnn.dataset import ARRAYS, DataLoader, DeviceDataset

AHEAD = 2  # batches that are read and not yet used
EXPECTED = "a DeviceDataset, a tuple of arrays (images, labels), or an iterable of batches (images, labels)"

Arrays: TypeAlias = dict[str, Array]  # of a batch, in host memory, by the names of the data set's attributes
Check: TypeAlias = Callable[[DeviceDataset, str], object]  # of a batch and its name; raises ValueError or TypeError


class Batches(InitRepr):
    """An iterable of batches for `fit`, with the options of a `DeviceDataset`.

    source     gives tuples or lists (images, labels) or (images, labels, sample_weight), arrays as for `DeviceDataset`,
               of NumPy or any library with ``__array__`` or DLPack.  One of

               - a list, a torch DataLoader, or any other object that starts anew for every loop over it
               - a function that returns an iterator, such as a generator function; called once for each pass
               - an iterator, such as a generator.  It can be read only once: for one epoch, or with `steps_per_epoch`
    mean, std, padding, augment, seed, class_names
               as for `DeviceDataset`, but the defaults of mean and std are 0 and 1: uint8 and uint16 pixels are scaled
               to 0 ... 1, others are used as they are

    The batches decide the batch size, and may differ in it.  All must have the first one's image shape and dtypes.  The
    source runs in a thread, ahead of the step by up to two batches; what it yields is copied before it continues, so
    it may fill the same arrays again.  What it raises is raised by `fit`.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        padding: Pair = 0,
        augment: Transform | tuple[Transform, ...] | list[Transform] = (),
        seed: int = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if not is_iterable(source):
            raise TypeError(f"source must be an iterable of batches (images, labels), got {_check.describe(source)}")
        self.source, self.mean, self.std, self.padding = source, mean, std, padding
        self.augment, self.seed, self.class_names = augment, seed, class_names

    def options(self, like: DeviceDataset | None) -> dict[str, Any]:
        """Keyword arguments of the batches' data sets.  like: the data set whose mean and std are the default"""
        mean, std = (0, 1) if like is None else (like.mean, like.std)
        return {
            "mean": mean if self.mean is None else self.mean,
            "std": std if self.std is None else self.std,
            "padding": self.padding,
        }


def is_iterable(source: Any) -> bool:
    """Whether `source` can be a source of batches."""
    if isinstance(source, (str, bytes, Mapping, type)) or is_array(source):
        return False
    return hasattr(source, "__iter__") or hasattr(source, "__getitem__") or callable(source)


def is_array(value: Any) -> bool:
    """Whether `value` is an array of NumPy or another library."""
    return any(hasattr(value, name) for name in ("__array__", "__dlpack__", "__cuda_array_interface__"))


def as_source(name: str, data: Any, device: str, like: DeviceDataset | None = None) -> DeviceDataset | Batches:
    """The argument `name` of `fit` as a data set or as `Batches`.

    like  the data set whose mean, std and padding arrays get
    """
    if isinstance(data, (DeviceDataset, Batches)):
        return data
    if isinstance(data, tuple) and len(data) in (2, 3) and is_array(data[0]):
        options: dict[str, Any] = {"device": device}
        if like is not None:
            options |= {"mean": like.mean, "std": like.std, "padding": like.padding}
        return make_dataset(data, options)
    if not is_iterable(data):
        raise TypeError(f"{name} must be {EXPECTED}, got {_check.describe(data)}")
    return Batches(data)


def make_dataset(arrays: Sequence[Any], options: dict[str, Any]) -> DeviceDataset:
    """A data set of (images, labels) or (images, labels, sample_weight)."""
    images, labels, *weights = arrays
    return DeviceDataset(images, labels, **options, **({"sample_weight": weights[0]} if weights else {}))


class Stream:
    """The batches of an iterable, epoch by epoch, checked, and copied into arrays of their own.

    name   of the argument of `fit`     steps  batches in an epoch; None for a whole pass
    check  called for each batch
    like   the data set whose mean and std are the default

    The constructor reads the first batch.  dataset: that batch, as a data set on the device
    """

    def __init__(
        self, name: str, batches: Batches, device: str, steps: int | None, check: Check, like: DeviceDataset | None
    ) -> None:
        self.name, self.source, self.steps, self.check = name, batches.source, steps, check
        self.options = batches.options(like)
        self.device = device
        self.is_function = callable(self.source) and not hasattr(self.source, "__iter__")
        self.is_iterator = not self.is_function and iter(self.source) is self.source  # type: ignore[arg-type]
        self.dtype: Any = None
        self.dataset: DeviceDataset | None = None
        self.iterator: Any = None
        self.count = 0  # batches of this pass over the source so far
        try:
            self._start()
            first = self._next()
            if first is END:
                raise self._ended(0)
            extra = {"augment": batches.augment, "seed": batches.seed, "class_names": batches.class_names}
            self.dataset = self._convert(first, 1, extra | {"device": device})
            self.first: Arrays | None = self._arrays(first, 1)
        except BaseException:
            self.close()
            raise

    def epoch(self) -> Generator[Arrays, None, None]:
        """The batches of the next epoch."""
        number = 0
        if self.steps is None and self.first is None:
            self._start()
        while self.steps is None or number < self.steps:
            batch, self.first = self.first, None
            if batch is None:
                item = self._next()
                if item is END:
                    if self.steps is None and number:
                        return
                    if self.is_iterator or self.count < (self.steps or 1):
                        raise self._ended(number)
                    self._start()
                    continue
                batch = self._arrays(item, number + 1)
            number, self.count = number + 1, self.count + 1
            yield batch

    def close(self) -> None:
        """End an iterator that was made here."""
        if self.iterator is not self.source and hasattr(self.iterator, "close"):
            self.iterator.close()

    def _start(self) -> None:
        """Begin a pass over the source."""
        self.close()
        made: Any = self.source() if self.is_function else self.source  # type: ignore[operator]
        if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
            raise TypeError(
                f"{self.name}: the function must return an iterator of batches, got {_check.describe(made)}"
            )
        self.iterator, self.count = iter(made), 0

    def _next(self) -> Any:
        return next(self.iterator, END)

    def _ended(self, number: int) -> ValueError:
        """The error of a source that ended after `number` batches of an epoch."""
        text = f"{self.name} gave no batch" if not number else f"{self.name} ended after {number} batches of an epoch"
        if self.steps is not None:
            text += f", steps_per_epoch is {self.steps}"
        if self.is_iterator:
            text += (
                "; an iterator such as a generator can be read only once: pass a list, an object whose __iter__ starts "
                "anew, or a function that returns an iterator"
            )
        return ValueError(text)

    def _convert(self, item: Any, number: int, options: dict[str, Any]) -> DeviceDataset:
        """A batch as a data set.  ValueError or TypeError with its number if it does not fit the first."""
        name, first = f"batch {number} of {self.name}", self.dataset
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            hint = "; arrays go into a tuple (images, labels)" if is_array(item) else ""
            raise TypeError(f"{name} must be a pair (images, labels), got {_check.describe(item)}{hint}")
        try:
            host = [devices.as_host(what, a, self.device)[0] for what, a in zip(PARTS, item, strict=False)]
            images = np.array(_check.array("images", host[0]))
            if first is not None and images.dtype != self.dtype:
                raise TypeError(f"images must have the dtype of the first batch, {self.dtype}, got {images.dtype}")
            self.dtype = images.dtype
            dataset = make_dataset([images, *host[1:]], self.options | options)
            for key in ARRAYS if first is not None else ():
                expected, array = getattr(first, key), getattr(dataset, key)
                if array is None or expected is None:
                    if array is not expected:
                        raise ValueError(f"{key} must be in all batches or in none")
                    continue
                _check.shape(f"one of {key}", array[0], expected.shape[1:], "those of the first batch")
                if array.dtype != expected.dtype:
                    raise TypeError(
                        f"{key} must have the dtype of the first batch, {expected.dtype}, got {array.dtype}"
                    )
        except (TypeError, ValueError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error
        self.check(dataset, name)
        return dataset

    def _arrays(self, item: Any, number: int) -> Arrays:
        dataset = self._convert(item, number, {"device": "cpu"})
        return dataset.arrays()


PARTS = ("images", "labels", "sample_weight")  # of a batch
END = object()  # a source has no more batches


class Prefetch:
    """Iterates over `items` in a thread, which is ahead by up to `AHEAD` items.  Exceptions are raised here."""

    def __init__(self, items: Generator[Arrays, None, None]) -> None:
        self.items, self.stopped = items, False
        self.slots, self.results = threading.Semaphore(AHEAD), queue.SimpleQueue[tuple[Arrays | None, Any]]()
        self.thread = threading.Thread(target=self._read, name="tinycnn-reader", daemon=True)
        self.thread.start()

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            while True:
                self.slots.acquire()
                if self.stopped:
                    return
                item = next(self.items, None)
                if item is None:
                    break
                self.results.put((item, None))
        except BaseException as raised:
            error = raised
        self.results.put((None, error))

    def __iter__(self) -> Iterator[Arrays]:
        while True:
            item, error = self.results.get()
            if error is not None:
                raise error
            if item is None:
                return
            self.slots.release()
            yield item

    def close(self) -> None:
        """End the thread; wait for the item that it is reading.  (A second Ctrl-C ends the waiting.)"""
        self.stopped = True
        self.slots.release()
        self.thread.join()
        self.items.close()


class StagingLoader(DataLoader):
    """Reads a data set on disk, or a `Stream`, batch by batch, and copies each batch to the device before its step.

    data  a data set on the device with room for one batch, which the step gathers from, always from its first image on
    """

    staged = True

    def __init__(self, source: DeviceDataset | Stream, augment: bool = False) -> None:
        self.source = source
        of_files = isinstance(source, DeviceDataset)
        whole: Any = source if of_files else source.dataset  # type: ignore[union-attr]
        super().__init__(whole.staging(1 if of_files else len(whole)), augment)
        self.dataset, self.repeatable = whole if of_files else self.data, of_files
        self.numbers = np.arange(len(whole) if of_files else 0)
        self.length = len(whole) if of_files else None

    def start_epoch(self, order: Array, repeat: bool = False) -> None:
        if self.augmentation is not None:
            self.augmentation.start_epoch(repeat)
        if isinstance(self.source, DeviceDataset):
            self.numbers, self.length = order, len(order)

    def _read(self, batch_size: int) -> Generator[Arrays, None, None]:
        if isinstance(self.source, Stream):
            yield from self.source.epoch()
        else:
            for start in range(0, len(self.numbers), batch_size):
                yield self.source.read(self.numbers[start : start + batch_size])

    def batches(self, batch_size: int) -> Generator[tuple[int, int], None, None]:
        prefetch = Prefetch(self._read(batch_size))
        try:
            for batch in prefetch:
                self.data.write(batch)
                self.reserve(len(self.data))
                self.seek(0)
                yield 0, len(batch["images"])
        finally:
            prefetch.close()

    def reserve(self, n: int) -> None:
        self.data.reserve(n)
        if len(self.order) < n:
            self.order = self.ops.to_device(np.arange(n))

    def close(self) -> None:
        super().close()
        if isinstance(self.source, Stream):
            self.source.close()


def make_loader(source: DeviceDataset | Stream, augment: bool = False, longest: int = 0) -> DataLoader:
    """The loader of a data set or stream.  augment, longest: as for `DataLoader`"""
    if isinstance(source, Stream) or source.on_disk:
        return StagingLoader(source, augment)
    return DataLoader(source, augment, longest)
