"""The engine: choose blocks by shape, layout and dtype alone, and launch.

Nothing here looks at values, so there is no synchronisation, and a CUDA graph can capture all of it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..levels import staircase
from ..reference import empty as empty
from . import kernels

# Coordinates keep their order of operations; see `kernels`. There is nothing to pipeline.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Rule(NamedTuple):
    """Scales and equation 1, as kernels take them."""

    scales: tuple[tuple[float, ...], ...]
    canonical_scale: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    finest: int
    deltas: tuple[int, ...]


def plain(n: int) -> int:
    """An integer such that kernels are not compiled anew for it.

    Triton does so for integers in tuples that are 1 or divisible by 16, but here sizes and strides of
    every image may differ.
    """
    return 2 * n + 3


def exact(value: float, dtype: torch.dtype) -> tuple[float, ...]:
    """A float as summands in float32, as which Triton passes all floats."""
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
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> None:
    """Pool every RoI from its map; see `reference.forward`."""
    count, channels, *bins = out.shape
    rule = _rule(tuple(scales), canonical_scale, canonical_level, rois.dtype)
    for dtype, mine in _by_dtype(features):
        # No program reads the maps of other dtypes, but their place must be taken.
        stand_in = next(f for f in features if f.dtype == dtype)
        maps = [f if f.dtype == dtype else stand_in for f in features]
        innermost = _innermost(maps, out)
        block_bins, block_channels = _forward_blocks(math.prod(bins), channels, innermost)
        blocks = math.ceil(math.prod(bins) / block_bins) * math.ceil(channels / block_channels)
        kernels.forward[(count * blocks,)](
            out, tuple(map(plain, out.stride())), *_describe(maps), rois.contiguous(),
            None if levels is None else levels.contiguous(), count, len(features[0]), channels,
            rule.scales, rule.canonical_scale, rule.thresholds,
            FINEST=rule.finest, DELTAS=rule.deltas, MINE=mine, BINS_Y=bins[0], BINS_X=bins[1],
            RATIO=max(sampling_ratio, 0), ALIGNED=aligned,
            INNERMOST=innermost, BLOCK_BINS=block_bins, BLOCK_CHANNELS=block_channels, **_OPTIONS,
        )  # fmt: skip


def _describe(maps: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Pointers, then image, channel, row and column strides, heights and widths: a tuple over levels each."""
    rows = [(*map(plain, m.stride()), *map(plain, m.shape[2:])) for m in maps]
    return tuple(maps), *zip(*rows, strict=True)


def _by_dtype(maps: Sequence[Tensor]) -> list[tuple[torch.dtype, int]]:
    """A launch for each dtype among the maps, nearly always one, and the bits of the maps it serves."""
    dtypes = dict.fromkeys(m.dtype for m in maps)
    return [(d, sum(1 << i for i, m in enumerate(maps) if m.dtype == d)) for d in dtypes]


def _innermost(maps: Sequence[Tensor], out: Tensor) -> int:
    """0 if channels are not innermost, else what the strides of everything else are multiples of."""
    if any(t.stride(1) != 1 or t.stride(3) == 1 for t in (*maps, out)):
        return 0
    return math.gcd(16, *(t.stride(axis) for t in (*maps, out) for axis in (0, 2, 3)))


@functools.lru_cache(256)
def _forward_blocks(bins: int, channels: int, innermost: int) -> tuple[int, int]:
    """Bins and channels per program: about eight elements of the output for each of 128 threads."""
    if innermost:
        block_channels = min(_power_of_two(channels), 128)
        return min(_power_of_two(bins), 1024 // block_channels), block_channels
    block_bins = min(_power_of_two(bins), 64)
    return block_bins, min(_power_of_two(channels), 1024 // block_bins)


def _power_of_two(n: int) -> int:
    """The smallest that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(256)
def _rule(
    scales: tuple[float, ...], canonical_scale: float, canonical_level: float, dtype: torch.dtype
) -> Rule:
    finest, steps = staircase(scales, canonical_level, dtype)
    steps = steps or ((math.inf, 0),)
    return Rule(
        tuple(exact(scale, dtype) for scale in scales),
        exact(canonical_scale, dtype),
        tuple(exact(ratio, dtype) for ratio, _ in steps),
        finest,
        tuple(delta for _, delta in steps),
    )
