"""Lines, windows and blocks: what both directions of the way of few channels are made of.

A *line* is one row of bins of one channel, along the columns of the map; where channels lie side by side in a
row, a column is as many numbers as there are channels, and a line has all of them. Of a row only *windows* of
16 numbers are read that hold a column which is touched. Sixteen lines turned around are a block, where a lane
is a line. All of it lies in a thread's *room*.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from .geometry import CHANNEL_STEP, COLUMN_STEP, ONE, WIDTH, ZERO
from .jit import part
from .jobs import lay
from .lanes import TILE, zero_cells, zero_run
from .simd import LANES, get, load_one, put, size_of, store_one, transpose8
from .tables import AxisAt

AT_ONCE = np.int64(4)  # blocks that are summed with one look at the taps
FEW = np.int64(2**10)  # taps of a RoI, the most of those that are listed


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


@part
def tables_in(room):
    """The tables of both axes, of one RoI: what it owns of them begins at 0."""
    put(room.counts, 0, ZERO)
    put(room.counts, 1, ZERO)
    ys = AxisAt(room.counts, room.y_start, room.y_taps, room.y_cells, room.counts + 16, room.y_weights)
    xs = AxisAt(room.counts, room.x_start, room.x_taps, room.x_cells, room.counts + 24, room.x_weights)
    return ys, xs


@part
def side_by_side(tag, m, channels):
    """Numbers that a column of a row has side by side; 0 if rows cannot be read 16 numbers at a time."""
    inner = channels_together(m, channels, size_of(tag))
    readable = get(m, COLUMN_STEP) == inner * size_of(tag) and get(m, WIDTH) * inner >= whole_windows(inner)
    return inner if readable else ZERO


@part
def channels_together(m, channels, size):
    """How many channels lie side by side."""
    return channels if channels > 1 and get(m, CHANNEL_STEP) == size else ONE


@part
def whole_windows(inner):
    """A number of whole windows that holds a column wherever it begins."""
    return (inner + LANES - 1) // LANES * LANES


@part
def lay_windows(cells, n, inner, length, tag, size, room):
    """Lay windows over the columns that are touched, and find where these lie in a block.

    The channels of a column lie one after the other there too. Returns how many windows.
    """
    entry = LANES * size_of(tag)
    whole = whole_windows(inner)
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
def lay_bins(tag, bins, inner, windows, room):
    """Find where bins lie in the results, and the channels of a bin and of a column, block by block."""
    entry = LANES * size_of(tag)
    for q in range(bins):
        put(room.bin_rows, q, q * inner * entry)
    for b in range(AT_ONCE):
        for c in range(inner):
            put(room.block_columns, b * inner + c, (b * windows * LANES + c) * entry)
            put(room.bin_columns, b * inner + c, (b * bins * inner + c) * entry)


@part
def list_cells(tag, ys, xs, height, width, room):
    """Of each bin, where the cells lie that it reads, and their weights; without rows that lie nowhere."""
    size = size_of(tag)
    n = ZERO
    for p in range(height):
        for q in range(width):
            put(room.list_start, p * width + q, n)
            for y in range(get(ys.start, p), get(ys.start, p + 1)):
                row = get(room.rows, get(ys.taps, y))
                y_weight = load_one(tag, ys.weights + y * size)
                for x in range(get(xs.start, q), get(xs.start, q + 1) if row >= 0 else ZERO):
                    put(room.list, n, row + get(room.windows, get(xs.taps, x)))
                    x_weight = load_one(tag, xs.weights + x * size)
                    store_one(tag, room.list_weights + n * size, y_weight * x_weight)
                    n += 1
    put(room.list_start, height * width, n)


@part
def are_few(ys, xs, height, width):
    """Whether all taps of a RoI, along y times along x, are less work than windows and blocks.

    Measured: a tap of a cell takes as long as two of a window; to turn a window around, as ten. The answer
    hangs on the RoI alone, not on strides, so that these change no bit.
    """
    y_taps, touched = get(ys.start, height), get(xs.touched, 0)
    taps = y_taps * get(xs.start, width)
    if taps == 0 or taps > FEW or height * width > FEW:
        return False
    windows = min(touched, (get(xs.cells, touched - 1) - get(xs.cells, 0)) // LANES + 1)
    return 2 * taps <= windows * (y_taps + 10 * height) + 3 * width * height


@part
def turn(tag, lines, n, length, step, block):
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
def block_to_run(tag, block, n, length, to):
    """Lay the lanes of a block of `length` cells one after the other, n of them."""
    entry, step = LANES * size_of(tag), length * size_of(tag)
    for line in range(0, n, TILE):
        for c in range(0, length, TILE):
            c = max(min(c, length - TILE), ZERO)  # what is too much is written over by the next line
            from_ = block + c * entry + line * size_of(tag)
            transpose8(tag, from_, entry, tag, to + line * step + c * size_of(tag), step)
