"""A grid of shapes, to find where torchvision is faster: too large to measure, so it is sampled.

Cells that users have are named, and always measured. The others are taken from the product of all axes:
first the fewest that meet every pair of values of two axes, by a greedy choice, then such as fill the heat
map, then those whose pairs were met least. The same minutes give the same cells on any machine, and fewer
minutes fewer of them.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mapper import LevelMapper
from ..warmup import DTYPES, LAYOUTS, track
from .contest import agreement, make_calls, race
from .timing import Effort, threads
from .workloads import MASK, PHOTO, STRIDES, Library, Size, Workload, boxes_of, make_maps

AXES: dict[str, tuple[Any, ...]] = {
    "channels": (1, 3, 4, 8, 16, 64, 256, 1024),
    "bins": (1, 7, 14, 28, 64, 224),
    "boxes": (1, 10, 100, 1000),
    "layout": tuple(LAYOUTS),
    "dtype": tuple(DTYPES),
    "sampling": (1, 2, "adaptive"),
    "timed": ("forward", "backward"),
    "maps": (1, 4),
    "threads": (1, 2),
}
HEAT = ("channels", "bins", "timed", "boxes")  # the axes of the heat map
IMAGE = (800, 1344)
STRIDES_OF = {1: (8,), 4: tuple(STRIDES.values())}  # by the number of maps

MOST_BYTES, MOST_SECONDS = 1e9, 1.0  # of a cell; of one of its calls to torchvision
LOSING, ASTONISHING = (
    0.95,
    20.0,
)  # ratios below and above are measured again, longer, before they are believed
FIRST_LOOK = 0.1  # the share of the effort that the others get
RULE = (
    f"Left out: cells of more than {MOST_BYTES / 1e9:g} GB, and those for which torchvision would need "
    f"more than {MOST_SECONDS:g} s a call; both are estimated."
)

_WIDE, _WHOLE = Size((800, 1216), 16, 1.0), {"ratio": 0, "size": PHOTO, "strides": (1,), "whole": True}
_CROPS = {"size": PHOTO, "strides": (1,)}
_MANY = {"size": Size(IMAGE, 1, 1.0), "strides": STRIDES_OF[1]}
_BACKWARD = {"timed": "backward", "grad": True}

NAMED = tuple(
    Workload(name, boxes, bins, **more)
    for name, boxes, bins, more in (
        ("photo to 224", 1, 224, _WHOLE),
        ("photo to 768", 1, 768, _WHOLE),
        ("crops of 14", 32, 14, _CROPS),
        ("crops of 64", 32, 64, _CROPS),
        ("crops of 224", 32, 224, _CROPS),
        ("crops of 224, adaptive", 32, 224, {**_CROPS, "ratio": 0}),
        ("mask targets", 128, 28, {"ratio": 0, "size": MASK, "strides": (1,), "images": 20}),
        ("one box", 1, 7, {"size": Size(IMAGE, 256, 1.0)}),
        ("ten boxes", 10, 7, {"size": Size(IMAGE, 256, 1.0)}),
        ("one box, backward", 1, 7, {"size": Size(IMAGE, 256, 1.0), **_BACKWARD}),
        ("ten boxes, backward", 10, 7, {"size": Size(IMAGE, 256, 1.0), **_BACKWARD}),
        ("wide output, C=16", 32, 112, {"size": _WIDE, "strides": (1,)}),
        ("wide output, C=64", 32, 112, {"size": _WIDE._replace(channels=64), "strides": (1,)}),
        ("200,000 boxes", 200_000, 7, _MANY),
        ("200,000 boxes, backward", 200_000, 7, {**_MANY, **_BACKWARD}),
    )
)


class Cell(NamedTuple):
    """What is measured at once."""

    workload: Workload  # of a size of its own
    threads: int
    size: Size

    def __str__(self) -> str:
        facts = self.facts()
        thread = "thread" if self.threads == 1 else "threads"
        sampling = "adaptive" if facts["sampling"] == "adaptive" else f"ratio {facts['sampling']}"
        if self.workload in NAMED:
            return f"{self.workload.name}, {self.threads} {thread}"
        return (
            "C={channels} {bins}x{bins} K={boxes} {timed}, {layout}, {dtype}, ".format(**facts)
            + f"{sampling}, {facts['maps']} map{'s' * (facts['maps'] > 1)}, {self.threads} {thread}"
        )

    def facts(self) -> dict[str, Any]:
        """Its value on each axis."""
        work = self.workload
        return {
            "channels": self.size.channels,
            "bins": work.bins,
            "boxes": work.boxes,
            "layout": "channels_last" if work.channels_last else "NCHW",
            "dtype": str(work.dtype).removeprefix("torch."),
            "sampling": work.ratio or "adaptive",
            "timed": work.timed,
            "maps": len(work.strides),
            "threads": self.threads,
        }


def measure(
    minutes: float, effort: Effort, quick: bool, libraries: Mapping[str, Library], counts: Sequence[int] = ()
) -> dict[str, Any]:
    """Measure the cells that fit into some minutes: a row for each, and how the sample was taken.

    Args:
        minutes: about how long, if torchvision is as fast as on the machine it was estimated for.
        effort: of a second look; a first has a tenth of it.
        quick: whether to shrink them all.
        libraries: ours and torchvision's.
        counts: threads, instead of the axis.
    """
    axes = AXES | ({"threads": tuple(counts)} if counts else {})
    allowed = [cell for cell in product(axes, quick) if is_allowed(cell)]
    cells = plan(allowed, axes, 60 * minutes, effort, quick)
    rows = [_measure(cell, effort, libraries) for cell in track("measuring", cells)]
    met, possible = (
        pairs_of([row for row in rows if not row["named"]]),
        pairs_of([cell.facts() for cell in allowed]),
    )
    return {
        "rule": RULE,
        "cells_of_grid": len(list(itertools.product(*axes.values()))),
        "cells_allowed": len(allowed),
        "pairs_allowed": len(possible),
        "pairs_measured": len(possible & met),
        "rows": rows,
    }


def product(axes: Mapping[str, Sequence[Any]], quick: bool) -> Iterator[Cell]:
    """Every cell of the grid."""
    for values in itertools.product(*axes.values()):
        yield _make_cell(quick, **dict(zip(axes, values, strict=True)))


def _make_cell(
    quick: bool,
    channels: int,
    bins: int,
    boxes: int,
    layout: str,
    dtype: str,
    sampling: int | str,
    timed: str,
    maps: int,
    threads: int,
) -> Cell:
    workload = Workload(
        "",
        boxes,
        bins,
        ratio=0 if sampling == "adaptive" else int(sampling),
        timed=timed,
        channels_last=layout == "channels_last",
        dtype=DTYPES[dtype],
        grad=timed == "backward",
        size=Size(IMAGE, channels, 1.0),
        strides=STRIDES_OF[maps],
    )
    return Cell(workload, threads, workload.size_of(quick))


def is_allowed(cell: Cell) -> bool:
    """Whether it is not left out by the rule."""
    return bytes_of(cell) <= MOST_BYTES and seconds_of(cell) <= MOST_SECONDS


def bytes_of(cell: Cell) -> float:
    """Memory for the maps and the results of both, and for their gradients."""
    work = cell.workload
    results = cell.size.boxes_of(work.boxes) * cell.size.channels * work.bins**2
    per_value = (work.dtype.itemsize + work.their_dtype.itemsize) * (1 if work.timed == "forward" else 2)
    return (_map_values(cell) + results) * per_value


def seconds_of(cell: Cell) -> float:
    """About what torchvision takes for a call, from what a virtual machine of 2024 took."""
    work = cell.workload
    points = _points(
        cell.size.boxes_of(work.boxes), work.bins, work.ratio, work.strides, cell.size.image, work.whole
    )
    per_channel, per_map_value = (3e-9, 0.0) if work.timed == "forward" else (9e-9, 3e-10)
    if work.channels_last:
        per_map_value += 1e-8  # it copies them
    return points * (6e-9 + per_channel * cell.size.channels) + per_map_value * _map_values(cell)


def _map_values(cell: Cell) -> int:
    image, work = cell.size.image, cell.workload
    cells = sum(-(-image[0] // stride) * -(-image[1] // stride) for stride in work.strides)
    return work.images * cell.size.channels * cells


@functools.cache
def _points(
    boxes: int, bins: int, ratio: int, strides: tuple[int, ...], image: tuple[int, int], whole: bool
) -> int:
    """Where a channel is sampled, over all boxes."""
    if ratio:
        return boxes * (bins * ratio) ** 2
    size = Size(image, 1, 1.0)
    corners = boxes_of(Workload("", boxes, whole=whole), size)
    levels = LevelMapper(2, 5)([corners]) if len(strides) > 1 else torch.zeros(boxes, dtype=torch.int64)
    sides = (corners[:, 2:] - corners[:, :2]) / torch.tensor(strides)[levels, None]
    return int((sides.clamp(min=1) / bins).ceil().prod(1).sum()) * bins**2


def plan(
    allowed: Sequence[Cell], axes: Mapping[str, Sequence[Any]], seconds: float, effort: Effort, quick: bool
) -> list[Cell]:
    """The named cells, and of the others as many as fit into the seconds."""
    cells = [Cell(work, n, work.size_of(quick)) for work in NAMED for n in axes["threads"]]
    seconds -= sum(_cost(cell, effort) for cell in cells)
    for index in spread_out([cell.facts() for cell in allowed], axes):
        seconds -= _cost(allowed[index], effort)
        if seconds < 0:
            break
        cells.append(allowed[index])
    return cells


def _cost(cell: Cell, effort: Effort) -> float:
    """About how many seconds it takes to make the maps and to measure, ours being no slower by much."""
    calls = 2 * ((effort.repeats or 3) + 3) * seconds_of(cell)  # three before the first round
    look = 0.0 if effort.repeats else FIRST_LOOK * effort.seconds
    return max(look, calls) + 0.2 + 2e-8 * _map_values(cell)


def spread_out(facts: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> Iterator[int]:
    """Indices of cells in an order that soon meets every group of values, and then the rarest again.

    Each is that which has most of the groups met least; among equals chance decides, with a seed.
    """
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(0))
    groups = _groups(facts, axes)[order]
    met = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    taken = torch.zeros(len(facts), dtype=torch.bool)
    for _ in range(len(facts)):
        worth = torch.pow(64.0, -met)[groups].sum(1)  # one not yet met counts more than all the others
        chosen = int(worth.masked_fill(taken, -1.0).argmax())
        met[groups[chosen]] += 1
        taken[chosen] = True
        yield int(order[chosen])


def _groups(facts: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> Tensor:
    """`(cells, groups of axes)`: a number for the values of each pair of axes, and of the heat map's."""
    numbers: dict[Any, int] = {}
    groups = [*itertools.combinations(axes, 2), HEAT]
    return torch.tensor(
        [
            [numbers.setdefault((group, *(fact[axis] for axis in group)), len(numbers)) for group in groups]
            for fact in facts
        ]
    )


def pairs_of(facts: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """All pairs of values of two axes that some cells meet."""
    return {
        (one, fact[one], other, fact[other])
        for fact in facts
        for one, other in itertools.combinations(AXES, 2)
    }


def _measure(cell: Cell, effort: Effort, libraries: Mapping[str, Library]) -> dict[str, Any]:
    """Times, ratio and differences; a ratio that is hard to believe is measured again."""
    work = cell.workload
    with threads(cell.threads):
        calls = make_calls(work, cell.size, make_maps(work, cell.size), libraries)
        agreed = agreement(work, calls, {})
        raced = first = race(calls, effort._replace(seconds=FIRST_LOOK * effort.seconds))
        if not LOSING <= first["ratio"]["median"] <= ASTONISHING:
            raced = race(calls, effort)
    return {
        "name": str(cell),
        "named": work in NAMED,
        **cell.facts(),
        **agreed,
        **raced,
        "first_ratio": first["ratio"]["median"],
    }
