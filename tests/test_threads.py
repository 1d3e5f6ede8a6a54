"""The threads of the CPU engine: who takes part in a call, and what it waits for beside busy ones."""

import itertools
import sys
import threading
import time

import numpy as np
import pytest
import torch

from roialign import multiscale_roi_align
from roialign.testing import pyramid, random_boxes

numba = pytest.importorskip("numba")
from roialign.cpu import engine, jit, machine, memory, slots  # noqa: E402
from roialign.cpu import threads as pool  # noqa: E402
from roialign.cpu.simd import fetch_add, get, put  # noqa: E402

TAGS = [np.float32(0)] * 3
LONG = 10**9  # work that is worth any number of threads, and the GIL


@numba.njit
def meet(job, memory, first, second, third):
    """Wait until as many threads are here as the job says; each notes its memory."""
    place = fetch_add(job)
    put(job, 2 + place, memory)
    spins = 0
    while machine.read(job) < get(job, 1) and spins < 10**10:
        machine.pause()
        spins += 1


@numba.njit
def count(job, memory, first, second, third):
    """Each task adds one."""
    while fetch_add(job) < get(job, 1):
        machine.add(job + 16, 1)


def run(kernel, tasks, work=LONG):
    """The row of a job that is done."""
    row, arena = np.zeros(16, np.int64), memory.Arena()
    row[1] = tasks
    pool.run(kernel, TAGS, row.ctypes.data, tasks, 100, work, arena)
    arena.give_back()
    return row


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("work", [6 * pool._WORTH_A_THREAD, LONG], ids=["keeping the GIL", "without it"])
def test_as_many_threads_as_torch_says_each_with_its_own_memory(n, work, threads):
    torch.set_num_threads(n)
    row = run(meet, n, work)
    assert row[0] == n
    at = sorted(row[2 : 2 + n])
    assert all(below + 100 <= above for below, above in itertools.pairwise(at))
    assert all(place % 64 == 0 for place in at)


def test_no_more_threads_than_tasks_and_none_for_little_work(threads):
    torch.set_num_threads(5)
    assert run(meet, 2)[0] == 2
    assert run(meet, 1, work=pool._WORTH_A_THREAD - 1)[0] == 1


def test_where_no_slot_is_free_the_caller_works_alone(threads):
    torch.set_num_threads(2)
    at = [pool._pool.at + int(slots.FIRST_SLOT + i * slots.SLOT) for i in range(slots.SLOTS)]
    states = [memory.integers(place, 1) for place in at]
    for state in states:
        state[0] = slots.TAKEN
    try:
        assert run(meet, 1)[0] == 1
        assert run(count, 100)[2] == 100
    finally:
        for state in states:
            assert state[0] == slots.TAKEN
            state[0] = 0
    assert run(meet, 2)[0] == 2


def test_many_short_jobs_of_several_callers_at_once(threads):
    """Each ends, with each of its tasks done once."""
    torch.set_num_threads(4)
    totals = []

    def call():
        totals.extend(run(count, 7 + i % 50)[2] - 7 - i % 50 for i in range(2000))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=100)
    assert totals == [0] * 6000
    assert not any(memory.integers(pool._pool.at + int(slots.FIRST_SLOT), 1))


@pytest.mark.parametrize("channels", [1, 8, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_their_number_changes_no_bit(channels, layout, threads, monkeypatch):
    monkeypatch.setattr(pool, "_WORTH_A_THREAD", 1)
    maps = pyramid([4], image_size=(256, 256), images=2, channels=channels, layout=layout)
    (leaf,) = leaves = [m.requires_grad_() for m in maps]
    boxes = random_boxes([200, 600], image_size=(256, 256))

    def call():
        pooled = multiscale_roi_align(leaves, boxes, 7, [1 / 4], 2)
        return pooled, *torch.autograd.grad(pooled, leaf, pooled.detach())

    results = []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        results.append(call())
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_kernels_do_not_raise():
    """A helper has nobody to raise to, nor the GIL for it."""
    assert numba.njit(error_model="numpy")(lambda a, b: a // b)(7, 0) == 0

    def divide(a, b):
        return a // b

    assert jit.kernel(divide)(7, 0) == 0


INTERVAL = 0.3  # seconds, of which a wait for the GIL takes one


@pytest.fixture
def busy():
    """A thread that runs Python, and gives the GIL up when it must."""
    done, saved = threading.Event(), sys.getswitchinterval()

    def spin():
        while not done.is_set():
            pass

    thread = threading.Thread(target=spin)
    sys.setswitchinterval(INTERVAL)
    thread.start()
    yield
    done.set()
    sys.setswitchinterval(saved)
    thread.join()


@pytest.mark.parametrize("number", [50, 500])
def test_waits_for_the_gil(number, monkeypatch, request):
    """Whoever gives the GIL up beside a busy thread has it back one interval later: at most twice a call."""
    calls = {}
    for name in ("forward", "backward"):
        original = getattr(engine, name)

        def note(*args, name=name, original=original):
            calls[name] = lambda: original(*args)
            original(*args)

        monkeypatch.setattr(engine, name, note)
    maps = pyramid([4, 8, 16], image_size=(400, 640), images=1, channels=256)
    leaves = [m.requires_grad_() for m in maps]
    pooled = multiscale_roi_align(
        leaves, random_boxes([number], image_size=(400, 640)), 7, [1 / 4, 1 / 8, 1 / 16], 2
    )
    pooled.backward(torch.ones_like(pooled))
    request.getfixturevalue("busy")
    waits = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        waits[name] = (time.perf_counter() - start) / INTERVAL
    assert len(waits) == 2
    assert max(waits.values()) < 3, waits
