"""The engine: prepare the tables, then let threads take groups of RoIs and blocks of channels."""

import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..levels import staircase
from . import backward as backward_kernel
from . import direct as direct_kernel
from . import forward as forward_kernel
from . import tables, threads
from .jit import cache_folder as cache_folder
from .lanes import Scratch
from .memory import empty as empty
from .memory import scratch
from .simd import LANES, TAGS

_TAG = {getattr(torch, name): tag for name, tag in TAGS.items()}
_WORK = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_SLAB_TAPS = 2**21  # taps whose tables are held at once in forward: about 25 MB
_ADAPTIVE_TAPS = 32  # a guess, per bin
_TASKS_PER_THREAD = 4


class Rule(NamedTuple):
    """Which map serves which RoI - `levels`, or else equation 1 as a staircase - and at which scale."""

    levels: Tensor | None
    climb: NDArray[np.floating]
    canonical_scale: Any
    scales: NDArray[np.floating]


class Table(NamedTuple):
    """The tables of one axis: where they are, and the memory that holds them."""

    at: tables.AxisAt
    memory: NDArray[np.int64]
    rois: int
    taps: int  # room for how many

    def array(self, name: str) -> NDArray[np.int64]:
        """One of the tables of integers as an array, to look at all RoIs at once."""
        start = (getattr(self.at, name) - self.at.base) // 8
        n = {"base": self.rois + 1, "touched": self.rois}.get(name, self.taps)
        return self.memory[start : start + n]


class Tables(NamedTuple):
    """Everything that does not depend on the channels; see `tables`."""

    map_of: Tensor
    order: Tensor
    ys: Table
    xs: Table


class Maps(NamedTuple):
    """The maps of a call: a row per map, see `tables.AT` and on; and their largest sizes."""

    rows: "array[int]"
    number: int
    images: int
    height: int
    width: int
    all_heights: int

    @property
    def at(self) -> int:
        """The address of the rows."""
        return self.rows.buffer_info()[0]


def forward(
    out: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> None:
    """Pool every RoI from its map; see `reference.forward`."""
    maps = _describe_maps(features)
    rule = _rule(rois, levels, scales, canonical_scale, canonical_level)
    rois = rois.contiguous()
    taps = 2 * sampling_ratio if sampling_ratio > 0 else _ADAPTIVE_TAPS
    slab = max(1, _SLAB_TAPS // (taps * (out.shape[2] + out.shape[3])))
    if len(rois) <= slab:
        _forward_slab(out, features, maps, rois, rule, sampling_ratio, aligned)
        return
    for lo in range(0, len(rois), slab):
        part = slice(lo, lo + slab)
        part_rule = rule if rule.levels is None else rule._replace(levels=rule.levels[part])
        _forward_slab(out[part], features, maps, rois[part], part_rule, sampling_ratio, aligned)


def _forward_slab(
    out: Tensor,
    features: Sequence[Tensor],
    maps: Maps,
    rois: Tensor,
    rule: Rule,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    channels = out.shape[1]
    pooled = _describe_pooled(out)
    height, width = out.shape[2:]
    t = _tables(rois, rule, maps, height, width, sampling_ratio, aligned)
    if len(t.order) < len(rois):
        out[t.map_of < 0] = torch.nan
    work = (t.ys.taps + t.xs.taps) * channels
    columns = int(t.xs.array("touched").max())
    for (dtype, in_place), order in _by_kind([_kind(f, out) for f in features], t):
        tags = (_TAG[dtype], _WORK[rois.dtype], _TAG[out.dtype])
        job: tuple[Any, ...] = (*tags, maps.at, maps.number, pooled.buffer_info()[0])
        tables_at = (t.map_of.data_ptr(), t.ys.at, t.xs.at)
        if in_place:
            most = max(int(direct_kernel.CELLS), int(np.diff(t.xs.array("base")).max()))
            entries = direct_kernel.entries(most, channels, width)
            job += (order.data_ptr(), len(order), *tables_at, channels)
            tasks = math.ceil(len(order) / direct_kernel.ROIS)
            owned: tuple[Any, ...] = (out, features, maps, pooled, t, order)
            _run(direct_kernel.run, job, max(most, width + 1), entries, rois.dtype, tasks, work, owned)
        else:
            blocks = math.ceil(channels / LANES)
            most = max(64, len(rois) * blocks // (_TASKS_PER_THREAD * torch.get_num_threads()))
            groups = torch.empty((len(order), int(forward_kernel.GROUP_COLUMNS)), dtype=torch.int64)
            n = forward_kernel.group(order.data_ptr(), len(order), *tables_at, most, groups.data_ptr())
            cells = int(groups[:n, forward_kernel.CELLS].amax()) if n else 0
            entries = forward_kernel.entries(cells, columns, width)
            job += (groups.data_ptr(), n, order.data_ptr(), *tables_at, channels)
            line = max(maps.height, maps.width, height, width)
            owned = (out, features, maps, pooled, t, order, groups)
            _run(forward_kernel.run, job, line, entries, rois.dtype, n * blocks, work, owned)


def backward(
    grads: Sequence[Tensor],
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> None:
    """The adjoint of `forward` in the features; see `reference.backward`."""
    if not (grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)):
        grad = grad.contiguous()  # an expanded gradient, as that of a sum
    channels, height, width = grad.shape[1:]
    blocks = math.ceil(channels / LANES)
    maps = _describe_maps(grads)
    pooled = _describe_pooled(grad)
    rois = rois.contiguous()
    rule = _rule(rois, levels, scales, canonical_scale, canonical_level)
    t = _tables(rois, rule, maps, height, width, sampling_ratio, aligned)
    ys, xs = _turned("rows", t.ys, height, rois.dtype), _turned("columns", t.xs, width, rois.dtype)
    tasks = _TASKS_PER_THREAD * torch.get_num_threads()
    most = math.ceil(maps.width * min(1.0, blocks / tasks))
    homes, touched, base, cells = (t.map_of[t.order].numpy(), *map(t.ys.array, ("touched", "base", "cells")))
    spans = backward_kernel.heights(t.order.numpy(), touched, base, cells)
    widths = [int(maps.rows[i]) for i in range(int(tables.WIDTH), len(maps.rows), int(tables.MAP_COLUMNS))]
    strips, entries = backward_kernel.cut(widths, maps.images, homes, spans, height, width, most)
    work = (ys.taps + xs.taps) * channels + sum(g.numel() for g in grads)
    for dtype in {g.dtype for g in grads}:
        mine = [s for s in strips if grads[s[0] % maps.number].dtype == dtype]
        rows = array("q", itertools.chain.from_iterable(mine))
        tags = (_TAG[dtype], _WORK[rois.dtype], _TAG[grad.dtype])
        job: tuple[Any, ...] = (*tags, maps.at, maps.number, pooled.buffer_info()[0])
        job += (rows.buffer_info()[0], len(mine), t.order.data_ptr(), ys.at, xs.at, channels)
        line = max(maps.height, maps.width, height, width)
        owned = (grads, grad, maps, pooled, t, ys, xs, rows)
        _run(backward_kernel.run, job, line, entries, rois.dtype, len(mine) * blocks, work, owned)


def _run(
    kernel: Any,
    job: tuple[Any, ...],
    line: int,
    entries: Sequence[int],
    dtype: torch.dtype,
    tasks: int,
    work: int,
    owned: object,
) -> None:
    """Run a kernel on the threads, each with scratch of its own: four lines of offsets, then entries.

    `job` names memory by address; `owned` is what that memory belongs to.
    """
    line = -(-8 * line // 64) * 64
    sizes = (line, line, line, line, *(n * LANES * dtype.itemsize for n in entries))
    starts = tuple(itertools.accumulate(sizes, initial=0))

    def take_tasks(counter: int, memory: int) -> None:
        kernel(counter, *job, Scratch(*(memory + start for start in starts[:-1])))

    threads.run(take_tasks, tasks, starts[-1], work, owned)


def _tables(
    rois: Tensor, rule: Rule, maps: Maps, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tables:
    n = len(rois)
    tag = _WORK[rois.dtype]
    scales = rule.scales.ctypes.data
    map_of = torch.empty(n, dtype=torch.int64)
    levels = 0 if rule.levels is None else rule.levels.data_ptr()
    poolable = tables.assign(
        tag, rois.data_ptr(), n, levels, maps.number, maps.at, scales, maps.images,
        rule.climb.ctypes.data, len(rule.climb), rule.canonical_scale, map_of.data_ptr(),
    )  # fmt: skip
    lines = scratch("lines", 8 * max(maps.height, maps.width, maps.images * maps.all_heights + 1))

    def axis(column: Any, bins: int, extent_column: Any) -> Table:
        geometry: tuple[Any, ...] = (tag, rois.data_ptr(), n, maps.at, maps.number, scales, map_of.data_ptr())
        geometry += (column, bins, extent_column)
        taps = n * 2 * sampling_ratio * bins
        if sampling_ratio <= 0:
            base = scratch("base", 8 * (n + 1)).view(np.int64)
            tables.count(*geometry, aligned, base.ctypes.data)
            taps = int(base[n])
        table = _empty_table(f"axis {column}", n, n * (bins + 1), taps, rois.dtype)
        if sampling_ratio <= 0:
            table.memory[: n + 1] = base
        tables.fill(*geometry, sampling_ratio, aligned, lines.ctypes.data, table.at)
        return table

    ys = axis(tables.Y1, height, tables.HEIGHT)
    xs = axis(tables.X1, width, tables.WIDTH)
    order = torch.empty(poolable, dtype=torch.int64)
    rows = maps.images * maps.all_heights
    tables.sort(map_of.data_ptr(), n, maps.at, maps.number, ys.at, lines.ctypes.data, rows, order.data_ptr())
    return Tables(map_of, order, ys, xs)


def _empty_table(use: str, rois: int, starts: int, taps: int, dtype: torch.dtype) -> Table:
    sizes = (rois + 1, starts, taps, taps, rois, -(-taps * dtype.itemsize // 8))
    *ends, total = itertools.accumulate(sizes)
    memory = scratch(use, 8 * total).view(np.int64)
    at = memory.ctypes.data
    return Table(tables.AxisAt(at, *(at + 8 * end for end in ends)), memory, rois, taps)


def _turned(use: str, table: Table, bins: int, dtype: torch.dtype) -> Table:
    turned = _empty_table(use, table.rois, table.taps + table.rois, table.taps, dtype)
    shared = {name: getattr(table.at, name) for name in ("base", "cells", "touched")}
    turned = turned._replace(at=turned.at._replace(**shared))
    tables.turn_around(_WORK[dtype], table.rois, bins, table.at, turned.at)
    return turned


def _kind(feature: Tensor, out: Tensor) -> tuple[torch.dtype, bool]:
    """What a map is read as, and whether in place."""
    in_place = feature.stride(1) == out.stride(1) == 1 and out.shape[1] >= int(direct_kernel.WIDE)
    return feature.dtype, in_place


def _by_kind(
    kinds: Sequence[tuple[torch.dtype, bool]], t: Tables
) -> Iterator[tuple[tuple[torch.dtype, bool], Tensor]]:
    """The RoIs, in order, for each kind among the maps; nearly always there is one."""
    if len(set(kinds)) == 1:
        yield kinds[0], t.order
        return
    for kind in set(kinds):
        served = torch.tensor([k == kind for k in kinds])
        order = t.order[served[t.map_of[t.order] % len(kinds)]]
        if len(order):
            yield kind, order


def _describe_maps(features: Sequence[Tensor]) -> Maps:
    rows = array("q")
    heights, widths = [], []
    for f in features:
        size = f.element_size()
        image, channel, row, column = f.stride()
        images, _, height, width = f.shape
        rows.extend((f.data_ptr(), image * size, channel * size, row * size, column * size, height, width))
        heights.append(height)
        widths.append(width)
    return Maps(rows, len(features), images, max(heights), max(widths), sum(heights))


def _describe_pooled(t: Tensor) -> "array[int]":
    """See `sums.OUT_AT` and on."""
    size = t.element_size()
    roi, channel, _, column = t.stride()
    return array("q", (t.data_ptr(), roi * size, channel * size, column * size, t.shape[2], t.shape[3]))


def _rule(
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
) -> Rule:
    map_scales, climb = _tables_of_scales(tuple(scales), canonical_level, rois.dtype)
    number: Any = type(_WORK[rois.dtype])
    if levels is not None:
        return Rule(levels.contiguous(), climb[:0], number(canonical_scale), map_scales)
    return Rule(None, climb, number(canonical_scale), map_scales)


@functools.lru_cache(256)
def _tables_of_scales(
    scales: tuple[float, ...], canonical_level: float, dtype: torch.dtype
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The scales, and equation 1 as rows `(ratio, delta)`; see `tables.assign`."""
    number: Any = type(_WORK[dtype])
    finest, steps = staircase(scales, canonical_level, dtype)
    return np.array(scales, number), np.array([(0.0, finest), *steps], number)
