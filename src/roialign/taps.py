"""Along one axis a bin is a short list of taps, `(cell, weight)`: the idea that everything hangs on.

RoIAlign is separable. Two taps for each sampling point of a bin, the cell below it and the one above, say
all that pooling does along an axis; a bin of the output is the sum over the outer product of its row taps
and its column taps, and backward is the same sum with reading and writing exchanged. Engines write the
same taps in their own languages.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EXACT = -1  # a sampling ratio: no grid, but the integral


class Points(NamedTuple):
    """The sampling points of every bin along one axis. Floats where a grid may exceed any integer."""

    bin_start: Tensor  # (K, bins) in cells of the map
    bin_size: Tensor  # (K, 1)
    grid: Tensor  # (K, 1) points per bin
    first: Tensor  # (K, bins) of them, the first that may meet the map
    number: Tensor  # (K, bins) and how many may
    extent: Tensor  # (K, 1) int64, of the map in cells, at least 1

    def of(self, part: Tensor) -> "Points":
        """The same for some of the RoIs."""
        return Points(*(field[part] for field in self))

    def lay(self, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points `run`, counted from the first: where, their weights, and whether they meet the map."""
        bin_start, bin_size, grid, first, number, extent = (field[..., None] for field in self)
        grid = grid.clamp(min=1)
        point = bin_start + (first + run + 0.5) * bin_size / grid
        touched = (run < number) & (point >= -1) & (point <= extent.to(point))
        return point, (1 / grid).expand_as(point), touched


class Pieces(NamedTuple):
    """The pieces of every bin between the centres of neighbouring cells, where the surface is linear.

    So its integral over a piece is its value in the middle, times the length: a sampling point.
    """

    low: Tensor  # (K, bins) in cells of the map, where the bin enters it
    high: Tensor  # (K, bins) where it leaves it
    length: Tensor  # (K, bins) of the bin, all of it
    number: Tensor  # (K, bins) of pieces
    extent: Tensor  # (K, 1) int64, of the map in cells, at least 1

    def of(self, part: Tensor) -> "Pieces":
        """The same for some of the RoIs."""
        return Pieces(*(field[part] for field in self))

    def lay(self, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The middle of pieces `run`, their shares of the bin, and whether there are such."""
        low, high, length, number, _ = (field[..., None] for field in self)
        start = torch.maximum(low, low.floor() + run)
        stop = torch.minimum(high, low.floor() + run + 1)
        share = torch.where(length > 0, (stop - start) / length, 1.0)
        return (start + stop) / 2, share, run < number


class Taps(NamedTuple):
    """Taps of one axis: for each RoI and bin, T cells and their weights."""

    cell: Tensor  # (K, bins, T) int64, in [0, extent)
    weight: Tensor  # (K, bins, T), in the working precision
    touched: Tensor  # (K, bins, T) bool: false where a sampling point misses the map


def lay_points(
    low: Tensor, high: Tensor, bins: int, extent: Tensor, sampling_ratio: int, aligned: bool
) -> Points | Pieces:
    """Lay the sampling points of every bin on one axis of the map.

    An adaptive grid has as many points as its bin has cells, so it grows with the box. But its
    points are at least half a cell apart, so those that meet the map are bounded by the map.

    Args:
        low: `(K,)` where RoIs begin, in cells of the map, before any shift.
        high: `(K,)` where they end.
        bins: along this axis.
        extent: `(K,)` int64, cells of each RoI's map.
        sampling_ratio: points per bin; 0: as many as the bin has cells, rounded up; EXACT: such that their
            sum is the integral.
        aligned: shift by half a cell, and do not widen what is smaller than one.
    """
    offset = 0.5 if aligned else 0.0
    start = low - offset
    size = high - offset - start
    bin_size = ((size if aligned else size.clamp(min=1.0)) / bins)[:, None]
    extent = extent[:, None]
    if sampling_ratio == EXACT:
        return _lay_pieces(start, bin_size, bins, extent)
    bin_start = start[:, None] + torch.arange(bins, device=low.device) * bin_size
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
        number = torch.full_like(bin_start, sampling_ratio)
        return Points(bin_start, bin_size, grid, torch.zeros_like(bin_start), number, extent)
    grid = bin_size.ceil().clamp(min=0)  # an aligned box may be inside out: no points
    step = torch.where(grid > 0, bin_size / grid, 1.0)
    # One point more on either side, because the division rounds; taps_of looks at each.
    first = torch.minimum((((-1 - bin_start) / step - 0.5).floor() - 1).clamp(min=0), grid)
    last = torch.minimum(((extent.to(step) - bin_start) / step - 0.5).ceil() + 1, grid - 1)
    return Points(bin_start, bin_size, grid, first, (last - first + 1).clamp(min=0), extent)


def _lay_pieces(start: Tensor, bin_size: Tensor, bins: int, extent: Tensor) -> Pieces:
    """A bin ends where the next begins. One that is inside out is turned; one without length is a point."""
    ends = start[:, None] + torch.arange(bins + 1, device=start.device) * bin_size
    low, high = torch.minimum(ends[:, :-1], ends[:, 1:]), torch.maximum(ends[:, :-1], ends[:, 1:])
    length = high - low
    meets = (high >= -1) & (low <= extent) & ((low < extent) & (high > -1) | (length == 0))
    low = torch.where(meets, low.clamp(min=-1), 0.0)
    high = torch.where(meets, torch.minimum(high, extent.to(high)), 0.0)
    number = torch.where(length > 0, high.ceil() - low.floor(), 1.0)
    return Pieces(low, high, length, torch.where(meets, number, 0.0), extent)


def taps_of(points: Points | Pieces, start: Tensor | int, side: int) -> Taps:
    """The taps of points `start .. start + side`, counted from the first that may meet the map.

    Returns:
        `2 * side` taps per bin: the cells below the points, then those above them.
    """
    run = torch.arange(side, device=points.number.device) + start
    point, weight, touched = points.lay(run)
    extent = points.extent[..., None]
    point = torch.where(touched, point, 0.0).clamp(min=0.0)
    # The last cell is found among integers: as a float it may be rounded up, past the map.
    low = torch.minimum(point.long(), extent - 1)
    high = torch.minimum(low + 1, extent - 1)
    share = torch.where(low < high, point - point.floor(), 0.0)  # the last cell repeats
    weight = torch.cat(((1 - share) * weight, share * weight), 2)
    return Taps(torch.cat((low, high), 2), weight, torch.cat((touched, touched), 2))
