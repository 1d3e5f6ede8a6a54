"""The definition, in plain PyTorch: any device, any float dtype, differentiable, bounded memory.

It is what every faster engine is judged against, and what serves where there is none.

RoIAlign is separable. Along one axis a bin is a short list of *taps*, `(index, weight)` pairs:
two for each of its sampling points. A bin of the output is the sum over the outer product of its
row taps and its column taps, and `backward` is the same sum with reading and writing exchanged.
Only cells that a tap names are ever read, so a NaN elsewhere in a map stays elsewhere.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .levels import assign_levels, map_levels_of

# Elements of the largest temporary. About eight of them live at once, in float64 at worst, so
# scratch stays under 256 MB whatever the number of RoIs.
_BLOCK = 2**21
_SLAB = 2**14  # RoIs whose sampling points are laid out at once


class Taps(NamedTuple):
    """Taps of one axis: for each RoI and bin, T cells and their weights."""

    cell: Tensor  # (K, bins, T) int64, in [0, extent)
    weight: Tensor  # (K, bins, T), in the working precision
    touched: Tensor  # (K, bins, T) bool: false where a sampling point misses the map


class Geometry(NamedTuple):
    """How RoIs lie on one map."""

    height: int  # of the map, in cells
    width: int
    pooled_height: int
    pooled_width: int
    scale: float
    sampling_ratio: int
    aligned: bool


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A tensor `(N, C, H, W)` to be filled. Every engine may have its own way to get memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def forward(
    out: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> None:
    """Pool every RoI from its map.

    Args:
        out: `(K, C, PH, PW)`, any strides, any float dtype; filled. A RoI whose box is not finite,
            or whose image or level does not exist, becomes NaN.
        features: L maps `(N, C, H_l, W_l)`, any strides, any float dtypes.
        rois: `(K, 5)` image index, x1, y1, x2, y2, in the working precision; image coordinates.
        levels: `(K,)` int64, the index of each RoI's map; None for FPN's equation 1.
        scales: cells of each map per pixel of the image.
        sampling_ratio: sampling points per bin and axis; adaptive if not positive.
        aligned: shift by half a cell.
        canonical_scale: see `levels.assign_levels`.
        canonical_level: see `levels.assign_levels`.
    """
    out.fill_(torch.nan)
    if levels is None:
        levels = assign_levels(rois[:, 1:], map_levels_of(scales), canonical_scale, canonical_level)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        geometry = _geometry(feature, out, scale, sampling_ratio, aligned)
        rows = _poolable_rows(rois, levels == level, len(feature), geometry)
        for part, lo, hi, ys, xs in _blocks(rois, rows, out.shape[1], geometry):
            pooled = _gather(feature[:, lo:hi], rois[part, 0].long(), ys, xs)
            out[part, lo:hi] = pooled.to(out.dtype)


def backward(
    grads: Sequence[Tensor],
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> None:
    """The adjoint of `forward` in the features.

    Args:
        grads: one gradient map `(N, C, H_l, W_l)` per level; filled, with the same bits every time.
            RoIs that `forward` answers with NaN add nothing.
        grad: `(K, C, PH, PW)`, the gradient of the output.
        rois: as in `forward`.
        levels: as in `forward`.
        scales: as in `forward`.
        sampling_ratio: as in `forward`.
        aligned: as in `forward`.
        canonical_scale: as in `forward`.
        canonical_level: as in `forward`.
    """
    if levels is None:
        levels = assign_levels(rois[:, 1:], map_levels_of(scales), canonical_scale, canonical_level)
    for level, (result, scale) in enumerate(zip(grads, scales, strict=True)):
        images, channels, height, width = result.shape
        geometry = _geometry(result, grad, scale, sampling_ratio, aligned)
        rows = _poolable_rows(rois, levels == level, images, geometry)
        # Sums are kept in the working precision: for a few channels at a time, to bound them.
        step = max(1, 4 * _BLOCK // (images * height * width))
        for first in range(0, channels, step):
            share = grad[:, first : first + step]
            total = rois.new_zeros(images * height * width, share.shape[1])
            for part, lo, hi, ys, xs in _blocks(rois, rows, share.shape[1], geometry):
                piece = share[part, lo:hi].to(rois.dtype)
                _scatter(total[:, lo:hi], piece, rois[part, 0].long(), ys, xs, geometry)
            result[:, first : first + step] = total.view(images, height, width, -1).movedim(3, 1)


def _geometry(feature: Tensor, pooled: Tensor, scale: float, sampling_ratio: int, aligned: bool) -> Geometry:
    height, width = feature.shape[2:]
    pooled_height, pooled_width = pooled.shape[2:]
    return Geometry(height, width, pooled_height, pooled_width, scale, sampling_ratio, aligned)


def _poolable_rows(rois: Tensor, on_level: Tensor, images: int, geometry: Geometry) -> Tensor:
    """Indices of the RoIs of this level that can be pooled: finite box, existing image."""
    image = rois[:, 0]
    corners = rois[:, 1:] * geometry.scale
    finite = corners.isfinite().all(1) & (corners[:, 2:] - corners[:, :2]).isfinite().all(1)
    exists = (image.trunc() >= 0) & (image < images)
    return (finite & exists & on_level).nonzero()[:, 0]


def _blocks(
    rois: Tensor, rows: Tensor, channels: int, geometry: Geometry
) -> Iterator[tuple[Tensor, int, int, Taps, Taps]]:
    """Cut the work into blocks of bounded size: RoIs `part`, channels `lo:hi`, and the taps.

    RoIs of many taps come first, so that a block holds RoIs of about the same size.
    """
    for slab in torch.split(rows, _SLAB):
        _, x1, y1, x2, y2 = rois[slab].unbind(1)
        y_span = _to_map(y1, y2, geometry)
        x_span = _to_map(x1, x2, geometry)
        y_visits = _visits(*y_span, geometry.pooled_height, geometry.height, geometry.sampling_ratio)
        x_visits = _visits(*x_span, geometry.pooled_width, geometry.width, geometry.sampling_ratio)
        visits = torch.maximum(y_visits.number.amax(1), x_visits.number.amax(1)).clamp(min=1)
        visits, order = visits.sort(descending=True, stable=True)
        cost = (2 * visits * geometry.pooled_height * geometry.pooled_width).tolist()
        start = 0
        while start < len(order):
            one_roi = int(cost[start])
            width = max(1, min(channels, _BLOCK // one_roi))
            part = order[start : start + max(1, _BLOCK // (one_roi * width))]
            ys = _taps(y_visits.of(part), geometry.height)
            xs = _taps(x_visits.of(part), geometry.width)
            for lo in range(0, channels, width):
                yield slab[part], lo, min(lo + width, channels), ys, xs
            start += len(part)


def _to_map(low: Tensor, high: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Start and size of a RoI along one axis, in cells of the map."""
    offset = 0.5 if geometry.aligned else 0.0
    start = low * geometry.scale - offset
    size = high * geometry.scale - offset - start
    return start, size if geometry.aligned else size.clamp(min=1.0)


class Visits(NamedTuple):
    """The sampling points of each bin along one axis. All floats: a grid may exceed any integer."""

    bin_start: Tensor  # (K, bins) in cells of the map
    bin_size: Tensor  # (K, 1)
    grid: Tensor  # (K, 1) points per bin
    first: Tensor  # (K, bins) of them, the first that may meet the map
    number: Tensor  # (K, bins) and how many may

    def of(self, part: Tensor) -> "Visits":
        """The same for some of the RoIs."""
        return Visits(*(field[part] for field in self))


def _visits(start: Tensor, size: Tensor, bins: int, extent: int, sampling_ratio: int) -> Visits:
    """Lay the sampling points of every bin on one axis of the map.

    An adaptive grid has as many points as its bin has cells, so it grows with the box. But its
    points are at least half a cell apart, so those that meet the map are bounded by the map.
    """
    bin_size = (size / bins)[:, None]
    bin_start = start[:, None] + torch.arange(bins, device=start.device) * bin_size
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
        return Visits(bin_start, bin_size, grid, torch.zeros_like(bin_start), grid.expand_as(bin_start))
    grid = bin_size.ceil().clamp(min=0)  # an aligned box may be inside out: no points
    step = torch.where(grid > 0, bin_size / grid, 1.0)
    # One point more on either side, because the division rounds; _taps looks at each.
    first = torch.minimum((((-1 - bin_start) / step - 0.5).floor() - 1).clamp(min=0), grid)
    last = torch.minimum(((extent - bin_start) / step - 0.5).ceil() + 1, grid - 1)
    return Visits(bin_start, bin_size, grid, first, (last - first + 1).clamp(min=0))


def _taps(visits: Visits, extent: int) -> Taps:
    """The taps of every bin: two for each sampling point, low cell and high cell."""
    bin_start, bin_size, grid, first, number = (field[..., None] for field in visits)
    grid = grid.clamp(min=1)
    run = torch.arange(int(number.max()), device=number.device)
    point = bin_start + (first + run + 0.5) * bin_size / grid
    touched = (run < number) & (point >= -1) & (point <= extent)
    point = torch.where(touched, point, 0.0).clamp(min=0.0, max=extent - 1)
    low = point.floor()
    high = (low + 1).clamp(max=extent - 1)
    share = point - low  # 0 on the last cell, which then repeats
    weight = torch.cat((1 - share, share), 2) / grid
    return Taps(torch.cat((low, high), 2).long(), weight, torch.cat((touched, touched), 2))


def _gather(feature: Tensor, image: Tensor, ys: Taps, xs: Taps) -> Tensor:
    """Read: `(N, C, H, W)` -> `(K, C, PH, PW)`, in the working precision."""
    rois, bins, taps = xs.cell.shape
    shape = (rois, ys.cell.shape[1], bins, feature.shape[1])
    total = xs.weight.new_zeros(shape)
    column = xs.cell.view(rois, 1, bins * taps)
    for t in range(ys.cell.shape[2]):
        value = feature[image[:, None, None], :, ys.cell[:, :, t, None], column].to(total.dtype)
        weight, touched = _outer(ys, t, xs)
        value = torch.where(touched, value * weight, 0.0)
        total = total + value.view(*shape[:3], taps, shape[3]).sum(3)
    return total.movedim(3, 1)


def _scatter(total: Tensor, grad: Tensor, image: Tensor, ys: Taps, xs: Taps, geometry: Geometry) -> None:
    """Write: add `(K, C, PH, PW)` into `(N*H*W, C)`, in an order that depends on the RoIs alone."""
    rois, bins, taps = xs.cell.shape
    column = xs.cell.view(rois, 1, bins * taps)
    share = grad.movedim(1, 3).repeat_interleave(taps, dim=2)
    for t in range(ys.cell.shape[2]):
        weight, touched = _outer(ys, t, xs)
        value = torch.where(touched, share * weight, 0.0).flatten(0, 2)
        row = image[:, None, None] * geometry.height + ys.cell[:, :, t, None]
        cell = (row * geometry.width + column).flatten()
        if total.is_cuda:  # sorts before it adds; scatter_add_ would use atomics here
            total.index_put_((cell,), value, accumulate=True)
        else:  # one thread per channel; index_put_ would use atomics here
            total.scatter_add_(0, cell[:, None].expand_as(value), value)


def _outer(ys: Taps, t: int, xs: Taps) -> tuple[Tensor, Tensor]:
    """Weight and reach of row tap `t` with every column tap, `(K, PH, PW * T, 1)`."""
    weight = ys.weight[:, :, t, None] * xs.weight.flatten(1)[:, None]
    touched = ys.touched[:, :, t, None] & xs.touched.flatten(1)[:, None]
    return weight[..., None], touched[..., None]
