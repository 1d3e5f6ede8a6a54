"""Where all sampling points of a RoI are so few that tables of taps take longer than to sum them one by one.

Of every point along an axis are kept the cells on either side and their weights; forward, a bin sums the four
cells around each of its points. Backward, a thread owns a band of rows of every map and takes all RoIs, as
they come: it adds what they give to its own rows, and so no order of sums hangs on the number of threads.
"""

from typing import Any, NamedTuple

from ..schema import Pooling
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
    along,
    home_of,
    low_cell,
)
from .jit import c_kernel, part
from .jobs import scratch_in, unpack
from .lanes import zero_run
from .simd import LANES, fetch_add, get, load_one, put, size_of, store_one
from .tables import AxisAt

MOST = 16  # points of a RoI, from where on tables are faster with as few as three channels


def are_few(channels: int, pooling: Pooling) -> bool:
    """Whether to go point by point.

    No RoI, no strides and no other channel have a part in it, so they change no bit. From 16 channels on
    many RoIs go another way, which must give the same bits as that of few.
    """
    bins, ratio = pooling.output_size, pooling.sampling_ratio
    fitting = channels < int(LANES) and ratio > 0 and len(bins) == 2 and not pooling.derivative
    return fitting and bins[0] * bins[1] * ratio * ratio <= MOST


@part
def lay_points(tag, problem, k, axis, level, step, table):
    """Of every point of RoI k along an axis: where the cells on either side lie, -1 if it misses the map.

    Their weights are the point's share of its bin.
    """
    number, ratio, a = type(tag), problem.sampling_ratio, along(tag, problem, k, axis, level)
    share_of_point = number(1) / number(ratio)
    at = ZERO
    for b in range(a.bins):
        bin_start = a.start + number(b) * a.bin_size
        for i in range(ratio):
            low, share = low_cell(tag, bin_start, a.bin_size, number(ratio), number(i), a.extent)
            # On the last cell there is no other: it is both, so that an infinite one is not multiplied by 0.
            last = low == a.extent - 1
            share = number(0.5) if last else share
            put(table.taps, at, low * step if low >= 0 else low)
            put(table.cells, at, (low + ONE - last) * step)
            store_one(tag, table.weights + 2 * at * size_of(tag), (number(1) - share) * share_of_point)
            store_one(tag, table.weights + (2 * at + 1) * size_of(tag), share * share_of_point)
            at += 1


@part
def pool_points(src_tag, src, m, tag, out_tag, out, problem, k, level, channels, ys, xs):
    """Pool RoI k."""
    height, width, ratio, size = get(out, HEIGHT), get(out, WIDTH), problem.sampling_ratio, size_of(tag)
    lay_points(tag, problem, k, Y, level, get(m, ROW_STEP), ys)
    lay_points(tag, problem, k, X, level, get(m, COLUMN_STEP), xs)
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    channel_step, row_step, bin_step = get(out, CHANNEL_STEP), get(out, ROW_STEP), get(out, COLUMN_STEP)
    map_step = get(m, CHANNEL_STEP)
    for c in range(channels):
        plane = src + c * map_step
        for p in range(height):
            for q in range(width):
                total = type(tag)(0)
                for i in range(p * ratio, p * ratio + ratio):
                    top, bottom = get(ys.taps, i), plane + get(ys.cells, i)
                    y0 = load_one(tag, ys.weights + 2 * i * size)
                    y1 = load_one(tag, ys.weights + (2 * i + 1) * size)
                    for j in range(q * ratio, q * ratio + ratio if top >= 0 else ZERO):
                        left, right = get(xs.taps, j), get(xs.cells, j)
                        if left >= 0:
                            x0 = load_one(tag, xs.weights + 2 * j * size)
                            x1 = load_one(tag, xs.weights + (2 * j + 1) * size)
                            above = x0 * load_one(src_tag, plane + top + left)
                            above += x1 * load_one(src_tag, plane + top + right)
                            below = x0 * load_one(src_tag, bottom + left)
                            below += x1 * load_one(src_tag, bottom + right)
                            total += y0 * above + y1 * below
                store_one(out_tag, to + c * channel_step + p * row_step + q * bin_step, total)


class Lists(NamedTuple):
    """What is kept of the points of a RoI, in a thread's own memory; see `lay_points`."""

    y_taps: Any
    y_cells: Any
    y_weights: Any
    x_taps: Any
    x_cells: Any
    x_weights: Any


def sizes(points_y: int, points_x: int, number: int) -> Lists:
    """Bytes that a thread needs."""
    y, x = 8 * points_y, 8 * points_x
    return Lists(y, y, y // 4 * number, x, x, x // 4 * number)


class Job(NamedTuple):
    """What `run_backward` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    problem: Problem
    grad: Any  # how it lies in memory
    channels: Any
    rois: Any  # how many
    bands: Any  # tasks
    room: Lists  # offsets


@c_kernel
def run_backward(job, memory, target, working, gradient):
    """Take bands until none is left. Maps are in the working precision, and all of them are to be done."""
    _, problem, grad, channels, rois, bands, offsets = unpack(Job, job)
    tag, grad_tag, room = working(0), gradient(0), scratch_in(offsets, memory)
    ys = AxisAt(ZERO, ZERO, room.y_taps, room.y_cells, ZERO, room.y_weights)
    xs = AxisAt(ZERO, ZERO, room.x_taps, room.x_cells, ZERO, room.x_weights)
    band = fetch_add(job)
    while band < bands:
        for level in range(problem.n_levels):
            m = problem.maps + 8 * level * MAP_COLUMNS
            if get(m, MINE):
                _clear(tag, m, problem.images, channels, band, bands)
        for k in range(rois):
            home = home_of(tag, problem, k)
            level = home % problem.n_levels
            m = problem.maps + 8 * level * MAP_COLUMNS
            if home >= 0 and get(m, MINE):
                dst = get(m, AT) + home // problem.n_levels * get(m, IMAGE_STEP)
                top, bottom = _rows_of(m, band, bands)
                lay_points(tag, problem, k, Y, level, get(m, ROW_STEP), ys)
                lay_points(tag, problem, k, X, level, get(m, COLUMN_STEP), xs)
                _add(grad_tag, grad, k, channels, tag, dst, m, problem.sampling_ratio, ys, xs, top, bottom)
        band = fetch_add(job)


@part
def _rows_of(m, band, bands):
    """Where the rows of a band of a map begin and end, in bytes."""
    height, step = get(m, HEIGHT), max(get(m, ROW_STEP), ONE)  # the only row of one column has no step
    return height * band // bands * step, height * (band + 1) // bands * step


@part
def _clear(tag, m, images, channels, band, bands):
    """Write zeros to the rows of a band."""
    size, width, channel_step, step = size_of(tag), get(m, WIDTH), get(m, CHANNEL_STEP), get(m, COLUMN_STEP)
    inner = channels if channels > 1 and channel_step == size else ONE
    in_one_run = step == inner * size or width == 1
    top, bottom = _rows_of(m, band, bands)
    for image in range(images):
        for plane in range(channels // inner):
            at = get(m, AT) + image * get(m, IMAGE_STEP) + plane * channel_step
            for row in range(top, bottom, max(get(m, ROW_STEP), ONE)):
                if in_one_run:
                    zero_run(tag, at + row, width * inner)
                else:
                    for x in range(width):
                        zero_run(tag, at + row + x * step, inner)


@part
def _add(grad_tag, grad, k, channels, tag, dst, m, ratio, ys, xs, top, bottom):
    """Add what RoI k gives to the rows from `top` to `bottom`."""
    size, height, width = size_of(tag), get(grad, HEIGHT), get(grad, WIDTH)
    for c in range(channels):
        plane = dst + c * get(m, CHANNEL_STEP)
        from_ = get(grad, AT) + k * get(grad, IMAGE_STEP) + c * get(grad, CHANNEL_STEP)
        for i in range(height * ratio):
            for side in range(2 if get(ys.taps, i) >= 0 else ZERO):
                row = get(ys.cells, i) if side else get(ys.taps, i)
                if top <= row < bottom:
                    y_weight = load_one(tag, ys.weights + (2 * i + side) * size)
                    line = from_ + i // ratio * get(grad, ROW_STEP)
                    _add_row(
                        grad_tag, line, get(grad, COLUMN_STEP), width, tag, plane + row, y_weight, ratio, xs
                    )


@part
def _add_row(grad_tag, line, bin_step, width, tag, row, y_weight, ratio, xs):
    """Spread a row of bins over a row of cells."""
    size = size_of(tag)
    for q in range(width):
        value = load_one(grad_tag, line + q * bin_step) * y_weight
        for j in range(q * ratio, q * ratio + ratio):
            left = get(xs.taps, j)
            if left >= 0:
                _add_one(tag, row + left, value * load_one(tag, xs.weights + 2 * j * size))
                _add_one(tag, row + get(xs.cells, j), value * load_one(tag, xs.weights + (2 * j + 1) * size))


@part
def _add_one(tag, at, value):
    store_one(tag, at, load_one(tag, at) + value)
