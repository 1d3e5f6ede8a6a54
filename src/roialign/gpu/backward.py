"""The backward kernels: who touches whom, and each tile of the gradient maps as a sum over RoIs."""

import triton
import triton.language as tl

from .geometry import (
    UNROLLED,
    divide,
    locate,
    number_of,
    pointer_of,
    sample_point,
    share,
    to_map,
    visits,
    whole,
    whole_of,
)


@triton.jit
def _tile(tile, first_tiles, heights, widths, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Level, image, first row and first column of a tile, or of a vector of them."""
    level = tile * 0
    for i in tl.static_range(1, len(first_tiles)):
        level = tl.where(tile >= whole(first_tiles[i]), i, level)
    rows = (whole_of(heights, level) + TILE_Y - 1).to(tl.int32) // TILE_Y
    columns = (whole_of(widths, level) + TILE_X - 1).to(tl.int32) // TILE_X
    index = tile - whole_of(first_tiles, level).to(tl.int32)
    row = index // columns
    return level, row // rows, row % rows * TILE_Y, index % columns * TILE_X


@triton.jit
def _rounding(start, size):
    """How far from where it should be, at most, rounding may put a sampling point of a RoI."""
    eps: tl.constexpr = 2e-6 if start.dtype == tl.float32 else 4e-15
    return (tl.abs(start) + tl.abs(size)) * eps


@triton.jit
def _reach(start, size, extent):
    """The first and the last cell along one axis that a RoI may touch: rather too many than too few."""
    margin = _rounding(start, size)
    low = tl.minimum(start, start + size) - margin
    high = tl.maximum(start, start + size) + margin
    meets = (high >= -1) & (low <= extent)
    first = tl.minimum(tl.floor(low), extent - 1)
    last = tl.maximum(tl.floor(high) + 1, 0.0)
    return tl.where(meets, first, extent), tl.where(meets, last, -1.0)


@triton.jit(do_not_specialize=["count", "images", "tiles", "words"])
def touch(
    mask, heights, widths, first_tiles, tiles, words,
    rois, levels, count, images, scales, thresholds,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Who touches whom: bit `i` of word `w` of a tile says whether RoI `32 * w + i` may touch it.

    32 RoIs and a block of tiles per program.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    word, block = tl.program_id(0) % words, tl.program_id(0) // words
    bit = tl.arange(0, 32)
    poolable, level, image, y_start, y_size, x_start, x_size = locate(
        rois, levels, (word * 32 + bit).to(tl.int64), count, images, scales, thresholds,
        ORDER, ALIGNED,
    )  # fmt: skip
    top, bottom = _reach(y_start, y_size, whole_of(heights, level).to(dtype))
    left, right = _reach(x_start, x_size, whole_of(widths, level).to(dtype))
    tile = block * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    tile_level, tile_image, y, x = _tile(tile, first_tiles, heights, widths, TILE_Y, TILE_X)
    y, x = y.to(dtype)[:, None], x.to(dtype)[:, None]
    hit = (tile_level[:, None] == level[None, :]) & (tile_image[:, None] == image[None, :])
    hit &= (top[None, :] < y + TILE_Y) & (bottom[None, :] >= y)
    hit &= (left[None, :] < x + TILE_X) & (right[None, :] >= x)
    bits = tl.sum(tl.where(hit & poolable[None, :], (1 << bit)[None, :], 0), 1)
    tl.store(mask + tile.to(tl.int64) * words + word, bits, tile < tiles)


@triton.jit
def _exponent(power):
    """`i`, of `1 << i` in 32 bits, by way of a float's exponent."""
    number = power.to(tl.uint32, bitcast=True).to(tl.float32)
    return (number.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _bins_within(start, size, bin_size, low, high, BINS: tl.constexpr):
    """From which bin, to which one no more, points may lie in `[low, high]`."""
    margin = _rounding(start, size)
    first = tl.floor(divide(low - margin - start, bin_size) - 0.01)
    stop = tl.floor(divide(high + margin - start, bin_size) + 0.01) + 1
    first = tl.where(bin_size > 0, tl.minimum(tl.maximum(first, 0.0), BINS), 0.0)
    stop = tl.where(bin_size > 0, tl.minimum(tl.maximum(stop, 0.0), BINS), BINS)
    return first.to(tl.int32), stop.to(tl.int32)


@triton.jit
def _weight(cell, start, bin_size, b, low, high, extent, RATIO: tl.constexpr):
    """Weight of a cell in bin `b`, or of a tensor of cells; its points beyond `[low, high]` have none."""
    bin_start = start + b * bin_size
    grid, first, number = visits(bin_start, bin_size, low, high, RATIO)
    total = cell * 0
    if RATIO > 0 and RATIO <= UNROLLED:
        for i in tl.static_range(RATIO):
            total += _hat(cell, bin_start, bin_size, grid, i, extent, RATIO)
    else:
        for i in range(number):
            total += _hat(cell, bin_start, bin_size, grid, first + i, extent, RATIO)
    return share(total, grid, RATIO)


@triton.jit
def _hat(cell, bin_start, bin_size, grid, index, extent, RATIO: tl.constexpr):
    """What a point gives a cell: 1 where it lies, falling to 0 at a distance of one."""
    point, touched = sample_point(bin_start, bin_size, grid, index, extent, RATIO)
    return tl.where(touched, tl.maximum(1 - tl.abs(cell - point), 0.0), 0.0)


@triton.jit
def _add(total, value, weight):
    """`total + value * weight`, but a weight of zero lets no NaN through."""
    return tl.where(weight != 0, tl.fma(value, weight, total), total)


@triton.jit(do_not_specialize=["tiles", "words"])
def backward(
    grads, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    grad, grad_strides, mask, first_tiles, tiles, words, rois, channels, scales,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, INNERMOST: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """One tile of a gradient map and a block of channels per program, which writes them once.

    RoIs that touch the tile are added in ascending order. Of each, a row of bins is spread along x over
    a row of cells, which is spread along y over the rows of the tile: a tensor for each of these. The
    weights along x of `RUN` bins are held at a time.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    across: tl.constexpr = 1 if INNERMOST else 0  # the axis of a row along which the channels lie
    program = tl.program_id(0)
    tile = program % tiles
    channel = (program // tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)
    here = tl.expand_dims(channel < channels, 1 - across)
    level, image, y_first, x_first = _tile(tile, first_tiles, heights, widths, TILE_Y, TILE_X)
    if (MINE >> level) & 1 == 0:
        return
    scale = number_of(scales, level, dtype)
    height, width = whole_of(heights, level), whole_of(widths, level)
    y_extent, x_extent = height.to(dtype), width.to(dtype)
    y_low, x_low = y_first.to(dtype) - 1, x_first.to(dtype) - 1
    y_high, x_high = tl.minimum(y_low + 1 + TILE_Y, y_extent), tl.minimum(x_low + 1 + TILE_X, x_extent)
    roi_stride, grad_y, grad_x = whole(grad_strides[0]), whole(grad_strides[2]), whole(grad_strides[3])
    grad += tl.expand_dims(channel * whole(grad_strides[1]), 1 - across)
    words_at = mask + tile.to(tl.int64) * words

    row = tl.zeros((TILE_X, BLOCK_CHANNELS) if INNERMOST else (BLOCK_CHANNELS, TILE_X), dtype)
    # As large as a row, so that it lies in the threads as a row does.
    columns = row + tl.expand_dims(x_first + tl.arange(0, TILE_X), across).to(dtype)
    total = (row,)
    for _ in tl.static_range(TILE_Y - 1):
        total = total + (row,)
    for word in range(words):
        bits = tl.load(words_at + word)
        while bits != 0:
            lowest = bits & -bits
            bits = bits ^ lowest
            k = (word * 32 + _exponent(lowest)).to(tl.int64)
            x1, y1 = tl.load(rois + 5 * k + 1) * scale, tl.load(rois + 5 * k + 2) * scale
            x2, y2 = tl.load(rois + 5 * k + 3) * scale, tl.load(rois + 5 * k + 4) * scale
            y_start, y_size = to_map(y1, y2, ALIGNED)
            x_start, x_size = to_map(x1, x2, ALIGNED)
            y_bin, x_bin = divide(y_size, BINS_Y * 1.0), divide(x_size, BINS_X * 1.0)
            first_bin, stop_bin = _bins_within(y_start, y_size, y_bin, y_low, y_high, BINS_Y)
            for q in range(0, BINS_X, RUN):
                weights = ()
                for i in tl.static_range(RUN):
                    weight = _weight(columns, x_start, x_bin, q + i, x_low, x_high, x_extent, RATIO)
                    weights = weights + (weight,)
                for p in range(first_bin, stop_bin):
                    bins = grad + (k * roi_stride + p * grad_y + q * grad_x)
                    row = tl.zeros_like(row)
                    for i in tl.static_range(RUN):
                        look = channel < tl.where(q + i < BINS_X, channels, 0)
                        value = tl.load(bins + i * grad_x, tl.expand_dims(look, 1 - across), 0)
                        row = _add(row, value.to(dtype), weights[i])
                    sums = ()
                    for y in tl.static_range(TILE_Y):
                        cell = y_low + (1 + y)
                        y_weight = _weight(cell, y_start, y_bin, p, cell - 1, cell + 1, y_extent, RATIO)
                        sums = sums + (_add(total[y], row, y_weight),)
                    total = sums

    grads_at = pointer_of(grads, level) + image * whole_of(image_strides, level)
    grads_at += tl.expand_dims(channel * whole_of(channel_strides, level), 1 - across)
    x = x_first + tl.arange(0, TILE_X)
    grads_at += tl.expand_dims(x * whole_of(column_strides, level), across)
    here &= tl.expand_dims(x < width, across)
    for i in tl.static_range(TILE_Y):
        y = y_first + i
        result = total[i].to(grads[0].dtype.element_ty)
        tl.store(grads_at + y * whole_of(row_strides, level), result, here & (y < height))
