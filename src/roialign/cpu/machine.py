"""What threads need of the machine, as LLVM IR: words that several change, sleep, calls by address.

Memory and functions are named by address, as in `simd.py`. All that threads agree on passes through words
that are changed at once and in one order for all (sequentially consistent): whoever reads there that a thing
is done also reads what was written before.
"""

import ctypes
import sys
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_POINTER = _BYTE.as_pointer()
_ORDER = "seq_cst"
_PROCESSOR = llvm.get_process_triple().partition("-")[0]


def _word(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def read(typing: Any, address: Any) -> Any:
    """The word at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), _ORDER, 8)

    return types.int64(types.intp), codegen


@intrinsic
def write(typing: Any, address: Any, value: Any) -> Any:
    """Set the word at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word(builder, args[0]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def swap(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Set the word at an address if it is what was expected; return what it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_word(builder, args[0]), args[1], args[2], _ORDER, _ORDER)
        return builder.extract_value(pair, 0)

    return types.int64(types.intp, types.int64, types.int64), codegen


def _change(operation: str) -> Any:
    def change(typing: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _word(builder, args[0]), args[1], _ORDER)

        return types.int64(types.intp, types.int64), codegen

    change.__doc__ = f"Change the word at an address by `{operation}`; return what it was."
    return intrinsic(change)


add, keep_bits, set_bits = (_change(operation) for operation in ("add", "and", "or"))


@intrinsic
def call(typing: Any, function: Any, job: Any, memory: Any) -> Any:
    """Call a task kernel; see `threads.run`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_POINTER, [_WORD, _WORD, *[_POINTER] * 3])  # the types take no space
        nothing = ir.Constant(_POINTER, None)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*args[1:], *[nothing] * 3])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


# Semaphores


class _System(NamedTuple):
    """Functions of the system: name, what they return, and what they are given after the semaphore."""

    wait: tuple[str, ir.Type, tuple[ir.Constant, ...]]
    post: tuple[str, ir.Type, tuple[ir.Constant, ...]]


_SYSTEMS = {
    "darwin": _System(
        ("dispatch_semaphore_wait", _WORD, (_WORD(-1),)),  # for ever
        ("dispatch_semaphore_signal", _WORD, ()),
    ),
    "win32": _System(
        ("WaitForSingleObject", _INT, (_INT(-1),)),  # for ever
        ("ReleaseSemaphore", _INT, (_INT(1), ir.Constant(_POINTER, None))),
    ),
    "posix": _System(("sem_wait", _INT, ()), ("sem_post", _INT, ())),
}
_KIND = sys.platform if sys.platform in _SYSTEMS else "posix"
_SYSTEM = _SYSTEMS[_KIND]
SEMAPHORE_BYTES = 64  # sem_t has 32 at most; other systems want none


def _system_call(step: tuple[str, ir.Type, tuple[ir.Constant, ...]]) -> Any:
    _, result, more = step

    def apply(typing: Any, function: Any, semaphore: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(result, [_POINTER, *(value.type for value in more)])
            function = builder.inttoptr(args[0], kind.as_pointer())
            returned = builder.call(function, [builder.inttoptr(args[1], _POINTER), *more])
            return returned if result == _WORD else builder.sext(returned, _WORD)

        return types.int64(types.intp, types.intp), codegen

    return intrinsic(apply)


# Given the address of the system's function and the semaphore. Waiting returns 0, or else wants to be tried
# again: a signal came.
wait, post = _system_call(_SYSTEM.wait), _system_call(_SYSTEM.post)


def _library() -> Any:
    return ctypes.CDLL("kernel32" if sys.platform == "win32" else None)


def system_calls() -> tuple[int, int]:
    """The addresses of the system's functions to wait and to post.

    Raises:
        OSError, AttributeError: there are none.
    """
    wait, post = (
        ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
        for name in (_SYSTEM.wait[0], _SYSTEM.post[0])
    )
    return wait or 0, post or 0


def semaphore(memory: int) -> int:
    """Make a semaphore, at 0: where it is, which is in the memory given if it takes any.

    Raises:
        OSError, AttributeError: there are none.
    """
    library, at = _library(), ctypes.c_void_p(memory)
    if _KIND == "darwin":
        library.dispatch_semaphore_create.argtypes = (ctypes.c_long,)
        library.dispatch_semaphore_create.restype = ctypes.c_void_p
        made = library.dispatch_semaphore_create(0)
    elif _KIND == "win32":
        arguments = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p)
        library.CreateSemaphoreW.argtypes = arguments
        library.CreateSemaphoreW.restype = ctypes.c_void_p
        made = library.CreateSemaphoreW(None, 0, 2**31 - 1, None)
    else:
        library.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
        made = memory if library.sem_init(at, 0, 0) == 0 else None
    if not made:
        raise OSError("the system makes no semaphore")
    return int(made)


# What a thread does with denormal numbers, and how it rounds


@intrinsic
def control(typing: Any) -> Any:
    """The control word of the thread's arithmetic; 0 for processors that are not known here."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _PROCESSOR == "x86_64":
            place = builder.alloca(_INT)
            builder.call(_mxcsr(builder, "stmxcsr"), [builder.bitcast(place, _POINTER)])
            return builder.zext(builder.load(place), _WORD)
        if _PROCESSOR in ("aarch64", "arm64"):
            return builder.call(_llvm(builder, "aarch64.get.fpcr", _WORD), [])
        return _WORD(0)

    return types.int64(), codegen


@intrinsic
def set_control(typing: Any, value: Any) -> Any:
    """Set the control word, to another thread's."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _PROCESSOR == "x86_64":
            place = builder.alloca(_INT)
            builder.store(builder.trunc(args[0], _INT), place)
            builder.call(_mxcsr(builder, "ldmxcsr"), [builder.bitcast(place, _POINTER)])
        elif _PROCESSOR in ("aarch64", "arm64"):
            builder.call(_llvm(builder, "aarch64.set.fpcr", ir.VoidType(), _WORD), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the processor that the thread waits for another."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _PROCESSOR == "x86_64":
            builder.call(_llvm(builder, "x86.sse2.pause", ir.VoidType()), [])
        elif _PROCESSOR in ("aarch64", "arm64"):
            builder.call(_llvm(builder, "aarch64.hint", ir.VoidType(), _INT), [_INT(1)])
        return context.get_dummy_value()

    return types.void(), codegen


def _llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    return builder.module.declare_intrinsic(f"llvm.{name}", (), ir.FunctionType(result, arguments))


def _mxcsr(builder: ir.IRBuilder, name: str) -> ir.Function:
    return _llvm(builder, f"x86.sse.{name}", ir.VoidType(), _POINTER)
