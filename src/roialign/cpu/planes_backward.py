"""The adjoint of `planes`, for few channels or few boxes: bands of rows that are written once.

A thread owns a band of rows of some channels of one map. It takes the RoIs that reach into it in their
order: bins are spread over columns, a lane being a line, and lines over the rows of the band. So no two
threads write one element, each is written once, and the order of the sums depends on the RoIs alone.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

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
    Problem,
    X,
    Y,
)
from .jit import c_kernel, part
from .jobs import scratch_in, unpack
from .lanes import copy_run, spread, zero_cells, zero_run
from .lines import (
    AT_ONCE,
    Room,
    are_few,
    block_to_run,
    channels_together,
    lay_bins,
    lay_windows,
    list_cells,
    tables_in,
    turn,
    whole_windows,
)
from .simd import LANES, fetch_add, get, load_one, put, size_of, store_one
from .tables import fill_axis

# The columns of the tasks: the map, its RoIs in their order, channels and rows of the map.
MAP, START, STOP, CHANNEL, CHANNEL_STOP, TOP, BOTTOM = np.arange(7)
TASK_COLUMNS = np.int64(7)

BANDS = 4  # that a large map has at least, for each thread
BAND = 2**20  # most numbers of a band
LEAST = 2**15  # that are worth a band of their own
MANY = 500  # RoIs, from where on a thread is worth a band though RoIs that reach into two are laid twice
WORTH_TABLES = 16  # bins, of all channels of a band, that laying the tables of a RoI anew is worth


def cut(
    grads: Sequence[Tensor],
    mine: Sequence[bool],
    bounds: Sequence[int],
    channels: int,
    bins: int,
    threads: int,
) -> tuple["array[int]", int]:
    """Cut gradient maps into bands of rows of some channels.

    Args:
        grads: of all levels, `(N, C, H_l, W_l)`.
        mine: which are to be done.
        bounds: the first RoI of each map, and of the one after the last.
        channels: C.
        bins: of a RoI.
        threads: that take bands.

    Returns:
        A row per task, and the most numbers of a band.
    """
    tasks, most = array("q"), 0
    together = -(-WORTH_TABLES // bins)  # channels
    for home in range(len(bounds) - 1):
        if not mine[home % len(mine)]:
            continue
        grad = grads[home % len(mine)]
        inner = channels if channels > 1 and grad.stride(1) == 1 else 1
        height, length = grad.shape[2], max(grad.shape[3] * inner, -(-inner // LANES) * LANES)
        plane, planes = height * length, channels // inner
        least = max(LEAST, min(together, planes) * plane)
        if bounds[home + 1] - bounds[home] >= MANY:
            least = min(least, -(-height // threads) * planes * length)
        whole = min(BAND, max(least, planes * plane // (BANDS * threads)))  # numbers
        planes = min(planes, max(together, whole // plane))
        rows = min(height, max(1, whole // (planes * length)))
        most = max(most, planes * rows * length)
        for c in range(0, channels, planes * inner):
            for y in range(0, height, rows):
                end = min(c + planes * inner, channels), y, min(y + rows, height)
                tasks.extend((home, bounds[home], bounds[home + 1], c, *end))
    return tasks, most


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

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
def run(job, memory, target, working, gradient):
    """Take tasks until none is left. A task is a band of rows of some channels of a map.

    Its sums are made in memory of its own, RoI by RoI in their order, and every element is written once.
    """
    _, problem, grad, channels, tasks, n_tasks, keys, order, firsts, spans, longest, offsets = unpack(
        Job, job
    )
    dst_tag, tag, grad_tag, room = target(0), working(0), gradient(0), scratch_in(offsets, memory)
    for cell in range(longest):
        put(room.place, cell, -ONE)
    ys, xs = tables_in(room)
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
        inner = channels_together(m, channels, size_of(dst_tag))
        planes = (get(task, CHANNEL_STOP) - get(task, CHANNEL)) // inner
        length = get(m, WIDTH) * inner
        step = max(length, whole_windows(inner)) * size_of(tag)
        zero_run(tag, room.band, planes * (high - low) * (step // size_of(tag)))
        for i in range(start, stop):
            k = get(order, i)
            fill_axis(tag, problem, k, Y, level, ys, ZERO, room.place)
            p0, p1 = _rows_of_bins_inside(ys, problem.rows, low, high, step, room)
            if p0 < p1:
                fill_axis(tag, problem, k, X, level, xs, ZERO, room.place)
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
    if channels < LANES and are_few(ys, xs, get(grad, HEIGHT), width):
        _add_cells(grad_tag, grad, k, c0, planes, inner, p0, p1, tag, plane_step, ys, xs, room)
        return
    windows = lay_windows(xs.cells, get(xs.touched, 0), inner, length, tag, size_of(tag), room)
    lay_bins(tag, width, inner, windows, room)
    rows, run = p1 - p0, width * inner
    lines, cells = planes * rows, windows * LANES
    for u in range(0, lines, AT_ONCE * LANES):
        n = min(AT_ONCE, (lines - u + LANES - 1) // LANES)
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, lines)
            _read(grad_tag, grad, k, c0, inner, p0, rows, lo, hi, tag, room)
            turn(tag, room.run, hi - lo, run, run * size_of(tag), room.results + b * run * entry)
        zero_cells(tag, room.blocks, n * cells)
        spread(
            tag, room.results, room.bin_rows, room.bin_columns,
            room.blocks, room.places, room.block_columns, n * inner,
            xs.start, xs.taps, xs.weights, ZERO, width,
        )  # fmt: skip
        for b in range(n):
            lo = u + b * LANES
            hi = min(lo + LANES, lines)
            block_to_run(tag, room.blocks + b * cells * entry, hi - lo, cells, room.lines)
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
    list_cells(tag, ys, xs, height, width, room)
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
