"""Small commands: plot, export, data, warmup, info, completion."""

import argparse
import json
from pathlib import Path
from typing import Any

from tinycnn.commands import _common


def plot(args: argparse.Namespace) -> int:
    """Draw pictures of runs; returns the exit code."""
    return _common.run_command(lambda: _plot(args))


def _plot(args: argparse.Namespace) -> int:
    from tinycnn import plot, runs
    from tinycnn.recipes.saved import pictures

    folders = list(map(Path, args.runs))
    names = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    if args.kind == "curves":
        histories = {}
        for name, folder in zip(names, folders, strict=True):
            runs.read_config(folder)
            histories[name] = runs.read_history(folder)
            if not histories[name]:
                raise ValueError(f"{folder} has no complete epoch to draw")
        figure = plot.compare(histories) if len(folders) > 1 else plot.learning_curves(next(iter(histories.values())))
        drawn = {args.out or "curves.png": figure}
    else:
        drawn = {}
        for name, folder in zip(names, folders, strict=True):
            one = f"{args.kind}.png" if len(folders) == 1 else f"{name.replace('/', '-')}-{args.kind}.png"
            path = args.out or one if len(folders) == 1 else str(Path(args.out or ".") / one)
            found = pictures(folder, args.data_dir, validation=args.kind == "reliability")
            if args.kind not in found:
                raise ValueError(f"{folder} has no {args.kind}: its network has no convolution")
            drawn[path] = found[args.kind]()
    for path, figure in drawn.items():
        plot.save(figure, path)
        print(path)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a run's model as an ONNX graph, or its state_dict; returns the exit code."""

    def command() -> int:
        from tinycnn import checkpoint, onnx
        from tinycnn.recipes.saved import load_run

        suffix = Path(args.file).suffix
        if suffix not in (".onnx", ".safetensors"):
            raise ValueError(f"FILE must be a file name ending in .onnx or .safetensors, got {args.file!r}")
        if args.opset is not None and suffix != ".onnx":
            raise ValueError(f"--opset needs a FILE ending in .onnx, got {args.file!r}")
        _, model, _, epoch = load_run(Path(args.run), "cpu")
        if suffix == ".onnx":
            pixels = model.normalization is not None and model.normalization.unit == 255
            try:
                onnx.export(model, args.file, opset=args.opset or 17, uint8_input=pixels)
            except ImportError as error:
                raise ValueError(str(error)) from None
            kind = "uint8 pixels" if pixels else "scaled input"
            shape = ", ".join(map(str, model.input_shape or ()))
            print(f"{args.file}: an ONNX graph of {kind} (N, {shape}), the weights of epoch {epoch}")
            return 0
        arrays = model.state_dict()
        checkpoint.save(args.file, arrays, {"epoch": epoch})
        print(f"{args.file}: {len(arrays)} arrays, the weights of epoch {epoch}")
        return 0

    return _common.run_command(command)


def data(args: argparse.Namespace) -> int:
    """Load a data set, which verifies it, and print its size and hash; returns the exit code."""

    def command() -> tuple[int, Any]:
        from tinycnn import data

        dataset = data.load(args.name, args.data_dir)
        sizes = {"train": len(dataset.train_images), "test": len(dataset.test_images)}
        print(f"{dataset.name}: {sizes['train']:,} training and {sizes['test']:,} test images, {dataset.sha256}")
        return 0, {"name": dataset.name, **sizes, "classes": list(dataset.classes), "sha256": dataset.sha256}

    return _common.run_command(command, as_json=args.json)


def warmup(args: argparse.Namespace) -> int:
    """Compile the kernels that a recipe's training needs, and print the seconds of each; returns the exit code."""

    def command() -> int:
        from tinycnn.commands.train import select
        from tinycnn.recipes import build

        recipe, device = select(args.recipe), _common.use_device(args)
        build.check(recipe)
        seconds = build.warm_up(recipe, device, print_compiled)
        print(f"{recipe.name}: the kernels for {args.device} were ready after {seconds:.1f} s")
        return 0

    return _common.run_command(command)


def print_compiled(done: int, total: int, name: str, seconds: float) -> None:
    """A line for a kernel that was compiled.  See `train.warm_up`."""
    if done == 0:
        print(f"compiling {total} kernels")
    else:
        print(f"{done:3} of {total}  {seconds:5.1f} s  {name}", flush=True)


def info(args: argparse.Namespace) -> int:
    """Print versions, processor, threads and the state of the GPU; returns the exit code."""
    from tinycnn import _gpu, hardware

    rows = [(name, value) for name, value in hardware.environment().items() if name != "command"]
    rows += _gpu.status_rows(_gpu.probe(full=True))
    if args.json:
        print(json.dumps({name or "hint": value for name, value in rows}))
        return 0
    for name, value in rows:
        print(f"{name:<14} {value}")
    return 0


def completion(args: argparse.Namespace) -> int:
    """Print a completion script; returns the exit code."""

    def command() -> int:
        try:
            import shtab
        except ImportError:
            raise ValueError('completion needs shtab: pip install "tinycnn[completion]"') from None
        from tinycnn.commands.options import make_parser

        print(shtab.complete(make_parser(), args.shell))
        return 0

    return _common.run_command(command)
