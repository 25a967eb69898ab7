"""The command line: python -m tinycnn --help."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code: see `tinycnn.commands._common`."""
    from tinycnn._interrupts import defer_interrupt

    with defer_interrupt():  # NumPy would turn it into an ImportError
        parser = make_parser()
    args = parser.parse_args(argv)
    code: int = args.run_command(args)
    return code


def make_parser() -> "argparse.ArgumentParser":
    """The parser of all commands.  `run_command` of its result runs the chosen one."""
    import argparse

    import tinycnn
    from tinycnn.commands import evaluate, predict, reproduce, small, sweep, train

    parser = argparse.ArgumentParser(
        prog="tinycnn", description="A CNN engine written from scratch.",
        epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 130 Ctrl-C, 143 terminated.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tinycnn {tinycnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recipe = {"nargs": "?", "default": "default", "metavar": "RECIPE"}
    help_recipe = "a recipe (python -m tinycnn recipes) or a file of one, *.toml (default: LeNet-5)"

    one = commands.add_parser("train", help="train a recipe, or a network on your own images, and write a run folder")
    one.add_argument("recipe", help=help_recipe, **recipe)  # type: ignore[arg-type]
    train.add_options(one).set_defaults(run_command=train.main)
    one = commands.add_parser("resume", help="continue a run that was interrupted, or train it for more epochs")
    train.add_resume_options(one).set_defaults(run_command=train.resume)
    one = commands.add_parser("evaluate", help="evaluate the model of a run on a test set")
    evaluate.add_options(one).set_defaults(run_command=evaluate.main)
    one = commands.add_parser("predict", help="say what is in pictures: scans, photos, folders of them")
    predict.add_options(one).set_defaults(run_command=predict.main)
    one = commands.add_parser("plot", help="draw the learning curves of several runs")
    small.add_plot_options(one).set_defaults(run_command=small.plot)
    one = commands.add_parser("export", help="write the model of a run to a file")
    small.add_export_options(one).set_defaults(run_command=small.export)
    one = commands.add_parser("recipes", help="list the recipes: named runs, and the results their sources claim")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.set_defaults(run_command=reproduce.listing)
    one = commands.add_parser("reproduce", help="run recipes, and compare the claimed and the obtained results")
    reproduce.add_options(one).set_defaults(run_command=reproduce.main)
    one = commands.add_parser("sweep", help="search the space of a recipe")
    sweep.add_options(one).set_defaults(run_command=sweep.main)
    one = commands.add_parser("data", help="find or download a data set and verify it")
    small.add_data_options(one).set_defaults(run_command=small.data)
    one = commands.add_parser("warmup", help="compile the kernels of a recipe, so that its first run starts at once")
    one.add_argument("recipe", help=help_recipe, **recipe)  # type: ignore[arg-type]
    small.add_warmup_options(one).set_defaults(run_command=small.warmup)
    one = commands.add_parser("info", help="versions, processor, threads and GPU")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.set_defaults(run_command=small.info)
    one = commands.add_parser("completion", help="print a script that completes commands and options in a shell")
    small.add_completion_options(one).set_defaults(run_command=small.completion)
    return parser


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
