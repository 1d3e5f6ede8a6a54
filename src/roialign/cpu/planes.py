"""Forward and backward for few channels or few boxes: lanes lie along the columns of the map.

Nothing is packed and no RoI waits for another. Where channels lie apart, a *line* is one row of bins of one
channel, summed over the rows of the map that it reads, 16 columns of a row at a time. Sixteen lines turned
around are a block, and there the columns are summed into bins, a lane being a line. Where channels lie side
by side in a row, a column is as many numbers as there are channels, and a line has all of them.

Of a row only *windows* of 16 numbers are read that hold a column which is touched. Every thread lays the
tables of a RoI in memory of its own, right before it is pooled.
"""

import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .jit import c_kernel, part
from .jobs import lay, scratch_in, unpack
from .lanes import REPLACE, combine, copy_run, spread, zero_cells, zero_run
from .simd import LANES, fetch_add, fma_one, get, load_one, put, size_of, store_one, transpose8
from .tables import (
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
    AxisAt,
    Problem,
    fill_axis,
    home_of,
)

AT_ONCE = np.int64(4)  # blocks that are summed into bins with one look at the taps
TILE = np.int64(8)
FEW = np.int64(2**10)  # taps of a RoI, the most of those that are listed
BAND = 2**20  # most numbers of a band
LEAST = 2**15  # that are worth a band of their own
TASKS_PER_THREAD = 4
WORTH_A_TASK = 50_000  # numbers read, which laying the tables of a RoI anew must be worth

# The columns of the tasks of backward: the map, its RoIs in their order, channels and rows of the map.
MAP, START, STOP, CHANNEL, CHANNEL_STOP, TOP, BOTTOM = np.arange(7)
TASK_COLUMNS = np.int64(7)


class Room(NamedTuple):
    """Addresses of a thread's own memory."""

    y_start: Any  # the tables of a RoI; see `tables.AxisAt`
    y_taps: Any
    y_cells: Any
    y_weights: Any
    x_start: Any
    x_taps: Any
    x_cells: Any
    x_weights: Any
    counts: Any  # of both tables: their base, which is 0, and cells touched
    place: Any  # scratch of `fill_axis`
    rows: Any  # where rows that are touched lie
    windows: Any  # where windows begin in a row
    places: Any  # where columns that are touched lie in a block
    line_rows: Any  # where lines lie
    line_columns: Any  # where windows lie in a line
    block_columns: Any  # where the channels of a column lie in the blocks
    bin_rows: Any  # where bins lie in the results
    bin_columns: Any  # where the channels of a bin lie in the results
    lines: Any
    blocks: Any
    results: Any
    run: Any  # results as they are written, gradients as they were read
    list_start: Any  # of each bin, the first cell
    list: Any  # where they lie
    list_weights: Any
    band: Any  # rows of the gradient map


def sizes(
    y_taps: int, x_taps: int, height: int, width: int, bins_y: int, bins_x: int,
    inner: int, number: int, band: int,
) -> Room:  # fmt: skip
    """Bytes that a thread needs.

    Args:
        y_taps: the most that a RoI has.
        x_taps: likewise.
        height: the most rows of a map.
        width: the most columns of a map.
        bins_y: rows of bins.
        bins_x: columns of bins.
        inner: the most channels that lie side by side in a row.
        number: bytes of a number.
        band: numbers of the rows of a gradient map that are summed at once.
    """
    whole = -(-inner // LANES) * LANES
    line, blocks = width * inner + 3 * whole, int(AT_ONCE)
    entry, bins = LANES * number, bins_x * inner
    return Room(
        8 * (bins_y + 1), 8 * y_taps, 8 * y_taps, number * y_taps,
        8 * (bins_x + 1), 8 * x_taps, 8 * x_taps, number * x_taps,
        8 * 4, 8 * max(height, width), 8 * height, 8 * line, 8 * width, 8 * bins_y, 8 * line,
        8 * blocks * inner, 8 * bins_x, 8 * blocks * inner,
        entry * line, entry * line * blocks, entry * (bins * blocks + 8), entry * (bins + 1),
        8 * (min(bins_y * bins_x, int(FEW)) + 1), 8 * int(FEW), number * int(FEW), number * band,
    )  # fmt: skip


@functools.lru_cache(256)
def lay_room(*args: int) -> tuple[Room, int]:
    """Where in a thread's memory all of `sizes` lies, and the size of it."""
    room: tuple[Room, int] = lay(sizes(*args))
    return room


@functools.lru_cache(256)
def share(rois: int, channels: int, bins_y: int, bins_x: int, threads: int) -> tuple[int, int, int]:
    """About how many numbers are read, how many RoIs a task has, and in how many pieces one is cut."""
    work = rois * channels * bins_y * (4 * bins_x + 64)
    tasks = TASKS_PER_THREAD * threads
    at_once = max(1, min(rois // (4 * tasks), 64))
    blocks = -(-channels * bins_y // LANES)
    pieces = max(1, min(-(-tasks // rois), blocks, work // WORTH_A_TASK))
    return work, at_once, pieces


def cut(
    grads: Sequence[Tensor], mine: Sequence[bool], bounds: Sequence[int], channels: int, wanted: int
) -> tuple["array[int]", int]:
    """Cut gradient maps into bands of rows of some channels.

    Args:
        grads: of all levels, `(N, C, H_l, W_l)`.
        mine: which are to be done.
        bounds: the first RoI of each map, and of the one after the last.
        channels: C.
        wanted: how many bands there should be at least of a large map.

    Returns:
        A row per task, and the most numbers of a band.
    """
    tasks, most = array("q"), 0
    for home in range(len(bounds) - 1):
        if not mine[home % len(mine)]:
            continue
        grad = grads[home % len(mine)]
        inner = channels if channels > 1 and grad.stride(1) == 1 else 1
        height, length = grad.shape[2], max(grad.shape[3] * inner, -(-inner // LANES) * LANES)
        whole = min(BAND, max(LEAST, channels // inner * height * length // wanted))  # numbers
        planes = min(channels // inner, max(1, whole // (height * length)))
        rows = min(height, max(1, whole // (planes * length)))
        most = max(most, planes * rows * length)
        for c in range(0, channels, planes * inner):
            for y in range(0, height, rows):
                end = min(c + planes * inner, channels), y, min(y + rows, height)
                tasks.extend((home, bounds[home], bounds[home + 1], c, *end))
    return tasks, most


@part
def _tables(room):
    """The tables of both axes, of one RoI."""
    put(room.counts, 0, ZERO)
    put(room.counts, 1, ZERO)
    ys = AxisAt(room.counts, room.y_start, room.y_taps, room.y_cells, room.counts + 16, room.y_weights)
    xs = AxisAt(room.counts, room.x_start, room.x_taps, room.x_cells, room.counts + 24, room.x_weights)
    return ys, xs


@part
def side_by_side(tag, m, channels):
    """Numbers that a column of a row has side by side; 0 if rows cannot be read 16 numbers at a time."""
    inner = _side_by_side(m, channels, size_of(tag))
    readable = get(m, COLUMN_STEP) == inner * size_of(tag) and get(m, WIDTH) * inner >= _whole(inner)
    return inner if readable else ZERO


@part
def _side_by_side(m, channels, size):
    """How many channels lie side by side."""
    return channels if channels > 1 and get(m, CHANNEL_STEP) == size else ONE


@part
def _whole(inner):
    """A number of whole windows that holds a column wherever it begins."""
    return (inner + LANES - 1) // LANES * LANES


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
    longest: Any  # axis of a map
    room: Room  # offsets


@c_kernel
def run(job, memory, source, working, result):
    """Take tasks until none is left. A task is some RoIs, or a piece of one."""
    _, _, problem, out, channels, rois, order, at_once, pieces, longest, offsets = unpack(Job, job)
    src_tag, tag, out_tag, room = source(0), working(0), result(0), scratch_in(offsets, memory)
    for cell in range(longest):
        put(room.place, cell, -ONE)
    ys, xs = _tables(room)
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
                _lose(tag, out_tag, out, k, channels)
            elif get(m, MINE):
                fill_axis(tag, problem, k, ZERO, level, problem.bins_y, ys, ZERO, room.place)
                fill_axis(tag, problem, k, ONE, level, problem.bins_x, xs, ZERO, room.place)
                src = get(m, AT) + home // problem.n_levels * get(m, IMAGE_STEP)
                inner = side_by_side(src_tag, m, channels)
                lines = channels // max(inner, ONE) * problem.bins_y
                blocks = (lines + LANES - 1) // LANES
                pool(
                    src_tag, src, m, tag, out_tag, out, k, channels, inner, ys, xs, ZERO,
                    blocks * piece // pieces * LANES, min(blocks * (piece + 1) // pieces * LANES, lines),
                    room,
                )  # fmt: skip
        task = fetch_add(job)


@part
def _lose(tag, out_tag, out, k, channels):
    """A RoI that cannot be pooled is NaN. A result has no gaps."""
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    for i in range(channels * get(out, HEIGHT) * get(out, WIDTH)):
        store_one(out_tag, to + i * size_of(out_tag), type(tag)(np.nan))


@part
def pool(src_tag, src, m, tag, out_tag, out, k, channels, inner, ys, xs, i, first, stop, room):
    """Pool the lines `first:stop` of RoI k, which has tables number i.

    Of `inner` channels that lie side by side, a line has all; of others it is one channel's. Where `inner`
    is 0 those of a map are read one by one.
    """
    height, width = get(out, HEIGHT), get(out, WIDTH)
    side = max(inner, ONE)
    rows = ys.cells + 8 * get(ys.base, i)
    for y in range(get(ys.touched, i)):
        put(room.rows, y, get(rows, y) * get(m, ROW_STEP))
    cells, touched = xs.cells + 8 * get(xs.base, i), get(xs.touched, i)
    if channels < LANES and _are_few(ys, xs, i, height, width):
        _pool_cells(src_tag, src, m, tag, out_tag, out, k, side, ys, xs, i, first, stop, room)
        return
    if inner:
        windows = _lay_windows(cells, touched, inner, get(m, WIDTH) * inner, tag, size_of(src_tag), room)
    else:
        windows = _lay_columns(cells, touched, get(m, COLUMN_STEP), tag, room)
    _lay_bins(tag, width, side, windows, room)
    entry = LANES * size_of(tag)
    base = get(xs.base, i)
    for u in range(first, stop, AT_ONCE * LANES):
        n = min(AT_ONCE, (stop - u + LANES - 1) // LANES)
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, stop)
            _sum_rows(src_tag, src, m, inner, tag, ys, i, height, lo, hi, windows, touched, room)
            block = room.blocks + b * windows * LANES * entry
            _turn(tag, room.lines, hi - lo, windows * LANES, windows * entry, block)
        combine(
            tag, room.blocks, room.places, room.block_columns,
            tag, room.results, room.bin_rows, room.bin_columns, n * side,
            xs.start + 8 * i * (width + 1), xs.taps + 8 * base, xs.weights + size_of(tag) * base,
            ZERO, width, REPLACE,
        )  # fmt: skip
        for b in range(n):
            lo = u + b * LANES
            results = room.results + b * width * side * entry
            _write(tag, results, out_tag, out, k, channels, side, lo, min(lo + LANES, stop), room)


@part
def _lay_windows(cells, n, inner, length, tag, size, room):
    """Lay windows over the columns that are touched, and find where these lie in a block.

    The channels of a column lie one after the other there too. Returns how many windows.
    """
    entry = LANES * size_of(tag)
    whole = _whole(inner)
    windows = origin = ZERO
    end = -ONE
    for c in range(n):
        left = get(cells, c) * inner
        right = left + inner
        if left > end or (right > end and end + (right - end + LANES - 1) // LANES * LANES > length):
            end = min(left, length - whole)
            origin = end - windows * LANES
        while end < right:
            put(room.windows, windows, end * size)
            put(room.line_columns, windows, windows * entry)
            windows += 1
            end += LANES
        put(room.places, c, (left - origin) * entry)
    return windows


@part
def _lay_columns(cells, n, step, tag, room):
    """Likewise where columns are read one by one."""
    for c in range(n):
        put(room.windows, c, get(cells, c) * step)
        put(room.places, c, c * LANES * size_of(tag))
    return (n + LANES - 1) // LANES


@part
def _lay_bins(tag, bins, inner, windows, room):
    entry = LANES * size_of(tag)
    for q in range(bins):
        put(room.bin_rows, q, q * inner * entry)
    for b in range(AT_ONCE):
        for c in range(inner):
            put(room.block_columns, b * inner + c, (b * windows * LANES + c) * entry)
            put(room.bin_columns, b * inner + c, (b * bins * inner + c) * entry)


@part
def _sum_rows(src_tag, src, m, inner, tag, ys, i, bins, lo, hi, windows, touched, room):
    """Sum rows of the map into the lines `lo:hi`; line `c * bins + p` is of channel c and the bins p."""
    step = windows * LANES * size_of(tag)
    base = get(ys.base, i)
    start, taps, weights = ys.start + 8 * i * (bins + 1), ys.taps + 8 * base, ys.weights + size_of(tag) * base
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
                start, taps, weights, p0, p1, REPLACE,
            )  # fmt: skip
        else:
            _sum_columns_one_by_one(src_tag, plane, tag, start, taps, weights, p0, p1, touched, room)
        line += p1 - p0


@part
def _sum_columns_one_by_one(src_tag, plane, tag, start, taps, weights, p0, p1, touched, room):
    size = size_of(tag)
    for p in range(p0, p1):
        to = room.lines + get(room.line_rows, p)
        for c in range(touched):
            total = type(tag)(0)
            at = plane + get(room.windows, c)
            for t in range(get(start, p), get(start, p + 1)):
                weight = load_one(tag, weights + t * size)
                total = fma_one(weight, load_one(src_tag, at + get(room.rows, get(taps, t))), total)
            store_one(tag, to + c * size, total)


@part
def _pool_cells(src_tag, src, m, tag, out_tag, out, k, side, ys, xs, i, first, stop, room):
    """Pool lines cell by cell."""
    size, width = size_of(tag), get(out, WIDTH)
    for x in range(get(xs.touched, i)):
        put(room.windows, x, get(xs.cells + 8 * get(xs.base, i), x) * get(m, COLUMN_STEP))
    height, bin_step = get(out, HEIGHT), get(out, COLUMN_STEP)
    _list_cells(tag, ys, xs, i, height, width, room)
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
def _list_cells(tag, ys, xs, i, height, width, room):
    """Of each bin, where the cells lie that it reads, and their weights; without rows that lie nowhere."""
    size = size_of(tag)
    y_base, x_base = get(ys.base, i), get(xs.base, i)
    y_start, x_start = ys.start + 8 * i * (height + 1), xs.start + 8 * i * (width + 1)
    n = ZERO
    for p in range(height):
        for q in range(width):
            put(room.list_start, p * width + q, n)
            for y in range(get(y_start, p), get(y_start, p + 1)):
                row = get(room.rows, get(ys.taps + 8 * y_base, y))
                y_weight = load_one(tag, ys.weights + (y_base + y) * size)
                for x in range(get(x_start, q), get(x_start, q + 1) if row >= 0 else ZERO):
                    put(room.list, n, row + get(room.windows, get(xs.taps + 8 * x_base, x)))
                    x_weight = load_one(tag, xs.weights + (x_base + x) * size)
                    store_one(tag, room.list_weights + n * size, y_weight * x_weight)
                    n += 1
    put(room.list_start, height * width, n)


@part
def _are_few(ys, xs, i, height, width):
    """Whether all taps of a RoI, along y times along x, are less work than windows and blocks.

    Measured: a tap of a cell takes as long as two of a window; to turn a window around, as ten. The answer
    hangs on the RoI alone, not on strides, so that these change no bit.
    """
    y_taps, touched = get(ys.start, i * (height + 1) + height), get(xs.touched, i)
    taps = y_taps * get(xs.start, i * (width + 1) + width)
    if taps == 0 or taps > FEW or height * width > FEW:
        return False
    cells = xs.cells + 8 * get(xs.base, i)
    windows = min(touched, (get(cells, touched - 1) - get(cells, 0)) // LANES + 1)
    return 2 * taps <= windows * (y_taps + 10 * height) + 3 * width * height


@part
def _turn(tag, lines, n, length, step, block):
    """Turn `n` lines around, of `length` numbers. Other lanes are 0, or would be sums of what was there."""
    entry = LANES * size_of(tag)
    used = (n + TILE - 1) // TILE * TILE
    for line in range(n, used):
        zero_run(tag, lines + line * step, length)
    if used < LANES:
        zero_cells(tag, block, length)
    for c in range(0, length, TILE):
        for line in range(0, used, TILE):
            from_ = lines + line * step + c * size_of(tag)
            transpose8(tag, from_, step, tag, block + c * entry + line * size_of(tag), entry)


@part
def _block_to_run(tag, block, n, length, to):
    """Lay the lanes of a block of `length` cells one after the other, n of them."""
    entry, step = LANES * size_of(tag), length * size_of(tag)
    for line in range(0, n, TILE):
        for c in range(0, length, TILE):
            c = max(min(c, length - TILE), ZERO)  # what is too much is written over by the next line
            from_ = block + c * entry + line * size_of(tag)
            transpose8(tag, from_, entry, tag, to + line * step + c * size_of(tag), step)


@part
def _write(tag, results, out_tag, out, k, channels, inner, lo, hi, room):
    """Write the results of some lines."""
    size = size_of(out_tag)
    height, width = get(out, HEIGHT), get(out, WIDTH)
    length = width * inner
    channel_step, bin_step = get(out, CHANNEL_STEP), get(out, COLUMN_STEP)
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    _block_to_run(tag, results, hi - lo, length, room.run)
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


class BackwardJob(NamedTuple):
    """What `run_backward` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    problem: Problem
    grad: Any  # how it lies in memory
    channels: Any
    tasks: Any  # (n_tasks, TASK_COLUMNS)
    n_tasks: Any
    keys: Any  # (K,) see `tables.survey`
    order: Any  # (K,)
    firsts: Any  # the first row of each map, among the rows of all
    spans: Any  # the most rows that a RoI of each map spans
    longest: Any  # axis of a map
    room: Room  # offsets


@c_kernel
def run_backward(job, memory, target, working, gradient):
    """Take tasks until none is left. A task is a band of rows of some channels of a map.

    Its sums are made in memory of its own, RoI by RoI in their order, and every element is written once.
    """
    _, problem, grad, channels, tasks, n_tasks, keys, order, firsts, spans, longest, offsets = unpack(
        BackwardJob, job
    )
    dst_tag, tag, grad_tag, room = target(0), working(0), gradient(0), scratch_in(offsets, memory)
    for cell in range(longest):
        put(room.place, cell, -ONE)
    ys, xs = _tables(room)
    at = fetch_add(job)
    while at < n_tasks:
        task = tasks + 8 * at * TASK_COLUMNS
        home, top, bottom = get(task, MAP), get(task, TOP), get(task, BOTTOM)
        level = home % problem.n_levels
        m = problem.maps + 8 * level * MAP_COLUMNS
        dst = get(m, AT) + home // problem.n_levels * get(m, IMAGE_STEP)
        dst += get(task, CHANNEL) * get(m, CHANNEL_STEP)
        first, span = get(firsts, home), get(spans, home)
        start = _find(keys, order, get(task, START), get(task, STOP), first + top - span + 1)
        stop = _find(keys, order, start, get(task, STOP), first + bottom)
        low = high = bottom
        if start < stop:
            low = max(top, get(keys, get(order, start)) - first)
            high = min(bottom, get(keys, get(order, stop - 1)) - first + span)
        inner = _side_by_side(m, channels, size_of(dst_tag))
        planes = (get(task, CHANNEL_STOP) - get(task, CHANNEL)) // inner
        length = get(m, WIDTH) * inner
        step = max(length, _whole(inner)) * size_of(tag)
        zero_run(tag, room.band, planes * (high - low) * (step // size_of(tag)))
        for i in range(start, stop):
            k = get(order, i)
            fill_axis(tag, problem, k, ZERO, level, problem.bins_y, ys, ZERO, room.place)
            p0, p1 = _rows_of_bins_inside(ys, problem.bins_y, low, high, step, room)
            if p0 < p1:
                fill_axis(tag, problem, k, ONE, level, problem.bins_x, xs, ZERO, room.place)
                _add(
                    grad_tag, grad, k, channels, get(task, CHANNEL), planes, inner, p0, p1,
                    tag, step // size_of(tag), (high - low) * step, ys, xs, room,
                )  # fmt: skip
        for plane in range(planes):
            to = dst + plane * get(m, CHANNEL_STEP)
            for row in range(top, bottom):
                if low <= row < high:
                    from_ = room.band + (plane * (high - low) + row - low) * step
                    copy_run(tag, from_, dst_tag, to + row * get(m, ROW_STEP), length)
                else:
                    zero_run(dst_tag, to + row * get(m, ROW_STEP), length)
        at = fetch_add(job)


@part
def _find(keys, order, lo, hi, key):
    """The first RoI from `lo` on, in their order, whose key is not less than `key`; `hi` if there is none."""
    while lo < hi:
        middle = (lo + hi) // 2
        if get(keys, get(order, middle)) < key:
            lo = middle + 1
        else:
            hi = middle
    return lo


@part
def _rows_of_bins_inside(ys, bins, low, high, step, room):
    """Which rows of bins reach into the band; and where in it the rows lie, -1 for those that are outside."""
    for y in range(get(ys.touched, 0)):
        row = get(ys.cells, y)
        put(room.rows, y, (row - low) * step if low <= row < high else -ONE)
    first, last = bins, ZERO
    for p in range(bins):
        for t in range(get(ys.start, p), get(ys.start, p + 1)):
            if get(room.rows, get(ys.taps, t)) >= 0:
                first, last = min(first, p), p + 1
    return first, last


@part
def _add(grad_tag, grad, k, channels, c0, planes, inner, p0, p1, tag, length, plane_step, ys, xs, room):
    """Add what RoI k gives to the band, from the rows of bins `p0:p1`."""
    entry, width = LANES * size_of(tag), get(grad, WIDTH)
    if channels < LANES and _are_few(ys, xs, ZERO, get(grad, HEIGHT), width):
        _add_cells(grad_tag, grad, k, c0, planes, inner, p0, p1, tag, plane_step, ys, xs, room)
        return
    windows = _lay_windows(xs.cells, get(xs.touched, 0), inner, length, tag, size_of(tag), room)
    _lay_bins(tag, width, inner, windows, room)
    rows, run = p1 - p0, width * inner
    lines, cells = planes * rows, windows * LANES
    for u in range(0, lines, AT_ONCE * LANES):
        n = min(AT_ONCE, (lines - u + LANES - 1) // LANES)
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, lines)
            _read(grad_tag, grad, k, c0, inner, p0, rows, lo, hi, tag, room)
            _turn(tag, room.run, hi - lo, run, run * size_of(tag), room.results + b * run * entry)
        zero_cells(tag, room.blocks, n * cells)
        spread(
            tag, room.results, room.bin_rows, room.bin_columns,
            room.blocks, room.places, room.block_columns, n * inner,
            xs.start, xs.taps, xs.weights, ZERO, width,
        )  # fmt: skip
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, lines)
            _block_to_run(tag, room.blocks + b * cells * entry, hi - lo, cells, room.lines)
            line = lo
            while line < hi:
                plane = line // rows
                first = line - plane * rows
                last = min(rows, first + hi - line)
                for p in range(first, last):
                    put(room.line_rows, p0 + p, (line - lo + p - first) * windows * entry)
                spread(
                    tag, room.lines, room.line_rows, room.line_columns,
                    room.band + plane * plane_step, room.rows, room.windows, windows,
                    ys.start, ys.taps, ys.weights, p0 + first, p0 + last,
                )  # fmt: skip
                line += last - first


@part
def _add_cells(grad_tag, grad, k, c0, planes, inner, p0, p1, tag, plane_step, ys, xs, room):
    """Likewise, cell by cell."""
    size, height, width = size_of(tag), get(grad, HEIGHT), get(grad, WIDTH)
    for x in range(get(xs.touched, 0)):
        put(room.windows, x, get(xs.cells, x) * inner * size)
    _list_cells(tag, ys, xs, ZERO, height, width, room)
    for c in range(planes * inner):
        band = room.band + c // inner * plane_step + c % inner * size
        from_ = get(grad, AT) + k * get(grad, IMAGE_STEP) + (c0 + c) * get(grad, CHANNEL_STEP)
        for p in range(p0, p1):
            for q in range(width):
                at = from_ + p * get(grad, ROW_STEP) + q * get(grad, COLUMN_STEP)
                value = load_one(grad_tag, at)
                for t in range(get(room.list_start, p * width + q), get(room.list_start, p * width + q + 1)):
                    to = band + get(room.list, t)
                    weight = load_one(tag, room.list_weights + t * size)
                    store_one(tag, to, load_one(tag, to) + weight * value)


@part
def _read(grad_tag, grad, k, c0, inner, p0, rows, lo, hi, tag, room):
    """Read the gradient of the lines `lo:hi`; of each plane there are `rows` lines, from the bins p0 on."""
    size = size_of(tag)
    width, length = get(grad, WIDTH), get(grad, WIDTH) * inner
    channel_step, bin_step = get(grad, CHANNEL_STEP), get(grad, COLUMN_STEP)
    for line in range(lo, hi):
        at = get(grad, AT) + k * get(grad, IMAGE_STEP) + (c0 + line // rows) * channel_step
        at += (p0 + line % rows) * get(grad, ROW_STEP)
        to = room.run + (line - lo) * length * size
        if (inner == 1 or channel_step == size_of(grad_tag)) and bin_step == inner * size_of(grad_tag):
            copy_run(grad_tag, at, tag, to, length)
        else:
            for q in range(width):
                for c in range(inner):
                    value = load_one(grad_tag, at + q * bin_step + c * channel_step)
                    store_one(tag, to + (q * inner + c) * size, value)
