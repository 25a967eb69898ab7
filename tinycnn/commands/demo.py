"""The commands `demo` and `watch`: a page that shows what networks compute, and how they were trained."""

import argparse
import webbrowser
from pathlib import Path

from tinycnn.commands import _common


def demo(args: argparse.Namespace) -> int:
    """Write the page of runs, or of the networks that ship; returns the exit code."""
    return _common.run_command(lambda: _write(args, "drawing"))


def watch(args: argparse.Namespace) -> int:
    """Write the same page, opened at the training; returns the exit code."""
    return _common.run_command(lambda: _write(args, "training"))


def _write(args: argparse.Namespace, start: str) -> int:
    from tinycnn import demo
    from tinycnn._files import require_writable

    path = Path(args.out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must be a file name ending in .html, got {args.out!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder {path.parent}")
    require_writable(path.parent)
    try:
        nets = [demo.from_run(run, args.data_dir) for run in args.runs or sorted(demo.SHIPPED.iterdir())]
    except TypeError as error:  # a layer that is not this library's
        raise ValueError(str(error)) from None
    titles = [net.title for net in nets]
    for net, run in zip(nets, args.runs, strict=False):
        if titles.count(net.title) > 1:
            net.title += f", {Path(run).resolve().name}"
    demo.write(nets, path, start)
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB, with the network{'s' if len(nets) > 1 else ''} "
          f"{', '.join(net.title for net in nets)}")  # fmt: skip
    if not args.no_open and not webbrowser.open(path.resolve().as_uri()):
        print("no browser was found: open the file in one")
    return 0
