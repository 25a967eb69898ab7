"""The command line: the commands and their options.  It imports little, so that --help is quick."""

import argparse
from collections.abc import Sequence

KINDS = ("curves", "confusion", "mistakes", "filters", "feature_maps", "reliability")  # of pictures


def positive_int(text: str) -> int:
    value = non_negative_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and everything else on stderr")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --threads."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: all)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the name of a recipe."""
    described = "a recipe (python -m tinycnn recipes) or a file of one, *.toml (default: LeNet-5)"
    parser.add_argument("recipe", nargs="?", default="default", metavar="RECIPE", help=described)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    add_recipe(parser)
    add_training_options(parser)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training of a given recipe."""
    add = parser.add_argument
    add("--epochs", type=positive_int, help="passes over the training set (default: the recipe's)")
    add("--batch-size", type=positive_int, help="images a step (default: the recipe's)")
    add("--seed", type=non_negative_int, default=0, help="seed of weights, split and order (default: 0)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help='a setting of the recipe, such as training.lr=0.01 or training.optimizer="SGD(momentum=0.9)"')  # fmt: skip
    add("--data", metavar="NAME", help="auto, mnist, fashion, kmnist or synthetic; or your own images: a folder with a "
        "folder for each class, a CSV file of pixels, or an npz file with x and y (default: the recipe's)")  # fmt: skip
    add("--fit", choices=("pad", "crop", "stretch"), help="how your own images get the network's size (default: pad)")
    add("--skip-bad", action="store_true", help="leave out image files that are damaged")
    add("--data-dir", help="folder to search for the data, and to download it to")
    add_device_options(parser)
    add("--out", default="runs", help="folder for the run's folder (default: runs)")
    add_json_option(parser)


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resume`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder")
    add("--epochs", type=positive_int, help="total number of epochs (default: that of the run)")
    add("--force", action="store_true", help="continue although network, data or versions differ")
    add("--data-dir", help="folder to search for the data, and to download it to")
    add("--device", help="cpu, cuda, cuda:N or auto (default: that of the run)")
    add("--threads", type=positive_int, help="CPU threads (default: all)")
    add_json_option(parser)


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder")
    add("--data", help="mnist, fashion, kmnist, synthetic, or a path of your own images (default: the run's)")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add_device_options(parser)
    add("--out", help="folder for the pictures (default: the run folder)")
    add_json_option(parser)


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder")
    add("files", nargs="+", metavar="FILE", help="pictures, folders of them, or - for a picture on stdin")
    add("--many", action="store_true", help="several digits in a row in each picture")
    add("--no-prepare", action="store_true", help="resize the whole picture, also for networks trained on digits")
    add("--show", metavar="PICTURE", help="draw what the network saw, *.png, *.svg or *.pdf")
    add_device_options(parser)
    add_json_option(parser)


def add_plot_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plot`."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders")
    add("--kind", choices=KINDS, default="curves", help="curves of all runs in one picture, or a picture for each: "
        "mistakes and so on, of the test set; reliability, of the validation set (default: curves)")  # fmt: skip
    add("--out", help="the picture, *.png, *.svg or *.pdf; for several, the folder (default: KIND.png, or .)")
    add("--data-dir", help="folder to look for the data in, and to download it to")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("file", metavar="FILE", help="*.onnx: a graph that takes pixels as the run's images had them "
        "(needs onnx), or *.safetensors: weights with torch's names, and the normalization")  # fmt: skip
    parser.add_argument("--opset", type=positive_int, help="version of ONNX's operators, 13 or later (default: 17)")


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders, a network each (default: two that tinycnn comes with)")
    _add_page_options(parser, "demo.html")


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `watch`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, a network each")
    _add_page_options(parser, "watch.html")


def _add_page_options(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--out", default=name, metavar="FILE", help=f"the page, *.html (default: {name})")
    add("--no-open", action="store_true", help="do not open it in a browser")
    add("--data-dir", help="folder to look for the data in; nothing is downloaded")


def add_reproduce_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `reproduce`."""
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="recipes, files of recipes (*.toml), or all")
    add("--seeds", type=seeds, default=range(3), metavar="K", help="number of seeds, or their list: 3,4 (default: 3)")
    add_device_options(parser)
    add("--data", choices=("mnist", "fashion", "kmnist"), help="data set (default: the recipe's)")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--results", default="results", help="folder of finished seeds (default: results)")
    add("--out", default="runs", help="folder of run folders and reports (default: runs)")
    add("--tensorboard", metavar="DIR", help="write event files for TensorBoard there (needs tensorboardX)")
    add("--storage", metavar="URL", help="share the seeds with other workers through a database or a journal file: see "
        "sweep (needs Optuna)")  # fmt: skip
    add("--study", default="reproduce", help="name of the study in the storage (default: reproduce)")
    add_storage_options(parser)


def seeds(text: str) -> Sequence[int]:
    if "," in text:
        return sorted({non_negative_int(part) for part in text.rstrip(",").split(",")})
    return range(positive_int(text))


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """Add --heartbeat and --wait, of studies that several workers share."""
    add = parser.add_argument
    add("--heartbeat", type=positive_int, default=30, metavar="S",
        help="with a database: seconds between signs of life; a worker is lost after four (default: 30)")  # fmt: skip
    add("--wait", type=non_negative_int, default=600, metavar="S",
        help="seconds to wait for a database that cannot be reached any more (default: 600)")  # fmt: skip


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sweep`."""
    add = parser.add_argument
    add("name", nargs="?", default="sweep", metavar="NAME", help="a recipe with a space, or a file (default: sweep)")
    add("--trials", type=positive_int, default=10, help="total number of trials in the study (default: 10)")
    add("--sampler", choices=("random", "grid", "tpe"), default="random", help="how to choose (default: random)")
    add("--pruner", choices=("none", "median", "hyperband"), default="median",
        help="when to stop an unpromising trial early (default: median)")  # fmt: skip
    add("--epochs", type=positive_int, help="epochs per trial (default: the recipe's)")
    add("--storage", metavar="URL", help="postgresql://USER@HOST/DATABASE, mysql://..., sqlite:///FILE, or the path of "
        "a journal file, which workers share (default: sweeps/NAME.journal)")  # fmt: skip
    add("--study", help="name of the study in the storage (default: NAME)")
    add_storage_options(parser)
    add("--seed", type=non_negative_int, default=0, help="seed of the sampler and of every training")
    add_device_options(parser)
    add("--data", choices=("mnist", "fashion", "kmnist", "synthetic"), help="data set (default: the recipe's)")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--results", default="results", help="folder for trials of the project's recipes (default: results)")
    add("--out", default="sweeps", help="folder of journals, run folders and the report (default: sweeps)")
    add("--show", action="store_true", help="report the trials of the study without running any")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `data`."""
    parser.add_argument("name", choices=("mnist", "fashion", "kmnist", "synthetic"))
    parser.add_argument("--data-dir", help="folder to search, and to download to")
    add_json_option(parser)


def add_info_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `info`."""
    add_json_option(parser)


def add_recipes_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `recipes`."""
    add_json_option(parser)


def add_warmup_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `warmup`."""
    add_recipe(parser)
    add_device_options(parser)


def add_completion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


COMMANDS = {  # name -> (its options, the module of tinycnn.commands and its function, help)
    "train": (
        add_train_options,
        "train",
        "main",
        "train a recipe, or a network on your own images, and write a run folder",
    ),
    "resume": (
        add_resume_options,
        "train",
        "resume",
        "continue a run that was interrupted, or train it for more epochs",
    ),
    "evaluate": (add_evaluate_options, "evaluate", "main", "evaluate the model of a run on a test set"),
    "predict": (add_predict_options, "predict", "main", "say what is in pictures: scans, photos, folders of them"),
    "plot": (add_plot_options, "small", "plot", "draw the learning curves of several runs, or other pictures"),
    "export": (add_export_options, "small", "export", "write the network of a run as ONNX, or its weights"),
    "demo": (add_demo_options, "demo", "demo", "write a page to draw on and to watch a network's layers, and open it"),
    "watch": (add_watch_options, "demo", "watch", "the same page, opened at the training: curves, filters, mistakes"),
    "recipes": (
        add_recipes_options,
        "reproduce",
        "listing",
        "list the recipes: named runs, and the results their sources claim",
    ),
    "reproduce": (
        add_reproduce_options,
        "reproduce",
        "main",
        "run recipes, and compare the claimed and the obtained results",
    ),
    "sweep": (add_sweep_options, "sweep", "main", "search the space of a recipe"),
    "data": (add_data_options, "small", "data", "find or download a data set and verify it"),
    "warmup": (
        add_warmup_options,
        "small",
        "warmup",
        "compile the kernels of a recipe, so that its first run starts at once",
    ),
    "info": (add_info_options, "small", "info", "versions, processor, threads and GPU"),
    "completion": (
        add_completion_options,
        "small",
        "completion",
        "print a script that completes commands and options in a shell",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    import tinycnn

    parser = argparse.ArgumentParser(
        prog="tinycnn", description="A CNN engine written from scratch.",
        epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 130 Ctrl-C, 143 terminated.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tinycnn {tinycnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, _, _, description) in COMMANDS.items():
        add_options(commands.add_parser(name, help=description, description=description))
    return parser
