"""Run a program as if this machine had a GPU.

python tests/support/cuda_on_cpu PROGRAM.py ARGUMENTS...
python tests/support/cuda_on_cpu -m MODULE ARGUMENTS...

Exits with the program's exit code, or with 99 after problems of the stand-in driver, which are printed on stderr.
"""

import importlib
import runpy
import sys
import traceback
from pathlib import Path


def run(arguments):
    """Run the program; returns its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    arguments = sys.argv[1:]
    if arguments in ([], ["-m"], ["-h"], ["--help"]):
        sys.exit(__doc__)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    cuda_on_cpu = importlib.import_module("cuda_on_cpu")
    cuda_on_cpu.install()
    cuda_on_cpu.fail_on_problems()
    code = run(arguments)
    cuda_on_cpu.run_pending()  # may find faults of kernels that no call has waited for
    found = cuda_on_cpu.problems()
    if found:
        print(f"cuda_on_cpu: {len(found)} problems", *found, sep="\n  ", file=sys.stderr)
    sys.exit(99 if found else code)


if __name__ == "__main__":
    main()
