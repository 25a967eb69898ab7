"""Plots of the JSON files that other commands wrote with --json.

    python -m benchmarks plot benchmarks/results/*.json --plots FOLDER

Other files are skipped, with a printed line.
"""

import argparse
import json
from pathlib import Path

from benchmarks import _plots


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--plots", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    for file in args.files:
        result = json.loads(file.read_text())
        if result.get("command") in _plots.PLOTS:
            _plots.draw(result, args.plots)
        else:
            print(f"{file} is skipped: no plots for it")


if __name__ == "__main__":
    main()
