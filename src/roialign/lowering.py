"""Both operators written out in plain ATen, for programs that leave Python.

The graph is made once and then serves any boxes: no shape depends on their values. All maps become
one table of cells, channels innermost, and each RoI carries the size and the scale of its map and the
row of the table where it begins. A bin is then a weighted sum of rows of the table: an `embedding_bag`,
which every backend of PyTorch has, which takes no memory beside its result, and whose backward adds in
a fixed order. A grid of up to 4 x 4 points is one such sum; a larger or an adaptive one is a
`while_loop` over blocks of points, as long as the largest grid of the call.

Scratch is the table, a copy of the maps, and the list of rows of each bin; it does not grow with a grid
that is looped over.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._higher_order_ops.while_loop  # puts it into torch.ops
from torch import Tensor

from .levels import assign_levels, map_levels_of
from .ops import DTYPES, is_channels_last

_ONE_SUM = 4  # a fixed grid of up to so many points per axis is one sum
_BLOCK = 2  # of a larger grid, points per axis in each turn of the loop

aten = torch.ops.aten


class Axis(NamedTuple):
    """The sampling points of every bin along one axis of its map. Floats: a grid may exceed any integer."""

    bin_start: Tensor  # (K, bins) in cells of the map
    bin_size: Tensor  # (K, 1)
    grid: Tensor  # (K, 1) points per bin
    first: Tensor  # (K, bins) of them, the first that may meet the map
    number: Tensor  # (K, bins) and how many may
    extent: Tensor  # (K, 1) of the map, in cells, at least 1


class Layout(NamedTuple):
    """Where every RoI lies."""

    ys: Axis
    xs: Axis
    first_row: Tensor  # (K,) int64, row of the table where the image of the RoI begins
    row_length: Tensor  # (K,) int64, cells in a row of its map
    poolable: Tensor  # (K,) bool: finite box, existing image and level


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of this package, each with its form in plain ATen."""
    return {
        torch.ops.roialign.multiscale_roi_align.default: forward,
        torch.ops.roialign.multiscale_roi_align_backward.default: backward,
    }


def forward(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> Tensor:
    """The operator `roialign::multiscale_roi_align`.

    An image or a level that does not exist gives NaN on every device: a graph cannot raise.
    """
    first = features[0]
    images, channels = first.shape[:2]
    sizes = [(f.shape[2], f.shape[3]) for f in features]
    pooled = (pooled_height, pooled_width)
    level = _level(rois, levels, scales, canonical_scale, canonical_level)
    layout = _lay_out(rois, level, images, sizes, pooled, scales, sampling_ratio, aligned)
    # Carried in the working precision: embedding_bag would round the weights to the precision of its table.
    cells = [f.movedim(1, 3).reshape(-1, channels).to(rois.dtype) for f in features]
    table = torch.cat([rois.new_zeros((1, channels)), *cells])  # the first row is for points off the map

    def pool(row: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        bins, taps = row.shape
        start = torch.arange(bins, device=row.device) * taps
        bag = aten._embedding_bag_forward_only.default
        total: Tensor = bag(table, row.flatten(), start, False, 0, False, weight.flatten())[0]
        return total

    bins = rois.shape[0] * pooled_height * pooled_width
    total = _over_points(pool, layout, table, (bins, channels), sampling_ratio)
    total = total.view(rois.shape[0], *pooled, channels)
    return _in_memory_format(total.to(first.dtype).movedim(3, 1), is_channels_last(first))


def backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[bool],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> list[Tensor]:
    """The operator `roialign::multiscale_roi_align_backward`, with the same bits every time."""
    images, channels, *sides = shape
    sizes = list(zip(sides[::2], sides[1::2], strict=True))
    pooled = (grad.shape[2], grad.shape[3])
    level = _level(rois, levels, scales, canonical_scale, canonical_level)
    layout = _lay_out(rois, level, images, sizes, pooled, scales, sampling_ratio, aligned)
    share = grad.movedim(1, 3).reshape(-1, channels).to(rois.dtype)
    rows = [images * height * width for height, width in sizes]

    def scatter(row: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        bins, taps = row.shape
        owner = torch.arange(bins, device=row.device)[:, None].expand(bins, taps).reshape(-1)
        size = torch.full_like(owner[:bins], taps)
        args = (share, row.flatten(), owner, size, size, 1 + sum(rows), False, 0, weight.flatten())
        total: Tensor = aten._embedding_bag_dense_backward.default(*args)
        return total

    total = _over_points(scatter, layout, share, (1 + sum(rows), channels), sampling_ratio)
    _off_the_map, *parts = torch.split(total, [1, *rows])
    return [
        _in_memory_format(part.view(images, *size, channels).to(DTYPES[dtype]).movedim(3, 1), last)
        for part, size, dtype, last in zip(parts, sizes, dtypes, channels_last, strict=True)
    ]


def _in_memory_format(t: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # A copy even where the strides would do: the strides of a single column or channel are ambiguous.
    return t.clone(memory_format=memory_format)


def _level(
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
) -> Tensor:
    if levels is not None:
        return levels
    return assign_levels(rois[:, 1:], map_levels_of(scales), canonical_scale, canonical_level)


def _lay_out(
    rois: Tensor,
    level: Tensor,
    images: int,
    sizes: Sequence[tuple[int, int]],
    pooled: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Layout:
    """Lay each RoI on the map of its level."""
    heights, widths = ([size[axis] for size in sizes] for axis in (0, 1))
    rows = [images * height * width for height, width in sizes]
    # Of 1 cell where there is none: such a map has no RoIs that count, but 0 - 1 is no index.
    height, width = (_of_level(level, extents).clamp(min=1) for extents in (heights, widths))
    start = _of_level(level, [1 + sum(rows[:i]) for i in range(len(rows))])
    image = rois[:, 0]
    corners = rois[:, 1:] * _of_level(level, scales, rois.dtype)[:, None]
    finite = corners.isfinite().all(1) & (corners[:, 2:] - corners[:, :2]).isfinite().all(1)
    exists = (image.trunc() >= 0) & (image < images) & (level >= 0) & (level < len(sizes))
    poolable = finite & exists
    # The others get some place on some map, which _taps replaces.
    x1, y1, x2, y2 = torch.where(poolable[:, None], corners, 0.0).unbind(1)
    image = torch.where(poolable, image, 0.0).long()
    return Layout(
        _axis(y1, y2, pooled[0], height, sampling_ratio, aligned),
        _axis(x1, x2, pooled[1], width, sampling_ratio, aligned),
        start + image * height * width,
        width,
        poolable,
    )


def _of_level(level: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """`values[level]`, without a constant tensor: the values may be symbolic."""
    chosen = torch.full_like(level, values[0], dtype=dtype)
    for i, value in enumerate(values[1:], 1):
        chosen = torch.where(level == i, torch.full_like(chosen, value), chosen)
    return chosen


def _axis(low: Tensor, high: Tensor, bins: int, cells: Tensor, sampling_ratio: int, aligned: bool) -> Axis:
    """As `reference._to_map` and `reference._visits`, with an extent for each RoI."""
    offset = 0.5 if aligned else 0.0
    start = low - offset
    size = high - offset - start
    bin_size = ((size if aligned else size.clamp(min=1.0)) / bins)[:, None]
    bin_start = start[:, None] + torch.arange(bins, device=low.device) * bin_size
    extent = cells[:, None].to(low.dtype)
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
        first, number = torch.zeros_like(bin_start), torch.full_like(bin_start, sampling_ratio)
        return Axis(bin_start, bin_size, grid, first, number, extent)
    grid = bin_size.ceil().clamp(min=0)  # an aligned box may be inside out: no points
    step = torch.where(grid > 0, bin_size / grid, 1.0)
    # One point more on either side, because the division rounds; _points looks at each.
    first = torch.minimum((((-1 - bin_start) / step - 0.5).floor() - 1).clamp(min=0), grid)
    last = torch.minimum(((extent - bin_start) / step - 0.5).ceil() + 1, grid - 1)
    return Axis(bin_start, bin_size, grid, first, (last - first + 1).clamp(min=0), extent)


def _points(axis: Axis, start: Tensor | int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sampling points `start ..`, from the first that may meet the map: cell, weight and whether it does.

    Each `(K, bins, 2 * side)`: the cells below the points, then those above them.
    """
    bin_start, bin_size, grid, first, number, extent = (field[..., None] for field in axis)
    grid = grid.clamp(min=1)
    run = torch.arange(side, device=number.device) + start
    point = bin_start + (first + run + 0.5) * bin_size / grid
    touched = (run < number) & (point >= -1) & (point <= extent)
    point = torch.minimum(torch.where(touched, point, 0.0).clamp(min=0.0), extent - 1)
    low = point.floor()
    high = torch.minimum(low + 1, extent - 1)
    share = point - low  # 0 on the last cell, which then repeats
    weight = torch.cat((1 - share, share), 2) / grid
    return torch.cat((low, high), 2).long(), weight, torch.cat((touched, touched), 2)


def _taps(layout: Layout, start_y: Tensor | int, start_x: Tensor | int, side: int) -> tuple[Tensor, Tensor]:
    """Rows of the table and their weights, for a block of points of each bin: `(K * PH * PW, taps)`."""
    y, y_weight, y_touched = (t[:, :, None, :, None] for t in _points(layout.ys, start_y, side))
    x, x_weight, x_touched = (t[:, None, :, None, :] for t in _points(layout.xs, start_x, side))
    first_row, row_length, poolable = (t[:, None, None, None, None] for t in layout[2:])
    counts = y_touched & x_touched & poolable
    row = torch.where(counts, first_row + y * row_length + x, 0)
    # A RoI that cannot be pooled weighs the row of zeros with NaN.
    weight = torch.where(counts, y_weight * x_weight, torch.where(poolable, 0.0, torch.nan).to(y_weight))
    taps = (2 * side) ** 2
    return row.reshape(-1, taps), weight.reshape(-1, taps)


def _over_points(
    add: Callable[[Tensor, Tensor, Tensor], Tensor],  # of rows, weights and values
    layout: Layout,
    values: Tensor,
    shape: tuple[int, int],  # of the sum
    sampling_ratio: int,
) -> Tensor:
    """The sum over the sampling points of a bin: at once if few and known, else in a loop over blocks."""
    if 0 < sampling_ratio <= _ONE_SUM:
        return add(*_taps(layout, 0, 0, sampling_ratio), values)

    def blocks(axis: Axis) -> Tensor:
        """At least 1, also when there is no RoI.

        AOTInductor takes the memory of what a loop starts from for something else after the loop, even
        when the loop, not run once, has handed on just that: https://github.com/pytorch/pytorch/issues/146213
        """
        number = torch.where(layout.poolable[:, None], axis.number, 1.0).flatten()
        most = torch.cat((number, number.new_ones(1))).amax()
        return (most / _BLOCK).ceil().long()

    wide = blocks(layout.xs)
    turns = blocks(layout.ys) * wide
    fields = (*layout.ys, *layout.xs, *layout[2:])
    axes = len(Axis._fields)

    def unfinished(turn: Tensor, total: Tensor, turns: Tensor, *_rest: Tensor) -> Tensor:
        return turn < turns

    def step(
        turn: Tensor, total: Tensor, turns: Tensor, wide: Tensor, values: Tensor, *fields: Tensor
    ) -> tuple[Tensor, Tensor]:
        layout = Layout(Axis(*fields[:axes]), Axis(*fields[axes : 2 * axes]), *fields[2 * axes :])
        taps = _taps(layout, turn // wide * _BLOCK, turn % wide * _BLOCK, _BLOCK)
        return turn + 1, total + add(*taps, values)

    start = torch.zeros((), dtype=torch.int64, device=values.device), values.new_zeros(shape)
    loop: Any = torch.ops.higher_order.while_loop(unfinished, step, start, (turns, wide, values, *fields))
    result: Tensor = loop[1]
    return result
