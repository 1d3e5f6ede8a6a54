"""How kernels are compiled: without the GIL, and kept on disk where that is possible."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

_log = logging.getLogger("roialign")
_folder: str | None = None

# Numba compiles anew when a kernel's own file changes; but a kernel contains those that it calls. So
# the stamp is of all files, and of what they say: times do not survive in a container image.
_STAMP = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
_said = False


def part(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, as part of them: Python cannot call it, and no disk keeps it.

    A third of the time to compile went into those two.
    """
    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, for the types it is called with.

    Compiled kernels are kept beside the source, or, where that cannot be written, in the user's cache
    folder (`NUMBA_CACHE_DIR` overrides both). Where neither can, or the disk is full, each process
    compiles anew, and the log says so once.
    """
    global _folder
    try:
        compiled = njit(nogil=True, cache=True, no_cfunc_wrapper=True)(function)
    except RuntimeError as error:  # "no locator available"
        _say(error)
        return njit(nogil=True, no_cfunc_wrapper=True)(function)
    cache = compiled._cache
    cache._cache_file._source_stamp = _STAMP
    _folder = cache.cache_path
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
