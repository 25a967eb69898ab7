"""The command `python -m tinycnn evaluate`: saved weights on a test set."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tinycnn import experiment
from tinycnn._check import one_line
from tinycnn._files import read_json
from tinycnn._interrupts import defer_interrupt
from tinycnn._typing import Array
from tinycnn.recipes import KEYS, Recipe, check_key


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of `evaluate`."""
    add = parser.add_argument
    add("run", metavar="FOLDER", help="a run folder with config.json and model.npz")
    add("--data", choices=("mnist", "fashion", "kmnist", "synthetic"), help="data set (default: that of the run)")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    add("--out", help="folder for the pictures (default: the run folder)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the report of a run's weights on the test set and draw it; returns the exit code."""
    return experiment.run_command(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> int:
    from tinycnn import checkpoint, data, devices, metrics, plot, train
    from tinycnn.recipes import training

    folder = Path(args.run)
    recipe, name, pixels = saved_recipe(folder)
    device = devices.resolve(args.device)
    model = training.build_model(recipe, 0, device)
    weights, metadata = checkpoint.load(folder / "model.npz")
    try:
        model.load_state_dict(weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'model.npz'}: {error.args[0]}") from None
    dataset = data.load(args.data or name, args.data_dir)
    test_set = training.prepare_test(recipe, dataset, pixels, device)
    loss = training.build_loss(recipe)
    value, accuracy, outputs = train.evaluate(model, test_set, loss)
    logits = loss.logits(outputs)
    predicted, confidence = logits.argmax(axis=1), metrics.confidence(logits)
    matrix = metrics.confusion_matrix(dataset.test_labels, predicted, outputs.shape[1])
    epoch = metadata.get("epoch", "?")
    print(f"{folder}, weights of epoch {epoch}, on {dataset.name}: accuracy {accuracy:.2%}, loss {value:.4f}")
    print(metrics.format_report(metrics.report(matrix, dataset.classes)))
    out = Path(args.out or folder)
    out.mkdir(parents=True, exist_ok=True)
    answers = dataset.test_images, dataset.test_labels, predicted, confidence, dataset.classes
    with defer_interrupt("interrupted: drawing the pictures"):
        plot.save(plot.predictions(*answers), out / "predictions.png")
        plot.save(plot.mistakes(*answers), out / "mistakes.png")
        plot.save(plot.confusion(matrix, dataset.classes), out / "confusion.png")
    print(f"predictions.png, mistakes.png and confusion.png are in {out}")
    return 0


# Keys of config.json that are needed to rebuild the network.
REBUILD_KEYS = {"net": ("input", "layers", "init"), "data": ("padding", "resize"), "training": ("loss",)}


def saved_recipe(folder: str | Path) -> tuple[Recipe, str, dict[str, Array]]:
    """Recipe, name of the data set, and mean and std of the pixels from a run folder's config.json.

    ValueError if they are missing or invalid.
    """

    def fail(key: str, problem: str) -> NoReturn:
        raise ValueError(problem)

    path = Path(folder) / "config.json"
    try:
        config = read_json(path)
        name = (config.get("dataset") or config["data"])["name"]
        if not isinstance(name, str):
            raise TypeError("the data set's name must be a string")
        sections: dict[str, Any] = {}
        for section, keys in REBUILD_KEYS.items():
            saved = config.get(section, {})
            sections[section] = {key: saved[key] for key in keys if key in saved}
            for key, value in sections[section].items():
                check_key(fail, KEYS[section], key, key, value)
        for key in ("input", "layers"):
            sections["net"][key]  # KeyError
        pixels = {key: np.array(config["pixels"][key], float) for key in ("mean", "std")}
        if any(values.shape != (1,) for values in pixels.values()):
            raise ValueError("pixels must have one mean and one std")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a network ({type(error).__name__}: {one_line(error)})") from None
    return Recipe(str(config.get("recipe", "run")), "", path=path, **sections), name, pixels
