"""Where the ways of the CPU engine cross: the table "Three ways" of docs/performance.md, small shapes, crops.

Run: python benchmarks/ways.py
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchvision
from numba import njit

import roialign
from roialign.cpu import engine

SECONDS = 0.15  # for each figure
MAP = (100, 168)
SCALE = 1 / 8


def boxes(count: int) -> torch.Tensor:
    """`(K, 5)`, of 5 to 30 % of the image's sides."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([MAP[1], MAP[0]]) / SCALE
    size = (0.05 + 0.25 * torch.rand(count, 2, generator=generator)) * extent
    corner = torch.rand(count, 2, generator=generator) * (extent - size)
    return torch.cat((torch.zeros(count, 1), corner, corner + size), 1)


def medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each, by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(times[0]) < 3:
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [1e6 * statistics.median(seconds) for seconds in times]


def call_of(
    pool: Callable[..., torch.Tensor], x: torch.Tensor, count: int, *how: int
) -> Callable[[], object]:
    """Forward, or backward if the map requires a gradient."""
    size, ratio = how
    rois = boxes(count)
    if not x.requires_grad:
        return lambda: pool(x, rois, size, SCALE, ratio)
    pooled = pool(x, rois, size, SCALE, ratio)
    grad = torch.ones_like(pooled)
    return lambda: torch.autograd.grad(pooled, x, grad, retain_graph=True)


def by_way(way: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, let go one way."""

    def run() -> None:
        engine._way = engine._backward_way = lambda *_: way
        engine._ways.cache_clear()
        call()

    return run


def ways() -> None:
    """Planes against packed."""
    print("planes / packed, us; 7 x 7 bins, ratio 2")
    for backward in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            for channels in (16, 48, 64, 256):
                x = torch.randn(1, channels, *MAP).contiguous(memory_format=layout).requires_grad_(backward)
                row = []
                for count in (4, 8, 16, 32, 64, 128):
                    call = call_of(roialign.roi_align, x, count, 7, 2)
                    figures = medians([by_way(way, call) for way in (engine.PLANES, engine.PACKED)])
                    row.append(f"{count}: {figures[0]:.0f}/{figures[1]:.0f}")
                print("backward" if backward else "forward", str(layout)[6:], channels, *row, sep="  ")


def small() -> None:
    """Few channels and one sampling point for each bin, against torchvision."""
    print("roialign / torchvision, us; ratio 1")
    for backward in (False, True):
        for channels in (1, 3, 8):
            x = torch.randn(1, channels, *MAP).requires_grad_(backward)
            for bins in (1, 3, 7):
                row = []
                for count in (10, 100, 1000):
                    pools = roialign.roi_align, torchvision.ops.roi_align
                    ours, theirs = medians([call_of(pool, x, count, bins, 1) for pool in pools])
                    row.append(f"{count}: {ours:.0f}/{theirs:.0f} = {theirs / ours:.2f}x")
                print("backward" if backward else "forward", channels, f"{bins}x{bins}", *row, sep="  ")


@njit(fastmath=True)
def touch(numbers: np.ndarray, places: np.ndarray) -> float:
    total = np.float32(0)
    for place in places:
        total += numbers[place]
    return total


def crops() -> None:
    """32 crops of 14 x 14 of a photo, and what it takes to touch what they read, once each."""
    channels, height, width, size, ratio = 3, 1080, 1920, 14, 2
    photo = torch.rand(1, channels, height, width)
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([width, height])
    sides = (0.1 + 0.4 * torch.rand(32, 2, generator=generator)) * extent
    corner = torch.rand(32, 2, generator=generator) * (extent - sides)
    rois = torch.cat((torch.zeros(32, 1), corner, corner + sides), 1)
    points = (torch.arange(size * ratio) + 0.5) / (size * ratio)
    lines = []
    for at, extent_of_roi in zip(corner.tolist(), sides.tolist(), strict=True):
        low = [(a + points * s).long() for a, s in zip(at, extent_of_roi, strict=True)]
        x, y = (torch.cat((cells, cells + 1)).unique() for cells in low)
        x = (x // 16 * 16).unique()  # the first number of each cache line
        planes = torch.arange(channels) * height * width
        lines.append((planes[:, None, None] + y[:, None] * width + x).flatten())
    places, numbers = torch.cat(lines).numpy(), photo.flatten().numpy()
    calls = [
        lambda: touch(numbers, places),
        lambda: roialign.roi_align(photo, rois, size, 1.0, ratio),
        lambda: torchvision.ops.roi_align(photo, rois, size, 1.0, ratio),
    ]
    figures = [f"{time:.0f}" for time in medians(calls)]
    torch.set_num_threads(1)
    figures.append(f"{medians(calls)[1]:.0f}")
    print(f"{len(places)} cache lines; touched, roialign, torchvision, roialign on one thread, us:", *figures)


if __name__ == "__main__":
    small()
    ways()
    crops()
