"""How kernels are compiled: without the GIL, and kept on disk where that is possible."""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core import caching
from numba.core.compiler_lock import global_compiler_lock as _compiling
from numba.core.serialize import dumps

_log = logging.getLogger("roialign")
_folder: str | None = None

# Numba compiles anew when a kernel's own file changes; but a kernel contains those that it calls. So
# the stamp is of all files, and of what they say: times do not survive in a container image.
_STAMP = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
_BESIDE = str(Path(__file__).parent / "__pycache__")
_said = False

if hasattr(os, "register_at_fork"):  # a child must not wait for a thread of its parent's to finish compiling
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class _Files(caching.IndexDataCacheFile):
    """Numba's files of compiled kernels, of which none is used that is not what it is taken for.

    A file can be damaged. It can also be another's: Numba writes the index first and the kernel after, so
    where processes meet or a disk fills up between the two, the index names a kernel for other types or of
    an older source. All these count as absent: the kernel is compiled, and written over them.

    What is not in the folder may be beside the source, compiled ahead by someone who could write there.
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(folder, name, _STAMP)
        self._beside = None if config.CACHE_DIR or folder == _BESIDE else _Files(_BESIDE, name)

    def save(self, key: Any, data: Any) -> None:
        kernel = dumps(data)
        super().save(key, (self._proof(key, kernel), kernel))

    def load(self, key: Any) -> Any:
        try:
            proof, kernel = super().load(key) or (b"", b"")
            if proof == self._proof(key, kernel):
                return pickle.loads(kernel)
        except Exception:  # what is damaged can raise anything
            pass
        return self._beside.load(key) if self._beside else None

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # also where it may not be read
            return {}

    def _proof(self, key: Any, kernel: bytes) -> bytes:
        name = repr((self._version, self._source_stamp, key)).encode()
        return hashlib.sha256(name + kernel).digest()


@contextmanager
def _content_to_read() -> Iterator[None]:
    """Let Numba use a folder that it cannot write, if it is there; else it does not even look into it."""
    locator = caching._CacheLocator
    ensure = locator.ensure_cache_path
    locator.ensure_cache_path = lambda self: os.stat(self.get_cache_path())
    try:
        yield
    finally:
        locator.ensure_cache_path = ensure


def part(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, as part of them: Python cannot call it, and no disk keeps it.

    A third of the time to compile went into those two.
    """
    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, for the types it is called with.

    Compiled kernels are kept beside the source, or, where that cannot be written, in the user's cache
    folder (`NUMBA_CACHE_DIR` overrides both). Where neither can, or the disk is full, each process
    compiles anew what is not there already, and the log says so once.
    """
    global _folder
    try:
        compiled = njit(nogil=True, cache=True, no_cfunc_wrapper=True)(function)
        _folder = compiled._cache.cache_path
    except RuntimeError as error:  # "no locator available"
        _say(error)
        try:
            with _content_to_read():
                compiled = njit(nogil=True, cache=True, no_cfunc_wrapper=True)(function)
        except RuntimeError:
            return njit(nogil=True, no_cfunc_wrapper=True)(function)
    cache = compiled._cache
    cache._cache_file = _Files(cache.cache_path, cache._impl.filename_base)
    save = cache.save_overload

    def save_or_say(*args: Any) -> None:
        try:
            save(*args)
        except OSError as error:
            _say(error)

    cache.save_overload = save_or_say
    return compiled


def cache_folder() -> str | None:
    """Where compiled kernels are kept; None if nowhere."""
    return _folder


def _say(error: Exception) -> None:
    global _said
    if not _said:
        _said = True
        _log.warning("compiled kernels cannot be kept, each process compiles anew: %s", error)
