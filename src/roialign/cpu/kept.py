"""Compiled kernels on disk: all that is used of Numba beside its documented interface.

Whatever is not here as expected, in another version of Numba, costs the time to compile and nothing
else: `jit` imports this file where a failure means that kernels are not kept.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import config
from numba.core import caching

_BESIDE = str(Path(__file__).parent / "__pycache__")


class _Files(caching.IndexDataCacheFile):
    """Numba's files of compiled kernels, of which none is used that is not what it is taken for.

    A file can be damaged. It can also be another's: Numba writes the index first and the kernel after, so
    where processes meet or a disk fills up between the two, the index names a kernel for other types or of
    an older source. All these count as absent: the kernel is compiled, and written over them.

    What is not in the folder may be beside the source, compiled ahead by someone who could write there.
    """

    def __init__(self, folder: str, name: str, stamp: str) -> None:
        super().__init__(folder, name, stamp)
        self._beside = None if config.CACHE_DIR or folder == _BESIDE else _Files(_BESIDE, name, stamp)

    def save(self, key: Any, data: Any) -> None:
        kernel = self._dump(data)
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
def content_to_read() -> Iterator[None]:
    """Let Numba use a folder that it cannot write, if it is there; else it does not even look into it."""
    locator = caching._CacheLocator
    ensure = locator.ensure_cache_path
    locator.ensure_cache_path = lambda self: os.stat(self.get_cache_path())
    try:
        yield
    finally:
        locator.ensure_cache_path = ensure


def check_files(compiled: Any, stamp: str, say: Callable[[Exception], None]) -> str:
    """Make a kernel of `njit(cache=True)` use checked files; returns the folder where they are.

    Args:
        compiled: the kernel.
        stamp: of what kernels are made; files of another one are not used.
        say: told why a kernel can be neither read nor written, which then is no error.
    """
    cache = compiled._cache
    if not isinstance(cache._cache_file, caching.IndexDataCacheFile):
        raise TypeError(f"files of kernels are {type(cache._cache_file).__name__}")
    cache._cache_file = _Files(cache.cache_path, cache._impl.filename_base, stamp)
    cache.load_overload = _or_say(cache.load_overload, say)
    cache.save_overload = _or_say(cache.save_overload, say)
    return str(cache.cache_path)


def _or_say(step: Callable[..., Any], say: Callable[[Exception], None]) -> Callable[..., Any]:
    def step_or_say(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except Exception as error:  # a full disk; or files that another Numba uses in another way
            say(error)
            return None

    return step_or_say
