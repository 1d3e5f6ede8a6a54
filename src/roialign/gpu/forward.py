"""The forward kernel: RoIs are pooled from the maps of all levels."""

import triton
import triton.language as tl

from .geometry import (
    UNROLLED,
    divide,
    locate,
    multiple,
    pointer_of,
    sample_point,
    share,
    visits,
    whole,
    whole_of,
)


@triton.jit
def _taps(axis, i, RATIO: tl.constexpr):
    """Of point `i` of every bin: offset of the low cell, of the high one, its share, whether to look."""
    bin_start, bin_size, grid, first, number, extent, stride = axis
    point, touched = sample_point(bin_start, bin_size, grid, first + i, extent, RATIO)
    low = tl.floor(point)
    high = tl.minimum(low + 1, extent - 1)
    return low.to(tl.int64) * stride, high.to(tl.int64) * stride, point - low, touched & (i < number)


@triton.jit
def _add_row(total, cells, here, inside, i, ys, xs, RATIO: tl.constexpr, ACROSS: tl.constexpr):
    """Add row `i` of the sampling points of every bin."""
    y_taps = _taps(ys, i, RATIO)
    if RATIO > 0 and RATIO <= UNROLLED and ACROSS == 1:
        for j in tl.static_range(RATIO):
            total = _add_point(total, cells, here, inside, y_taps, _taps(xs, j, RATIO), ACROSS)
    else:
        for j in range(_most(xs[4], RATIO)):
            total = _add_point(total, cells, here, inside, y_taps, _taps(xs, j, RATIO), ACROSS)
    return total


@triton.jit
def _add_point(total, cells, here, inside, y_taps, x_taps, ACROSS: tl.constexpr):
    """Add the four cells around one sampling point of every bin."""
    look = here & tl.expand_dims(inside & y_taps[3] & x_taps[3], ACROSS)
    for corner in tl.static_range(4):
        y_weight = y_taps[2] if corner >= 2 else 1 - y_taps[2]
        x_weight = x_taps[2] if corner % 2 == 1 else 1 - x_taps[2]
        offset = y_taps[corner // 2] + x_taps[corner % 2]
        value = tl.load(cells + tl.expand_dims(offset, ACROSS), look, 0).to(total.dtype)
        total = tl.fma(value, tl.expand_dims(y_weight * x_weight, ACROSS), total)
    return total


@triton.jit
def _most(number, RATIO: tl.constexpr):
    """How often to go round: a constant where the grid is."""
    if RATIO > 0:
        return RATIO
    else:
        return tl.max(number, 0)


@triton.jit(do_not_specialize=["count", "images"])
def forward(
    out, out_strides, features, image_strides, channel_strides, row_strides, column_strides,
    heights, widths, rois, levels, count, images, channels, scales, thresholds,
    ORDER: tl.constexpr, MINE: tl.constexpr,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    INNERMOST: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One RoI, a block of channels and a block of bins per program.

    `MINE` has a bit for every map of the dtype of `features`. `INNERMOST` is the number of elements that
    every offset but those of channels is a multiple of, or 0 where channels are not innermost: then bins
    lie across the lanes.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    across: tl.constexpr = 1 if INNERMOST else 0  # the axis of a tile along which the channels lie
    # RoIs fastest: the programs at work at one time share a block of channels, which the caches hold.
    program = tl.program_id(0)
    k, rest = (program % count).to(tl.int64), program // count
    bin_blocks: tl.constexpr = (BINS_Y * BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    bins = rest % bin_blocks * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channel = (rest // bin_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)
    poolable, level, image, y_start, y_size, x_start, x_size = locate(
        rois, levels, k, count, images, scales, thresholds, ORDER, ALIGNED
    )
    if (MINE >> level) & 1 == 0:
        return
    y_extent = whole_of(heights, level).to(dtype)
    x_extent = whole_of(widths, level).to(dtype)
    y_stride = multiple(whole_of(row_strides, level), INNERMOST)
    x_stride = multiple(whole_of(column_strides, level), INNERMOST)
    image_offset = image * multiple(whole_of(image_strides, level), INNERMOST)
    channel_offset = channel if INNERMOST else channel * whole_of(channel_strides, level)
    cells = pointer_of(features, level) + image_offset + tl.expand_dims(channel_offset, 1 - across)
    here = tl.expand_dims(channel < channels, 1 - across)

    p, q = bins // BINS_X, bins % BINS_X
    y_bin, x_bin = divide(y_size, BINS_Y * 1.0), divide(x_size, BINS_X * 1.0)
    y_first_cell = y_start + p.to(dtype) * y_bin
    x_first_cell = x_start + q.to(dtype) * x_bin
    y_grid, y_first, y_number = visits(y_first_cell, y_bin, -1.0, y_extent, RATIO)
    x_grid, x_first, x_number = visits(x_first_cell, x_bin, -1.0, x_extent, RATIO)
    inside = bins < tl.where(poolable, BINS_Y * BINS_X, 0)

    total = tl.zeros((BLOCK_BINS, BLOCK_CHANNELS) if INNERMOST else (BLOCK_CHANNELS, BLOCK_BINS), dtype)
    ys = (y_first_cell, y_bin, y_grid, y_first, y_number, y_extent, y_stride)
    xs = (x_first_cell, x_bin, x_grid, x_first, x_number, x_extent, x_stride)
    # With bins across the lanes, one point already has as many loads as there are registers for.
    if RATIO > 0 and RATIO <= UNROLLED and across == 1:
        for i in tl.static_range(RATIO):
            total = _add_row(total, cells, here, inside, i, ys, xs, RATIO, across)
    else:
        for i in range(_most(y_number, RATIO)):
            total = _add_row(total, cells, here, inside, i, ys, xs, RATIO, across)
    total = share(share(total, y_grid, RATIO), x_grid, RATIO)
    total = tl.where(poolable, total, float("nan"))

    roi_stride = multiple(whole(out_strides[0]), INNERMOST)
    y_stride = multiple(whole(out_strides[2]), INNERMOST)
    x_stride = multiple(whole(out_strides[3]), INNERMOST)
    channel_offset = channel if INNERMOST else channel * whole(out_strides[1])
    place = k * roi_stride + tl.expand_dims(channel_offset, 1 - across)
    place += tl.expand_dims(p * y_stride + q * x_stride, across)
    here &= tl.expand_dims(bins < BINS_Y * BINS_X, across)
    tl.store(out + place, total.to(out.dtype.element_ty), here)
