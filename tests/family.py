"""Problems of the operators that `generated.py` does not draw: volumes, scales per axis, derivatives.

Each is drawn from a seed, pooled forward and backward, and held against the definition with sums in float64.
Run as a program, all tensors lie beside a page that cannot be read: `python tests/family.py before 0 100`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple
from unittest import mock

import torch
from generated import Storage, assert_sums_agree, poisoned
from torch import Tensor

from roialign import ops, reference, schema
from roialign.levels import staircase
from roialign.schema import Pooling

EXTREMES = (math.nan, math.inf, -math.inf, 1e30, -1e30, 1e5, -1e5)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "turned": lambda t: t.transpose(2, -1).contiguous().transpose(2, -1),
    "channels outermost": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "one value": lambda t: t.new_ones([1] * t.dim()).expand(t.shape),
}


class Case(NamedTuple):
    """The arguments of the operator, and what it is that is drawn."""

    features: list[Tensor]
    rois: Tensor
    levels: Tensor | None
    pooling: Pooling
    seed: int

    @property
    def working(self) -> torch.dtype:
        return self.rois.dtype


def draw(seed: int) -> Case:
    """The problem of a seed."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    axes, maps, images = random.choice((2, 3, 3)), random.choice((1, 1, 2, 3)), random.choice((1, 1, 2))
    channels = random.choice((1, 2, 3, 15, 16, 17, 33, 64))
    dtype, other = random.choice(ops.DTYPES), random.choice(ops.DTYPES)
    features = []
    for _ in range(maps):
        size = [random.choice((1, 2, random.randint(1, 9), random.randint(1, 24))) for _ in range(axes)]
        values = torch.randn(images, channels, *size, generator=generator)
        values = LAYOUTS[random.choice(list(LAYOUTS))](values.to(random.choice((dtype, dtype, other))))
        lone = random.choice(((), tuple(random.choice((0, 1, 7, 1000)) for _ in range(2 + axes))))
        features.append(Storage(random.choice((0, 3)), lone).lay(values))
    working = torch.float64 if torch.float64 in [f.dtype for f in features] else torch.float32
    scales = [random.choice((1.0, 0.5, 0.25, 1 / 3, 1.7)) for _ in range(random.choice((maps, maps * axes)))]
    steps = staircase(scales, random.choice((4.0, 28.0)), 1.0, working, maps, axes)
    count = random.choice((0, 1, 3, 7, 40))
    rois = draw_rois(random, count, images, axes).to(working)
    given = random.random() < 0.3 or (random.random() < 0.5 and maps > 1)
    levels = (
        torch.tensor([random.randrange(maps) for _ in range(count)], dtype=torch.int64) if given else None
    )
    bins = [random.choice((1, 2, random.randint(1, 7))) for _ in range(axes)]
    ratio = random.choice((1, 2, 2, 3, 0, 0, -1, -1))
    derivative = random.choice((0, random.randint(1, 2 * axes)))
    pooling = Pooling(bins, scales, ratio, random.random() < 0.5, *steps, True, derivative)
    return Case(features, rois, levels, pooling, seed)


def draw_rois(random: Random, count: int, images: int, axes: int) -> Tensor:
    """Most lie about the map, many with ends on whole cells; some are turned, empty, huge, or not finite."""
    rows = []
    for _ in range(count):
        grid = random.choice((0, 1, 1 / 4))
        low = [random.uniform(-6, 30) for _ in range(axes)]
        high = [start + random.choice((0.0, random.uniform(-4, 4), random.uniform(0, 40))) for start in low]
        row = [round(c / grid) * grid if grid else c for c in (*low, *high)]
        if random.random() < 0.1:
            row[random.randrange(2 * axes)] = random.choice(EXTREMES)
        rows.append([float(random.randrange(images)), *row])
    return torch.tensor(rows, dtype=torch.float64).reshape(count, 1 + 2 * axes)


def judge(case: Case, place: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """Pool forward and backward, with all tensors `place`d, and hold the results against the truth."""
    pooling, levels = case.pooling, None if case.levels is None else place(case.levels)
    leaves = [place(f).detach().requires_grad_() for f in case.features]
    shape = (len(case.rois), leaves[0].shape[1], *pooling.output_size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
    grad = place(LAYOUTS[Random(case.seed).choice(list(LAYOUTS))](values).to(leaves[0].dtype))
    with poisoned():
        pooled = schema.pool(leaves, place(case.rois), levels, pooling)
        grads = torch.autograd.grad(pooled, leaves, grad) if len(case.rois) else ()
    truth, true_grads = definition(case, case.features, grad, absolute=False)
    size, grad_sizes = definition(case, [f.abs() for f in case.features], grad.abs(), absolute=True)
    terms = most_terms(case)
    assert_sums_agree(pooled, truth, size, terms, case.working)
    terms *= len(case.rois) * math.prod(pooling.output_size)
    for actual, expected, magnitude in zip(grads, true_grads, grad_sizes, strict=False):
        assert_sums_agree(actual, expected, magnitude, terms, case.working)


def definition(
    case: Case, features: Sequence[Tensor], grad: Tensor, absolute: bool
) -> tuple[Tensor, list[Tensor]]:
    """By the reference, with sums in float64; or the sizes of all terms of these."""
    plain = reference.taps_of

    def exact(*args):
        taps = plain(*args)
        return taps._replace(weight=taps.weight.double().abs() if absolute else taps.weight.double())

    leaves = [f.double().requires_grad_() for f in features]
    out = torch.empty(grad.shape, dtype=torch.float64)
    with mock.patch.object(reference, "taps_of", exact):
        reference.forward(out, leaves, case.rois, case.levels, case.pooling)
    none = [torch.zeros_like(leaf) for leaf in leaves]
    if not out.requires_grad:  # no box can be pooled
        return out, none
    grads = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
    return out.detach(), [n if g is None else g for n, g in zip(none, grads, strict=True)]


def most_terms(case: Case) -> int:
    """The most cells that a bin reads."""
    ratio, axes = case.pooling.sampling_ratio, len(case.pooling.output_size)
    if ratio > 0:
        return (2 * ratio) ** axes
    return math.prod(4 * (max(f.shape[2 + axis] for f in case.features) + 3) for axis in range(axes))


def main(side: str, first: str, stop: str) -> None:
    from guarded import guarded, guarded_results

    torch.set_num_threads(1)
    for seed in range(int(first), int(stop)):
        print(f"seed {seed}", flush=True)
        with guarded_results(side):
            judge(draw(seed), lambda t: guarded(t, side))
    print("all agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
