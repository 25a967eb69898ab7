"""Results of recipes: one small JSON file for each finished seed, one for a search, and what they say together.

results/<recipe>/seed-0.json
results/<recipe>/trials.json
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from tinycnn._check import short_repr
from tinycnn._files import atomic_write, read_json
from tinycnn.recipes import RECIPES_DIR

# Student's t for a two-sided confidence of 95 %, by degrees of freedom from 1; beyond, the normal distribution's.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# What the reports need of a result.
RESULT_KEYS = {
    "fingerprint": str, "seed": int, "data": str, "accuracy": float, "errors": int, "precision": float, "recall": float,
    "f1": float, "cpu_seconds": float, "held_out": str, "history": dict, "confusion": list, "environment": dict,
}  # fmt: skip
# The same of a search and of its trials; those that were not trained to the end have no figures.
SEARCH_KEYS = {"fingerprint": str, "trials": list}
TRIAL_KEYS = {
    "number": int, "point": dict, "state": str, "validation": (float, type(None)), "environment": dict, "finished": str,
}  # fmt: skip
TRIAL_METRICS = {"validation": float, "accuracy": float, "f1": float, "cpu_seconds": float}
CLASSES = 10  # of all data sets
FRACTIONS = ("accuracy", "precision", "recall", "f1", "validation")
CURVES = ("train_accuracy", "val_accuracy")  # of a result's history
MACHINE = ("device", "numpy", "numba")  # of its environment, if there is one


def result_path(root, recipe, seed):
    return Path(root) / recipe.name / f"seed-{seed}.json"


def prepare_folder(root, recipe):
    """Make a recipe's folder under `root`; OSError now, not after hours of training, if it cannot be written."""
    folder = result_path(root, recipe, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "try") as file:
        file.write(b"")
    (folder / "try").unlink()


def save(root, recipe, result):
    """Write a seed's result; whatever stood there is replaced."""
    path = result_path(root, recipe, result["seed"])
    with atomic_write(path) as file:
        file.write((json.dumps(result) + "\n").encode())
    return path


def read(root, recipe, device=None, data=None):
    """The seeds of `recipe` as it is now, in order: a list of results.

    Results of an earlier version of the recipe do not count.  A damaged file is a ValueError that names it.
    """
    found = []
    for path in sorted((Path(root) / recipe.name).glob("seed-*.json"), key=lambda p: (len(p.name), p.name)):
        result = _load(path, recipe, _check_result)
        if result["fingerprint"] == recipe.fingerprint and data in (None, result["data"]):
            found.append(result)
    return found


def save_trials(root, recipe, trials):
    """Write the trials of a search; returns the path, or None where the file holds more of them, which stay."""
    if len(read_trials(root, recipe)) > len(trials):
        return None
    path = Path(root) / recipe.name / "trials.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "trials": trials}
    with atomic_write(path) as file:
        file.write((json.dumps(found) + "\n").encode())
    return path


def read_trials(root, recipe):
    """The trials of the search `recipe` as it is now, the best on validation images first: a list of dicts.

    Those of an earlier version of the recipe do not count.  A damaged file is a ValueError that names it.
    """

    def check(found):
        _need(found, SEARCH_KEYS)
        for trial in found["trials"]:
            _need(trial, TRIAL_KEYS)
            if is_complete(trial):
                _need(trial, TRIAL_METRICS)
            _check_environment(trial)

    path = Path(root) / recipe.name / "trials.json"
    if not path.exists():
        return []
    found = _load(path, recipe, check)
    trials = found["trials"] if found["fingerprint"] == recipe.fingerprint else []
    return sorted(trials, key=lambda t: (not is_complete(t), -(t["validation"] or 0), t["number"]))


def is_complete(trial):
    """Whether a trial was trained to the end, not given up and not failed."""
    return trial["state"] == "COMPLETE"


def source_file(recipe):
    """Where a recipe stands, for its results; None for those of the project."""
    return None if recipe.path.parent == RECIPES_DIR else str(recipe.path.resolve())


def check_owner(root, recipe):
    """ValueError if what lies in the recipe's place are results of another recipe, of the same name in another file."""
    for path in sorted((Path(root) / recipe.name).glob("seed-*.json")):
        result = _load(path, recipe, _check_result)
        owner = result.get("file")
        if owner not in (None, source_file(recipe)) and result["fingerprint"] != recipe.fingerprint:
            raise ValueError(
                f"{path} is a result of another recipe {recipe.name!r}, that of {owner}: choose another name, or "
                "another folder with --results"
            )


def _load(path, recipe, check):
    """What a file of the recipe holds, a dict that `check` has nothing against; else a ValueError that names it."""
    try:
        found = read_json(path)
        if found.get("recipe") != recipe.name:
            raise ValueError("another recipe's, or none's")
        check(found)
    except ValueError as error:
        raise ValueError(f"{path} is not a result of recipe {recipe.name!r} ({error}): remove it") from None
    return found


def _need(found, keys):
    for key, kind in keys.items():
        if not isinstance(found, dict) or key not in found or not isinstance(found[key], kind):
            raise ValueError(f"{key} is missing or damaged")
        value = found[key]
        if isinstance(value, bool) or (kind is int and value < 0):
            raise ValueError(f"{key} must not be {short_repr(value)}")
        if isinstance(value, float) and not (
            math.isfinite(value) and 0 <= value <= (1 if key in FRACTIONS else math.inf)
        ):
            raise ValueError(f"{key} must be {'from 0 to 1' if key in FRACTIONS else 'at least 0'}, got {value}")


def _check_result(result):
    """ValueError unless reports and pictures can be made of it."""
    _need(result, RESULT_KEYS)
    _check_environment(result)
    if result["held_out"] not in ("test", "validation"):
        raise ValueError(f"held_out must be 'test' or 'validation', got {short_repr(result['held_out'])}")
    rows = result["confusion"]
    if len(rows) != CLASSES or not all(isinstance(row, list) and len(row) == CLASSES for row in rows):
        raise ValueError(f"confusion must have {CLASSES} rows of {CLASSES} counts")
    if not all(type(count) is int and 0 <= count < 2**53 for row in rows for count in row):
        raise ValueError("confusion must hold counts")
    for key, kind in (("diverged", str), ("file", str)):
        if key in result and not isinstance(result[key], kind):
            raise ValueError(f"{key} must be a string, got {short_repr(result[key])}")
    for key in CURVES if "diverged" not in result else ():
        curve = result["history"].get(key)
        if not isinstance(curve, list) or not curve or not all(_is_number(value, 1) for value in curve):
            raise ValueError(f"history must have {key}, a share for each epoch")
    if "rate" in result and not _is_number(result["rate"]):
        raise ValueError(f"rate must be a number, got {short_repr(result['rate'])}")
    tuning = result.get("tuning", {})
    if not isinstance(tuning, dict) or not all(_is_number(value, 1) for value in tuning.values()):
        raise ValueError("tuning must hold a share for each rate")
    for rate in tuning:
        float(rate)  # ValueError
    if tuning and "rate" not in result:
        raise ValueError("rate is missing or damaged")
    flow = result.get("gradients", {})
    if not isinstance(flow, dict) or not all(map(_is_flow, flow.values())):
        raise ValueError("gradients must hold figures of each layer")


def _check_environment(found):
    machine = found["environment"]
    if machine and not all(isinstance(machine.get(key), str) for key in MACHINE):
        raise ValueError(f"environment must have {', '.join(MACHINE)}")


def _is_flow(layers):
    """Whether this is a list of what recipes/gradients.py says of each layer."""
    figures = ("signal", "gradient", "update")
    return isinstance(layers, list) and all(
        isinstance(layer, dict) and all(_is_number(layer.get(key)) for key in figures) for layer in layers
    )


def _is_number(value, most=math.inf):
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= most


@dataclasses.dataclass(frozen=True)
class Summary:
    """Test accuracies of n seeds in %: their mean, standard deviation (of n - 1) and half of a 95 % interval of the
    mean; sd and half are NaN for one seed."""

    n: int
    mean: float
    sd: float
    half_width: float

    def __str__(self):
        if self.n == 1:
            return f"{self.mean:.2f} % (1 seed)"
        return f"{self.mean:.2f} % (sd {self.sd:.2f}, {self.n} seeds, 95 % interval ± {self.half_width:.2f})"


def summarize(results):
    """`Summary` of a list of results, at least one."""
    values = 100 * np.array([result["accuracy"] for result in results])
    n = len(values)
    if n == 1:
        return Summary(1, float(values[0]), math.nan, math.nan)
    sd = float(values.std(ddof=1))
    t = T95[n - 2] if n - 2 < len(T95) else 1.960
    return Summary(n, float(values.mean()), sd, t * sd / math.sqrt(n))
