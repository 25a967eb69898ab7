"""Optimizers with torch's definitions, over a model's flat parameter vector.

`lr` takes a number or a schedule: an array with the learning rate of every step (see `tinycnn.schedules`).  After its
end the last rate stays.  Unlike in torch, an optimizer takes the model, not a list of tensors.
"""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, DeviceArray, State
from tinycnn.containers import named_layers
from tinycnn.layers import Layer
from tinycnn.model import Sequential

if TYPE_CHECKING:
    from tinycnn.dataset import DeviceDataset
    from tinycnn.losses import Loss


class Optimizer(InitRepr, Tracked):
    """Base class.  `step()` updates model.theta from model.grad.

    lr                   a number, or an array with the rate of every step
    weight_decay         of all parameters that no group says otherwise for
    groups               other rates for some parameters: a list of dictionaries such as
                         ``{"params": "*.bias", "lr_scale": 2.0, "weight_decay": 0.0}``.  "params" is a pattern of names
                         (`model.named_parameters`, `fnmatch`), a layer, or a list of these; lr_scale is a factor of lr
    decay_bias_and_norm  False: no weight decay of parameters with fewer than two axes, in no group with its own
    clip_grad_norm       scale the gradient so that its norm over all trained parameters is at most this, before each
                         step; `grad_norm` is the norm before.  None for no limit
    clip_grad_value      then clamp the gradient's entries to plus and minus this

    Parameters of frozen layers (`layer.requires_grad = False`) are left alone.  Raises ValueError for a pattern that
    matches nothing, a layer that is not in the model, or a parameter in two groups.
    """

    vectors: tuple[str, ...] = ()  # names of the optimizer's state vectors, each of the size of theta
    patterns = 0  # number of images that `before_epoch` evaluates in one batch
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    _blocks: DeviceArray  # these three are set by `prepare`
    _rates: DeviceArray
    _partials: DeviceArray

    def __init__(
        self,
        model: Sequential,
        lr: ArrayLike,
        weight_decay: float,
        *,
        groups: Sequence[Mapping[str, Any]] = (),
        decay_bias_and_norm: bool = True,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        hint = "an optimizer takes the whole model, not its parameters"
        _check.instance("model", model, Sequential, "a Sequential", hint)
        rates = _check.learning_rates("lr", lr)
        self.model = model
        self.weight_decay = _check.number("weight_decay", weight_decay, 0)
        self.decay_bias_and_norm = bool(decay_bias_and_norm)
        self.groups = resolve_groups(model, groups)
        for name, limit in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
            if limit is not None and _check.number(name, limit, 0) == 0:
                raise ValueError(f"{name} must be positive, got {limit}")
            setattr(self, name, limit)
        self._allocate(rates)

    def _allocate(self, rates: Array) -> None:
        model = self.model
        vars(self)["changes"], self.ops = model.changes, model.ops
        self._step, self._epochs = self.ops.empty((1,), np.int64), np.zeros(1, np.int64)  # completed so far
        for name in self.vectors:
            setattr(self, name, self.ops.empty(model.theta.shape, model.dtype))
        self._norm = self.ops.empty((1,), model.dtype)
        self._ranges: list[Range] | None = None  # of `_blocks`
        self._allocate_schedule(rates)

    def _allocate_schedule(self, rates: Array) -> None:
        self.lr_schedule, self.device_lr_schedule = rates, self.ops.to_device(rates.astype(self.model.dtype))
        self.lr_schedule.flags.writeable = False  # changes go through set_lr_schedule or lr, to the device's copy too

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the settings, the model and the `state_dict`."""
        reallocated = {"ops", "_runner", "lr_schedule", "device_lr_schedule", "_step", "_epochs", *self.vectors}
        reallocated |= {"_norm", "_ranges", "_blocks", "_rates", "_partials"}
        settings = {name: value for name, value in super().__getstate__().items() if name not in reallocated}
        return settings | {"_state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_state")
        vars(self).update(state)
        self._allocate(saved["rates"].copy())
        self.load_state_dict(saved)

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return int(self.ops.to_host(self._step)[0])

    @property
    def lr(self) -> float:
        """The learning rate of the next step.  Assigning a number or an array sets the rates from that step on."""
        return float(self.lr_schedule[min(self.steps, len(self.lr_schedule) - 1)])

    @lr.setter
    def lr(self, lr: ArrayLike) -> None:
        past, rates = np.minimum(np.arange(self.steps), len(self.lr_schedule) - 1), _check.learning_rates("lr", lr)
        last = rates[len(rates) - (len(rates) == 1) :]  # one number is stored twice: see `schedule_exhausted`
        self._allocate_schedule(np.concatenate([self.lr_schedule[past], rates, last]))

    def schedule_exhausted(self) -> bool:
        """Whether the schedule has ended.  A last rate that is stored twice holds forever."""
        last = self.lr_schedule[-2:]
        return self.steps >= len(self.lr_schedule) and last[0] != last[-1]

    def before_epoch(self, criterion: "Loss", dataset: "DeviceDataset", rng: np.random.Generator) -> None:
        """Called before each pass over `dataset`.  By default does nothing."""

    def step(self) -> None:
        """Update model.theta from model.grad."""
        raise RuntimeError(f"{type(self).__name__} has no step")

    @property
    def grad_norm(self) -> float:
        """Euclidean norm of the last step's gradient before it was clipped; 0 without `clip_grad_norm`."""
        return float(self.ops.to_host(self._norm)[0])

    def prepare(self) -> tuple[DeviceArray, DeviceArray]:
        """Clip the gradient.  Returns the blocks of the parameters that are trained, and their rates."""
        ranges = self._trained_ranges()
        if ranges != self._ranges:
            blocks, rates = self.ops.parameter_blocks(ranges, self.model.dtype)
            partials = self.ops.empty((len(blocks),), self.model.dtype)
            vars(self).update(_ranges=ranges, _blocks=blocks, _rates=rates, _partials=partials)  # no change of settings
        if self.clip_grad_norm is not None:
            self.ops.clip_grad_norm(self.model.grad, self._norm, self._partials, self._blocks, self.clip_grad_norm)
        if self.clip_grad_value is not None:
            self.ops.clip_grad_value(self.model.grad, self.clip_grad_value)
        return self._blocks, self._rates

    def _trained_ranges(self) -> list["Range"]:
        """The flat vector without frozen layers, neighbours with equal rates joined.  ValueError if nothing is left."""
        ranges: list[Range] = []
        for parameter in self.model.parameter_table:
            if parameter.layer.requires_grad:
                decay = self.weight_decay if self.decay_bias_and_norm or len(parameter.shape) > 1 else 0.0
                group = self.groups.get(parameter.name, {})
                rates = group.get("lr_scale", 1.0), group.get("weight_decay", decay)
                start = parameter.start
                if ranges and ranges[-1][1:] == (start, *rates):
                    start = ranges.pop()[0]
                ranges.append((start, parameter.stop, *rates))
        if self.model.parameter_table and not ranges:
            raise ValueError("optimizer: every layer with parameters is frozen (requires_grad is False)")
        return ranges

    def repr_overrides(self) -> dict[str, Any]:
        """Values for `repr` that are not attributes of the same name."""
        return {"lr": self.lr_schedule}

    def repr_options(self) -> dict[str, Any]:
        """Values of keyword arguments that `Optimizer` has for all."""
        defaults = {"groups": {}, "decay_bias_and_norm": True, "clip_grad_norm": None, "clip_grad_value": None}
        changed = {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
        if "groups" in changed:
            changed["groups"] = [{"params": name} | rates for name, rates in self.groups.items()]
        return changed

    def set_lr_schedule(self, rates: ArrayLike) -> None:
        """Overwrite the schedule in place, so that captured steps use it.  rates: an array of its shape, or a number"""
        rates = _check.learning_rates("rates", rates, self.lr_schedule.shape)
        self.lr_schedule.flags.writeable = True
        self.lr_schedule[...] = rates
        self.lr_schedule.flags.writeable = False
        self.ops.copy_to(self.device_lr_schedule, self.lr_schedule.astype(self.model.dtype))

    def use_average(self) -> None:
        """Overwrite model.theta with the averaged weights.  Does nothing in an optimizer without an average."""

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Context in which model.theta holds the averaged weights.  Does nothing without an average."""
        yield

    def state_dict(self) -> State:
        """The state needed to resume, as NumPy copies: number of steps and epochs, rates, and the state vectors."""
        state = {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("_step", *self.vectors)}
        return state | {"rates": self.lr_schedule.copy(), "_epochs": self._epochs.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.  ValueError or TypeError for a wrong key, shape or value, before any
        change."""
        _check.mapping("state", state)
        names = ("_step", "rates", *self.vectors)
        if set(state) - {"_epochs"} != set(names):
            raise ValueError(f"optimizer state must have the keys {sorted(names)}, got {sorted(state)}")
        for name in ("_step", *self.vectors):
            expected = getattr(self, name).shape
            if np.shape(state[name]) != expected:
                raise ValueError(f"optimizer state {name!r} must have shape {expected}, got {np.shape(state[name])}")
            _check.finite(name, _check.array(name, state[name])) if getattr(self, name).size else None
        if np.any(np.asarray(state["_step"]) < 0) or np.any(np.asarray(state["_step"]) % 1):
            raise ValueError(
                f"optimizer state '_step' must be a whole number that is not negative, got {state['_step']}"
            )
        schedule = _check.learning_rates("rates", state["rates"])
        if schedule.shape == self.lr_schedule.shape:
            self.set_lr_schedule(schedule)
        else:
            self._allocate_schedule(schedule)
        self._epochs[...] = state.get("_epochs", 0)
        for name in ("_step", *self.vectors):
            self.ops.copy_to(getattr(self, name), np.asarray(state[name]))


Range: TypeAlias = tuple[int, int, float, float]  # start and stop in the flat vector, lr_scale, weight_decay
GROUP_KEYS = ("params", "lr_scale", "weight_decay")


def resolve_groups(model: Sequential, groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`groups` of an optimizer as name of a parameter -> its rates.  ValueError or TypeError names what is wrong."""
    found: dict[str, dict[str, float]] = {}
    first: dict[str, int] = {}
    _check.instance("groups", groups, (list, tuple), "a list of dictionaries")
    for number, group in enumerate(groups):
        where = f"groups[{number}]"
        _check.instance(where, group, Mapping, "a dictionary with the key 'params'")
        unknown = [key for key in group if key not in GROUP_KEYS]
        if unknown or "params" not in group:
            hint = "; lr_scale is a factor of the optimizer's lr" if "lr" in unknown else ""
            raise ValueError(
                f"{where} must have the keys {', '.join(GROUP_KEYS)}, got {', '.join(map(str, group))}{hint}"
            )
        rates = {
            key: _check.number(f"{where}[{key!r}]", group[key], 0)
            for key in GROUP_KEYS[1:]
            if group.get(key) is not None
        }
        for name in _matches(model, where, group["params"]):
            if name in first:
                raise ValueError(f"{where} and groups[{first[name]}] both have the parameter {name}")
            first[name], found[name] = number, rates
    return found


def _matches(model: Sequential, where: str, params: Any) -> list[str]:
    """Names of the parameters that "params" of a group selects, each once."""
    names: list[str] = []
    for item in params if isinstance(params, (list, tuple)) else [params]:
        if isinstance(item, str):
            hits = [p.name for p in model.parameter_table if fnmatch.fnmatchcase(p.name, item)]
            missing = f"no parameter matches {item!r}; there are {', '.join(p.name for p in model.parameter_table)}"
        else:
            _check.instance(f"{where}['params']", item, Layer, "a pattern of names, a layer, or a list of these")
            inside = {id(layer) for _, layer in named_layers([item])}
            hits = [p.name for p in model.parameter_table if id(p.layer) in inside]
            missing = f"{item!r} is not in the model, or has no parameters"
        if not hits:
            raise ValueError(f"{where}['params']: {missing}")
        names += [name for name in hits if name not in names]
    return names


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, dampening, Nesterov momentum and coupled weight decay (L2).

    options  keyword arguments of `Optimizer`: groups, decay_bias_and_norm, clip_grad_norm, clip_grad_value
    """

    vectors = ("velocity",)
    velocity: DeviceArray

    def __init__(
        self,
        model: Sequential,
        lr: ArrayLike = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, **options)
        self.momentum = _check.number("momentum", momentum, 0)
        self.dampening = _check.number("dampening", dampening)
        self.nesterov = bool(nesterov)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")

    def step(self) -> None:
        model = self.model
        self.ops.sgd(
            model.theta, model.grad, self.velocity, self.device_lr_schedule, self._step, *self.prepare(),
            self.momentum, self.dampening, self.nesterov,
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient (L2)."""

    vectors = ("m", "v")
    m: DeviceArray
    v: DeviceArray
    decoupled = False

    def __init__(
        self,
        model: Sequential,
        lr: ArrayLike = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, **options)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers such as (0.9, 0.999), got {_check.describe(betas)}")
        self.betas = tuple(_check.number("betas", beta, 0, below=1) for beta in betas)
        self.eps = _check.number("eps", eps, 0)

    def step(self) -> None:
        model = self.model
        self.ops.adam(
            model.theta, model.grad, self.m, self.v, self.device_lr_schedule, self._step, *self.prepare(),
            *self.betas, self.eps, self.decoupled,
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(
        self,
        model: Sequential,
        lr: ArrayLike = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, betas, eps, weight_decay, **options)


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012) with torch's definition; weight decay is added to the gradient (L2).

    centered  divide by an estimate of the gradient's standard deviation, not of its root mean square
    """

    vectors = ("v", "mean", "velocity")  # moving averages of grad^2 and grad, momentum
    v: DeviceArray
    mean: DeviceArray
    velocity: DeviceArray

    def __init__(
        self,
        model: Sequential,
        lr: ArrayLike = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, **options)
        self.alpha = _check.number("alpha", alpha, 0, maximum=1)
        self.eps = _check.number("eps", eps, 0)
        self.momentum, self.centered = _check.number("momentum", momentum, 0), bool(centered)

    def step(self) -> None:
        model = self.model
        self.ops.rmsprop(
            model.theta, model.grad, self.v, self.mean, self.velocity, self.device_lr_schedule, self._step,
            *self.prepare(), self.alpha, self.eps, self.momentum, self.centered,
        )  # fmt: skip


class EMA(InitRepr, Tracked):
    """Wraps an optimizer and keeps an exponential moving average of the weights, for evaluation and as the result.

    After each step average = decay*average + (1 - decay)*theta; the first step copies (torch: AveragedModel with
    get_ema_multi_avg_fn(decay)).  Everything else is the inner optimizer's.  The running statistics of batch norm are
    not averaged (torch: use_buffers=False).

    `fit` leaves the average in the model, so a second `fit` continues from the average.
    """

    average: DeviceArray

    def __init__(self, optimizer: Optimizer, decay: float = 0.999) -> None:
        _check.instance("optimizer", optimizer, Optimizer, "a tinycnn optimizer")
        self.decay = _check.number("decay", decay, 0, below=1)
        self.inner = optimizer
        self._allocate()

    def _allocate(self) -> None:
        self.model, self.ops = self.inner.model, self.inner.ops
        vars(self)["changes"] = self.model.changes
        self.average = self.ops.empty(self.model.theta.shape, self.model.dtype)
        self._averaged = self.ops.empty((1,), np.int64)  # number of updates of the average

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "decay": self.decay, "_state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.inner, self.decay = state["inner"], state["decay"]
        self._allocate()
        self.load_state_dict(state["_state"])

    def repr_overrides(self) -> dict[str, Any]:
        return {"optimizer": self.inner}

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return self.inner.steps

    @property
    def lr(self) -> float:
        """See `Optimizer.lr`."""
        return self.inner.lr

    @lr.setter
    def lr(self, lr: ArrayLike) -> None:
        self.inner.lr = lr

    @property
    def _epochs(self) -> Array:
        return self.inner._epochs

    def schedule_exhausted(self) -> bool:
        """See `Optimizer.schedule_exhausted`."""
        return self.inner.schedule_exhausted()

    @property
    def patterns(self) -> int:
        return self.inner.patterns

    def before_epoch(self, criterion: "Loss", dataset: "DeviceDataset", rng: np.random.Generator) -> None:
        """See `Optimizer.before_epoch`."""
        self.inner.before_epoch(criterion, dataset, rng)

    @property
    def lr_schedule(self) -> Array:
        return self.inner.lr_schedule

    @property
    def device_lr_schedule(self) -> DeviceArray:
        return self.inner.device_lr_schedule

    def set_lr_schedule(self, rates: ArrayLike) -> None:
        """See `Optimizer.set_lr_schedule`."""
        self.inner.set_lr_schedule(rates)

    def step(self) -> None:
        self.inner.step()
        self.ops.ema_update(self.average, self.model.theta, self._averaged, self.decay)

    def use_average(self) -> None:
        """Overwrite model.theta with the average, if there is one.  Further training starts from the average."""
        if self.ops.to_host(self._averaged)[0]:
            self.ops.copy_to(self.model.theta, self.average)

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Context in which model.theta holds the average; restores the trained weights."""
        trained = np.array(self.ops.to_host(self.model.theta))
        self.use_average()
        try:
            yield
        finally:
            self.ops.copy_to(self.model.theta, trained)

    def state_dict(self) -> State:
        """The inner optimizer's state, the average and the number of its updates."""
        state = {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("average", "_averaged")}
        return self.inner.state_dict() | state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.  ValueError or TypeError for a wrong key, shape or value, before any
        change."""
        _check.mapping("state", state)
        names = ("average", "_averaged")
        for name in names:
            expected = getattr(self, name).shape
            if np.shape(state.get(name)) != expected:  # type: ignore[arg-type]
                raise ValueError(
                    f"optimizer state must have {name!r} of shape {expected}, "
                    f"got {np.shape(state[name]) if name in state else 'none'}"
                )
        self.inner.load_state_dict({name: value for name, value in state.items() if name not in names})
        for name in names:
            self.ops.copy_to(getattr(self, name), np.asarray(state[name]))
