"""The backward kernels: who touches whom, tiles of the gradient maps as sums over RoIs, and sums of parts."""

import triton
import triton.language as tl

from .geometry import locate, multiple, pointer_of, reach, whole, whole_of
from .tables import APART, BLOCK, HEAD, HIGH, LONGEST, LOW, OF_X, ORIGIN, STEP, unpack, write_runs

WORD = tl.constexpr(32)  # bits
WORDS = tl.constexpr(4)  # that are written at once


@triton.jit
def _level_of(i, firsts):
    """The level that something belongs to, or each of a vector, given the first of every level."""
    level = i * 0
    for j in tl.static_range(1, len(firsts)):
        level = tl.where(i >= whole(firsts[j]), j, level)
    return level


@triton.jit
def _tile(tile, first_tiles, heights, widths, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Level, image, first row and first column of a tile, or of a vector of them."""
    level = _level_of(tile, first_tiles)
    rows = (whole_of(heights, level) + TILE_Y - 1).to(tl.int32) // TILE_Y
    columns = (whole_of(widths, level) + TILE_X - 1).to(tl.int32) // TILE_X
    index = tile - whole_of(first_tiles, level).to(tl.int32)
    row = index // columns
    return level, row // rows, row % rows * TILE_Y, index % columns * TILE_X


@triton.jit(
    do_not_specialize=["row_length", "length", "height", "width", "tiles", "words", "count", "images"]
)
def prepare(
    rows, row_length, numbers, length, height, width, summary, mask, first_tiles, tiles, words,
    heights, widths, rois, levels, count, images, scales, thresholds, turned, grad, grad_strides, channels,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    RATIO: tl.constexpr, DERIVATIVE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_TILES: tl.constexpr,
    TURN: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write who touches whom, the tables of one axis of a RoI, or some of its gradient `TURN`ed around.

    Bit `i` of word `w` of a tile says whether RoI `32 * w + i` may touch it, and bit `j` of number `s` of its
    summary whether its word `32 * s + j` has any: of those words alone that have is anything written.
    """
    program = tl.program_id(0)
    summaries = (words + WORD - 1) // WORD
    touching = summaries * ((tiles + BLOCK_TILES - 1) // BLOCK_TILES)
    if program < touching:
        _touch(
            summary, mask, program % summaries, program // summaries, first_tiles, tiles, words,
            heights, widths, rois, levels, count, images, scales, thresholds,
            ORDER, ALIGNED, TILE_Y, TILE_X, BLOCK_TILES,
        )  # fmt: skip
    elif program < touching + 2 * count:
        program -= touching
        write_runs(
            rows, row_length, numbers, length, height, width, heights, widths,
            rois, levels, (program // 2).to(tl.int64), program % 2, count, images, scales, thresholds,
            ORDER, ALIGNED, BINS_Y, BINS_X, RATIO, DERIVATIVE, True, BLOCK,
        )  # fmt: skip
    elif TURN:
        program -= touching + 2 * count
        _turn(
            turned, grad, grad_strides, program, count, channels, BINS_Y, BINS_X, BLOCK_BINS, BLOCK_CHANNELS
        )


@triton.jit
def _turn(
    turned, grad, grad_strides, program, count, channels,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of bins and channels of a RoI's gradient, with the channels innermost."""
    PARTS: tl.constexpr = (BINS_Y * BINS_X + BLOCK_BINS - 1) // BLOCK_BINS
    bins, program = program % PARTS * BLOCK_BINS + tl.arange(0, BLOCK_BINS)[None, :], program // PARTS
    k = (program % count).to(tl.int64)
    channel = (program // count * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)[:, None]
    here = (channel < channels) & (bins < BINS_Y * BINS_X)
    at = k * whole(grad_strides[0]) + channel * whole(grad_strides[1])
    at += bins // BINS_X * whole(grad_strides[2]) + bins % BINS_X * whole(grad_strides[3])
    value = tl.load(grad + at, here)
    tl.store(turned + (k * (BINS_Y * BINS_X) + bins) * channels + channel, value, here)


@triton.jit
def _touch(
    summary, mask, s, block, first_tiles, tiles, words,
    heights, widths, rois, levels, count, images, scales, thresholds,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Number `s` of the summaries of a block of tiles, and its words."""
    dtype: tl.constexpr = rois.dtype.element_ty
    tile = block * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    tile_level, tile_image, y, x = _tile(tile, first_tiles, heights, widths, TILE_Y, TILE_X)
    first_image, last_image = tl.min(tile_image, 0), tl.max(tile_image, 0)
    y, x = y.to(dtype)[:, None], x.to(dtype)[:, None]
    bit = tl.arange(0, WORDS * WORD)
    some = tile * 0
    for j in range(0, tl.minimum(words - s * WORD, WORD), WORDS):
        k = ((s * WORD + j) * WORD + bit).to(tl.int64)
        near = tl.load(rois + 5 * k, k < count, -1)
        if tl.max(((near >= first_image) & (near < last_image + 1)).to(tl.int32), 0) == 1:
            poolable, level, image, along_y, along_x = locate(
                rois, levels, k, count, images, scales, thresholds, ORDER, ALIGNED
            )
            top, bottom = reach(along_y[0], along_y[1], whole_of(heights, level).to(dtype))
            left, right = reach(along_x[0], along_x[1], whole_of(widths, level).to(dtype))
            hit = (tile_level[:, None] == level[None, :]) & (tile_image[:, None] == image[None, :])
            hit &= (top[None, :] < y + TILE_Y) & (bottom[None, :] >= y)
            hit &= (left[None, :] < x + TILE_X) & (right[None, :] >= x)
            bits = tl.where(hit & poolable[None, :], (1 << bit % WORD)[None, :], 0)
            bits = tl.sum(tl.reshape(bits, (BLOCK_TILES, WORDS, WORD)), 2)
            number = j + tl.arange(0, WORDS)
            at = mask + tile.to(tl.int64)[:, None] * words + (s * WORD + number)[None, :]
            tl.store(at, bits, (tile < tiles)[:, None] & (bits != 0))
            some |= tl.sum(tl.where(bits != 0, (1 << number)[None, :], 0), 1)
    tl.store(summary + tile.to(tl.int64) * ((words + WORD - 1) // WORD) + s, some, tile < tiles)


@triton.jit
def _exponent(power):
    """`i`, of `1 << i` in 32 bits, by way of a float's exponent."""
    number = power.to(tl.uint32, bitcast=True).to(tl.float32)
    return (number.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _add_roi(
    total, row, weights, grad, channels, here, y_first, columns, height,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, TILE_Y: tl.constexpr,
):  # fmt: skip
    """Add what a RoI gives to the rows of a tile: to each cell from the bins that read it."""
    of_x = row + OF_X
    x_low, x_high = tl.load(of_x + LOW), tl.load(of_x + HIGH)
    inside = (columns >= x_low) & (columns <= x_high)
    x_bin, x_length = unpack(tl.load(row + HEAD + height + columns - x_low, inside, 0))
    x_weights = weights + height + APART * BINS_Y - tl.load(of_x + ORIGIN) + columns
    x_step, x_longest = tl.load(of_x + STEP), tl.load(of_x + LONGEST).to(tl.int32)
    y_low, y_high = tl.load(row + LOW), tl.load(row + HIGH)
    y_bins, y_lengths = (), ()
    for i in tl.static_range(TILE_Y):
        y = y_first + i
        first, length = unpack(tl.load(row + HEAD + y - y_low, (y >= y_low) & (y <= y_high), 0))
        y_bins, y_lengths = y_bins + (first,), y_lengths + (length,)
    y_weights = weights - tl.load(row + ORIGIN) + y_first
    y_step, y_longest = tl.load(row + STEP), tl.load(row + LONGEST).to(tl.int32)
    for s in range(y_longest):
        along_y = ()
        for i in tl.static_range(TILE_Y):
            weight = tl.load(y_weights + i + y_step * (y_bins[i] + s), s < y_lengths[i], 0)
            along_y = along_y + (weight,)
        for t in range(x_longest):
            q = x_bin + t
            along_x = tl.load(x_weights + x_step * q, t < x_length, 0)
            sums = ()
            for i in tl.static_range(TILE_Y):
                product = (along_y[i] * along_x)[:, None]
                # A weight of zero lets no NaN through.
                look = product != 0 if here is None else here & (product != 0)
                at = grad + (((y_bins[i] + s) * BINS_X + q) * channels)[:, None]
                value = tl.load(at, look, 0).to(total[i].dtype)
                sums = sums + (tl.fma(value, product, total[i]),)
            total = sums
    return total


@triton.jit(do_not_specialize=["units", "row_length", "length", "height", "words", "channels"])
def backward(
    grads, image_strides, channel_strides, row_strides, column_strides, heights, widths,
    sums, first_sums, steps, parts, first_units, units, first_tiles,
    grad, rows, row_length, numbers, length, height, summary, mask, words, channels,
    MINE: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, MULTIPLE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of a gradient map and a block of channels per program, which writes them once.

    RoIs that touch the tile are added in ascending order. On a coarse map, where a tile may have very many,
    each of some `parts` is summed by a program of its own: part `i` has the RoIs `i + n * parts`. In `grad`
    the channels lie innermost, a number of them that `CHANNELS` divides. In the maps they do unless
    `MULTIPLE` is 0, and then it divides all other strides.
    """
    dtype: tl.constexpr = numbers.dtype.element_ty
    program = tl.program_id(0)
    unit, block = units - 1 - program % units, program // units  # coarse maps first: they take longest
    level = _level_of(unit, first_units)
    if (MINE >> level) & 1 == 0:
        return
    n_parts = whole_of(parts, level).to(tl.int32)
    index = unit - whole_of(first_units, level).to(tl.int32)
    part, tile = index % n_parts, index // n_parts + whole_of(first_tiles, level).to(tl.int32)
    _, image, y_first, x_first = _tile(tile, first_tiles, heights, widths, TILE_Y, TILE_X)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    columns = x_first + tl.arange(0, TILE_X)
    here = None if CHANNELS % BLOCK_CHANNELS == 0 else (channel < channels)[None, :]
    # The bits of a word that are of this part.
    mine = ((0xFFFFFFFF // ((1 << n_parts.to(tl.int64)) - 1)) << part).to(tl.int32)

    row = tl.zeros((TILE_X, BLOCK_CHANNELS), dtype)
    total = (row,)
    for _ in tl.static_range(TILE_Y - 1):
        total = total + (row,)
    summaries = (words + WORD - 1) // WORD
    channels = multiple(channels, CHANNELS)
    for s in range(summaries):
        some = tl.load(summary + tile.to(tl.int64) * summaries + s)
        while some != 0:
            word = s * WORD + _exponent(some & -some)
            some = some & (some - 1)
            bits = tl.load(mask + tile.to(tl.int64) * words + word) & mine
            while bits != 0:
                k = (word * WORD + _exponent(bits & -bits)).to(tl.int64)
                bits = bits & (bits - 1)
                total = _add_roi(
                    total, rows + k * row_length, numbers + k * length,
                    grad + k * (BINS_Y * BINS_X) * channels + channel[None, :],
                    channels, here, y_first, columns, height, BINS_Y, BINS_X, TILE_Y,
                )  # fmt: skip

    channel = channel.to(tl.int64)[None, :]
    row_stride = multiple(whole_of(row_strides, level), MULTIPLE)
    column_stride = multiple(whole_of(column_strides, level), MULTIPLE)
    at = image * multiple(whole_of(image_strides, level), MULTIPLE) + y_first * row_stride
    at += channel if MULTIPLE else channel * whole_of(channel_strides, level)
    at += (columns * column_stride)[:, None]
    inside = (channel < channels) & (columns < whole_of(widths, level))[:, None]
    rows_left = whole_of(heights, level) - y_first
    if n_parts == 1:
        to = pointer_of(grads, level) + at
        for i in tl.static_range(TILE_Y):
            result = total[i].to(grads[0].dtype.element_ty)
            tl.store(to + i * row_stride, result, inside & (i < rows_left))
    else:
        first = whole_of(first_sums, level) + part * whole_of(steps, level)
        own = sums + multiple(first, MULTIPLE) + at
        for i in tl.static_range(TILE_Y):
            tl.store(own + i * row_stride, total[i], inside & (i < rows_left))


@triton.jit
def add_up(
    grads, sums, first_sums, steps, parts, sizes, first_blocks, MINE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of the parts, in their order, of those maps that have several. These lie without gaps."""
    program = tl.program_id(0)
    level = _level_of(program, first_blocks)
    if (MINE >> level) & 1 == 0:
        return
    size, step = whole_of(sizes, level), whole_of(steps, level)
    at = (program - whole_of(first_blocks, level)) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for part in range(whole_of(parts, level)):
        total += tl.load(sums + whole_of(first_sums, level) + part * step + at, here, 0)
    tl.store(pointer_of(grads, level) + at, total.to(grads[0].dtype.element_ty), here)
