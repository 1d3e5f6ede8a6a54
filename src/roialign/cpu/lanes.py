"""The inner loops: sums over taps, and the way between maps and blocks of 16 channels.

A *block* holds 16 channels of some cells: `[cell][16]`, in the working precision. Addresses and
steps are in bytes.
"""

from typing import Any, NamedTuple

import numpy as np

from .jit import part
from .simd import (
    LANES,
    fma,
    get,
    load,
    load_one,
    prefetch_read,
    size_of,
    store,
    store_one,
    transpose8,
    zeros,
)

AHEAD = np.int64(512)  # bytes; how far ahead in a long run
TILE = np.int64(8)  # rows and columns of `transpose8`
REPLACE, ADD = np.bool_(False), np.bool_(True)


class Scratch(NamedTuple):
    """Addresses of a thread's own memory."""

    cell_row: Any  # where the rows and columns of a RoI's cells lie
    cell_column: Any
    src_row: Any  # where source rows, source columns, target rows and target columns of a sum lie
    src_column: Any
    dst_row: Any
    dst_column: Any
    cells: Any  # entries of 16 numbers: packed cells, row sums, results
    sums: Any
    results: Any


@part
def combine(
    src_tag, src, src_row, src_column, tag, dst, dst_row, dst_column, columns,
    start, taps, weights, lo, hi, add,
):  # fmt: skip
    """dst[d, i] = sum of weights[t] * src[taps[t], i] over the taps t of row d, for d in lo:hi, i < columns.

    The one inner loop of the engine; with `add`, dst[d, i] is added to. An entry is 16 channels.
    `src_row`, `src_column`, `dst_row` and `dst_column` hold the offsets of rows and columns: what
    lies where is the caller's business. Up to four taps are taken at once: with their weights and
    rows in registers, a column is four fused multiply-adds and a store.
    """
    for d in range(lo, hi):
        t, stop = get(start, d), get(start, d + 1)
        to = dst + get(dst_row, d)
        more = add
        if t == stop and not add:
            for i in range(columns):
                store(tag, to + get(dst_column, i), zeros(tag))
        while t < stop:
            n = min(stop - t, 4)
            t1, t2, t3 = t + min(n - 1, 1), t + min(n - 1, 2), t + n - 1  # repeat the last
            w0, s0 = load_one(tag, weights + t * size_of(tag)), src + get(src_row, get(taps, t))
            w1, s1 = load_one(tag, weights + t1 * size_of(tag)), src + get(src_row, get(taps, t1))
            w2, s2 = load_one(tag, weights + t2 * size_of(tag)), src + get(src_row, get(taps, t2))
            w3, s3 = load_one(tag, weights + t3 * size_of(tag)), src + get(src_row, get(taps, t3))
            if n == 4:
                for i in range(columns):
                    at, column = to + get(dst_column, i), get(src_column, i)
                    total = load(tag, at) if more else zeros(tag)
                    total = fma(w0, load(src_tag, s0 + column), total)
                    total = fma(w1, load(src_tag, s1 + column), total)
                    total = fma(w2, load(src_tag, s2 + column), total)
                    store(tag, at, fma(w3, load(src_tag, s3 + column), total))
            elif n == 3:
                for i in range(columns):
                    at, column = to + get(dst_column, i), get(src_column, i)
                    total = load(tag, at) if more else zeros(tag)
                    total = fma(w0, load(src_tag, s0 + column), total)
                    total = fma(w1, load(src_tag, s1 + column), total)
                    store(tag, at, fma(w2, load(src_tag, s2 + column), total))
            elif n == 2:
                for i in range(columns):
                    at, column = to + get(dst_column, i), get(src_column, i)
                    total = load(tag, at) if more else zeros(tag)
                    total = fma(w0, load(src_tag, s0 + column), total)
                    store(tag, at, fma(w1, load(src_tag, s1 + column), total))
            else:
                for i in range(columns):
                    at, column = to + get(dst_column, i), get(src_column, i)
                    total = load(tag, at) if more else zeros(tag)
                    store(tag, at, fma(w0, load(src_tag, s0 + column), total))
            t += n
            more = ADD


@part
def zero_cells(tag, block, cells):
    """Clear a block."""
    for i in range(cells):
        store(tag, block + i * LANES * size_of(tag), zeros(tag))


@part
def to_block(src_tag, src, cell_step, channel_step, tag, block, cells, channels, ahead):
    """Read a run of cells of up to 16 channels of a map into a block; missing channels become 0.

    `ahead` is the distance in bytes of what is to be read next, which is asked for meanwhile.
    """
    size = size_of(tag)
    step = LANES * size
    if channel_step == size_of(src_tag) and channels == LANES:
        for i in range(cells):
            store(tag, block + i * step, load(src_tag, src + i * cell_step))
        return
    tiled = cells >= 8 and cell_step == size_of(src_tag)
    lanes = channels - channels % 8 if tiled else 0
    for i in range(0, cells if tiled else 0, 8):
        i = min(i, cells - 8)  # the last tile may overlap the one before
        for lane in range(0, lanes, 8):
            from_ = src + lane * channel_step + i * cell_step
            for row in range(8):
                prefetch_read(from_ + row * channel_step + ahead)
            transpose8(src_tag, from_, channel_step, tag, block + i * step + lane * size, step)
    for lane in range(lanes, LANES):
        for i in range(cells):
            to = block + i * step + lane * size
            if lane < channels:
                store_one(tag, to, load_one(src_tag, src + lane * channel_step + i * cell_step))
            else:
                store_one(tag, to, tag - tag)


@part
def from_block(tag, block, dst_tag, dst, cell_step, channel_step, cells, channels):
    """Write a block into a run of cells of up to 16 channels of a map."""
    size = size_of(tag)
    step = LANES * size
    if channel_step == size_of(dst_tag) and channels == LANES:
        for i in range(cells):
            store(dst_tag, dst + i * cell_step, load(tag, block + i * step))
        return
    tiled = cells >= 8 and cell_step == size_of(dst_tag)
    lanes = channels - channels % 8 if tiled else 0
    for lane in range(0, lanes, 8):
        for i in range(0, cells, 8):
            i = min(i, cells - 8)
            to = dst + lane * channel_step + i * cell_step
            transpose8(tag, block + i * step + lane * size, step, dst_tag, to, channel_step)
    for lane in range(lanes, channels):
        for i in range(cells):
            value = load_one(tag, block + i * step + lane * size)
            store_one(dst_tag, dst + lane * channel_step + i * cell_step, value)


@part
def spread(
    tag, src, src_row, src_column, dst, dst_row, dst_column, columns, start, taps, weights, lo, hi
):  # fmt: skip
    """dst[taps[t], i] += weights[t] * src[d, i] over the taps t of row d, for d in lo:hi, i < columns.

    The adjoint of `combine`. Rows of `dst` whose offset is negative are left out.
    """
    for d in range(lo, hi):
        from_ = src + get(src_row, d)
        for t in range(get(start, d), get(start, d + 1)):
            offset = get(dst_row, get(taps, t))
            if offset >= 0:
                to, weight = dst + offset, load_one(tag, weights + t * size_of(tag))
                for i in range(columns):
                    at = to + get(dst_column, i)
                    store(tag, at, fma(weight, load(tag, from_ + get(src_column, i)), load(tag, at)))


@part
def copy_run(src_tag, src, dst_tag, dst, n):
    """Copy n numbers that lie one after the other, converting on the way."""
    size, dst_size = size_of(src_tag), size_of(dst_tag)
    if n >= LANES:
        for i in range(0, n, LANES):
            i = min(i, n - LANES)  # the last may overlap the one before
            store(dst_tag, dst + i * dst_size, load(src_tag, src + i * size))
    else:
        for i in range(n):
            store_one(dst_tag, dst + i * dst_size, load_one(src_tag, src + i * size))


@part
def zero_run(tag, at, n):
    """Clear n numbers that lie one after the other."""
    size = size_of(tag)
    if n >= LANES:
        for i in range(0, n, LANES):
            store(tag, at + min(i, n - LANES) * size, zeros(tag))
    else:
        for i in range(n):
            store_one(tag, at + i * size, type(load_one(tag, at))(0))
