"""Data sets: search, refusal and download. The mirrors are a server in a thread."""

import contextlib
import gzip
import hashlib
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tinycnn.data import DamagedFileError, Dataset, DataUnavailableError, _fetch, _http, datasets, load, mnist
from tinycnn.data._fetch import FILES, Source
from tinycnn.data._http import Pace
from tinycnn.data.idx import write_idx

SHAPES = ((20, 28, 28), (20,), (10, 28, 28), (10,))
CLOSED = "http://127.0.0.1:1/"  # no server listens here


def write_files(folder, seed, suffix=".gz", dot=False):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in zip(FILES, SHAPES, strict=True):
        name = name.replace("-idx", ".idx") if dot else name
        write_idx(folder / f"{name}{suffix}", rng.integers(0, 10, shape, dtype=np.uint8))
    return folder


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Small replacements of MNIST (seed 0) and Fashion-MNIST (seed 1), an empty cache, no mirror."""
    monkeypatch.delenv("TINYCNN_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(_fetch, "_SHAPES", SHAPES)
    originals = [write_files(tmp_path / "originals" / str(seed), seed) for seed in (0, 1)]
    zipped = [[(folder / f"{name}.gz").read_bytes() for name in FILES] for folder in originals]
    sha = tuple(hashlib.sha256(gzip.decompress(content)).hexdigest() for content in zipped[0])
    md5 = tuple(hashlib.md5(content).hexdigest() for content in zipped[1])
    digits = Source("MNIST", ("mnist", "MNIST/raw"), "sha256", sha, (CLOSED,))
    clothes = Source("Fashion-MNIST", ("fashion-mnist", "FashionMNIST/raw"), "md5", md5, (CLOSED,))
    monkeypatch.setattr(_fetch, "_SOURCES", (digits, clothes))
    monkeypatch.setattr(datasets, "MNIST", digits)
    monkeypatch.setattr(datasets, "FASHION_MNIST", clothes)
    return tmp_path


@pytest.fixture
def server(sources, monkeypatch):
    """Serve /good/, /other/ (Fashion-MNIST), /short/, /mute/, /gone/, /drip/, /drip-header/ (a byte at a time, without
    end) and /continue/ (HTTP 100, without end); returns a function that sets the mirrors."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            _, kind, name = self.path.split("/")
            requests.append(f"{kind}/{name}")
            if kind == "mute":
                time.sleep(0.6)
                return
            if kind == "gone":
                self.send_error(404)
                return
            if kind in ENDLESS:
                start, piece, pause = ENDLESS[kind]
                with contextlib.suppress(OSError):  # the client has given up
                    self.wfile.write(start)
                    while True:
                        self.wfile.write(piece)
                        time.sleep(pause)
            if kind in RESPONSES:
                self.wfile.write(RESPONSES[kind])
                return
            body = (sources / "originals" / ("1" if kind == "other" else "0") / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if kind == "short" else body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def mirrors(*kinds):
        addresses = [CLOSED if k == "down" else f"http://127.0.0.1:{http.server_port}/{k}/" for k in kinds]
        monkeypatch.setattr(datasets, "MNIST", replace(datasets.MNIST, mirrors=tuple(addresses)))
        return requests

    yield mirrors
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def second_a_read(monkeypatch):
    """A clock that advances a second each time that bytes come: no test waits."""
    monkeypatch.setattr(_http, "Pace", lambda *limits: Pace(*limits, clock=iter(range(10**9)).__next__))


def cached():
    folder = _fetch.cache_folder()
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


RESPONSES = {  # raw
    "long": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: https://[::1\r\n\r\n",
    "host": b"HTTP/1.1 302 Found\r\nLocation: http://" + b"a" * 100 + b".example/\r\n\r\n",
    "port": b"HTTP/1.1 302 Found\r\nLocation: http://localhost:port/\r\n\r\n",
    "colour": b"HTTP/1.1 500 \x1b[31mred\x1b[0m\x07\r\n\r\n",
    "chatty": b"HTTP/1.1 500 " + b"very " * 2000 + b"\r\n\r\n",
    "noise": bytes(range(128, 256)) * 3,
}


ENDLESS = {  # start, what is repeated, pause in seconds
    "drip": (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"x", 0.001),
    "drip-header": (b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.001),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0),
}


IN_CACHE = sorted(f"mnist/{name}.gz" for name in FILES)


# ---- search


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("given", ["environment", "data_dir", "cache"])
def test_files_are_found(sources, monkeypatch, given, place, suffix):
    root = _fetch.cache_folder() if given == "cache" else sources / "data"
    write_files(root / place, 0, suffix)
    if given == "environment":
        monkeypatch.setenv("TINYCNN_DATA", str(root))
    data = mnist(root if given == "data_dir" else None, download=False)
    assert data.name == "mnist"
    assert data.train_images.shape == SHAPES[0]
    assert data.test_labels.dtype == np.int64
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_with_a_dot_in_their_names(sources, suffix):
    write_files(sources / "mine", 0, suffix, dot=True)
    assert len(mnist(sources / "mine", download=False).train_images) == 20


def test_the_environment_comes_before_data_dir(sources, monkeypatch):
    monkeypatch.setenv("TINYCNN_DATA", str(write_files(sources / "first", 0)))
    write_files(sources / "second" / "mnist", 5)  # of unknown content
    assert mnist(sources / "second", download=False).name == "mnist"


def test_files_of_another_data_set_are_skipped(sources):
    folder = write_files(sources / "data", 1)
    assert datasets.fashion_mnist(folder, download=False).classes[0] == "T-shirt/top"
    with pytest.raises(DataUnavailableError, match=r"train-images-idx3-ubyte\.gz is of Fashion-MNIST"):
        mnist(folder, download=False)
    write_files(folder / "mnist", 0)
    assert mnist(folder, download=False).sha256 != datasets.fashion_mnist(folder, download=False).sha256


def test_plain_files_without_a_hash(sources):
    folder = write_files(sources / "data", 1, suffix="")
    with pytest.raises(DataUnavailableError, match=r"put it in fashion-mnist/"):
        datasets.fashion_mnist(folder, download=False)
    write_files(folder / "fashion-mnist", 1, suffix="")
    assert datasets.fashion_mnist(folder, download=False).name == "fashion"
    write_idx(folder / "fashion-mnist" / FILES[1], np.full(20, 10, np.uint8))
    with pytest.raises(DamagedFileError, match="expected labels 0 to 9, found 10"):
        datasets.fashion_mnist(folder, download=False)
    write_idx(folder / "fashion-mnist" / FILES[0], np.zeros((20, 28, 27), np.uint8))
    with pytest.raises(DamagedFileError, match="expected shape"):
        datasets.fashion_mnist(folder, download=False)


@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("damage", ["other bits", "cut gzip", "cut plain", "empty"])
def test_a_damaged_file_of_the_user_is_refused_and_kept(sources, server, damage, place):
    requests = server("good")
    suffix = ".gz" if damage == "cut gzip" else ""
    path = write_files(sources / "data" / place, 0, suffix) / f"{FILES[2]}{suffix}"
    good = path.read_bytes()
    bad = {"other bits": good[:-1] + b"\xff", "empty": b""}.get(damage, good[:-20])
    path.write_bytes(bad)
    with pytest.raises(DamagedFileError) as caught:
        mnist(sources / "data")
    expected = datasets.MNIST.hashes[2]
    found = hashlib.md5(bad).hexdigest() if damage == "cut gzip" else hashlib.sha256(bad).hexdigest()
    assert all(part in str(caught.value) for part in (str(path), expected, found))
    assert path.read_bytes() == bad
    assert requests == []
    with pytest.raises(DamagedFileError):
        load("auto", sources / "data")


def test_a_wrong_md5_is_refused(sources):
    path = write_files(sources / "data" / "fashion-mnist", 7) / f"{FILES[0]}.gz"
    found = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(
        DamagedFileError, match=f"md5 of the gzip file {datasets.FASHION_MNIST.hashes[0]}, found {found}"
    ):
        datasets.fashion_mnist(sources / "data", download=False)


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "bomb"])
def test_what_is_no_file_of_digits_is_not_read(sources, server, monkeypatch, kind):
    requests = server("good")
    path = write_files(sources / "data", 0) / f"{FILES[0]}.gz"
    path.unlink()

    def place(path):
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(2**36)
        else:
            with gzip.open(path, "wb", 1) as file:
                for _ in range(64):
                    file.write(bytes(2**20))

    monkeypatch.setattr(_fetch, "_MAX_BYTES", 10**6)
    place(path)
    expected = {
        "pipe": "expected a regular file, got a named pipe",
        "device": "expected a regular file, got a device",
        "sparse": "expected at most 1,000,000 bytes, got 68,719,476,736",
        "bomb": "expected sha256",
    }
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match=f"{path}: {expected[kind]}"):
        mnist(sources / "data")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert requests == []

    in_cache = write_files(_fetch.cache_folder() / "mnist", 0) / f"{FILES[0]}.gz"
    in_cache.unlink()
    place(in_cache)
    mnist()
    assert requests == [f"good/{FILES[0]}.gz"]
    assert in_cache.is_file()


def test_a_folder_named_like_a_file_is_skipped(sources):
    folder = write_files(sources / "data", 0, suffix="", dot=True)  # as Kaggle has MNIST
    for name in FILES:
        (folder / name).mkdir()
    assert mnist(folder, download=False).name == "mnist"


def test_a_file_that_another_process_deletes(sources, monkeypatch):
    folder = write_files(sources / "data", 0)
    monkeypatch.setattr(_fetch, "open_regular", lambda path, _: path.with_name("deleted").open("rb"))
    with pytest.raises(DataUnavailableError, match=rf"Not used: {folder}: without train-images-idx3-ubyte\.gz"):
        mnist(folder, download=False)


# ---- downloading


def test_download_into_the_cache_once(server, capsys):
    requests = server("good")
    first = mnist()
    assert cached() == IN_CACHE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{FILES[0]}.gz" in captured.err
    assert mnist().sha256 == first.sha256
    assert len(requests) == 4


def test_download_into_data_dir(sources, server):
    server("good")
    mnist(sources / "mine")
    assert sorted(p.name for p in (sources / "mine" / "mnist").iterdir()) == sorted(f"{n}.gz" for n in FILES)
    assert cached() == []


@pytest.mark.parametrize("bad", ["down", "mute", "gone", "other", "short", *RESPONSES, *ENDLESS])
def test_the_next_mirror_is_tried(server, second_a_read, monkeypatch, bad):
    monkeypatch.setattr(_fetch, "_TIMEOUT", 0.3)
    monkeypatch.setattr(_fetch, "_MAX_BYTES", 10**5)
    requests = server(bad, "good")
    mnist()
    assert cached() == IN_CACHE
    assert len(requests) == (4 if bad == "down" else 5)  # a mirror that worked stays first


def test_only_what_is_missing_or_damaged_in_the_cache_is_downloaded(sources, server):
    folder = write_files(_fetch.cache_folder() / "mnist", 0)
    (folder / f"{FILES[0]}.gz").unlink()
    (folder / f"{FILES[1]}.gz").write_bytes(b"damaged")
    requests = server("good")
    mnist()
    assert requests == [f"good/{FILES[0]}.gz", f"good/{FILES[1]}.gz"]


def test_the_error_lists_everything_that_was_tried(sources, server, monkeypatch):
    server("down", "gone", "other", "short")
    monkeypatch.setenv("TINYCNN_DATA", str(sources / "first"))
    with pytest.raises(DataUnavailableError) as caught:
        mnist(sources / "second")
    what, remedy = str(caught.value).splitlines()
    hosts = ["Connection refused", "HTTP 404 Not Found", "has another file", "cut short: expected"]
    assert what.startswith("MNIST is not available: " + "; ".join(f"127.0.0.1: {reason}" for reason in hosts))
    names = ", ".join(f"{name}.gz" for name in FILES)
    target = sources / "second" / "mnist"
    assert remedy == f"Put {names} in {target}, or in any folder and set TINYCNN_DATA to it."
    lines = caught.value.details.splitlines()
    for folder in (sources / "first", sources / "second", _fetch.cache_folder()):
        for place in (folder / "mnist", folder / "MNIST/raw", folder):
            assert f"  {place}: no such folder" in lines
    reasons = ["refused", "HTTP 404", "expected sha256", "cut short"]
    for mirror, reason in zip(datasets.MNIST.mirrors, reasons, strict=True):
        assert any(line.startswith(f"  {mirror}{FILES[0]}.gz: ") and reason in line for line in lines), (mirror, lines)
    assert lines[-4:] == [f"  {mirror}" for mirror in datasets.MNIST.mirrors]
    assert "\n" not in caught.value.reason
    assert "HTTP 404" in caught.value.reason
    assert isinstance(caught.value, OSError)
    assert list((sources / "second" / "mnist").iterdir()) == []


@pytest.mark.parametrize("bad", RESPONSES)
def test_a_response_is_quoted_in_one_short_line(server, bad):
    server(bad)
    with pytest.raises(DataUnavailableError) as caught:
        mnist()
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 600
    assert "127.0.0.1: " in caught.value.reason


def test_download_can_be_switched_off(server):
    requests = server("good")
    with pytest.raises(DataUnavailableError) as caught:
        mnist(download=False)
    assert "download=False" in caught.value.reason
    assert requests == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("where", ["data._fetch._transfer", "_files.os.fsync"])
def test_an_interruption_leaves_no_partial_file(server, monkeypatch, where, interruption):
    server("good")

    def interrupted(*_):
        raise interruption

    monkeypatch.setattr(f"tinycnn.{where}", interrupted)
    expected = KeyboardInterrupt if interruption is KeyboardInterrupt else DataUnavailableError
    with pytest.raises(expected) as caught:
        mnist()
    assert cached() == []
    if expected is DataUnavailableError:
        assert "disk full" in caught.value.reason


def test_an_endless_response_is_cut_off(server, monkeypatch):
    server("good")
    monkeypatch.setattr(_fetch, "_MAX_BYTES", 1000)
    with pytest.raises(DataUnavailableError, match="expected at most 1000 bytes"):
        mnist()


def test_the_reason_of_a_slow_mirror(server, second_a_read):
    server("drip", "drip-header")
    with pytest.raises(DataUnavailableError, match=r"(.*127\.0\.0\.1: too slow: [0-9]+ bytes in 30 seconds){2}"):
        mnist()
    assert cached() == []


def test_the_pace_is_that_of_each_window():
    now = 100.0
    pace = Pace(30, 1000, 5000, clock=lambda: now)
    for _ in range(4):
        now += 29
        pace.add(0)
        now += 1
        pace.add(1000)
    now += 29
    pace.add(999)
    now += 2
    with pytest.raises(TimeoutError, match="too slow: 999 bytes in 31 seconds"):
        pace.add(0)
    with pytest.raises(OSError, match="expected at most 5000 bytes, got more"):
        pace.add(2)


def test_temporary_files_of_killed_processes_are_removed(server, monkeypatch):
    server("good")
    folder = _fetch.cache_folder() / "mnist"
    folder.mkdir(parents=True)
    old, young, other = (f".{FILES[0]}.gz.0.part", f".{FILES[0]}.gz.1.part", ".notes.part")
    for name in (old, young, other):
        (folder / name).write_bytes(b"x")
    for name in (old, other):
        os.utime(folder / name, (0, time.time() - 25 * 60 * 60))
    mnist()
    assert cached() == sorted([*IN_CACHE, f"mnist/{young}", f"mnist/{other}"])

    def deleted(path):
        raise FileNotFoundError

    (folder / f"{FILES[0]}.gz").unlink()
    os.utime(folder / young, (0, 0))
    monkeypatch.setattr(type(folder), "unlink", deleted)  # as if another process had been faster
    mnist()


# ---- the real sources


def test_real_sources_are_encrypted_and_complete():
    for source in _fetch._SOURCES:
        assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in source.mirrors)
        assert len(set(source.hashes)) == 4
        assert {len(h) for h in source.hashes} == {64 if source.algorithm == "sha256" else 32}


def test_cache_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(_fetch.cache_folder()) == "/home/user/Library/Caches/tinycnn"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(_fetch.cache_folder()) == "/elsewhere/tinycnn"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert str(_fetch.cache_folder()) == "/home/user/.cache/tinycnn"


def test_real_mnist():
    if not os.environ.get("TINYCNN_DATA"):
        pytest.skip("TINYCNN_DATA does not name a folder with MNIST")
    try:
        data = mnist(download=False)
    except DataUnavailableError as error:
        pytest.skip(error.reason)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(data.train_labels).tolist() == counts
    assert abs(data.train_images.mean() / 255 - 0.1307) < 1e-4
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]


# ---- load, Dataset, split


def test_auto_falls_back_with_two_lines(sources, monkeypatch):
    original = datasets.synthetic_dataset
    monkeypatch.setattr(datasets, "synthetic_dataset", lambda: original(20, 10))
    messages = []
    data = load("auto", on_message=messages.append)
    assert data.name == "synthetic"
    assert len(messages) == 2
    assert not any("\n" in message for message in messages)
    assert "127.0.0.1" in messages[0]
    assert "synthetic" in messages[1]
    assert "TINYCNN_DATA" in messages[1]
    assert load("synthetic").sha256 == data.sha256
    with pytest.raises(DataUnavailableError):
        load("mnist")


def test_auto_is_silent_when_mnist_is_found(sources):
    write_files(sources / "data", 0)
    assert load("auto", sources / "data", on_message=pytest.fail).name == "mnist"
    assert load("mnist", sources / "data").name == "mnist"


def test_load_lists_its_names():
    with pytest.raises(ValueError, match="auto, mnist, fashion, kmnist or synthetic, got 'cifar'"):
        load("cifar")


def fields(**changes):
    images, labels = np.zeros((4, 28, 28), np.uint8), np.arange(4)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:2], "test_labels": labels[:2]}
    return {"name": "x", "classes": ("a", "b", "c", "d"), **arrays, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_images": [1]}, TypeError, "train_images must be a NumPy array, got list"),
        (
            {"train_images": np.zeros((4, 28, 28))},
            TypeError,
            "train_images must have dtype uint8, got float64",
        ),
        (
            {"train_images": np.zeros((4, 784), np.uint8)},
            ValueError,
            r"train_images must have shape \(N, H, W\) or \(N, C, H, W\), got \(4, 784\)",
        ),
        (
            {"train_images": np.zeros((4, 0, 28), np.uint8)},
            ValueError,
            r"train_images must have shape \(N, H, W\) or \(N, C, H, W\), got \(4, 0, 28\)",
        ),
        (
            {"test_images": np.zeros((2, 1, 28, 28), np.uint8)},
            ValueError,
            r"test_images must have shape \(N, 28, 28\), as train_images have, got \(2, 1",
        ),
        (
            {"test_labels": np.zeros(3, np.int64)},
            ValueError,
            r"test_labels must have shape \(2,\), got \(3,\)",
        ),
        ({"test_labels": np.zeros(2, np.uint8)}, TypeError, "test_labels must have dtype int64, got uint8"),
        ({"train_labels": np.arange(1, 5)}, ValueError, "train_labels must be 0 to 3, got 1 to 4"),
        ({"train_labels": np.arange(4) - 1}, ValueError, "train_labels must be 0 to 3, got -1 to 2"),
        ({"classes": ["a"]}, TypeError, "classes must be a tuple"),
        ({"classes": ()}, ValueError, "classes must have at least one"),
    ],
)
def test_a_data_set_is_checked(changes, error, message):
    with pytest.raises(error, match=message):
        Dataset(**fields(**changes))


@pytest.mark.parametrize("size", [(5, 7), (3, 5, 7)])
def test_images_of_any_size(size):
    images = {"train_images": np.zeros((4, *size), np.uint8), "test_images": np.zeros((2, *size), np.uint8)}
    assert Dataset(**fields(**images)).test_images.shape == (2, *size)


def test_the_hash_is_of_the_content():
    # The hash is part of results: this one must not change.
    assert Dataset(**fields()).sha256 == "25b4cfc2d56b5d8b335a8cd227c6c02c0b63e7f356f6e96d4e1476ce62247396"
    data = Dataset(**fields())
    assert data.sha256 == Dataset(**fields(name="y")).sha256
    assert len(data.sha256) == 64
    strided = np.zeros((4, 28, 56), np.uint8)[:, :, ::2]
    assert data.sha256 == Dataset(**fields(train_images=strided)).sha256
    changed = fields()["train_images"].copy()
    changed[3, 27, 27] = 1
    assert data.sha256 != Dataset(**fields(train_images=changed)).sha256
    with pytest.raises(AttributeError):
        data.name = "z"


@pytest.mark.parametrize(("n", "n_val"), [(10, 3), (1, 0), (1000, 999)])
def test_split(n, n_val):
    train, val = datasets.train_val_split(n, n_val, rng=0)
    assert train.dtype == val.dtype == np.int64
    assert len(val) == n_val
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(val, np.sort(val))
    assert np.array_equal(val, datasets.train_val_split(n, n_val, rng=0)[1])


@pytest.mark.parametrize(
    ("n", "n_val", "error", "message"),
    [(0, 0, ValueError, "n must be"), (5, 5, ValueError, "n_val must be"), (5, -1, ValueError, "n_val must be"),
     (5.0, 1, TypeError, "n must be"), (5, True, TypeError, "n_val must be")],
)  # fmt: skip
def test_split_arguments_are_checked(n, n_val, error, message):
    with pytest.raises(error, match=message):
        datasets.train_val_split(n, n_val, rng=0)


def test_the_import_is_light():
    slow = {"numba", "matplotlib", "tqdm", "urllib.request"}
    code = f"import sys, tinycnn.data; print({slow} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
