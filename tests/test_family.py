"""Volumes, scales per axis and derivatives in boxes, as `family.py` draws them."""

import subprocess
import sys
from pathlib import Path

import pytest
from family import draw, judge
from processes import SOURCE, python_path

from roialign import ops

TESTS = Path(__file__).parent
CASES = 800
AT_ONCE = 50


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_the_definition_with_sums_in_float64(first):
    for seed in range(first, first + AT_ONCE):
        judge(draw(seed))


@pytest.mark.parametrize("seed", [2058, 11218])
def test_rows_that_a_box_spans_but_a_derivative_does_not_touch(seed):
    """Of ten thousand these two had boxes that were put in order by the one and summed by the other."""
    judge(draw(seed))


def test_what_is_drawn_is_what_it_says():
    cases = [draw(seed) for seed in range(CASES)]
    assert {case.features[0].dim() for case in cases} == {4, 5}
    assert {case.pooling.derivative for case in cases} == set(range(7))
    assert {case.pooling.sampling_ratio for case in cases} == {1, 2, 3, 0, -1}
    assert {f.dtype for case in cases for f in case.features} == set(ops.DTYPES)
    per_axis = [case for case in cases if len(case.pooling.scales) > len(case.features)]
    assert len(per_axis) > CASES / 4


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs mprotect")
@pytest.mark.parametrize("side", ["before", "after"])
def test_beside_a_guard_page(side):
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, str(TESTS / "family.py"), side, "1000", "1200"],
        env={"PATH": "", "PYTHONPATH": python_path(SOURCE, TESTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    assert done.returncode == 0, f"{done.returncode} at {last}\n{done.stderr}"
    assert last == "all agree"
