"""Test accuracy of LeNet-5 over several seeds, with the example's defaults.

    python -m benchmarks accuracy [--seeds 5] [-- --activation relu --pool max]
    python -m benchmarks accuracy --seeds 3 --test-on mnist -- --data synthetic

Options after -- are passed to examples/lenet5.py. With --test-on, the weights of every run are also evaluated on the
test set of another data set, with the normalisation of the run's own data.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "lenet5.py"


def evaluate_on(folder, name):
    """Accuracy of a run's weights on the test set `name`, with the run's normalisation."""
    from tinycnn import DeviceDataset, data, evaluate, load

    pixels = json.loads((folder / "config.json").read_text())["pixels"]
    other, model = data.load(name), load(folder / "model.safetensors")
    return evaluate(model, DeviceDataset(other.test_images, other.test_labels, **pixels))[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test-on", choices=("mnist", "fashion", "kmnist", "synthetic"))
    parser.add_argument("options", nargs="*", help="options of examples/lenet5.py, after --")
    args = parser.parse_args(argv)

    rows = []
    print(f"{'seed':>4} {'data':>10} {'accuracy':>9} {'training':>9}" + (f" {args.test_on:>9}" if args.test_on else ""))
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(EXAMPLE), *args.options, "--seed", str(seed), "--out", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (folder,) = Path(out).glob("*/*")
            report = json.loads((folder / "report.json").read_text())
            row = [report["accuracy"], report["training_seconds"]]
            if args.test_on:
                row.append(evaluate_on(folder, args.test_on))
        rows.append(row)
        other = f" {row[2]:>9.2%}" if args.test_on else ""
        print(f"{seed:>4} {report['data']:>10} {row[0]:>9.2%} {row[1]:>7.1f} s{other}", flush=True)
    for name, values in (("accuracy", [r[0] for r in rows]), (args.test_on, [r[2] for r in rows if len(r) > 2])):
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{name}: mean {statistics.mean(values):.2%}, standard deviation {spread:.2%}, {len(values)} seeds")
    print(f"training: median {statistics.median(r[1] for r in rows):.1f} s")


if __name__ == "__main__":
    main()
