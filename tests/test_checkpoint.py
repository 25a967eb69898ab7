"""Saved files load in full, damaged ones are refused by name, and files of other programs are read."""

import contextlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as safetensors

from tinycnn import checkpoint
from tinycnn.checkpoint import DTYPES
from tinycnn.errors import DamagedCheckpointError

MIB = 1 << 20
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(min_size=1, max_size=8).filter(str.isprintable)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture
def npz(tmp_path):
    return tmp_path / "net.npz"


def an_array():
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def assert_same(loaded, arrays):
    """Equal in names, order, shapes and bits; native byte order; in memory of their own."""
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        expected = np.asarray(array, np.asarray(array).dtype.newbyteorder("="))
        assert loaded[name].dtype == expected.dtype, name
        assert loaded[name].shape == expected.shape, name
        assert loaded[name].tobytes() == expected.tobytes(), name
        assert loaded[name].flags.writeable, name
        assert loaded[name].flags.aligned, name


# --- round trip -------------------------------------------------------------------------------------------------------


@st.composite
def an_array_of_any_layout(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES))).newbyteorder(draw(st.sampled_from("<>")))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    layout = draw(
        st.sampled_from(["as it is", "transposed", "strided", "reversed", "fortran", "read-only", "repeated"])
    )
    if layout == "transposed":
        return array.T
    if layout == "strided" and array.ndim:
        return array[..., ::2]
    if layout == "reversed" and array.ndim:
        return array[::-1]
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "repeated":
        return np.broadcast_to(array, (2, *array.shape))
    array.flags.writeable = layout != "read-only"
    return array


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.dictionaries(NAMES, an_array_of_any_layout(), max_size=4),
    metadata=st.dictionaries(st.text(), JSON, max_size=3),
)
def test_round_trip(file, arrays, metadata):
    checkpoint.save(file, arrays, metadata)
    loaded, loaded_metadata = checkpoint.load(str(file))
    assert_same(loaded, arrays)
    assert loaded_metadata == metadata
    others = safetensors.load_file(file)
    assert_same({name: others[name] for name in arrays}, arrays)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(file, dtype, order):
    base = np.arange(24).reshape(2, 3, 4).astype(np.dtype(dtype).newbyteorder(order))
    arrays = {
        "0.weight": base,
        "transposed": base.T,
        "strided": base[:, ::2, ::-1],
        "fortran": np.asfortranarray(base),
        "scalar": base[1, 1, 1],
        "0-d": np.array(1, base.dtype),
        "empty": base[:0],
        "read-only": np.broadcast_to(base[0, 0], (3, 4)),
    }
    checkpoint.save(file, arrays)
    loaded, metadata = checkpoint.load(file)
    assert metadata == {}
    assert_same(loaded, arrays)


def test_metadata_is_json(file):
    checkpoint.save(file, {}, {"epoch": 3, "shape": (1, 28), "loss": [0.5, float("inf")], 5: "LeNet é"})
    expected = {"epoch": 3, "shape": [1, 28], "loss": [0.5, float("inf")], "5": "LeNet é"}
    assert checkpoint.load(file) == ({}, expected)


def test_same_content_same_bytes(file, tmp_path):
    arrays = {name: an_array() for name in "zyxwvu"}
    checkpoint.save(file, arrays, {"seed": 0, "epoch": 1})
    for layout in (np.asfortranarray, lambda array: array.astype(">f4"), np.copy):
        again = tmp_path / "again.safetensors"
        checkpoint.save(again, {name: layout(array) for name, array in arrays.items()}, {"seed": 0, "epoch": 1})
        assert file.read_bytes() == again.read_bytes()


def test_files_of_other_programs(file):
    arrays = {"b": an_array(), "a": np.ones((), np.int64), "größe": np.zeros((0, 3), np.float16)}
    for metadata in (None, {"format": "pt", "epoch": "3"}):
        safetensors.save_file(arrays, file, metadata)
        loaded, own = checkpoint.load(file)
        assert_same({name: loaded[name] for name in arrays}, arrays)
        assert own == {}


def test_bfloat16_of_other_programs(file):
    """Common in other programs' files; NumPy has no such dtype."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedCheckpointError, match=r"net\.safetensors: .* dtype 'BF16', which NumPy does not have"):
        checkpoint.load(file)


# --- refused before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "words"),
    [
        ({"w": np.array([None])}, None, ValueError, r"arrays\['w'\] must be of one of the dtypes bool.* got object"),
        ({"w": np.array(["text"])}, None, ValueError, r"arrays\['w'\] must .* got <U4"),
        ({"w": np.zeros(2, "f4,O")}, None, ValueError, r"arrays\['w'\] must "),
        ({"w": np.zeros(2, np.complex64)}, None, ValueError, r"arrays\['w'\] must .* got complex64"),
        ({"w": np.zeros(2, "M8[s]")}, None, ValueError, r"arrays\['w'\] must .* got datetime64"),
        ({"w": [[1], [2, 3]]}, None, ValueError, r"arrays\['w'\]: "),
        ({"__metadata__": an_array()}, None, ValueError, "'__metadata__' cannot be the name"),
        ({"": an_array()}, None, ValueError, "'' cannot be the name"),
        ({"a\0b": an_array()}, None, ValueError, "cannot be the name"),
        ({"a\nb": an_array()}, None, ValueError, "cannot be the name"),
        ({"\ud800": an_array()}, None, ValueError, "cannot be the name"),
        ({1: an_array()}, None, TypeError, "names of type str"),
        ({"w": an_array()}, {"rng": object()}, TypeError, "metadata: .*object"),
        ({"w": an_array()}, [1], TypeError, "metadata must be a mapping, got list"),
    ],
)
def test_invalid_content_is_refused(file, arrays, metadata, error, words):
    file.write_bytes(b"old")
    with pytest.raises(error, match=words):
        checkpoint.save(file, arrays, metadata)
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_metadata_that_contains_itself(file):
    metadata = {}
    metadata["self"] = metadata
    with pytest.raises(ValueError, match="metadata: Circular"):
        checkpoint.save(file, {}, metadata)


@pytest.mark.parametrize("name", ["net", "net.pkl", "net.npz", "net.safetensors.gz", ".safetensors"])
def test_wrong_suffix_of_a_file_to_save(tmp_path, name):
    with pytest.raises(ValueError, match=r"path must be a file name ending in \.safetensors, got "):
        checkpoint.save(tmp_path / name, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net", "net.pkl", "net.npz.gz", ".npz"])
def test_wrong_suffix_of_a_file_to_load(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"ending in \.safetensors or \.npz"):
        checkpoint.load(tmp_path / name)


def test_missing(tmp_path):
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(FileNotFoundError, match=f"none{suffix}"):
            checkpoint.load(tmp_path / f"none{suffix}")


# --- damaged files ----------------------------------------------------------------------------------------------------

CONTENT = {"0.weight": an_array(), "größe": np.array(7, np.int16)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    checkpoint.save(path, CONTENT, {"epoch": 1})
    return path.read_bytes()


@pytest.fixture(scope="module")
def saved_npz(tmp_path_factory):
    """As version 0.1 wrote it, and as np.savez does: metadata are a JSON array of bytes."""
    path = tmp_path_factory.mktemp("saved") / "net.npz"
    np.savez(path, größe=CONTENT["größe"], __metadata__=np.frombuffer(b'{"epoch": 1}', np.uint8))
    return path.read_bytes()


def test_truncated_anywhere(file, npz, saved, saved_npz):
    for path, data in ((file, saved), (npz, saved_npz)):
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(DamagedCheckpointError, match=rf"{path.name}: not a usable checkpoint: ."):
                checkpoint.load(path)


def test_extended(file, saved):
    file.write_bytes(saved + b"\0")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_every_bit_flipped(tmp_path, saved, saved_npz, suffix):
    """Refused, or intact where the bit is not content, such as a date.  In the key of our metadata it makes the file
    one of another program."""
    path, content = tmp_path / f"net{suffix}", dict(CONTENT)
    data = saved if suffix == ".safetensors" else saved_npz
    if suffix == ".npz":
        del content["0.weight"]
    key, refused = data.find(b'"tinycnn"'), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded, metadata = checkpoint.load(path)
        except DamagedCheckpointError:
            refused += 1
            continue
        foreign = suffix == ".safetensors" and key < bit // 8 < key + len("tinycnn") + 1
        assert metadata == ({} if foreign else {"epoch": 1}), bit
        assert_same({name: loaded.pop(name) for name in content}, content)
        assert not loaded
    assert refused > 0.5 * 8 * len(data)


@MANY
@given(st.data())
def test_damaged_in_places(tmp_path, saved, saved_npz, data):
    suffix, good = data.draw(st.sampled_from([(".safetensors", saved), (".npz", saved_npz)]))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        patch = data.draw(st.binary(max_size=6))
        damaged[at : at + data.draw(st.sampled_from([0, len(patch)]))] = patch
    path = tmp_path / f"net{suffix}"
    path.write_bytes(damaged)
    with contextlib.suppress(DamagedCheckpointError):  # no other exception
        checkpoint.load(path)


@MANY
@given(st.binary(), st.sampled_from([".safetensors", ".npz"]))
def test_arbitrary_bytes(tmp_path, data, suffix):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(path)


def with_header(header, body=b""):
    return struct.pack("<Q", len(header)) + header + body


def foreign(own):
    return with_header(json.dumps({"__metadata__": {"tinycnn": own}}).encode())


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 99 * MIB) + b"{}",
        with_header(b'{"w": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}', bytes(4)),
        with_header(b'{"w": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'),
        with_header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', bytes(4)),
        with_header(b"[" * 100_000),
        with_header(b'{"w": {"dtype": "' + b"x\\n" * 10_000 + b'"}}'),
        foreign("{"),
        foreign("[]"),
        foreign("7"),
        foreign("[" * 100_000),
        foreign('{"names": 1, "metadata": "{}", "sha256": ""}'),
        foreign('{"names": [[]], "metadata": "{}", "sha256": ""}'),
        foreign('{"names": [], "metadata": "\\ud800", "sha256": ""}'),
        foreign('{"names": [], "metadata": {}, "sha256": ""}'),
    ],
)
def test_hostile_safetensors(file, content):
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpoint.load(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert str(caught.value).splitlines() == [str(caught.value)]
    assert str(file) in str(caught.value)


def test_an_array_that_was_added(file, saved):
    """The checksum is of the arrays that our metadata names: a file must have no others."""
    size = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + size])
    header["added"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(saved) - 8 - size, len(saved) - 7 - size]}
    file.write_bytes(with_header(json.dumps(header).encode(), saved[8 + size :] + b"\1"))
    assert "added" in safetensors.load_file(file)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        checkpoint.load(file)


def test_metadata_that_is_not_a_mapping(file):
    own = {"metadata": "[1]", "names": [], "sha256": checkpoint._sha256({}, "[1]")}
    file.write_bytes(foreign(json.dumps(own)))
    with pytest.raises(DamagedCheckpointError, match="metadata is not a mapping"):
        checkpoint.load(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_memory_is_a_few_times_the_file(tmp_path, suffix):
    path, array = tmp_path / f"net{suffix}", np.zeros(4 * MIB, np.uint8)
    checkpoint.save(path, {"w": array}) if suffix == ".safetensors" else np.savez(path, w=array)
    tracemalloc.start()
    try:
        checkpoint.load(path)
        assert tracemalloc.get_traced_memory()[1] < 13 * MIB
    finally:
        tracemalloc.stop()


# --- npz --------------------------------------------------------------------------------------------------------------


def write_zip(file, members, **options):
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def npy(header, content=b"", version=b"\1\0"):
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header.encode() + content


def f4(shape, content=b""):
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n", content)


def test_files_of_numpy(npz):
    arrays = {"w": an_array().T, "strided": an_array()[:, ::2], "b": np.float64(2), "empty": np.zeros((0, 3))}
    np.savez(npz, **arrays)
    loaded, metadata = checkpoint.load(npz)
    assert_same(loaded, arrays)
    assert metadata == {}


def test_files_of_version_0_1(npz):
    """Its writer: npy version 1.0, a fixed date, metadata as the last member."""
    arrays = {"block/0.weight": an_array(), "größe": np.array(7, np.int16)}
    text = np.frombuffer(b'{"epoch": 3, "name": "LeNet \\u00e9"}', np.uint8)
    with zipfile.ZipFile(npz, "w") as archive:
        for name, array in (arrays | {"__metadata__": text}).items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, (1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), content.getvalue())
    loaded, metadata = checkpoint.load(npz)
    assert_same(loaded, arrays)
    assert metadata == {"epoch": 3, "name": "LeNet é"}


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


def test_pickles_are_never_opened(npz, file):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.array([Bomb()], object), allow_pickle=True)
    write_zip(npz, [("w.npy", content.getvalue())])
    with pytest.raises(DamagedCheckpointError, match="'w' must hold numbers, got dtype object"):
        checkpoint.load(npz)
    write_zip(npz, [("w", pickle.dumps(Bomb()))])
    with pytest.raises(DamagedCheckpointError, match="unexpected or repeated member 'w'"):
        checkpoint.load(npz)
    for path in (npz, file):
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DamagedCheckpointError):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f4("(1000000000, 1000)", bytes(16)), r"16 bytes, which do not fit shape \(1000000000, 1000\)"),
        (f4("(100000000,)", bytes(16)), "16 bytes, which do not fit"),
        (f4("(3,)", bytes(16)), "16 bytes, which do not fit"),
        (f4("(0, 9000000000000000000, 9000000000000000000)"), "."),
        (f4("(" + "1, " * 70 + ")", bytes(4)), "."),
        (f4("(-1, -4)", bytes(16)), "."),
        (f4("(-1,)", bytes(16)), "do not fit"),
        (f4("(True,)", bytes(4)), "."),
        (f4("(" * 2000), "."),
        (f4("(" + "9" * 6000 + ",)"), "."),
        (npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1,), }", bytes(3)), "."),
        (npy("{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", bytes(36)), "must hold numbers"),
        (npy("{'descr': ('<f4', (10000000,)), 'fortran_order': False, 'shape': (1,), }", bytes(4)), "numbers"),
        (npy("__import__('os')"), "."),
        (f4("(4,)", bytes(16))[:20], "."),
        (f4("(4,)", bytes(16))[:9], "."),
        (npy("", version=b"\x09\0"), "."),
        (b"", "."),
    ],
)
def test_hostile_arrays(npz, content, words):
    write_zip(npz, [("w.npy", content)])
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpointError, match=words):
            checkpoint.load(npz)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_npy_versions(npz):
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (1,2), }"
    content = np.array([1, 2], "<f4").tobytes()
    write_zip(npz, [(f"v{v}.npy", npy(header, content, version=bytes([v, 0]))) for v in (1, 2)])
    assert_same(checkpoint.load(npz)[0], {"v1": np.array([[1, 2]], "<f4"), "v2": np.array([[1, 2]], "<f4")})


def test_compressed_members_are_refused(npz):
    np.savez_compressed(npz, w=np.zeros(1_000_000))  # 8 MB in 8 kB
    with pytest.raises(DamagedCheckpointError, match=r"compressed \(as np\.savez_compressed does\)"):
        checkpoint.load(npz)


def test_members_that_share_bytes_are_refused(npz):
    """A zip bomb without compression: the directory names one member 100 times."""
    write_zip(npz, [("w.npy", f4("(1000,)", bytes(4000)))])
    with zipfile.ZipFile(npz, "a") as archive:
        for number in range(99):
            member = zipfile.ZipInfo(f"{number}.npy")
            member.header_offset, member.file_size = 0, archive.filelist[0].file_size
            member.compress_size, member.CRC = member.file_size, archive.filelist[0].CRC
            archive.filelist.append(member)
        archive._didModify = True
    with pytest.raises(DamagedCheckpointError, match="claim more bytes"):
        checkpoint.load(npz)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_members_are_refused(npz):
    write_zip(npz, [("w.npy", f4("()", bytes(4)))] * 2)
    with pytest.raises(DamagedCheckpointError, match=r"repeated member 'w\.npy'"):
        checkpoint.load(npz)


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_metadata(npz, text):
    np.savez(npz, __metadata__=np.frombuffer(text, np.uint8))
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(npz)


# --- not a file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_other_things_than_files_are_refused(tmp_path, suffix):
    """None of them is opened: a pipe would wait for its writer, a device might never end."""
    folder, device, big = (tmp_path / f"{name}{suffix}" for name in ("folder", "device", "big"))
    folder.mkdir()
    with pytest.raises(ValueError, match=f"folder{suffix}: expected a regular file, got a folder"):
        checkpoint.load(folder)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        device.symlink_to("/dev/zero")
        for path in (tmp_path / f"pipe{suffix}", device):
            with pytest.raises(ValueError, match=f"{path.name}: expected a regular file, got a (named pipe|device)"):
                checkpoint.load(path)
    big.touch()
    os.truncate(big, 64 << 30)  # sparse
    with pytest.raises(ValueError, match=f"big{suffix}: expected at most 4,294,967,296 bytes, got 68,719,476,736"):
        checkpoint.load(big)
