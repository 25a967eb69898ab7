"""The examples run, at small size, and leave a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinycnn import data
from tinycnn.errors import DataUnavailableError

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "lenet5")  # test_commands.py
NEED_MNIST = {"autoencoder", "finetune"}
MAX_LINES = 60


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    if name in NEED_MNIST:
        try:
            data.mnist(download=False)
        except DataUnavailableError as error:
            pytest.skip(f"MNIST is not available: {error.reason}")
    path, out = ROOT / "examples" / f"{name}.py", tmp_path / "picture.png"
    assert len(path.read_text().splitlines()) < MAX_LINES
    command = [sys.executable, path, "--epochs", "2", "--images", "192", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert out.stat().st_size > 5000


def test_all_of_them_are_tested():
    assert EXAMPLES == ["angle", "autoencoder", "finetune", "textures"]
