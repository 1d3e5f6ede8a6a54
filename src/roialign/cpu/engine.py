"""The engine: prepare the tables, then let threads take groups of RoIs and blocks of channels."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..levels import map_levels_of, serving_steps, wanted_level
from . import backward as backward_kernel
from . import direct as direct_kernel
from . import forward as forward_kernel
from . import tables, threads
from .jit import cache_folder as cache_folder
from .memory import empty as empty
from .simd import LANES, TAGS
from .sums import AxisAt, Scratch

_TAG = {getattr(torch, name): tag for name, tag in TAGS.items()}
_SLAB_TAPS = 2**21  # taps whose tables are held at once in forward: about 25 MB
_ADAPTIVE_TAPS = 32  # a guess, per bin
_TASKS_PER_THREAD = 4


class Rule(NamedTuple):
    """Which map serves which RoI: `levels`, or else equation 1 as thresholds; and at which scale."""

    levels: NDArray[np.int64]
    climb: NDArray[np.floating]
    canonical_scale: np.floating
    scales: NDArray[np.floating]


class Tables(NamedTuple):
    """Everything that does not depend on the channels; see `tables`."""

    map_of: NDArray[np.int64]
    order: NDArray[np.int64]
    ys: tables.Axis
    xs: tables.Axis


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
    roi = rois.contiguous().numpy()
    taps = 2 * sampling_ratio if sampling_ratio > 0 else _ADAPTIVE_TAPS
    slab = max(1, _SLAB_TAPS // (taps * (out.shape[2] + out.shape[3])))
    for lo in range(0, len(roi), slab):
        part = slice(lo, lo + slab)
        if len(roi) > slab:
            rule = rule._replace(levels=rule.levels[part])
        _forward_slab(out[part], features, maps, roi[part], rule, sampling_ratio, aligned)


def _forward_slab(
    out: Tensor,
    features: Sequence[Tensor],
    maps: NDArray[np.int64],
    roi: NDArray[np.floating],
    rule: Rule,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    images, channels = features[0].shape[:2]
    pooled = _describe_pooled(out)
    t = _tables(roi, rule, maps, images, pooled, sampling_ratio, aligned)
    if len(t.order) < len(roi):
        out[torch.from_numpy(t.map_of < 0)] = torch.nan
    work = (len(t.ys.taps) + len(t.xs.taps)) * channels
    kinds = [(f.dtype, f.stride(1) == 1 and channels >= LANES) for f in features]
    for (dtype, in_place), order in _by_kind(kinds, t.order, t.map_of[t.order]):
        job: tuple[Any, ...] = (_TAG[dtype], roi.dtype.type(0), _TAG[out.dtype], _address(maps), len(maps))
        ys, xs, map_of = _addresses(t.ys), _addresses(t.xs), _address(t.map_of)
        if in_place:
            entries = direct_kernel.entries(t.xs, pooled)
            offsets = _offsets(maps, pooled, int(direct_kernel.SUBS))
            job += (_address(pooled), _address(order), len(order), map_of, ys, xs, channels)
            tasks = math.ceil(len(order) / direct_kernel.ROIS)
            _run(direct_kernel.run, job, offsets, entries, roi.dtype, tasks, work)
        else:
            blocks = math.ceil(channels / LANES)
            most = max(64, len(roi) * blocks // (_TASKS_PER_THREAD * torch.get_num_threads()))
            groups = np.empty((len(order), 6), np.int64)
            n = forward_kernel.group(_address(order), len(order), map_of, ys, xs, most, _address(groups))
            groups = groups[:n]
            entries = forward_kernel.entries(groups, t.xs, pooled)
            job += (
                _address(pooled),
                _address(groups),
                len(groups),
                _address(order),
                map_of,
                ys,
                xs,
                channels,
            )
            _run(
                forward_kernel.run,
                job,
                _offsets(maps, pooled),
                entries,
                roi.dtype,
                len(groups) * blocks,
                work,
            )


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
    images, channels = grads[0].shape[:2]
    blocks = math.ceil(channels / LANES)
    maps = _describe_maps(grads)
    pooled = _describe_pooled(grad)
    roi = rois.contiguous().numpy()
    rule = _rule(rois, levels, scales, canonical_scale, canonical_level)
    t = _tables(roi, rule, maps, images, pooled, sampling_ratio, aligned)
    ys, xs = _turned(t.ys, pooled[-2]), _turned(t.xs, pooled[-1])
    tasks = _TASKS_PER_THREAD * torch.get_num_threads()
    most = math.ceil(maps[:, tables.WIDTH].max() * min(1.0, blocks / tasks))
    strips, entries = backward_kernel.cut(maps, images, t.map_of, t.order, ys, pooled, most)
    work = (len(ys.taps) + len(xs.taps)) * channels + sum(g.numel() for g in grads)
    for dtype, mine in _by_kind([g.dtype for g in grads], strips, strips[:, backward_kernel.MAP]):
        job: tuple[Any, ...] = (
            _TAG[dtype],
            roi.dtype.type(0),
            _TAG[grad.dtype],
            _address(maps),
            len(maps),
            _address(pooled),
        )
        job += (_address(mine), len(mine), _address(t.order), _addresses(ys), _addresses(xs), channels)
        _run(backward_kernel.run, job, _offsets(maps, pooled), entries, roi.dtype, len(mine) * blocks, work)


def _run(
    kernel: Any, job: tuple[Any, ...], offsets: int, entries: Sequence[int], dtype: Any, tasks: int, work: int
) -> None:
    """Run a kernel on the threads, each with scratch of its own: four rows of offsets, then entries."""
    line = -(-8 * offsets // 64) * 64
    sizes = [*(line,) * 4, *(n * LANES * dtype.itemsize for n in entries)]
    starts = list(itertools.accumulate(sizes, initial=0))

    def take_tasks(counter: int, memory: int) -> None:
        kernel(counter, *job, Scratch(*(memory + start for start in starts[:-1])))

    threads.run(take_tasks, tasks, int(starts[-1]), work)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _addresses(axis: tables.Axis) -> AxisAt:
    return AxisAt(*map(_address, axis))


def _offsets(maps: NDArray[np.int64], pooled: NDArray[np.int64], subs: int = 1) -> int:
    """The longest row of offsets: rows, columns or bins."""
    return int(max(maps[:, tables.HEIGHT].max(), maps[:, tables.WIDTH].max() * subs, *pooled[-2:] * subs))


def _tables(
    roi: NDArray[np.floating],
    rule: Rule,
    maps: NDArray[np.int64],
    images: int,
    pooled: NDArray[np.int64],
    sampling_ratio: int,
    aligned: bool,
) -> Tables:
    n = len(roi)
    tag = roi.dtype.type(0)
    map_of = np.empty(n, np.int64)
    geometry = (tag, _address(roi), n, _address(maps), len(maps), _address(rule.scales), _address(map_of))
    poolable = tables.assign(
        tag, _address(roi), n, _address(rule.levels), len(maps), _address(maps), _address(rule.scales),
        images, _address(rule.climb), len(rule.climb), rule.canonical_scale, _address(map_of),
    )  # fmt: skip

    def axis(column: Any, bins: Any, extent_column: Any) -> tables.Axis:
        base = np.arange(n + 1) * (2 * sampling_ratio * bins)
        if sampling_ratio <= 0:
            tables.count(*geometry, column, bins, extent_column, aligned, _address(base))
        result = _empty_axis(base, n * (bins + 1), roi.dtype)
        place = np.full(maps[:, extent_column].max(), -1)
        tables.fill(
            *geometry,
            column,
            bins,
            extent_column,
            sampling_ratio,
            aligned,
            _address(place),
            _addresses(result),
        )
        return result

    ys = axis(tables.Y1, pooled[-2], tables.HEIGHT)
    xs = axis(tables.X1, pooled[-1], tables.WIDTH)
    order = np.empty(poolable, np.int64)
    rows = images * maps[:, tables.HEIGHT].sum()
    cursor = np.zeros(rows + 1, np.int64)
    tables.sort(
        _address(map_of),
        n,
        _address(maps),
        len(maps),
        _addresses(ys),
        _address(cursor),
        rows,
        _address(order),
    )
    return Tables(map_of, order, ys, xs)


def _empty_axis(base: NDArray[np.int64], starts: int, dtype: Any) -> tables.Axis:
    n = base[-1]
    rois = len(base) - 1
    start, touched = np.zeros(starts, np.int64), np.zeros(rois, np.int64)
    return tables.Axis(base, start, np.empty(n, np.int64), np.empty(n, dtype), np.empty(n, np.int64), touched)


def _turned(axis: tables.Axis, bins: Any) -> tables.Axis:
    n = len(axis.taps)
    turned = axis._replace(
        start=np.zeros(n + len(axis.touched), np.int64),
        taps=np.empty(n, np.int64),
        weights=np.empty(n, axis.weights.dtype),
    )
    tag = axis.weights.dtype.type(0)
    tables.turn_around(tag, len(axis.touched), bins, _addresses(axis), _addresses(turned))
    return turned


def _by_kind(
    kinds: Sequence[Any], rows: NDArray[np.int64], homes: NDArray[np.int64]
) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """The rows of work for each kind among the maps; nearly always there is one."""
    if len(set(kinds)) == 1:
        yield kinds[0], rows
        return
    for kind in set(kinds):
        yield kind, rows[np.array([k == kind for k in kinds])[homes % len(kinds)]]


def _describe_maps(features: Sequence[Tensor]) -> NDArray[np.int64]:
    """A row per map: see `tables.AT` and on."""
    rows = [[f.data_ptr(), *(s * f.element_size() for s in f.stride()), *f.shape[2:]] for f in features]
    return np.array(rows, np.int64)


def _describe_pooled(t: Tensor) -> NDArray[np.int64]:
    """See `forward.OUT_AT` and on."""
    size = t.element_size()
    steps = (t.stride(0) * size, t.stride(1) * size, t.stride(3) * size)
    return np.array((t.data_ptr(), *steps, *t.shape[2:]), np.int64)


def _rule(
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
) -> Rule:
    number: Any = np.float32 if rois.dtype == torch.float32 else np.float64
    map_scales = np.array(scales, number)
    if levels is not None:
        return Rule(
            levels.contiguous().numpy(), np.empty((0, 2), number), number(canonical_scale), map_scales
        )
    climb = _climb(tuple(scales), canonical_level, rois.dtype)
    return Rule(np.empty(0, np.int64), climb, number(canonical_scale), map_scales)


@functools.lru_cache(256)
def _climb(scales: tuple[float, ...], canonical_level: float, dtype: torch.dtype) -> NDArray[np.floating]:
    """Equation 1 as a staircase `(ratio, delta)` over `size / canonical_scale`; see `tables.assign`.

    The thresholds are where PyTorch's own operators step up, so the kernel needs no logarithm and
    agrees with `levels.assign_levels` to the last bit.
    """
    finest, steps = serving_steps(map_levels_of(scales))
    rows = [(0.0, finest), *((_first_above(level, canonical_level, dtype), delta) for level, delta in steps)]
    return np.array(rows, np.float32 if dtype == torch.float32 else np.float64)


def _first_above(level: int, canonical_level: float, dtype: torch.dtype) -> float:
    """The smallest ratio whose wanted level exceeds `level`, by bisection over the bits."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    at_most, above = 0, int(torch.tensor(math.inf, dtype=dtype).view(integers))
    while at_most < above:
        middle = (at_most + above) // 2
        ratio = torch.tensor([middle], dtype=integers).view(dtype)
        if wanted_level(ratio, canonical_level) > level:
            above = middle
        else:
            at_most = middle + 1
    return torch.tensor([above], dtype=integers).view(dtype).item()
