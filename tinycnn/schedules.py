"""Learning-rate schedules: arrays that hold the rate of every step, for the argument `lr` of an optimizer."""

import numpy as np

from tinycnn import _check


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
    warmup = _check.number("warmup", warmup, 0, maximum=1)
    start = max_lr / _check.number("div_factor", div_factor, 1)
    end = start / _check.number("final_div_factor", final_div_factor, 1)
    peak, last = warmup * steps - 1, steps - 1
    t = np.arange(steps)
    up = start + (max_lr - start) * (1 - np.cos(np.pi * t / max(peak, 1e-12))) / 2
    down = end + (max_lr - end) * (1 + np.cos(np.pi * (t - peak) / max(last - peak, 1e-12))) / 2
    return np.where(t <= peak, up, down)
