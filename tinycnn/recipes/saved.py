"""The model of a run's folder, and what it does with the run's data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinycnn
from tinycnn import calibration, checkpoint, metrics, plot, recipes, runs, train
from tinycnn._check import one_line
from tinycnn._typing import Array
from tinycnn.errors import DamagedCheckpointError
from tinycnn.model import Sequential
from tinycnn.recipes import build


def load_run(folder: Path, device: str) -> tuple[recipes.Recipe, Sequential, dict[str, Array], int | str]:
    """(recipe, model in evaluation mode, mean and std of its pixels, epoch) of a run folder.  ValueError or OSError
    names the file that is missing or damaged."""
    recipe, pixels = describe_run(folder)
    weights = folder / "model.safetensors"
    if weights.exists() or not (folder / "model.npz").exists():
        model = tinycnn.load(weights, device=device)
        if list(model.input_shape or ()) != list(recipe.net["input"]):
            raise DamagedCheckpointError(
                f"{weights} must take images {recipe.net['input']} as config.json says, got {model.input_shape}"
            )
        return recipe, model, pixels, len(runs.read_history(folder))
    weights = folder / "model.npz"  # of version 0.1.0
    model = build.build_model(recipe, 0, device)
    arrays, metadata = checkpoint.load(weights)
    try:
        model.load_state_dict(arrays)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{weights}: {error.args[0]}") from None
    return recipe, model.eval(), pixels, metadata.get("epoch", "?")


def describe_run(folder: Path) -> tuple[recipes.Recipe, dict[str, Array]]:
    """Recipe, and mean and std of the pixels, from a run's config.json.  ValueError or OSError names the file."""
    config, path = runs.read_config(folder), folder / "config.json"
    recipe = recipes.from_config(config, path)
    try:
        pixels = {key: np.array(config["pixels"][key], float) for key in ("mean", "std")}
        if any(values.shape not in ((1,), (recipe.net["input"][0],)) for values in pixels.values()):
            raise ValueError("pixels must have one mean and one std a channel")
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a network ({type(error).__name__}: {one_line(error)})") from None
    return recipe, pixels


def pictures(folder: Path, data_dir: str | None, validation: bool) -> dict[str, Callable[[], Any]]:
    """Functions that draw what the model of a run does with its test set, by name; with `validation`, only
    "reliability", of the validation set."""
    recipe, model, pixels, _ = load_run(folder, "cpu")
    dataset, loss = build.load(recipe, data_dir), build.build_loss(recipe)
    if not validation:
        test = build.prepare_test(recipe, dataset, pixels)
        logits = loss.logits(train.evaluate(model, test, loss)[2])
        return runs.pictures(model, test, logits, dataset.classes)
    fitted = runs.read_report(folder).get("calibration")
    if fitted is None:
        raise ValueError(f"{folder} has no validation set, or its training is not finished")
    held_out = build.validation_set(recipe, dataset, pixels, runs.read_config(folder)["seed"])
    logits = loss.logits(train.evaluate(model, held_out, loss)[2]).astype(np.float64)
    labels = np.asarray(held_out.labels)
    bins = [calibration.reliability(metrics.softmax(logits / t), labels) for t in (1.0, fitted["temperature"])]
    return {"reliability": lambda: plot.reliability(*bins)}
