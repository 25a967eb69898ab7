"""The command `python -m tinycnn evaluate`: saved weights on a test set."""

from pathlib import Path

import numpy as np

from tinycnn import experiment
from tinycnn._files import read_json
from tinycnn._interrupts import defer_interrupt


def add_options(parser):
    """The options of `evaluate`."""
    add = parser.add_argument
    add("run", metavar="FOLDER", help="a run folder, with config.json and model.npz")
    add("--data", choices=("mnist", "fashion", "kmnist", "synthetic"), help="another data set than that of the run")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    add("--out", help="folder for the pictures (default: the run folder)")
    return parser


def main(args):
    """Print the report of a run's weights on the test set and draw it; returns the exit code."""
    return experiment.run_command(lambda: _evaluate(args))


def _evaluate(args):
    from tinycnn import checkpoint, data, devices, metrics, plot, train
    from tinycnn.recipes import training

    folder = Path(args.run)
    recipe, name, pixels = saved_recipe(folder)
    device = devices.resolve(args.device)
    model = training.build_model(recipe, 0, device)
    weights, told = checkpoint.load(folder / "model.npz")
    try:
        model.load_state_dict(weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'model.npz'}: {error.args[0]}") from None
    dataset = data.load(args.data or name, args.data_dir)
    batches = training.prepare_test(recipe, dataset, pixels, device)
    loss = training.build_loss(recipe)
    value, accuracy, outputs = train.evaluate(model, batches, loss)
    scores = loss.logits(outputs)
    predicted, confidence = scores.argmax(axis=1), metrics.confidence(scores)
    matrix = metrics.confusion_matrix(dataset.test_labels, predicted, outputs.shape[1])
    epoch = told.get("epoch", "?")
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


# What of a config.json is needed to build the network again.
NEEDED = {"net": ("input", "layers", "init"), "data": ("padding", "resize"), "training": ("loss",)}


def saved_recipe(folder):
    """The recipe that a run folder's config.json tells, the data set's name, and mean and std of the pixels.

    ValueError if it tells none.
    """
    from tinycnn.recipes import KEYS, Recipe, check_key

    def wrong(key, problem):
        raise ValueError(problem)

    path = Path(folder) / "config.json"
    try:
        config = read_json(path)
        name = (config.get("dataset") or config["data"])["name"]
        if not isinstance(name, str):
            raise TypeError("the name of the data set")
        sections: dict = {}
        for section, keys in NEEDED.items():
            there = config.get(section, {})
            sections[section] = {key: there[key] for key in keys if key in there}
            for key, value in sections[section].items():
                check_key(wrong, KEYS[section], key, key, value)
        for key in ("input", "layers"):
            sections["net"][key]
        pixels = {key: np.array(config["pixels"][key], float) for key in ("mean", "std")}
        if any(values.shape != (1,) for values in pixels.values()):
            raise ValueError("pixels must have one mean and one std")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not tell which network this was ({type(error).__name__}: {error})") from None
    return Recipe(str(config.get("recipe", "run")), "", path=path, **sections), name, pixels
