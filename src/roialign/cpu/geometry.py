"""Where RoIs lie on their maps, and where the points or pieces of their bins do; see `taps`.

Tensors and constants are named by address, as in `simd.py`; `tag` is a number of the working precision.
"""

from typing import Any, NamedTuple

import numpy as np

from .jit import part
from .simd import get, load_one, size_of

# Constants are NumPy numbers: Numba compiles a function anew for every Python int it is called with.
ZERO, ONE = np.arange(2)

# How a tensor lies in memory: where it is, its steps in bytes along each axis, its size; and of a map,
# whether its RoIs are to be done. Images are RoIs and rows are rows of bins where it is a pooled tensor.
AT, IMAGE_STEP, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, HEIGHT, WIDTH, MINE = np.arange(8)
MAP_COLUMNS = np.int64(8)


class Problem(NamedTuple):
    """What the RoIs are and how they are pooled."""

    rois: Any  # (K, 5) in the working precision
    levels: Any  # (K,) or 0: then the staircase says
    n_levels: Any
    images: Any
    maps: Any  # (n_levels, MAP_COLUMNS)
    scales: Any  # (n_levels,) in the working precision
    thresholds: Any  # (n_steps,) in the working precision; see `levels.Staircase`
    order: Any  # (n_steps + 1,)
    n_steps: Any
    bins_y: Any
    bins_x: Any
    sampling_ratio: Any  # points per bin, 0 or `taps.EXACT`
    aligned: Any


@part
def home_of(tag, problem, k):
    """The map `image * n_levels + level` of RoI k, or -1 if it cannot be pooled."""
    number = type(tag)
    size = size_of(tag)
    roi = problem.rois + 5 * size * k
    image, x1, y1 = load_one(tag, roi), load_one(tag, roi + size), load_one(tag, roi + 2 * size)
    x2, y2 = load_one(tag, roi + 3 * size), load_one(tag, roi + 4 * size)
    if problem.levels:
        level = get(problem.levels, k)
    else:
        step = ZERO
        area = (x2 - x1) * (y2 - y1)
        while step < problem.n_steps and area >= load_one(tag, problem.thresholds + step * size):
            step += 1
        level = get(problem.order, step)
    if 0 <= level < problem.n_levels and image > number(-1) and image < number(problem.images):
        scale = load_one(tag, problem.scales + size * level)
        x1, y1, x2, y2 = x1 * scale, y1 * scale, x2 * scale, y2 * scale
        if np.isfinite(x1) and np.isfinite(y1) and np.isfinite(x2 - x1) and np.isfinite(y2 - y1):
            return np.int64(image) * problem.n_levels + level
    return -ONE


@part
def span_of(tag, problem, k, axis, level):
    """Start and size of RoI k along an axis, 0 for y and 1 for x, in cells of the map."""
    number = type(tag)
    at = problem.rois + (5 * k + 2 - axis) * size_of(tag)
    scale = load_one(tag, problem.scales + level * size_of(tag))
    offset = number(0.5) if problem.aligned else number(0)
    start = load_one(tag, at) * scale - offset
    size = load_one(tag, at + 2 * size_of(tag)) * scale - offset - start
    return start, size if problem.aligned else max(size, number(1))


@part
def extent_of(problem, axis, level):
    """Cells of the map along an axis."""
    return get(problem.maps, level * MAP_COLUMNS + HEIGHT + axis)


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
def lay_bin(tag, start, bin_size, b, extent, sampling_ratio):
    """How many points of bin b to visit, and what `sample` must know of it; see `taps`."""
    number = type(tag)
    bin_start = start + number(b) * bin_size
    if sampling_ratio >= 0:
        grid, first, visits = _visits(tag, bin_start, bin_size, extent, sampling_ratio)
        return visits, bin_start, bin_size, grid, first
    bin_end = start + number(b + 1) * bin_size
    low, high = min(bin_start, bin_end), max(bin_start, bin_end)
    length = high - low
    if not (high >= number(-1) and low <= number(extent)):
        return ZERO, low, high, length, low
    if length == 0:
        return ONE, low, high, length, low
    low, high = max(low, number(-1)), min(high, number(extent))
    first = np.floor(low)
    visits = np.int64(np.ceil(high) - first) if low < high else ZERO
    return visits, low, high, length, first


@part
def sample(tag, laid, i, extent, sampling_ratio):
    """Of point i: the cell below it, or -1 if it misses the map, the share of the next, and its weight."""
    number = type(tag)
    _, low, high, grid, first = laid
    if sampling_ratio >= 0:
        cell, share = low_cell(tag, low, high, grid, first + number(i), extent)
        return cell, share, number(1) / grid
    start = max(low, first + number(i))
    stop = min(high, first + number(i + 1))
    cell, share = _cell_below(tag, (start + stop) * number(0.5), extent)
    return cell, share, (stop - start) / grid if grid > 0 else number(1)
