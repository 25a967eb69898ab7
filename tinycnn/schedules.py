"""Learning-rate schedules: arrays with the rate of every step, for the argument `lr` of an optimizer."""

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array


def constant(lr: float, steps: int) -> Array:
    """The same rate at every step.  Returns (steps,)."""
    return np.full(_check.integer("steps", steps, 1), _check.number("lr", lr, 0))


def step_decay(lr: float, steps: int, step_size: int, gamma: float = 0.1) -> Array:
    """lr, multiplied by gamma after every `step_size` steps (torch: StepLR).  Returns (steps,)."""
    decays = np.arange(_check.integer("steps", steps, 1)) // _check.integer("step_size", step_size, 1)
    rates: Array = _check.number("lr", lr, 0) * _check.number("gamma", gamma, 0) ** decays
    return rates


def cosine(lr: float, steps: int, final_lr: float = 0.0) -> Array:
    """Half a cosine from lr down towards final_lr (torch: CosineAnnealingLR with T_max = steps).  Returns (steps,)."""
    progress = np.arange(_check.integer("steps", steps, 1)) / steps
    lr, final_lr = _check.number("lr", lr, 0), _check.number("final_lr", final_lr, 0)
    rates: Array = final_lr + (lr - final_lr) * (1 + np.cos(np.pi * progress)) / 2
    return rates


def one_cycle(
    max_lr: float, steps: int, warmup: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> Array:
    """The one-cycle schedule (Smith and Topin 2018) in the form of torch's OneCycleLR.  Returns (steps,).

    Half a cosine from max_lr/div_factor up to max_lr over the fraction `warmup` of the steps, then half a cosine down
    to max_lr/div_factor/final_div_factor.
    """
    steps, max_lr = _check.integer("steps", steps, 1), _check.number("max_lr", max_lr, 0)
    warmup = _check.number("warmup", warmup, 0, maximum=1)
    start = max_lr / _check.number("div_factor", div_factor, 1)
    end = start / _check.number("final_div_factor", final_div_factor, 1)
    peak, last = warmup * steps - 1, steps - 1
    t = np.arange(steps)
    up = start + (max_lr - start) * (1 - np.cos(np.pi * t / max(peak, 1e-12))) / 2
    down = end + (max_lr - end) * (1 + np.cos(np.pi * (t - peak) / max(last - peak, 1e-12))) / 2
    rates: Array = np.where(t <= peak, up, down)
    return rates
