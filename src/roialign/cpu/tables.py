"""Where every bin of every RoI reads: the map of each RoI and, per axis, tables of taps.

The tables are computed once per call and used for every channel. First all RoIs are surveyed and put in
order, map by map and on a map by the first row that they touch; then the tables are filled for as many RoIs
at a time as there is room for. Along one axis of one RoI they list the `cells` of the map that sampling
points touch, in ascending order, and for each bin the taps: places in that list, and weights. Taps of one
bin on one cell are added up. The rows of a volume are those of all its slices, and their taps the products of
those along z and y. For backward `turn_around` makes of them, for each cell, bins and weights.

Arrays are named by address, as in `simd.py`; `tag` is a number of the working precision.
"""

from typing import Any, NamedTuple

from .geometry import (
    MAP_COLUMNS,
    MINE,
    ONE,
    ROWS,
    ZERO,
    X,
    Y,
    Z,
    along,
    home_of,
    lay_bin,
    sample,
    sample_moved,
)
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
    first, last = _cells_touched(tag, along(tag, problem, k, Y, level))
    if problem.axes == 3:
        first_slice, last_slice = _cells_touched(tag, along(tag, problem, k, Z, level))
        m = level * MAP_COLUMNS
        rows = get(problem.maps, m + ROWS)
        touched = last >= 0 and last_slice >= 0
        first, last = first_slice * rows + first, last_slice * rows + last if touched else -ONE
    return first, last


@part
def _cells_touched(tag, a):
    if a.moved:
        return _cells_touched_moved(tag, a)
    lowest, highest = ONE << 40, -ONE
    for b in range(a.bins):
        laid = lay_bin(tag, a, b)
        for i in range(laid[0]):
            low, _weight, _next = sample(tag, a, laid, i)
            if low >= 0:
                lowest, highest = min(lowest, low), max(highest, min(low + 1, a.extent - 1))
    return lowest, highest


@part
def _cells_touched_moved(tag, a):
    """Likewise of a derivative: a loop of its own, which does not slow down the other."""
    lowest, highest = ONE << 40, -ONE
    for b in range(a.bins):
        laid = lay_bin(tag, a, b)
        for i in range(laid[0]):
            low, _weight, _next = sample_moved(tag, a, b, laid, i)
            if low >= 0:
                lowest, highest = min(lowest, low), max(highest, min(low + 1, a.extent - 1))
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
        y_taps = _count_rows(tag, problem, k, level)
        x_taps = _count(tag, along(tag, problem, k, X, level))
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
            ys = max(ys, _count_rows(tag, problem, k, level))
            xs = max(xs, _count(tag, along(tag, problem, k, X, level)))
    return ys, xs


@part
def _count(tag, a):
    total = ZERO
    for b in range(a.bins):
        total += 2 * lay_bin(tag, a, b)[0]
    return total


@part
def _count_rows(tag, problem, k, level):
    y_taps = _count(tag, along(tag, problem, k, Y, level))
    if problem.axes == 2:
        return y_taps
    z_taps = _count(tag, along(tag, problem, k, Z, level))
    return z_taps * y_taps + z_taps + y_taps + problem.bins_z + problem.bins_y + 2


def room_of_rows(problem: Any) -> int:
    """Likewise of a grid of fixed ratio, where it is the same for all RoIs; of `_fill_volume`."""
    ratio, bins_z, bins_y = problem.sampling_ratio, problem.bins_z, problem.bins_y
    y_taps: int = 2 * ratio * bins_y
    if problem.axes == 2:
        return y_taps
    z_taps: int = 2 * ratio * bins_z
    return z_taps * y_taps + z_taps + y_taps + int(bins_z + bins_y) + 2


@kernel
def fill(tag, problem, order, n, y_room, x_room, ys, xs, homes, place, longest):
    """Fill the tables of both axes and the map of each RoI; their bases too, where each has the same room.

    `place` is scratch, one entry per cell of the longest axis of all maps. Returns the most rows and the most
    columns that a RoI touches, and the most taps that it has along x.
    """
    for cell in range(longest):
        put(place, cell, -ONE)
    for i in range(n + 1 if y_room else ZERO):
        put(ys.base, i, y_room * i)
        put(xs.base, i, x_room * i)
    rows = columns = taps = ZERO
    for i in range(n):
        k = get(order, i)
        home = home_of(tag, problem, k)
        put(homes, i, home)
        level = home % problem.n_levels
        rows = max(rows, fill_axis(tag, problem, k, Y, level, ys, i, place))
        columns = max(columns, fill_axis(tag, problem, k, X, level, xs, i, place))
        taps = max(taps, get(xs.start, i * (problem.bins_x + 1) + problem.bins_x))
    return rows, columns, taps


@part
def fill_axis(tag, problem, k, axis, level, table, i, place):
    """The tables of RoI k, as number i of its table; returns how many cells it touches."""
    bins, base = problem.bins_x if axis == X else problem.rows, get(table.base, i)
    starts, taps, cells = table.start + 8 * i * (bins + 1), table.taps + 8 * base, table.cells + 8 * base
    weights = table.weights + size_of(tag) * base
    if axis == Y and problem.axes == 3:
        touched = _fill_volume(tag, problem, k, level, starts, taps, weights, cells, place)
    else:
        touched = _fill(tag, along(tag, problem, k, axis, level), starts, taps, weights, cells, place)
    put(table.touched, i, touched)
    return touched


@part
def _fill(tag, a, starts, taps, weights, cells, place):
    touched = -ONE if a.moved else _fill_rising(tag, a, starts, taps, weights, cells)
    if touched < 0:
        _fill_bins(tag, a, starts, taps, weights)
        touched = _list_cells(taps, get(starts, a.bins), cells, place)
    return touched


@part
def _fill_volume(tag, problem, k, level, starts, taps, weights, cells, place):
    """The rows of all slices: products of the tables along z and y, which lie behind them."""
    size, z, y = size_of(tag), along(tag, problem, k, Z, level), along(tag, problem, k, Y, level)
    z_room, y_room = _count(tag, z), _count(tag, y)
    z_at, y_at = z_room * y_room, z_room * y_room + z_room
    z_starts = taps + 8 * (y_at + y_room)
    y_starts = z_starts + 8 * (z.bins + 1)
    z_taps, y_taps, z_cells, y_cells = taps + 8 * z_at, taps + 8 * y_at, cells + 8 * z_at, cells + 8 * y_at
    z_weights, y_weights = weights + size * z_at, weights + size * y_at
    slices = _fill(tag, z, z_starts, z_taps, z_weights, z_cells, place)
    rows = _fill(tag, y, y_starts, y_taps, y_weights, y_cells, place)
    for s in range(slices):
        for r in range(rows):
            put(cells, s * rows + r, get(z_cells, s) * y.extent + get(y_cells, r))
    n = ZERO
    for b in range(z.bins * y.bins):
        put(starts, b, n)
        p, q = b // y.bins, b % y.bins
        for s in range(get(z_starts, p), get(z_starts, p + 1)):
            of_slice, weight = get(z_taps, s) * rows, load_one(tag, z_weights + s * size)
            for r in range(get(y_starts, q), get(y_starts, q + 1)):
                put(taps, n, of_slice + get(y_taps, r))
                store_one(tag, weights + n * size, weight * load_one(tag, y_weights + r * size))
                n += 1
    put(starts, z.bins * y.bins, n)
    return slices * rows


@part
def _fill_rising(tag, a, starts, taps, weights, cells):
    """Both lists in one pass, if no sampling point lies on a cell below that of the one before it; else -1.

    A cell is then the last in its list or the one before that, or else it is new.
    """
    number = type(tag)
    n = touched = before = ZERO
    last = -ONE  # the cell listed last
    for b in range(a.bins):
        put(starts, b, n)
        laid = lay_bin(tag, a, b)
        newest = -ONE  # the cell of the bin's last tap
        for i in range(laid[0]):
            low, of_low, of_high = sample(tag, a, laid, i)
            if low >= 0:
                if low < before:
                    return -ONE
                before = low
                high = min(low + 1, a.extent - 1)
                for cell, weight in ((low, of_low), (high, of_high)):
                    touched = max(touched, touched + min(cell - last, ONE))
                    last = max(last, cell)
                    put(cells, touched - 1 - (last - cell), cell)
                    known = cell <= newest
                    t = n - 1 - (newest - cell) if known else n
                    at = weights + t * size_of(tag)
                    store_one(tag, at, weight + (load_one(tag, at) if known else number(0)))
                    put(taps, t, touched - 1 - (last - cell))
                    n = max(n, t + 1)
                    newest = max(newest, cell)
    put(starts, a.bins, n)
    return touched


@part
def _fill_bins(tag, a, starts, taps, weights):
    """The taps of each bin; two on one cell, which are neighbours in the list, are added up."""
    n = ZERO
    for b in range(a.bins):
        put(starts, b, n)
        laid = lay_bin(tag, a, b)
        opened = n
        for i in range(laid[0]):
            low, of_low, of_high = sample_moved(tag, a, b, laid, i) if a.moved else sample(tag, a, laid, i)
            if low >= 0:
                n = _add_tap(tag, taps, weights, opened, n, low, of_low)
                n = _add_tap(tag, taps, weights, opened, n, min(low + 1, a.extent - 1), of_high)
    put(starts, a.bins, n)


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
