"""Where compiled kernels are kept from process to process: Numba's folders, with files of our own.

Numba's files hold what the source file of a kernel gave.  Here an entry belongs to all kernel sources of the package,
since kernels are compiled into one another.  It carries a checksum, as a power cut can leave half a file.  And where no
folder can be written, kernels are compiled in every process, which is said once.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from tinycnn._streams import print_stderr

PACKAGE = Path(__file__).resolve().parents[1]
# What runs as Python beside the kernels, and is in none of them.
NOT_KERNELS = {"__init__.py", "_precompile.py", "_cache.py", "_capture.py", "_threads.py"}
CHECKSUM = 4  # bytes in front of an entry
ADVICE = "set NUMBA_CACHE_DIR to a folder that can be written"


@functools.cache
def stamp(folder):
    """A hash of all sources that kernels in a file of `folder` may be made of; "" where they are not files."""
    sources = {path for place in (PACKAGE / "kernels", folder) for path in place.glob("*.py")}
    sources = {path for path in sources if path.name not in NOT_KERNELS} | {PACKAGE / "scalars.py"}
    digest = hashlib.sha256()
    try:
        for path in sorted(sources):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return ""
    return digest.hexdigest()


@functools.cache
def note_once(text):
    print_stderr(f"tinycnn: {text}")


class CacheEntries:
    """The entries of one kernel, a file for each signature and processor: the interface of Numba's IndexDataCacheFile.

    A file holds a checksum and the pickled (stamp, key, data), where data is pickled too: what another version of the
    package has left is not looked at.
    """

    def __init__(self, folder, name, stamp, dump):
        self.folder, self.name, self.stamp, self.dump = Path(folder), name, stamp, dump

    def path(self, key):
        """The name tells signature and processor, but not the third part of a key: hashes of code, as the stamp."""
        named = repr((*key[:2], *key[3:]))
        return self.folder / f"{self.name}.{hashlib.sha256(named.encode()).hexdigest()[:16]}.kernel"

    def load(self, key):
        """The data of a key, or None."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            if zlib.crc32(content[CHECKSUM:]).to_bytes(CHECKSUM, "little") != content[:CHECKSUM]:
                raise ValueError("checksum")
            stamp, whole_key, data = pickle.loads(content[CHECKSUM:])
            return pickle.loads(data) if (stamp, whole_key) == (self.stamp, key) else None
        except Exception:  # bytes may be anything, and so may what they provoke in pickle
            self.damaged(key)
            return None

    def damaged(self, key):
        """Remove the file of a key, and say so."""
        print_stderr(f"tinycnn: the compiled kernel in {self.path(key)} is damaged; it is removed and compiled anew")
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def save(self, key, data):
        """Write an entry, completely or not at all; OSError if it cannot be written."""
        content = self.dump((self.stamp, key, self.dump(data)))
        path = self.path(key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(zlib.crc32(content).to_bytes(CHECKSUM, "little") + content)
            os.replace(temporary, path)  # noqa: PTH105 (Path.replace keeps its own reference to it in Python 3.10)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def flush(self):
        """Remove all entries."""
        for path in self.folder.glob(f"{self.name}.*.kernel"):
            path.unlink()


def _reading(locator):
    """A locator that is content with a folder that can be read."""

    def ensure_cache_path(self):
        if not os.path.isdir(self.get_cache_path()):  # noqa: PTH112 (what Numba gives is text)
            raise FileNotFoundError(self.get_cache_path())

    return type(f"Reading{locator.__name__}", (locator,), {"ensure_cache_path": ensure_cache_path})


@functools.cache
def _kept(base):
    """A class like `base`, Numba's cache of functions or numba-cuda's, whose entries are `CacheEntries`."""
    where = base._impl_class._locator_classes
    implementation = type(
        "Implementation", (base._impl_class,), {"_locator_classes": [*where, *map(_reading, where)]}
    )  # fmt: skip

    class Kept(base):  # type: ignore[misc, valid-type]
        _impl_class = implementation
        _cache_file: Any

        def __init__(self, function):
            super().__init__(function)
            theirs = self._cache_file
            about = (
                f"{stamp(Path(inspect.getfile(function)).resolve().parent) or theirs._source_stamp!r} {theirs._version}"
            )
            self._cache_file = CacheEntries(self._cache_path, self._impl.filename_base, about, theirs._dump)

        def load_overload(self, sig, target_context):
            try:
                return super().load_overload(sig, target_context)
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception:  # it was whole, but is no code of this processor and this Numba
                self._cache_file.damaged(self._index_key(sig, target_context.codegen()))
                return None

        def save_overload(self, sig, data):
            try:
                super().save_overload(sig, data)
            except OSError as error:
                note_once(f"compiled kernels cannot be kept in {self._cache_path} ({error.strerror}): {ADVICE}")
                self.disable()

    return Kept


def enable_cache(dispatcher, base=FunctionCache):
    """Keep what `dispatcher` compiles in a cache like `base`; returns it.  Where there is no folder for it, it is not
    kept, and that is said."""
    if hasattr(dispatcher, "_cache"):  # with NUMBA_DISABLE_JIT it is the function itself
        try:
            dispatcher._cache = _kept(base)(dispatcher.py_func)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            note_once(f"there is no folder to keep compiled kernels in, so every start compiles them: {ADVICE}")
    return dispatcher


def is_cached(dispatcher):
    """Whether other processes find what this one compiles."""
    return dispatcher._cache.cache_path is not None and getattr(dispatcher._cache, "_enabled", False)
