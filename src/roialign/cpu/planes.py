"""Forward for few channels or few boxes: lanes lie along the columns of the map.

Nothing is packed and no RoI waits for another. A line is summed over the rows of the map that it reads, 16
columns at a time; in blocks of 16 lines the columns are summed into bins. Where a RoI has few taps its cells
are listed and summed one by one; where it has few points, these are (`points.py`). Every thread lays the
tables of a RoI in memory of its own, right before it is pooled.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from .geometry import (
    AT,
    CHANNEL_STEP,
    COLUMN_STEP,
    HEIGHT,
    IMAGE_STEP,
    MAP_COLUMNS,
    MINE,
    ONE,
    ROW_STEP,
    WIDTH,
    ZERO,
    Problem,
    X,
    Y,
    home_of,
)
from .jit import c_kernel, part
from .jobs import scratch_in, unpack
from .lanes import REPLACE, combine, copy_run
from .lines import (
    AT_ONCE,
    Room,
    are_few,
    block_to_run,
    lay_bins,
    lay_windows,
    list_cells,
    side_by_side,
    tables_in,
    turn,
)
from .points import pool_points
from .simd import LANES, fetch_add, fma_one, get, load_one, put, size_of, store_one
from .tables import fill_axis

WORTH_A_TASK = 50_000  # numbers read, which laying the tables of a RoI anew must be worth


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    lost: Any  # set if a RoI cannot be pooled
    problem: Problem
    out: Any  # how it lies in memory
    channels: Any
    rois: Any  # how many
    order: Any  # (rois,) which; or 0: all
    at_once: Any  # RoIs of a task
    pieces: Any  # that a RoI is cut into
    pointwise: Any  # whether points are summed one by one
    longest: Any  # axis of a map
    room: Room  # offsets


@functools.lru_cache(256)
def share(
    rois: int, channels: int, bins_y: int, rows: int, columns: int, wanted: int
) -> tuple[int, int, int]:
    """About how many numbers are read, how many RoIs a task has, and in how many pieces one is cut.

    At least as many tasks are `wanted`, if they are worth it. No RoI reads more `rows` of a map, nor more
    `columns` of one, whole windows. Most read less of it: a quarter is what the times that were measured say.
    """
    work = rois * channels * (rows * columns // 4 + LANES * bins_y)
    at_once = max(1, min(rois // (4 * wanted), 64))
    blocks = -(-channels * bins_y // LANES)
    pieces = max(1, min(-(-wanted // rois), blocks, work // WORTH_A_TASK))
    return work, at_once, pieces


@c_kernel
def run(job, memory, source, working, result):
    """Take tasks until none is left. A task is some RoIs, or a piece of one."""
    _, _, problem, out, channels, rois, order, at_once, pieces, pointwise, longest, offsets = unpack(Job, job)
    src_tag, tag, out_tag, room = source(0), working(0), result(0), scratch_in(offsets, memory)
    for cell in range(longest):
        put(room.place, cell, -ONE)
    ys, xs = tables_in(room)
    tasks = (rois + at_once - 1) // at_once * pieces
    task = fetch_add(job)
    while task < tasks:
        first, piece = task // pieces * at_once, task % pieces
        for i in range(first, min(first + at_once, rois)):
            k = get(order, i) if order else i
            home = home_of(tag, problem, k)
            level = home % problem.n_levels
            m = problem.maps + 8 * level * MAP_COLUMNS
            if home < 0:
                put(job, 1, ONE)
                _lose(tag, problem, out_tag, out, k, channels)
            elif get(m, MINE) and pointwise:
                if piece == 0:
                    src = get(m, AT) + home // problem.n_levels * get(m, IMAGE_STEP)
                    pool_points(src_tag, src, m, tag, out_tag, out, problem, k, level, channels, ys, xs)
            elif get(m, MINE):
                fill_axis(tag, problem, k, Y, level, ys, ZERO, room.place)
                fill_axis(tag, problem, k, X, level, xs, ZERO, room.place)
                src = get(m, AT) + home // problem.n_levels * get(m, IMAGE_STEP)
                inner = side_by_side(src_tag, m, channels)
                lines = channels // max(inner, ONE) * problem.rows
                blocks = (lines + LANES - 1) // LANES
                _pool(
                    src_tag, src, m, tag, out_tag, out, k, channels, inner, ys, xs,
                    blocks * piece // pieces * LANES, min(blocks * (piece + 1) // pieces * LANES, lines),
                    room,
                )  # fmt: skip
        task = fetch_add(job)


@part
def _lose(tag, problem, out_tag, out, k, channels):
    """A RoI that cannot be pooled is NaN, and its derivative zero. A result has no gaps."""
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    for i in range(channels * get(out, HEIGHT) * get(out, WIDTH)):
        store_one(out_tag, to + i * size_of(out_tag), type(tag)(0 if problem.derivative else np.nan))


@part
def _pool(src_tag, src, m, tag, out_tag, out, k, channels, inner, ys, xs, first, stop, room):
    """Pool the lines `first:stop` of RoI k.

    Of `inner` channels that lie side by side, a line has all; of others it is one channel's. Where `inner`
    is 0 those of a map are read one by one.
    """
    height, width = get(out, HEIGHT), get(out, WIDTH)
    side = max(inner, ONE)
    for y in range(get(ys.touched, 0)):
        put(room.rows, y, get(ys.cells, y) * get(m, ROW_STEP))
    cells, touched = xs.cells, get(xs.touched, 0)
    if channels < LANES and are_few(ys, xs, height, width):
        _pool_cells(src_tag, src, m, tag, out_tag, out, k, side, ys, xs, first, stop, room)
        return
    if inner:
        windows = lay_windows(cells, touched, inner, get(m, WIDTH) * inner, tag, size_of(src_tag), room)
    else:
        windows = _lay_columns(cells, touched, get(m, COLUMN_STEP), tag, room)
    lay_bins(tag, width, side, windows, room)
    entry = LANES * size_of(tag)
    for u in range(first, stop, AT_ONCE * LANES):
        n = min(AT_ONCE, (stop - u + LANES - 1) // LANES)
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, stop)
            _sum_rows(src_tag, src, m, inner, tag, ys, height, lo, hi, windows, touched, room)
            block = room.blocks + b * windows * LANES * entry
            turn(tag, room.lines, hi - lo, windows * LANES, windows * entry, block)
        combine(
            tag, room.blocks, room.places, room.block_columns,
            tag, room.results, room.bin_rows, room.bin_columns, n * side,
            xs.start, xs.taps, xs.weights, ZERO, width, REPLACE,
        )  # fmt: skip
        for b in range(n):
            lo = u + b * LANES
            results = room.results + b * width * side * entry
            _write(tag, results, out_tag, out, k, channels, side, lo, min(lo + LANES, stop), room)


@part
def _lay_columns(cells, n, step, tag, room):
    """Likewise where columns are read one by one."""
    for c in range(n):
        put(room.windows, c, get(cells, c) * step)
        put(room.places, c, c * LANES * size_of(tag))
    return (n + LANES - 1) // LANES


@part
def _sum_rows(src_tag, src, m, inner, tag, ys, bins, lo, hi, windows, touched, room):
    """Sum rows of the map into the lines `lo:hi`; line `c * bins + p` is of channel c and the bins p."""
    step = windows * LANES * size_of(tag)
    line = lo
    while line < hi:
        c = line // bins
        p0 = line - c * bins
        p1 = min(bins, p0 + hi - line)
        for p in range(p0, p1):
            put(room.line_rows, p, (line - lo + p - p0) * step)
        plane = src + c * get(m, CHANNEL_STEP)
        if inner:
            combine(
                src_tag, plane, room.rows, room.windows,
                tag, room.lines, room.line_rows, room.line_columns, windows,
                ys.start, ys.taps, ys.weights, p0, p1, REPLACE,
            )  # fmt: skip
        else:
            _sum_columns_one_by_one(src_tag, plane, tag, ys, p0, p1, touched, room)
        line += p1 - p0


@part
def _sum_columns_one_by_one(src_tag, plane, tag, ys, p0, p1, touched, room):
    size = size_of(tag)
    for p in range(p0, p1):
        to = room.lines + get(room.line_rows, p)
        for c in range(touched):
            total = type(tag)(0)
            at = plane + get(room.windows, c)
            for t in range(get(ys.start, p), get(ys.start, p + 1)):
                weight = load_one(tag, ys.weights + t * size)
                total = fma_one(weight, load_one(src_tag, at + get(room.rows, get(ys.taps, t))), total)
            store_one(tag, to + c * size, total)


@part
def _pool_cells(src_tag, src, m, tag, out_tag, out, k, side, ys, xs, first, stop, room):
    """Pool lines cell by cell."""
    size, width = size_of(tag), get(out, WIDTH)
    for x in range(get(xs.touched, 0)):
        put(room.windows, x, get(xs.cells, x) * get(m, COLUMN_STEP))
    height, bin_step = get(out, HEIGHT), get(out, COLUMN_STEP)
    list_cells(tag, ys, xs, height, width, room)
    for line in range(first, stop):
        p = line % height
        for c in range(line // height * side, line // height * side + side):
            at = src + c * get(m, CHANNEL_STEP)
            to = get(out, AT) + k * get(out, IMAGE_STEP) + c * get(out, CHANNEL_STEP) + p * get(out, ROW_STEP)
            for q in range(width):
                t, end = get(room.list_start, p * width + q), get(room.list_start, p * width + q + 1)
                total = type(tag)(0)
                while t + 4 <= end:
                    weights = room.list_weights + t * size
                    total += (
                        load_one(tag, weights) * load_one(src_tag, at + get(room.list, t))
                        + load_one(tag, weights + size) * load_one(src_tag, at + get(room.list, t + 1))
                        + load_one(tag, weights + 2 * size) * load_one(src_tag, at + get(room.list, t + 2))
                        + load_one(tag, weights + 3 * size) * load_one(src_tag, at + get(room.list, t + 3))
                    )
                    t += 4
                while t < end:
                    weight = load_one(tag, room.list_weights + t * size)
                    total += weight * load_one(src_tag, at + get(room.list, t))
                    t += 1
                store_one(out_tag, to + q * bin_step, total)


@part
def _write(tag, results, out_tag, out, k, channels, inner, lo, hi, room):
    """Write the results of some lines."""
    size = size_of(out_tag)
    height, width = get(out, HEIGHT), get(out, WIDTH)
    length = width * inner
    channel_step, bin_step = get(out, CHANNEL_STEP), get(out, COLUMN_STEP)
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    block_to_run(tag, results, hi - lo, length, room.run)
    if _in_one_run(out, channels, inner, size):
        copy_run(tag, room.run, out_tag, to + lo * length * size, (hi - lo) * length)
        return
    for line in range(lo, hi):
        at = to + line // height * channel_step + line % height * get(out, ROW_STEP)
        from_ = room.run + (line - lo) * length * size_of(tag)
        for q in range(width):
            for c in range(inner):
                value = load_one(tag, from_ + (q * inner + c) * size_of(tag))
                store_one(out_tag, at + q * bin_step + c * channel_step, value)


@part
def _in_one_run(pooled, channels, inner, size):
    """Whether the lines of a RoI lie one after the other in memory."""
    height, length = get(pooled, HEIGHT), get(pooled, WIDTH) * inner
    columns = get(pooled, WIDTH) == 1 or get(pooled, COLUMN_STEP) == inner * size
    rows = height == 1 or get(pooled, ROW_STEP) == length * size
    if inner > 1:
        return columns and rows and get(pooled, CHANNEL_STEP) == size
    return columns and rows and (channels == 1 or get(pooled, CHANNEL_STEP) == height * length * size)
