"""Along one axis a bin is a short list of taps, `(cell, weight)`: the idea that everything hangs on.

RoIAlign is separable. Two taps for each sampling point of a bin, the cell below it and the one above, say
all that pooling does along an axis; a bin of the output is the sum over the outer product of its row taps
and its column taps, and backward is the same sum with reading and writing exchanged. So whatever is pooled
is a rule for taps, and here they are beside each other:

- a grid of as many points as are asked for, and an adaptive one: `Points`;
- the integral, whose points are the middles of its `Pieces`;
- of either, how it changes as RoIs move: the slopes at the points, what lies at the ends of the pieces;
- the rows of a volume: the `product` of its slices and of the rows in each.

Engines write the same taps in their own languages.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schema import Pooling

EXACT = -1  # a sampling ratio: no grid, but the integral


def _of(fields: Sequence[Tensor | None], part: Tensor) -> Any:
    return [None if field is None else field[part] for field in fields]


class Points(NamedTuple):
    """The sampling points of every bin along one axis. Floats where a grid may exceed any integer."""

    bin_start: Tensor  # (K, bins) in cells of the map
    bin_size: Tensor  # (K, 1)
    grid: Tensor  # (K, 1) points per bin
    first: Tensor  # (K, bins) of them, the first that may meet the map
    number: Tensor  # (K, bins) and how many may
    extent: Tensor  # (K, 1) int64, of the map in cells, at least 1
    start_rate: Tensor | None = None  # (K, bins) of a derivative: how fast the bin's start moves
    size_rate: Tensor | None = None  # (K, 1) and how fast it grows

    def of(self, part: Tensor) -> "Points":
        """The same for some of the RoIs."""
        return Points(*_of(self, part))

    def lay(self, run: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Points `run`, counted from the first: where they lie, their weights, and whether they meet the map.

        The first weight is of the surface's value there, the second, of a derivative, of its slope.
        """
        bin_start, bin_size, grid, first, number, extent = (field[..., None] for field in self[:6])
        grid, place = grid.clamp(min=1), first + run + 0.5
        point = bin_start + place * bin_size / grid
        touched = (run < number) & (point >= -1) & (point <= extent.to(point))
        if self.start_rate is None or self.size_rate is None:
            return point, (1 / grid).expand_as(point), None, touched
        rate = self.start_rate[..., None] + place / grid * self.size_rate[..., None]
        return point, torch.zeros_like(point), rate / grid, touched


class Pieces(NamedTuple):
    """The pieces of every bin between the centres of neighbouring cells, where the surface is linear.

    So its integral over a piece is its value in the middle, times the length: a sampling point. The
    derivative of a mean over a bin lies in how its ends move: what is there against the mean.
    """

    start: Tensor  # (K, bins) in cells of the map
    end: Tensor  # (K, bins) before the start, of a bin that is inside out
    number: Tensor  # (K, bins) of points: pieces, and of a derivative two more
    extent: Tensor  # (K, 1) int64, of the map in cells, at least 1
    start_rate: Tensor | None = None  # (K, bins) of a derivative: how fast the start moves
    end_rate: Tensor | None = None  # (K, bins) and the end

    def of(self, part: Tensor) -> "Pieces":
        """The same for some of the RoIs."""
        return Pieces(*_of(self, part))

    def lay(self, run: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Likewise: the middles of pieces `run`, whose weights are their shares of the bin.

        Of a derivative the bin's start comes first and its end last.
        """
        start, end, number, extent = (field[..., None] for field in self[:4])
        low, high = _within(torch.minimum(start, end), torch.maximum(start, end), extent)
        length = (end - start).abs()
        piece = run if self.start_rate is None else run - 1
        left = torch.maximum(low, low.floor() + piece)
        right = torch.minimum(high, low.floor() + piece + 1)
        share = torch.where(length > 0, (right - left) / length, 1.0)
        middle = (left + right) / 2
        if self.start_rate is None or self.end_rate is None:
            return middle, share, None, run < number
        start_rate, end_rate = self.start_rate[..., None], self.end_rate[..., None]
        span = torch.where(length > 0, end - start, 1.0)
        first, last = run == 0, run == number - 1
        point = torch.where(first, start, torch.where(last, end, middle))
        value = torch.where(first, -start_rate, torch.where(last, end_rate, share * (start_rate - end_rate)))
        value = torch.where(length > 0, value / span, 0.0)
        slope = torch.where(first & (length == 0), (start_rate + end_rate) / 2, 0.0)
        return point, value, slope, (run < number) & (point >= -1) & (point <= extent.to(point))


class Taps(NamedTuple):
    """Taps of one axis: for each RoI and bin, T cells and their weights."""

    cell: Tensor  # (K, bins, T) int64, in [0, extent)
    weight: Tensor  # (K, bins, T), in the working precision
    touched: Tensor  # (K, bins, T) bool: false where a sampling point misses the map


def corners_of(rois: Tensor, scales: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes in cells of their maps, and which of them have a place and a size there.

    Args:
        rois: `(K, 1 + 2A)` of A axes: image index, starts, ends; x comes first.
        scales: of each axis of the map, of which x is the last; or `(K,)` of the map of each RoI.

    Returns:
        Starts and ends, `(K, 2A)`; and `(K,)` bool.
    """
    axes, (_image, *ends) = len(scales), rois.unbind(1)
    corners = torch.stack([end * scales[axes - 1 - i % axes] for i, end in enumerate(ends)], 1)
    return corners, corners.isfinite().all(1) & (corners[:, axes:] - corners[:, :axes]).isfinite().all(1)


def lay_axes(
    corners: Tensor, sizes: Sequence[Tensor], scales: Sequence[float | Tensor], pooling: Pooling
) -> list[Points | Pieces]:
    """Lay RoIs along every axis of their maps, in the order of these.

    Args:
        corners: `(K, 2A)` starts and ends in cells, x first; finite.
        sizes: A tensors `(K,)` int64, the cells of each RoI's map along an axis.
        scales: of the axes, as in `corners_of`.
        pooling: bins and grid.
    """
    laid, axes, ends = [], len(sizes), corners.unbind(1)
    for axis, (bins, extent, scale) in enumerate(zip(pooling.output_size, sizes, scales, strict=True)):
        low, high = ends[axes - 1 - axis], ends[2 * axes - 1 - axis]
        moved, rates = pooling.moved(axis), None
        if moved is not None:
            rates = torch.zeros_like(low) + moved[0] * scale, torch.zeros_like(low) + moved[1] * scale
        laid.append(lay_points(low, high, bins, extent, pooling.sampling_ratio, pooling.aligned, rates))
    return laid


def lay_points(
    low: Tensor,
    high: Tensor,
    bins: int,
    extent: Tensor,
    sampling_ratio: int,
    aligned: bool,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Points | Pieces:
    """Lay the sampling points of every bin on one axis of the map.

    An adaptive grid has as many points as its bin has cells, so it grows with the box. But its
    points are at least half a cell apart, so those that meet the map are bounded by the map.

    Args:
        low: `(K,)` where RoIs begin, in cells of the map, before any shift.
        high: `(K,)` where they end.
        bins: along this axis.
        extent: `(K,)` int64, cells of each RoI's map.
        sampling_ratio: points per bin; 0: as many as the bin has cells, rounded up; EXACT: their sum is
            the integral.
        aligned: shift by half a cell, and do not widen what is smaller than one.
        rates: for the derivative as RoIs move: `(K,)` how fast `low` does, and `high`. The number of points
            of an adaptive grid, and a size that was widened, stay as they are.
    """
    offset = 0.5 if aligned else 0.0
    start = low - offset
    size = high - offset - start
    bin_size = ((size if aligned else size.clamp(min=1.0)) / bins)[:, None]
    start_rate = size_rate = None
    if rates is not None:
        growth = rates[1] - rates[0]
        size_rate = ((growth if aligned else torch.where(size >= 1, growth, 0.0)) / bins)[:, None]
        start_rate = rates[0][:, None] + torch.arange(bins, device=low.device) * size_rate
    extent = extent[:, None]
    if sampling_ratio == EXACT:
        ends = start[:, None] + torch.arange(bins + 1, device=low.device) * bin_size
        end_rate = None if start_rate is None or size_rate is None else start_rate + size_rate
        start, end = ends[:, :-1], ends[:, 1:]  # a bin ends where the next begins
        number = _count_pieces(start, end, extent, 0 if rates is None else 2)
        return Pieces(start, end, number, extent, start_rate, end_rate)
    bin_start = start[:, None] + torch.arange(bins, device=low.device) * bin_size
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
        number, first = torch.full_like(bin_start, sampling_ratio), torch.zeros_like(bin_start)
        return Points(bin_start, bin_size, grid, first, number, extent, start_rate, size_rate)
    grid = bin_size.ceil().clamp(min=0)  # an aligned box may be inside out: no points
    step = torch.where(grid > 0, bin_size / grid, 1.0)
    # One point more on either side, because the division rounds; taps_of looks at each.
    first = torch.minimum((((-1 - bin_start) / step - 0.5).floor() - 1).clamp(min=0), grid)
    last = torch.minimum(((extent.to(step) - bin_start) / step - 0.5).ceil() + 1, grid - 1)
    number = (last - first + 1).clamp(min=0)
    return Points(bin_start, bin_size, grid, first, number, extent, start_rate, size_rate)


def _count_pieces(start: Tensor, end: Tensor, extent: Tensor, more: int) -> Tensor:
    """How many pieces each bin has within the map, and `more` points; one without length is a point."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    is_point = low == high
    meets = (high >= -1) & (low <= extent) & ((low < extent) & (high > -1) | is_point)
    low, high = _within(low, high, extent)
    number = torch.where(is_point, 1.0, high.ceil() - low.floor() + more)
    return torch.where(meets, number, 0.0)


def _within(low: Tensor, high: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Where a bin that meets the map enters and leaves it: a cell beyond its centres there is nothing."""
    return low.clamp(min=-1), torch.minimum(high, extent.to(high))


def taps_of(points: Points | Pieces, start: Tensor | int, side: int) -> Taps:
    """The taps of points `start .. start + side`, counted from the first that may meet the map.

    Returns:
        `2 * side` taps per bin: the cells below the points, then those above them.
    """
    run = torch.arange(side, device=points.number.device) + start
    point, value, slope, touched = points.lay(run)
    extent = points.extent[..., None]
    point = torch.where(touched, point, 0.0)
    inside = point.clamp(min=0.0)
    # The last cell is found among integers: as a float it may be rounded up, past the map.
    low = torch.minimum(inside.long(), extent - 1)
    high = torch.minimum(low + 1, extent - 1)
    share = torch.where(low < high, inside - inside.floor(), 0.0)  # the last cell repeats
    below, above = (1 - share) * value, share * value
    if slope is not None:
        slope = torch.where((low < high) & (point >= 0), slope, 0.0)  # where a cell repeats it is level
        touched = touched & ((value != 0) | (slope != 0))
        below, above = below - slope, above + slope
    return Taps(torch.cat((low, high), 2), torch.cat((below, above), 2), torch.cat((touched, touched), 2))


def product(outer: Taps, inner: Taps, extent: Tensor) -> Taps:
    """The taps of two axes as those of one, whose cells are counted through.

    Args:
        outer: of slices.
        inner: of the rows in each.
        extent: `(K, 1)` how many rows a slice has.
    """
    cell = outer.cell[:, :, None, :, None] * extent[:, :, None, None, None]
    both = (
        cell + inner.cell[:, None, :, None],
        outer.weight[:, :, None, :, None] * inner.weight[:, None, :, None],
        outer.touched[:, :, None, :, None] & inner.touched[:, None, :, None],
    )
    return Taps(*(t.flatten(3, 4).flatten(1, 2) for t in both))
