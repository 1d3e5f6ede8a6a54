"""torch.set_flush_denormal, which PyTorch sets for the thread that calls it alone."""

import pytest
from processes import run

pytest.importorskip("numba")

# Values and gradients for which it matters.
SMALL = """
feature = feature * 1e-38
grad = torch.rand(200, 64, 7, 7, generator=torch.Generator().manual_seed(1)) * 1e-38
share_every_call()

def bits(threads):
    torch.set_num_threads(threads)
    leaf = feature.detach().requires_grad_()
    pooled = roi_align(leaf, boxes, 7, 0.25, 2)
    results = (pooled.detach(), *torch.autograd.grad(pooled, leaf, grad))
    return [result.view(torch.int32) for result in results]

def assert_threads_agree():
    one = bits(1)
    for threads in (2, 3) * 10:
        assert all(map(torch.equal, bits(threads), one)), threads

def flush(mode):
    if not torch.set_flush_denormal(mode):
        print("skip")
        raise SystemExit
"""

ORDERS = {
    "off": "bits(3); flush(False); assert_threads_agree()",
    "on, before helpers start": "flush(True); assert_threads_agree()",
    "on, after helpers started": "bits(3); flush(True); assert_threads_agree()",
    "off, after helpers started with it on": "flush(True); bits(3); flush(False); assert_threads_agree()",
    "on in one thread that calls and off in another": """
bits(3)
flush(True)
def unflushed():
    torch.set_flush_denormal(False)
    assert_threads_agree()
    print("right")
other = threading.Thread(target=unflushed)
other.start()
other.join()
assert_threads_agree()
""",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_number_of_threads_does_not_matter(order):
    printed = run(SMALL + order, seconds=100)
    if "skip" in printed:
        pytest.skip("the processor cannot flush denormals")
    assert printed == ("right\n" if "right" in order else "")
