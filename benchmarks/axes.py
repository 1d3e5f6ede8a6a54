"""Volumes and sequences, against the best there is on a CPU: docs/performance.md.

Nobody has a multi-level RoIAlign of volumes or sequences for a CPU. What there is is `grid_sample`, once for
each level, with the sampling points as a grid, and the mean over those of a bin; for sequences, torchvision's
`roi_align` on maps of one row.

Run: python benchmarks/axes.py
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool3d, grid_sample

import roialign
from roialign.bench.timing import Effort, milliseconds
from roialign.levels import staircase

SECONDS = 2.0  # for each figure
RATIO = 2

Call = Callable[[], object]


class Problem:
    """A pyramid of some axes, boxes and bins."""

    def __init__(
        self, channels: int, size: Sequence[int], levels: int, boxes: int, bins: int, largest: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.axes, self.bins = len(size), bins
        self.strides = [4 * 2**k for k in range(levels)]
        self.features = [
            torch.randn(1, channels, *(math.ceil(n / 2**k) for n in size), generator=generator)
            for k in range(levels)
        ]
        extent = torch.tensor([4.0 * n for n in reversed(size)])  # of the image, x first
        share = largest * torch.exp(-2.5 * torch.rand(boxes, 1, generator=generator))  # of its sides
        sides = share * torch.exp(0.5 * torch.rand(boxes, self.axes, generator=generator) - 0.25) * extent
        corner = torch.rand(boxes, self.axes, generator=generator) * (extent - sides)
        self.boxes = torch.cat((corner, corner + sides), 1)
        self.canonical = {"canonical_scale": 0.25 * float(extent.mean()), "canonical_level": 2 + levels // 2}
        scales = [1 / s for s in self.strides]
        steps = staircase(scales, *self.canonical.values(), torch.float32, levels, self.axes)
        rois = self.boxes
        if self.axes == 1:
            rois = torch.stack(
                (self.boxes[:, 0], 0 * corner[:, 0], self.boxes[:, 1], 0 * corner[:, 0] + 1), 1
            )
        self.rows = [(steps.levels(rois) == level).nonzero()[:, 0] for level in range(levels)]

    def ours(self, features: Sequence[Tensor]) -> Tensor:
        """One call."""
        scales = [1 / s for s in self.strides]
        return roialign.multiscale_roi_align(
            features, [self.boxes], self.bins, scales, RATIO, **self.canonical
        )

    def by_level(self, features: Sequence[Tensor], pool: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        """One call for each level, and its results put where they belong."""
        out = torch.empty(len(self.boxes), features[0].shape[1], *[self.bins] * self.axes)
        for feature, stride, rows in zip(features, self.strides, self.rows, strict=True):
            if len(rows):
                out = out.index_copy(0, rows, pool(feature, self.boxes[rows], 1 / stride))
        return out

    def sampled(self, features: Sequence[Tensor]) -> Tensor:
        """By `grid_sample`, inside the maps to the same values."""
        return self.by_level(features, self._sample)

    def _sample(self, feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        points, axes = [], self.axes
        n = self.bins * RATIO
        for i in range(axes):
            low = boxes[:, i, None] * scale
            side = (boxes[:, i + axes, None] * scale - low).clamp(min=1)
            at = low + (torch.arange(n) + 0.5) * side / n
            points.append(2 * at / (feature.shape[-1 - i] - 1) - 1)
        # All boxes are one grid, so that no map is repeated.
        count, channels = len(boxes), feature.shape[1]
        how = {"align_corners": True, "padding_mode": "border"}
        if axes == 1:
            grid = torch.stack((points[0], torch.zeros_like(points[0])), -1)[None]
            values = grid_sample(feature[:, :, None], grid, **how)[0].movedim(0, 1)
            return avg_pool1d(values, RATIO)
        x, y, z = points
        places = x[:, None, None], y[:, None, :, None], z[:, :, None, None]
        grid = torch.stack([place.expand(count, n, n, n) for place in places], -1)
        values = grid_sample(feature, grid.view(1, count * n, n, n, 3), **how)
        return avg_pool3d(values.view(channels, count, n, n, n).movedim(1, 0), RATIO)

    def by_torchvision(self, features: Sequence[Tensor]) -> Tensor:
        """Sequences as maps of one row."""

        def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
            zero = torch.zeros(len(boxes), 1)
            rows = torch.cat((zero, boxes[:, :1], zero, boxes[:, 1:], zero), 1)
            how = (1, self.bins), scale, RATIO
            return torchvision.ops.roi_align(feature[:, :, None], rows, *how)[:, :, 0]

        return self.by_level(features, pool)


def step(pool: Callable[[Sequence[Tensor]], Tensor], features: Sequence[Tensor]) -> Call:
    """Forward and backward."""
    leaves = [f.detach().requires_grad_() for f in features]

    def run() -> None:
        pooled = pool(leaves)
        torch.autograd.grad(pooled, leaves, pooled.detach(), allow_unused=True)

    return run


def contest(name: str, problem: Problem, peers: dict[str, Callable[[Sequence[Tensor]], Tensor]]) -> None:
    """Print the medians of ours and of each peer, forward and with backward."""
    counts = [len(rows) for rows in problem.rows]
    print(f"{name}; boxes by level {counts}")
    expected = problem.ours(problem.features)
    for peer, pool in peers.items():
        error = float((pool(problem.features) - expected).abs().max())
        print(f"  {peer}: results within {error:.1e}")
    pools = {"roialign": problem.ours, **peers}
    for what, calls in (
        ("forward", {peer: partial(pool, problem.features) for peer, pool in pools.items()}),
        ("both ways", {peer: step(pool, problem.features) for peer, pool in pools.items()}),
    ):
        spreads = milliseconds(calls, Effort(SECONDS * len(calls))).values()
        figures = [spread["median"] for spread in spreads]
        row = [
            f"{peer} {ms:.3g} ms ({ms / figures[0]:.1f}x)" for peer, ms in zip(pools, figures, strict=True)
        ]
        print(f"  {what}:", *row, sep="  ")


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians, by turns")
    medical = Problem(64, (64, 128, 128), 3, 200, 7, 0.9)
    contest("volumes, C=64, 64 x 128 x 128 and two coarser, 200 boxes, 7 x 7 x 7", medical, {
        "grid_sample": medical.sampled,
    })  # fmt: skip
    medical.features = [f.contiguous(memory_format=torch.channels_last_3d) for f in medical.features]
    contest("the same, channels_last_3d", medical, {"grid_sample": medical.sampled})
    temporal = Problem(512, (2304,), 5, 1000, 16, 0.5)
    peers = {"grid_sample": temporal.sampled, "torchvision": temporal.by_torchvision}
    contest("sequences, C=512, T=2304 and four coarser, 1000 proposals, 16 bins", temporal, peers)


if __name__ == "__main__":
    main()
