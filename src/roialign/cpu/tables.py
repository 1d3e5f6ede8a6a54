"""Where every bin of every RoI reads: the map of each RoI and, per axis, tables of taps.

The tables are computed once per call and used for every channel. First all RoIs are surveyed and put in
order, map by map and on a map by the first row that they touch; then the tables are filled for as many RoIs
at a time as there is room for. Along one axis of one RoI they list the `cells` of the map that sampling
points touch, in ascending order, and for each bin the taps: places in that list, and weights. Taps of one
bin on one cell are added up. For backward `turn_around` makes of them, for each cell, bins and weights.

Arrays are named by address, as in `simd.py`; `tag` is a number of the working precision.
"""

from typing import Any, NamedTuple

from .geometry import MAP_COLUMNS, MINE, ONE, ZERO, extent_of, home_of, lay_bin, sample, span_of
from .jit import kernel, part
from .simd import get, load_one, put, size_of, store_one


class AxisAt(NamedTuple):
    """Addresses of the tables of one axis; RoI i of those in the tables owns `base[i]:base[i + 1]`."""

    base: Any  # (n + 1,)
    start: Any  # first tap of each bin, relative to base[i]: RoI i's from i * (bins + 1) on
    taps: Any  # place in the list of cells
    cells: Any  # rows or columns of the map that are touched
    touched: Any  # (n,) how many
    weights: Any  # in the working precision


@kernel
def survey(tag, problem, n, keys, rows, homes, spans, counts):
    """Where each RoI begins; returns how many cannot be pooled.

    Args:
        tag: a number of the working precision.
        problem: the RoIs.
        n: how many.
        keys: filled for each RoI with its first row, among the rows of all maps, map by map; -1 if it
            cannot be pooled, and -2 if its map is not to be done.
        rows: of each map, the number of its first row; and the number of all rows.
        homes: how many maps there are, images times levels.
        spans: filled, for each map, with the most rows from the first to the last that a RoI touches.
        counts: filled for each row with the number of RoIs that begin there.
    """
    for home in range(homes):
        put(spans, home, ONE)
    for row in range(get(rows, homes)):
        put(counts, row, ZERO)
    lost = ZERO
    for k in range(n):
        home = home_of(tag, problem, k)
        level = home % problem.n_levels
        if home < 0:
            put(keys, k, -ONE)
            lost += 1
        elif not get(problem.maps, level * MAP_COLUMNS + MINE):
            put(keys, k, -ONE - ONE)
        else:
            first, last = _rows_touched(tag, problem, k, level)
            if last >= 0:
                put(spans, home, max(get(spans, home), last - first + 1))
            key = get(rows, home) + (first if last >= 0 else ZERO)
            put(keys, k, key)
            put(counts, key, get(counts, key) + 1)
    return lost


@part
def _rows_touched(tag, problem, k, level):
    """The first and the last row of the map that RoI k touches; the last is -1 if it touches none."""
    start, size = span_of(tag, problem, k, ZERO, level)
    extent = extent_of(problem, ZERO, level)
    bin_size = size / type(tag)(problem.bins_y)
    lowest, highest = ONE << 40, -ONE
    for b in range(problem.bins_y):
        laid = lay_bin(tag, start, bin_size, b, extent, problem.sampling_ratio)
        for i in range(laid[0]):
            low, _share, _weight = sample(tag, laid, i, extent, problem.sampling_ratio)
            if low >= 0:
                lowest, highest = min(lowest, low), max(highest, min(low + 1, extent - 1))
    return lowest, highest


@kernel
def sort(n, keys, rows, homes, counts, order, bounds):
    """List the RoIs in the order of their keys, and the first of each map in `bounds`; returns how many."""
    total = ZERO
    for home in range(homes):
        put(bounds, home, total)
        for row in range(get(rows, home), get(rows, home + 1)):
            start = total
            total += get(counts, row)
            put(counts, row, start)
    put(bounds, homes, total)
    for k in range(n):
        key = get(keys, k)
        if key >= 0:
            place = get(counts, key)
            put(counts, key, place + 1)
            put(order, place, k)
    return total


@kernel
def measure(tag, problem, order, n, room, y_base, x_base):
    """Where points are as many as cells: how many RoIs there is room for, and the taps of all along y and x.

    The tables of a RoI begin where those of the one before end: two taps for each point visited.
    """
    ys = xs = ZERO
    put(y_base, 0, ZERO)
    put(x_base, 0, ZERO)
    for i in range(n):
        k = get(order, i)
        level = home_of(tag, problem, k) % problem.n_levels
        y_taps = _count(tag, problem, k, ZERO, level, problem.bins_y)
        x_taps = _count(tag, problem, k, ONE, level, problem.bins_x)
        if i and ys + xs + y_taps + x_taps > room:
            return i, ys, xs
        ys, xs = ys + y_taps, xs + x_taps
        put(y_base, i + 1, ys)
        put(x_base, i + 1, xs)
    return n, ys, xs


@kernel
def most_taps(tag, problem, order, n):
    """Likewise, room for the most taps that one of n RoIs has along y and along x.

    They are listed at `order`, or if that is 0 they are the first.
    """
    ys = xs = ZERO
    for i in range(n):
        k = get(order, i) if order else i
        home = home_of(tag, problem, k)
        if home >= 0:
            level = home % problem.n_levels
            ys = max(ys, _count(tag, problem, k, ZERO, level, problem.bins_y))
            xs = max(xs, _count(tag, problem, k, ONE, level, problem.bins_x))
    return ys, xs


@part
def _count(tag, problem, k, axis, level, bins):
    start, size = span_of(tag, problem, k, axis, level)
    extent = extent_of(problem, axis, level)
    bin_size = size / type(tag)(bins)
    total = ZERO
    for b in range(bins):
        total += 2 * lay_bin(tag, start, bin_size, b, extent, problem.sampling_ratio)[0]
    return total


@kernel
def fill(tag, problem, order, n, ys, xs, homes, place, longest):
    """Fill the tables of both axes and the map of each RoI; their bases too, unless the grid is adaptive.

    `place` is scratch, one entry per cell of the longest axis of all maps. Returns the most rows and the most
    columns that a RoI touches, and the most taps that it has along x.
    """
    for cell in range(longest):
        put(place, cell, -ONE)
    ratio = problem.sampling_ratio
    for i in range(n + 1 if ratio > 0 else ZERO):
        put(ys.base, i, 2 * ratio * problem.bins_y * i)
        put(xs.base, i, 2 * ratio * problem.bins_x * i)
    rows = columns = taps = ZERO
    for i in range(n):
        k = get(order, i)
        home = home_of(tag, problem, k)
        put(homes, i, home)
        level = home % problem.n_levels
        rows = max(rows, fill_axis(tag, problem, k, ZERO, level, problem.bins_y, ys, i, place))
        columns = max(columns, fill_axis(tag, problem, k, ONE, level, problem.bins_x, xs, i, place))
        taps = max(taps, get(xs.start, i * (problem.bins_x + 1) + problem.bins_x))
    return rows, columns, taps


@part
def fill_axis(tag, problem, k, axis, level, bins, table, i, place):
    """The tables of RoI k, as number i of its table; returns how many cells it touches."""
    start, size = span_of(tag, problem, k, axis, level)
    starts, base = table.start + 8 * i * (bins + 1), get(table.base, i)
    taps, weights = table.taps + 8 * base, table.weights + size_of(tag) * base
    extent, ratio, cells = extent_of(problem, axis, level), problem.sampling_ratio, table.cells + 8 * base
    touched = _fill_rising(tag, start, size, bins, extent, ratio, starts, taps, weights, cells)
    if touched < 0:
        _fill_bins(tag, start, size, bins, extent, ratio, starts, taps, weights)
        touched = _list_cells(taps, get(starts, bins), cells, place)
    put(table.touched, i, touched)
    return touched


@part
def _fill_rising(tag, start, size, bins, extent, sampling_ratio, starts, taps, weights, cells):
    """Both lists in one pass, if no sampling point lies on a cell below that of the one before it; else -1.

    A cell is then the last in its list or the one before that, or else it is new.
    """
    number = type(tag)
    bin_size = size / number(bins)
    n = touched = before = ZERO
    last = -ONE  # the cell listed last
    for b in range(bins):
        put(starts, b, n)
        laid = lay_bin(tag, start, bin_size, b, extent, sampling_ratio)
        newest = -ONE  # the cell of the bin's last tap
        for i in range(laid[0]):
            low, share, share_of_point = sample(tag, laid, i, extent, sampling_ratio)
            if low >= 0:
                if low < before:
                    return -ONE
                before = low
                high = min(low + 1, extent - 1)
                for cell, weight in ((low, number(1) - share), (high, share)):
                    touched = max(touched, touched + min(cell - last, ONE))
                    last = max(last, cell)
                    put(cells, touched - 1 - (last - cell), cell)
                    known = cell <= newest
                    t = n - 1 - (newest - cell) if known else n
                    at = weights + t * size_of(tag)
                    store_one(tag, at, weight * share_of_point + (load_one(tag, at) if known else number(0)))
                    put(taps, t, touched - 1 - (last - cell))
                    n = max(n, t + 1)
                    newest = max(newest, cell)
    put(starts, bins, n)
    return touched


@part
def _fill_bins(tag, start, size, bins, extent, sampling_ratio, starts, taps, weights):
    """The taps of each bin; two on one cell, which are neighbours in the list, are added up."""
    number = type(tag)
    bin_size = size / number(bins)
    n = ZERO
    for b in range(bins):
        put(starts, b, n)
        laid = lay_bin(tag, start, bin_size, b, extent, sampling_ratio)
        opened = n
        for i in range(laid[0]):
            low, share, weight = sample(tag, laid, i, extent, sampling_ratio)
            if low >= 0:
                n = _add_tap(tag, taps, weights, opened, n, low, (number(1) - share) * weight)
                n = _add_tap(tag, taps, weights, opened, n, min(low + 1, extent - 1), share * weight)
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
