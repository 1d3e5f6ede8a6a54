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

from . import schema
from .layout import is_channels_last
from .schema import DTYPES, Maps, Pooling
from .taps import Pieces, Points, lay_points, taps_of

_ONE_SUM = 4  # a fixed grid of up to so many points per axis is one sum
_BLOCK = 2  # of a larger grid, points per axis in each turn of the loop

aten = torch.ops.aten


class Layout(NamedTuple):
    """Where every RoI lies."""

    ys: Points | Pieces
    xs: Points | Pieces
    first_row: Tensor  # (K,) int64, row of the table where the image of the RoI begins
    poolable: Tensor  # (K,) bool: finite box, existing image and level


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of this package, each with its form in plain ATen."""
    return {schema.forward_operator(): forward, schema.backward_operator(): backward}


def forward(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, *rest: Any) -> Tensor:
    """The operator `roialign::multiscale_roi_align`.

    An image or a level that does not exist gives NaN on every device: a graph cannot raise.
    """
    pooling = Pooling(*rest)
    first = features[0]
    images, channels = first.shape[:2]
    layout = _lay_out(rois, levels, images, [(f.shape[2], f.shape[3]) for f in features], pooling)
    # Carried in the working precision: embedding_bag would round the weights to the precision of its table.
    cells = [f.movedim(1, 3).reshape(-1, channels).to(rois.dtype) for f in features]
    table = torch.cat([rois.new_zeros((1, channels)), *cells])  # the first row is for points off the map

    def pool(row: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        bins, taps = row.shape
        start = torch.arange(bins, device=row.device) * taps
        bag = aten._embedding_bag_forward_only.default
        total: Tensor = bag(table, row.flatten(), start, False, 0, False, weight.flatten())[0]
        return total

    height, width = pooling.output_size
    bins = rois.shape[0] * height * width
    total = _over_points(pool, layout, table, (bins, channels), pooling.sampling_ratio)
    total = total.view(rois.shape[0], height, width, channels)
    return _in_memory_format(total.to(first.dtype).movedim(3, 1), is_channels_last(first))


def backward(grad: Tensor, rois: Tensor, levels: Tensor | None, *rest: Any) -> list[Tensor]:
    """The operator `roialign::multiscale_roi_align_backward`, with the same bits every time."""
    maps, pooling = Maps(*rest[:3]), Pooling(*rest[3:])
    images, channels = maps.shape[:2]
    layout = _lay_out(rois, levels, images, maps.sizes, pooling)
    share = grad.movedim(1, 3).reshape(-1, channels).to(rois.dtype)
    rows = [images * height * width for height, width in maps.sizes]

    def scatter(row: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        bins, taps = row.shape
        owner = torch.arange(bins, device=row.device)[:, None].expand(bins, taps).reshape(-1)
        size = torch.full_like(owner[:bins], taps)
        args = (share, row.flatten(), owner, size, size, 1 + sum(rows), False, 0, weight.flatten())
        total: Tensor = aten._embedding_bag_dense_backward.default(*args)
        return total

    total = _over_points(scatter, layout, share, (1 + sum(rows), channels), pooling.sampling_ratio)
    _off_the_map, *parts = torch.split(total, [1, *rows])
    return [
        _in_memory_format(part.view(images, *size, channels).to(DTYPES[dtype]).movedim(3, 1), last)
        for part, size, dtype, last in zip(parts, maps.sizes, maps.dtypes, maps.channels_last, strict=True)
    ]


def _in_memory_format(t: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # A copy even where the strides would do: the strides of a single column or channel are ambiguous.
    return t.clone(memory_format=memory_format)


def _lay_out(
    rois: Tensor, level: Tensor | None, images: int, sizes: Sequence[tuple[int, int]], pooling: Pooling
) -> Layout:
    """Lay each RoI on the map of its level."""
    if level is None:
        level = pooling.staircase.levels(rois[:, 1:])
    heights, widths = ([size[axis] for size in sizes] for axis in (0, 1))
    rows = [images * height * width for height, width in sizes]
    # Of 1 cell where there is none: such a map has no RoIs that count, but 0 - 1 is no index.
    height, width = (_of_level(level, extents).clamp(min=1) for extents in (heights, widths))
    start = _of_level(level, [1 + sum(rows[:i]) for i in range(len(rows))])
    image = rois[:, 0]
    corners = rois[:, 1:] * _of_level(level, pooling.scales, rois.dtype)[:, None]
    finite = corners.isfinite().all(1) & (corners[:, 2:] - corners[:, :2]).isfinite().all(1)
    exists = (image.trunc() >= 0) & (image < images) & (level >= 0) & (level < len(sizes))
    poolable = finite & exists
    # The others get some place on some map, which _taps replaces.
    x1, y1, x2, y2 = torch.where(poolable[:, None], corners, 0.0).unbind(1)
    image = torch.where(poolable, image, 0.0).long()
    (pooled_height, pooled_width), ratio = pooling.output_size, pooling.sampling_ratio
    return Layout(
        lay_points(y1, y2, pooled_height, height, ratio, pooling.aligned),
        lay_points(x1, x2, pooled_width, width, ratio, pooling.aligned),
        start + image * height * width,
        poolable,
    )


def _of_level(level: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """`values[level]`, without a constant tensor: the values may be symbolic."""
    chosen = torch.full_like(level, values[0], dtype=dtype)
    for i, value in enumerate(values[1:], 1):
        chosen = torch.where(level == i, torch.full_like(chosen, value), chosen)
    return chosen


def _taps(layout: Layout, start_y: Tensor | int, start_x: Tensor | int, side: int) -> tuple[Tensor, Tensor]:
    """Rows of the table and their weights, for a block of points of each bin: `(K * PH * PW, taps)`."""
    y, y_weight, y_touched = (t[:, :, None, :, None] for t in taps_of(layout.ys, start_y, side))
    x, x_weight, x_touched = (t[:, None, :, None, :] for t in taps_of(layout.xs, start_x, side))
    first_row, poolable = (t[:, None, None, None, None] for t in layout[2:])
    row_length = layout.xs.extent[:, :, None, None, None]
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

    def blocks(axis: Points | Pieces) -> Tensor:
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
    kind, axes = type(layout.ys), len(layout.ys)

    def unfinished(turn: Tensor, total: Tensor, turns: Tensor, *_rest: Tensor) -> Tensor:
        return turn < turns

    def step(
        turn: Tensor, total: Tensor, turns: Tensor, wide: Tensor, values: Tensor, *fields: Tensor
    ) -> tuple[Tensor, Tensor]:
        layout = Layout(kind(*fields[:axes]), kind(*fields[axes : 2 * axes]), *fields[2 * axes :])
        taps = _taps(layout, turn // wide * _BLOCK, turn % wide * _BLOCK, _BLOCK)
        return turn + 1, total + add(*taps, values)

    start = torch.zeros((), dtype=torch.int64, device=values.device), values.new_zeros(shape)
    loop: Any = torch.ops.higher_order.while_loop(unfinished, step, start, (turns, wide, values, *fields))
    result: Tensor = loop[1]
    return result
