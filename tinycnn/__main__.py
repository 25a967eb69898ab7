"""The command line: python -m tinycnn --help."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: see `tinycnn.commands.options`."""
    from tinycnn.commands import options

    args = options.make_parser().parse_args(argv)
    _, module, function, _ = options.COMMANDS[args.command]

    import importlib

    from tinycnn._interrupts import defer_interrupt

    with defer_interrupt():  # NumPy would turn it into an ImportError
        command = getattr(importlib.import_module(f"tinycnn.commands.{module}"), function)
    code: int = command(args)
    return code


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
