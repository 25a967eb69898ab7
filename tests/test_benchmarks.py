"""The benchmark of the GPU, rehearsed without one (the same code on tiny sizes, in the emulation), and that of the
augmentation."""

import json
import subprocess
import sys

import numba
from test_experiment import ENVIRONMENT, ROOT

from benchmarks import augment


def test_the_gpu_benchmark_rehearsed():
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--rehearse",
        "--only",
        "ceilings",
        "launches",
        "steps",
        "kernels",
    ]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts done" in done.stdout
    for part in ("ceilings:", "launches:", "steps:", "kernels:"):
        assert part in done.stdout
    assert "played by the processor" in done.stdout


def test_the_gpu_benchmark_says_what_is_missing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--skip-tests",
        "--only",
        "launches",
        "--out",
        str(tmp_path / "r"),
    ]
    code = "import sys, tinycnn._gpu as g; g.load_driver = lambda: None; from benchmarks import gpu; "
    code += "sys.exit(gpu.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[3:]], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no NVIDIA driver was found" in done.stderr
    assert not (tmp_path / "r").exists()


def test_the_augmentation_benchmark_compares_first_and_writes_its_figures(tmp_path, capsys):
    threads = numba.get_num_threads()
    augment.main(["--batches", "1", "--turns", "1", "--threads", "1", "--json", str(tmp_path / "r.json")])
    numba.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["distortion"] for row in rows] == ["affine", "elastic", "both"]
    assert all(0 < row["difference"] < augment.TOLERANCE and row["ratio"] > 0 for row in rows)
    assert "largest difference" in capsys.readouterr().out
