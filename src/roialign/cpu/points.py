"""Forward where all sampling points of a RoI are so few that tables of taps take longer than to sum them.

Of every point along an axis are kept the cells on either side and their weights; a bin sums, for each of its
points along y and along x, the four cells around it.
"""

import numpy as np

from .jit import part
from .simd import LANES, get, load_one, put, size_of, store_one
from .tables import (
    AT,
    CHANNEL_STEP,
    COLUMN_STEP,
    HEIGHT,
    IMAGE_STEP,
    ONE,
    ROW_STEP,
    WIDTH,
    ZERO,
    extent_of,
    low_cell,
    span_of,
)

MOST = np.int64(128)  # points of all channels of a RoI, from where on tables are faster


@part
def are_points_few(channels, bins_y, bins_x, sampling_ratio):
    """Whether to sum point by point. No RoI and no strides have a part in it, so they change no bit.

    From 16 channels on many RoIs go another way, which must give the same bits.
    """
    points = channels * bins_y * bins_x * sampling_ratio * sampling_ratio
    return channels < LANES and sampling_ratio > 0 and points <= MOST


@part
def lay_points(tag, problem, k, axis, level, bins, step, table):
    """Of every point of RoI k along an axis: where the cells on either side lie, -1 if it misses the map.

    Their weights are the point's share of its bin.
    """
    number = type(tag)
    ratio, extent = problem.sampling_ratio, extent_of(problem, axis, level)
    start, size = span_of(tag, problem, k, axis, level)
    bin_size, share_of_point = size / number(bins), number(1) / number(ratio)
    at = ZERO
    for b in range(bins):
        bin_start = start + number(b) * bin_size
        for i in range(ratio):
            low, share = low_cell(tag, bin_start, bin_size, number(ratio), number(i), extent)
            # On the last cell there is no other: it is both, so that an infinite one is not multiplied by 0.
            last = low == extent - 1
            share = number(0.5) if last else share
            put(table.taps, at, low * step if low >= 0 else low)
            put(table.cells, at, (low + ONE - last) * step)
            store_one(tag, table.weights + 2 * at * size_of(tag), (number(1) - share) * share_of_point)
            store_one(tag, table.weights + (2 * at + 1) * size_of(tag), share * share_of_point)
            at += 1


@part
def pool_points(src_tag, src, m, tag, out_tag, out, problem, k, level, channels, ys, xs):
    """Pool RoI k."""
    height, width, ratio, size = get(out, HEIGHT), get(out, WIDTH), problem.sampling_ratio, size_of(tag)
    lay_points(tag, problem, k, ZERO, level, height, get(m, ROW_STEP), ys)
    lay_points(tag, problem, k, ONE, level, width, get(m, COLUMN_STEP), xs)
    to = get(out, AT) + k * get(out, IMAGE_STEP)
    channel_step, row_step, bin_step = get(out, CHANNEL_STEP), get(out, ROW_STEP), get(out, COLUMN_STEP)
    map_step = get(m, CHANNEL_STEP)
    for c in range(channels):
        plane = src + c * map_step
        for p in range(height):
            for q in range(width):
                total = type(tag)(0)
                for i in range(p * ratio, p * ratio + ratio):
                    top, bottom = get(ys.taps, i), plane + get(ys.cells, i)
                    y0 = load_one(tag, ys.weights + 2 * i * size)
                    y1 = load_one(tag, ys.weights + (2 * i + 1) * size)
                    for j in range(q * ratio, q * ratio + ratio if top >= 0 else ZERO):
                        left, right = get(xs.taps, j), get(xs.cells, j)
                        if left >= 0:
                            x0 = load_one(tag, xs.weights + 2 * j * size)
                            x1 = load_one(tag, xs.weights + (2 * j + 1) * size)
                            above = x0 * load_one(src_tag, plane + top + left)
                            above += x1 * load_one(src_tag, plane + top + right)
                            below = x0 * load_one(src_tag, bottom + left)
                            below += x1 * load_one(src_tag, bottom + right)
                            total += y0 * above + y1 * below
                store_one(out_tag, to + c * channel_step + p * row_step + q * bin_step, total)
