"""What it takes to begin: import, the first step with an empty and with a warm cache, memory, installed size.

    python -m benchmarks start [--only torch jax] [--batch 64]

A new Python imports the library, builds LeNet-5 with its data and takes a training step (ONNX Runtime: a batch of
inference); all that after the import counts as the first step.  `cold` is with an empty cache of compiled code, in a
folder of its own; `warm` is with the folder that the last cold start left.  NumPy is imported before the clock starts,
for everybody.  Memory is the most that the process held (resident, 16 MB of images among it).  Installed size is that
of the package with all that it requires, as `importlib.metadata` lists the files.

Losses are compared before times are printed.  The starts of the competitors take turns; figures are medians.
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

from benchmarks import _competitors
from benchmarks import _harness as harness

NET, TOLERANCE = "tanh+avg", 1e-4
MODULES = {"tinycnn": "tinycnn.kernels", "torch.compile": "torch"}  # `import tinycnn` alone loads next to nothing
CACHES = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor", "JAX_COMPILATION_CACHE_DIR": "jax"}


# What the new process runs.  It does not import tinycnn for the others, so that the memory is the library's.
CHILD = """
import importlib, json, resource, sys, time
import numpy as np
from benchmarks import _competitors
name, module, batch, threads, net, weights = sys.argv[1:]
weights = dict(np.load(weights))
start = time.perf_counter()
importlib.import_module(module)
imported = time.perf_counter()
one = _competitors.ALL[name](net, int(threads))
def begin():
    _competitors.Competitor.start(one, int(batch), weights)  # not torch's own, which tries memory formats
    if name == "tinycnn":
        one.ready(np.array(one.indices))
begin()
act = one.infer if name == "onnxruntime" else one.next_step
act()
first = time.perf_counter()
act()
second = time.perf_counter()
begin()
answer = float(one.infer().sum()) if name == "onnxruntime" else one.losses()[-1]
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"import": imported - start, "first_step": first - imported, "second_step": second - first,
                  "memory": memory, "answer": answer}))
"""


def launch(name, batch, threads, cache, weights):
    """The figures of one start.  weights: an npz file"""
    environment = os.environ | {variable: str(Path(cache) / place) for variable, place in CACHES.items()}
    arguments = [name, MODULES.get(name, name), str(batch), str(threads), NET, str(weights)]
    with harness.limit_threads(threads):
        environment |= {variable: os.environ[variable] for variable in harness.THREAD_VARIABLES}
        command = [sys.executable, "-c", CHILD, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise harness.WorkerError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def installed_bytes(package):
    """The files of a package and of everything that it requires."""
    from packaging.requirements import Requirement

    seen, waiting, total = set(), [(package, "")], 0
    while waiting:
        name, extra = waiting.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, e) for e in requirement.extras or {""}]
        key = distribution.metadata["Name"].lower().replace("_", "-")
        if key not in seen:
            seen.add(key)
            total += sum(size(distribution.locate_file(file)) for file in distribution.files or ())
    if package == "tinycnn":  # a checkout is not among its distribution's files
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
                    harness.skip(name, error)
                    del starts[name]
                else:
                    starts[name]["cold" if cold else "warm"].append(figures)
    if "tinycnn" not in starts:
        sys.exit("tinycnn did not start")
    answers = {name: found["warm"][0]["answer"] for name, found in starts.items() if name != "onnxruntime"}
    harness.assert_agree(f"the loss after {_competitors.CHECK_STEPS} steps", answers, "tinycnn", TOLERANCE)
    print(f"\nLeNet-5, {NET}, batch {args.batch}, {threads} threads")
    heads = ["", "import, s", "first step cold, s", "warm, s", "a step, ms", "memory, MB", "installed, MB"]
    line, rows = harness.table(heads, [13, 9, 18, 9, 10, 10, 13]), []
    for name, found in starts.items():
        middle = {
            kind: {key: statistics.median(f[key] for f in figures) for key in figures[0] if key != "answer"}
            for kind, figures in found.items()
        }
        row = {"threads": threads, "competitor": name, "batch": args.batch} | middle
        row["installed"] = installed_bytes(name.split(".")[0])
        rows.append(row)
        warm = middle["warm"]
        line(
            name, f"{warm['import']:.2f}", f"{middle['cold']['first_step']:.2f}", f"{warm['first_step']:.2f}",
            f"{warm['second_step'] * 1e3:.1f}", f"{warm['memory'] / 1e6:,.0f}", f"{row['installed'] / 1e6:,.0f}",
        )  # fmt: skip
    return rows


def main(argv=None):
    parser = harness.options("start", __doc__, _competitors.ALL, turns=3)
    parser.add_argument("--colds", type=int, default=1, help="starts with an empty cache, each")
    parser.add_argument("--batch", type=int, default=64)
    harness.run("start", harness.parse(parser, argv, _competitors.ALL), measure)


if __name__ == "__main__":
    main()
