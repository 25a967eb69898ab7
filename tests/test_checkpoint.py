"""Saved files load, damaged ones are refused by name, and the old file survives a failure."""

import contextlib
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from tinycnn import checkpoint
from tinycnn.checkpoint import DamagedCheckpointError

DTYPES = ["?", "i1", "u1", "<i8", ">i2", "<f2", "<f4", ">f4", "<f8", "<c8", ">c16"]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.npz"


def an_array():
    return np.arange(6, dtype=np.float32).reshape(2, 3)


# ------------------------------------------------------------------------------ round trip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.dictionaries(
        st.text(st.characters(exclude_characters="\0\\", exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3),
)
def test_round_trip(tmp_path, arrays, metadata):
    checkpoint.save(tmp_path / "a.npz", arrays, metadata)
    loaded, loaded_metadata = checkpoint.load(tmp_path / "a.npz")
    assert list(loaded) == list(arrays)
    assert all(same(loaded[name], arrays[name]) for name in arrays)
    assert loaded_metadata == metadata


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(file, dtype):
    base = np.arange(24).reshape(2, 3, 4).astype(dtype)
    arrays = {
        "0.weight": base,
        "transposed": base.T,
        "strided": base[:, ::2, ::-1],
        "fortran": np.asfortranarray(base),
        "scalar": base[1, 1, 1],
        "0-d": np.array(1, dtype),
        "empty": base[:0],
        "read-only": np.broadcast_to(base[0, 0], (3, 4)),
    }
    checkpoint.save(file, arrays)
    loaded, metadata = checkpoint.load(str(file))
    assert metadata == {}
    for name, array in arrays.items():
        assert same(loaded[name], np.asarray(array)), name
        assert loaded[name].flags.writeable
        assert loaded[name].flags.aligned


def test_metadata_is_json(file):
    checkpoint.save(file, {}, {"epoch": 3, "shape": (1, 28), "loss": [0.5, float("inf")], "name": "LeNet é"})
    expected = {"epoch": 3, "shape": [1, 28], "loss": [0.5, float("inf")], "name": "LeNet é"}
    assert checkpoint.load(file) == ({}, expected)


def test_same_content_same_bytes(file, tmp_path):
    checkpoint.save(file, {"w": an_array()}, {"seed": 0})
    checkpoint.save(tmp_path / "again.npz", {"w": an_array()}, {"seed": 0})
    assert file.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_numpy_and_checkpoint_read_each_other(file):
    checkpoint.save(file, {"w": an_array()})
    with np.load(file, allow_pickle=False) as archive:
        assert same(archive["w"], an_array())
        assert archive["__metadata__"].dtype == np.uint8
    np.savez(file, w=an_array(), b=np.float64(2))
    arrays, metadata = checkpoint.load(file)
    assert same(arrays["w"], an_array())
    assert arrays["b"] == 2
    assert metadata == {}


# ------------------------------------------------------- refused before anything is written


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "words"),
    [
        ({"w": np.array([None])}, None, ValueError, r"arrays\['w'\] .* object"),
        ({"w": np.array(["text"])}, None, ValueError, r"arrays\['w'\] "),
        ({"w": np.zeros(2, "f4,O")}, None, ValueError, r"arrays\['w'\] "),
        ({"w": [[1], [2, 3]]}, None, ValueError, r"arrays\['w'\]"),
        ({"__metadata__": an_array()}, None, ValueError, "reserved"),
        ({"": an_array()}, None, ValueError, "cannot be the name"),
        ({"a\0b": an_array()}, None, ValueError, "cannot be the name"),
        ({"a" * 70_000: an_array()}, None, ValueError, "cannot be the name"),
        ({"\ud800": an_array()}, None, ValueError, "surrogates"),
        ({1: an_array()}, None, TypeError, "names of type str"),
        ({"w": an_array()}, {"rng": object()}, TypeError, "metadata.*object"),
        ({"w": an_array()}, [1], TypeError, "metadata must be a mapping"),
    ],
)
def test_invalid_content_is_refused(file, arrays, metadata, error, words):
    file.write_bytes(b"old")
    with pytest.raises(error, match=words):
        checkpoint.save(file, arrays, metadata)
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", ["net", "net.pkl", "net.npz.gz", ".npz"])
def test_wrong_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        checkpoint.save(tmp_path / name, {})
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        checkpoint.load(tmp_path / name)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "no folder" / "net.npz", {})


# ------------------------------------------------------------------- the old file survives


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_while_writing(file, monkeypatch, step, error):
    checkpoint.save(file, {"w": an_array()})
    before = file.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        checkpoint.save(file, {"w": an_array() + 1})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_is_complete_and_synced_before_it_is_replaced(file, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append((a.parent, b)), replace(a, b)))
    checkpoint.save(file, {"w": an_array()})
    assert steps == [file.stat().st_size, (file.parent, file)]


# --------------------------------------------------------------- damaged and hostile files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.npz"
    arrays = {"0.weight": an_array(), "größe": np.array(7, ">i2")}
    checkpoint.save(path, arrays, {"epoch": 1})
    return path.read_bytes(), arrays


def test_truncated_anywhere(file, saved):
    data, _ = saved
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpointError, match=r"net\.npz: not a usable checkpoint: ."):
            checkpoint.load(file)


def assert_refused_or_intact(file, data, arrays):
    """A change of bytes that are not content, such as the date, must leave the content intact."""
    file.write_bytes(data)
    try:
        loaded, metadata = checkpoint.load(file)
    except DamagedCheckpointError:
        return
    assert metadata == {"epoch": 1}
    assert list(loaded) == list(arrays)
    assert all(same(loaded[name], arrays[name]) for name in arrays)


def test_every_bit_flipped(file, saved):
    data, arrays = saved
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert_refused_or_intact(file, flipped, arrays)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_in_places(file, saved, data):
    good, _ = saved
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        patch = data.draw(st.binary(max_size=6))
        damaged[at : at + data.draw(st.sampled_from([0, len(patch)]))] = patch
    file.write_bytes(damaged)
    with contextlib.suppress(DamagedCheckpointError):  # no other exception
        checkpoint.load(file)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary())
def test_not_an_npz(file, data):
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(file)


def write_zip(file, members, **options):
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def npy(header, content=b"", version=b"\1\0"):
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header.encode() + content


def f4(shape, content=b""):
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n", content)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


def test_pickles_are_never_opened(file):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.array([Bomb()], object), allow_pickle=True)
    write_zip(file, [("w.npy", content.getvalue())])
    with pytest.raises(DamagedCheckpointError, match=r"'w' .* does not hold plain numbers"):
        checkpoint.load(file)
    write_zip(file, [("w", pickle.dumps(Bomb()))])
    with pytest.raises(DamagedCheckpointError, match="unexpected or repeated member"):
        checkpoint.load(file)
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedCheckpointError, match="not a zip file"):
        checkpoint.load(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f4("(1000000000, 1000)", bytes(16)), "claims 4000000000000 bytes and has 16"),
        (f4("(3,)", bytes(16)), "claims 12 bytes and has 16"),
        (f4("(0, 9000000000000000000, 9000000000000000000)"), "."),
        (f4("(" + "1, " * 70 + ")", bytes(4)), "."),
        (f4("(-1, -4)", bytes(16)), "damaged header"),
        (f4("(" * 2000), "damaged header"),
        (f4("(" + "9" * 6000 + ",)"), "damaged header"),
        (npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1,), }", bytes(3)), "."),
        (npy("{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", bytes(36)), "plain numbers"),
        (npy("__import__('os')"), "damaged header"),
        (f4("(4,)", bytes(16))[:20], "damaged header"),
        (f4("(4,)", bytes(16))[:9], "."),
        (npy("", version=b"\x09\0"), "not in the npy format"),
        (b"", "not in the npy format"),
    ],
)
def test_hostile_arrays(file, content, words):
    write_zip(file, [("w.npy", content)])
    with pytest.raises(DamagedCheckpointError, match=words):
        checkpoint.load(file)


def test_all_npy_versions(file):
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (1,2), }"
    content = np.array([1, 2], "<f4").tobytes()
    write_zip(file, [(f"v{v}.npy", npy(header, content, version=bytes([v, 0]))) for v in (1, 2, 3)])
    assert all(same(array, np.array([[1, 2]], "<f4")) for array in checkpoint.load(file)[0].values())


def test_compressed_members_are_refused(file):
    np.savez_compressed(file, w=np.zeros(1_000_000))  # 8 MB in 8 kB
    with pytest.raises(DamagedCheckpointError, match="claim more bytes"):
        checkpoint.load(file)
    write_zip(file, [("w.npy", f4("(4,)", bytes(range(16))))], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedCheckpointError, match="compressed"):
        checkpoint.load(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_members_are_refused(file):
    write_zip(file, [("w.npy", f4("()", bytes(4)))] * 2)
    with pytest.raises(DamagedCheckpointError, match="repeated member"):
        checkpoint.load(file)


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_metadata(file, text):
    np.savez(file, __metadata__=np.frombuffer(text, np.uint8))
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(file)
