"""Slots, where callers post jobs and helpers find them: what threads do in compiled code.

A helper enters `help_out` and never leaves it: it sleeps there until a job is posted, and takes tasks of it
from a shared counter, so one that wakes up late finds nothing left to do. A caller's part - to post the job,
to work, to withdraw what nobody took, to wait for the rest - is one function too, which no KeyboardInterrupt
cuts in half.

The first word of a slot says how many shares of its job are left to take and how many helpers are at it.
Because that word changes at once, a helper either takes a share of a job whose caller will wait for it, or
takes none. The memory is never freed.
"""

import numpy as np

from .geometry import ONE, ZERO
from .jit import c_kernel, kernel_without_gil, part
from .machine import (
    SEMAPHORE_BYTES,
    add,
    call,
    control,
    keep_bits,
    pause,
    post,
    read,
    set_bits,
    set_control,
    swap,
    wait,
    write,
)
from .simd import get, put

SLOTS = np.int64(64)  # jobs at a time; another one's caller works alone
SPINS = np.int64(1000)  # a helper at its last task is waited for awake so long: some ten microseconds

# A pool, in words: addresses of the system's functions, the semaphore that helpers sleep on, and the slots.
WAIT, POST, AWAITED = np.arange(3)
FIRST_SLOT = np.int64(64 + SEMAPHORE_BYTES)  # bytes
# A slot: see `SHARES` and on; the semaphore that its caller sleeps on; the job.
STATE, DONE, KERNEL, JOB, MEMORY, SHARE, CONTROL = np.arange(7)
SLOT = np.int64(64 + SEMAPHORE_BYTES)  # bytes
POOL = FIRST_SLOT + SLOTS * SLOT  # bytes

# Bits of the state of a slot, which is 0 if nobody has it.
ONE_HELPER, HELPERS = np.int64(1), np.int64(0xFFFF)  # that are at the job
ONE_SHARE, SHARES = np.int64(1 << 16), np.int64(0xFFFF << 16)  # left to take
TAKEN = np.int64(1 << 32)
SLEEPING = np.int64(1 << 33)  # its caller, until the last helper is done


@kernel_without_gil
def help_out(pool):
    """Sleep until there is a job to share in, and do; does not return."""
    while get(pool, WAIT):
        while wait(get(pool, WAIT), get(pool, AWAITED)):
            pass
        for i in range(SLOTS):
            slot = pool + FIRST_SLOT + i * SLOT
            share = _join(slot)  # its number: 0 is the caller's
            if share:
                set_control(get(slot, CONTROL))  # with another the sums would have other bits
                call(get(slot, KERNEL), get(slot, JOB), get(slot, MEMORY) + share * get(slot, SHARE))
                _leave(pool, slot)


@part
def _join(slot):
    """Take a share of the job in a slot: its number, or 0 if there is none."""
    state = read(slot)
    while state & SHARES:
        before = swap(slot, state, state - ONE_SHARE + ONE_HELPER)
        if before == state:
            return (state & SHARES) // ONE_SHARE
        state = before
    return ZERO


@part
def _leave(pool, slot):
    """Be done with a share; the slot is its caller's from here on."""
    before = add(slot, -ONE_HELPER)
    if before & SLEEPING and before & HELPERS == ONE_HELPER:
        post(get(pool, POST), get(slot, DONE))


@c_kernel
def share_out(pool, kernel, job, memory, share, helpers):
    """Run a kernel, with at most so many helpers, and return when all are done."""
    slot = _take_slot(pool) if helpers else ZERO
    if slot:
        put(slot, KERNEL, kernel)
        put(slot, JOB, job)
        put(slot, MEMORY, memory)
        put(slot, SHARE, share)
        put(slot, CONTROL, control())
        write(slot, TAKEN + helpers * ONE_SHARE)
        for _ in range(helpers):
            post(get(pool, POST), get(pool, AWAITED))
    call(kernel, job, memory)
    if slot:
        _close(pool, slot)


@part
def _take_slot(pool):
    for i in range(SLOTS):
        slot = pool + FIRST_SLOT + i * SLOT
        if read(slot) == 0 and swap(slot, ZERO, TAKEN) == 0:
            return slot
    return ZERO


@part
def _close(pool, slot):
    """Withdraw the shares that nobody took, wait for the others, and give the slot back."""
    state = keep_bits(slot, ~SHARES)
    spins = ZERO
    while state & HELPERS and spins < SPINS:
        pause()
        spins += ONE
        state = read(slot)
    if state & HELPERS and set_bits(slot, SLEEPING) & HELPERS:
        while wait(get(pool, WAIT), get(slot, DONE)):
            pass
    write(slot, ZERO)
