"""Files are replaced as a whole or not at all, an error names the file that was asked for, reading has limits."""

import errno
import io
import os
import tracemalloc

import pytest

from tinycnn import _files
from tinycnn._files import atomic_write, read_bytes, read_json, remove_partial_files


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    return path


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def assert_untouched(file):
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_file_and_folder_are_on_the_disk(file, monkeypatch):
    """The file is synced, complete, before it replaces the old one; the folder is synced afterwards."""
    steps, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        status = os.fstat(descriptor)
        is_folder = os.path.samestat(status, file.parent.stat())
        steps.append("fsync folder" if is_folder else f"fsync {status.st_size} bytes")
        fsync(descriptor)

    def record_replace(source, target):
        steps.append("replace")
        assert source.parent == file.parent
        assert target == file
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(file, bytes(100_000))
    assert steps == ["fsync 100000 bytes", "replace", *(["fsync folder"] if os.name == "posix" else [])]
    assert file.read_bytes() == bytes(100_000)


def test_a_folder_that_cannot_be_synced(file, monkeypatch):
    fsync, seen = os.fsync, []

    def fail_on_folders(descriptor):
        if os.path.samestat(os.fstat(descriptor), file.parent.stat()):
            seen.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    write(file)
    assert file.read_bytes() == b"new"
    with pytest.raises(OSError, match="Bad file descriptor"):  # closed
        os.fstat(seen[0])


class Failing(io.FileIO):
    """A disk that is full at one of the steps."""

    step = error = None

    def write(self, data):
        if self.step == "write":
            raise self.error
        return super().write(data)

    def close(self):
        closed = self.closed
        super().close()
        if self.step == "close" and not closed:
            raise self.error


@pytest.mark.parametrize("step", ["write", "fsync", "close", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EACCES])
def test_an_error_of_the_disk_names_the_file(file, monkeypatch, step, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    if step in ("fsync", "replace"):
        monkeypatch.setattr(os, step, fail)
    else:
        Failing.step, Failing.error = step, OSError(number, os.strerror(number))
        monkeypatch.setattr(_files.Path, "open", lambda path, mode: io.BufferedWriter(Failing(path, mode)))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write(file)
    monkeypatch.undo()
    assert str(caught.value).endswith(f": {str(file)!r}")
    assert (caught.value.errno, caught.value.filename) == (number, str(file))
    assert isinstance(caught.value, PermissionError) == (number == errno.EACCES)
    assert_untouched(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a limit on the size of files")
def test_a_file_beyond_the_limit_of_the_process(file):
    import resource
    import signal

    previous, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous[1]))
        with pytest.raises(OSError, match=r"File too large: '.*a\.txt'"):
            write(file, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert_untouched(file)


class OwnError(OSError):
    """With another signature than OSError's."""

    def __init__(self, text):
        super().__init__(text)


@pytest.mark.parametrize(
    "error",
    [OSError("no number"), OwnError("x"), FileNotFoundError(2, "No", "input.txt"), ValueError(), KeyboardInterrupt()],
)
def test_other_errors_in_the_block_are_raised_as_they_are(file, error):
    def write_and_fail():
        with atomic_write(file) as opened:
            opened.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        write_and_fail()
    assert caught.value is error
    assert_untouched(file)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted(file, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(file)
    assert_untouched(file)


def test_targets_that_cannot_be_replaced(file):
    (file.parent / "folder").mkdir()
    with pytest.raises(OSError, match=r": '.*folder'$"):
        write(file.parent / "folder")
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist: '.*none/a\.txt'$"):
        write(file.parent / "none" / "a.txt")
    with pytest.raises(NotADirectoryError, match=r"a\.txt/b'$"):
        write(file / "b")
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.txt", "folder"]


def test_partial_files_are_removed(tmp_path):
    def leave(name, digits="0123456789abcdef"):
        path = tmp_path / f".{name}.{digits}.part"
        path.touch()
        return path

    ours = [leave("a.txt"), leave("[b].txt")]
    others = [tmp_path / "a.txt", leave("a.txt", "download"), leave("a.txt.1", "2"), tmp_path / "0123456789abcdef.part"]
    for path in others:
        path.touch()
    folder = tmp_path / ".c.0123456789abcdef.part"
    folder.mkdir()
    remove_partial_files(tmp_path, "[b].txt")
    assert [path.exists() for path in ours] == [True, False]
    remove_partial_files(tmp_path, "a.tx")
    assert ours[0].exists()
    remove_partial_files(tmp_path)
    assert not ours[0].exists()
    assert all(path.exists() for path in [*others, folder])


def test_what_atomic_write_leaves_when_it_is_killed_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_files.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(ValueError, match="killed"), atomic_write(tmp_path / "a.txt"):
        raise ValueError("killed")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    remove_partial_files(tmp_path, "a.txt")
    assert not list(tmp_path.iterdir())


def test_read_bytes(file):
    tracemalloc.start()
    try:
        assert read_bytes(file) == b"old"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # not the 4 GiB that a file may have
    finally:
        tracemalloc.stop()
    assert read_bytes(file, 3) == b"old"
    with pytest.raises(ValueError, match=r"a\.txt: expected at most 2 bytes, got 3"):
        read_bytes(file, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "Expecting"),
        (b"\xff", "utf-8"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_read_json(file, text, words):
    file.write_bytes(text)
    with pytest.raises(ValueError, match=words):
        read_json(file)
