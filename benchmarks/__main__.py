"""Benchmarks of tinycnn and other libraries. Results are checked before times are measured.

    python -m benchmarks COMMAND [options]

Commands (see COMMAND --help):
"""

import importlib
import sys

COMMANDS = {
    "train-step": "a whole training step of LeNet-5, and where its time goes",
    "inference": "LeNet-5 forward: throughput, and the latency of a single image",
    "nets": "larger networks, such as ResNet-20: training and inference",
    "conv": "convolutions of many shapes, forward and both gradients",
    "ladder": "one convolution, from Python loops to the kernel in use",
    "start": "import, first step, memory, installed size",
    "epoch": "time to finish an epoch of MNIST, and to reach 99 %",
    "plot": "plots of the JSON files that the other commands wrote",
    "accuracy": "test accuracy of LeNet-5 over several seeds",
    "augment": "random distortions",
    "classifiers": "classifiers of 1998 beside the networks: nearest neighbours, pairwise linear, boosted LeNet-4",
    "digit-photos": "pictures of digits: accuracy with and without preparation",
    "demo-page": "the page of `tinycnn demo` in a browser: time of a pen event",
    "scale": "training over several processes (MPI): strong and weak scaling, communication, and a model",
    "guard": "speed of this checkout beside that of the last release",
    "gpu": "everything on an NVIDIA GPU",
}


def main(argv=None):
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        print("\n".join(f"    {command:<12} {text}" for command, text in COMMANDS.items()))
        return None
    if name not in COMMANDS:
        sys.exit(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
