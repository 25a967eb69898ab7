"""Optimizers with torch's definitions, over a model's flat parameter vector, and learning-rate schedules.

A schedule is an array: the learning rate of every step to come.  `lr` takes a number or such an array; after its end
the last rate stays.  Other than in torch, an optimizer is given the model, not a list of tensors.
"""

import contextlib
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._tracked import Tracked
from tinycnn.model import Sequential


class Optimizer(InitRepr, Tracked):
    """lr: a number or an array of rates, one a step.  `step()` updates model.theta from model.grad."""

    vectors: tuple[str, ...] = ()  # names of the optimizer's own vectors of the size of theta
    patterns = 0  # images that `before_epoch` looks at together

    def __init__(self, model, lr, weight_decay):
        hint = "an optimizer here is given the whole model, not its parameters"
        _check.instance("model", model, Sequential, "a Sequential", hint)
        rates = _check.learning_rates("lr", lr)
        self.model = model
        self.weight_decay = _check.number("weight_decay", weight_decay, 0)
        self._allocate(rates)

    def _allocate(self, rates):
        model = self.model
        vars(self)["changes"], self.ops = model.changes, model.ops
        self._step, self._epochs = self.ops.empty((1,), np.int64), np.zeros(1, np.int64)  # taken so far
        for name in self.vectors:
            setattr(self, name, self.ops.empty(model.theta.shape, model.dtype))
        self._replace(rates)

    def _replace(self, rates):
        self.lr_schedule, self.device_lr_schedule = rates, self.ops.to_device(rates.astype(self.model.dtype))
        self.lr_schedule.flags.writeable = False  # set_lr_schedule and lr know of the device's copy

    def __getstate__(self):
        """For copies: settings and the model, and the rest as `state_dict` has it."""
        made_anew = ("ops", "_run", "lr_schedule", "device_lr_schedule", "_step", "_epochs", *self.vectors)
        settings = {name: value for name, value in super().__getstate__().items() if name not in made_anew}
        return settings | {"_state": self.state_dict()}

    def __setstate__(self, state):
        saved = state.pop("_state")
        vars(self).update(state)
        self._allocate(saved["rates"].copy())
        self.load_state_dict(saved)

    @property
    def steps(self):
        """Steps taken so far."""
        return int(self.ops.to_host(self._step)[0])

    @property
    def lr(self):
        """The learning rate of the next step.  What is assigned, a number or an array, holds from that step on."""
        return float(self.lr_schedule[min(self.steps, len(self.lr_schedule) - 1)])

    @lr.setter
    def lr(self, lr):
        past, rates = np.minimum(np.arange(self.steps), len(self.lr_schedule) - 1), _check.learning_rates("lr", lr)
        self._replace(np.concatenate([self.lr_schedule[past], rates, rates[len(rates) - (len(rates) == 1) :]]))

    def schedule_exhausted(self):
        """Whether all rates of a schedule have been used, and the last one was not meant to stay (it is there once)."""
        last = self.lr_schedule[-2:]
        return self.steps >= len(self.lr_schedule) and last[0] != last[-1]

    def before_epoch(self, criterion, batches, rng):
        """What an optimizer has to do before each pass over `batches`; most have nothing to do."""

    def step(self):
        raise RuntimeError(f"{type(self).__name__} has no step")

    def repr_overrides(self):
        """Of what `repr` shows, what is not an attribute under its name."""
        return {"lr": self.lr_schedule}

    def set_lr_schedule(self, rates):
        """Replace the schedule by `rates`, of the same shape, or one number, in place: a step that a GPU has captured
        sees it."""
        rates = _check.learning_rates("rates", rates, self.lr_schedule.shape)
        self.lr_schedule.flags.writeable = True
        self.lr_schedule[...] = rates
        self.lr_schedule.flags.writeable = False
        self.ops.copy_to(self.device_lr_schedule, self.lr_schedule.astype(self.model.dtype))

    def use_average(self):
        """Leave the weights in model.theta that are meant to be used: here those that are there."""

    @contextlib.contextmanager
    def average_parameters(self):
        """Context manager: inside it model.theta holds the weights that are meant to be used."""
        yield

    def state_dict(self):
        """Everything needed to go on: step, rates and the vectors, as NumPy copies."""
        state = {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("_step", *self.vectors)}
        return state | {"rates": self.lr_schedule.copy(), "_epochs": self._epochs.copy()}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; ValueError where a key or a shape does not fit, and nothing is changed."""
        _check.mapping("state", state)
        names = ("_step", "rates", *self.vectors)
        if set(state) - {"_epochs"} != set(names):
            raise ValueError(f"optimizer state must have the keys {sorted(names)}, got {sorted(state)}")
        for name in ("_step", *self.vectors):
            mine = getattr(self, name)
            if np.shape(state[name]) != mine.shape:
                raise ValueError(f"optimizer state {name!r} must have shape {mine.shape}, got {np.shape(state[name])}")
            _check.finite(name, _check.array(name, state[name])) if mine.size else None
        if np.any(np.asarray(state["_step"]) < 0) or np.any(np.asarray(state["_step"]) % 1):
            raise ValueError(
                f"optimizer state '_step' must be a whole number that is not negative, got {state['_step']}"
            )
        schedule = _check.learning_rates("rates", state["rates"])
        if schedule.shape == self.lr_schedule.shape:
            self.set_lr_schedule(schedule)
        else:
            self._replace(schedule)
        self._epochs[...] = state.get("_epochs", 0)
        for name in ("_step", *self.vectors):
            self.ops.copy_to(getattr(self, name), np.asarray(state[name]))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, dampening, Nesterov's variant and (coupled) weight decay."""

    vectors = ("velocity",)
    velocity: Any

    def __init__(self, model, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(model, lr, weight_decay)
        self.momentum = _check.number("momentum", momentum, 0)
        self.dampening = _check.number("dampening", dampening)
        self.nesterov = bool(nesterov)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")

    def step(self):
        model = self.model
        self.ops.sgd(
            model.theta, model.grad, self.velocity, self.device_lr_schedule, self._step,
            self.momentum, self.dampening, self.weight_decay, self.nesterov,
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient (L2)."""

    vectors = ("m", "v")
    m: Any
    v: Any
    decoupled = False

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(model, lr, weight_decay)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers such as (0.9, 0.999), got {_check.describe(betas)}")
        self.betas = tuple(_check.number("betas", beta, 0, below=1) for beta in betas)
        self.eps = _check.number("eps", eps, 0)

    def step(self):
        model = self.model
        self.ops.adam(
            model.theta, model.grad, self.m, self.v, self.device_lr_schedule, self._step,
            *self.betas, self.eps, self.weight_decay, self.decoupled,
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(model, lr, betas, eps, weight_decay)


class EMA(InitRepr, Tracked):
    """An optimizer that also keeps an exponential moving average of the weights, which is used in place of them.

    After each step average = decay*average + (1 - decay)*theta; the first step copies (torch: AveragedModel with
    get_ema_multi_avg_fn(decay)).  All else is that of the optimizer inside.  The running statistics of batch norm
    are not averaged, but as the last step left them (torch: use_buffers=False).

    `fit` leaves the average in the model, so a second `fit` goes on from there, not from where the first one stood.
    """

    average: Any

    def __init__(self, optimizer, decay=0.999):
        _check.instance("optimizer", optimizer, Optimizer, "a tinycnn optimizer")
        self.decay = _check.number("decay", decay, 0, below=1)
        self.inner = optimizer
        self._allocate()

    def _allocate(self):
        self.model, self.ops = self.inner.model, self.inner.ops
        vars(self)["changes"] = self.model.changes
        self.average = self.ops.empty(self.model.theta.shape, self.model.dtype)
        self._averaged = self.ops.empty((1,), np.int64)

    def __getstate__(self):
        return {"inner": self.inner, "decay": self.decay, "_state": self.state_dict()}

    def __setstate__(self, state):
        self.inner, self.decay = state["inner"], state["decay"]
        self._allocate()
        self.load_state_dict(state["_state"])

    def repr_overrides(self):
        return {"optimizer": self.inner}

    @property
    def steps(self):
        """Steps taken so far."""
        return self.inner.steps

    @property
    def lr(self):
        """As `Optimizer.lr`."""
        return self.inner.lr

    @lr.setter
    def lr(self, lr):
        self.inner.lr = lr

    @property
    def _epochs(self):
        return self.inner._epochs

    def schedule_exhausted(self):
        """As `Optimizer.schedule_exhausted`."""
        return self.inner.schedule_exhausted()

    @property
    def patterns(self):
        return self.inner.patterns

    def before_epoch(self, criterion, batches, rng):
        """As `Optimizer.before_epoch`."""
        self.inner.before_epoch(criterion, batches, rng)

    @property
    def lr_schedule(self):
        return self.inner.lr_schedule

    @property
    def device_lr_schedule(self):
        return self.inner.device_lr_schedule

    def set_lr_schedule(self, rates):
        """As `Optimizer.set_lr_schedule`."""
        self.inner.set_lr_schedule(rates)

    def step(self):
        self.inner.step()
        self.ops.ema_update(self.average, self.model.theta, self._averaged, self.decay)

    def use_average(self):
        """Overwrite model.theta with the average, if there has been a step; training would go on from there."""
        if self.ops.to_host(self._averaged)[0]:
            self.ops.copy_to(self.model.theta, self.average)

    @contextlib.contextmanager
    def average_parameters(self):
        """Context manager: inside it model.theta holds the average, after it the trained weights again."""
        trained = np.array(self.ops.to_host(self.model.theta))
        self.use_average()
        try:
            yield
        finally:
            self.ops.copy_to(self.model.theta, trained)

    def state_dict(self):
        """That of the optimizer inside, with the average and how often it was taken."""
        mine = {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("average", "_averaged")}
        return self.inner.state_dict() | mine

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; ValueError where a key or a shape does not fit, and nothing is changed."""
        _check.mapping("state", state)
        names = ("average", "_averaged")
        for name in names:
            if np.shape(state.get(name)) != getattr(self, name).shape:
                raise ValueError(
                    f"optimizer state must have {name!r} of shape {getattr(self, name).shape}, "
                    f"got {np.shape(state[name]) if name in state else 'none'}"
                )
        self.inner.load_state_dict({name: value for name, value in state.items() if name not in names})
        for name in names:
            self.ops.copy_to(getattr(self, name), np.asarray(state[name]))
