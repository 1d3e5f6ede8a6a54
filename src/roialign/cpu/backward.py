"""The backward kernel: the same sums with the tables turned around, into rows that are written once.

A thread owns 16 channels of a strip of columns of one map. It takes the RoIs in the order of their
first row and adds to a ring of rows; a row above the next RoI's first is complete and is written
to the gradient map. So no two threads write one element, each is written once, and the order of
the sums depends on the RoIs alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .geometry import AT, CHANNEL_STEP, COLUMN_STEP, HEIGHT, IMAGE_STEP, MAP_COLUMNS, ROW_STEP, WIDTH, ZERO
from .jit import c_kernel, kernel, part
from .jobs import scratch_in, unpack
from .lanes import ADD, AHEAD, REPLACE, Scratch, combine, from_block, to_block, zero_cells
from .simd import LANES, fetch_add, get, load_one, put, size_of, store_one
from .tables import AxisAt

# The columns of `tasks`: the map, its first RoI and last in the tables, the first channel, a strip of columns
# of the map, and the rows of the ring. Where the RoIs come in several tables, a ring of its own keeps what is
# not complete from one to the next: its address (or 0), rows written (-1: none yet), rows
# reached, and whether it ends here.
MAP, START, STOP, CHANNEL, LEFT, SPAN, RING, KEPT, WRITTEN, REACHED, ENDS = np.arange(11)
TASK_COLUMNS = np.int64(11)

RING_CELLS = 2**15  # most cells of a ring, or row sums: 2 MB of float32


def cut(
    widths: Sequence[int], bounds: Sequence[int], rings: Sequence[int], homes: Sequence[int], lo: int,
    pooled_height: int, channels: int, most: int,
) -> NDArray[np.int64]:  # fmt: skip
    """Cut maps into strips of at most `most` columns.

    Args:
        widths: of the maps of one image, in columns.
        bounds: the first RoI of each map, and of the one after the last, among all.
        rings: of each map, the rows that its tallest RoI spans.
        homes: which maps.
        lo: the first RoI in the tables.
        pooled_height: rows of bins.
        channels: of each map.
        most: columns.

    Returns:
        A row per task: a strip and a block of channels.
    """
    strips = []
    for home in homes:
        width, ring = widths[home % len(widths)], rings[home]
        span = min(width, most, max(1, RING_CELLS // max(ring, pooled_height)))
        for x in range(0, width, span):
            rois = bounds[home] - lo, bounds[home + 1] - lo
            strips.append((home, *rois, 0, x, min(span, width - x), ring, 0, -1, 0, 1))
    blocks = -(-channels // LANES)
    tasks = np.tile(np.array(strips, np.int64).reshape(-1, TASK_COLUMNS), (blocks, 1))
    for block in range(blocks):  # a few at a time, for which NumPy keeps the GIL
        tasks[block * len(strips) : (block + 1) * len(strips), CHANNEL] = block * LANES
    return tasks


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    maps: Any  # (levels, MAP_COLUMNS)
    levels: Any
    grad: Any  # how it lies in memory
    tasks: Any  # (n_tasks, TASK_COLUMNS)
    n_tasks: Any
    order: Any  # (n,) of the RoIs in the tables
    ys: AxisAt
    xs: AxisAt
    channels: Any
    scratch: Scratch  # offsets


def entries(tasks: NDArray[np.int64], channels: int, bins_y: int, bins_x: int) -> tuple[int, int, int]:
    """Entries of 16 numbers that a thread needs for the ring, row sums, and bins, in tasks of `cut`."""
    strips = tasks[: len(tasks) // -(-channels // LANES)]  # the same for each block
    rings, spans = strips[:, RING], strips[:, SPAN]
    return int((rings * spans).max()), int(spans.max()) * bins_y, bins_y * bins_x


@c_kernel
def run(job, memory, target, working, gradient):
    """Take tasks until none is left. A task is a strip of a map and 16 channels."""
    _, maps, levels, grad, tasks, n_tasks, order, ys, xs, channels, offsets = unpack(Job, job)
    dst_tag, tag, grad_tag, counter = target(0), working(0), gradient(0), job
    scratch = scratch_in(offsets, memory)
    at = fetch_add(counter)
    while at < n_tasks:
        task = tasks + 8 * at * TASK_COLUMNS
        home, c0 = get(task, MAP), get(task, CHANNEL)
        lanes = min(channels - c0, LANES)
        m = maps + 8 * (home % levels) * MAP_COLUMNS
        dst = get(m, AT) + home // levels * get(m, IMAGE_STEP) + c0 * get(m, CHANNEL_STEP)
        dst += get(task, LEFT) * get(m, COLUMN_STEP)
        cells = get(task, KEPT)
        if cells == 0:
            cells = scratch.cells
        written, reached = get(task, WRITTEN), get(task, REACHED)
        if written < 0:  # it begins here
            written = ZERO
            zero_cells(tag, cells, get(task, RING) * get(task, SPAN))
        for i in range(get(task, START), get(task, STOP)):
            x0, x1 = _columns_inside(xs, i, task)
            rows = get(ys.touched, i)
            if rows and x0 < x1:
                at_rows = ys.cells + 8 * get(ys.base, i)
                _write_rows(tag, cells, task, dst_tag, dst, m, lanes, written, get(at_rows, 0), reached)
                written = get(at_rows, 0)
                reached = max(reached, get(at_rows, rows - 1) + 1)
                _sum_columns(grad_tag, grad, i, get(order, i), c0, lanes, tag, scratch, xs, x0, x1)
                _add_rows(tag, grad, cells, scratch, ys, xs, i, x0, x1, task)
        if get(task, ENDS):
            _write_rows(tag, cells, task, dst_tag, dst, m, lanes, written, get(m, HEIGHT), reached)
        put(task, WRITTEN, written)
        put(task, REACHED, reached)
        at = fetch_add(counter)


@part
def _columns_inside(xs, i, task):
    """Those of the columns that RoI i touches that lie in the strip."""
    cells = xs.cells + 8 * get(xs.base, i)
    n = get(xs.touched, i)
    x0 = ZERO
    while x0 < n and get(cells, x0) < get(task, LEFT):
        x0 += 1
    x1 = x0
    while x1 < n and get(cells, x1) < get(task, LEFT) + get(task, SPAN):
        x1 += 1
    return x0, x1


@part
def _write_rows(tag, cells, task, dst_tag, dst, m, lanes, start, stop, reached):
    """Write the rows `start:stop` of the strip from the ring, and free the places of those reached."""
    span = get(task, SPAN)
    for row in range(start, stop):
        place = cells + row % get(task, RING) * span * LANES * size_of(tag)
        to = dst + row * get(m, ROW_STEP)
        from_block(tag, place, dst_tag, to, get(m, COLUMN_STEP), get(m, CHANNEL_STEP), span, lanes)
        if row < reached:
            zero_cells(tag, place, span)


@part
def _sum_columns(grad_tag, grad, i, k, c0, lanes, tag, scratch, xs, x0, x1):
    """From the bins of RoI k to one sum for each row of bins and column of the map."""
    entry = LANES * size_of(tag)
    height, width = get(grad, HEIGHT), get(grad, WIDTH)
    bin_step, channel_step = get(grad, COLUMN_STEP), get(grad, CHANNEL_STEP)
    at = get(grad, AT) + k * get(grad, IMAGE_STEP) + c0 * channel_step
    straight = channel_step == size_of(grad_tag) and lanes == LANES
    step = bin_step if straight else entry
    for q in range(width):
        put(scratch.src_row, q, q * step)
    for p in range(height):
        put(scratch.src_column, p, p * width * step)
        put(scratch.dst_column, p, p * (x1 - x0) * entry)
    for u in range(x0, x1):
        put(scratch.dst_row, u, (u - x0) * entry)
    base = get(xs.base, i)
    start, taps, weights = xs.start + 8 * (base + i), xs.taps + 8 * base, xs.weights + size_of(tag) * base
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
def _add_rows(tag, grad, ring_at, scratch, ys, xs, i, x0, x1, task):
    """From those sums to the rows of the ring."""
    entry = LANES * size_of(tag)
    ring, span = get(task, RING), get(task, SPAN)
    for p in range(get(grad, HEIGHT)):
        put(scratch.src_row, p, p * (x1 - x0) * entry)
    cells = xs.cells + 8 * get(xs.base, i)
    for u in range(x1 - x0):
        put(scratch.src_column, u, u * entry)
        put(scratch.dst_column, u, (get(cells, x0 + u) - get(task, LEFT)) * entry)
    base = get(ys.base, i)
    cells = ys.cells + 8 * base
    origin = get(cells, 0) - get(cells, 0) % ring
    for y in range(get(ys.touched, i)):
        row = get(cells, y) - origin
        put(scratch.dst_row, y, (row if row < ring else row - ring) * span * entry)
    combine(
        tag, scratch.sums, scratch.src_row, scratch.src_column,
        tag, ring_at, scratch.dst_row, scratch.dst_column, x1 - x0,
        ys.start + 8 * (base + i), ys.taps + 8 * base, ys.weights + size_of(tag) * base,
        ZERO, get(ys.touched, i), ADD,
    )  # fmt: skip


@kernel
def turn_around(tag, n, bins, axis, turned):
    """From taps of bins on cells to taps of cells on bins, bins in ascending order.

    The cells of RoI k have their starts in `turned.start` from `base[k] + k` on.
    """
    for k in range(n):
        base = get(axis.base, k)
        cells = get(axis.touched, k)
        starts, taps, weights = (
            axis.start + 8 * k * (bins + 1),
            axis.taps + 8 * base,
            axis.weights + size_of(tag) * base,
        )
        new_starts = turned.start + 8 * (base + k)
        new_taps, new_weights = turned.taps + 8 * base, turned.weights + size_of(tag) * base
        n_taps = get(starts, bins) if cells else ZERO
        for c in range(cells + 1):
            put(new_starts, c, ZERO)
        for t in range(n_taps):
            put(new_starts, get(taps, t) + 1, get(new_starts, get(taps, t) + 1) + 1)
        for c in range(cells):
            put(new_starts, c + 1, get(new_starts, c + 1) + get(new_starts, c))
        b = bins  # from the last tap to the first, so that the starts end up where they belong
        for t in range(n_taps - 1, -1, -1):
            while get(starts, b) > t:
                b -= 1
            to = get(new_starts, get(taps, t) + 1) - 1
            put(new_starts, get(taps, t) + 1, to)
            put(new_taps, to, b)
            store_one(tag, new_weights + size_of(tag) * to, load_one(tag, weights + size_of(tag) * t))
        for c in range(cells):
            put(new_starts, c, get(new_starts, c + 1))
        put(new_starts, cells, n_taps)
