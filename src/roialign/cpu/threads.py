"""Threads of our own: as many as `torch.get_num_threads()` says at each call.

Numba's parallel backend is not used: its default threading layer ends the process when two Python
threads enter it. Helpers are threads of Python that enter one compiled function and never leave it: there
they sleep until a job is posted, and take tasks of it from a shared counter, so one that wakes up late finds
nothing left to do.

A call gives up the GIL once. Beside a thread that runs Python it is back only after `sys.getswitchinterval()`,
5 ms, and so it would be each time. Everything between - to post the job, to work, to withdraw what nobody
took, to wait for the rest - is one compiled function, which also means that no KeyboardInterrupt cuts it in half.

Jobs lie in slots, in memory that is never freed. The first word of a slot says how many shares of its job are
left to take and how many helpers are at it. Because that word changes at once, a helper either takes a share
of a job whose caller waits for it, or takes none. Where the system has no semaphores that are known here, there
are no helpers, and callers do it all.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from ..apart import do_apart
from .jit import address, c_kernel, kernel_without_gil, part
from .machine import (
    SEMAPHORE_BYTES,
    add,
    call,
    control,
    keep_bits,
    pause,
    post,
    read,
    semaphore,
    set_bits,
    set_control,
    swap,
    system_calls,
    wait,
    write,
)
from .memory import Arena, integers
from .simd import get, put
from .tables import ONE, ZERO

_WORTH_A_THREAD = 500_000
_WORTH_THE_GIL = 1_000_000
_MOST = max(32, os.cpu_count() or 1)
_SLOTS = np.int64(64)  # jobs at a time; another one's caller works alone
_SPINS = np.int64(1000)  # a helper that is at its last task is waited for awake: some ten microseconds

# A pool, in words: addresses of the system's functions, the semaphore that helpers sleep on, and the slots.
_WAIT, _POST, _AWAITED = np.arange(3)
_FIRST_SLOT = np.int64(64 + SEMAPHORE_BYTES)  # bytes
# A slot: see `_SHARES` and on; the semaphore that its caller sleeps on; the job.
_STATE, _DONE, _KERNEL, _JOB, _MEMORY, _SHARE, _CONTROL = np.arange(7)
_SLOT = np.int64(64 + SEMAPHORE_BYTES)  # bytes

# Bits of the state of a slot, which is 0 if nobody has it.
_ONE_HELPER, _HELPERS = np.int64(1), np.int64(0xFFFF)  # that are at the job
_ONE_SHARE, _SHARES = np.int64(1 << 16), np.int64(0xFFFF << 16)  # left to take
_TAKEN, _SLEEPING = np.int64(1 << 32), np.int64(1 << 33)  # the slot; its caller, until the last helper is done

_log = logging.getLogger("roialign")


@kernel_without_gil
def _help(pool):
    """Sleep until there is a job to share in, and do; does not return."""
    while get(pool, _WAIT):
        while wait(get(pool, _WAIT), get(pool, _AWAITED)):
            pass
        for i in range(_SLOTS):
            slot = pool + _FIRST_SLOT + i * _SLOT
            share = _join(slot)
            if share:
                set_control(get(slot, _CONTROL))  # with another the sums would have other bits
                call(get(slot, _KERNEL), get(slot, _JOB), get(slot, _MEMORY) + share * get(slot, _SHARE))
                _leave(pool, slot)


@part
def _join(slot):
    """Take a share of the job in a slot: its number, or 0 if there is none."""
    state = read(slot)
    while state & _SHARES:
        before = swap(slot, state, state - _ONE_SHARE + _ONE_HELPER)
        if before == state:
            return (state & _SHARES) // _ONE_SHARE
        state = before
    return ZERO


@part
def _leave(pool, slot):
    """Be done with a share; the slot is its caller's from here on."""
    before = add(slot, -_ONE_HELPER)
    if before & _SLEEPING and before & _HELPERS == _ONE_HELPER:
        post(get(pool, _POST), get(slot, _DONE))


@c_kernel
def _share(pool, kernel, job, memory, share, helpers):
    """Run a kernel, with at most so many helpers, and return when all are done."""
    slot = _take_slot(pool) if helpers else ZERO
    if slot:
        put(slot, _KERNEL, kernel)
        put(slot, _JOB, job)
        put(slot, _MEMORY, memory)
        put(slot, _SHARE, share)
        put(slot, _CONTROL, control())
        write(slot, _TAKEN + helpers * _ONE_SHARE)
        for _ in range(helpers):
            post(get(pool, _POST), get(pool, _AWAITED))
    call(kernel, job, memory)
    if slot:
        _close(pool, slot)


@part
def _take_slot(pool):
    for i in range(_SLOTS):
        slot = pool + _FIRST_SLOT + i * _SLOT
        if read(slot) == 0 and swap(slot, ZERO, _TAKEN) == 0:
            return slot
    return ZERO


@part
def _close(pool, slot):
    """Withdraw the shares that nobody took, wait for the others, and give the slot back."""
    state = keep_bits(slot, ~_SHARES)
    spins = ZERO
    while state & _HELPERS and spins < _SPINS:
        pause()
        spins += ONE
        state = read(slot)
    if state & _HELPERS and set_bits(slot, _SLEEPING) & _HELPERS:
        while wait(get(pool, _WAIT), get(slot, _DONE)):
            pass
    write(slot, ZERO)


class _Pool:
    """Slots, and the helpers that look for jobs in them."""

    def __init__(self) -> None:
        size = int(_FIRST_SLOT + _SLOTS * _SLOT)
        block = np.zeros(size + 64, np.uint8)
        # Helpers sleep there when the interpreter ends and frees what it can.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
        start: int = block.__array_interface__["data"][0]
        self.at = start + -start % 64
        self.most = 0  # helpers there may be
        self.helpers = 0
        self.lock = threading.RLock()  # a signal handler may pool while its own thread holds it
        try:
            self._lay()
            self.most = _MOST
        except (OSError, AttributeError) as error:
            _log.warning("the CPU engine has no helper threads: %s", error)

    def _lay(self) -> None:
        words = integers(self.at, int(_FIRST_SLOT) // 8)
        words[_WAIT], words[_POST] = system_calls()
        words[_AWAITED] = semaphore(self.at + 64)
        for at in range(self.at + int(_FIRST_SLOT), self.at + int(_FIRST_SLOT + _SLOTS * _SLOT), int(_SLOT)):
            integers(at, int(_DONE) + 1)[_DONE] = semaphore(at + 64)

    def wake(self, wanted: int) -> int:
        """Start helpers until there are as many as wanted; returns how many of those there are."""
        if self.helpers < wanted:
            with self.lock:
                while self.helpers < min(wanted, self.most):
                    do_apart(_help.compile, (types.intp,))
                    try:
                        threading.Thread(
                            target=_help, args=(self.at,), name="roialign", daemon=True
                        ).start()
                    except RuntimeError:  # the system allows no more, or the interpreter is about to end
                        break
                    self.helpers += 1
        return min(wanted, self.helpers)


_pool = _Pool()


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_pool)


# The same function, keeping the GIL and giving it up.
_keep_gil, _give_up_gil = (make(None, *[ctypes.c_ssize_t] * 6) for make in (ctypes.PYFUNCTYPE, ctypes.CFUNCTYPE))


@functools.cache
def _ways() -> tuple[Callable[..., None], Callable[..., None]]:
    at = address(_share, *[types.intp] * 6)
    return _keep_gil(at), _give_up_gil(at)


@functools.cache
def _task_address(kernel: Any, *kinds: type) -> int:
    return address(kernel, types.intp, types.intp, *map(numba.typeof, kinds))


def run(kernel: Any, tags: Iterable[Any], job: int, tasks: int, share: int, work: int, arena: Arena) -> None:
    """Run a task kernel on as many threads as the work deserves.

    Args:
        kernel: a `jit.c_kernel` that is given the address of its job, that of the thread's memory, and three
            types. It takes tasks by adding one to the first word of the job, until there is none.
        tags: numbers of the three types.
        job: the address of what it is told.
        tasks: how many there are.
        share: bytes of scratch that each thread has of its own.
        work: about how many numbers are read. A thread must be worth waking, and so must the GIL be worth
            giving up.
        arena: where the shares are laid.
    """
    wanted = min(torch.get_num_threads(), tasks, 1 + work // _WORTH_A_THREAD) - 1
    pool = _pool  # after a fork from here on, one without helpers
    helpers = pool.wake(wanted) if wanted > 0 else 0
    share = -(-share // 64) * 64
    memory = arena.take((1 + helpers) * share)
    keeping_gil, giving_up_gil = _ways()
    start = keeping_gil if work < _WORTH_THE_GIL * (1 + helpers) else giving_up_gil
    start(pool.at, _task_address(kernel, *map(type, tags)), job, memory, share, helpers)
