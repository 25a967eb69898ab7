"""IDX files: round trips and damaged files."""

import contextlib
import gzip
import os
import re
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinycnn.data import DamagedFileError, read_idx, write_idx

DTYPES = ["u1", "i1", "i2", "i4", "f4", "f8"]


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)  # arbitrary bits, including NaN


@settings(deadline=None, max_examples=60)
@given(arrays(), st.sampled_from(["a.idx", "a.gz"]), st.booleans())
def test_round_trip(array, name, turned):
    if turned:
        array = array.astype(array.dtype.newbyteorder(">")).T
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_idx(path, array)
        back = read_idx(path)
        assert (path.read_bytes()[:2] == b"\x1f\x8b") == (name == "a.gz")
        assert [p.name for p in Path(folder).iterdir()] == [name]
    native = array.dtype.newbyteorder("=")
    assert back.dtype == native
    assert back.shape == array.shape
    assert back.flags.writeable
    assert back.tobytes() == array.astype(native).tobytes()


def test_the_bytes_of_a_file(tmp_path):
    write_idx(tmp_path / "a", np.array([[1, -2, 3]], np.int16))
    assert (tmp_path / "a").read_bytes() == bytes.fromhex("00000b02 00000001 00000003 0001 fffe 0003")


def test_gzip_is_detected_by_content_and_written_reproducibly(tmp_path):
    write_idx(tmp_path / "a.gz", np.arange(9, dtype=np.uint8))
    write_idx(tmp_path / "b.gz", np.arange(9, dtype=np.uint8))
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    (tmp_path / "a.gz").rename(tmp_path / "a.idx")
    assert read_idx(tmp_path / "a.idx").tolist() == list(range(9))


GOOD = b"\0\0\x08\x02" + struct.pack(">II", 2, 3) + bytes(6)
DAMAGED = {
    "empty": (b"", "empty file"),
    "short magic": (b"\0\0\x08", "got 00 00 08"),
    "no IDX": (b"PNG!" + bytes(20), "not an IDX file"),
    "unknown type": (b"\0\0\x0a\x01\0\0\0\1\0", "got 00 00 0a 01"),
    "no dimensions": (b"\0\0\x08\x00\0", "1 to 32 dimensions, got 0"),
    "too many dimensions": (b"\0\0\x08\xff" + bytes(1020), "1 to 32 dimensions, got 255"),
    "short header": (GOOD[:9], "expected 2 sizes (8 bytes), got 5 bytes"),
    "short payload": (GOOD[:-1], "expected 6 bytes for shape (2, 3), got 5"),
    "trailing bytes": (GOOD + b"\0", "expected 6 bytes for shape (2, 3), got more"),
    "absurd sizes": (b"\0\0\x0e\x04" + b"\xff" * 16 + bytes(99), "at most 1,073,741,824 bytes, got 2,722,"),
    "large sizes": (b"\0\0\x08\x01\x3f\xff\xff\xff" + bytes(99), "got 99"),
    "absurd but empty": (b"\0\0\x0e\x04" + bytes(4) + b"\xff" * 12, "memory can hold"),
    "short gzip": (gzip.compress(GOOD)[:-9], "gzip"),
    "short gzip trailer": (gzip.compress(GOOD)[:-3], "gzip"),
    "wrong gzip checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "gzip"),
    "garbled gzip": (gzip.compress(GOOD)[:10] + b"\xff" * 20, "gzip"),
    "gzip with a tail": (gzip.compress(GOOD) + b"tail", "gzip"),
    "short payload in gzip": (gzip.compress(GOOD[:-2]), "expected 6 bytes for shape (2, 3), got 4"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(damage, tmp_path):
    content, message = DAMAGED[damage]
    path = tmp_path / "some.idx"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=re.escape(message)) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def refused(path, message, **options):
    with pytest.raises(DamagedFileError, match=re.escape(message)) as caught:
        read_idx(path, **options)
    assert str(caught.value).startswith(f"{path}: ")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "expected a regular file, got a named pipe")
    refused("/dev/zero", "expected a regular file, got a device")
    refused(tmp_path, "expected a regular file, got a folder")
    write_idx(tmp_path / "a", np.arange(3, dtype=np.uint8))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_idx(tmp_path / "link").tolist() == [0, 1, 2]


@pytest.mark.parametrize("declared", [6, 2**26, 2**31 - 1])
def test_a_small_file_that_expands_is_refused_in_little_memory(tmp_path, declared):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b"\0\0\x08\x01" + struct.pack(">I", declared))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        if declared == 6:
            refused(path, "too long: expected 6 bytes for shape (6,), got")
        elif declared == 2**26:
            refused(path, f"at most 1,000,000 bytes, got {declared:,} for shape ({declared},)", max_bytes=10**6)
        else:
            refused(path, f"at most 1,073,741,824 bytes, got {declared:,} for shape ({declared},)")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    if declared == 2**26:
        assert read_idx(path, max_bytes=2**26).nbytes == 2**26


@pytest.mark.parametrize("start", [b"", GOOD, gzip.compress(GOOD)], ids=["zeros", "plain", "gzip"])
def test_a_sparse_file_is_refused_by_its_size(tmp_path, start):
    path = tmp_path / "sparse"
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(2**36)
        refused(path, "expected at most 1,084,544,778 bytes, got 68,719,476,736")
        if start:
            file.truncate(2**29)
            refused(path, "too long: expected 6 bytes for shape (2, 3), got a file of 536870912")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([GOOD, gzip.compress(GOOD)]), st.data())
def test_mutated_files_are_read_or_refused(content, data):
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(content)
        with contextlib.suppress(DamagedFileError):
            assert read_idx(path).nbytes < 1000


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64), st.booleans())
def test_any_bytes_are_read_or_refused(content, zipped):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(gzip.compress(content) if zipped else content)
        with contextlib.suppress(DamagedFileError):
            read_idx(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "none")


@pytest.mark.parametrize("array", [np.zeros(2, np.int64), np.zeros(2, bool), np.array("a"), np.uint8(1)])
def test_an_array_that_idx_cannot_store_is_refused(array, tmp_path):
    with pytest.raises(ValueError, match="array must have"):
        write_idx(tmp_path / "a", array)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_idx(tmp_path / "a", np.zeros(3, np.uint8))
    before = (tmp_path / "a").read_bytes()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_idx(tmp_path / "a", np.ones(3, np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before
