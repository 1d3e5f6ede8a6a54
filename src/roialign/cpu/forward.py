"""Forward from maps of any strides: blocks of 16 channels are packed into scratch and pooled there."""

from typing import Any, NamedTuple

import numpy as np

from .jit import c_kernel, kernel, part
from .jobs import scratch_in, unpack
from .lanes import (
    AHEAD,
    REPLACE,
    Scratch,
    combine,
    from_block,
    to_block,
)
from .simd import LANES, fetch_add, get, prefetch_write, put, size_of
from .tables import (
    AT,
    CHANNEL_STEP,
    COLUMN_STEP,
    HEIGHT,
    IMAGE_STEP,
    MAP_COLUMNS,
    ONE,
    ROW_STEP,
    WIDTH,
    ZERO,
    AxisAt,
)

# The columns of `groups`: its RoIs, the columns of the map they need, and rows kept (0: each RoI packs
# its own cells).
START, STOP, LEFT, SPAN, RING = np.arange(5)
GROUP_COLUMNS = np.int64(5)

PACK_CELLS = np.int64(2**17)  # most cells packed at once: 8 MB of float32, which a cache holds
WORTH = 3.0  # how much dearer packing a cell for one RoI is than for a group; measured
FEW = np.int64(8)  # RoIs of a group that shares nothing
TILE = np.int64(8)  # columns that are transposed at once
SUM_ENTRIES = np.int64(2**12)  # row sums, and results, kept at once
ANNOUNCED = np.int64(2**12)  # most bytes of a result that are asked for before it is written


@kernel
def group(rois, homes, ys, xs, most, groups):
    """Cut the ordered RoIs into groups, of at most `most`, that read one map alike.

    Returns how many, and the most cells that one packs.

    A group packs the rows that it needs, all of its columns, if that is less work than for each RoI
    to pack the cells that it touches. RoIs come in the order of their first row, so a ring of as
    many rows as the tallest RoI has is enough.
    """
    n = start = most_cells = ZERO
    while start < rois:
        home = get(homes, start)
        left, right, top, bottom = ONE << 40, -ONE, ONE << 40, -ONE
        ring = touched = cells = ZERO
        stop = start
        while stop < rois and get(homes, stop) == home and stop - start < most:
            rows, columns = get(ys.touched, stop), get(xs.touched, stop)
            if rows and columns:
                at = ys.cells + 8 * get(ys.base, stop)
                first, last = get(at, 0), get(at, rows - 1)
                top, bottom, ring = min(top, first), max(bottom, last), max(ring, last - first + 1)
                at = xs.cells + 8 * get(xs.base, stop)
                first, last = get(at, 0), get(at, columns - 1)
                left, right = min(left, first), max(right, last)
                columns = max(TILE, last - first + 1)
                touched += rows * columns
                cells = max(cells, rows * min(columns, _columns_at_once(rows)))
            stop += 1
        span = right - left + 1 if right >= 0 else ZERO
        if (bottom - top + 1) * span > WORTH * touched or ring * span > PACK_CELLS or ring == 0:
            size, ring = FEW, ZERO
        else:
            size, cells = stop - start, ring * span
        most_cells = max(most_cells, cells)
        while start < stop:
            group = groups + 8 * n * GROUP_COLUMNS
            put(group, START, start)
            put(group, STOP, min(start + size, stop))
            put(group, LEFT, left)
            put(group, SPAN, span)
            put(group, RING, ring)
            n += 1
            start = get(group, STOP)
    return n, most_cells


@part
def _columns_at_once(rows):
    return max(TILE, PACK_CELLS // max(rows, ONE))


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    maps: Any  # (levels, MAP_COLUMNS)
    levels: Any
    out: Any  # how it lies in memory
    groups: Any  # (n_groups, GROUP_COLUMNS)
    n_groups: Any
    order: Any  # (n,) of the RoIs in the tables
    homes: Any  # (n,)
    ys: AxisAt
    xs: AxisAt
    channels: Any
    scratch: Scratch  # offsets


@c_kernel
def run(job, memory, source, working, result):
    """Take tasks until none is left. A task is a group of RoIs and 16 channels."""
    _, maps, levels, out, groups, n_groups, order, homes, ys, xs, channels, offsets = unpack(Job, job)
    src_tag, tag, out_tag, counter = source(0), working(0), result(0), job
    scratch = scratch_in(offsets, memory)
    tasks = n_groups * ((channels + LANES - 1) // LANES)
    task = fetch_add(counter)
    while task < tasks:
        group, c0 = groups + 8 * (task % n_groups) * GROUP_COLUMNS, task // n_groups * LANES
        home = get(homes, get(group, START))
        m = maps + 8 * (home % levels) * MAP_COLUMNS
        src = get(m, AT) + home // levels * get(m, IMAGE_STEP) + c0 * get(m, CHANNEL_STEP)
        lanes = min(channels - c0, LANES)
        shared = get(group, RING) > 0
        ready = -ONE
        for i in range(get(group, START), get(group, STOP)):
            k = get(order, i)
            columns = get(xs.touched, i)
            if shared and columns:
                ready = _pack_rows(src_tag, src, m, lanes, tag, scratch, group, ys, i, ready)
            _announce(out, k, c0, lanes)
            step = max(ONE, SUM_ENTRIES // max(columns, get(out, WIDTH)))
            for p0 in range(0, get(out, HEIGHT), step):
                p1 = min(p0 + step, get(out, HEIGHT))
                u0 = ZERO
                while u0 < columns:
                    if shared:
                        u1 = _place_in_ring(tag, scratch, group, ys, xs, i)
                    else:
                        u1 = _pack_own_cells(src_tag, src, m, lanes, tag, scratch, ys, xs, i, u0)
                    _sum_rows(tag, scratch, u0, u1 - u0, columns, ys, i, get(out, HEIGHT), p0, p1)
                    u0 = u1
                _sum_columns(tag, out_tag, out, scratch, xs, i, k, c0, lanes, p0, p1)
        task = fetch_add(counter)


@part
def _announce(out, k, c0, lanes):
    """Ask for the memory of a result, which is written after the sums, unless it is spread out."""
    channel_step = get(out, CHANNEL_STEP)
    to = get(out, AT) + k * get(out, IMAGE_STEP) + c0 * channel_step
    if channel_step > get(out, COLUMN_STEP):
        for byte in range(0, min(lanes * channel_step, ANNOUNCED), 64):
            prefetch_write(to + byte)


@part
def _pack_rows(src_tag, src, m, lanes, tag, scratch, group, ys, i, ready):
    """Bring the rows that RoI i needs into the ring, unless they are; returns the last that is."""
    rows = get(ys.touched, i)
    if rows == 0:
        return ready
    cells = ys.cells + 8 * get(ys.base, i)
    last = get(cells, rows - 1)
    ring, left, span = get(group, RING), get(group, LEFT), get(group, SPAN)
    for row in range(max(ready + 1, get(cells, 0)), last + 1):
        from_ = src + row * get(m, ROW_STEP) + left * get(m, COLUMN_STEP)
        to = scratch.cells + row % ring * span * LANES * size_of(tag)
        to_block(src_tag, from_, get(m, COLUMN_STEP), get(m, CHANNEL_STEP), tag, to, span, lanes, AHEAD)
    return max(ready, last)


@part
def _place_in_ring(tag, scratch, group, ys, xs, i):
    """Where the cells that RoI i touches lie in the ring; returns the number of its columns."""
    entry = LANES * size_of(tag)
    ring = get(group, RING)
    cells = ys.cells + 8 * get(ys.base, i)
    origin = ZERO
    for y in range(get(ys.touched, i)):
        if y == 0:
            origin = get(cells, 0) - get(cells, 0) % ring
        row = get(cells, y) - origin
        put(scratch.src_row, y, (row if row < ring else row - ring) * get(group, SPAN) * entry)
    cells = xs.cells + 8 * get(xs.base, i)
    for x in range(get(xs.touched, i)):
        put(scratch.src_column, x, (get(cells, x) - get(group, LEFT)) * entry)
    return get(xs.touched, i)


@part
def _pack_own_cells(src_tag, src, m, lanes, tag, scratch, ys, xs, i, u0):
    """Pack just the rows that RoI i touches, and of its columns those from `u0` on that there is room for.

    Returns the next column.
    """
    entry = LANES * size_of(tag)
    rows, columns = get(ys.touched, i), get(xs.touched, i)
    row_cells, cells = ys.cells + 8 * get(ys.base, i), xs.cells + 8 * get(xs.base, i)
    left = get(cells, u0)
    u1 = u0 + 1
    while u1 < columns and get(cells, u1) - left < _columns_at_once(rows):
        u1 += 1
    span = min(max(get(cells, u1 - 1) - left + 1, TILE), get(m, WIDTH))
    left = min(left, get(m, WIDTH) - span)
    for y in range(rows):
        from_ = src + get(row_cells, y) * get(m, ROW_STEP) + left * get(m, COLUMN_STEP)
        to = scratch.cells + y * span * entry
        to_block(
            src_tag, from_, get(m, COLUMN_STEP), get(m, CHANNEL_STEP), tag, to, span, lanes, get(m, ROW_STEP)
        )
        put(scratch.src_row, y, y * span * entry)
    for u in range(u0, u1):
        put(scratch.src_column, u - u0, (get(cells, u) - left) * entry)
    return u1


@part
def _sum_rows(tag, scratch, first, n, columns, ys, i, bins, p0, p1):
    """Sum packed cells, for the rows of bins `p0:p1` and the columns `first:first + n` of `columns`."""
    entry = LANES * size_of(tag)
    for p in range(p0, p1):
        put(scratch.dst_row, p, (p - p0) * columns * entry)
    for u in range(n):
        put(scratch.dst_column, u, (first + u) * entry)
    base = get(ys.base, i)
    combine(
        tag, scratch.cells, scratch.src_row, scratch.src_column,
        tag, scratch.sums, scratch.dst_row, scratch.dst_column, n,
        ys.start + 8 * i * (bins + 1), ys.taps + 8 * base, ys.weights + size_of(tag) * base, p0, p1, REPLACE,
    )  # fmt: skip


@part
def _sum_columns(tag, out_tag, out, scratch, xs, i, k, c0, lanes, p0, p1):
    """From row sums to bins. They pass through scratch, where sums over many taps can grow."""
    entry = LANES * size_of(tag)
    bins, columns = get(out, WIDTH), get(xs.touched, i)
    for u in range(columns):
        put(scratch.src_row, u, u * entry)
    for q in range(bins):
        put(scratch.dst_row, q, q * entry)
    for p in range(p1 - p0):
        put(scratch.src_column, p, p * columns * entry)
        put(scratch.dst_column, p, p * bins * entry)
    base = get(xs.base, i)
    combine(
        tag, scratch.sums, scratch.src_row, scratch.src_column,
        tag, scratch.results, scratch.dst_row, scratch.dst_column, p1 - p0,
        xs.start + 8 * i * (bins + 1), xs.taps + 8 * base, xs.weights + size_of(tag) * base,
        ZERO, bins, REPLACE,
    )  # fmt: skip
    bin_step, channel_step = get(out, COLUMN_STEP), get(out, CHANNEL_STEP)
    to = get(out, AT) + k * get(out, IMAGE_STEP) + p0 * bins * bin_step + c0 * channel_step
    from_block(tag, scratch.results, out_tag, to, bin_step, channel_step, (p1 - p0) * bins, lanes)


def entries(cells: int, columns: int, pooled_width: int) -> tuple[int, int, int]:
    """Entries of 16 numbers that a thread needs for packed cells, row sums and results."""
    least = int(SUM_ENTRIES)
    return cells, max(least, columns), max(least, pooled_width)
