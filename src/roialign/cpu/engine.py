"""The engine: survey the RoIs, fill tables for as many as there is room for, and let threads take tasks.

A task is a group of RoIs and a block of channels. All scratch of a call lies in its arena, and what
does not depend on the number of boxes is bounded: tables for some thousand RoIs, and a share for each thread.
"""

import bisect
import functools
import itertools
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import strides
from ..schema import Pooling
from . import backward as backward_kernel
from . import direct as direct_kernel
from . import forward as forward_kernel
from . import tables, threads
from .jit import cache_folder as cache_folder
from .jobs import lay_scratch, pack
from .memory import Arena, integers
from .memory import empty as empty
from .simd import LANES, TAGS

_TAG = {getattr(torch, name): tag for name, tag in TAGS.items()}
_WORK = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_SLAB = 2**16  # RoIs that are put in order, or have tables, at once
_ROOM = 2**20  # taps that tables have at once: 20 MB, in float64 24 MB
_ROOM_TURNED = 2**19  # and twice that where they are turned around too
_KEPT = 16 * 2**20  # bytes of rings that are kept from some tables to the next
_TASKS_PER_THREAD = 4

Array = NDArray[np.int64]


class Maps(NamedTuple):
    """The maps of a call, and where the rows of each begin if all are counted through, image by image."""

    rows: "array[int]"  # of numbers; see `tables.AT` and on
    first: "array[int]"  # N * L + 1
    images: int
    heights: list[int]
    widths: list[int]
    mine: list[bool]  # which are to be done

    @property
    def longest(self) -> int:
        """The most cells along any axis."""
        return max(*self.heights, *self.widths)


class Survey(NamedTuple):
    """All RoIs in order, and what is known of them before there are tables. Arrays are named by address."""

    problem: tables.Problem
    tag: Any  # a number of the working precision
    order: int  # (K,) first those that are to be done
    done: int  # how many are to be done
    keys: int  # (K,) the first row of each RoI
    spans: int  # (N * L,) the most rows that a RoI of a map spans
    bounds: int  # (N * L + 1,) the first RoI of each map, in their order
    owned: object


class Tables(NamedTuple):
    """The tables of some RoIs."""

    ys: tables.AxisAt
    xs: tables.AxisAt
    homes: int  # address: the map of each RoI
    number: int  # of RoIs
    taps: int  # there is room for
    rows: int  # the most that a RoI touches
    columns: int
    x_taps: int  # the most that a RoI has


def forward(
    out: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """Pool every RoI from its map; see `reference.forward`."""
    arena = Arena()
    start = arena.mark()
    rois = rois.contiguous()
    kinds = [_kind(f, out) for f in features]
    for kind in dict.fromkeys(kinds):
        maps = _describe_maps(features, [k == kind for k in kinds])
        for lo in range(0, len(rois), _SLAB):
            part = slice(lo, lo + _SLAB)
            some = out, rois, levels
            if len(rois) > _SLAB:
                some = out[part], rois[part], None if levels is None else levels[part]
            _forward(some[0], features, maps, *some[1:], pooling, kind, arena)
            arena.rewind(start)
    arena.give_back()


def _forward(
    out: Tensor,
    features: Sequence[Tensor],
    maps: Maps,
    rois: Tensor,
    levels: Tensor | None,
    pooling: Pooling,
    kind: tuple[torch.dtype, bool],
    arena: Arena,
) -> None:
    survey, lost = _survey(rois, levels, maps, pooling, arena)
    if lost:
        out[torch.from_numpy(integers(survey.keys, len(rois)) == -1)] = torch.nan
    dtype, in_place = kind
    pooled = _describe(out)
    tags = _TAG[dtype], _WORK[rois.dtype], _TAG[out.dtype]
    base, lo = arena.mark(), 0
    while lo < survey.done:
        t = _fill(survey, lo, survey.done, maps, _ROOM, arena)
        job = _at(maps.rows), len(features), _at(pooled)
        rest = (survey.order + 8 * lo, t.homes, t.ys, t.xs, out.shape[1])
        (_forward_in_place if in_place else _forward_packed)(tags, job, rest, t, out, arena)
        arena.rewind(base)
        lo += t.number


def _forward_in_place(
    tags: tuple[Any, ...], job: tuple[Any, ...], rest: tuple[Any, ...], t: Tables, out: Tensor, arena: Arena
) -> None:
    most = max(int(direct_kernel.CELLS), t.x_taps)
    entries = direct_kernel.entries(most, out.shape[1], out.shape[3])
    tasks = math.ceil(t.number / direct_kernel.ROIS)
    line, work = max(most, out.shape[3] + 1), t.taps * out.shape[1]
    _run(direct_kernel, tags, (*job, t.number, *rest), line, entries, tasks, work, arena)


def _forward_packed(
    tags: tuple[Any, ...], job: tuple[Any, ...], rest: tuple[Any, ...], t: Tables, out: Tensor, arena: Arena
) -> None:
    blocks = math.ceil(out.shape[1] / LANES)
    most = max(64, t.number * blocks // (_TASKS_PER_THREAD * torch.get_num_threads()))
    groups = arena.take(8 * t.number * int(forward_kernel.GROUP_COLUMNS))
    number, cells = forward_kernel.group(t.number, t.homes, t.ys, t.xs, most, groups)
    entries = forward_kernel.entries(cells, t.columns, out.shape[3])
    line, work = max(t.rows, t.columns, *out.shape[2:]) + 1, t.taps * out.shape[1]
    job = (*job, groups, number, *rest)
    _run(forward_kernel, tags, job, line, entries, number * blocks, work, arena)


def backward(
    grads: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """The adjoint of `forward` in the features; see `reference.backward`."""
    grad = _in_one_run(grad)
    rois = rois.contiguous()
    arena = Arena()
    start = arena.mark()
    for dtype in dict.fromkeys(g.dtype for g in grads):
        maps = _describe_maps(grads, [g.dtype == dtype for g in grads])
        survey, _lost = _survey(rois, levels, maps, pooling, arena)
        _Backward(grads, grad, maps, survey, dtype, rois.dtype, arena).run()
        arena.rewind(start)
    arena.give_back()


class _Backward:
    """One pass over the gradient maps of one dtype."""

    def __init__(
        self,
        grads: Sequence[Tensor],
        grad: Tensor,
        maps: Maps,
        survey: Survey,
        dtype: torch.dtype,
        working: torch.dtype,
        arena: Arena,
    ) -> None:
        self.maps, self.survey, self.grad, self.arena = maps, survey, grad, arena
        self.pooled = _describe(grad)
        self.tags = _TAG[dtype], _WORK[working], _TAG[grad.dtype]
        self.job = _at(maps.rows), len(grads), _at(self.pooled)
        self.working = working
        homes = len(maps.first) - 1
        self.bounds: list[int] = integers(survey.bounds, homes + 1).tolist()
        self.spans: list[int] = integers(survey.spans, homes).tolist()
        blocks = math.ceil(grad.shape[1] / LANES)
        share = min(1.0, blocks / (_TASKS_PER_THREAD * torch.get_num_threads()))
        self.most = math.ceil(max(maps.widths) * share)

    def run(self) -> None:
        """Take as many whole maps at a time as there is room for the tables of their RoIs."""
        home, homes, base = 0, len(self.spans), self.arena.mark()
        while home < homes:
            lo = self.bounds[home]
            t = _fill(self.survey, lo, self.survey.done, self.maps, _ROOM_TURNED, self.arena)
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
        size *= LANES * self.working.itemsize
        at_once = max(1, _KEPT // size)
        for first in range(0, len(tasks), at_once):
            some = tasks[first : first + at_once]
            some[:, backward_kernel.KEPT] = [self.arena.take(size) for _ in some]
            rings, lo, stop = self.arena.mark(), self.bounds[home], self.bounds[home + 1]
            while lo < stop:
                t = _fill(self.survey, lo, stop, self.maps, _ROOM_TURNED, self.arena)
                some[:, backward_kernel.START], some[:, backward_kernel.STOP] = 0, t.number
                some[:, backward_kernel.ENDS] = lo + t.number == stop
                self.run_tasks(some, entries, lo, t)
                self.arena.rewind(rings)
                lo += t.number
            self.arena.rewind(base)

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
        ys = _turn(t.ys, t, height, self.working, self.arena)
        xs = _turn(t.xs, t, width, self.working, self.arena)
        job = (*self.job, tasks.ctypes.data, len(tasks), self.survey.order + 8 * lo, ys, xs, channels)
        cells = sum(h * w for h, w in zip(self.maps.heights, self.maps.widths, strict=True))
        work, line = (t.taps + cells * self.maps.images) * channels, max(t.rows, t.columns, height, width) + 1
        _run(backward_kernel, self.tags, job, line, entries, len(tasks), work, self.arena)


def _run(
    kernel: Any,
    tags: tuple[Any, ...],
    job: tuple[Any, ...],
    line: int,
    entries: Sequence[int],
    tasks: int,
    work: int,
    arena: Arena,
) -> None:
    """Run a task kernel on the threads, each with scratch of its own.

    Args:
        kernel: the module of `Job` and `run`.
        tags: numbers of the three types that it is compiled for; the second is the working precision's.
        job: the fields of `Job` between the first and the last. It names memory by address, which the caller
            owns until this returns.
        line: see `jobs.lay_scratch`, as for `entries`.
        entries: of scratch.
        tasks: how many there are.
        work: about how many numbers are read.
        arena: for the scratch.
    """
    scratch, share = lay_scratch(line, entries, tags[1].itemsize)
    row = pack(kernel.Job(0, *job, scratch))
    threads.run(kernel.run, tags, _at(row), tasks, share, work, arena)


def _survey(
    rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Pooling, arena: Arena
) -> tuple[Survey, int]:
    """Put the RoIs in order; and how many cannot be pooled."""
    tag, n = _WORK[rois.dtype], len(rois)
    levels = None if levels is None else levels.contiguous()
    constants = scales, thresholds, serving = _constants(
        tuple(pooling.scales), tuple(pooling.thresholds), tuple(pooling.order), rois.dtype
    )
    height, width = pooling.output_size
    problem = tables.Problem(
        rois.data_ptr(), 0 if levels is None else levels.data_ptr(), len(maps.mine), maps.images,
        _at(maps.rows), _at(scales), _at(thresholds), _at(serving), len(thresholds), height, width,
        pooling.sampling_ratio, pooling.aligned,
    )  # fmt: skip
    homes, rows = len(maps.first) - 1, maps.first[-1]
    keys, order, spans = arena.take(8 * n), arena.take(8 * n), arena.take(8 * homes)
    bounds, counts = arena.take(8 * (homes + 1)), arena.take(8 * rows)
    lost = tables.survey(tag, problem, n, keys, _at(maps.first), homes, spans, counts)
    done = tables.sort(n, keys, _at(maps.first), homes, counts, order, bounds)
    return Survey(problem, tag, order, done, keys, spans, bounds, (rois, levels, maps, constants)), lost


def _fill(survey: Survey, lo: int, stop: int, maps: Maps, room: int, arena: Arena) -> Tables:
    """Fill tables for the RoIs from number `lo` in their order on: as many as there is room for."""
    problem, tag = survey.problem, survey.tag
    n, order = min(stop - lo, _SLAB), survey.order + 8 * lo
    if problem.sampling_ratio > 0:
        y_taps, x_taps = (2 * problem.sampling_ratio * bins for bins in (problem.bins_y, problem.bins_x))
        n = min(n, max(1, room // (y_taps + x_taps)))
        y_taps, x_taps = n * y_taps, n * x_taps
        y_base, x_base = arena.take(8 * (n + 1)), arena.take(8 * (n + 1))
    else:
        y_base, x_base = arena.take(8 * (n + 1)), arena.take(8 * (n + 1))
        n, y_taps, x_taps = tables.measure(tag, problem, order, n, room, y_base, x_base)
    ys = _axis(y_base, n, n * (problem.bins_y + 1), y_taps, tag, arena)
    xs = _axis(x_base, n, n * (problem.bins_x + 1), x_taps, tag, arena)
    homes, place = arena.take(8 * n), arena.take(8 * maps.longest)
    most = tables.fill(tag, problem, order, n, ys, xs, homes, place, maps.longest)
    return Tables(ys, xs, homes, n, y_taps + x_taps, *most)


def _axis(base: int, rois: int, starts: int, taps: int, tag: Any, arena: Arena) -> tables.AxisAt:
    start, places, cells, touched = (arena.take(8 * size) for size in (starts, taps, taps, rois))
    return tables.AxisAt(base, start, places, cells, touched, arena.take(tag.itemsize * taps))


def _turn(axis: tables.AxisAt, t: Tables, bins: int, working: torch.dtype, arena: Arena) -> tables.AxisAt:
    """The table from taps of bins on cells to taps of cells on bins."""
    tag: Any = _WORK[working]
    starts, taps, weights = (arena.take(size * (t.taps + t.number)) for size in (8, 8, tag.itemsize))
    turned = axis._replace(start=starts, taps=taps, weights=weights)
    tables.turn_around(tag, t.number, bins, axis, turned)
    return turned


def _kind(feature: Tensor, out: Tensor) -> tuple[torch.dtype, bool]:
    """What a map is read as, and whether in place."""
    in_place = feature.stride(1) == out.stride(1) == 1 and out.shape[1] >= int(direct_kernel.WIDE)
    return feature.dtype, in_place


def _describe_maps(features: Sequence[Tensor], mine: list[bool]) -> Maps:
    """The maps, of which those count that are `mine`."""
    rows = array("q")
    for f, m in zip(features, mine, strict=True):
        rows.extend((*_describe(f), m))
    images = features[0].shape[0]
    heights, widths = ([f.shape[axis] for f in features] for axis in (2, 3))
    first = array("q", itertools.accumulate(heights * images, initial=0))
    return Maps(rows, first, images, heights, widths, mine)


def _describe(t: Tensor) -> "array[int]":
    """A row of numbers: see `tables.AT` and on."""
    size = t.element_size()
    image, channel, row, column = strides(t)
    height, width = t.shape[2:]
    return array("q", (t.data_ptr(), image * size, channel * size, row * size, column * size, height, width))


def _in_one_run(grad: Tensor) -> Tensor:
    """The gradient, with bins that lie one after the other and channels or bins without gaps."""
    _, channel, row, column = strides(grad)
    width = grad.shape[3]
    step = row if width == 1 else column
    if row == width * column and (step == 1 or channel == 1):
        return grad
    return grad.contiguous()  # an expanded gradient, as that of a sum


def _at(numbers: "array[Any]") -> int:
    """The address of an array."""
    return numbers.buffer_info()[0]


@functools.lru_cache(256)
def _constants(
    scales: tuple[float, ...], thresholds: tuple[float, ...], order: tuple[int, ...], dtype: torch.dtype
) -> tuple["array[Any]", "array[Any]", "array[int]"]:
    """Scales and thresholds in the working precision, and the order of the maps."""
    code = "f" if dtype == torch.float32 else "d"
    return array(code, scales), array(code, thresholds), array("q", order)
