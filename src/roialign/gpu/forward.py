"""The forward kernels: a warp's lanes lie along the channels of a cell, or along the taps of a row of bins.

Both read what `tables.py` says. A tap is a cell and its weight along one axis; a sum goes over the rows of a
bin's taps and then over its columns. Taps that a bin has not are neither read nor added.
"""

import triton
import triton.language as tl

from .geometry import UNROLLED, multiple, pointer_of, share, whole, whole_of
from .tables import APART, HEAD, LONGEST, OF_X, ORIGIN, STEP, unpack


@triton.jit
def _point(places, b, i, extent, RATIO: tl.constexpr):
    """Point `i` of bin `b`: the cells on either side, what each gives, and whether they are there."""
    place = tl.load(places + b * RATIO + i)
    low = tl.floor(place)
    high = tl.minimum(low + 1, extent - 1)
    return low.to(tl.int64), 1 - (place - low), high.to(tl.int64), place - low, place >= 0, place >= 0


@triton.jit
def _pair(axis, b, i, RATIO: tl.constexpr):
    """Taps `2 * i` and `2 * i + 1` of bin `b`: cell and weight of either, and whether there are such."""
    places, runs, weights, step, _, extent = axis
    if RATIO > 0:
        return _point(places, b, i, extent, RATIO)
    else:
        first, length = unpack(tl.load(runs + b))
        cell = first + 2 * i
        here, there = 2 * i < length, 2 * i + 1 < length
        weight = tl.load(weights + cell + step * b, here, 0)
        return cell, weight, cell + 1, tl.load(weights + cell + 1 + step * b, there, 0), here, there


@triton.jit
def _tap(axis, b, here, i, RATIO: tl.constexpr):
    """Tap `i` of every bin, where it is `here`: cell, weight, and whether there is one."""
    places, runs, weights, step, _, extent = axis
    if RATIO > 0:
        here &= i < 2 * RATIO
        place = tl.load(places + b * RATIO + i // 2, here, -1)
        low = tl.floor(place)
        cell = tl.where(i % 2 == 0, low, tl.minimum(low + 1, extent - 1))
        return cell.to(tl.int64), tl.where(i % 2 == 0, 1 - (place - low), place - low), place >= 0
    else:
        first, length = unpack(tl.load(runs + b, here, 0))
        cell = first + i
        here &= i < length
        return cell, tl.load(weights + cell + step * b, here, 0), here


@triton.jit
def _axes(
    row, numbers, length, k, level, heights, widths, height,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Of both axes: places of points, or runs, weights, their step, and the most pairs; and the extent."""
    dtype: tl.constexpr = numbers.dtype.element_ty
    numbers += k * length
    y_extent, x_extent = whole_of(heights, level).to(dtype), whole_of(widths, level).to(dtype)
    if RATIO > 0:
        ALONG_Y: tl.constexpr = BINS_Y * RATIO
        y = (numbers, row, numbers, 0, RATIO, y_extent)
        x = (numbers + ALONG_Y, row, numbers, 0, RATIO, x_extent)
    else:
        y_weights = numbers - tl.load(row + ORIGIN)
        x_weights = numbers + height + APART * BINS_Y - tl.load(row + OF_X + ORIGIN)
        y_pairs = (tl.load(row + LONGEST) + 1) // 2
        x_pairs = (tl.load(row + OF_X + LONGEST) + 1) // 2
        y = (numbers, row + HEAD, y_weights, tl.load(row + STEP), y_pairs, y_extent)
        x = (numbers, row + HEAD + BINS_Y, x_weights, tl.load(row + OF_X + STEP), x_pairs, x_extent)
    return y, x


@triton.jit
def _home(row, n_levels: tl.constexpr):
    """Whether a RoI can be pooled, its level and its image."""
    home = tl.load(row)
    poolable = home >= 0
    home = tl.maximum(home, 0)
    return poolable, home % n_levels, home // n_levels


@triton.jit
def _add_four(total, cells, channel, channels, y, x, y_stride, x_stride):
    """Add the cells of a pair of taps along y and one along x."""
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            look = channel < tl.where(y[4 + i] & x[4 + j], channels, 0)
            value = tl.load(cells + (y[2 * i] * y_stride + x[2 * j] * x_stride), look, 0)
            total = tl.fma(value.to(total.dtype), y[2 * i + 1] * x[2 * j + 1], total)
    return total


@triton.jit(do_not_specialize=["row_length", "length", "height", "count"])
def forward_along_channels(
    out, out_strides, features, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    rows, row_length, numbers, length, height, count, channels,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr,
    MULTIPLE: tl.constexpr, OUT_MULTIPLE: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A row of bins, or a part of one, and a block of channels per program: bin by bin, no lane is idle.

    `MINE` has a bit for every map that is to be read. All strides but that of the channels, which lie
    innermost, are multiples of `MULTIPLE`; likewise those of the result of `OUT_MULTIPLE`, or that is 0.
    """
    PARTS: tl.constexpr = (BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    # What reads the same cells is at work at the same time; one block of channels of all maps after another.
    program = tl.program_id(0)
    part, program = program % PARTS, program // PARTS
    p, program = program % BINS_Y, program // BINS_Y
    k, block = (program % count).to(tl.int64), program // count
    row = rows + k * row_length
    poolable, level, image = _home(row, len(features))
    if (MINE >> level) & 1 == 0:
        return
    y, x = _axes(row, numbers, length, k, level, heights, widths, height, BINS_Y, BINS_X, RATIO)
    y_stride = multiple(whole_of(row_strides, level), MULTIPLE)
    x_stride = multiple(whole_of(column_strides, level), MULTIPLE)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    to_read = tl.where(poolable, channels, 0)
    cells = pointer_of(features, level) + image * multiple(whole_of(image_strides, level), MULTIPLE) + channel
    to = out + k * multiple(whole(out_strides[0]), OUT_MULTIPLE)
    to += p * multiple(whole(out_strides[2]), OUT_MULTIPLE)
    to += channel if OUT_MULTIPLE else channel * whole(out_strides[1])
    for q in range(part * BLOCK_BINS, tl.minimum((part + 1) * BLOCK_BINS, BINS_X)):
        total = tl.zeros((BLOCK_CHANNELS,), numbers.dtype.element_ty)
        if RATIO > 0 and RATIO <= UNROLLED:
            for i in tl.static_range(RATIO):
                for j in tl.static_range(RATIO):
                    pairs = _pair(y, p, i, RATIO), _pair(x, q, j, RATIO)
                    total = _add_four(total, cells, channel, to_read, pairs[0], pairs[1], y_stride, x_stride)
        else:
            for i in range(y[4]):
                for j in range(x[4]):
                    pairs = _pair(y, p, i, RATIO), _pair(x, q, j, RATIO)
                    total = _add_four(total, cells, channel, to_read, pairs[0], pairs[1], y_stride, x_stride)
        total = tl.where(poolable, _mean(total, RATIO), float("nan"))
        at = to + q * multiple(whole(out_strides[3]), OUT_MULTIPLE)
        tl.store(at, total.to(out.dtype.element_ty), channel < channels)


@triton.jit
def _mean(total, RATIO: tl.constexpr):
    """Of the points of a bin. Weights of runs have it in them."""
    if RATIO > 0:
        grid = tl.full(total.shape, RATIO, total.dtype)
        return share(share(total, grid, RATIO), grid, RATIO)
    else:
        return total


@triton.jit(do_not_specialize=["row_length", "length", "height", "count"])
def forward_along_taps(
    out, out_strides, features, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    rows, row_length, numbers, length, height, count, channels,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BINS: tl.constexpr, TAPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some rows of bins, or parts of them, and a block of channels per program.

    The lanes are `TAPS` taps of each bin, along x: so the cells that a warp reads lie in one row of the map,
    close together. `MINE` has a bit for every map that is to be read.
    """
    PARTS: tl.constexpr = (BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    ROWS: tl.constexpr = (BINS_Y + BLOCK_ROWS - 1) // BLOCK_ROWS
    # RoIs fastest: the programs at work at one time share a block of channels, which the caches hold.
    program = tl.program_id(0)
    k, program = (program % count).to(tl.int64), program // count
    part, program = program % PARTS, program // PARTS
    p0, block = program % ROWS * BLOCK_ROWS, program // ROWS
    row = rows + k * row_length
    poolable, level, image = _home(row, len(features))
    if (MINE >> level) & 1 == 0:
        return
    y, x = _axes(row, numbers, length, k, level, heights, widths, height, BINS_Y, BINS_X, RATIO)
    y_stride, x_stride = whole_of(row_strides, level), whole_of(column_strides, level)
    channel = (block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)[:, None]
    here = channel < tl.where(poolable, channels, 0)
    cells = pointer_of(features, level) + image * whole_of(image_strides, level)
    cells += channel * whole_of(channel_strides, level)
    lane = tl.arange(0, BLOCK_BINS * TAPS)
    q, slot = part * BLOCK_BINS + lane // TAPS, lane % TAPS
    bins = part * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    to = out + (k * whole(out_strides[0]) + channel * whole(out_strides[1]))
    to += (bins * whole(out_strides[3]))[None, :]
    inside = (channel < channels) & (bins < BINS_X)[None, :]
    taps = _tap(x, q, (q < BINS_X) & poolable, slot, RATIO)
    for p in range(p0, tl.minimum(p0 + BLOCK_ROWS, BINS_Y)):
        rows_of_taps = _sum_rows(cells, here, y, p, taps, y_stride, x_stride, RATIO)
        total = rows_of_taps * taps[1][None, :]
        if RATIO == 0 or 2 * RATIO > TAPS:
            for first in range(TAPS, 2 * x[4], TAPS):
                more = _tap(x, q, (q < BINS_X) & poolable, first + slot, RATIO)
                rows_of_taps = _sum_rows(cells, here, y, p, more, y_stride, x_stride, RATIO)
                total = tl.fma(rows_of_taps, more[1][None, :], total)
        total = tl.sum(tl.reshape(total, (BLOCK_CHANNELS, BLOCK_BINS, TAPS)), 2)
        total = tl.where(poolable, _mean(total, RATIO), float("nan"))
        tl.store(to + p * whole(out_strides[2]), total.to(out.dtype.element_ty), inside)


@triton.jit
def _sum_rows(cells, here, y, p, taps, y_stride, x_stride, RATIO: tl.constexpr):
    """Of every tap along x, the sum over the taps along y of bin `p`."""
    look = here & taps[2][None, :]
    at = cells + (taps[0] * x_stride)[None, :]
    total = tl.zeros(at.shape, y[5].dtype)
    if RATIO > 0 and RATIO <= UNROLLED:
        for i in tl.static_range(RATIO):
            total = _add_two(total, at, look, _pair(y, p, i, RATIO), y_stride)
    else:
        for i in range(y[4]):
            total = _add_two(total, at, look, _pair(y, p, i, RATIO), y_stride)
    return total


@triton.jit
def _add_two(total, at, look, pair, y_stride):
    LANES: tl.constexpr = total.shape[1]
    for i in tl.static_range(2):
        some = tl.arange(0, LANES) < tl.where(pair[4 + i], LANES, 0)
        value = tl.load(at + pair[2 * i] * y_stride, look & some[None, :], 0).to(total.dtype)
        total = tl.fma(value, pair[2 * i + 1], total)
    return total
