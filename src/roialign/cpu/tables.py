"""Where every bin of every RoI reads: the map of each RoI and, per axis, tables of taps.

The tables are computed once per call and used for every channel. Along one axis of one RoI they
list the `cells` of the map that sampling points touch, in ascending order, and for each bin the
taps: places in that list, and weights. Taps of one bin on one cell are added up. For backward
the tables are turned around: for each cell, bins and weights.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .jit import kernel

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating]


# Constants are NumPy numbers: Numba compiles a function anew for every Python int it is called with.
ZERO, ONE = np.arange(2)

# What a row of `maps` says of a map: where it is, its steps in bytes, its size.
AT, IMAGE_STEP, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, HEIGHT, WIDTH = np.arange(7)
MAP_COLUMNS = np.int64(7)

# Columns of `rois`.
X1, Y1 = np.arange(1, 3)


class Axis(NamedTuple):
    """Tables of one axis for K RoIs; RoI k owns the entries `base[k]:base[k + 1]` of taps and cells."""

    base: IntArray  # (K + 1,)
    start: IntArray  # first tap of each bin (or cell), relative to base[k]; from base[k] + k * stride on
    taps: IntArray  # place in the list of cells (or bin)
    weights: FloatArray
    cells: IntArray  # rows or columns of the map that are touched
    touched: IntArray  # (K,) how many


@kernel
def assign(rois, levels, maps, scales, images, climb, canonical_scale, map_of):
    """The map `image * L + level` of each RoI, or -1 if it cannot be pooled.

    `climb` holds the finest map and then, from fine to coarse, rows `(ratio, delta)`: a box whose
    `size / canonical_scale` reaches `ratio` moves on by `delta`. Empty where `levels` are given.
    """
    number = rois.dtype.type
    for k in range(len(rois)):
        image, x1, y1, x2, y2 = rois[k, 0], rois[k, 1], rois[k, 2], rois[k, 3], rois[k, 4]
        if len(climb):
            ratio = np.sqrt((x2 - x1) * (y2 - y1)) / canonical_scale
            level = int(climb[0, 1])
            for step in range(1, len(climb)):
                if ratio >= climb[step, 0]:
                    level += int(climb[step, 1])
        else:
            level = levels[k]
        map_of[k] = -1
        if 0 <= level < len(maps) and image > number(-1) and image < number(images):
            scale = scales[level]
            x1, y1, x2, y2 = x1 * scale, y1 * scale, x2 * scale, y2 * scale
            if np.isfinite(x1) and np.isfinite(y1) and np.isfinite(x2 - x1) and np.isfinite(y2 - y1):
                map_of[k] = np.int64(image) * len(maps) + level


@kernel
def _span(low, high, scale, aligned):
    """Start and size of a RoI along one axis, in cells of the map."""
    number = type(low)
    offset = number(0.5) if aligned else number(0)
    start = low * scale - offset
    size = high * scale - offset - start
    return start, size if aligned else max(size, number(1))


@kernel
def _visits(bin_start, bin_size, extent, sampling_ratio):
    """Grid, first point to visit and number of points to visit of one bin; see the reference."""
    number = type(bin_size)
    if sampling_ratio > 0:
        return number(sampling_ratio), number(0), sampling_ratio
    grid = np.ceil(bin_size)
    if not grid > number(0):
        return number(0), number(0), 0
    step = bin_size / grid
    half = number(0.5)
    one = number(1)
    first = np.floor((-one - bin_start) / step - half) - one
    first = min(max(first, number(0)), grid)
    last = np.ceil((number(extent) - bin_start) / step - half) + one
    last = min(last, grid - one)
    return grid, first, int(max(last - first + one, number(0)))


@kernel
def count(rois, maps, scales, map_of, column, bins, extent_column, sampling_ratio, aligned, base):
    """Fill `base`: room for two taps for each sampling point visited along one axis."""
    number = rois.dtype.type
    total = 0
    for k in range(len(rois)):
        base[k] = total
        if map_of[k] < 0:
            continue
        if sampling_ratio > 0:
            total += 2 * sampling_ratio * bins
            continue
        level = map_of[k] % len(maps)
        start, size = _span(rois[k, column], rois[k, column + 2], scales[level], aligned)
        bin_size = size / number(bins)
        for b in range(bins):
            bin_start = start + number(b) * bin_size
            total += 2 * _visits(bin_start, bin_size, maps[level, extent_column], sampling_ratio)[2]
    base[len(rois)] = total


@kernel
def fill(rois, maps, scales, map_of, column, bins, extent_column, sampling_ratio, aligned, place, axis):
    """Fill the tables of one axis. `place` is scratch, one entry per cell, all -1."""
    for k in range(len(rois)):
        if map_of[k] < 0:
            axis.touched[k] = 0
            continue
        level = map_of[k] % len(maps)
        extent = maps[level, extent_column]
        start, size = _span(rois[k, column], rois[k, column + 2], scales[level], aligned)
        _fill_bins(start, size, bins, extent, sampling_ratio, axis, axis.base[k], k * (bins + 1))
        n = axis.start[k * (bins + 1) + bins]
        axis.touched[k] = _list_cells(axis, axis.base[k], n, place)


@kernel
def _fill_bins(start, size, bins, extent, sampling_ratio, axis, base, first_bin):
    number = type(start)
    bin_size = size / number(bins)
    n = 0
    for b in range(bins):
        axis.start[first_bin + b] = n
        bin_start = start + number(b) * bin_size
        grid, first, visits = _visits(bin_start, bin_size, extent, sampling_ratio)
        opened = n
        for i in range(visits):
            point = bin_start + (first + number(i) + number(0.5)) * bin_size / grid
            if point >= number(-1) and point <= number(extent):
                point = min(max(point, number(0)), number(extent - 1))
                low = int(point)
                share = point - number(low)
                n = _add_tap(axis, base, opened, n, low, (number(1) - share) / grid)
                n = _add_tap(axis, base, opened, n, min(low + 1, extent - 1), share / grid)
    axis.start[first_bin + bins] = n


@kernel
def _add_tap(axis, base, opened, n, cell, weight):
    """Add to one of the bin's last two taps if it is of this cell; else a tap more."""
    for t in range(n - 1, max(n - 3, opened - 1), -1):
        if axis.taps[base + t] == cell:
            axis.weights[base + t] += weight
            return n
    axis.taps[base + n] = cell
    axis.weights[base + n] = weight
    return n + 1


@kernel
def _list_cells(axis, base, n, place):
    """List the cells that `n` taps touch, in ascending order, and let the taps name places in the list."""
    if n == 0:
        return 0
    lowest = highest = axis.taps[base]
    for t in range(n):
        cell = axis.taps[base + t]
        place[cell] = 0
        lowest = min(lowest, cell)
        highest = max(highest, cell)
    touched = 0
    for cell in range(lowest, highest + 1):
        if place[cell] == 0:
            place[cell] = touched
            axis.cells[base + touched] = cell
            touched += 1
    for t in range(n):
        axis.taps[base + t] = place[axis.taps[base + t]]
    for c in range(touched):
        place[axis.cells[base + c]] = -1
    return touched


@kernel
def sort(map_of, maps, ys, cursor, order):
    """Order the RoIs that can be pooled map by map, and on a map by the first row they touch.

    `cursor` is scratch: a zero for each row of each map of each image, and one more. Returns how
    many RoIs can be pooled.
    """
    rows = ZERO
    for level in range(len(maps)):
        rows += maps[level, HEIGHT]
    for place in range(2):  # count the RoIs of each row, then place them
        for k in range(len(map_of)):
            if map_of[k] >= 0:
                row = map_of[k] // len(maps) * rows
                for level in range(map_of[k] % len(maps)):
                    row += maps[level, HEIGHT]
                if ys.touched[k]:
                    row += ys.cells[ys.base[k]]
                if place:
                    order[cursor[row]] = k
                    cursor[row] += 1
                else:
                    cursor[row + 1] += 1
        if place == 0:
            for row in range(len(cursor) - 1):
                cursor[row + 1] += cursor[row]
    return cursor[-1]


@kernel
def turn_around(axis, bins, turned):
    """From taps of bins on cells to taps of cells on bins, bins in ascending order.

    The cells of RoI k have their starts in `turned.start`, all zero so far, from `base[k] + k` on.
    """
    for k in range(len(axis.touched)):
        base = axis.base[k]
        first = k * (bins + 1)
        cells = axis.touched[k]
        taps = axis.start[first + bins] if cells else ZERO
        for t in range(taps):
            turned.start[base + k + axis.taps[base + t] + 1] += 1
        for c in range(cells):
            turned.start[base + k + c + 1] += turned.start[base + k + c]
        b = bins  # from the last tap to the first, so that the starts end up where they belong
        for t in range(taps - 1, -1, -1):
            while axis.start[first + b] > t:
                b -= 1
            to = base + k + axis.taps[base + t] + 1
            turned.start[to] -= 1
            turned.taps[base + turned.start[to]] = b
            turned.weights[base + turned.start[to]] = axis.weights[base + t]
        for c in range(cells):
            turned.start[base + k + c] = turned.start[base + k + c + 1]
        turned.start[base + k + cells] = taps
