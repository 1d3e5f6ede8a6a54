"""Threads of our own: as many as `torch.get_num_threads()` says at each call.

Numba's parallel backend is not used: its default threading layer ends the process when two Python
threads enter it. Helpers are threads of Python that enter compiled code for ever; see `slots.py`.

Beside a thread that runs Python, the GIL once given up is back only after `sys.getswitchinterval()`, 5 ms. So
a run gives it up once, or, if it is short, not at all: helpers do not need it. Where the system has no
semaphores that are known here, there are no helpers, and callers do it all.
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
from . import machine, slots
from .jit import address
from .memory import Arena, integers

# Numbers read. A helper takes a caller 5 us to wake, and comes after 20 us if its processor is awake, else
# after up to 2 ms; this takes one thread 0.1 to 0.4 ms.
_WORTH_A_THREAD = 500_000
_WORTH_THE_GIL = 1_000_000  # of each thread, a millisecond or two; others may keep the GIL for 5
_MOST = max(32, os.cpu_count() or 1)

_log = logging.getLogger("roialign")


class _Pool:
    """Slots, and the helpers that look for jobs in them."""

    def __init__(self) -> None:
        block = np.zeros(int(slots.POOL) + 64, np.uint8)
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
        words = integers(self.at, 8)
        words[slots.WAIT], words[slots.POST] = machine.system_calls()
        words[slots.AWAITED] = machine.semaphore(self.at + 64)
        for i in range(slots.SLOTS):
            at = self.at + int(slots.FIRST_SLOT + i * slots.SLOT)
            integers(at, 8)[slots.DONE] = machine.semaphore(at + 64)

    def wake(self, wanted: int) -> int:
        """Start helpers until there are as many as wanted; returns how many of those there are."""
        if self.helpers < wanted:
            with self.lock:
                while self.helpers < min(wanted, self.most):
                    try:
                        threading.Thread(
                            target=slots.help_out, args=(self.at,), name="roialign", daemon=True
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
_keep_gil, _give_up_gil = (
    make(None, *[ctypes.c_ssize_t] * 6) for make in (ctypes.PYFUNCTYPE, ctypes.CFUNCTYPE)
)


@functools.cache
def _ways() -> tuple[Callable[..., None], Callable[..., None]]:
    """How to share out a job: keeping the GIL, and giving it up."""
    do_apart(slots.help_out.compile, (types.intp,))  # now, so that it is kept where no helper is needed yet
    at = address(slots.share_out, *[types.intp] * 6)
    return _keep_gil(at), _give_up_gil(at)


@functools.cache
def _task_address(kernel: Any, *kinds: type) -> int:
    return address(kernel, types.intp, types.intp, *map(numba.typeof, kinds))


def worth(work: int) -> int:
    """Threads that so much work deserves; see `run`."""
    return min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD)


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
    keeping_gil, giving_up_gil = _ways()
    wanted = min(tasks, worth(work)) - 1
    pool = _pool  # after a fork from here on, one without helpers
    helpers = pool.wake(wanted) if wanted > 0 else 0
    share = -(-share // 64) * 64
    memory = arena.take((1 + helpers) * share)
    start = keeping_gil if work < _WORTH_THE_GIL * (1 + helpers) else giving_up_gil
    start(pool.at, _task_address(kernel, *map(type, tags)), job, memory, share, helpers)
