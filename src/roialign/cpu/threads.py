"""Threads of our own: as many as `torch.get_num_threads()` says at each call.

Numba's parallel backend is not used: its default threading layer ends the process when two Python
threads enter it. Kernels release the GIL and take tasks from a shared counter, so one call per
thread is all that Python does, and a helper that wakes up late finds nothing left to do.

KeyboardInterrupt may tear the caller out of a call at any instruction, while helpers go on. So a helper owns
what it reads and writes, until it is done; it never raises where nobody waits for it; and what
passes between the two are locks and a queue of C, which an exception cannot cut in half.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch

from .memory import Arena

_WORTH_A_THREAD = 500_000
_TINY = 5e-324  # a denormal number: zero where those are flushed
_MOST = max(32, os.cpu_count() or 1)


class _Offer:
    """A share in a call: a helper takes it up, or else the caller withdraws it."""

    def __init__(self, work: Callable[[], None], owned: object) -> None:
        self._work, self._owned = work, owned
        self.error: BaseException | None = None
        self._taken, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()

    def take_up(self) -> None:
        """Do the work, unless the offer was withdrawn."""
        if self._taken.acquire(blocking=False):
            try:
                self._work()
            except BaseException as error:
                self.error = error
            self._let_go()
            self._done.release()

    def close(self) -> None:
        """Withdraw the offer, or wait until the work is done."""
        if self._taken.acquire(blocking=False):
            self._let_go()
        else:
            self._done.acquire()

    def _let_go(self) -> None:
        del self._work, self._owned


_offers: "SimpleQueue[_Offer]" = SimpleQueue()
_helpers = 0
_lock = threading.RLock()  # a signal handler may pool while its own thread holds it


def _forget_helpers() -> None:
    global _offers, _helpers, _lock
    _offers, _helpers, _lock = SimpleQueue(), 0, threading.RLock()


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_forget_helpers)


def _help(offers: "SimpleQueue[_Offer]") -> None:
    while True:
        offers.get().take_up()


def _wake(wanted: int) -> int:
    """Start helpers until there are as many as wanted; returns how many of those there are."""
    global _helpers
    with _lock:
        while _helpers < min(wanted, _MOST):
            try:
                threading.Thread(target=_help, args=(_offers,), name="roialign", daemon=True).start()
            except RuntimeError:  # the system allows no more threads, or the interpreter is about to end
                break
            _helpers += 1
        return min(wanted, _helpers)


def run(
    kernel: Callable[[int, int], None], tasks: int, share: int, work: int, arena: Arena, owned: object = None
) -> None:
    """Run `kernel(counter_address, scratch_address)` on as many threads as the work deserves.

    Args:
        kernel: takes tasks by adding one to the counter until there is none.
        tasks: how many there are.
        share: bytes of scratch that each thread has of its own.
        work: about how many numbers are read; a thread must be worth waking.
        arena: where the shares are laid.
        owned: what the kernel reads and writes. It lives, as the arena does, until the last helper is
            done, even if the caller does not wait for that.
    """
    counter = np.zeros(1, np.int64)
    address = counter.__array_interface__["data"][0]
    wanted = min(torch.get_num_threads(), tasks, 1 + work // _WORTH_A_THREAD) - 1
    if wanted < 1:
        kernel(address, arena.take(share))
        return
    flush = _TINY * 1.0 == 0.0

    def help_out(memory: int) -> Callable[[], None]:
        def work() -> None:
            torch.set_flush_denormal(flush)  # a thread's own; with another the sums would have other bits
            kernel(address, memory)

        return work

    offers = [_Offer(help_out(arena.take(share)), (counter, arena, owned)) for _ in range(_wake(wanted))]
    try:
        for offer in offers:
            _offers.put(offer)
        kernel(address, arena.take(share))
    finally:
        for offer in offers:
            offer.close()
    for offer in offers:
        if offer.error is not None:
            raise offer.error
