"""How kernels are compiled, kept on disk where that is possible, and called by address."""

import functools
import hashlib
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

import numba
from numba import config, njit, types

from ..apart import do_apart

_log = logging.getLogger("roialign")
_folder: str | None = None
_said = False

if config.DISABLE_JIT:  # kernels mean nothing to Python: the reference must serve
    raise ImportError("Numba is told not to compile (NUMBA_DISABLE_JIT)")


def _fork_between_compilations() -> None:
    """Let a child not wait for a thread of its parent's to finish compiling, which there never does."""
    try:
        from numba.core.compiler_lock import global_compiler_lock as compiling

        acquire, release = compiling.acquire, compiling.release
    except (ImportError, AttributeError):  # not documented
        _log.warning("Numba %s: a fork while another thread compiles may hang", numba.__version__)
        return
    os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)


if hasattr(os, "register_at_fork"):
    _fork_between_compilations()


def _stamp(package: ModuleType) -> str | None:
    """A hash of the bytecode of a package, or None if that cannot be read.

    Numba compiles anew when a kernel's own file changes; but a kernel contains those that it calls. And
    it is compiled from bytecode, which is there in a zip, and without source, too.
    """
    hasher = hashlib.sha256()
    try:
        for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            spec: Any = importlib.util.find_spec(f"{package.__name__}.{name}")
            hasher.update(f"{name} {_gist(spec.loader.get_code(spec.name))}".encode())
    except Exception:  # an importer of another kind
        return None
    return hasher.hexdigest()


def _gist(value: Any) -> str:
    """What bytecode does, in the same words in every process and folder: neither lines nor paths count."""
    if isinstance(value, CodeType):
        arguments = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        return repr((value.co_code, arguments, names, *map(_gist, value.co_consts)))
    if isinstance(value, (tuple, frozenset)):
        parts = map(_gist, value)
        return repr(sorted(parts) if isinstance(value, frozenset) else list(parts))
    return repr(value)


_STAMP = _stamp(sys.modules[__package__])

# Compilers of our own, which take half of the time that Numba's takes.
_KERNEL: dict[str, Any] = {}
_PART: dict[str, Any] = {}
try:
    from . import quick

    _KERNEL["pipeline_class"], _PART["pipeline_class"] = quick.KernelCompiler, quick.PartCompiler
except (ImportError, AttributeError):  # not documented: then Numba's serves
    pass


def part(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, as part of them: Python cannot call it, and no disk keeps it."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **_PART)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, for the types it is called with. It keeps the GIL.

    To give the GIL up costs more than a short kernel takes, where another thread wants it: some 5 ms, until
    it is back. Kernels never raise, as only those by zero might: a division there gives what NumPy's does.

    Compiled kernels are kept beside the source, or, where that cannot be written, in the user's cache
    folder (`NUMBA_CACHE_DIR` overrides both). Where neither can, or the disk is full, or this Numba keeps
    them in a way of its own, each process compiles anew what is not there already, and the log says so once.
    """
    return _kernel(function, error_model="numpy", no_cfunc_wrapper=True)


def kernel_without_gil(function: Callable[..., Any]) -> Any:
    """Compile a function likewise that gives up the GIL while it runs."""
    return _kernel(function, error_model="numpy", no_cfunc_wrapper=True, nogil=True)


def c_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function likewise that is called by its `address`, with the GIL or without."""
    return _kernel(function, error_model="numpy")


def _kernel(function: Callable[..., Any], **options: Any) -> Any:
    options |= _KERNEL
    try:
        compiled = _kept(function, options)
    except Exception as error:  # whatever it is, it is no reason to be without the engine
        _say(error)
        compiled = njit(**options)(function)
    # What Numba calls when types are new. A call inside a call must not meet its compiler half way.
    compile_for_args = getattr(compiled, "_compile_for_args", None)  # not documented
    if compile_for_args is not None:
        compiled._compile_for_args = functools.partial(do_apart, compile_for_args)
    return compiled


def _kept(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    global _folder
    from . import kept  # a Numba without what this uses must fail here

    if _STAMP is None:
        raise RuntimeError("what they are made of cannot be read")
    try:
        compiled = njit(cache=True, **options)(function)
        _folder = kept.check_files(compiled, _STAMP, _say)
    except RuntimeError as error:  # "no locator available"
        _say(error)
        with kept.content_to_read():
            compiled = njit(cache=True, **options)(function)
        kept.check_files(compiled, _STAMP, _say)
    return compiled


_addresses: dict[tuple[Any, ...], tuple[int, object]] = {}


def address(compiled: Any, *kinds: Any) -> int:
    """Of the C function of a `c_kernel` for such types, Numba's; compiled if it is not yet.

    It returns nothing. Arguments that are types themselves are pointers there, which nobody reads.
    """
    key = (compiled, *kinds)
    found = _addresses.get(key)
    if found is None:
        found = _addresses[key] = do_apart(_find_address, compiled, types.void(*kinds))
    return found[0]


def _find_address(compiled: Any, signature: Any) -> tuple[int, object]:
    """The address, and who keeps what is there."""
    try:
        result = compiled.get_compile_result(signature)  # not documented, nor what is made of it
        at: int = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
        return at, result
    except AttributeError as error:
        _say(error)
        made = numba.cfunc(signature, error_model="numpy")(compiled.py_func)
        return made.address, made


def cache_folder() -> str | None:
    """Where compiled kernels are kept; None if nowhere."""
    return _folder


def _say(error: Exception) -> None:
    global _said
    if not _said:
        _said = True
        expected = isinstance(error, (OSError, RuntimeError))
        reason = error if expected else f"Numba {numba.__version__}: {type(error).__name__}: {error}"
        _log.warning("compiled kernels cannot be kept, each process compiles anew: %s", reason)
