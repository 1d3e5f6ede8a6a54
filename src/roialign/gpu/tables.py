"""Where every bin of every RoI reads: written by one small launch, read by all others.

Of a grid of fixed ratio, the forward pass needs no more than the *places* of its points along either axis,
and of a derivative how fast they move. All else goes by *runs*. Along one axis of one RoI a bin reads a run
of cells and, seen from the map, a cell is read by a run of bins; both find the weight of bin `b` in cell `c`
at `c + 3 * b - origin`. No two pairs meet there, because a bin ends at most two cells after the next begins.
(Where the end of a RoI comes before its start, so that its bins go down, it is `c - 3 * b - origin`.)

A RoI has a row of integers: its map, or -1 if it cannot be pooled; then for either axis its first cell, its
last, the length of its longest run, the origin and the step of its weights; then, for either axis, the runs.
"""

import triton
import triton.language as tl

from .geometry import (
    EXACT,
    bins_within,
    clamp,
    divide,
    ends_of,
    locate,
    most,
    rates_of,
    rates_of_bin,
    reach,
    sample_point,
    slope_at,
    unless_level,
    visits,
    weight_of,
    whole_of,
)

LOW, HIGH, LONGEST, ORIGIN, STEP = (tl.constexpr(i) for i in range(1, 6))  # of y
OF_X = tl.constexpr(5)  # further on are those of x
HEAD = tl.constexpr(11)
APART = tl.constexpr(3)
BLOCK = tl.constexpr(32)  # bins or cells that are looked at at once


@triton.jit
def pack(first, stop):
    """A run as one integer."""
    return first.to(tl.int64) | (stop.to(tl.int64) << 32)


@triton.jit
def unpack(run):
    """The first of a run, and how many there are."""
    first = run.to(tl.int32)
    return first, (run >> 32).to(tl.int32) - first


@triton.jit(do_not_specialize=["count", "images"])
def place(
    rows, places, heights, widths, rois, levels, count, images, scales, thresholds,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, DERIVATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the points of all bins lie along y, then along x: in cells of the map; -1 if they miss it.

    Of a derivative it follows, along its axis, how fast they move; those that add nothing have no place. A
    row has no more than the map.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    ALONG_Y: tl.constexpr = BINS_Y * RATIO
    ALL: tl.constexpr = ALONG_Y + BINS_X * RATIO
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # there is no room for 2**31
    k, i = (at // ALL).to(tl.int64), at % ALL
    poolable, level, image, y, x = locate(rois, levels, k, count, images, scales, thresholds, ORDER, ALIGNED)
    along_y = i < ALONG_Y
    i = tl.where(along_y, i, i - ALONG_Y)
    extent = tl.where(along_y, whole_of(heights, level), whole_of(widths, level)).to(dtype)
    start = tl.where(along_y, y[0], x[0])
    bin_size = tl.where(along_y, divide(y[1], BINS_Y * 1.0), divide(x[1], BINS_X * 1.0))
    b, index = (i // RATIO).to(dtype), (i % RATIO).to(dtype)
    bin_start = start + b * bin_size
    grid = bin_size * 0 + RATIO
    point, touched = sample_point(bin_start, bin_size, grid, index, extent, RATIO)
    touched &= poolable
    if DERIVATIVE:
        OF_Y: tl.constexpr = DERIVATIVE % 2 == 0
        rates = rates_of_bin(rates_of(y if OF_Y else x, BINS_Y if OF_Y else BINS_X, DERIVATIVE), b)
        slope = slope_at(bin_start, bin_size, grid, index, extent, rates, RATIO)
        moved = along_y == OF_Y
        touched &= (slope != 0) | ~moved
        places += k * ALL
        tl.store(places + at + ALL, tl.where(touched, slope, 0.0), moved & (k < count))
    tl.store(places + at, tl.where(touched, point, -1.0), k < count)
    home = tl.where(poolable, image * len(heights) + level, -1)
    tl.store(rows + k, home, (k < count) & along_y & (i == 0))


@triton.jit(do_not_specialize=["row_length", "length", "height", "width", "count", "images"])
def write_for_bins(
    rows, row_length, numbers, length, height, width, heights, widths,
    rois, levels, count, images, scales, thresholds,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    RATIO: tl.constexpr, DERIVATIVE: tl.constexpr,
):  # fmt: skip
    """The runs of the bins of an adaptive grid or of integrals, of one axis of a RoI per program."""
    k, axis = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2
    write_runs(
        rows, row_length, numbers, length, height, width, heights, widths,
        rois, levels, k, axis, count, images, scales, thresholds,
        ORDER, ALIGNED, BINS_Y, BINS_X, RATIO, DERIVATIVE, False, BLOCK,
    )  # fmt: skip


@triton.jit
def write_runs(
    rows, row_length, weights, length, height, width, heights, widths,
    rois, levels, k, axis, count, images, scales, thresholds,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    RATIO: tl.constexpr, DERIVATIVE: tl.constexpr, OF_CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The head, the runs and the weights of one axis of RoI `k`.

    `height` and `width` are those of the largest map. Runs are of bins, or seen from the map `OF_CELLS`.
    """
    poolable, level, image, y, x = locate(rois, levels, k, count, images, scales, thresholds, ORDER, ALIGNED)
    MOVES_Y: tl.constexpr = DERIVATIVE > 0 and DERIVATIVE % 2 == 0
    MOVES_X: tl.constexpr = DERIVATIVE % 2 == 1
    row, weights = rows + k * row_length, weights + k * length
    head, runs = row + OF_X * axis, row + HEAD
    if axis == 0:
        tl.store(row, tl.where(poolable, image * len(heights) + level, -1))
        extent = whole_of(heights, level)
        _write_axis(
            head, runs, weights, y, rates_of(y, BINS_Y, DERIVATIVE) if MOVES_Y else None, extent, poolable,
            BINS_Y, RATIO, OF_CELLS, BLOCK,
        )  # fmt: skip
    else:
        runs += height if OF_CELLS else BINS_Y
        weights += height + APART * BINS_Y
        extent = whole_of(widths, level)
        _write_axis(
            head, runs, weights, x, rates_of(x, BINS_X, DERIVATIVE) if MOVES_X else None, extent, poolable,
            BINS_X, RATIO, OF_CELLS, BLOCK,
        )  # fmt: skip


@triton.jit
def _write_axis(
    head, runs, weights, along, rates, cells, poolable,
    BINS: tl.constexpr, RATIO: tl.constexpr, OF_CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, size = along[0], along[1]
    dtype: tl.constexpr = start.dtype
    extent = cells.to(dtype)
    low, high = reach(start, size, extent)
    high = tl.where(poolable, high, -1.0)
    low, high = low.to(tl.int64), high.to(tl.int64)
    bin_size = divide(size, BINS * 1.0)
    step = tl.where(size < 0, -APART, APART).to(tl.int64)
    origin = low + tl.minimum(step, 0) * (BINS - 1)
    if OF_CELLS:
        longest = _runs_of_cells(
            runs, weights - origin, step, low, high, start, size, bin_size, extent, rates,
            BINS, RATIO, BLOCK,
        )  # fmt: skip
    else:
        longest = _runs_of_bins(
            runs, weights - origin, step, poolable, start, bin_size, extent, rates, BINS, RATIO, BLOCK
        )  # fmt: skip
    tl.store(head + LOW, low)
    tl.store(head + HIGH, high)
    tl.store(head + LONGEST, longest)
    tl.store(head + ORIGIN, origin)
    tl.store(head + STEP, step)


@triton.jit
def _runs_of_bins(
    runs, weights, step, poolable, start, bin_size, extent, rates,
    BINS: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every bin, from its first point's low cell to its last one's high cell, if it is poolable."""
    longest = tl.zeros((), tl.int64)
    for b0 in range(0, BINS, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        lowest, highest = _cells_of_bins(
            start, bin_size, b.to(start.dtype), (b < BINS) & poolable, extent, rates, RATIO
        )  # fmt: skip
        length = tl.maximum(highest - lowest + 1, 0.0).to(tl.int64)
        cell = lowest.to(tl.int64)
        tl.store(runs + b, pack(cell, cell + length), b < BINS)
        for i in range(most(length)):
            weight = weight_of(lowest + i, start, bin_size, b.to(start.dtype), extent, rates, RATIO)
            tl.store(weights + cell + i + step * b, weight, (b < BINS) & (i < length))
        longest = tl.maximum(longest, most(length))
    return longest


@triton.jit
def _cells_of_bins(start, bin_size, b, here, extent, rates, RATIO: tl.constexpr):
    """The first and the last cell that each of some bins reads, if it is `here`; else the last is -1."""
    bin_start = start + b * bin_size
    if RATIO == EXACT:
        bin_end = start + (b + 1) * bin_size
        low, high, length, meets = ends_of(bin_start, bin_end, extent)
        lowest = tl.minimum(tl.maximum(tl.floor(low), 0.0), extent - 1)
        highest = tl.maximum(tl.where(length > 0, tl.ceil(high), tl.floor(low) + 1), 1.0)
        highest = tl.minimum(highest, extent - 1)
        if rates is not None:
            start_rate, growth = rates_of_bin(rates, b)
            end_rate = start_rate + growth
            at_point = unless_level(low, (start_rate + end_rate) * 0.5, extent)
            within = tl.where(length > 0, start_rate - end_rate, at_point) != 0
            lowest, highest = tl.where(within, lowest, extent), tl.where(within, highest, -1.0)
            first, starts_within = clamp(bin_start, extent)
            last, ends_within = clamp(bin_end, extent)
            starts_within &= (length > 0) & (start_rate != 0)
            ends_within &= (length > 0) & (end_rate != 0)
            lowest, highest = _with_point(lowest, highest, first, starts_within, extent)
            lowest, highest = _with_point(lowest, highest, last, ends_within, extent)
        return lowest, tl.where(meets & here, highest, -1.0)
    else:
        grid, first, number = visits(bin_start, bin_size, -1.0, extent, RATIO)
        number = tl.where(here, number, 0)
        lowest, highest = extent + bin_start * 0, bin_start * 0 - 1
        for i in range(most(number)):
            point, touched = sample_point(bin_start, bin_size, grid, first + i, extent, RATIO)
            touched &= i < number
            if rates is not None:
                of_bin = rates_of_bin(rates, b)
                touched &= slope_at(bin_start, bin_size, grid, first + i, extent, of_bin, RATIO) != 0
            lowest, highest = _with_point(lowest, highest, point, touched, extent)
        return lowest, highest


@triton.jit
def _with_point(lowest, highest, point, touched, extent):
    """The first and the last cell, with those of one point more, if it is `touched`."""
    cell = tl.floor(point)
    lowest = tl.where(touched, tl.minimum(lowest, cell), lowest)
    return lowest, tl.where(touched, tl.maximum(highest, tl.minimum(cell + 1, extent - 1)), highest)


@triton.jit
def _runs_of_cells(
    runs, weights, step, low, high, start, size, bin_size, extent, rates,
    BINS: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every cell, from the first bin that gives it something to the last."""
    longest = tl.zeros((), tl.int64)
    for c0 in range(low, high + 1, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        cell = c.to(start.dtype)
        before = start * 0 + c0 - 1
        b0, b1 = bins_within(start, size, bin_size, before, before + (BLOCK + 1), BINS)
        first, stop = c * 0 + BINS, c * 0
        for b in range(b0, b1):
            weight = weight_of(cell, start, bin_size, b, extent, rates, RATIO)
            first = tl.where(weight != 0, tl.minimum(first, b), first)
            stop = tl.where(weight != 0, b + 1, stop)
        first = tl.minimum(first, stop)
        tl.store(runs + c - low, pack(first, stop), c <= high)
        for b in range(b0, b1):
            weight = weight_of(cell, start, bin_size, b, extent, rates, RATIO)
            tl.store(weights + c + step * b, weight, (c <= high) & (first <= b) & (b < stop))
        longest = tl.maximum(longest, most(tl.where(c <= high, stop - first, 0)))
    return longest
