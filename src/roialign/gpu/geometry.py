"""What the kernels share: where RoIs lie on the maps, and where their sampling points do.

Coordinates are computed in the order of `reference.py`, with correctly rounded divisions; so that no
multiplication and addition of theirs are fused, kernels are launched with `enable_fp_fusion=False` and
say `tl.fma` where sums may be. So a sampling point lies on the same side of a boundary in every engine.

Integers of the maps come as `2 * n + 3` (see `engine.plain`) and floats as summands (see `engine.exact`).
"""

import triton
import triton.language as tl

EXACT = tl.constexpr(-1)  # see `taps`
UNROLLED = tl.constexpr(4)  # the largest grid whose loops are laid out


@triton.jit
def whole(plain):
    """The integer that `engine.plain` wrapped."""
    return (plain.to(tl.int64) - 3) >> 1


@triton.jit
def number(summands, DTYPE: tl.constexpr):
    """The float that `engine.exact` split."""
    total = tl.zeros((), DTYPE)
    for i in tl.static_range(len(summands)):
        total += summands[i]
    return total


@triton.jit
def whole_of(plains, level):
    """The integer of a level, or of a vector of levels."""
    result = plains[0].to(tl.int64)
    for i in tl.static_range(1, len(plains)):
        result = tl.where(level == i, plains[i].to(tl.int64), result)
    return (result - 3) >> 1


@triton.jit
def number_of(numbers, level, DTYPE: tl.constexpr):
    """The float of a level, or of a vector of levels."""
    result = tl.where(level == 0, number(numbers[0], DTYPE), 1.0)
    for i in tl.static_range(1, len(numbers)):
        result = tl.where(level == i, number(numbers[i], DTYPE), result)
    return result.to(DTYPE)


@triton.jit
def multiple(n, FACTOR: tl.constexpr):
    """`n`, which is a multiple of a factor, such that the compiler sees it and reads several at once."""
    if FACTOR > 1:
        return n // FACTOR * FACTOR
    else:
        return n


@triton.jit
def pointer_of(pointers, level):
    """The pointer of a level."""
    result = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        result = tl.where(level == i, pointers[i], result)
    return result


@triton.jit
def divide(a, b):
    """Correctly rounded, which `/` is in float64 alone."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def share(a, grid, RATIO: tl.constexpr):
    """`a / grid`, correctly rounded. To divide by a power of two is to multiply."""
    if RATIO > 0 and (RATIO & (RATIO - 1)) == 0:
        return a * (1.0 / RATIO)
    else:
        return divide(a, grid)


@triton.jit
def locate(
    rois, levels, k, count, images, scales, thresholds, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where RoI `k` lies, or a vector of them: level, image, and for y and for x what `to_map` says.

    Scales are those of y and those of x, or once those of both. The first result says whether the RoI can be
    pooled. Where not, the rest names cells of the first map.
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
        area = (x2 - x1) * (y2 - y1)
        level = tl.where(here, ORDER[0], 0).to(tl.int64)
        for step in tl.static_range(len(thresholds)):
            level = tl.where(area >= number(thresholds[step], dtype), ORDER[step + 1], level)
    else:
        level = tl.load(levels + k, mask=here, other=-1)
    exists = (level >= 0) & (level < len(scales[0])) & (image > -1) & (image < images)
    level = tl.where(exists, level, 0)
    y_scale, x_scale = number_of(scales[0], level, dtype), number_of(scales[-1], level, dtype)
    x1, y1, x2, y2 = x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale
    finite = (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    finite &= (tl.abs(x2 - x1) < float("inf")) & (tl.abs(y2 - y1) < float("inf"))
    poolable = exists & finite
    image = tl.where(poolable, image, 0).to(tl.int64)
    y = to_map(tl.where(poolable, y1, 0.0), tl.where(poolable, y2, 0.0), y_scale, ALIGNED)
    x = to_map(tl.where(poolable, x1, 0.0), tl.where(poolable, x2, 0.0), x_scale, ALIGNED)
    return poolable, level, image, y, x


@triton.jit
def to_map(low, high, scale, ALIGNED: tl.constexpr):
    """Start and size along one axis, in cells of the map, and how fast either changes with the box.

    A size that was widened does not grow.
    """
    offset: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low - offset
    size = high - offset - start
    if ALIGNED:
        return start, size, scale, scale
    else:
        return start, tl.maximum(size, 1.0), scale, tl.where(size >= 1, scale, 0.0)


@triton.jit
def rates_of(along, BINS: tl.constexpr, DERIVATIVE: tl.constexpr):
    """How fast the first bin's start moves, and how fast every bin grows, with a column of the rois."""
    _, _, scale, growth = along
    growth = divide(growth, BINS * 1.0)
    if DERIVATIVE <= 2:
        return scale, -growth
    else:
        return scale * 0, growth


@triton.jit
def visits(bin_start, bin_size, low, high, RATIO: tl.constexpr):
    """Points per bin; of them, the first that may lie in `[low, high]`, and how many may."""
    if RATIO > 0:
        grid = bin_size * 0 + RATIO
        return grid, bin_start * 0, tl.full(bin_start.shape, RATIO, tl.int32)
    else:
        grid = tl.maximum(tl.ceil(bin_size), 0.0)
        # Two points more on either side, because the divisions round; sample_point looks at each.
        step = tl.where(grid > 0, bin_size / tl.maximum(grid, 1.0), 1.0)
        first = tl.minimum(tl.maximum(tl.floor((low - bin_start) / step - 0.5) - 2.0, 0.0), grid)
        last = tl.minimum(tl.ceil((high - bin_start) / step - 0.5) + 2.0, grid - 1.0)
        return tl.maximum(grid, 1.0), first, tl.maximum(last - first + 1.0, 0.0).to(tl.int32)


@triton.jit
def sample_point(bin_start, bin_size, grid, index, extent, RATIO: tl.constexpr):
    """Sampling point `index` of a bin, clamped to the map, and whether it meets the map."""
    return clamp(bin_start + share((index + 0.5) * bin_size, grid, RATIO), extent)


@triton.jit
def clamp(point, extent):
    """A point, clamped to the map, and whether it meets the map."""
    touched = (point >= -1) & (point <= extent)
    return tl.minimum(tl.maximum(tl.where(touched, point, 0.0), 0.0), extent - 1), touched


@triton.jit
def slope_at(bin_start, bin_size, grid, index, extent, rates, RATIO: tl.constexpr):
    """How fast sampling point `index` moves; 0 where the map is level. `rates` are those of the bin."""
    rate = rates[0] + share(grid * 0 + (index + 0.5), grid, RATIO) * rates[1]
    return unless_level(bin_start + share((index + 0.5) * bin_size, grid, RATIO), rate, extent)


@triton.jit
def unless_level(point, rate, extent):
    """How fast a point moves; 0 before the first cell and after the last, where the map is level."""
    return tl.where((point >= 0) & (point < extent - 1), rate, 0.0)


@triton.jit
def rates_of_bin(rates, b):
    """How fast the start of a bin moves, or of a vector of them, and how fast it grows."""
    return rates[0] + b * rates[1], rates[1]


@triton.jit
def most(numbers):
    """The largest of a vector of counts."""
    return tl.max(numbers, 0)


@triton.jit
def weight_of(cell, start, bin_size, b, extent, rates, RATIO: tl.constexpr):
    """The weights of a vector of cells in bin `b`, or of one cell each in a vector of bins.

    `rates` are those of a derivative along this axis, or None.
    """
    bin_start = start + b * bin_size + cell * 0
    of_bin = None if rates is None else rates_of_bin(rates, b)
    if RATIO == EXACT:
        bin_end = start + (b + 1) * bin_size + cell * 0
        if rates is None:
            return _integral(cell, bin_start, bin_end, extent)
        else:
            return _moved_integral(cell, bin_start, bin_end, extent, of_bin)
    else:
        grid, first, number = visits(bin_start, bin_size, cell - 1, cell + 1, RATIO)
        total = cell * 0
        if RATIO > 0 and RATIO <= UNROLLED:
            for i in tl.static_range(RATIO):
                total += _given(cell, bin_start, bin_size, grid, i, extent, of_bin, RATIO)
        else:
            for i in range(most(number)):
                given = _given(cell, bin_start, bin_size, grid, first + i, extent, of_bin, RATIO)
                total += tl.where(i < number, given, 0.0)
        return share(total, grid, RATIO)


@triton.jit
def ends_of(bin_start, bin_end, extent):
    """Where a bin enters and leaves the map, its length, and whether it meets the map; see `taps.Pieces`."""
    low, high = tl.minimum(bin_start, bin_end), tl.maximum(bin_start, bin_end)
    length = high - low
    meets = (high >= -1) & (low <= extent) & (((high > -1) & (low < extent)) | (length == 0))
    return tl.maximum(low, -1.0), tl.minimum(high, extent), length, meets


@triton.jit
def _integral(cell, bin_start, bin_end, extent):
    """Of the hat of a cell over a bin, divided by its length: of two pieces, each linear.

    Beyond the outermost centres the map goes on for a cell as it is there.
    """
    low, high, length, meets = ends_of(bin_start, bin_end, extent)
    left = tl.minimum(high, cell) - tl.maximum(low, cell - 1)
    right = tl.minimum(high, cell + 1) - tl.maximum(low, cell)
    rising = 1 - (cell - (tl.minimum(high, cell) + tl.maximum(low, cell - 1)) * 0.5)
    falling = 1 - ((tl.minimum(high, cell + 1) + tl.maximum(low, cell)) * 0.5 - cell)
    total = tl.maximum(left, 0.0) * tl.where(cell == 0, 1.0, rising)
    total += tl.maximum(right, 0.0) * tl.where(cell == extent - 1, 1.0, falling)
    point = tl.minimum(tl.maximum(low, 0.0), extent - 1)  # of a bin without length
    at_point = tl.maximum(1 - tl.abs(cell - point), 0.0)
    total = tl.where(length > 0, divide(total, tl.where(length > 0, length, 1.0)), at_point)
    return tl.where(meets, total, 0.0)


@triton.jit
def _moved_integral(cell, bin_start, bin_end, extent, rates):
    """The derivative of a mean over a bin: what is at its ends, as these move, against the mean."""
    low, _, length, meets = ends_of(bin_start, bin_end, extent)
    start_rate, end_rate = rates[0], rates[0] + rates[1]
    first, starts_within = clamp(bin_start, extent)
    last, ends_within = clamp(bin_end, extent)
    at_start, at_end = _hat(cell, first, starts_within), _hat(cell, last, ends_within)
    total = _integral(cell, bin_start, bin_end, extent) * (start_rate - end_rate)
    total += at_end * end_rate - at_start * start_rate
    total = divide(total, tl.where(length > 0, bin_end - bin_start, 1.0))
    at_point = _rise(cell, low, unless_level(low, (start_rate + end_rate) * 0.5, extent))
    return tl.where(meets, tl.where(length > 0, total, at_point), 0.0)


@triton.jit
def _given(cell, bin_start, bin_size, grid, index, extent, rates, RATIO: tl.constexpr):
    """What a point gives a cell; of a derivative as it moves, by the `rates` of the bin."""
    point, touched = sample_point(bin_start, bin_size, grid, index, extent, RATIO)
    if rates is None:
        return _hat(cell, point, touched)
    else:
        return _rise(cell, point, slope_at(bin_start, bin_size, grid, index, extent, rates, RATIO))


@triton.jit
def _hat(cell, point, touched):
    """1 where a point lies, falling to 0 at a distance of one."""
    return tl.where(touched, tl.maximum(1 - tl.abs(cell - point), 0.0), 0.0)


@triton.jit
def _rise(cell, point, slope):
    """The weights of a slope: one against the other, of the cells around a point."""
    low = tl.floor(point)
    return tl.where(cell == low + 1, slope, tl.where(cell == low, -slope, 0.0))


@triton.jit
def _rounding(start, size):
    """How far from where it should be, at most, rounding may put a sampling point of a RoI."""
    eps: tl.constexpr = 2e-6 if start.dtype == tl.float32 else 4e-15
    return (tl.abs(start) + tl.abs(size)) * eps


@triton.jit
def reach(start, size, extent):
    """The first and the last cell along one axis that a RoI may touch: rather too many than too few."""
    margin = _rounding(start, size)
    low = tl.minimum(start, start + size) - margin
    high = tl.maximum(start, start + size) + margin
    meets = (high >= -1) & (low <= extent)
    first = tl.minimum(tl.maximum(tl.floor(low), 0.0), extent - 1)
    last = tl.minimum(tl.maximum(tl.floor(high) + 1, 0.0), extent - 1)
    return tl.where(meets, first, extent), tl.where(meets, last, -1.0)


@triton.jit
def bins_within(start, size, bin_size, low, high, BINS: tl.constexpr):
    """From which bin, to which one no more, points may lie in `[low, high]`."""
    margin = _rounding(start, size)
    first = tl.floor(divide(low - margin - start, bin_size) - 0.01)
    stop = tl.floor(divide(high + margin - start, bin_size) + 0.01) + 1
    first = tl.where(bin_size > 0, tl.minimum(tl.maximum(first, 0.0), BINS), 0.0)
    stop = tl.where(bin_size > 0, tl.minimum(tl.maximum(stop, 0.0), BINS), BINS)
    return first.to(tl.int32), stop.to(tl.int32)
