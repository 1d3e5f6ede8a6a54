"""Where RoIs lie on their maps, and where the points or pieces of their bins do; see `taps`.

Tensors and constants are named by address, as in `simd.py`; `tag` is a number of the working precision.
"""

from typing import Any, NamedTuple

import numpy as np

from .jit import part
from .simd import get, load_one, size_of

# Constants are NumPy numbers: Numba compiles a function anew for every Python int it is called with.
ZERO, ONE = np.arange(2)

# Axes, by which column of a RoI says where it starts: x is the first of a box and the last of a map.
Z, Y, X = -ONE, ZERO, ONE

# How a tensor lies in memory: where it is, its steps in bytes along each axis, its size; and of a map,
# whether its RoIs are to be done, and how many slices its rows are those of, one but of a volume, and rows a
# slice has. Images are RoIs and rows are rows of bins where it is a pooled tensor.
AT, IMAGE_STEP, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, HEIGHT, WIDTH, MINE, SLICES, ROWS = np.arange(10)
MAP_COLUMNS = np.int64(10)


class Problem(NamedTuple):
    """What the RoIs are and how they are pooled."""

    axes: Any  # 2, or of volumes 3
    rois: Any  # (K, 1 + 2 * axes) in the working precision
    levels: Any  # (K,) or 0: then the staircase says
    n_levels: Any
    images: Any
    maps: Any  # (n_levels, MAP_COLUMNS)
    scales: Any  # (n_levels, axes) in the working precision, in the order of the axes of a map
    thresholds: Any  # (n_steps,) in the working precision; see `levels.Staircase`
    order: Any  # (n_steps + 1,)
    n_steps: Any
    rows: Any  # of bins, of all slices
    bins_z: Any
    bins_y: Any
    bins_x: Any
    sampling_ratio: Any  # points per bin, 0 or `taps.EXACT`
    aligned: Any
    derivative: Any  # 0 or a column of the rois


@part
def home_of(tag, problem, k):
    """The map `image * n_levels + level` of RoI k, or -1 if it cannot be pooled."""
    number, axes = type(tag), problem.axes
    size = size_of(tag)
    roi = problem.rois + (1 + 2 * axes) * size * k
    image, starts, ends = load_one(tag, roi), roi + size, roi + (1 + axes) * size
    if problem.levels:
        level = get(problem.levels, k)
    else:
        step, area = ZERO, _side(tag, starts, ends, ZERO) * _side(tag, starts, ends, ONE)
        if axes == 3:
            area *= _side(tag, starts, ends, ONE + ONE)
        while step < problem.n_steps and area >= load_one(tag, problem.thresholds + step * size):
            step += 1
        level = get(problem.order, step)
    if not (0 <= level < problem.n_levels and image > number(-1) and image < number(problem.images)):
        return -ONE
    scales = problem.scales + (axes * (level + 1) - 1) * size  # that of x is the last
    finite = _is_finite(tag, starts, ends, scales, ZERO) and _is_finite(tag, starts, ends, scales, ONE)
    if not finite or (axes == 3 and not _is_finite(tag, starts, ends, scales, ONE + ONE)):
        return -ONE
    return np.int64(image) * problem.n_levels + level


@part
def _side(tag, starts, ends, i):
    return load_one(tag, ends + i * size_of(tag)) - load_one(tag, starts + i * size_of(tag))


@part
def _is_finite(tag, starts, ends, scales, i):
    """Whether a RoI has a place and a size along its axis i, of which x is the first."""
    size = size_of(tag)
    scale = load_one(tag, scales - i * size)
    low, high = load_one(tag, starts + i * size) * scale, load_one(tag, ends + i * size) * scale
    return np.isfinite(low) and np.isfinite(high - low)


class Along(NamedTuple):
    """A RoI along an axis of its map."""

    start: Any  # in cells
    bin_size: Any
    extent: Any  # of the map
    bins: Any
    sampling_ratio: Any
    moved: Any  # whether it is a derivative along this axis that is laid,
    start_rate: Any  # of the start of the first bin,
    size_rate: Any  # and of the size of every bin


@part
def along(tag, problem, k, axis, level):
    """RoI k along an axis."""
    number, axes, size = type(tag), problem.axes, size_of(tag)
    at = problem.rois + ((1 + 2 * axes) * k + 2 - axis) * size
    scale = load_one(tag, problem.scales + (axes * (level + 1) - 2 + axis) * size)
    offset = number(0.5) if problem.aligned else number(0)
    start = load_one(tag, at) * scale - offset
    length = load_one(tag, at + axes * size) * scale - offset - start
    bins, extent = _bins_and_extent(problem, axis, level)
    whole = length if problem.aligned else max(length, number(1))
    moved, start_rate, size_rate = False, number(0), number(0)
    if problem.derivative:
        of_start, of_end = problem.derivative == 2 - axis, problem.derivative == 2 - axis + axes
        moved, start_rate = of_start or of_end, scale if of_start else number(0)
        if problem.aligned or length >= number(1):
            size_rate = (scale if of_end else -start_rate) / number(bins)
    bin_size, ratio = whole / number(bins), problem.sampling_ratio
    return Along(start, bin_size, extent, bins, ratio, moved, start_rate, size_rate)


@part
def _bins_and_extent(problem, axis, level):
    """Of an axis: bins, and cells of the map."""
    m = level * MAP_COLUMNS
    if axis == X:
        return problem.bins_x, get(problem.maps, m + WIDTH)
    if axis == Y:
        return problem.bins_y, get(problem.maps, m + ROWS)
    return problem.bins_z, get(problem.maps, m + SLICES)


@part
def _visits(tag, bin_start, bin_size, extent, sampling_ratio):
    """Grid, first point to visit and number of points to visit of one bin; see `taps.lay_points`."""
    number = type(tag)
    if sampling_ratio > 0:
        return number(sampling_ratio), number(0), sampling_ratio
    grid = np.ceil(bin_size)
    if not grid > number(0):
        return number(0), number(0), ZERO
    step = bin_size / grid
    first = np.floor((number(-1) - bin_start) / step - number(0.5)) - number(1)
    first = min(max(first, number(0)), grid)
    last = np.ceil((number(extent) - bin_start) / step - number(0.5)) + number(1)
    last = min(last, grid - number(1))
    return grid, first, np.int64(max(last - first + number(1), number(0)))


@part
def low_cell(tag, bin_start, bin_size, grid, index, extent):
    """Of a sampling point: the cell below it, or -1 if it misses the map, and the share of the next."""
    number = type(tag)
    point = bin_start + (index + number(0.5)) * bin_size / grid
    if not (point >= number(-1) and point <= number(extent)):
        return -ONE, number(0)
    return _cell_below(tag, point, extent)


@part
def _cell_below(tag, point, extent):
    number = type(tag)
    point = max(point, number(0))
    low = np.int64(point)
    if low >= extent - 1:  # among integers: as a float the last cell may be rounded up, past the map
        return extent - 1, number(0)
    return low, point - number(low)


@part
def lay_bin(tag, a, b):
    """How many points of bin b to visit, and what `sample` must know of it; see `taps`."""
    number = type(tag)
    bin_start = a.start + number(b) * a.bin_size
    if a.sampling_ratio >= 0:
        grid, first, visits = _visits(tag, bin_start, a.bin_size, a.extent, a.sampling_ratio)
        return visits, bin_start, a.bin_size, grid, first
    bin_end = a.start + number(b + 1) * a.bin_size
    low, high = min(bin_start, bin_end), max(bin_start, bin_end)
    length = high - low
    if not (high >= number(-1) and low <= number(a.extent)):
        return ZERO, low, high, length, low
    if length == 0:
        return ONE, low, high, length, low
    low, high = max(low, number(-1)), min(high, number(a.extent))
    first = np.floor(low)
    visits = np.int64(np.ceil(high) - first) if low < high else ZERO
    if a.moved and visits > 0:
        visits += 2
    return visits, low, high, length, first


@part
def sample(tag, a, laid, i):
    """Of point i: the cell below it, or -1 if it adds nothing, and the weights of it and of the next."""
    number = type(tag)
    _, low, high, grid, first = laid
    if a.sampling_ratio >= 0:
        cell, share = low_cell(tag, low, high, grid, first + number(i), a.extent)
        weight = number(1) / grid
    else:
        start = max(low, first + number(i))
        stop = min(high, first + number(i + 1))
        cell, share = _cell_below(tag, (start + stop) * number(0.5), a.extent)
        weight = (stop - start) / grid if grid > 0 else number(1)
    return cell, (number(1) - share) * weight, share * weight


@part
def sample_moved(tag, a, b, laid, i):
    """Likewise of a derivative: of a grid by slopes at its points, of an integral by what is at its ends."""
    number = type(tag)
    visits, low, high, grid, first = laid
    start_rate = a.start_rate + number(b) * a.size_rate
    if a.sampling_ratio >= 0:
        place = first + number(i) + number(0.5)
        rate = (start_rate + place / grid * a.size_rate) / grid
        return _slope(tag, low + place * high / grid, rate, a.extent)
    end_rate = start_rate + a.size_rate
    if grid == 0:
        return _slope(tag, low, (start_rate + end_rate) / number(2), a.extent)
    bin_start, bin_end = a.start + number(b) * a.bin_size, a.start + number(b + 1) * a.bin_size
    if i == 0:
        point, weight = bin_start, -start_rate
    elif i == visits - 1:
        point, weight = bin_end, end_rate
    else:
        start, stop = max(low, first + number(i - 1)), min(high, first + number(i))
        point, weight = (start + stop) / number(2), (stop - start) / grid * (start_rate - end_rate)
    if weight == 0 or not (point >= number(-1) and point <= number(a.extent)):
        return -ONE, number(0), number(0)
    weight /= bin_end - bin_start
    cell, share = _cell_below(tag, point, a.extent)
    return cell, (number(1) - share) * weight, share * weight


@part
def _slope(tag, point, rate, extent):
    """Where the map is level, before its first cell and after its last, a slope adds nothing."""
    if rate == 0 or not (point >= type(tag)(0) and point < type(tag)(extent)):
        return -ONE, rate, rate
    low = np.int64(point)
    return (low if low < extent - 1 else -ONE), -rate, rate
