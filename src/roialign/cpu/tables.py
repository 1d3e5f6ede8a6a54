"""Where every bin of every RoI reads: the map of each RoI and, per axis, tables of taps.

The tables are computed once per call and used for every channel. Along one axis of one RoI they
list the `cells` of the map that sampling points touch, in ascending order, and for each bin the
taps: places in that list, and weights. Taps of one bin on one cell are added up. For backward
the tables are turned around: for each cell, bins and weights.

Arrays are named by address, as in `simd.py`; `tag` is a number of the working precision.
"""

from typing import Any, NamedTuple

import numpy as np

from .jit import kernel, part
from .simd import get, load_one, put, size_of, store_one

# Constants are NumPy numbers: Numba compiles a function anew for every Python int it is called with.
ZERO, ONE = np.arange(2)

# What a row of `maps` says of a map: where it is, its steps in bytes, its size.
AT, IMAGE_STEP, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, HEIGHT, WIDTH = np.arange(7)
MAP_COLUMNS = np.int64(7)

# Columns of `rois`.
X1, Y1 = np.arange(1, 3)


class AxisAt(NamedTuple):
    """Addresses of the tables of one axis; RoI k owns the taps and cells `base[k]:base[k + 1]`."""

    base: Any  # (K + 1,)
    start: Any  # first tap of each bin, relative to base[k]: RoI k's from k * (bins + 1) on
    taps: Any  # place in the list of cells
    cells: Any  # rows or columns of the map that are touched
    touched: Any  # (K,) how many
    weights: Any  # in the working precision


@kernel
def assign(tag, rois, n, levels, n_levels, maps, scales, images, climb, n_climb, canonical_scale, map_of):
    """The map `image * L + level` of each RoI, or -1 if it cannot be pooled; returns how many can.

    `climb` holds the finest map and then, from fine to coarse, rows `(ratio, delta)`: a box whose
    `size / canonical_scale` reaches `ratio` moves on by `delta`. Where there is none, `levels` are given.
    """
    number = type(tag)
    size = size_of(tag)
    poolable = 0
    for k in range(n):
        roi = rois + 5 * size * k
        image, x1, y1 = load_one(tag, roi), load_one(tag, roi + size), load_one(tag, roi + 2 * size)
        x2, y2 = load_one(tag, roi + 3 * size), load_one(tag, roi + 4 * size)
        level = ZERO
        if n_climb:
            ratio = np.sqrt((x2 - x1) * (y2 - y1)) / canonical_scale
            for step in range(n_climb):
                if step == 0 or ratio >= load_one(tag, climb + 2 * size * step):
                    level += np.int64(load_one(tag, climb + 2 * size * step + size))
        else:
            level = get(levels, k)
        home = -ONE
        if 0 <= level < n_levels and image > number(-1) and image < number(images):
            scale = load_one(tag, scales + size * level)
            x1, y1, x2, y2 = x1 * scale, y1 * scale, x2 * scale, y2 * scale
            if np.isfinite(x1) and np.isfinite(y1) and np.isfinite(x2 - x1) and np.isfinite(y2 - y1):
                home = np.int64(image) * n_levels + level
                poolable += 1
        put(map_of, k, home)
    return poolable


@part
def _span(tag, rois, k, column, scale, aligned):
    """Start and size of a RoI along one axis, in cells of the map."""
    number = type(tag)
    at = rois + (5 * k + column) * size_of(tag)
    offset = number(0.5) if aligned else number(0)
    start = load_one(tag, at) * scale - offset
    size = load_one(tag, at + 2 * size_of(tag)) * scale - offset - start
    return start, size if aligned else max(size, number(1))


@part
def _visits(tag, bin_start, bin_size, extent, sampling_ratio):
    """Grid, first point to visit and number of points to visit of one bin; see the reference."""
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


@kernel
def count(tag, rois, n, maps, n_levels, scales, map_of, column, bins, extent_column, aligned, base):
    """Fill `base` for an adaptive grid: room for two taps for each point visited along one axis."""
    number = type(tag)
    total = ZERO
    for k in range(n):
        put(base, k, total)
        level = get(map_of, k) % n_levels
        extent = get(maps, level * MAP_COLUMNS + extent_column)
        start, size = _span(tag, rois, k, column, load_one(tag, scales + level * size_of(tag)), aligned)
        bin_size = size / number(bins)
        for b in range(bins if get(map_of, k) >= 0 else ZERO):
            total += 2 * _visits(tag, start + number(b) * bin_size, bin_size, extent, ZERO)[2]
    put(base, n, total)


@kernel
def fill(
    tag, rois, n, maps, n_levels, scales, map_of, column, bins, extent_column, sampling_ratio, aligned,
    place, axis,
):  # fmt: skip
    """Fill the tables of one axis; `base` too unless the grid is adaptive.

    `place` is scratch, one entry per cell.
    """
    for level in range(n_levels):
        for cell in range(get(maps, level * MAP_COLUMNS + extent_column)):
            put(place, cell, -ONE)
    if sampling_ratio > 0:
        for k in range(n + 1):
            put(axis.base, k, 2 * sampling_ratio * bins * k)
    for k in range(n):
        put(axis.touched, k, ZERO)
        if get(map_of, k) >= 0:
            level = get(map_of, k) % n_levels
            extent = get(maps, level * MAP_COLUMNS + extent_column)
            start, size = _span(tag, rois, k, column, load_one(tag, scales + level * size_of(tag)), aligned)
            starts, base = axis.start + 8 * k * (bins + 1), get(axis.base, k)
            taps, weights = axis.taps + 8 * base, axis.weights + size_of(tag) * base
            _fill_bins(tag, start, size, bins, extent, sampling_ratio, starts, taps, weights)
            put(axis.touched, k, _list_cells(taps, get(starts, bins), axis.cells + 8 * base, place))


@part
def _fill_bins(tag, start, size, bins, extent, sampling_ratio, starts, taps, weights):
    """The taps of each bin; two on one cell, which are neighbours in the list, are added up."""
    number = type(tag)
    bin_size = size / number(bins)
    n = ZERO
    for b in range(bins):
        put(starts, b, n)
        bin_start = start + number(b) * bin_size
        grid, first, visits = _visits(tag, bin_start, bin_size, extent, sampling_ratio)
        opened = n
        for i in range(visits):
            point = bin_start + (first + number(i) + number(0.5)) * bin_size / grid
            if point >= number(-1) and point <= number(extent):
                point = min(max(point, number(0)), number(extent - 1))
                low = np.int64(point)
                share = point - number(low)
                n = _add_tap(tag, taps, weights, opened, n, low, (number(1) - share) / grid)
                n = _add_tap(tag, taps, weights, opened, n, min(low + 1, extent - 1), share / grid)
    put(starts, bins, n)


@part
def _add_tap(tag, taps, weights, opened, n, cell, weight):
    """Add a tap to the `n` listed, those from `opened` on being the bin's own; returns how many there are."""
    for t in range(max(n - 2, opened), n):
        if get(taps, t) == cell:
            at = weights + t * size_of(tag)
            store_one(tag, at, load_one(tag, at) + weight)
            return n
    put(taps, n, cell)
    store_one(tag, weights + n * size_of(tag), weight)
    return n + 1


@part
def _list_cells(taps, n, cells, place):
    """List the cells that `n` taps touch, in ascending order, and let the taps name places in the list."""
    lowest, highest = ONE << 40, -ONE
    for t in range(n):
        cell = get(taps, t)
        put(place, cell, ZERO)
        lowest, highest = min(lowest, cell), max(highest, cell)
    touched = ZERO
    for cell in range(lowest, highest + 1):
        if get(place, cell) == 0:
            put(place, cell, touched)
            put(cells, touched, cell)
            touched += 1
    for t in range(n):
        put(taps, t, get(place, get(taps, t)))
    for c in range(touched):
        put(place, get(cells, c), -ONE)
    return touched


@kernel
def sort(map_of, n, maps, n_levels, ys, cursor, rows_in_all, order):
    """Order the RoIs that can be pooled map by map, and on a map by the first row they touch.

    `cursor` is scratch: an entry for each row of each map of each image, and one more.
    """
    for row in range(rows_in_all + 1):
        put(cursor, row, ZERO)
    rows = ZERO
    for level in range(n_levels):
        rows += get(maps, level * MAP_COLUMNS + HEIGHT)
    for placing in range(2):  # count the RoIs of each row, then place them
        for k in range(n):
            home = get(map_of, k)
            if home >= 0:
                row = home // n_levels * rows
                for level in range(home % n_levels):
                    row += get(maps, level * MAP_COLUMNS + HEIGHT)
                if get(ys.touched, k):
                    row += get(ys.cells, get(ys.base, k))
                if placing:
                    put(order, get(cursor, row), k)
                    put(cursor, row, get(cursor, row) + 1)
                else:
                    put(cursor, row + 1, get(cursor, row + 1) + 1)
        if not placing:
            for row in range(rows_in_all):
                put(cursor, row + 1, get(cursor, row + 1) + get(cursor, row))


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
