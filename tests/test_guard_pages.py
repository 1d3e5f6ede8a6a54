"""Nothing is read or written out of bounds: an address that is off by one dies at a guard page.

See `guarded.py`. Maps, boxes, levels and gradients lie there, and the results that the engine fills.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SOURCE, python_path

from roialign import ops

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs mprotect")

TESTS = Path(__file__).parent
SIDES = ("before", "after")


def run(*command: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env={**os.environ, "PYTHONPATH": python_path(SOURCE, TESTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_beside_a_guard_page(dtype, side):
    code, out, err = run(str(TESTS / "guarded.py"), side, str(dtype).removeprefix("torch."))
    assert code == 0, f"{side}, {dtype}: {code} at {(out.splitlines() or [''])[-1]}\n{err}"
    assert out.endswith("all agree\n")


OFF_BY_ONE = """
import ctypes, torch
from guarded import guarded, guarded_results
from roialign import ops
step = {{"before": 1, "after": -1}}["{side}"]
with guarded_results("{side}"):
    result = ops.engine("cpu").empty((2, 3, 4, 5), torch.float32, torch.device("cpu"), False)
for t in (guarded(torch.randn(2, 3, 4, 5).half(), "{side}"), guarded(torch.randn(7, 5), "{side}"), result):
    last = t.data_ptr() + (t.numel() * t.element_size() - 1 if step == 1 else 0)
    ctypes.memmove(last, last, 1)
    print("inside", flush=True)
# As an engine would that starts or ends one too early or too late.
ctypes.{how}(last + step, {value}, 1)
print("unseen")
"""


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("side", SIDES)
def test_an_address_that_is_off_by_one_dies(side, how):
    act = {
        "read": {"how": "string_at", "value": "1 and 1"},
        "write": {"how": "memset", "value": "0"},
    }[how]
    program = OFF_BY_ONE.format(side=side, **act)
    if how == "read":
        program = program.replace(", 1 and 1, 1)", ", 1)")
    code, out, err = run("-c", program)
    assert out == "inside\n" * 3, err
    assert -code in (signal.SIGSEGV, signal.SIGBUS), err
