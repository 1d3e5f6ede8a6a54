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

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._higher_order_ops.while_loop  # puts it into torch.ops
from torch import Tensor

from . import schema
from .layout import is_channels_last, memory_format
from .schema import DTYPES, Maps, Pooling
from .taps import Pieces, Points, corners_of, lay_axes, product, taps_of

_ONE_SUM = 64  # a fixed grid is one sum up to so many taps: of 4 x 4 points, or 2 x 2 x 2
_BLOCK = 2  # of a larger grid, points per axis in each turn of the loop

aten = torch.ops.aten


class Layout(NamedTuple):
    """Where every RoI lies."""

    axes: Sequence[Points | Pieces]  # in the order of the axes of a map
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
    layout = _lay_out(rois, levels, images, [f.shape[2:] for f in features], pooling)
    # Carried in the working precision: embedding_bag would round the weights to the precision of its table.
    cells = [f.movedim(1, -1).reshape(-1, channels).to(rois.dtype) for f in features]
    table = torch.cat([rois.new_zeros((1, channels)), *cells])  # the first row is for points off the map

    def pool(row: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        bins, taps = row.shape
        start = torch.arange(bins, device=row.device) * taps
        bag = aten._embedding_bag_forward_only.default
        total: Tensor = bag(table, row.flatten(), start, False, 0, False, weight.flatten())[0]
        return total

    bins = rois.shape[0] * math.prod(pooling.output_size)
    total = _over_points(pool, layout, table, (bins, channels), pooling)
    total = total.view(rois.shape[0], *pooling.output_size, channels)
    return _in_memory_format(total.to(first.dtype).movedim(-1, 1), is_channels_last(first))


def backward(grad: Tensor, rois: Tensor, levels: Tensor | None, *rest: Any) -> list[Tensor]:
    """The operator `roialign::multiscale_roi_align_backward`, with the same bits every time."""
    maps, pooling = Maps(*rest[:3]), Pooling(*rest[3:])
    images, channels = maps.shape[:2]
    layout = _lay_out(rois, levels, images, maps.sizes, pooling)
    share = grad.movedim(1, -1).reshape(-1, channels).to(rois.dtype)
    rows = [images * math.prod(size) for size in maps.sizes]

    def scatter(row: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        bins, taps = row.shape
        owner = torch.arange(bins, device=row.device)[:, None].expand(bins, taps).reshape(-1)
        size = torch.full_like(owner[:bins], taps)
        args = (share, row.flatten(), owner, size, size, 1 + sum(rows), False, 0, weight.flatten())
        total: Tensor = aten._embedding_bag_dense_backward.default(*args)
        return total

    total = _over_points(scatter, layout, share, (1 + sum(rows), channels), pooling)
    _off_the_map, *parts = torch.split(total, [1, *rows])
    return [
        _in_memory_format(part.view(images, *size, channels).to(DTYPES[dtype]).movedim(-1, 1), last)
        for part, size, dtype, last in zip(parts, maps.sizes, maps.dtypes, maps.channels_last, strict=True)
    ]


def _in_memory_format(t: Tensor, channels_last: bool) -> Tensor:
    # A copy even where the strides would do: the strides of a single column or channel are ambiguous.
    return t.clone(memory_format=memory_format(t.dim() - 2, channels_last))


def _lay_out(
    rois: Tensor, level: Tensor | None, images: int, sizes: Sequence[Sequence[int]], pooling: Pooling
) -> Layout:
    """Lay each RoI on the map of its level."""
    if level is None:
        level = pooling.staircase.levels(rois[:, 1:])
    rows = [images * math.prod(size) for size in sizes]
    # Of 1 cell where there is none: such a map has no RoIs that count, but 0 - 1 is no index.
    extents = [_of_level(level, extent).clamp(min=1) for extent in zip(*sizes, strict=True)]
    scales = [
        _of_level(level, of_axis, rois.dtype) for of_axis in zip(*pooling.scales_of(len(sizes)), strict=True)
    ]
    start = _of_level(level, [1 + sum(rows[:i]) for i in range(len(rows))])
    image = rois[:, 0]
    corners, finite = corners_of(rois, scales)
    exists = (image.trunc() >= 0) & (image < images) & (level >= 0) & (level < len(sizes))
    poolable = finite & exists
    # The others get some place on some map, which _taps replaces.
    corners = torch.where(poolable[:, None], corners, 0.0)
    image = torch.where(poolable, image, 0.0).long()
    first_row = start + image * math.prod(extents)
    return Layout(lay_axes(corners, extents, scales, pooling), first_row, poolable)


def _of_level(level: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """`values[level]`, without a constant tensor: the values may be symbolic."""
    chosen = torch.full_like(level, values[0], dtype=dtype)
    for i, value in enumerate(values[1:], 1):
        chosen = torch.where(level == i, torch.full_like(chosen, value), chosen)
    return chosen


def _taps(layout: Layout, starts: Sequence[Tensor | int], side: int, lost: float) -> tuple[Tensor, Tensor]:
    """Rows of the table and their weights, for a block of points of each bin: `(K * bins, taps)`.

    A RoI that cannot be pooled weighs the row of zeros with `lost`.
    """
    taps, *inner = (taps_of(axis, start, side) for axis, start in zip(layout.axes, starts, strict=True))
    for axis, more in zip(layout.axes[1:], inner, strict=True):
        taps = product(taps, more, axis.extent)
    first_row, poolable = (t[:, None, None] for t in layout[1:])
    counts = taps.touched & poolable
    row = torch.where(counts, first_row + taps.cell, 0)
    weight = torch.where(counts, taps.weight, torch.where(poolable, 0.0, lost).to(taps.weight))
    return row.flatten(0, 1), weight.flatten(0, 1)


def _over_points(
    add: Callable[[Tensor, Tensor, Tensor], Tensor],  # of rows, weights and values
    layout: Layout,
    values: Tensor,
    shape: tuple[int, int],  # of the sum
    pooling: Pooling,
) -> Tensor:
    """The sum over the sampling points of a bin: at once if few and known, else in a loop over blocks."""
    axes, ratio, lost = len(layout.axes), pooling.sampling_ratio, pooling.lost
    if ratio > 0 and (2 * ratio) ** axes <= _ONE_SUM:
        return add(*_taps(layout, [0] * axes, ratio, lost), values)

    def blocks(axis: Points | Pieces) -> Tensor:
        """At least 1, also when there is no RoI.

        AOTInductor takes the memory of what a loop starts from for something else after the loop, even
        when the loop, not run once, has handed on just that: https://github.com/pytorch/pytorch/issues/146213
        """
        number = torch.where(layout.poolable[:, None], axis.number, 1.0).flatten()
        most = torch.cat((number, number.new_ones(1))).amax()
        return (most / _BLOCK).ceil().long()

    counts = [blocks(axis) for axis in layout.axes]
    # An axis has as many tensors as its kind has, less those that only a derivative has.
    axes_fields = [[t for t in axis if t is not None] for axis in layout.axes]
    kinds = [(type(axis), len(of_axis)) for axis, of_axis in zip(layout.axes, axes_fields, strict=True)]
    fields = (*counts, *itertools.chain(*axes_fields), *layout[1:])

    def unfinished(turn: Tensor, total: Tensor, turns: Tensor, *_rest: Tensor) -> Tensor:
        return turn < turns

    def step(
        turn: Tensor, total: Tensor, turns: Tensor, values: Tensor, *fields: Tensor
    ) -> tuple[Tensor, Tensor]:
        given = iter(fields)
        counts = list(itertools.islice(given, axes))
        laid = [kind(*itertools.islice(given, n)) for kind, n in kinds]
        starts: list[Tensor | int] = []
        left = turn
        for count in reversed(counts):  # the last axis is the innermost loop
            starts.insert(0, left % count * _BLOCK)
            left = left // count
        return turn + 1, total + add(*_taps(Layout(laid, *given), starts, _BLOCK, lost), values)

    start = torch.zeros((), dtype=torch.int64, device=values.device), values.new_zeros(shape)
    rest = math.prod(counts[1:], start=counts[0]), values, *fields
    loop: Any = torch.ops.higher_order.while_loop(unfinished, step, start, rest)
    result: Tensor = loop[1]
    return result
