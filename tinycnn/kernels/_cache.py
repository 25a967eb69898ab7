"""The disk cache of compiled kernels: in Numba's folders, with our own file format.

Numba invalidates an entry when the source file of its kernel changes.  Here any change in the package's
kernel sources does, since kernels are compiled into one another.  Entries have a checksum, as a power cut can leave
half a file.  If no folder is writable, every process compiles its kernels, and a note is printed once.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from tinycnn._streams import print_stderr

PACKAGE = Path(__file__).resolve().parents[1]
# Files beside the kernels that run as Python and are compiled into none of them.
NOT_KERNELS = {"__init__.py", "_precompile.py", "_cache.py", "_capture.py", "_threads.py"}
CHECKSUM = 4  # bytes at the start of an entry
ADVICE = "set NUMBA_CACHE_DIR to a folder that can be written"


@functools.cache
def source_hash(folder: Path) -> str:
    """A hash of all sources that are compiled into kernels in `folder`; "" if they are not files."""
    sources = {path for parent in (PACKAGE / "kernels", folder) for path in parent.glob("*.py")}
    sources = {path for path in sources if path.name not in NOT_KERNELS} | {PACKAGE / "scalars.py"}
    digest = hashlib.sha256()
    try:
        for path in sorted(sources):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return ""
    return digest.hexdigest()


@functools.cache
def note_once(text: str) -> None:
    print_stderr(f"tinycnn: {text}")


class CacheEntries:
    """The entries of one kernel, a file for each signature and processor; has the interface of Numba's
    IndexDataCacheFile.

    A file holds a checksum and the pickled (version, key, data).  data is pickled separately, so that entries of other
    versions of the package are not unpickled.
    """

    def __init__(self, folder: str, name: str, version: str, dump: Callable[[Any], bytes]) -> None:
        self.folder, self.name, self.version, self.dump = Path(folder), name, version, dump

    def path(self, key: Any) -> Path:
        """Named after signature and processor, not after key[2], Numba's hashes of the code: `version` covers them."""
        digest = hashlib.sha256(repr((*key[:2], *key[3:])).encode()).hexdigest()
        return self.folder / f"{self.name}.{digest[:16]}.kernel"

    def read(self, key: Any) -> bytes | None:
        """The pickled data of a key, or None."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            if zlib.crc32(content[CHECKSUM:]).to_bytes(CHECKSUM, "little") != content[:CHECKSUM]:
                raise ValueError("checksum")
            version, entry_key, data = pickle.loads(content[CHECKSUM:])
            return data if (version, entry_key) == (self.version, key) else None
        except Exception:  # damaged bytes can raise anything in pickle
            self.discard(key)
            return None

    def load(self, key: Any) -> Any:
        """The data of a key, or None."""
        data = self.read(key)
        try:
            return None if data is None else pickle.loads(data)
        except Exception:
            self.discard(key)
            return None

    def discard(self, key: Any) -> None:
        """Remove the damaged file of a key, with a note."""
        print_stderr(f"tinycnn: the compiled kernel in {self.path(key)} is damaged; it is removed and compiled anew")
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def save(self, key: Any, data: Any) -> None:
        """Write an entry, completely or not at all; OSError if it cannot be written."""
        content = self.dump((self.version, key, self.dump(data)))
        path = self.path(key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(zlib.crc32(content).to_bytes(CHECKSUM, "little") + content)
            os.replace(temporary, path)  # noqa: PTH105 (Path.replace keeps its own reference to it in Python 3.10)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def flush(self) -> None:
        """Remove all entries."""
        for path in self.folder.glob(f"{self.name}.*.kernel"):
            path.unlink()


def _read_only(locator: Any) -> Any:
    """A subclass of `locator`, one of Numba's cache folders, for a folder that may be read-only."""

    def ensure_cache_path(self: Any) -> None:
        if not os.path.isdir(self.get_cache_path()):  # noqa: PTH112 (Numba's path is a string)
            raise FileNotFoundError(self.get_cache_path())

    return type(f"ReadOnly{locator.__name__}", (locator,), {"ensure_cache_path": ensure_cache_path})


@functools.cache
def _cache_class(base: Any) -> Any:
    """A subclass of `base`, the function cache of Numba or numba-cuda, that stores `CacheEntries`."""
    locators = base._impl_class._locator_classes
    implementation = type(
        "Implementation", (base._impl_class,), {"_locator_classes": [*locators, *map(_read_only, locators)]}
    )  # fmt: skip

    class KernelCache(base):
        _impl_class = implementation
        _cache_file: Any

        def __init__(self, function: Any) -> None:
            super().__init__(function)
            original = self._cache_file
            sources = source_hash(Path(inspect.getfile(function)).resolve().parent)
            version = f"{sources or repr(original._source_stamp)} {original._version}"
            self._cache_file = CacheEntries(self._cache_path, self._impl.filename_base, version, original._dump)

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception:  # intact, but for another processor or Numba version
                self._cache_file.discard(self._index_key(sig, target_context.codegen()))
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except OSError as error:
                note_once(f"compiled kernels cannot be kept in {self._cache_path} ({error.strerror}): {ADVICE}")
                self.disable()

    return KernelCache


def enable_cache(dispatcher: Any, base: Any = FunctionCache) -> Any:
    """Cache what `dispatcher` compiles, as `base` does; returns it.  Prints a note if there is no folder for it."""
    if hasattr(dispatcher, "_cache"):  # with NUMBA_DISABLE_JIT it is the function itself
        try:
            dispatcher._cache = _cache_class(base)(dispatcher.py_func)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            note_once(f"there is no folder to keep compiled kernels in, so every start compiles them: {ADVICE}")
    return dispatcher


def is_cached(dispatcher: Any, types: Any) -> bool:
    """Whether a kernel is in the cache for arguments of these types."""
    cache = dispatcher._cache
    if not isinstance(getattr(cache, "_cache_file", None), CacheEntries):  # there is no folder
        return False
    return cache._cache_file.read(cache._index_key(types, dispatcher.targetctx.codegen())) is not None


def can_save(dispatcher: Any) -> bool:
    """Whether other processes can load what this one compiles."""
    cache = dispatcher._cache
    return getattr(cache, "_enabled", False) and os.access(cache.cache_path, os.W_OK)
