"""The engine: choose a way by channels, layout and number of RoIs, and let threads take its tasks.

Where RoIs share cells or maps they are surveyed first, and tables filled for as many as there is room for;
else each thread lays the tables of a RoI when its turn comes. All scratch of a call lies in its arena, and
what does not depend on the number of boxes is bounded: tables for some thousand RoIs, and a share for each
thread.
"""

import bisect
import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import rows_of, view_of_rows
from ..schema import Pooling
from . import backward as backward_kernel
from . import direct as direct_kernel
from . import forward as forward_kernel
from . import planes, planes_backward, points, threads
from .jit import cache_folder as cache_folder
from .jobs import lay, pack
from .lanes import Scratch
from .lines import lay_room
from .maps import Layout, Maps, at, describe, describe_maps, in_one_run, layout, pose, slices_of
from .memory import Arena, integers
from .memory import empty as empty
from .simd import LANES, TAGS
from .survey import Survey, Tables, fill_tables, most_taps, take_survey, turn_around

_TAG = {getattr(torch, name): tag for name, tag in TAGS.items()}
_WORK = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_SLAB = 2**16  # RoIs that are put in order, or have tables, at once
_ROOM = 2**20  # taps that tables have at once: 20 MB, in float64 24 MB
_ROOM_TURNED = 2**19  # and twice that where they are turned around too
_KEPT = 16 * 2**20  # bytes of rings that are kept from some tables to the next
_TASKS_PER_THREAD = 4
DIRECT, PACKED, PLANES = "direct", "packed", "planes"
# RoIs times channels from where on sharing pays; backward, and where a cell is long in memory: in channels.
FEW, FEW_BACKWARD, FEW_BACKWARD_LONG, LONG = 3000, 1024, 2**15, 128

Array = NDArray[np.int64]


def forward(
    out: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> bool:
    """Pool every RoI from its map; see `reference.forward`. Returns whether one cannot be pooled."""
    arena = Arena()
    start = arena.mark()
    rois = rois.contiguous()
    levels = None if levels is None else levels.contiguous()
    slices = slices_of(features)
    if slices:
        out, features = view_of_rows(out), [rows_of(f) for f in features]
    layouts = tuple([layout(f) for f in features])
    lost = False
    for dtype, way, mine in _ways(layouts, tuple([f.dtype for f in features]), out.shape[0], out.stride(1)):
        maps = describe_maps(features, layouts, slices, mine)
        tags = _TAG[dtype], _WORK[rois.dtype], _TAG[out.dtype]
        if way is PLANES:
            lost |= _forward_planes(out, maps, rois, levels, pooling, tags, arena, 0, len(rois))
            arena.rewind(start)
            continue
        for lo in range(0, len(rois), _SLAB):
            part = slice(lo, lo + _SLAB)
            some = out, rois, levels
            if len(rois) > _SLAB:
                some = out[part], rois[part], None if levels is None else levels[part]
            lost |= _forward(some[0], maps, *some[1:], pooling, tags, way, arena)
            arena.rewind(start)
    arena.give_back()
    return lost


@functools.lru_cache(256)
def _ways(
    layouts: tuple[Layout, ...], dtypes: tuple[torch.dtype, ...], rois: int, channel_step: int
) -> list[tuple[torch.dtype, str, tuple[bool, ...]]]:
    """What maps are read as and in which way, and those of which it is so.

    Args:
        layouts: of the maps.
        dtypes: of the maps.
        rois: how many there are.
        channel_step: of the result.
    """
    kinds = [
        (dtype, _way(shape[1], stride[1] == channel_step == 1, rois))
        for (shape, stride, _), dtype in zip(layouts, dtypes, strict=True)
    ]
    return [(*kind, tuple(k == kind for k in kinds)) for kind in dict.fromkeys(kinds)]


def _way(channels: int, innermost: bool, rois: int) -> str:
    """The way that takes least time, by the table "Three ways" of docs/performance.md.

    What it costs to survey, sort and share pays for many RoIs of many channels. A result hangs on the
    way only where that is direct, which the number of RoIs has no part in.
    """
    if innermost and channels >= int(direct_kernel.WIDE):
        return DIRECT
    return PLANES if channels < LANES or rois * channels < FEW else PACKED


def _forward_planes(
    out: Tensor, maps: Maps, rois: Tensor, levels: Tensor | None, pooling: Pooling,
    tags: tuple[Any, ...], arena: Arena, order: int, n: int,
) -> bool:  # fmt: skip
    """Have every RoI laid, read and summed by one thread, or a large one by several.

    The RoIs are the n listed at `order`, or if that is 0 the first n. Returns whether one cannot be pooled.
    """
    _, channels, height, width = out.shape
    problem, _constants = pose(rois, levels, maps, pooling)
    taps = most_taps(problem, tags[1], order, n)
    room, size = lay_room(
        *taps, max(maps.heights), max(maps.widths), height, width, maps.inner, rois.itemsize, 0
    )
    # Points of a grid of fixed ratio may lie far apart, and then each needs a window of its own.
    step = 1 if pooling.sampling_ratio <= 0 else LANES
    rows, columns = min(taps[0], max(maps.heights)), min(taps[1] // 2 * step, max(maps.widths)) + LANES
    work, at_once, pieces = planes.share(n, channels, height, rows, columns, _tasks_wanted())
    pooled = describe(out)
    pointwise = int(points.are_few(channels, pooling))
    job = 0, 0, *problem, at(pooled), channels, n, order, at_once, pieces, pointwise, maps.longest, *room
    row = array("q", job)  # a `planes.Job`, laid without `pack` to save time
    threads.run(planes.run, tags, at(row), -(-n // at_once) * pieces, size, work, arena)
    return bool(row[1])


def _forward(
    out: Tensor, maps: Maps, rois: Tensor, levels: Tensor | None, pooling: Pooling,
    tags: tuple[Any, ...], way: str, arena: Arena,
) -> bool:  # fmt: skip
    survey, lost = take_survey(rois, levels, maps, pooling, tags[1], arena)
    if lost:
        out[torch.from_numpy(integers(survey.keys, len(rois)) == -1)] = pooling.lost
    pooled, base, lo = describe(out), arena.mark(), 0
    while lo < survey.done:
        t = fill_tables(survey, lo, min(survey.done, lo + _SLAB), maps, _ROOM, arena)
        job = at(maps.rows), len(maps.mine), at(pooled)
        rest = (survey.order + 8 * lo, t.homes, t.ys, t.xs, out.shape[1])
        if way is DIRECT:
            _forward_in_place(tags, job, rest, t, out, arena)
        else:
            others, n = _forward_packed(tags, job, rest, t, out, arena)
            if n:
                _forward_planes(out, maps, rois, levels, pooling, tags, arena, others, n)
        arena.rewind(base)
        lo += t.number
    return lost > 0


def _forward_in_place(
    tags: tuple[Any, ...], job: tuple[Any, ...], rest: tuple[Any, ...], t: Tables, out: Tensor, arena: Arena
) -> None:
    most = max(int(direct_kernel.CELLS), t.x_taps)
    entries = direct_kernel.entries(most, out.shape[1], out.shape[3])
    tasks = math.ceil(t.number / direct_kernel.ROIS)
    line, work = max(most, out.shape[3] + 1), _work(t, out.shape[1])
    scratch = _scratch(line, entries, tags)
    _run(direct_kernel.run, direct_kernel.Job, tags, (*job, t.number, *rest), scratch, tasks, work, arena)


def _forward_packed(
    tags: tuple[Any, ...], job: tuple[Any, ...], rest: tuple[Any, ...], t: Tables, out: Tensor, arena: Arena
) -> tuple[int, int]:
    """Pool those RoIs that share cells, or are dense. Returns which and how many others there are."""
    blocks = math.ceil(out.shape[1] / LANES)
    most = max(64, t.number * blocks // _tasks_wanted())
    groups = arena.take(8 * t.number * int(forward_kernel.GROUP_COLUMNS))
    others = arena.take(8 * t.number)
    number, cells, left_out = forward_kernel.group(
        t.number, rest[0], t.homes, t.ys, t.xs, most, groups, others
    )
    entries = forward_kernel.entries(cells, t.columns, out.shape[3])
    line, work = max(t.rows, t.columns, *out.shape[2:]) + 1, _work(t, out.shape[1])
    job = (0, *job, groups, number, *rest)
    scratch = _scratch(line, entries, tags)
    if number:
        _run(forward_kernel.run, forward_kernel.Job, tags, job, scratch, number * blocks, work, arena)
    return others, left_out


def backward(
    grads: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """The adjoint of `forward` in the features; see `reference.backward`."""
    slices = slices_of(grads)
    if slices:
        grad, grads = rows_of(grad), [view_of_rows(g) for g in grads]
    grad = in_one_run(grad)
    rois = rois.contiguous()
    levels = None if levels is None else levels.contiguous()
    arena = Arena()
    start = arena.mark()
    layouts = tuple(layout(g) for g in grads)
    for dtype in dict.fromkeys(g.dtype for g in grads):
        maps = describe_maps(grads, layouts, slices, tuple(g.dtype == dtype for g in grads))
        tags = _TAG[dtype], _WORK[rois.dtype], _TAG[grad.dtype]
        pointwise = points.are_few(grad.shape[1], pooling)
        if pointwise and dtype == rois.dtype:
            _backward_points(grads, grad, maps, rois, levels, pooling, tags, arena)
            arena.rewind(start)
            continue
        survey, _lost = take_survey(rois, levels, maps, pooling, tags[1], arena)
        innermost = all(g.stride(1) == 1 for g in grads if g.dtype == dtype)
        if slices or _backward_way(grad.shape[1], innermost, len(rois)) is PLANES:
            _backward_planes(grads, grad, maps, survey, tags, arena)
        else:
            _Backward(grads, grad, maps, survey, tags, arena).run()
        arena.rewind(start)
    arena.give_back()


def _backward_points(
    grads: Sequence[Tensor], grad: Tensor, maps: Maps, rois: Tensor, levels: Tensor | None, pooling: Pooling,
    tags: tuple[Any, ...], arena: Arena,
) -> None:  # fmt: skip
    """Have every band of rows summed by one thread, from all RoIs, without a survey of them."""
    problem, _constants = pose(rois, levels, maps, pooling)
    (height, width), ratio = pooling.output_size, pooling.sampling_ratio
    work = 8 * ratio * ratio * grad.numel() + sum(g.numel() for g in grads)
    bands = threads.worth(work)
    room, size = lay(points.sizes(height * ratio, width * ratio, rois.itemsize))
    pooled = describe(grad)
    row = pack(points.Job(0, problem, at(pooled), grad.shape[1], len(rois), bands, room))
    threads.run(points.run_backward, tags, at(row), bands, size, work, arena)


def _backward_way(channels: int, innermost: bool, rois: int) -> str:
    """Likewise, of the adjoint; sums have the same bits in both ways.

    To write 16 channels of every cell at a time is slow where a cell has many side by side: planes write all.
    """
    few = FEW_BACKWARD_LONG if innermost and channels >= LONG else FEW_BACKWARD
    return PLANES if channels < LANES or rois * channels < few else PACKED


def _backward_planes(
    grads: Sequence[Tensor], grad: Tensor, maps: Maps, survey: Survey, tags: tuple[Any, ...], arena: Arena
) -> None:
    """Have every band of a map summed by one thread, from all RoIs that reach into it."""
    _, channels, height, width = grad.shape
    bounds = integers(survey.bounds, len(maps.first)).tolist()
    tasks, band = planes_backward.cut(
        grads, maps.mine, bounds, channels, height * width, torch.get_num_threads()
    )
    taps = most_taps(survey.problem, tags[1], survey.order, survey.done)
    room, size = lay_room(
        *taps, max(maps.heights), max(maps.widths), height, width, maps.inner, tags[1].itemsize, band
    )
    pooled = describe(grad)
    n_tasks = len(tasks) // int(planes_backward.TASK_COLUMNS)
    order = survey.keys, survey.order, at(maps.first), survey.spans
    job = 0, *survey.problem, at(pooled), channels, at(tasks), n_tasks, *order, maps.longest, *room
    row = array("q", job)  # a `planes_backward.Job`, laid without `pack` to save time
    work = grad.numel() * 16 + sum(g.numel() for g in grads)
    threads.run(planes_backward.run, tags, at(row), n_tasks, size, work, arena)


class _Backward:
    """One pass over the gradient maps of one dtype."""

    def __init__(
        self,
        grads: Sequence[Tensor],
        grad: Tensor,
        maps: Maps,
        survey: Survey,
        tags: tuple[Any, ...],
        arena: Arena,
    ) -> None:
        self.maps, self.survey, self.grad, self.arena = maps, survey, grad, arena
        self.pooled = describe(grad)
        self.tags = tags
        self.job = at(maps.rows), len(grads), at(self.pooled)
        homes = len(maps.first) - 1
        self.bounds: list[int] = integers(survey.bounds, homes + 1).tolist()
        self.spans: list[int] = integers(survey.spans, homes).tolist()
        blocks = math.ceil(grad.shape[1] / LANES)
        share = min(1.0, blocks / _tasks_wanted())
        self.most = math.ceil(max(maps.widths) * share)

    def run(self) -> None:
        """Take as many whole maps at a time as there is room for the tables of their RoIs."""
        home, homes, base = 0, len(self.spans), self.arena.mark()
        while home < homes:
            lo = self.bounds[home]
            t = self.fill(lo, self.survey.done)
            stop = bisect.bisect_right(self.bounds, lo + t.number) - 1
            if stop > home:
                tasks = self.cut(home, stop)
                if len(tasks):
                    self.run_tasks(tasks, self.entries(tasks), lo, t)
            self.arena.rewind(base)
            if stop == home:
                self.run_by_parts(home)
                stop += 1
            home = stop

    def run_by_parts(self, home: int) -> None:
        """Take one map with RoIs for several tables; its rings are kept from one to the next."""
        tasks, base = self.cut(home, home + 1), self.arena.mark()
        entries = self.entries(tasks)
        size = int(tasks[0, backward_kernel.RING] * tasks[0, backward_kernel.SPAN])
        size *= LANES * self.tags[1].itemsize
        at_once = max(1, _KEPT // size)
        for first in range(0, len(tasks), at_once):
            some = tasks[first : first + at_once]
            some[:, backward_kernel.KEPT] = [self.arena.take(size) for _ in some]
            rings, lo, stop = self.arena.mark(), self.bounds[home], self.bounds[home + 1]
            while lo < stop:
                t = self.fill(lo, stop)
                some[:, backward_kernel.START], some[:, backward_kernel.STOP] = 0, t.number
                some[:, backward_kernel.ENDS] = lo + t.number == stop
                self.run_tasks(some, entries, lo, t)
                self.arena.rewind(rings)
                lo += t.number
            self.arena.rewind(base)

    def fill(self, lo: int, stop: int) -> Tables:
        """Tables of the RoIs from `lo` on, as many as there is room for."""
        return fill_tables(self.survey, lo, min(stop, lo + _SLAB), self.maps, _ROOM_TURNED, self.arena)

    def cut(self, home: int, stop: int) -> Array:
        """Tasks for some maps."""
        mine, widths = self.maps.mine, self.maps.widths
        homes = [h for h in range(home, stop) if mine[h % len(mine)]]
        height, channels, lo = self.grad.shape[2], self.grad.shape[1], self.bounds[home]
        return backward_kernel.cut(widths, self.bounds, self.spans, homes, lo, height, channels, self.most)

    def entries(self, tasks: Array) -> tuple[int, int, int]:
        """Of scratch, that all of these or any take."""
        return backward_kernel.entries(tasks, *self.grad.shape[1:])

    def run_tasks(self, tasks: Array, entries: tuple[int, int, int], lo: int, t: Tables) -> None:
        """Run tasks whose RoIs have tables from RoI `lo` on."""
        channels, height, width = self.grad.shape[1:]
        ys = turn_around(t.ys, t, height, self.tags[1], self.arena)
        xs = turn_around(t.xs, t, width, self.tags[1], self.arena)
        job = (*self.job, tasks.ctypes.data, len(tasks), self.survey.order + 8 * lo, ys, xs, channels)
        cells = sum(h * w for h, w in zip(self.maps.heights, self.maps.widths, strict=True))
        work = _work(t, channels) + cells * self.maps.images * channels
        line = max(t.rows, t.columns, height, width) + 1
        scratch = _scratch(line, entries, self.tags)
        _run(backward_kernel.run, backward_kernel.Job, self.tags, job, scratch, len(tasks), work, self.arena)


def _run(
    kernel: Any,
    kind: Any,
    tags: tuple[Any, ...],
    job: tuple[Any, ...],
    scratch: Scratch,
    tasks: int,
    work: int,
    arena: Arena,
) -> "array[int]":
    """Run a task kernel on the threads, each with scratch of its own.

    Args:
        kernel: what to run.
        kind: of its job, a NamedTuple.
        tags: numbers of the three types that it is compiled for.
        job: the fields between the first and the scratch. They name memory by address, which the caller
            owns until this returns.
        scratch: its sizes.
        tasks: how many there are.
        work: about how many numbers are read.
        arena: for the scratch.

    Returns:
        The job as the kernel leaves it.
    """
    offsets, size = lay(scratch)
    row = pack(kind(0, *job, offsets))
    threads.run(kernel, tags, at(row), tasks, size, work, arena)
    return row


def _work(t: Tables, channels: int) -> int:
    """About how many numbers of maps the RoIs of some tables read; most read less than the largest may."""
    return t.number * channels * t.rows * t.columns // 4


def _tasks_wanted() -> int:
    return _TASKS_PER_THREAD * torch.get_num_threads()


def _scratch(line: int, entries: Sequence[int], tags: tuple[Any, ...]) -> Scratch:
    """Sizes of lists of offsets, and of what has entries of 16 numbers."""
    return Scratch(*(8 * line,) * 6, *(n * LANES * tags[1].itemsize for n in entries))
