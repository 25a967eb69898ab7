"""tools/fuzz.py: no file of any format breaks a rule, and a reader that breaks one is found."""

import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import fuzz


def test_files_of_every_format(tmp_path):
    for name, kind in fuzz.formats().items():
        tally = fuzz.run(name, kind, 0, range(150), tmp_path)
        assert tally.failures == [], name
        assert tally.accepted > 0, name
        assert tally.refused > 50, name
    assert not list(tmp_path.iterdir())


def raise_struct_error(path):
    struct.unpack("<I", path.read_bytes()[:3])


def loop(path):
    while path.exists():
        pass


def allocate(path):
    bytearray(33 << 20)


def without_name(path):
    raise ValueError("damaged")


def two_lines(path):
    raise ValueError(f"{path}: damaged\nreally")


def long_message(path):
    raise OSError(f"{path}: {'x' * 2000}")


def warn(path):
    warnings.warn("overflow", RuntimeWarning, stacklevel=2)


def interrupt(path):
    raise SystemExit(f"{path}: damaged")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (raise_struct_error, "error: unpack requires"),
        (loop, "Hang: took longer than 0.2 s"),
        (allocate, "took 33 MiB of memory"),
        (without_name, "ValueError does not name the file: damaged"),
        (two_lines, "or more lines"),
        (long_message, "message of 2"),
        (warn, "RuntimeWarning: overflow"),
        (interrupt, "SystemExit"),
    ],
)
def test_faults_of_a_reader_are_found(tmp_path, monkeypatch, read, words):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    kind = fuzz.Format(read, "folder/a.bin", [bytes(100)])
    tally = fuzz.run("planted", kind, 5, range(7, 9), tmp_path)
    assert (tally.accepted, tally.refused, len(tally.failures)) == (0, 0, 2)
    kept = tmp_path / "planted-5-8.bin"
    assert tally.failures[1].startswith("planted, seed 5, number 8: ")
    assert str(kept) in tally.failures[1]
    assert words in tally.failures[1]
    assert kept.read_bytes() == fuzz.mutated("planted", kind, 5, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted-5-7.bin", "planted-5-8.bin"]


def test_ctrl_c_ends_the_run(tmp_path):
    def read(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuzz.run("planted", fuzz.Format(read, "a.bin", [b"1"]), 0, range(2), tmp_path)


def test_a_list_of_damaged_files(tmp_path):
    tally = fuzz.run("planted", fuzz.Format(two_lines, "a.bin", [b"1"], lines=True), 0, range(2), tmp_path)
    assert (tally.refused, tally.failures) == (2, [])


@pytest.mark.parametrize(
    "read", ["lambda path: __import__('os')._exit(3)", "lambda path: collections.deque(itertools.repeat(0), maxlen=0)"]
)
def test_a_worker_that_dies(tmp_path, read):
    """At once, or by the watchdog, in a function in C that never ends."""
    source = Path(fuzz.__file__).read_text().replace("parent.parent\n", f"parents[0] / {str(fuzz.ROOT)!r}\n", 1)
    source = source.replace('"IDX": Format(data.read_idx', f'"IDX": Format({read}').replace(
        "SECONDS = 10", "SECONDS = 0.2"
    )
    (tmp_path / "fuzz.py").write_text("import collections, itertools\n" + source)
    command = [sys.executable, "fuzz.py", "--count", "3", "--only", "IDX", "--keep", "kept"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1
    assert re.search(r"a worker died when it read one of these files: kept.IDX-0.a-idx3-ubyte", done.stdout)


def test_a_good_reader(tmp_path):
    def read(path):
        if path.read_bytes()[:50] != bytes(50):
            raise ValueError(f"{path} is damaged")

    tally = fuzz.run("planted", fuzz.Format(read, "a.bin", [bytes(100)]), 0, range(100), tmp_path)
    assert tally.failures == []
    assert tally.accepted > 10
    assert tally.refused > 10


def test_mutations_depend_on_seed_and_number_alone():
    kind = fuzz.Format(Path.read_bytes, "a.txt", [b'{"a": 1, "b": [2.5, "text"]}', bytes(range(256))])
    files = [fuzz.mutated("a", kind, 0, number) for number in range(200)]
    assert files == [fuzz.mutated("a", kind, 0, number) for number in range(200)]
    assert len({*files}) > 150
    assert len({*files} & {fuzz.mutated("a", kind, 1, number) for number in range(200)}) < 50


def test_command(tmp_path):
    command = [sys.executable, fuzz.__file__, "--count", "30", "--only", "IDX", "--keep", tmp_path / "kept"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()[:2]
    assert head.split()[:5] == ["format", "files", "accepted", "refused", "failures"]
    assert row.split()[:2] == ["IDX", "30"]
    assert int(row.split()[2]) + int(row.split()[3]) == 30
    assert not list((tmp_path / "kept").iterdir())
