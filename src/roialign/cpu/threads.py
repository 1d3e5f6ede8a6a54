"""Threads of our own: as many as `torch.get_num_threads()` says at each call.

Numba's parallel backend is not used: its default threading layer ends the process when two Python
threads enter it. Kernels release the GIL and take tasks from a shared counter, so one call per
thread is all that Python does, and a helper that wakes up late finds nothing left to do.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .memory import scratch

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_pool)


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(32, os.cpu_count() or 1), "roialign")
        return _pool


def run(kernel: Callable[[int, int], None], tasks: int, scratch_bytes: int, work: int) -> None:
    """Run `kernel(counter_address, scratch_address)` on as many threads as the work deserves.

    Args:
        kernel: takes tasks by adding one to the counter until there is none.
        tasks: how many there are.
        scratch_bytes: each thread's own memory, kept for the next call.
        work: about how many numbers are read; a thread must be worth waking.
    """
    counter = np.zeros(1, np.int64)
    helpers = min(torch.get_num_threads(), tasks, 1 + work // _WORTH_A_THREAD) - 1
    address = counter.ctypes.data

    def take_tasks() -> None:
        memory = scratch("tasks", scratch_bytes)
        kernel(address, memory.ctypes.data)

    futures = [_executor().submit(take_tasks) for _ in range(helpers)]
    try:
        take_tasks()
    finally:  # also on KeyboardInterrupt: what helpers write to must outlive them
        for future in futures:
            if not future.cancel():
                future.result()


_WORTH_A_THREAD = 500_000
