"""Speed of this checkout beside that of the last release.

    python -m benchmarks guard [--against REVISION] [--turns 12] [--threads 2]

The other revision is the last tag before this commit; without any tag, the commit before this one. It is written to a
temporary folder. Both revisions have their own cache, and compile before times are measured. In each round each runs in
a new process, alternately first, on the same weights and data; their losses and outputs are compared.

The ratio is the time of this checkout divided by that of the other: medians of the rounds. Its noise is the interval
that has the median of the rounds' ratios with 99 % confidence, whatever their distribution (order statistics, as in the
sign test). A case is slower if all of the interval is above 1; this needs at least 8 rounds.
"""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import _guard_worker as worker, _harness as harness, _report

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE = 0.99
TOLERANCE = 2e-3  # of the largest loss or output, see nets.py


def git(*arguments):
    """What a command of git prints; SystemExit if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def run_worker(tree, cache, names, seconds, threads):
    """What the worker measures with the tinycnn in the folder `tree`; WorkerError if it cannot run there."""
    command = [sys.executable, "-c", Path(worker.__file__).read_text(), json.dumps(names), str(seconds)]
    with harness.limit_threads(threads):
        environment = os.environ | {"PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(cache)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise harness.WorkerError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def interval(ratios):
    """The interval of order statistics that has the median with CONFIDENCE; (0, inf) for too few ratios."""
    ratios, n = sorted(ratios), len(ratios)
    tails = itertools.accumulate(math.comb(n, i) / 2**n for i in range(n // 2))
    k = sum(2 * tail <= 1 - CONFIDENCE for tail in tails)
    return (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)


def compare(new, old):
    """Ratio of medians, its noise and a verdict, from the seconds of paired rounds."""
    low, high = interval([a / b for a, b in zip(new, old, strict=True)])
    verdict = "slower" if low > 1 else "faster" if high < 1 else ""
    ratio = statistics.median(new) / statistics.median(old)
    return {"ratio": ratio, "low": low, "high": high, "verdict": verdict}


def measure(args, threads):
    revision = git("rev-parse", "--short", f"{args.against}^{{commit}}")
    print(f"\nthis checkout beside {args.against} ({revision}); threads: {threads}, rounds: {args.turns}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        git("archive", "--format=zip", f"--output={folder}/old.zip", revision, "tinycnn")
        shutil.unpack_archive(f"{folder}/old.zip", f"{folder}/old")
        trees = {"new": ROOT, "old": Path(folder, "old")}

        def run_round(names, seconds):
            cases = args.cases, seconds, threads
            return {name: run_worker(trees[name], Path(folder, f"cache {name}"), *cases) for name in names}

        try:
            first = run_round(trees, 0)  # compiles
            rounds = [run_round(sorted(trees, reverse=turn % 2 > 0), args.seconds) for turn in range(args.turns)]
        except harness.WorkerError as error:
            print(f"skipped: a revision cannot run these measurements: {error}")
            return []
    print_row = _report.table(["", "old, ms", "new, ms", "new / old", "noise", ""], [24, 9, 9, 9, 16, 6])
    rows = []
    for case in args.cases:
        harness.assert_agree(case, {name: first[name][case]["results"] for name in trees}, "old", TOLERANCE)
        seconds = {name: [found[name][case]["seconds"] for found in rounds] for name in trees}
        row = {"threads": threads, "case": case, "against": revision, "seconds": seconds, **compare(**seconds)}
        medians = [f"{1e3 * statistics.median(seconds[name]):.3f}" for name in ("old", "new")]
        print_row(case, *medians, f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", row["verdict"])
        rows.append(row)
    slower = [row["case"] for row in rows if row["verdict"] == "slower"]
    few = math.isinf(rows[0]["high"])
    print("too few rounds to tell" if few else f"slower than the noise explains: {'; '.join(slower) or 'nothing'}")
    return rows


def main(argv=None):
    parser = harness.options("guard", __doc__, {}, turns=12, seconds=0.5)
    parser.add_argument("--against", metavar="REVISION", help="default: the last tag, or the commit before this one")
    parser.add_argument("--cases", nargs="+", choices=list(worker.CASES), default=list(worker.CASES))
    args = harness.parse(parser, argv, {})
    args.against = args.against or (git("tag", "--merged", "HEAD^", "--sort=creatordate").split() or ["HEAD^"])[-1]
    harness.run("guard", args, measure)


if __name__ == "__main__":
    main()
