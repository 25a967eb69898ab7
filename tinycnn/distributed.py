"""Data-parallel training over MPI: every process (rank) has the whole model and takes a part of each batch.

    mpiexec -n 4 python -m tinycnn train RECIPE
    fit(model, ..., comm=MPI.COMM_WORLD)        # in a program that mpiexec starts

`fit` asks a `Group`, which is one process; `Ranks` is several.  Only `Ranks` calls MPI, from the thread that trains.
docs/distributed.md says what is equal to what.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from tinycnn import _check, _gpu
from tinycnn._streams import EXIT_INTERRUPTED, print_stderr
from tinycnn._typing import Array, DeviceArray
from tinycnn.errors import DivergedError, RankError
from tinycnn.layers import BatchNorm2d
from tinycnn.model import Sequential

T = TypeVar("T")

# What mpiexec and srun tell a process: the number of processes, and the number of this one.
SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"
RANKS = "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"


class Group:
    """The processes of a training: this one alone.

    rank, size    number of this process, and of all
    synchronized  whether batch norm has the statistics of all ranks' images

    Methods without a rank in their name are collective: all ranks must call them, in the same order.
    """

    rank, size = 0, 1
    local_rank = 0  # among the processes of this machine
    threads: int | None = None  # of each rank; None: unchanged
    synchronized = False
    absent = False  # synchronised batch norm runs, although no image of the batch is this rank's

    def part(self, n: int) -> tuple[int, int]:
        """Start and end of this rank's images in a batch of n: contiguous, and all parts equal but for one image."""
        small, extra = divmod(n, self.size)
        start = self.rank * small + min(self.rank, extra)
        return start, start + small + (self.rank < extra)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        return [value]

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value

    def sum(self, values: Array) -> Array:
        """Sums over the ranks of an array in host memory."""
        return values

    def sum_gradient(self, grad: DeviceArray, weight: float) -> float:
        """Replace grad (P + 1,) by its sum over the ranks.  Its last entry is for the weight of this rank's images.
        Returns the weight of all images."""
        return weight

    def on_root(self, function: Callable[[], T]) -> T:
        """The result of `function` on rank 0, on every rank; what it raises is raised on all."""
        with self.together():
            value: Any = function() if self.rank == 0 else None
        result: T = self.share(value)
        return result

    def first(self, value: T | None) -> T | None:
        """The value of the first rank that has one."""
        return next((v for v in self.gather(value) if v is not None), None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context whose exceptions are raised on all ranks; RankError on those without one of their own.  In the block
        nothing but `node_first` may be collective."""
        yield

    @contextlib.contextmanager
    def node_first(self) -> Iterator[None]:
        """Context that one rank of each machine passes before the others: they find what it has compiled.  In the block
        nothing may be collective."""
        yield

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Context in which an exception of one rank ends all: the others would wait for it forever."""
        yield

    @contextlib.contextmanager
    def limit_threads(self) -> Iterator[None]:
        """Context in which the ranks of a machine share its cores."""
        yield

    @contextlib.contextmanager
    def synchronize_batch_norm(self, model: Sequential) -> Iterator[None]:
        """Context in which batch norm in training has the statistics of all ranks' images."""
        yield

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Context of a training step, outside of which batch norm is never synchronised."""
        yield

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Context in which batch norm is not synchronised either."""
        yield

    def require_equal(self, settings: Mapping[str, Any]) -> None:
        """RankError that names what is not equal on all ranks, and on which ranks."""

    def start(self, model: Sequential, optimizer: Any, rng: np.random.Generator, settings: Callable[[], Any]) -> None:
        """Compare the settings of the ranks (RankError), and start them all with rank 0's state."""

    def end_epoch(self, model: Sequential, epoch: int) -> None:
        """Make buffers equal on all ranks, and check that the weights are (RankError)."""


ALONE = Group()


class Ranks(Group):
    """The ranks of an MPI communicator.

    comm     of mpi4py
    threads  of each rank; None: the cores that it may use, divided by the ranks that may use them
    """

    def __init__(self, comm: Any, threads: int | None = None) -> None:
        from mpi4py import MPI

        self.mpi, self.comm, self.rank, self.size = MPI, comm, comm.Get_rank(), comm.Get_size()
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = node.Get_rank()
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        allowed = node.allgather(cores)  # mpiexec may have bound each rank to cores of its own
        node.Free()
        share = sum(1 / sum(core in others for others in allowed) for core in cores)
        self.threads = max(1, int(share + 1e-9)) if threads is None else threads
        self.active = False  # in a training step
        self._staging: DeviceArray = None  # pinned memory, for gradients on a GPU
        self._cuda_aware: bool | None = None

    def gather(self, value: T) -> list[T]:
        values: list[T] = self.comm.allgather(value)
        return values

    def share(self, value: T) -> T:
        shared: T = self.comm.bcast(value)
        return shared

    def sum(self, values: Array) -> Array:
        sums = np.empty_like(values)
        self.comm.Allreduce(np.ascontiguousarray(values), sums)
        return sums

    def sum_gradient(self, grad: DeviceArray, weight: float) -> float:
        if isinstance(grad, np.ndarray):
            grad[-1] = weight
            self.comm.Allreduce(self.mpi.IN_PLACE, grad)
            return float(grad[-1])
        from tinycnn.cuda import _launch

        if self._cuda_aware is None:
            self._cuda_aware = is_cuda_aware()
        if self._cuda_aware:
            _launch.copy_to(grad[-1:], np.array([weight]))
            _launch.synchronize()  # MPI does not know the stream of the kernels
            self.comm.Allreduce(self.mpi.IN_PLACE, grad)
            return float(_launch.to_host(grad[-1:])[0])
        if self._staging is None or self._staging.shape != grad.shape:
            self._staging = _launch.pinned(grad.shape, grad.dtype)
        host = _launch.to_host(grad, self._staging)
        host[-1] = weight
        self.comm.Allreduce(self.mpi.IN_PLACE, host)
        _launch.copy_to(grad, host)
        return float(host[-1])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self._wait()  # the block may take long, on some ranks only
        self._raise_together(error)

    def _raise_together(self, error: Exception | None) -> None:
        texts = self.comm.allgather(None if error is None else str(error) or type(error).__name__)
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if error is None and failed:
            error = RankError(f"rank {failed[0]}: {texts[failed[0]]}")
        if error is not None:
            vars(error)[FIRST_RANK] = failed[0]
            raise error

    @contextlib.contextmanager
    def node_first(self) -> Iterator[None]:
        if self.local_rank > 0:
            self._wait()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self._wait()

    def _wait(self) -> None:
        """A barrier that leaves the core to others: MPI's own waits busily."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.005)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if FIRST_RANK in vars(error) or isinstance(error, DivergedError):  # all ranks have it
                raise
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        """Print a line, and end the processes of all ranks."""
        interrupted = isinstance(error, KeyboardInterrupt)
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" ({frame[0].filename}, line {frame[0].lineno})" if frame else ""
        text = "interrupted" if interrupted else f"{type(error).__name__}: {_check.one_line(error)}{place}"
        print_stderr(f"error on rank {self.rank} of {self.size}: {text}")
        sys.stdout.flush()
        _wait_until_read(sys.stdout, sys.stderr)
        code = EXIT_INTERRUPTED if interrupted else 1
        self.comm.Abort(code)
        os._exit(code)  # MPICH returns from it before this process is killed

    @contextlib.contextmanager
    def limit_threads(self) -> Iterator[None]:
        import numba

        before = numba.get_num_threads()
        numba.set_num_threads(min(before, self.threads or before))
        try:
            yield
        finally:
            numba.set_num_threads(before)

    @contextlib.contextmanager
    def synchronize_batch_norm(self, model: Sequential) -> Iterator[None]:
        layers = [layer for _, layer in model.leaves if isinstance(layer, BatchNorm2d)]
        self.synchronized = bool(layers)
        self._set_sync(model, layers, self)
        try:
            yield
        finally:
            self.synchronized = False
            self._set_sync(model, layers, None)

    def _set_sync(self, model: Sequential, layers: list[BatchNorm2d], group: "Ranks | None") -> None:
        for layer in layers:
            layer.sync = group
        model.clear_plans()  # they know which steps are replayable

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = self.absent = False

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def start(self, model: Sequential, optimizer: Any, rng: np.random.Generator, settings: Callable[[], Any]) -> None:
        with self.together():
            own = settings()
        self.require_equal(own)
        model.restore(self.share(model.snapshot()))
        extra = self.share([layer.get_extra_state() for _, layer in model.leaves])  # seeds of dropout
        for (_, layer), state in zip(model.leaves, extra, strict=True):
            if layer.get_extra_state() != state:
                layer.set_extra_state(state)
        optimizer.load_state_dict(self.share(optimizer.state_dict()))
        rng.bit_generator.state = self.share(rng.bit_generator.state)

    def require_equal(self, settings: Mapping[str, Any]) -> None:
        all_settings = self.gather(dict(settings))
        lines = []
        for name in dict.fromkeys(name for one in all_settings for name in one):
            holders: dict[str, list[int]] = {}
            for rank, one in enumerate(all_settings):
                holders.setdefault(repr(one.get(name, "none")), []).append(rank)
            if len(holders) > 1:
                texts = (f"{text[:100]} on {_rank_names(ranks)}" for text, ranks in holders.items())
                lines.append(f"{name}: {', '.join(texts)}")
        if lines:
            self._raise_together(RankError(f"the ranks differ in {'; '.join(lines)}"))

    def end_epoch(self, model: Sequential, epoch: int) -> None:
        for _, buffer in model.named_buffers():
            host = model.ops.to_host(buffer)
            # Running statistics are of each rank's own images, unless synchronised; the rest are counters.
            mean = self.sum(host.astype(np.float64)) / self.size if host.dtype.kind == "f" else self.share(host)
            model.ops.copy_to(buffer, mean.astype(host.dtype))
        digest = hashlib.sha256(np.ascontiguousarray(model.ops.to_host(model.theta)).data).hexdigest()
        digests = self.gather(digest)
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            self._raise_together(
                RankError(
                    f"after epoch {epoch} the weights of {_rank_names(different)} differ from those of rank 0: a "
                    "layer, optimizer or callback did not do the same on all ranks, or Allreduce of this MPI does not "
                    "give all ranks the same bits"
                )
            )

    # --- batch norm with the statistics of all ranks' images ----------------------------------------------------------
    # The kernels are those of one process: in evaluation mode they normalise with given statistics.

    def batch_norm_forward(
        self, layer: BatchNorm2d, y: DeviceArray, x: DeviceArray, running: tuple[DeviceArray, ...], momentum: float
    ) -> None:
        """`BatchNorm2d.forward` in training."""
        ops, saved, eps = layer.ops, layer.saved, layer.eps
        scratch = self._scratch(layer, x)
        count = 0 if self.absent else saved.images * math.prod(x.shape[2:4])
        mean, var, none = scratch.mean, scratch.var, scratch.batches
        if saved.images * math.prod(x.shape[2:4]) == 1:  # of which the kernel cannot compute the unbiased variance
            values = np.array(ops.to_host(x))[0].reshape(layer.channels, -1)[:, 0]
            ops.copy_to(mean, values)
            ops.copy_to(var, np.zeros_like(values))
        else:
            zeros = np.zeros(layer.channels, x.dtype)
            ops.copy_to(mean, zeros)
            ops.copy_to(var, zeros)
            ops.batch_norm_forward(
                y, x, layer.weight, layer.bias, saved.mean, saved.rstd, mean, var, none, 1.0, eps, True, saved.images
            )
        biased = np.array(ops.to_host(var), np.float64) * ((count - 1) / count if count > 1 else 0.0)
        rows = self.gather((count, np.array(ops.to_host(mean), np.float64), biased))
        rows = [row for row in rows if row[0]]
        total = sum(n for n, _, _ in rows)
        if total < 2:
            raise ValueError(f"{layer!r} needs more than one value a channel in training, got {total}")
        all_mean: Array = np.sum([n * m for n, m, _ in rows], axis=0) / total
        all_var: Array = np.sum([n * (v + (m - all_mean) ** 2) for n, m, v in rows], axis=0) / total
        if momentum < 0:
            momentum = 1 / (int(ops.to_host(running[2])[0]) + 1)
        for array, new in ((running[0], all_mean), (running[1], all_var * (total / (total - 1)))):
            old = np.array(ops.to_host(array), np.float64)
            ops.copy_to(array, (old + momentum * (new - old)).astype(x.dtype))
        ops.copy_to(mean, all_mean.astype(x.dtype))
        ops.copy_to(var, all_var.astype(x.dtype))
        scratch.count = total
        ops.batch_norm_forward(
            y, x, layer.weight, layer.bias, saved.mean, saved.rstd, mean, var, none, 0.0, eps, False, saved.images
        )

    def batch_norm_backward(self, layer: BatchNorm2d, dx: DeviceArray, dy: DeviceArray, x: DeviceArray) -> None:
        """`BatchNorm2d.backward` in training: with m values a channel on all ranks,

        dx = rstd * weight * (dy - sum(dy)/m - xhat * sum(dy*xhat)/m)
        """
        ops, saved = layer.ops, layer.saved
        scratch = self._scratch(layer, x)
        dweight, dbias = scratch.dweight, scratch.dbias
        no_dx = dx[:0] if dx.size else dx
        ops.batch_norm_backward(no_dx, dweight, dbias, dy, x, layer.weight, saved.mean, saved.rstd, True, saved.images)
        sums = [np.array(ops.to_host(array)) for array in (dweight, dbias)]
        for gradient, values in zip((layer.weight_grad, layer.bias_grad), sums, strict=True):
            if gradient.size:
                ops.copy_to(gradient, values)
        if not dx.size:
            return
        factors = self.sum(np.array(sums, np.float64)) / -scratch.count
        if self.absent:  # its image is none of the batch
            ops.copy_to(dx, np.zeros(dx.shape, x.dtype))
            return
        for array, values in zip((dweight, dbias), factors, strict=True):
            ops.copy_to(array, values.astype(x.dtype))
        ops.batch_norm_forward(
            scratch.dy, x, dweight, dbias, saved.mean, saved.rstd, scratch.mean, scratch.var, scratch.batches, 0.0,
            layer.eps, False, saved.images,
        )  # fmt: skip
        ops.add(scratch.dy.reshape(-1), scratch.dy.reshape(-1), dy.reshape(-1))
        none = dweight[:0]
        ops.batch_norm_backward(
            dx, none, none, scratch.dy, x, layer.weight, saved.mean, saved.rstd, False, saved.images
        )

    def _scratch(self, layer: BatchNorm2d, x: DeviceArray) -> SimpleNamespace:
        """Arrays of a layer for a batch like x: `mean` and `var` of all ranks' images, and temporary ones."""
        found = getattr(layer.saved, "scratch", None)
        if found is None:
            vectors = {n: layer.ops.empty((layer.channels,), x.dtype) for n in ("mean", "var", "dweight", "dbias")}
            found = SimpleNamespace(
                dy=layer.ops.empty(x.shape, x.dtype), batches=layer.ops.empty((1,), np.int64), count=0, **vectors
            )
            layer.saved.scratch = found
        return found


def _wait_until_read(*streams: Any, timeout: float = 10.0) -> None:
    """Wait until nothing is unread in the pipes that the streams write to: of a rank that aborts, mpiexec drops it."""
    deadline = time.monotonic() + timeout
    for stream in streams:
        with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):  # Windows, closed, None
            import fcntl
            import termios

            descriptor = stream.fileno()
            is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
            while is_pipe and any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))) and time.monotonic() < deadline:
                time.sleep(0.002)


FIRST_RANK = "tinycnn_first_rank"  # attribute of an exception that is raised on all ranks: the first that had one


def _rank_names(ranks: list[int]) -> str:
    """ "rank 3" or "ranks 0, 1 and 2"."""
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def as_group(comm: Any) -> Group:
    """The argument `comm` of `fit`: an mpi4py communicator, a `Group`, or None."""
    if comm is None:
        return ALONE
    if isinstance(comm, Group):
        return comm
    if not all(hasattr(comm, name) for name in ("Get_rank", "Get_size", "Allreduce", "Split_type")):
        raise TypeError(f"comm must be an mpi4py communicator, such as MPI.COMM_WORLD, got {_check.describe(comm)}")
    return Ranks(comm) if comm.Get_size() > 1 else ALONE


def launched_size() -> int:
    """Number of processes that mpiexec or srun has started this one with; 1 if it was started alone."""
    return max((_number(name) for name in SIZES), default=1) or 1


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def launched_rank() -> int:
    """Number of this process among those."""
    return next((_number(name) for name in RANKS if name in os.environ), 0)


def launched_group(threads: int | None = None) -> Group:
    """All processes that mpiexec or srun has started with this one.  Imports mpi4py only if there are others.

    Raises RankError if mpi4py is missing, or is of another MPI than mpiexec.
    """
    size = launched_size()
    if size == 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        missing = isinstance(error, ModuleNotFoundError)
        problem = "mpi4py is not installed" if missing else f"mpi4py cannot be used: {_check.one_line(error)}"
        raise _of_launched_rank(
            RankError(f'started with {size} ranks, but {problem}: pip install "tinycnn[mpi]"')
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        library = MPI.Get_library_version().split("\n")[0].strip()
        raise _of_launched_rank(
            RankError(
                f"started with {size} ranks, but mpi4py sees {comm.Get_size()}: mpiexec (or srun --mpi=...) and "
                f"mpi4py ({library}) are of different MPI libraries"
            )
        )
    return Ranks(comm, threads)


def _of_launched_rank(error: RankError) -> RankError:
    """An error that every rank has, before they can communicate: rank 0 reports it."""
    vars(error)[FIRST_RANK] = 0
    return error


def reports(error: BaseException, rank: int) -> bool:
    """Whether this rank is the one that prints an error, which all ranks have."""
    return bool(vars(error).get(FIRST_RANK, rank) == rank)


def local_device(device: str, group: Group) -> str:
    """The device of a rank: "cuda" without a number is GPU number local rank modulo the number of GPUs."""
    if group.size == 1 or device not in ("cuda", "auto"):
        return device
    count = len(_gpu.probe().gpus)
    return f"cuda:{group.local_rank % count}" if count else device


def is_cuda_aware() -> bool:
    """Whether the MPI library says that it takes arrays on a GPU.  Open MPI and MPICH have a function for it."""
    from mpi4py import MPI

    for name in (MPI.__file__, None):
        with contextlib.suppress(OSError, TypeError):
            library = ctypes.CDLL(name)
            if hasattr(library, "MPIX_Query_cuda_support"):
                return bool(library.MPIX_Query_cuda_support())
    return False
