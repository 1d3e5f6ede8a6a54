"""Calls inside calls: signal handlers, finalizers and other threads that pool while a call goes on.

Python runs the first two between any two steps of the thread that they interrupt, so within a call as well.
"""

import sys

import pytest
from processes import run

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no interval timer")

PAIRS = """
import gc, random, sys, weakref
random.seed(0)

class Job:
    def __init__(self, kind, boxes, bins, seed):
        channels, memory_format, dtype, self.ratio = kind
        generator = torch.Generator().manual_seed(seed)
        feature = torch.randn(1, channels, 12, 12, generator=generator).to(dtype)
        self.feature = feature.contiguous(memory_format=memory_format)
        corner = torch.rand(boxes, 2, generator=generator) * 20
        # Sides of whole bins: an adaptive grid has as many points for every seed.
        side = 4 * bins * (1 + torch.arange(boxes)[:, None] % 3).expand(boxes, 2)
        self.boxes, self.bins = [torch.cat((corner, corner + side), 1)], bins
        self.grad = torch.randn(boxes, channels, bins, bins, generator=generator).to(dtype)
        self.leaf = self.feature.requires_grad_()
        self.once = self.forward()
        self.expected = self.pool()
        start = time.perf_counter()
        self.assert_undisturbed()
        self.seconds = time.perf_counter() - start

    def forward(self):
        return roi_align(self.leaf, self.boxes, self.bins, 0.25, self.ratio)

    def pool(self):
        # PyTorch records nothing within an operator, so what goes backward was recorded before.
        (grad,) = torch.autograd.grad(self.once, self.leaf, self.grad, retain_graph=True)
        return self.forward().detach(), grad

    def assert_undisturbed(self):
        for actual, wanted in zip(self.pool(), self.expected, strict=True):
            assert torch.equal(actual, wanted), "other bits"

NCHW, NHWC = torch.contiguous_format, torch.channels_last
KINDS = {
    "packed": (16, NCHW, torch.float32, 2),
    "in place": (64, NHWC, torch.float32, 2),
    "adaptive": (16, NCHW, torch.float32, 0),
    "half": (16, NCHW, torch.float16, 2),
}
# An inner call of the same sizes, whose tables would fit where the outer ones are; one of other sizes.
pairs = []
for kind in KINDS.values():
    outer = Job(kind, 12, 3, 1)
    pairs += [(outer, Job(kind, 12, 3, 2)), (outer, Job(kind, 40, 4, 3))]

share_every_call()
inner, hits, errors = None, 0, []

def intrude(*_):
    global hits
    hits += 1
    try:
        inner.assert_undisturbed()
    except BaseException as error:  # a finalizer's would be printed and forgotten
        errors.append(error)
"""

SIGNAL = """
signal.signal(signal.SIGALRM, intrude)

def disturb():
    global inner
    for i in range(1000):
        outer, inner = pairs[i % len(pairs)]
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, outer.seconds))
        outer.assert_undisturbed()
        signal.setitimer(signal.ITIMER_REAL, 0)
"""

# Garbage that the collector finds within the call.
FINALIZER = """
class Cycle:
    def __init__(self):
        self.cycle = self
    def __del__(self):
        intrude()
"""
WEAK_REFERENCE = """
references = []
class Cycle:
    def __init__(self):
        self.cycle = self
        references.append(weakref.ref(self, intrude))
"""
COLLECT = """
def disturb():
    global inner
    gc.collect()
    gc.freeze()  # so that a collection takes no time
    for i in range(1000):
        outer, inner = pairs[i % len(pairs)]
        Cycle()
        gc.set_threshold(random.randint(2, 60), 10**6, 10**6)
        outer.assert_undisturbed()
        gc.set_threshold(10**6)
"""

THREAD = """
sys.setswitchinterval(1e-5)

def disturb():
    done = threading.Event()
    def other():
        global inner
        while not done.is_set():
            _, inner = pairs[hits % len(pairs)]
            intrude()
    thread = threading.Thread(target=other)
    thread.start()
    i = 0
    while i < 1000 or hits < 100:  # who gets the interpreter how often is the machine's affair
        outer, _ = pairs[i % len(pairs)]
        outer.assert_undisturbed()
        i += 1
    done.set()
    thread.join()
"""

# At each line of Python of a call, as if a signal had come there.
LINES = """
def at_line(number):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == number:
            intrude()
        return trace
    return trace

def disturb():
    global inner
    for line, (outer, inner) in enumerate(pairs, 1):  # each pair at every eighth line, so all at every one
        before = -1
        while hits > before:
            before = hits
            sys.settrace(at_line(line))
            outer.assert_undisturbed()
            sys.settrace(None)
            line += len(pairs)
"""

BOTH = """
for threads in (1, 2):
    torch.set_num_threads(threads)
    hits = 0
    disturb()
    assert not errors, (len(errors), errors[0])
    print(threads, hits, flush=True)
"""

WAYS = {
    "signal handler": SIGNAL,
    "finalizer": FINALIZER + COLLECT,
    "weak reference": WEAK_REFERENCE + COLLECT,
    "thread": THREAD,
    "every line": LINES,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_call_inside_a_call(way):
    """Neither disturbs the other, with one thread and with two: not a bit differs."""
    for line in run(PAIRS + way + BOTH, seconds=100).splitlines():
        assert int(line.split()[1]) >= 100, line


# The first call imports the engine and compiles. A handler that pools there needs what is being made.
COLD = """
leaf, boxes = feature.requires_grad_(), [boxes[0][:10]]
with ops.use_reference():
    # PyTorch records nothing within an operator, nor goes through one node twice at once.
    recorded = {who: forward()[0] for who in ("caller", "handler")}
def pool(who):
    pooled = recorded[who]
    return [*forward(), *torch.autograd.grad(pooled, leaf, pooled.detach(), retain_graph=True)]
with ops.use_reference():
    expected = pool("caller")
def check(who):
    for actual, wanted in zip(pool(who), expected, strict=True):
        torch.testing.assert_close(actual, wanted)

inside, done = 0, False
def handler(*_):
    global inside
    if not done:
        check("handler")
        inside += 1
        signal.setitimer(signal.ITIMER_REAL, 0.1)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.05)
check("caller")
done = True
signal.setitimer(signal.ITIMER_REAL, 0)  # none may come while the process ends
check("caller")
with ops.use_reference():
    pooled = forward()[0]
assert not torch.equal(forward()[0], pooled)  # the engine serves, though it was needed while it was made
print(inside)
"""


def test_a_signal_handler_that_pools_during_the_first_call(tmp_path):
    """It waits for what is being made, and has it made to its end."""
    assert int(run(COLD, seconds=120, NUMBA_CACHE_DIR=str(tmp_path))) >= 1
