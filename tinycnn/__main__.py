"""The command line: python -m tinycnn --help."""

import sys


def main(argv=None):
    """Run one subcommand; returns its exit code."""
    import argparse

    import tinycnn
    from tinycnn import experiment
    from tinycnn.recipes import evaluate, reproduce, sweep

    parser = argparse.ArgumentParser(prog="tinycnn", description="A from-scratch CNN engine.")
    parser.add_argument("--version", action="version", version=f"tinycnn {tinycnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    experiment.add_options(commands.add_parser("train", help="train LeNet-5 and write a run folder"))
    fetch = commands.add_parser("data", help="find or download a data set and check it")
    fetch.add_argument("name", choices=("mnist", "fashion", "kmnist", "synthetic"))
    fetch.add_argument("--data-dir", help="folder to look in and to download to")
    evaluate.add_options(commands.add_parser("evaluate", help="saved weights of a run on the test set"))
    commands.add_parser("recipes", help="list the recipes: named runs with what their sources claim")
    reproduce.add_options(commands.add_parser("reproduce", help="run recipes, and compare claimed and obtained"))
    sweep.add_options(commands.add_parser("sweep", help="search through the space of a recipe"))
    commands.add_parser("info", help="versions, processor, threads, and what is there of a GPU")
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


def info():
    from tinycnn import _gpu, hardware

    rows = [(name, value) for name, value in hardware.environment().items() if name != "command"]
    for name, value in rows + _gpu.status_rows(_gpu.probe(full=True)):
        print(f"{name:<14} {value}")
    return 0


def data(args):
    from tinycnn import data

    try:
        found = data.load(args.name, args.data_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{found.name}: {len(found.train_images):,} training and {len(found.test_images):,} test images, {found.sha256}"
    )
    return 0


def program():
    """`main`, for a shell: whoever reads the output, `head` say, may have seen enough before it ends (the code is 1
    then), and whoever has started it may press Ctrl-C while it still imports."""
    from tinycnn import _streams

    try:
        with _streams.safe_streams() as lost:
            code = main()
            sys.stdout.flush()
            return code or int(lost())
    except KeyboardInterrupt:
        _streams.print_stderr("\ninterrupted")
        return _streams.EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(program())
