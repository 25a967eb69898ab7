"""Costs of a start: import, the first step with an empty and with a warm cache, memory, installed size.

    python -m benchmarks start [--only torch jax] [--batch 64]

A new Python process imports the library, builds LeNet-5 with its data and runs a training step (ONNX Runtime: a batch
of inference). The first step includes all work after the import. `cold` starts with an empty cache of compiled
code, `warm` with the cache of the last cold start. NumPy is imported before the clock starts. Memory is the peak
resident size of the process, 16 MB of images included. The installed size is that of the package and all its
requirements, from the lists of files of `importlib.metadata`.

Losses are compared before times are printed. The competitors start in turn, and figures are medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks import _competitors, _harness as harness, _report

NET, TOLERANCE = "tanh+avg", 1e-4
MODULES = {"tinycnn": "tinycnn.kernels", "torch.compile": "torch"}  # `import tinycnn` alone loads almost nothing
CACHES = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor", "JAX_COMPILATION_CACHE_DIR": "jax"}
# The program of the new process. It imports tinycnn only for tinycnn, so that memory is the library's.
CHILD = """
import importlib, json, resource, sys, time
import numpy as np
from benchmarks import _competitors, _report
name, module, batch, threads, net, weights = sys.argv[1:]
weights = dict(np.load(weights))
start = time.perf_counter()
importlib.import_module(module)
imported = time.perf_counter()
competitor = _competitors.ALL[name](net, int(threads))
def begin():
    _competitors.Competitor.start(competitor, int(batch), weights)  # torch's own start tries memory formats
    if name == "tinycnn":
        competitor.start_epoch(np.array(competitor.indices))
begin()
step = competitor.infer if name == "onnxruntime" else competitor.next_step
step()
first = time.perf_counter()
step()
second = time.perf_counter()
begin()
answer = float(competitor.infer().sum()) if name == "onnxruntime" else competitor.losses()[-1]
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"import": imported - start, "first_step": first - imported, "second_step": second - first,
                  "memory": memory, "answer": answer}))
"""


def launch(name, batch, threads, cache, weights):
    """The figures of one start.  weights: an npz file"""
    environment = os.environ | {variable: str(Path(cache) / folder) for variable, folder in CACHES.items()}
    arguments = [name, MODULES.get(name, name), str(batch), str(threads), NET, str(weights)]
    with harness.limit_threads(threads):
        environment |= {variable: os.environ[variable] for variable in harness.THREAD_VARIABLES}
        command = [sys.executable, "-c", CHILD, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise harness.WorkerError(lines[-1])
    return json.loads(result.stdout.splitlines()[-1])


def installed_bytes(package):
    """Total size of a package and of all its requirements."""
    from packaging.requirements import Requirement

    seen, pending, total = set(), [(package, "")], 0
    while pending:
        name, extra = pending.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(requirement.name, e) for e in requirement.extras or {""}]
        key = distribution.metadata["Name"].lower().replace("_", "-")
        if key not in seen:
            seen.add(key)
            total += sum(size(distribution.locate_file(file)) for file in distribution.files or ())
    if package == "tinycnn":  # the files of an editable install are not listed
        import tinycnn

        total += sum(size(file) for file in Path(tinycnn.__file__).parent.rglob("*") if file.suffix != ".pyc")
    return total


def size(file):
    path = Path(file)
    return path.stat().st_size if path.is_file() and "__pycache__" not in path.parts else 0


def measure(args, threads):
    if min(args.colds, args.turns) < 1:
        sys.exit("--colds and --turns must be at least 1")
    starts: dict[str, dict[str, list]] = {name: {"cold": [], "warm": []} for name in args.only}
    with tempfile.TemporaryDirectory() as caches:
        weights = Path(caches, "weights.npz")
        np.savez(weights, **_competitors.initial_weights(NET))
        for turn in range(args.colds + args.turns):
            for name in list(starts):
                cold = turn < args.colds
                cache = Path(caches, name, str(turn if cold else args.colds - 1))
                cache.mkdir(parents=True, exist_ok=True)
                try:
                    figures = launch(name, args.batch, threads, cache, weights)
                except harness.WorkerError as error:
                    harness.print_skipped(name, error)
                    del starts[name]
                else:
                    starts[name]["cold" if cold else "warm"].append(figures)
    if "tinycnn" not in starts:
        sys.exit("tinycnn did not start")
    answers = {name: kinds["warm"][0]["answer"] for name, kinds in starts.items() if name != "onnxruntime"}
    harness.assert_agree(f"the loss after {_competitors.CHECK_STEPS} steps", answers, "tinycnn", TOLERANCE)
    print(f"\nLeNet-5, {NET}, batch {args.batch}, {threads} threads")
    head = ["", "import, s", "first step cold, s", "warm, s", "a step, ms", "memory, MB", "installed, MB"]
    print_row, rows = _report.table(head, [13, 9, 18, 9, 10, 10, 13]), []
    for name, kinds in starts.items():
        medians = {
            kind: {key: statistics.median(f[key] for f in figures) for key in figures[0] if key != "answer"}
            for kind, figures in kinds.items()
        }
        row = {"threads": threads, "competitor": name, "batch": args.batch} | medians
        row["installed"] = installed_bytes(name.split(".")[0])
        rows.append(row)
        warm = medians["warm"]
        print_row(
            name, f"{warm['import']:.2f}", f"{medians['cold']['first_step']:.2f}", f"{warm['first_step']:.2f}",
            f"{warm['second_step'] * 1e3:.1f}", f"{warm['memory'] / 1e6:,.0f}", f"{row['installed'] / 1e6:,.0f}",
        )  # fmt: skip
    return rows


def main(argv=None):
    parser = harness.options("start", __doc__, _competitors.ALL, turns=3)
    parser.add_argument("--colds", type=int, default=1, help="starts of each with an empty cache")
    parser.add_argument("--batch", type=int, default=64)
    harness.run("start", harness.parse(parser, argv, _competitors.ALL), measure)


if __name__ == "__main__":
    main()
