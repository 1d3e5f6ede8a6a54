"""The engine: choose blocks by shape, layout and dtype alone, and launch.

Nothing here looks at values, so there is no synchronisation, and a CUDA graph can capture all of it.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..layout import empty as empty
from ..layout import is_channels_last, strides
from ..levels import Staircase, per_axis
from ..schema import Pooling
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import tables as table_kernels

# Coordinates keep their order of operations; see `geometry`. There is nothing to pipeline.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}

MOST_AXES = 2  # of maps that there are kernels for; the reference serves volumes
_BLOCK = 128  # of threads that each do one thing
_WARP, _THREADS = 32, 128
_VECTOR = 16  # bytes that a thread reads at once
_AT_ONCE = 8  # bins along an axis that a program takes, at most
_TILE_Y, _TILE_X = 4, 8  # cells of a gradient map that a program sums up
_TURNED = 64  # bins that a program turns around
_TILES = 4  # whose RoIs a program looks for
_ENOUGH = 1024  # programs, to keep a GPU busy
_MOST_PARTS = 16
_TABLES = 2**28  # bytes


class Rule(NamedTuple):
    """Scales and the staircase, as kernels take them."""

    scales: tuple[tuple[tuple[float, ...], ...], ...]  # of all maps, along y and along x, or once
    thresholds: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]


def plain(n: int) -> int:
    """An integer such that kernels are not compiled anew for it.

    Triton does so for integers in tuples that are 1 or divisible by 16, but here sizes and strides of
    every image may differ.
    """
    return 2 * n + 3


def exact(value: float, dtype: torch.dtype) -> tuple[float, ...]:
    """A float as summands in float32, as which Triton passes all floats."""
    value = float(value)  # Triton compiles anew for some integers
    if dtype == torch.float32:
        return (value,)
    parts = []
    for _ in range(3):
        part = torch.tensor(value, dtype=torch.float32).item()
        parts.append(part)
        value = value - part if math.isfinite(part) else 0.0
    return tuple(parts)


class Kind(NamedTuple):
    """The maps of one dtype whose channels lie innermost, or do not: nearly always there is one kind."""

    maps: tuple[Tensor, ...]  # of all levels; kernels never look at those of other kinds
    mine: int  # a bit for each that is of this kind
    innermost: int  # 0 if channels are not, else what the strides of everything else are multiples of


def forward(
    out: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """Pool every RoI from its map; see `reference.forward`.

    A small launch writes where the bins read, for as many RoIs as there is room for; then these are pooled.
    """
    if not _serves(features, rois.dtype):
        reference.forward(out, features, rois, levels, pooling)
        return
    in_runs = pooling.sampling_ratio <= 0
    height, width = _largest(features) if in_runs else (0, 0)
    row_length, length = _lengths(pooling, height, width, sum(pooling.output_size) if in_runs else 0)
    for lo, hi in _parts_of(len(rois), row_length, length, rois.dtype):
        some = rois[lo:hi].contiguous(), None if levels is None else levels[lo:hi].contiguous()
        rows = rois.new_empty(hi - lo, row_length, dtype=torch.int64)
        numbers = rois.new_empty(hi - lo, length)
        with _device_of(rois):
            _write_for_bins(rows, numbers, features, *some, pooling)
            for kind in _kinds(features):
                _pool(out[lo:hi], kind, rows, numbers, height, pooling)


def _lengths(pooling: Pooling, height: int, width: int, runs: int) -> tuple[int, int]:
    """Of a RoI, how many integers and how many numbers are written; see `tables`."""
    bins = sum(pooling.output_size)
    if not runs:
        return 1, bins * pooling.sampling_ratio * (2 if pooling.derivative else 1)
    return int(table_kernels.HEAD) + runs, height + width + int(table_kernels.APART) * bins


def _parts_of(count: int, row_length: int, length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The RoIs, cut into as many as there is room for tables of."""
    at_once = max(1, _TABLES // (8 * row_length + dtype.itemsize * length))
    return [(lo, min(lo + at_once, count)) for lo in range(0, count, at_once)]


def _write_for_bins(
    rows: Tensor, numbers: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None,
    pooling: Pooling,
) -> None:  # fmt: skip
    rule = _rule(tuple(pooling.scales), len(features), pooling.staircase, rois.dtype)
    *_, heights, widths = _describe(features)
    bins, ratio = pooling.output_size, pooling.sampling_ratio
    what = (
        heights, widths, rois, levels, len(rois), len(features[0]), rule.scales, rule.thresholds
    )  # fmt: skip
    constants = {
        "ORDER": rule.order, "ALIGNED": pooling.aligned, "BINS_Y": bins[0], "BINS_X": bins[1],
        "RATIO": ratio, "DERIVATIVE": pooling.derivative,
    }  # fmt: skip
    if ratio > 0:
        grid = (math.ceil(len(rois) * sum(bins) * ratio / _BLOCK),)
        table_kernels.place[grid](rows, numbers, *what, **constants, BLOCK=_BLOCK, **_OPTIONS)
    else:
        table_kernels.write_for_bins[(2 * len(rois),)](
            rows, rows.shape[1], numbers, numbers.shape[1], *_largest(features), *what,
            **constants, **{**_OPTIONS, "num_warps": 1},
        )  # fmt: skip


def _pool(out: Tensor, kind: Kind, rows: Tensor, numbers: Tensor, height: int, pooling: Pooling) -> None:
    """Pool the RoIs of one kind of maps: with lanes along channels that fill a warp, else along taps."""
    count, channels, bins_y, bins_x = out.shape
    ratio = pooling.sampling_ratio
    what = (
        out, tuple(map(plain, strides(out))), *_describe(kind.maps), rows, rows.shape[1],
        numbers, numbers.shape[1], height, count, channels,
    )  # fmt: skip
    moved = 2 - pooling.derivative % 2 if pooling.derivative else 0
    constants = {"MINE": kind.mine, "BINS_Y": bins_y, "BINS_X": bins_x, "RATIO": ratio, "MOVED": moved}
    if kind.innermost and channels >= _WARP:
        block_rows, block_bins = _rows_at_once(bins_y), _evenly(bins_x)
        block = min(_power_of_two(channels), _WARP * _VECTOR // kind.maps[0].itemsize)
        programs = count * math.ceil(bins_y / block_rows) * math.ceil(bins_x / block_bins)
        forward_kernels.forward_along_channels[(programs * math.ceil(channels / block),)](
            *what, **constants, MULTIPLE=kind.innermost, OUT_MULTIPLE=_multiple((out,)),
            EVEN=channels % block == 0,
            BLOCK_ROWS=block_rows, BLOCK_BINS=block_bins, BLOCK_CHANNELS=block,
            **{**_OPTIONS, "num_warps": block_rows},
        )  # fmt: skip
        return
    taps = min(_power_of_two(2 * ratio), 8) if ratio > 0 else 4
    block_bins = min(_power_of_two(bins_x), 64 // taps)
    lanes, block_rows = block_bins * taps, _evenly(bins_y)
    block = min(_power_of_two(channels), max(1, 4096 // numbers.itemsize // lanes))
    programs = count * math.ceil(bins_y / block_rows) * math.ceil(bins_x / block_bins)
    forward_kernels.forward_along_taps[(programs * math.ceil(channels / block),)](
        *what, **constants, EVEN=channels % block == 0,
        BLOCK_ROWS=block_rows, BLOCK_BINS=block_bins, TAPS=taps, BLOCK_CHANNELS=block,
        **{**_OPTIONS, "num_warps": _warps(block * lanes, 8)},
        **_registers(numbers.device, numbers.dtype, 72 if ratio > 0 else 96),
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """The adjoint of `forward` in the features; see `reference.backward`.

    A small launch writes where the cells of each RoI are read, and a bit mask of which RoIs may touch which
    tiles of the maps. Then each tile is summed up by programs of its own, in the order of the RoIs: no
    atomics, and no zeros written first. Tiles of coarse maps are summed in parts, which a last launch adds.
    """
    if not _serves(grads, rois.dtype) or math.prod(grad.shape[1:]) >= 2**31:
        reference.backward(grads, grad, rois, levels, pooling)
        return
    height, width = _largest(grads)
    row_length, length = _lengths(pooling, height, width, height + width)
    parts = _parts_of(len(rois), row_length, length, rois.dtype) or [(0, 0)]
    totals = grads if len(parts) == 1 else [g.new_zeros(g.shape, dtype=rois.dtype) for g in grads]
    for lo, hi in parts:
        some = rois[lo:hi].contiguous(), None if levels is None else levels[lo:hi].contiguous()
        sums = grads if len(parts) == 1 else [torch.empty_like(total) for total in totals]
        rows = rois.new_empty(hi - lo, row_length, dtype=torch.int64)
        numbers = rois.new_empty(hi - lo, length)
        with _device_of(rois):
            _scatter(sums, grad[lo:hi], rows, numbers, *some, pooling)
        if len(parts) > 1:
            for total, part in zip(totals, sums, strict=True):
                total += part
    if len(parts) > 1:
        for g, total in zip(grads, totals, strict=True):
            g.copy_(total)


def _scatter(
    grads: Sequence[Tensor], grad: Tensor, rows: Tensor, numbers: Tensor,
    rois: Tensor, levels: Tensor | None, pooling: Pooling,
) -> None:  # fmt: skip
    """Spread the gradient of RoIs that there is room for."""
    rule = _rule(tuple(pooling.scales), len(grads), pooling.staircase, rois.dtype)
    count, channels, *bins = grad.shape
    block = min(_power_of_two(channels), _THREADS * _VECTOR // grad.itemsize // _TILE_X)
    blocks = math.ceil(channels / block)
    cut = _cut(tuple((len(g), *g.shape[2:]) for g in grads), blocks, _most_parts(grads, count))
    words = math.ceil(count / _WARP)
    summaries = math.ceil(words / _WARP)
    mask, summary = (rois.new_empty(cut.tiles, n, dtype=torch.int32) for n in (words, summaries))
    tables = rows, rows.shape[1], numbers, numbers.shape[1], _largest(grads)[0]
    constants = {"BINS_Y": bins[0], "BINS_X": bins[1], "TILE_Y": _TILE_Y, "TILE_X": _TILE_X}
    turn = not grad.is_contiguous(memory_format=torch.channels_last)
    turned = torch.empty_like(grad, memory_format=torch.channels_last) if turn else grad
    if count:
        *_, heights, widths = _describe(grads)
        block_bins = min(_power_of_two(math.prod(bins)), _TURNED)
        programs = 2 * count + summaries * math.ceil(cut.tiles / _TILES)
        if turn:
            programs += count * math.ceil(math.prod(bins) / block_bins) * math.ceil(channels / _WARP)
        backward_kernels.prepare[(programs,)](
            *tables, _largest(grads)[1], summary, mask, cut.first_tiles, cut.tiles, words,
            heights, widths, rois, levels, count, len(grads[0]), rule.scales, rule.thresholds,
            turned, grad, tuple(map(plain, strides(grad))), channels,
            ORDER=rule.order, ALIGNED=pooling.aligned, RATIO=pooling.sampling_ratio,
            DERIVATIVE=pooling.derivative, BLOCK_TILES=_TILES,
            TURN=turn, BLOCK_BINS=block_bins, BLOCK_CHANNELS=_WARP,
            **constants, **{**_OPTIONS, "num_warps": 1}, **_registers(rois.device, rois.dtype, 168),
        )  # fmt: skip
    sizes = [g.numel() if n > 1 else 0 for g, n in zip(grads, cut.parts, strict=True)]
    steps = [math.ceil(size / _VECTOR) * _VECTOR for size in sizes]  # so that several can be read at once
    each = zip(cut.parts, steps, strict=True)
    ends = list(itertools.accumulate((n * step for n, step in each), initial=0))
    sums = numbers.new_empty(ends[-1])
    places = sums, tuple(map(plain, ends[:-1])), tuple(map(plain, steps)), tuple(map(plain, cut.parts))
    for kind in _kinds(grads):
        backward_kernels.backward[(cut.units * blocks,)](
            *_describe(kind.maps), *places, cut.first_units, cut.units, cut.first_tiles,
            turned, *tables, summary, mask, words, channels,
            MINE=kind.mine, MULTIPLE=kind.innermost, BLOCK_CHANNELS=block, CHANNELS=math.gcd(channels, 128),
            **constants, **{**_OPTIONS, "num_warps": _warps(block * _TILE_X, _VECTOR // grad.itemsize)},
            **_registers(rois.device, rois.dtype, 128 if len(grads) <= 5 else 168),
        )  # fmt: skip
        if ends[-1]:
            first_blocks = list(itertools.accumulate((math.ceil(n / _BLOCK) for n in sizes), initial=0))
            backward_kernels.add_up[(first_blocks[-1],)](
                kind.maps, *places, tuple(map(plain, sizes)), tuple(map(plain, first_blocks[:-1])),
                MINE=kind.mine, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip


class Cut(NamedTuple):
    """How gradient maps are cut into tiles, and the tiles of coarse ones into parts."""

    first_tiles: tuple[int, ...]  # of each map, `plain`
    tiles: int
    parts: tuple[int, ...]  # of each tile of a map
    first_units: tuple[int, ...]  # a unit is a part of a tile
    units: int


@functools.lru_cache(256)
def _cut(sizes: tuple[tuple[int, ...], ...], blocks: int, most: tuple[int, ...]) -> Cut:
    """Cut maps `(images, height, width)` such that programs are enough, each with `blocks` of channels."""
    tiles = [n * math.ceil(height / _TILE_Y) * math.ceil(width / _TILE_X) for n, height, width in sizes]
    parts = tuple(
        min(_power_of_two(math.ceil(_ENOUGH / (n * blocks))), m) for n, m in zip(tiles, most, strict=True)
    )
    first_tiles = list(itertools.accumulate(tiles, initial=0))
    units = list(itertools.accumulate((n * m for n, m in zip(tiles, parts, strict=True)), initial=0))
    plains = [tuple(map(plain, numbers[:-1])) for numbers in (first_tiles, units)]
    return Cut(plains[0], first_tiles[-1], parts, plains[1], units[-1])


def _most_parts(grads: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """Parts that are worth it, a power of two: some RoIs each, of maps without gaps in memory."""
    few = min(_MOST_PARTS, _power_of_two(count // len(grads[0]) // 16))
    return tuple(few if _is_dense(g) else 1 for g in grads)


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor lies in memory without gaps."""
    return 1 + sum((n - 1) * step for n, step in zip(t.shape, strides(t), strict=True)) == t.numel()


def _kinds(maps: Sequence[Tensor]) -> list[Kind]:
    """Nearly always one. In the place of a map of another kind stands one that is never looked at."""
    kinds, named = [], [(m.dtype, is_channels_last(m)) for m in maps]
    for kind in dict.fromkeys(named):
        same = [m for m, name in zip(maps, named, strict=True) if name == kind]
        mine = sum(1 << i for i, name in enumerate(named) if name == kind)
        stand_ins = tuple(m if name == kind else same[0] for m, name in zip(maps, named, strict=True))
        kinds.append(Kind(stand_ins, mine, _multiple(same)))
    return kinds


def _multiple(tensors: Sequence[Tensor]) -> int:
    """0 if channels are not innermost, else what the strides of everything else are multiples of."""
    if not all(map(is_channels_last, tensors)):
        return 0
    return math.gcd(16, *(strides(t)[axis] for t in tensors for axis in (0, 2, 3)))


def _largest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """The most rows and the most columns."""
    return max(m.shape[2] for m in maps), max(m.shape[3] for m in maps)


def _evenly(bins: int) -> int:
    """Bins that a program takes, so that all take about as many."""
    return math.ceil(bins / math.ceil(bins / _AT_ONCE))


def _rows_at_once(bins: int) -> int:
    """Rows of bins that the warps of a program take: as many as leave few of them idle."""
    return next(n for n in (4, 2, 1) if -(-bins // n) * n <= bins * 8 / 7)


def _warps(numbers: int, each: int) -> int:
    """Warps of a program with so many numbers, and for each thread so many of them."""
    return max(1, min(4, numbers // (each * _WARP)))


def _device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if t.device.type == "xpu":
        return torch.xpu.device_of(t)
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()  # type: ignore[no-untyped-call]


def _registers(device: torch.device, dtype: torch.dtype, most: int) -> dict[str, int]:
    """Registers per thread: left to itself, NVIDIA's assembler may spill some, to run more programs."""
    nvidia = device.type != "xpu" and torch.version.hip is None
    return {"maxnreg": 255 if dtype == torch.float64 else most} if nvidia else {}


def _serves(maps: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether there are kernels: not for volumes, nor where cells, counted in floats, are too many."""
    if maps[0].dim() > 2 + MOST_AXES:
        return False
    return dtype == torch.float64 or max(max(m.shape[2:]) for m in maps) <= 2**24


def _describe(maps: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Pointers, then image, channel, row and column strides, heights and widths: a tuple over levels each."""
    rows = [(*map(plain, strides(m)), *map(plain, m.shape[2:])) for m in maps]
    return tuple(maps), *zip(*rows, strict=True)


def _power_of_two(n: int) -> int:
    """The smallest that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(256)
def _rule(scales: tuple[float, ...], maps: int, staircase: Staircase, dtype: torch.dtype) -> Rule:
    y_and_x = dict.fromkeys(zip(*per_axis(scales, maps, 2), strict=True))  # once, where they are the same
    thresholds = staircase.thresholds or (math.inf,)
    return Rule(
        tuple(tuple(exact(scale, dtype) for scale in along) for along in y_and_x),
        tuple(exact(threshold, dtype) for threshold in thresholds),
        staircase.order if staircase.thresholds else staircase.order * 2,
    )
