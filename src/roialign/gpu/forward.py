"""The forward kernels: a warp's lanes lie along the channels of a cell, or along the taps of a row of bins.

Both read what `tables.py` says. A tap is a cell and its weight along one axis; a sum goes over the rows of a
bin's taps and then over its columns. Taps that a bin has not are neither read nor added.
"""

import triton
import triton.language as tl

from .geometry import UNROLLED, multiple, pointer_of, whole, whole_of
from .tables import APART, HEAD, LONGEST, OF_X, ORIGIN, STEP, unpack

ALONG_X, ALONG_Y = tl.constexpr(1), tl.constexpr(2)  # which axis a derivative is along, or 0


@triton.jit
def _bin(axis, b, RATIO: tl.constexpr):
    """Where the taps of a bin are, or of several: places of points, or first cell, number and weights.

    The weights of points are, along the axis of a derivative, how fast they move; else their places say them.
    """
    places, runs, weights, step, _, last = axis
    if RATIO > 0:
        return places + b * RATIO, b, b * 0 + 2 * RATIO, weights + b * RATIO, last
    else:
        first, length = unpack(tl.load(runs + b))
        return places, first, length, weights + first + step * b, last


@triton.jit
def _pair(of_bin, i, RATIO: tl.constexpr, MOVED: tl.constexpr):
    """Taps `2 * i` and `2 * i + 1` of a bin: cell and weight of either, and whether there are such."""
    places, first, length, weights, last = of_bin
    if RATIO > 0:
        place = tl.load(places + i)
        low = tl.floor(place)
        cell = low.to(tl.int32)
        above = tl.load(weights + i) if MOVED else place - low
        below = -above if MOVED else 1 - above
        return cell, below, tl.minimum(cell + 1, last), above, place >= 0, place >= 0
    else:
        here, there = 2 * i < length, 2 * i + 1 < length
        weight = tl.load(weights + 2 * i, here, 0)
        return first + 2 * i, weight, first + 2 * i + 1, tl.load(weights + 2 * i + 1, there, 0), here, there


@triton.jit
def _tap(of_bin, here, i, RATIO: tl.constexpr, MOVED: tl.constexpr):
    """Tap `i` of every bin, where it is `here`: cell, weight, and whether there is one."""
    places, first, length, weights, last = of_bin
    if RATIO > 0:
        place = tl.load(places + i // 2, here & (i < 2 * RATIO), -1)
        low = tl.floor(place)
        above = tl.load(weights + i // 2, here & (i < 2 * RATIO), 0) if MOVED else place - low
        below = -above if MOVED else 1 - above
        return tl.minimum(low.to(tl.int32) + i % 2, last), tl.where(i % 2 == 0, below, above), place >= 0
    else:
        here &= i < length
        return first + i, tl.load(weights + i, here, 0), here


@triton.jit
def _axes(
    row, numbers, length, k, level, heights, widths, height,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Of both axes: places of points, or runs, weights, their step, and the most pairs; and the last cell."""
    numbers += k * length
    y_last = (whole_of(heights, level) - 1).to(tl.int32)
    x_last = (whole_of(widths, level) - 1).to(tl.int32)
    if RATIO > 0:
        POINTS_Y: tl.constexpr = BINS_Y * RATIO
        slopes = numbers + (BINS_Y + BINS_X) * RATIO
        y = (numbers, row, slopes, 0, RATIO, y_last)
        x = (numbers + POINTS_Y, row, slopes + POINTS_Y, 0, RATIO, x_last)
    else:
        y_weights = numbers - tl.load(row + ORIGIN)
        x_weights = numbers + height + APART * BINS_Y - tl.load(row + OF_X + ORIGIN)
        y_pairs = (tl.load(row + LONGEST) + 1) // 2
        x_pairs = (tl.load(row + OF_X + LONGEST) + 1) // 2
        y = (numbers, row + HEAD, y_weights, tl.load(row + STEP), y_pairs, y_last)
        x = (numbers, row + HEAD + BINS_Y, x_weights, tl.load(row + OF_X + STEP), x_pairs, x_last)
    return y, x


@triton.jit
def _home(row, n_levels: tl.constexpr):
    """Whether a RoI can be pooled, its level and its image."""
    home = tl.load(row).to(tl.int32)
    poolable = home >= 0
    home = tl.maximum(home, 0)
    return poolable, home % n_levels, (home // n_levels).to(tl.int64)


@triton.jit
def _scale(poolable, RATIO: tl.constexpr, MOVED: tl.constexpr, DTYPE: tl.constexpr):
    """What makes a sum of points a mean, which weights of runs have in them.

    If there is no such RoI it is NaN, of a derivative 0.
    """
    POINTS: tl.constexpr = RATIO * RATIO if RATIO > 0 else 1
    LOST: tl.constexpr = 0.0 if MOVED else float("nan")
    return tl.where(poolable, tl.full((), 1.0 / POINTS, DTYPE), tl.full((), LOST, DTYPE))


@triton.jit
def _is_whole(places, poolable, POINTS: tl.constexpr):
    """Whether all points of a RoI meet the map, so that none needs to be asked after."""
    if POINTS <= 0:
        return False
    else:
        BLOCK: tl.constexpr = triton.next_power_of_2(POINTS)
        first = tl.load(places + tl.minimum(tl.arange(0, BLOCK), POINTS - 1))
        return (tl.min(first, 0) >= 0) & poolable


@triton.jit
def _all(flag, N: tl.constexpr):
    """A flag, N times."""
    return tl.arange(0, N) < tl.where(flag, N, 0)


@triton.jit(do_not_specialize=["row_length", "length", "height", "count", "channels"])
def forward_along_channels(
    out, out_strides, features, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    rows, row_length, numbers, length, height, count, channels,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, MOVED: tl.constexpr,
    MULTIPLE: tl.constexpr, OUT_MULTIPLE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some rows of bins, or parts of them, and a block of channels per program: a row for each warp.

    `MINE` has a bit for every map that is to be read. All strides but that of the channels, which lie
    innermost, are multiples of `MULTIPLE`; likewise those of the result of `OUT_MULTIPLE`, or that is 0.
    `EVEN` says that the blocks are whole. A derivative is `MOVED` along an axis.
    """
    PARTS: tl.constexpr = (BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    ROWS: tl.constexpr = (BINS_Y + BLOCK_ROWS - 1) // BLOCK_ROWS
    MOVED_Y: tl.constexpr = MOVED == ALONG_Y
    MOVED_X: tl.constexpr = MOVED == ALONG_X
    # What reads the same cells is at work at the same time; one block of channels of all maps after another.
    program = tl.program_id(0)
    part, program = program % PARTS, program // PARTS
    p0, program = program % ROWS * BLOCK_ROWS, program // ROWS
    k, block = (program % count).to(tl.int64), program // count
    row = rows + k * row_length
    poolable, level, image = _home(row, len(features))
    if (MINE >> level) & 1 == 0:
        return
    y, x = _axes(row, numbers, length, k, level, heights, widths, height, BINS_Y, BINS_X, RATIO)
    y_stride = multiple(whole_of(row_strides, level), MULTIPLE)
    x_stride = multiple(whole_of(column_strides, level), MULTIPLE)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    here = None if EVEN else channel < channels
    cells = pointer_of(features, level) + image * multiple(whole_of(image_strides, level), MULTIPLE) + channel
    p = p0 + tl.arange(0, BLOCK_ROWS)
    to = out + k * multiple(whole(out_strides[0]), OUT_MULTIPLE)
    to += (p * multiple(whole(out_strides[2]), OUT_MULTIPLE))[:, None]
    to += channel if OUT_MULTIPLE else channel * whole(out_strides[1])
    inside = (p < BINS_Y)[:, None]
    inside = inside if EVEN else inside & here
    bin_stride = multiple(whole(out_strides[3]), OUT_MULTIPLE)
    q0, q1 = part * BLOCK_BINS, tl.minimum((part + 1) * BLOCK_BINS, BINS_X)
    p = tl.minimum(p, BINS_Y - 1)
    scale = _scale(poolable, RATIO, MOVED, numbers.dtype.element_ty)
    whole_roi = _is_whole(y[0], poolable, (BINS_Y + BINS_X) * RATIO)
    above = _bin(y, p, RATIO)
    for q in range(q0, q1):
        total, beside = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), scale.dtype), _bin(x, q, RATIO)
        if RATIO > 0 and RATIO <= UNROLLED:
            if whole_roi:
                for i in tl.static_range(RATIO):
                    for j in tl.static_range(RATIO):
                        pairs = _pair(above, i, RATIO, MOVED_Y), _pair(beside, j, RATIO, MOVED_X)
                        total = _add_four(total, cells, here, pairs[0], pairs[1], y_stride, x_stride, True)
            else:
                for i in tl.static_range(RATIO):
                    for j in tl.static_range(RATIO):
                        pairs = _pair(above, i, RATIO, MOVED_Y), _pair(beside, j, RATIO, MOVED_X)
                        total = _add_four(total, cells, here, pairs[0], pairs[1], y_stride, x_stride, False)
        else:
            for i in range(y[4]):
                for j in range(x[4]):
                    pairs = _pair(above, i, RATIO, MOVED_Y), _pair(beside, j, RATIO, MOVED_X)
                    total = _add_four(total, cells, here, pairs[0], pairs[1], y_stride, x_stride, False)
        tl.store(to + q * bin_stride, (total * scale).to(out.dtype.element_ty), inside)


@triton.jit
def _add_four(total, cells, here, y, x, y_stride, x_stride, WHOLE: tl.constexpr):
    """Add the cells of a pair of taps along y, of every row, and one along x."""
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            at = cells + ((y[2 * i] * y_stride)[:, None] + x[2 * j] * x_stride)
            look = None if WHOLE else (y[4 + i] & _all(x[4 + j], total.shape[0]))[:, None]
            look = here if look is None else look if here is None else look & here
            value = tl.load(at) if look is None else tl.load(at, look, 0)
            total = tl.fma(value.to(total.dtype), (y[2 * i + 1] * x[2 * j + 1])[:, None], total)
    return total


@triton.jit(do_not_specialize=["row_length", "length", "height", "count", "channels"])
def forward_along_taps(
    out, out_strides, features, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    rows, row_length, numbers, length, height, count, channels,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, MOVED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BINS: tl.constexpr, TAPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some rows of bins, or parts of them, and a block of channels per program.

    The lanes are `TAPS` taps of each bin, along x: so the cells that a warp reads lie in one row of the map,
    close together. `MINE` has a bit for every map that is to be read; `EVEN` says that the blocks of channels
    are whole. A derivative is `MOVED` along an axis.
    """
    PARTS: tl.constexpr = (BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    ROWS: tl.constexpr = (BINS_Y + BLOCK_ROWS - 1) // BLOCK_ROWS
    MOVED_Y: tl.constexpr = MOVED == ALONG_Y
    MOVED_X: tl.constexpr = MOVED == ALONG_X
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
    cells = pointer_of(features, level) + image * whole_of(image_strides, level)
    cells += channel * whole_of(channel_strides, level)
    lane = tl.arange(0, BLOCK_BINS * TAPS)
    # Lanes that are too many do what the last bin's do.
    q, slot = tl.minimum(part * BLOCK_BINS + lane // TAPS, BINS_X - 1), lane % TAPS
    bins = part * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    to = out + (k * whole(out_strides[0]) + channel * whole(out_strides[1]))
    to += (bins * whole(out_strides[3]))[None, :]
    here = None if EVEN else channel < channels
    inside = (bins < BINS_X)[None, :]
    inside = inside if EVEN else inside & here
    p1, scale = tl.minimum(p0 + BLOCK_ROWS, BINS_Y), _scale(poolable, RATIO, MOVED, numbers.dtype.element_ty)
    beside = _bin(x, q, RATIO)
    taps = _tap(beside, poolable, slot, RATIO, MOVED_X)
    # Where there are lanes that are no taps, loads must be asked after.
    whole_roi = _is_whole(y[0], poolable, (BINS_Y + BINS_X) * RATIO if 2 * RATIO == TAPS else 0)
    for p in range(p0, p1):
        above = _bin(y, p, RATIO)
        if RATIO > 0 and 2 * RATIO <= TAPS:
            total = _sum_rows(
                cells, here, above, taps, y_stride, x_stride, whole_roi, RATIO, MOVED_Y, BLOCK_CHANNELS
            )
            total *= (taps[1] * scale)[None, :]
        else:
            total = tl.zeros((BLOCK_CHANNELS, BLOCK_BINS * TAPS), scale.dtype) + (scale - scale)  # or NaN
            for first in range(0, 2 * x[4], TAPS):
                some = _tap(beside, poolable, first + slot, RATIO, MOVED_X)
                sums = _sum_rows(
                    cells, here, above, some, y_stride, x_stride, whole_roi, RATIO, MOVED_Y, BLOCK_CHANNELS
                )
                total = tl.fma(sums, (some[1] * scale)[None, :], total)
        total = tl.sum(tl.reshape(total, (BLOCK_CHANNELS, BLOCK_BINS, TAPS)), 2)
        tl.store(to + p * whole(out_strides[2]), total.to(out.dtype.element_ty), inside)


@triton.jit
def _sum_rows(
    cells, here, above, taps, y_stride, x_stride, whole_roi,
    RATIO: tl.constexpr, MOVED: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of every tap along x, the sum over the taps along y of the bins `above`."""
    at = cells + (taps[0] * x_stride)[None, :]
    total = tl.zeros((BLOCK_CHANNELS, taps[1].shape[0]), taps[1].dtype)
    if RATIO > 0 and RATIO <= UNROLLED:
        if whole_roi:
            for i in tl.static_range(RATIO):
                total = _add_two(total, at, here, _pair(above, i, RATIO, MOVED), y_stride, True)
        else:
            look = taps[2][None, :] if here is None else taps[2][None, :] & here
            for i in tl.static_range(RATIO):
                total = _add_two(total, at, look, _pair(above, i, RATIO, MOVED), y_stride, False)
    else:
        look = taps[2][None, :] if here is None else taps[2][None, :] & here
        for i in range((above[2] + 1) // 2):
            total = _add_two(total, at, look, _pair(above, i, RATIO, MOVED), y_stride, False)
    return total


@triton.jit
def _add_two(total, at, look, pair, y_stride, WHOLE: tl.constexpr):
    for i in tl.static_range(2):
        some = look if WHOLE else look & _all(pair[4 + i], total.shape[1])[None, :]
        from_ = at + pair[2 * i] * y_stride
        value = tl.load(from_) if some is None else tl.load(from_, some, 0)
        total = tl.fma(value.to(total.dtype), pair[2 * i + 1], total)
    return total
