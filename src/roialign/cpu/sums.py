"""The two halves of pooling one RoI from blocks of 16 channels: sums over rows, then over columns.

A *unit* is a column or, where 64 channels are read at once, one of the four blocks of a column.
"""

from typing import Any, NamedTuple

import numpy as np

from .jit import kernel
from .lanes import REPLACE, combine, from_block
from .simd import LANES, get, put, size_of
from .tables import ONE, ZERO

# What `out` says of the pooled tensor: where it is, its steps in bytes, its bins.
OUT_AT, OUT_ROI_STEP, OUT_CHANNEL_STEP, OUT_BIN_STEP, PH, PW = np.arange(6)

SUM_ENTRIES = np.int64(2**12)  # row sums, and results, kept at once


class Scratch(NamedTuple):
    """Addresses of a thread's own memory."""

    src_row: Any  # where source rows, source columns, target rows and target columns of a sum lie
    src_column: Any
    dst_row: Any
    dst_column: Any
    cells: Any  # entries of 16 numbers: packed cells, row sums, results
    sums: Any
    results: Any


@kernel
def bins_at_once(units, results):
    """Rows of bins whose row sums and results are kept at once."""
    return max(ONE, SUM_ENTRIES // max(units, results))


@kernel
def sub_channel(sub, c0, last):
    """First channel of a block; the last of those read directly overlaps the one before, to be whole."""
    return min(c0 + sub * LANES, last)


@kernel
def sum_rows(src_tag, src, tag, scratch, first, n, units, ys, k, bins, p0, p1):
    """Sum, for the rows of bins `p0:p1`, the units `first:first + n` of `units`."""
    entry = LANES * size_of(tag)
    for p in range(p0, p1):
        put(scratch.dst_row, p, (p - p0) * units * entry)
    for u in range(n):
        put(scratch.dst_column, u, (first + u) * entry)
    base = get(ys.base, k)
    combine(
        src_tag, src, scratch.src_row, scratch.src_column,
        tag, scratch.sums, scratch.dst_row, scratch.dst_column, n,
        ys.start + 8 * k * (bins + 1), ys.taps + 8 * base, ys.weights + size_of(tag) * base, p0, p1, REPLACE,
    )  # fmt: skip


@kernel
def sum_columns(tag, out_tag, out, scratch, xs, k, c0, last, lanes, subs, p0, p1):
    """From row sums to bins: straight into a result whose channels lie innermost, else by a block.

    A result of half type goes by a block, to be rounded once; and so do blocks that overlap, since
    sums over many taps are added to.
    """
    entry = LANES * size_of(tag)
    bins, bin_step, channel_step = get(out, PW), get(out, OUT_BIN_STEP), get(out, OUT_CHANNEL_STEP)
    at = get(out, OUT_AT) + k * get(out, OUT_ROI_STEP) + p0 * bins * bin_step
    columns = get(xs.touched, k)
    straight = channel_step == size_of(tag) == size_of(out_tag) and lanes == LANES and last % LANES == 0
    for u in range(columns):
        put(scratch.src_row, u, u * subs * entry)
    for q in range(bins):
        put(scratch.dst_row, q, q * (bin_step if straight else entry))
    for p in range(p1 - p0):
        for sub in range(subs):
            i = p * subs + sub
            put(scratch.src_column, i, (p * columns * subs + sub) * entry)
            if straight:
                put(scratch.dst_column, i, p * bins * bin_step + sub_channel(sub, c0, last) * channel_step)
            else:
                put(scratch.dst_column, i, (sub * (p1 - p0) + p) * bins * entry)
    n = (p1 - p0) * subs
    base = get(xs.base, k)
    start, taps, weights = xs.start + 8 * k * (bins + 1), xs.taps + 8 * base, xs.weights + size_of(tag) * base
    if straight:
        combine(
            tag, scratch.sums, scratch.src_row, scratch.src_column,
            tag, at, scratch.dst_row, scratch.dst_column, n,
            start, taps, weights, ZERO, bins, REPLACE,
        )  # fmt: skip
        return
    combine(
        tag, scratch.sums, scratch.src_row, scratch.src_column,
        tag, scratch.results, scratch.dst_row, scratch.dst_column, n,
        start, taps, weights, ZERO, bins, REPLACE,
    )  # fmt: skip
    size = (p1 - p0) * bins
    for sub in range(subs):
        to = at + sub_channel(sub, c0, last) * channel_step
        from_block(
            tag, scratch.results + sub * size * entry, out_tag, to, bin_step, channel_step, size, lanes
        )
