"""Forward of many channels, 16 at a time: RoIs that read the same cells share them.

RoIs of one map that lie close are a group: the rows that it needs are packed into scratch, in blocks of 16
channels, each row once, and pooled there. Where channels lie innermost cells are read in place, 16 at a time.
"""

from typing import Any, NamedTuple

import numpy as np

from .geometry import (
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
)
from .jit import c_kernel, kernel, part
from .jobs import scratch_in, unpack
from .lanes import (
    AHEAD,
    REPLACE,
    TILE,
    Scratch,
    combine,
    from_block,
    to_block,
)
from .machine import add
from .simd import LANES, fetch_add, get, prefetch_write, put, size_of
from .tables import AxisAt

# The columns of `groups`: its RoIs, the columns of the map they need, and rows that are kept.
START, STOP, LEFT, SPAN, RING = np.arange(5)
GROUP_COLUMNS = np.int64(5)

PACK_CELLS = np.int64(2**17)  # most cells packed at once: 8 MB of float32, which a cache holds
WORTH = 3.0  # how much dearer packing a cell for one RoI is than for a group; measured
DENSE = 2.0  # how much dearer reading a touched cell in place is than packing any; measured
SUM_ENTRIES = np.int64(2**12)  # row sums, and results, kept at once
ANNOUNCED = np.int64(2**12)  # most bytes of a result that are asked for before it is written


@kernel
def group(rois, order, homes, ys, xs, most, groups, others):
    """Cut the ordered RoIs into groups, of at most `most`, that read one map alike.

    Returns how many, the most cells that one packs, and how many RoIs are in none: `others` lists these.

    A group packs the rows that it needs, all of its columns, if that is less work than for each RoI
    to read the cells that it touches. RoIs come in the order of their first row, so a ring of as
    many rows as the tallest RoI has is enough. Else a RoI is a group of its own if it touches most of the
    cells between its first and its last; in that of others too much would be packed for nothing.
    """
    n = start = most_cells = left_out = ZERO
    while start < rois:
        home = get(homes, start)
        left, right, top, bottom = ONE << 40, -ONE, ONE << 40, -ONE
        ring = touched = ZERO
        stop = start
        while stop < rois and get(homes, stop) == home and stop - start < most:
            first_row, last_row, first, last = _extent(ys, xs, stop)
            if last >= 0:
                top, bottom, ring = (
                    min(top, first_row),
                    max(bottom, last_row),
                    max(ring, last_row - first_row + 1),
                )
                left, right = min(left, first), max(right, last)
                touched += get(ys.touched, stop) * max(TILE, last - first + 1)
            stop += 1
        span = right - left + 1 if right >= 0 else ZERO
        if 0 < ring * span <= PACK_CELLS and (bottom - top + 1) * span <= WORTH * touched:
            n = _put_group(groups, n, start, stop, left, span, ring)
            most_cells = max(most_cells, ring * span)
        else:
            for i in range(start, stop):
                first_row, last_row, first, last = _extent(ys, xs, i)
                span = min(max(last - first + 1, TILE), last + 1)
                ring = last_row - first_row + 1
                if 0 < ring * span <= min(DENSE * get(ys.touched, i) * get(xs.touched, i), PACK_CELLS):
                    n = _put_group(groups, n, i, i + 1, last + 1 - span, span, ring)
                    most_cells = max(most_cells, ring * span)
                else:
                    put(others, left_out, get(order, i))
                    left_out += 1
        start = stop
    return n, most_cells, left_out


@part
def _extent(ys, xs, i):
    """First and last row and column of the map that RoI i touches; the last are -1 if it touches none."""
    rows, columns = get(ys.touched, i), get(xs.touched, i)
    if rows == 0 or columns == 0:
        return ZERO, -ONE, ZERO, -ONE
    y, x = ys.cells + 8 * get(ys.base, i), xs.cells + 8 * get(xs.base, i)
    return get(y, 0), get(y, rows - 1), get(x, 0), get(x, columns - 1)


@part
def _put_group(groups, n, start, stop, left, span, ring):
    group = groups + 8 * n * GROUP_COLUMNS
    put(group, START, start)
    put(group, STOP, stop)
    put(group, LEFT, left)
    put(group, SPAN, span)
    put(group, RING, ring)
    return n + 1


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    packed: Any  # cells of 16 channels, in the end; so that this can be looked at
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
    _, _, maps, levels, out, groups, n_groups, order, homes, ys, xs, channels, offsets = unpack(Job, job)
    src_tag, tag, out_tag, counter = source(0), working(0), result(0), job
    scratch = scratch_in(offsets, memory)
    tasks = n_groups * ((channels + LANES - 1) // LANES)
    task = fetch_add(counter)
    while task < tasks:
        group = groups + 8 * (task % n_groups) * GROUP_COLUMNS
        c0 = min(task // n_groups * LANES, channels - LANES)  # the last may overlap the one before
        home = get(homes, get(group, START))
        m = maps + 8 * (home % levels) * MAP_COLUMNS
        src = get(m, AT) + home // levels * get(m, IMAGE_STEP) + c0 * get(m, CHANNEL_STEP)
        straight = get(m, CHANNEL_STEP) == size_of(src_tag)
        ready, packed = -ONE, ZERO
        for i in range(get(group, START), get(group, STOP)):
            k = get(order, i)
            if straight:
                _place_in_map(m, scratch, ys, xs, i)
                _pool(src_tag, src, tag, out_tag, out, scratch, ys, xs, i, k, c0)
            else:
                if get(xs.touched, i):
                    ready, cells = _pack_rows(src_tag, src, m, tag, scratch, group, ys, i, ready)
                    packed += cells
                _place_in_ring(tag, scratch, group, ys, xs, i)
                _pool(tag, scratch.cells, tag, out_tag, out, scratch, ys, xs, i, k, c0)
        add(job + 8, packed)
        task = fetch_add(counter)


@part
def _pool(src_tag, src, tag, out_tag, out, scratch, ys, xs, i, k, c0):
    """Pool 16 channels of RoI k, some rows of bins at a time, from where its cells were placed."""
    _announce(out, k, c0)
    columns = get(xs.touched, i)
    step = max(ONE, SUM_ENTRIES // max(columns, get(out, WIDTH)))
    for p0 in range(0, get(out, HEIGHT), step):
        p1 = min(p0 + step, get(out, HEIGHT))
        _sum_rows(src_tag, src, tag, scratch, columns, ys, i, get(out, HEIGHT), p0, p1)
        _sum_columns(tag, out_tag, out, scratch, xs, i, k, c0, p0, p1)


@part
def _announce(out, k, c0):
    """Ask for the memory of a result, which is written after the sums, unless it is spread out."""
    channel_step = get(out, CHANNEL_STEP)
    to = get(out, AT) + k * get(out, IMAGE_STEP) + c0 * channel_step
    if channel_step > get(out, COLUMN_STEP):
        for byte in range(0, min(LANES * channel_step, ANNOUNCED), 64):
            prefetch_write(to + byte)


@part
def _pack_rows(src_tag, src, m, tag, scratch, group, ys, i, ready):
    """Bring the rows that RoI i needs into the ring, unless they are.

    Returns the last row that is, and how many cells were packed.
    """
    rows, packed = get(ys.touched, i), ZERO
    if rows == 0:
        return ready, packed
    cells = ys.cells + 8 * get(ys.base, i)
    last = get(cells, rows - 1)
    ring, left, span = get(group, RING), get(group, LEFT), get(group, SPAN)
    for row in range(max(ready + 1, get(cells, 0)), last + 1):
        from_ = src + row * get(m, ROW_STEP) + left * get(m, COLUMN_STEP)
        to = scratch.cells + row % ring * span * LANES * size_of(tag)
        to_block(src_tag, from_, get(m, COLUMN_STEP), get(m, CHANNEL_STEP), tag, to, span, LANES, AHEAD)
        packed += span
    return max(ready, last), packed


@part
def _place_in_ring(tag, scratch, group, ys, xs, i):
    """Where the cells that RoI i touches lie in the ring."""
    entry = LANES * size_of(tag)
    ring = get(group, RING)
    cells = ys.cells + 8 * get(ys.base, i)
    origin = ZERO
    for y in range(get(ys.touched, i)):
        if y == 0:
            origin = get(cells, 0) - get(cells, 0) % ring
        row = get(cells, y) - origin
        put(scratch.cell_row, y, (row if row < ring else row - ring) * get(group, SPAN) * entry)
    cells = xs.cells + 8 * get(xs.base, i)
    for x in range(get(xs.touched, i)):
        put(scratch.cell_column, x, (get(cells, x) - get(group, LEFT)) * entry)


@part
def _place_in_map(m, scratch, ys, xs, i):
    """Where they lie in a map whose channels lie innermost."""
    cells = ys.cells + 8 * get(ys.base, i)
    for y in range(get(ys.touched, i)):
        put(scratch.cell_row, y, get(cells, y) * get(m, ROW_STEP))
    cells = xs.cells + 8 * get(xs.base, i)
    for x in range(get(xs.touched, i)):
        put(scratch.cell_column, x, get(cells, x) * get(m, COLUMN_STEP))


@part
def _sum_rows(src_tag, src, tag, scratch, columns, ys, i, bins, p0, p1):
    """Sum cells, for the rows of bins `p0:p1`."""
    entry = LANES * size_of(tag)
    for p in range(p0, p1):
        put(scratch.dst_row, p, (p - p0) * columns * entry)
    for u in range(columns):
        put(scratch.dst_column, u, u * entry)
    base = get(ys.base, i)
    combine(
        src_tag, src, scratch.cell_row, scratch.cell_column,
        tag, scratch.sums, scratch.dst_row, scratch.dst_column, columns,
        ys.start + 8 * i * (bins + 1), ys.taps + 8 * base, ys.weights + size_of(tag) * base, p0, p1, REPLACE,
    )  # fmt: skip


@part
def _sum_columns(tag, out_tag, out, scratch, xs, i, k, c0, p0, p1):
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
    from_block(tag, scratch.results, out_tag, to, bin_step, channel_step, (p1 - p0) * bins, LANES)


def entries(cells: int, columns: int, pooled_width: int) -> tuple[int, int, int]:
    """Entries of 16 numbers that a thread needs for packed cells, row sums and results."""
    least = int(SUM_ENTRIES)
    return cells, max(least, columns), max(least, pooled_width)
