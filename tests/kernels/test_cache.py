"""The disk cache of compiled kernels: damaged, stale and missing entries cost time, never correctness."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tinycnn
from tinycnn.kernels import _cache

PACKAGE = Path(tinycnn.__file__).parent
SCRIPT = """
import numpy as np
from tinycnn import kernels, scalars
from tinycnn.kernels._jit import dispatchers
x = np.array([[0.5, -2.0]], np.float32)
y = np.empty_like(x)
kernels.activation_forward(y, x, scalars.activation(scalars.SIGMOID))
np.testing.assert_allclose(y, 1 / (1 + np.exp(-x)), rtol=1e-6)
used = [f.stats for f in dispatchers.values() if f.overloads]
print(sum(sum(s.cache_hits.values()) for s in used), sum(sum(s.cache_misses.values()) for s in used))
"""
# Long sums in device functions, which LLVM optimises on their own and again within their kernels.
SUMS = """
import hashlib
import sys
import numpy as np
from tinycnn import kernels
from tinycnn.kernels._jit import dispatchers

def normal(*shape, rng=np.random.default_rng(0)):
    return rng.standard_normal(shape).astype(np.float32)

def blank(*shape):
    return np.empty(shape, np.float32)

N, C, H, W = 100, 4, 28, 28  # enough for more than one thread
x, dy, half, weight = normal(N, C, H, W), normal(N, C, H, W), normal(N, C, H // 2, W // 2), normal(C)
dx, y, dweight, dbias = blank(N, C, H, W), blank(N, C, H // 2, W // 2), blank(C), blank(C)
mean, rstd = normal(N, 2), abs(normal(N, 2)) + 1
calls = {
    "subsample_forward": (y, x, weight, weight, (2, 2), 1.0),
    "subsample_backward": (dx, dweight, dbias, half, x, weight, (2, 2), 1.0),
    "group_norm_backward": (dx, dweight, dbias, dy, x, weight, mean, rstd, 2),
}
for name in sys.argv[1:]:
    getattr(kernels, name)(*calls[name])
    print(name, *(hashlib.sha256(a.tobytes()).hexdigest() for a in calls[name] if type(a) is np.ndarray))
used = [f.stats for f in dispatchers.values() if f.overloads]
print(sum(sum(s.cache_hits.values()) for s in used), sum(sum(s.cache_misses.values()) for s in used))
"""
ADVICE = "set NUMBA_CACHE_DIR to a folder that can be written"


@pytest.fixture
def run(tmp_path):
    """Run a kernel in a new process: (number of kernels loaded, number compiled, lines on stderr)."""

    def run(before="", package=PACKAGE, **environment):
        environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(package.parent)} | environment
        done = subprocess.run(
            [sys.executable, "-c", before + SCRIPT], capture_output=True, text=True, check=False, cwd=tmp_path,
            env=os.environ | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (*map(int, done.stdout.split()), done.stderr.splitlines())

    return run


@pytest.fixture
def copy(tmp_path):
    """A copy of the package."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "tinycnn", ignore=shutil.ignore_patterns("__pycache__")))


def damaged(content):
    middle = len(content) // 2
    return {
        "empty": b"",
        "halved": content[:middle],
        "garbage": os.urandom(5000),
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }


def test_a_damaged_file_is_compiled_anew(run, tmp_path):
    assert run() == (0, 1, [])
    assert run() == (1, 0, [])
    (file,) = (tmp_path / "cache").rglob("*.kernel")
    for kind, content in damaged(file.read_bytes()).items():
        file.write_bytes(content)
        loaded, compiled, notes = run()
        assert (loaded, compiled) == (0, 1), kind
        assert notes == [f"tinycnn: the compiled kernel in {file} is damaged; it is removed and compiled anew"], kind
        assert run() == (1, 0, []), kind


def test_loaded_kernels_give_the_bits_of_compiled_ones(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(PACKAGE.parent)}

    def hashes(*names):
        done = subprocess.run(
            [sys.executable, "-c", SUMS, *names], capture_output=True, text=True, check=True, cwd=tmp_path,
            env=environment,
        )  # fmt: skip
        *lines, counts = done.stdout.splitlines()
        return sorted(lines), tuple(map(int, counts.split()))

    names = "subsample_forward", "subsample_backward", "group_norm_backward"
    cold, counts = hashes(*names)
    assert counts == (0, 3)
    assert hashes(*names) == (cold, (3, 0))
    assert hashes(*names[::-1]) == (cold, (3, 0))  # nor does it matter which is loaded first


@pytest.mark.parametrize("name", ["scalars.py", "kernels/pooling.py"])
def test_an_edit_in_any_kernel_source_invalidates_entries(run, copy, name):
    assert run(package=copy) == (0, 1, [])
    with (copy / name).open("a") as file:
        file.write("# an edit\n")
    assert run(package=copy) == (0, 1, [])
    assert run(package=copy) == (1, 0, [])


def test_files_that_are_not_kernel_sources():
    for path in (PACKAGE / "kernels").glob("*.py"):
        if path.name in _cache.NOT_KERNELS:
            assert not re.search(
                r"_jit import (?!dispatchers\b)|numba import prange|^@(?!functools|contextlib)", path.read_text(), re.M
            )


def test_an_edit_takes_effect(run, copy):
    """In a function that kernels of other files call."""
    run(package=copy)
    with (copy / "scalars.py").open("a") as file:
        file.write(WRONG)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        run(package=copy)


WRONG = """

def sigmoid32(x):
    return x


def sigmoid64(x):
    return x
"""


def test_no_writable_folder(run, copy, tmp_path):
    """Another user's site-packages and no HOME."""
    (tmp_path / "file").write_text("in the way")
    nowhere = str(tmp_path / "file" / "below")
    for folder in ("kernels", "data", "cuda"):
        (copy / folder / "__pycache__").write_text("in the way")
    nothing = {"NUMBA_CACHE_DIR": nowhere, "HOME": nowhere, "XDG_CACHE_HOME": nowhere, "PYTHONDONTWRITEBYTECODE": "1"}
    line = f"tinycnn: there is no folder to keep compiled kernels in, so every start compiles them: {ADVICE}"
    assert run(package=copy, **nothing) == (0, 1, [line])


READ_ONLY = """
import errno, os, tempfile
from pathlib import Path
def refuse(*args, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
tempfile.TemporaryFile = os.makedirs = Path.write_bytes = Path.unlink = refuse
"""


def test_a_read_only_folder(run, copy, tmp_path):
    loaded, compiled, notes = run(READ_ONLY, copy)
    assert (loaded, compiled, len(notes)) == (0, 1, 1)
    assert notes[0].endswith(ADVICE)
    assert run(package=copy) == (0, 1, [])
    assert run(READ_ONLY, copy) == (1, 0, [])  # existing entries are used
    (file,) = (tmp_path / "cache").rglob("*.kernel")
    file.write_bytes(b"garbage")
    loaded, compiled, notes = run(READ_ONLY, copy)
    assert (loaded, compiled) == (0, 1)
    assert notes[0].endswith("it is removed and compiled anew")


FULL = """
import errno, os
def refuse(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.replace = refuse
"""


def test_a_full_disk(run, tmp_path):
    loaded, compiled, notes = run(FULL)
    assert (loaded, compiled, len(notes)) == (0, 1, 1)
    assert "No space left on device" in notes[0]
    assert notes[0].endswith(ADVICE)
    assert not list((tmp_path / "cache").rglob("*.kernel*"))


def test_a_process_without_standard_error(run, copy):
    assert run("import sys; sys.stderr = None\n" + READ_ONLY, copy) == (0, 1, [])
