"""Optimizers with torch's definitions, over a model's flat parameter vector, and learning-rate schedules.

A schedule is an array: the learning rate of every step to come.  `lr` takes a number or such an array; after its end
the last rate stays.  Other than in torch, an optimizer is given the model, not a list of tensors.
"""

from typing import Any

import numpy as np

from tinycnn import _check


class Optimizer:
    """lr: a number or an array of rates, one a step.  `step()` updates model.theta from model.grad."""

    vectors: tuple[str, ...] = ()  # names of the optimizer's own vectors of the size of theta
    patterns = 0  # images that `before_epoch` looks at together

    def __init__(self, model, lr, weight_decay):
        rates = np.atleast_1d(np.asarray(lr))
        if rates.dtype.kind not in "fiu" or rates.ndim != 1 or not rates.size:
            raise TypeError(f"lr must be a number or a one-dimensional array of numbers, got {lr!r}")
        if not np.isfinite(rates).all() or (rates < 0).any():
            raise ValueError(f"lr must be finite and not negative, got {rates[~(rates >= 0)][:1] or rates.max()}")
        self.model, self.k = model, model.k
        self.weight_decay = _check.number("weight_decay", weight_decay, 0)
        self.schedule = rates.astype(np.float64)
        self.rates = self.k.to_device(self.schedule.astype(model.dtype))
        self._step = self.k.empty((1,), np.int64)
        for name in self.vectors:
            setattr(self, name, self.k.empty(model.theta.shape, model.dtype))

    @property
    def steps(self):
        """Steps taken so far."""
        return int(self.k.to_host(self._step)[0])

    @property
    def lr(self):
        """The learning rate of the next step."""
        return float(self.schedule[min(self.steps, len(self.schedule) - 1)])

    def before_epoch(self, criterion, batches, rng):
        """What an optimizer has to do before each pass over `batches`; most have nothing to do."""

    def step(self):
        raise RuntimeError(f"{type(self).__name__} has no step")

    def state_dict(self):
        """Everything needed to go on: step, rates and the vectors, as NumPy copies."""
        state = {name: np.array(self.k.to_host(getattr(self, name))) for name in ("_step", *self.vectors)}
        return state | {"rates": self.schedule.copy()}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; ValueError where a key or a shape does not fit, and nothing is changed."""
        names = ("_step", "rates", *self.vectors)
        if set(state) != set(names):
            raise ValueError(f"optimizer state must have the keys {sorted(names)}, got {sorted(state)}")
        for name in ("_step", *self.vectors):
            mine = getattr(self, name)
            if np.shape(state[name]) != mine.shape:
                raise ValueError(f"optimizer state {name!r} must have shape {mine.shape}, got {np.shape(state[name])}")
        schedule = np.array(state["rates"], np.float64)
        if not np.array_equal(schedule, self.schedule):
            self.schedule, self.rates = schedule, self.k.to_device(schedule.astype(self.model.dtype))
        for name in ("_step", *self.vectors):
            self.k.write(getattr(self, name), np.asarray(state[name]))


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
        self.k.sgd(
            model.theta, model.grad, self.velocity, self.rates, self._step,
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
        self.betas = tuple(_check.number("betas", beta, 0, 1) for beta in betas)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        self.eps = _check.number("eps", eps, 0)

    def step(self):
        model = self.model
        self.k.adam(
            model.theta, model.grad, self.m, self.v, self.rates, self._step,
            *self.betas, self.eps, self.weight_decay, self.decoupled,
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(model, lr, betas, eps, weight_decay)


# --- schedules: arrays of learning rates ------------------------------------------------------------------------------


def constant(lr, steps):
    """The same rate at every step.  Returns (steps,)."""
    return np.full(_check.integer("steps", steps, 1), _check.number("lr", lr, 0))


def step_decay(lr, steps, step_size, gamma=0.1):
    """lr times gamma after every `step_size` steps (torch: StepLR).  Returns (steps,)."""
    number = np.arange(_check.integer("steps", steps, 1)) // _check.integer("step_size", step_size, 1)
    return _check.number("lr", lr, 0) * _check.number("gamma", gamma, 0) ** number


def cosine(lr, steps, final_lr=0.0):
    """Half a cosine from lr down towards final_lr (torch: CosineAnnealingLR, T_max = steps).  Returns (steps,)."""
    turn = np.arange(_check.integer("steps", steps, 1)) / steps
    lr, final_lr = _check.number("lr", lr, 0), _check.number("final_lr", final_lr, 0)
    return final_lr + (lr - final_lr) * (1 + np.cos(np.pi * turn)) / 2


def one_cycle(max_lr, steps, warmup=0.3, div_factor=25.0, final_div_factor=1e4):
    """Half a cosine up from max_lr/div_factor over the first `warmup` share of the steps, then half a cosine down to
    max_lr/div_factor/final_div_factor (Smith and Topin 2018, in torch's form OneCycleLR).  Returns (steps,)."""
    steps, max_lr = _check.integer("steps", steps, 1), _check.number("max_lr", max_lr, 0)
    warmup = _check.number("warmup", warmup, 0, 1)
    start = max_lr / _check.number("div_factor", div_factor, 1)
    end = start / _check.number("final_div_factor", final_div_factor, 1)
    peak, last = warmup * steps - 1, steps - 1
    t = np.arange(steps)
    up = start + (max_lr - start) * (1 - np.cos(np.pi * t / max(peak, 1e-12))) / 2
    down = end + (max_lr - end) * (1 + np.cos(np.pi * (t - peak) / max(last - peak, 1e-12))) / 2
    return np.where(t <= peak, up, down)
