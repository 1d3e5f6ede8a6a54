"""The kernels: what runs on the GPU, and nothing that runs beside it.

Coordinates are computed in the order of `reference.py`, with correctly rounded divisions; so that no
multiplication and addition of theirs are fused, kernels are launched with `enable_fp_fusion=False` and
say `tl.fma` where sums may be. So a sampling point lies on the same side of a boundary in every engine.

Integers of the maps come as `2 * n + 3` (see `engine.plain`) and floats as summands (see `engine.exact`).
"""

import triton
import triton.language as tl

UNROLLED = tl.constexpr(4)  # the largest grid whose loops are laid out


@triton.jit
def _whole(plain):
    """The integer that `engine.plain` wrapped."""
    return (plain.to(tl.int64) - 3) >> 1


@triton.jit
def _number(summands, DTYPE: tl.constexpr):
    """The float that `engine.exact` split."""
    total = tl.zeros((), DTYPE)
    for i in tl.static_range(len(summands)):
        total += summands[i]
    return total


@triton.jit
def _whole_of(plains, level):
    """The integer of a level, or of a vector of levels."""
    result = tl.where(level == 0, _whole(plains[0]), 0)
    for i in tl.static_range(1, len(plains)):
        result = tl.where(level == i, _whole(plains[i]), result)
    return result


@triton.jit
def _number_of(numbers, level, DTYPE: tl.constexpr):
    """The float of a level, or of a vector of levels."""
    result = tl.where(level == 0, _number(numbers[0], DTYPE), 1.0)
    for i in tl.static_range(1, len(numbers)):
        result = tl.where(level == i, _number(numbers[i], DTYPE), result)
    return result.to(DTYPE)


@triton.jit
def _multiple(n, FACTOR: tl.constexpr):
    """`n`, which is a multiple of a factor, such that the compiler sees it and reads several at once."""
    if FACTOR > 1:
        return n // FACTOR * FACTOR
    else:
        return n


@triton.jit
def _pointer_of(pointers, level):
    result = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        result = tl.where(level == i, pointers[i], result)
    return result


@triton.jit
def _divide(a, b):
    """Correctly rounded, which `/` is in float64 alone."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _root(a):
    """Correctly rounded, which `sqrt` is in float64 alone."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def _share(a, grid, RATIO: tl.constexpr):
    """`a / grid`, correctly rounded. To divide by a power of two is to multiply."""
    if RATIO > 0 and (RATIO & (RATIO - 1)) == 0:
        return a * (1.0 / RATIO)
    else:
        return _divide(a, grid)


@triton.jit
def _locate(
    rois, levels, k, count, images, scales, canonical_scale, thresholds,
    FINEST: tl.constexpr, DELTAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where RoI `k` lies, or a vector of them: level, image, and start and size of either axis in cells.

    The first result says whether it can be pooled. Where not, the rest names cells of the first map.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    here = k < count
    row = rois + 5 * k
    image = tl.load(row, mask=here, other=-1)
    x1 = tl.load(row + 1, mask=here, other=0)
    y1 = tl.load(row + 2, mask=here, other=0)
    x2 = tl.load(row + 3, mask=here, other=0)
    y2 = tl.load(row + 4, mask=here, other=0)
    if levels is None:
        ratio = _divide(_root((x2 - x1) * (y2 - y1)), _number(canonical_scale, dtype))
        level = tl.where(here, FINEST, 0).to(tl.int64)
        for step in tl.static_range(len(DELTAS)):
            level += tl.where(ratio >= _number(thresholds[step], dtype), DELTAS[step], 0)
    else:
        level = tl.load(levels + k, mask=here, other=-1)
    exists = (level >= 0) & (level < len(scales)) & (image > -1) & (image < images)
    level = tl.where(exists, level, 0)
    scale = _number_of(scales, level, dtype)
    x1, y1, x2, y2 = x1 * scale, y1 * scale, x2 * scale, y2 * scale
    extent = tl.maximum(tl.abs(x2 - x1), tl.abs(y2 - y1))
    finite = (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    finite &= (tl.abs(x2 - x1) < float("inf")) & (tl.abs(y2 - y1) < float("inf"))
    poolable = exists & finite & (extent == extent)
    image = tl.where(poolable, image, 0).to(tl.int64)
    y_start, y_size = _to_map(tl.where(poolable, y1, 0.0), tl.where(poolable, y2, 0.0), ALIGNED)
    x_start, x_size = _to_map(tl.where(poolable, x1, 0.0), tl.where(poolable, x2, 0.0), ALIGNED)
    return poolable, level, image, y_start, y_size, x_start, x_size


@triton.jit
def _to_map(low, high, ALIGNED: tl.constexpr):
    """Start and size along one axis, in cells of the map."""
    offset: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low - offset
    size = high - offset - start
    return start, size if ALIGNED else tl.maximum(size, 1.0)


@triton.jit
def _visits(bin_start, bin_size, low, high, RATIO: tl.constexpr):
    """Points per bin; of them, the first that may lie in `[low, high]`, and how many may."""
    if RATIO > 0:
        grid = bin_size * 0 + RATIO
        return grid, bin_start * 0, tl.full(bin_start.shape, RATIO, tl.int32)
    else:
        grid = tl.maximum(tl.ceil(bin_size), 0.0)
        # Two points more on either side, because the divisions round; _point looks at each.
        step = tl.where(grid > 0, bin_size / tl.maximum(grid, 1.0), 1.0)
        first = tl.minimum(tl.maximum(tl.floor((low - bin_start) / step - 0.5) - 2.0, 0.0), grid)
        last = tl.minimum(tl.ceil((high - bin_start) / step - 0.5) + 2.0, grid - 1.0)
        return tl.maximum(grid, 1.0), first, tl.maximum(last - first + 1.0, 0.0).to(tl.int32)


@triton.jit
def _point(bin_start, bin_size, grid, index, extent, RATIO: tl.constexpr):
    """Sampling point `index` of a bin, clamped to the map, and whether it meets the map."""
    point = bin_start + _share((index + 0.5) * bin_size, grid, RATIO)
    touched = (point >= -1) & (point <= extent)
    return tl.minimum(tl.maximum(tl.where(touched, point, 0.0), 0.0), extent - 1), touched


@triton.jit
def _taps(axis, i, RATIO: tl.constexpr):
    """Of point `i` of every bin: offset of the low cell, of the high one, its share, whether to look."""
    bin_start, bin_size, grid, first, number, extent, stride = axis
    point, touched = _point(bin_start, bin_size, grid, first + i, extent, RATIO)
    low = tl.floor(point)
    high = tl.minimum(low + 1, extent - 1)
    return low.to(tl.int64) * stride, high.to(tl.int64) * stride, point - low, touched & (i < number)


@triton.jit
def _add_row(total, cells, here, inside, i, ys, xs, RATIO: tl.constexpr, ACROSS: tl.constexpr):
    """Add row `i` of the sampling points of every bin."""
    y_taps = _taps(ys, i, RATIO)
    if RATIO > 0 and RATIO <= UNROLLED:
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
    heights, widths, rois, levels, count, images, channels, scales, canonical_scale, thresholds,
    FINEST: tl.constexpr, DELTAS: tl.constexpr, MINE: tl.constexpr,
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
    poolable, level, image, y_start, y_size, x_start, x_size = _locate(
        rois, levels, k, count, images, scales, canonical_scale, thresholds, FINEST, DELTAS, ALIGNED
    )
    if (MINE >> level) & 1 == 0:
        return
    y_extent = _whole_of(heights, level).to(dtype)
    x_extent = _whole_of(widths, level).to(dtype)
    y_stride = _multiple(_whole_of(row_strides, level), INNERMOST)
    x_stride = _multiple(_whole_of(column_strides, level), INNERMOST)
    image_offset = image * _multiple(_whole_of(image_strides, level), INNERMOST)
    channel_offset = channel if INNERMOST else channel * _whole_of(channel_strides, level)
    cells = _pointer_of(features, level) + image_offset + tl.expand_dims(channel_offset, 1 - across)
    here = tl.expand_dims(channel < channels, 1 - across)

    p, q = bins // BINS_X, bins % BINS_X
    y_bin, x_bin = _divide(y_size, BINS_Y * 1.0), _divide(x_size, BINS_X * 1.0)
    y_first_cell = y_start + p.to(dtype) * y_bin
    x_first_cell = x_start + q.to(dtype) * x_bin
    y_grid, y_first, y_number = _visits(y_first_cell, y_bin, -1.0, y_extent, RATIO)
    x_grid, x_first, x_number = _visits(x_first_cell, x_bin, -1.0, x_extent, RATIO)
    inside = bins < tl.where(poolable, BINS_Y * BINS_X, 0)

    total = tl.zeros((BLOCK_BINS, BLOCK_CHANNELS) if INNERMOST else (BLOCK_CHANNELS, BLOCK_BINS), dtype)
    ys = (y_first_cell, y_bin, y_grid, y_first, y_number, y_extent, y_stride)
    xs = (x_first_cell, x_bin, x_grid, x_first, x_number, x_extent, x_stride)
    if RATIO > 0 and RATIO <= UNROLLED:
        for i in tl.static_range(RATIO):
            total = _add_row(total, cells, here, inside, i, ys, xs, RATIO, across)
    else:
        for i in range(_most(y_number, RATIO)):
            total = _add_row(total, cells, here, inside, i, ys, xs, RATIO, across)
    total = _share(_share(total, y_grid, RATIO), x_grid, RATIO)
    total = tl.where(poolable, total, float("nan"))

    roi_stride = _multiple(_whole(out_strides[0]), INNERMOST)
    y_stride = _multiple(_whole(out_strides[2]), INNERMOST)
    x_stride = _multiple(_whole(out_strides[3]), INNERMOST)
    channel_offset = channel if INNERMOST else channel * _whole(out_strides[1])
    place = k * roi_stride + tl.expand_dims(channel_offset, 1 - across)
    place += tl.expand_dims(p * y_stride + q * x_stride, across)
    here &= tl.expand_dims(bins < BINS_Y * BINS_X, across)
    tl.store(out + place, total.to(out.dtype.element_ty), here)


@triton.jit
def _tile(tile, first_tiles, heights, widths, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Level, image, first row and first column of a tile, or of a vector of them."""
    level = tile * 0
    for i in tl.static_range(1, len(first_tiles)):
        level += tl.where(tile >= _whole(first_tiles[i]), 1, 0)
    rows = (_whole_of(heights, level) + TILE_Y - 1).to(tl.int32) // TILE_Y
    columns = tl.maximum((_whole_of(widths, level) + TILE_X - 1).to(tl.int32) // TILE_X, 1)
    index = tile - _whole_of(first_tiles, level).to(tl.int32)
    row = index // columns
    rows = tl.maximum(rows, 1)
    return level, row // rows, row % rows * TILE_Y, index % columns * TILE_X


@triton.jit
def _reach(start, size, extent):
    """The first and the last cell along one axis that a RoI may touch: rather too many than too few."""
    eps: tl.constexpr = 2e-6 if start.dtype == tl.float32 else 4e-15
    margin = (tl.abs(start) + tl.abs(size)) * eps  # points are rounded
    low = tl.minimum(start, start + size) - margin
    high = tl.maximum(start, start + size) + margin
    meets = (high >= -1) & (low <= extent)
    first = tl.minimum(tl.floor(low), extent - 1)
    last = tl.maximum(tl.floor(high) + 1, 0.0)
    return tl.where(meets, first, extent), tl.where(meets, last, -1.0)


@triton.jit(do_not_specialize=["count", "images", "tiles", "words"])
def touch(
    mask, heights, widths, first_tiles, tiles, words,
    rois, levels, count, images, scales, canonical_scale, thresholds,
    FINEST: tl.constexpr, DELTAS: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Who touches whom: bit `i` of word `w` of a tile says whether RoI `32 * w + i` may touch it.

    32 RoIs and a block of tiles per program.
    """
    dtype: tl.constexpr = rois.dtype.element_ty
    word, block = tl.program_id(0) % words, tl.program_id(0) // words
    bit = tl.arange(0, 32)
    poolable, level, image, y_start, y_size, x_start, x_size = _locate(
        rois, levels, (word * 32 + bit).to(tl.int64), count, images, scales, canonical_scale, thresholds,
        FINEST, DELTAS, ALIGNED,
    )  # fmt: skip
    top, bottom = _reach(y_start, y_size, _whole_of(heights, level).to(dtype))
    left, right = _reach(x_start, x_size, _whole_of(widths, level).to(dtype))
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
def _bins_within(start, bin_size, low, high, BINS: tl.constexpr):
    """From which bin, to which one no more, points may lie in `[low, high]`."""
    first = tl.floor(_divide(low - start, bin_size) - 0.01)
    stop = tl.floor(_divide(high - start, bin_size) + 0.01) + 1
    first = tl.where(bin_size > 0, tl.minimum(tl.maximum(first, 0.0), BINS), 0.0)
    stop = tl.where(bin_size > 0, tl.minimum(tl.maximum(stop, 0.0), BINS), BINS)
    return first.to(tl.int32), stop.to(tl.int32)


@triton.jit
def _weight(cell, start, bin_size, b, low, high, extent, RATIO: tl.constexpr):
    """Weight of a cell in bin `b`, or of a tensor of cells; its points beyond `[low, high]` have none."""
    bin_start = start + b * bin_size
    grid, first, number = _visits(bin_start, bin_size, low, high, RATIO)
    total = cell * 0
    if RATIO > 0 and RATIO <= UNROLLED:
        for i in tl.static_range(RATIO):
            total += _hat(cell, bin_start, bin_size, grid, i, extent, RATIO)
    else:
        for i in range(number):
            total += _hat(cell, bin_start, bin_size, grid, first + i, extent, RATIO)
    return _share(total, grid, RATIO)


@triton.jit
def _hat(cell, bin_start, bin_size, grid, index, extent, RATIO: tl.constexpr):
    """What a point gives a cell: 1 where it lies, falling to 0 at a distance of one."""
    point, touched = _point(bin_start, bin_size, grid, index, extent, RATIO)
    return tl.where(touched, tl.maximum(1 - tl.abs(cell - point), 0.0), 0.0)


@triton.jit
def _add(total, value, weight):
    """`total + value * weight`, but a weight of zero lets no NaN through."""
    return tl.where(weight != 0, tl.fma(value, weight, total), total)


@triton.jit(do_not_specialize=["count", "tiles", "words"])
def backward(
    grads, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    grad, grad_strides, mask, first_tiles, tiles, words, rois, count, channels, scales,
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
    scale = _number_of(scales, level, dtype)
    height, width = _whole_of(heights, level), _whole_of(widths, level)
    y_extent, x_extent = height.to(dtype), width.to(dtype)
    y_low, x_low = y_first.to(dtype) - 1, x_first.to(dtype) - 1
    y_high, x_high = tl.minimum(y_low + 1 + TILE_Y, y_extent), tl.minimum(x_low + 1 + TILE_X, x_extent)
    roi_stride, grad_y, grad_x = _whole(grad_strides[0]), _whole(grad_strides[2]), _whole(grad_strides[3])
    grad += tl.expand_dims(channel * _whole(grad_strides[1]), 1 - across)
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
            y_start, y_size = _to_map(y1, y2, ALIGNED)
            x_start, x_size = _to_map(x1, x2, ALIGNED)
            y_bin, x_bin = _divide(y_size, BINS_Y * 1.0), _divide(x_size, BINS_X * 1.0)
            first_bin, stop_bin = _bins_within(y_start, y_bin, y_low, y_high, BINS_Y)
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

    grads_at = _pointer_of(grads, level) + image * _whole_of(image_strides, level)
    grads_at += tl.expand_dims(channel * _whole_of(channel_strides, level), 1 - across)
    x = x_first + tl.arange(0, TILE_X)
    grads_at += tl.expand_dims(x * _whole_of(column_strides, level), across)
    here &= tl.expand_dims(x < width, across)
    for i in tl.static_range(TILE_Y):
        y = y_first + i
        result = total[i].to(grads[0].dtype.element_ty)
        tl.store(grads_at + y * _whole_of(row_strides, level), result, here & (y < height))
