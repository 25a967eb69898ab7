"""The command `evaluate`: the model of a run on a test set."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import recipes
from tinycnn._check import one_line
from tinycnn._interrupts import defer_interrupt
from tinycnn._typing import Array
from tinycnn.commands import _common
from tinycnn.errors import DamagedCheckpointError


def main(args: argparse.Namespace) -> int:
    """Print the report of a run's model on the test set and draw it; returns the exit code."""
    return _common.run_command(lambda: _evaluate(args), as_json=args.json)


def _evaluate(args: argparse.Namespace) -> tuple[int, Any]:
    from tinycnn import metrics, plot, train
    from tinycnn.recipes import build

    folder, device = Path(args.run), _common.use_device(args)
    recipe, model, pixels, epoch = load_run(folder, device)
    if args.data:
        build.is_own(args.data)
    dataset = build.load(recipe, args.data_dir, args.data)
    test_set = build.prepare_test(recipe, dataset, pixels, device)
    loss = build.build_loss(recipe)
    value, accuracy, outputs = train.evaluate(model, test_set, loss)
    logits = loss.logits(outputs)
    predicted, confidence = logits.argmax(axis=1), metrics.confidence(logits)
    matrix = metrics.confusion_matrix(dataset.test_labels, predicted, outputs.shape[1])
    print(f"{folder}, weights of epoch {epoch}, on {dataset.name}: accuracy {accuracy:.2%}, loss {value:.4f}")
    report = metrics.report(matrix, dataset.classes)
    print(metrics.format_report(report))
    out = Path(args.out or folder)
    out.mkdir(parents=True, exist_ok=True)
    answers = dataset.test_images, dataset.test_labels, predicted, confidence, dataset.classes
    with defer_interrupt("interrupted: drawing the pictures"):
        plot.save(plot.predictions(*answers), out / "predictions.png")
        plot.save(plot.mistakes(*answers), out / "mistakes.png")
        plot.save(plot.confusion(matrix, dataset.classes), out / "confusion.png")
    print(f"predictions.png, mistakes.png and confusion.png are in {out}")
    return 0, {"run": str(folder), "data": dataset.name, "epoch": epoch, "loss": value, **report}


def answers(folder: Path, data_dir: str | None, validation: bool) -> dict[str, Any]:
    """Functions that draw what the model of a run does with its test set, by name; with `validation`, only
    "reliability", of the validation set."""
    from tinycnn import calibration, metrics, plot, runs, train
    from tinycnn.recipes import build

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


def load_run(folder: Path, device: str) -> tuple[recipes.Recipe, Any, dict[str, Array], int | str]:
    """(recipe, model in evaluation mode, mean and std of its pixels, epoch) of a run folder.  ValueError or OSError
    names the file that is missing or damaged."""
    import tinycnn
    from tinycnn import checkpoint, runs
    from tinycnn.recipes import build

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
    from tinycnn import runs

    config, path = runs.read_config(folder), folder / "config.json"
    recipe = recipes.from_config(config, path)
    try:
        pixels = {key: np.array(config["pixels"][key], float) for key in ("mean", "std")}
        if any(values.shape not in ((1,), (recipe.net["input"][0],)) for values in pixels.values()):
            raise ValueError("pixels must have one mean and one std a channel")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a network ({type(error).__name__}: {one_line(error)})") from None
    return recipe, pixels
