"""The public functions on generated problems, hostile ones among them; see `generated.py`.

CI draws some hundred problems, always the same. For new ones, 5,000 or 20,000 for each engine:
`pytest --hypothesis-profile=thousands tests/test_generated.py`, or `--hypothesis-profile=twenty-thousand`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.ops as peer
from generated import Call, Problem, assert_sums_agree, judge, problems
from hypothesis import given, settings

from roialign import ops


def examples(in_ci: int) -> int:
    """How many problems, if not as many as the profile says."""
    return in_ci if settings().derandomize else settings().max_examples


@given(problem=problems())
def test_the_engine_agrees_with_the_definition(problem: Problem) -> None:
    judge(Call(problem))


@given(problem=problems())
@settings(max_examples=examples(in_ci=50))
def test_the_reference_agrees_with_the_definition(problem: Problem) -> None:
    with ops.use_reference():
        judge(Call(problem))


@given(problem=problems(most_maps=1, dtypes=("float32", "float64"), mixed=False))
@settings(max_examples=examples(in_ci=100))
def test_the_definition_agrees_with_torchvision(problem: Problem) -> None:
    """Where torchvision is defined: one map, finite boxes, not far larger than the map nor inside out."""
    ratio = 2 if problem.sampling_ratio == "exact" else problem.sampling_ratio
    problem = problem._replace(sampling_ratio=ratio)
    call = Call(problem._replace(way="rows", given_levels=None, spoilt=[], spoilt_grad=None))
    x1, y1, x2, y2 = call.rois[:, 1:].unbind(1)
    near = (call.rois * call.scales[0]).abs().lt(200).all(1)
    call.rois = call.rois[near & (x1 <= x2) & (y1 <= y2)]
    call.count = len(call.rois)
    leaf = call.features[0].detach().requires_grad_()
    arguments = (problem.output_size, call.scales[0], problem.sampling_ratio, problem.aligned)
    pooled = peer.roi_align(leaf, call.rois, *arguments)
    grad = call.grad[: call.count]
    (actual,) = torch.autograd.grad(pooled, leaf, grad)
    truth, (expected,) = call.truth([leaf], grad)
    size, (magnitude,) = call.truth([leaf.abs()], grad.abs())
    assert_sums_agree(pooled, truth, size, call.terms(), call.working)
    terms = call.terms() * truth[:, 0].numel()
    assert_sums_agree(actual, expected, magnitude, terms, call.working)


def test_the_gpu_engine_in_the_interpreter_agrees_with_the_definition() -> None:
    """In a process of its own, because Triton reads its environment when it is imported."""
    pytest.importorskip("triton", minversion="3.4")
    program = Path(__file__).parent / "gpu_generated.py"
    count = examples(in_ci=30)
    command = [sys.executable, "-W", "ignore", str(program), str(count)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900 + count)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {count} agree" in done.stdout
