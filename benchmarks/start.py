"""What it takes to begin: import, the first step with an empty and with a warm cache, memory, installed size.

    python -m benchmarks start [--only torch jax] [--batch 64]

A new Python imports the library, builds LeNet-5 with its data, and takes a training step (ONNX Runtime: a batch of
inference), then more steps.  `cold` is with an empty cache of compiled code, in a folder of its own; `warm` is the next
start with the same folder.  NumPy is imported before the clock starts, for everybody.  Memory is the most that the
process held (resident, with 20,000 images of uint8: 16 MB).  Installed size is that of the package with all that it
requires, as `importlib.metadata` lists files.

Losses are compared before times are printed.  The starts of the competitors take turns; figures are medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from benchmarks import _nets
from benchmarks import _side_by_side as side

NET = "tanh+avg"
MODULES = {"tinycnn": "tinycnn.kernels", "torch.compile": "torch"}  # importing tinycnn alone loads next to nothing
CACHES = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor", "JAX_COMPILATION_CACHE_DIR": "jax"}


def child(name, module, batch, threads):
    """What the new process runs; prints its figures."""
    import importlib
    import resource

    start = time.perf_counter()
    importlib.import_module(module)
    imported = time.perf_counter()
    net = _nets.ALL[name](NET, threads)
    weights = _nets.first_weights(NET)
    ready = time.perf_counter()
    _nets.Net.start(net, batch, weights)
    act = net.infer if name == "onnxruntime" else net.next_step
    act()
    first = time.perf_counter()
    act()
    second = time.perf_counter()
    answer = float(net.infer().sum()) if name == "onnxruntime" else net.losses()[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = {"import": imported - start, "first_step": first - ready, "second_step": second - first}
    print(json.dumps(figures | {"memory": peak, "answer": answer}))


def launch(name, batch, threads, cache):
    """The figures of one start."""
    environment = os.environ | {variable: str(Path(cache) / place) for variable, place in CACHES.items()}
    code = f"from benchmarks import start; start.child({name!r}, {MODULES.get(name, name)!r}, {batch}, {threads})"
    with side.held_to(threads):
        environment |= {variable: os.environ[variable] for variable in side.THREAD_VARIABLES}
        begun = time.perf_counter()
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise side.Failed(lines[-1])
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begun}


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
    starts: dict[str, dict[str, list]] = {name: {"cold": [], "warm": []} for name in args.only}
    with tempfile.TemporaryDirectory() as caches:
        for turn in range(args.colds + args.turns):
            for name in list(starts):
                cold = turn < args.colds
                cache = Path(caches, name, str(turn if cold else args.colds - 1))
                cache.mkdir(parents=True, exist_ok=True)
                try:
                    figures = launch(name, args.batch, threads, cache)
                except side.Failed as error:
                    side.skip(name, error)
                    del starts[name]
                else:
                    starts[name]["cold" if cold else "warm"].append(figures)
    answers = {name: found["warm"][0]["answer"] for name, found in starts.items() if name != "onnxruntime"}
    side.must_agree(f"the loss after {_nets.CHECK_STEPS} steps", answers, "tinycnn", 1e-3)
    print(f"\nLeNet-5, {NET}, batch {args.batch}, {threads} threads")
    heads = ["", "import, s", "first step cold, s", "warm, s", "a step, ms", "memory, MB", "installed, MB"]
    line, rows = side.table(heads, [13, 9, 18, 9, 10, 10, 13]), []
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
    parser = side.options("start", __doc__, _nets.ALL, turns=3)
    parser.add_argument("--colds", type=int, default=1, help="starts with an empty cache, each")
    parser.add_argument("--batch", type=int, default=64)
    side.run("start", side.parse(parser, argv, _nets.ALL), measure)


if __name__ == "__main__":
    main()
