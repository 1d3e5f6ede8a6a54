"""Scratch: what a call takes beside its arguments and its results, at its peak, by number of boxes."""

import subprocess
from typing import Any

import torch

from ..layout import is_channels_last
from ..rois import boxes_to_rois
from ..schema import DTYPES, Maps, Pooling, pool, scatter
from .probes import python, resident
from .workloads import FULL, STRIDES, WORKLOADS, make_boxes, make_maps

COUNTS = (10, 1000, 20_000, 400_000)
CHANNELS = (1, 3, 16)
MOST = 1e9  # bytes of results, beyond which it is not measured
GRIDS = {"fixed": 2, "adaptive": 0}

_PROGRAM = """
import sys
from roialign.bench.memory import measure
print(measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
"""


def scratch(quick: bool) -> list[dict[str, Any]]:
    """A row for each number of channels, direction and grid: megabytes by number of boxes.

    None where it is unknown, or where the results are too large to be measured.
    """
    counts = COUNTS[:2] if quick else COUNTS
    return [
        {
            "channels": channels,
            "direction": direction,
            "grid": grid,
            "mb": {count: _in_a_new_process(direction, grid, count, channels) for count in counts},
        }
        for channels in (CHANNELS[:1] if quick else CHANNELS)
        for direction in ("forward", "backward")
        for grid in GRIDS
    ]


def _in_a_new_process(direction: str, grid: str, count: int, channels: int) -> float | None:
    if count * channels * 7 * 7 * 4 > MOST:
        return None
    numbers = map(str, (count, channels, torch.get_num_threads()))
    try:
        printed = python(_PROGRAM, direction, grid, *numbers)
    except subprocess.CalledProcessError:
        return None
    return None if printed.strip() == "None" else float(printed)


def measure(direction: str, grid: str, count: int, channels: int, threads: int) -> float | None:
    """Megabytes of scratch of one operator, in this process, which must have done nothing yet.

    7 x 7 bins, the pyramid and the boxes of the box head. Only Linux can tell.
    """
    torch.set_num_threads(threads)
    size = FULL._replace(channels=channels)
    maps = list(make_maps(WORKLOADS["box-head"], size).values())
    scales = [1 / stride for stride in STRIDES.values()]
    pooling = Pooling((7, 7), scales, GRIDS[grid], False, (), (0,))
    levels = torch.arange(count) % len(maps)
    rois = boxes_to_rois([make_boxes(count, size.image)], maps[0], torch.float32)
    grad = torch.ones(count, channels, 7, 7)
    described = Maps(
        [1, channels, *(side for m in maps for side in m.shape[2:])],
        [DTYPES.index(m.dtype) for m in maps],
        [is_channels_last(m) for m in maps],
    )

    def call(n: int) -> list[torch.Tensor]:
        if direction == "forward":
            return [pool(maps, rois[:n], levels[:n], pooling)]
        return scatter(grad[:n], rois[:n], levels[:n], described, pooling)

    call(1)  # compiled or read from the disk
    results, grown = resident(lambda: call(count))
    return None if grown is None else (grown - sum(t.nbytes for t in results)) / 1e6
