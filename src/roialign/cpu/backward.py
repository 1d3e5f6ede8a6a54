"""The backward kernel: the same sums with the tables turned around, into rows that are written once.

A thread owns 16 channels of a strip of columns of one map. It takes the RoIs in the order of their
first row and adds to a ring of rows; a row above the next RoI's first is complete and is written
to the gradient map. So no two threads write one element, each is written once, and the order of
the sums depends on the RoIs alone.
"""

import itertools
from typing import Any

import numpy as np

from .jit import kernel, part
from .lanes import (
    ADD,
    AHEAD,
    OUT_AT,
    OUT_BIN_STEP,
    OUT_CHANNEL_STEP,
    OUT_ROI_STEP,
    PH,
    PW,
    REPLACE,
    combine,
    from_block,
    to_block,
    zero_cells,
)
from .simd import LANES, fetch_add, get, put, size_of
from .tables import AT, CHANNEL_STEP, COLUMN_STEP, HEIGHT, IMAGE_STEP, MAP_COLUMNS, ROW_STEP, ZERO

# The columns of `strips`.
MAP, START, STOP, LEFT, SPAN, RING = np.arange(6)
STRIP_COLUMNS = np.int64(6)

RING_CELLS = 2**15  # most cells of a ring, or row sums: 2 MB of float32


def heights(order: Any, touched: Any, base: Any, cells: Any) -> Any:
    """Rows of the map from the first to the last that each RoI touches, and at least one."""
    spans = np.ones(len(order), np.int64)
    meets = touched[order] > 0
    first = base[order[meets]]
    spans[meets] = cells[first + touched[order[meets]] - 1] - cells[first] + 1
    return spans


def cut(
    widths: list[int], images: int, homes: Any, spans: Any, pooled_height: int, pooled_width: int, most: int
) -> tuple[list[tuple[int, ...]], tuple[int, int, int]]:
    """Cut every map into strips of at most `most` columns.

    Args:
        widths: of the maps.
        images: how many there are of each map.
        homes: the map of each RoI, in their order.
        spans: rows that each RoI spans.
        pooled_height: rows of bins.
        pooled_width: columns of bins.
        most: columns.

    Returns:
        Strips: map, first RoI, last, first column, columns, rows of the ring, which has as many as
        the tallest RoI of the map; and the entries of 16 numbers that a thread needs for the ring,
        for row sums and for a block of bins.
    """
    bounds = np.searchsorted(homes, np.arange(images * len(widths) + 1)).tolist()
    strips: list[tuple[int, ...]] = []
    rings, sums = [0], [0]
    for home, (start, stop) in enumerate(itertools.pairwise(bounds)):
        width = widths[home % len(widths)]
        ring = int(spans[start:stop].max(initial=1))
        span = min(width, most, max(1, RING_CELLS // max(ring, pooled_height)))
        strips += [(home, start, stop, x, min(span, width - x), ring) for x in range(0, width, span)]
        rings.append(ring * span)
        sums.append(pooled_height * span)
    return strips, (max(rings), max(sums), pooled_height * pooled_width)


@kernel
def run(
    counter, dst_tag, tag, grad_tag, maps, levels, grad, strips, n_strips, order, ys, xs, channels, scratch
):  # fmt: skip
    """Take tasks until none is left. A task is a strip of a map and 16 channels."""
    tasks = n_strips * ((channels + LANES - 1) // LANES)
    task = fetch_add(counter)
    while task < tasks:
        strip, c0 = strips + 8 * (task % n_strips) * STRIP_COLUMNS, task // n_strips * LANES
        lanes = min(channels - c0, LANES)
        home = get(strip, MAP)
        m = maps + 8 * (home % levels) * MAP_COLUMNS
        dst = get(m, AT) + home // levels * get(m, IMAGE_STEP) + c0 * get(m, CHANNEL_STEP)
        dst += get(strip, LEFT) * get(m, COLUMN_STEP)
        zero_cells(tag, scratch.cells, get(strip, RING) * get(strip, SPAN))
        written = reached = ZERO
        for i in range(get(strip, START), get(strip, STOP)):
            k = get(order, i)
            x0, x1 = _columns_inside(xs, k, strip)
            rows = get(ys.touched, k)
            if rows and x0 < x1:
                cells = ys.cells + 8 * get(ys.base, k)
                _write_rows(tag, scratch, strip, dst_tag, dst, m, lanes, written, get(cells, 0), reached)
                written = get(cells, 0)
                reached = max(reached, get(cells, rows - 1) + 1)
                _sum_columns(grad_tag, grad, k, c0, lanes, tag, scratch, xs, x0, x1)
                _add_rows(tag, grad, scratch, ys, xs, k, x0, x1, strip)
        _write_rows(tag, scratch, strip, dst_tag, dst, m, lanes, written, get(m, HEIGHT), reached)
        task = fetch_add(counter)


@part
def _columns_inside(xs, k, strip):
    """Those of the columns that RoI k touches that lie in the strip."""
    cells = xs.cells + 8 * get(xs.base, k)
    n = get(xs.touched, k)
    x0 = ZERO
    while x0 < n and get(cells, x0) < get(strip, LEFT):
        x0 += 1
    x1 = x0
    while x1 < n and get(cells, x1) < get(strip, LEFT) + get(strip, SPAN):
        x1 += 1
    return x0, x1


@part
def _write_rows(tag, scratch, strip, dst_tag, dst, m, lanes, start, stop, reached):
    """Write the rows `start:stop` of the strip from the ring, and free the places of those reached."""
    span = get(strip, SPAN)
    for row in range(start, stop):
        place = scratch.cells + row % get(strip, RING) * span * LANES * size_of(tag)
        to = dst + row * get(m, ROW_STEP)
        from_block(tag, place, dst_tag, to, get(m, COLUMN_STEP), get(m, CHANNEL_STEP), span, lanes)
        if row < reached:
            zero_cells(tag, place, span)


@part
def _sum_columns(grad_tag, grad, k, c0, lanes, tag, scratch, xs, x0, x1):
    """From the bins of RoI k to one sum for each row of bins and column of the map."""
    entry = LANES * size_of(tag)
    height, width = get(grad, PH), get(grad, PW)
    bin_step, channel_step = get(grad, OUT_BIN_STEP), get(grad, OUT_CHANNEL_STEP)
    at = get(grad, OUT_AT) + k * get(grad, OUT_ROI_STEP) + c0 * channel_step
    straight = channel_step == size_of(grad_tag) and lanes == LANES
    step = bin_step if straight else entry
    for q in range(width):
        put(scratch.src_row, q, q * step)
    for p in range(height):
        put(scratch.src_column, p, p * width * step)
        put(scratch.dst_column, p, p * (x1 - x0) * entry)
    for u in range(x0, x1):
        put(scratch.dst_row, u, (u - x0) * entry)
    base = get(xs.base, k)
    start, taps, weights = xs.start + 8 * (base + k), xs.taps + 8 * base, xs.weights + size_of(tag) * base
    if straight:
        combine(
            grad_tag, at, scratch.src_row, scratch.src_column,
            tag, scratch.sums, scratch.dst_row, scratch.dst_column, height,
            start, taps, weights, x0, x1, REPLACE,
        )  # fmt: skip
    else:
        to_block(grad_tag, at, bin_step, channel_step, tag, scratch.results, height * width, lanes, AHEAD)
        combine(
            tag, scratch.results, scratch.src_row, scratch.src_column,
            tag, scratch.sums, scratch.dst_row, scratch.dst_column, height,
            start, taps, weights, x0, x1, REPLACE,
        )  # fmt: skip


@part
def _add_rows(tag, grad, scratch, ys, xs, k, x0, x1, strip):
    """From those sums to the rows of the ring."""
    entry = LANES * size_of(tag)
    ring, span = get(strip, RING), get(strip, SPAN)
    for p in range(get(grad, PH)):
        put(scratch.src_row, p, p * (x1 - x0) * entry)
    cells = xs.cells + 8 * get(xs.base, k)
    for u in range(x1 - x0):
        put(scratch.src_column, u, u * entry)
        put(scratch.dst_column, u, (get(cells, x0 + u) - get(strip, LEFT)) * entry)
    base = get(ys.base, k)
    cells = ys.cells + 8 * base
    origin = get(cells, 0) - get(cells, 0) % ring
    for i in range(get(ys.touched, k)):
        row = get(cells, i) - origin
        put(scratch.dst_row, i, (row if row < ring else row - ring) * span * entry)
    combine(
        tag, scratch.sums, scratch.src_row, scratch.src_column,
        tag, scratch.cells, scratch.dst_row, scratch.dst_column, x1 - x0,
        ys.start + 8 * (base + k), ys.taps + 8 * base, ys.weights + size_of(tag) * base,
        ZERO, get(ys.touched, k), ADD,
    )  # fmt: skip
