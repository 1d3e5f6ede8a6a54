"""Forks, KeyboardInterrupt, threads that fail, memory that is not there, the end of the process."""

import sys

import pytest
from processes import run, start

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made as Linux makes them")


# fork


def test_a_worker_of_a_data_loader_pools():
    program = """
class Pooled(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return both()

share_every_call()
expected = both()
loader = torch.utils.data.DataLoader(
    Pooled(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
)
for results in loader:
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)
"""
    run(program)


# In a child the engine alone may use threads: OpenMP's, which PyTorch's own operators use, do not survive.
FORK = """
def fork(times, pool):
    expected = [result.numpy().tobytes() for result in pool()]
    for _ in range(times):
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            results = [result.numpy().tobytes() for result in pool()]
            os._exit(results != expected)
        assert os.waitpid(child, 0)[1] == 0
"""


def test_fork_while_another_thread_pools():
    program = """
share_every_call()
assert_right(both)
done = threading.Event()
other = threading.Thread(target=lambda: [both() for _ in iter(done.is_set, True)])
other.start()
fork(5, both)
done.set()
other.join()
"""
    run(FORK + program)


COMPILING = """
from numba.core import event
compiling = threading.Event()
class Listener(event.Listener):
    on_start = on_end = lambda self, _: compiling.set()
event.register("numba:compile", Listener())
"""


def test_fork_while_another_thread_compiles(tmp_path):
    program = """
other = threading.Thread(target=forward)
other.start()
assert compiling.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(120)
    forward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
other.join()
"""
    run(COMPILING + program, NUMBA_CACHE_DIR=str(tmp_path))


# KeyboardInterrupt, threads and the end of the process


def test_interrupts_at_any_moment():
    """A call finishes or raises, and the next one is right: nobody still writes where it does."""
    program = """
share_every_call()
expected = both()
assert_right(both)
armed = False
def handler(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, handler)
done = threading.Event()
def interrupt():
    while not done.wait(0.002 + 0.004 * torch.rand(()).item()):
        os.kill(os.getpid(), signal.SIGINT)
timer = threading.Thread(target=interrupt)
timer.start()
counts = {"interrupted": 0, "finished": 0}
until = time.monotonic() + 60
while min(counts.values()) < 20 and time.monotonic() < until:
    try:
        armed = sum(counts.values()) % 2 == 0
        results = both()
        armed = False
        assert all(map(torch.equal, results, expected))
        counts["finished"] += 1
    except KeyboardInterrupt:
        counts["interrupted"] += 1
done.set()
timer.join()
assert min(counts.values()) == 20, counts
assert_right(both)
"""
    run(program)


def test_an_interrupt_while_helpers_are_at_work_waits_for_them():
    program = """
import numba, numpy as np
from roialign.cpu import machine, memory, threads
from roialign.cpu.simd import get

@numba.njit
def stay(job, memory, first, second, third):
    machine.add(job, 1)
    while get(job, 1) == 0:
        machine.pause()
    machine.add(job + 16, 1)

row = np.zeros(8, np.int64)
def let_go():
    while row[0] < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    row[1] = 1
threading.Thread(target=let_go).start()
tags = [np.float32(0)] * 3
try:
    threads.run(stay, tags, row.ctypes.data, 2, 64, 10**9, memory.Arena())
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("not interrupted")
assert row[2] == 2
assert_right(both)
"""
    run(program)


def test_an_interrupt_while_compiling(tmp_path):
    program = """
def interrupt():
    compiling.wait(60)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    assert_right()
except KeyboardInterrupt:
    print("interrupted")
assert_right()
"""
    assert run(COMPILING + program, NUMBA_CACHE_DIR=str(tmp_path)) == "interrupted\n"


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.3])
def test_an_interrupt_while_numba_is_imported(seconds):
    program = """
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(SECONDS, interrupt).start()
try:
    forward()
    time.sleep(60)
    raise AssertionError("not interrupted")
except KeyboardInterrupt:
    pass
assert_right(both)
"""
    run(program.replace("SECONDS", str(seconds)))


def test_threads_that_cannot_be_started():
    """At a limit of the system, or while the interpreter ends: the caller does it all."""
    program = """
share_every_call()
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
assert_right(both)
"""
    run(program)


def test_a_system_without_semaphores():
    program = """
from roialign.cpu import machine
def semaphore(memory):
    raise OSError("the system makes no semaphore")
machine.semaphore = semaphore
share_every_call()
assert_right(both)
assert_right(both)
"""
    assert run(program) == "the CPU engine has no helper threads: the system makes no semaphore\n"


ENDINGS = {
    "helpers that wait": "share_every_call()\nassert_right(both)",
    "a thread that goes on": """
share_every_call()
def late():
    time.sleep(1)
    assert_right(both)
    print("right")
threading.Thread(target=late).start()
""",
    "an exit handler": """
import atexit
share_every_call()
torch.set_num_threads(3)
atexit.register(lambda: (assert_right(both), print("right")))
""",
}


@pytest.mark.parametrize("program", ENDINGS.values(), ids=ENDINGS.keys())
def test_the_end_of_the_process(program):
    assert run(program) == ("right\n" if "print" in program else "")  # and does not hang or crash


def test_a_daemon_thread_that_still_pools_does_not_hold_up_the_end():
    """Python before 3.14 ends such a thread within C++ of PyTorch, which may abort the process."""
    program = """
share_every_call()
assert_right(both)
print("right", flush=True)
threading.Thread(target=lambda: [both() for _ in iter(int, 1)], daemon=True).start()
time.sleep(1)
"""
    printed, _ = start(program).communicate(timeout=240)
    assert printed == "right\n"


def test_memory_that_is_not_there():
    program = """
import resource
share_every_call()
assert_right(both)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = (in_use + 2**28,) * 2
resource.setrlimit(resource.RLIMIT_AS, limit)
if resource.getrlimit(resource.RLIMIT_AS) != limit:
    print("unlimited")
    raise SystemExit
for what in (feature, feature.clone().requires_grad_()):
    try:
        roi_align(what, [torch.cat(boxes * 1000)], 7, 0.25, 2)
    except (MemoryError, RuntimeError) as error:
        print("allocate" in str(error))
assert_right(both)
"""
    printed = run(program)
    if printed == "unlimited\n":
        pytest.skip("an emulator sets no limit to memory")
    assert printed == "True\nTrue\n"
