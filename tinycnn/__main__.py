"""The command line: python -m tinycnn --help."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    import tinycnn
    from tinycnn._interrupts import defer_interrupt

    with defer_interrupt():  # NumPy would turn it into an ImportError
        import argparse

        from tinycnn import experiment
        from tinycnn.recipes import evaluate, reproduce, sweep

    parser = argparse.ArgumentParser(prog="tinycnn", description="A CNN engine written from scratch.")
    parser.add_argument("--version", action="version", version=f"tinycnn {tinycnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    experiment.add_options(commands.add_parser("train", help="train LeNet-5 and write a run folder"))
    fetch = commands.add_parser("data", help="find or download a data set and verify it")
    fetch.add_argument("name", choices=("mnist", "fashion", "kmnist", "synthetic"))
    fetch.add_argument("--data-dir", help="folder to search, and to download to")
    evaluate.add_options(commands.add_parser("evaluate", help="evaluate the saved weights of a run on the test set"))
    commands.add_parser("recipes", help="list the recipes: named runs, and the results their sources claim")
    reproduce.add_options(
        commands.add_parser("reproduce", help="run recipes, and compare the claimed and the obtained results")
    )
    sweep.add_options(commands.add_parser("sweep", help="search the space of a recipe"))
    commands.add_parser("info", help="versions, processor, threads and GPU")
    args = parser.parse_args(argv)
    if args.command == "train":
        from tinycnn.models import lenet5

        return experiment.run(args, lenet5)
    if args.command == "evaluate":
        return evaluate.main(args)
    if args.command == "recipes":
        return reproduce.listing()
    if args.command == "reproduce":
        return reproduce.main(args)
    if args.command == "sweep":
        return sweep.main(args)
    return info() if args.command == "info" else data(args)


def info() -> int:
    """Print versions, processor, threads and the state of the GPU."""
    from tinycnn import _gpu, hardware

    rows = [(name, value) for name, value in hardware.environment().items() if name != "command"]
    for name, value in rows + _gpu.status_rows(_gpu.probe(full=True)):
        print(f"{name:<14} {value}")
    return 0


def data(args: "argparse.Namespace") -> int:
    """Load a data set, which verifies it, and print its size and hash."""
    from tinycnn import data

    try:
        dataset = data.load(args.name, args.data_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{dataset.name}: {len(dataset.train_images):,} training and {len(dataset.test_images):,} test images, "
        f"{dataset.sha256}"
    )
    return 0


def program() -> int:
    """`main`, for a shell.  The exit code is 1 if the output could not be written (a closed pipe), and 130 after
    Ctrl-C, also during the imports."""
    try:
        from tinycnn import _streams

        with _streams.safe_streams() as failed:
            code = main()
            sys.stdout.flush()
            return code or int(failed())
    except KeyboardInterrupt:
        from tinycnn import _streams  # again: it may have been interrupted

        _streams.print_stderr("\ninterrupted")
        return _streams.EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(program())
