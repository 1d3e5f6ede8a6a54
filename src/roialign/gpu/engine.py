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
from ..levels import Staircase
from ..schema import Pooling
from . import backward as backward_kernels
from . import forward as forward_kernel

# Coordinates keep their order of operations; see `geometry`. There is nothing to pipeline.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}

_TILE_Y, _TILE_X = 8, 16  # cells of a gradient map that one program sums up
_TOUCH_TILES = 32


class Rule(NamedTuple):
    """Scales and the staircase, as kernels take them."""

    scales: tuple[tuple[float, ...], ...]
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


def forward(
    out: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooling: Pooling,
) -> None:
    """Pool every RoI from its map; see `reference.forward`."""
    if _too_wide(features, rois.dtype):
        reference.forward(out, features, rois, levels, pooling)
        return
    count, channels, *bins = out.shape
    rule = _rule(tuple(pooling.scales), pooling.staircase, rois.dtype)
    sampling_ratio, aligned = pooling.sampling_ratio, pooling.aligned
    for maps, mine in _by_dtype(features):
        innermost = _innermost(maps, out)
        block_bins, block_channels = _forward_blocks(math.prod(bins), channels, innermost, sampling_ratio)
        blocks = math.ceil(math.prod(bins) / block_bins) * math.ceil(channels / block_channels)
        with _device_of(rois):
            forward_kernel.forward[(count * blocks,)](
                out, tuple(map(plain, strides(out))), *_describe(maps), rois.contiguous(),
                None if levels is None else levels.contiguous(), count, len(features[0]), channels,
                rule.scales, rule.thresholds,
                ORDER=rule.order, MINE=mine, BINS_Y=bins[0], BINS_X=bins[1],
                RATIO=sampling_ratio, ALIGNED=aligned,
                INNERMOST=innermost, BLOCK_BINS=block_bins, BLOCK_CHANNELS=block_channels,
                **_OPTIONS, **({} if innermost else _registers(rois, 96 if sampling_ratio > 0 else 128)),
            )  # fmt: skip


def backward(
    grads: Sequence[Tensor],
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    pooling: Pooling,
) -> None:
    """The adjoint of `forward` in the features; see `reference.backward`.

    A small launch makes a bit mask of which RoIs may touch which tiles of the maps. Then each tile is
    summed up by programs of its own, in the order of the RoIs: no atomics, and no zeros written first.
    """
    if _too_wide(grads, rois.dtype):
        reference.backward(grads, grad, rois, levels, pooling)
        return
    count, channels, *bins = grad.shape
    rois = rois.contiguous()
    rule = _rule(tuple(pooling.scales), pooling.staircase, rois.dtype)
    sampling_ratio, aligned = pooling.sampling_ratio, pooling.aligned
    first_tiles, tiles = _tiles(tuple((len(g), *g.shape[2:]) for g in grads))
    words = math.ceil(count / 32)
    mask = torch.empty((tiles, words), dtype=torch.int32, device=rois.device)
    if count:
        *_, heights, widths = _describe(grads)
        with _device_of(rois):
            backward_kernels.touch[(words * math.ceil(tiles / _TOUCH_TILES),)](
                mask, heights, widths, first_tiles, tiles, words,
                rois, None if levels is None else levels.contiguous(), count, len(grads[0]),
                rule.scales, rule.thresholds,
                ORDER=rule.order, ALIGNED=aligned,
                TILE_Y=_TILE_Y, TILE_X=_TILE_X, BLOCK_TILES=_TOUCH_TILES, **_OPTIONS,
            )  # fmt: skip
    innermost = all(map(is_channels_last, grads))
    most = 8 if rois.dtype == torch.float64 else 32 if innermost else 16
    block_channels = min(_power_of_two(channels), most)
    # Weights of so many bins at a time as there are registers for.
    run = bins[1] if bins[1] <= 8 else math.ceil(bins[1] / math.ceil(bins[1] / 5))
    for maps, mine in _by_dtype(grads):
        with _device_of(rois):
            backward_kernels.backward[(tiles * math.ceil(channels / block_channels),)](
                *_describe(maps), grad, tuple(map(plain, strides(grad))), mask, first_tiles, tiles, words,
                rois, channels, rule.scales,
                MINE=mine, BINS_Y=bins[0], BINS_X=bins[1], RATIO=sampling_ratio, ALIGNED=aligned,
                INNERMOST=innermost, TILE_Y=_TILE_Y, TILE_X=_TILE_X, BLOCK_CHANNELS=block_channels, RUN=run,
                **_OPTIONS, **_registers(rois, 168 if sampling_ratio > 0 else 208),
            )  # fmt: skip


def _device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if t.device.type == "xpu":
        return torch.xpu.device_of(t)
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()  # type: ignore[no-untyped-call]


def _registers(rois: Tensor, most: int) -> dict[str, int]:
    """Registers per thread: left to itself, NVIDIA's assembler may spill some, to run more programs."""
    nvidia = rois.device.type != "xpu" and torch.version.hip is None
    return {"maxnreg": 255 if rois.dtype == torch.float64 else most} if nvidia else {}


@functools.lru_cache(256)
def _tiles(sizes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], int]:
    """The number of the first tile of each map `(images, height, width)`, and how many there are."""
    tiles = (n * math.ceil(height / _TILE_Y) * math.ceil(width / _TILE_X) for n, height, width in sizes)
    *starts, total = itertools.accumulate(tiles, initial=0)
    return tuple(map(plain, starts)), total


def _too_wide(maps: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a map has cells that the kernels, which count them in floats, cannot tell apart."""
    return dtype == torch.float32 and max(max(m.shape[2:]) for m in maps) > 2**24


def _describe(maps: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Pointers, then image, channel, row and column strides, heights and widths: a tuple over levels each."""
    rows = [(*map(plain, strides(m)), *map(plain, m.shape[2:])) for m in maps]
    return tuple(maps), *zip(*rows, strict=True)


def _by_dtype(maps: Sequence[Tensor]) -> list[tuple[list[Tensor], int]]:
    """For each dtype, nearly always one: its maps, and their places as bits.

    Kernels never look at the maps of other dtypes, but their places must be taken.
    """
    launches = []
    for dtype in dict.fromkeys(m.dtype for m in maps):
        stand_in = next(m for m in maps if m.dtype == dtype)
        mine = sum(1 << i for i, m in enumerate(maps) if m.dtype == dtype)
        launches.append(([m if m.dtype == dtype else stand_in for m in maps], mine))
    return launches


def _innermost(maps: Sequence[Tensor], out: Tensor) -> int:
    """0 if channels are not innermost, else what the strides of everything else are multiples of."""
    if not all(map(is_channels_last, (*maps, out))):
        return 0
    return math.gcd(16, *(strides(t)[axis] for t in (*maps, out) for axis in (0, 2, 3)))


@functools.lru_cache(256)
def _forward_blocks(bins: int, channels: int, innermost: int, sampling_ratio: int) -> tuple[int, int]:
    """Bins and channels per program: eight elements of the output, or four, for each of 128 threads."""
    if innermost:
        block_channels = min(_power_of_two(channels), 128)
        elements = 1024 if sampling_ratio > 0 else 512  # an adaptive grid takes registers
        return min(_power_of_two(bins), elements // block_channels), block_channels
    block_bins = min(_power_of_two(bins), 64)
    return block_bins, min(_power_of_two(channels), 1024 // block_bins)


def _power_of_two(n: int) -> int:
    """The smallest that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(256)
def _rule(scales: tuple[float, ...], staircase: Staircase, dtype: torch.dtype) -> Rule:
    thresholds = staircase.thresholds or (math.inf,)
    return Rule(
        tuple(exact(scale, dtype) for scale in scales),
        tuple(exact(threshold, dtype) for threshold in thresholds),
        staircase.order if staircase.thresholds else staircase.order * 2,
    )
