"""The definition, in plain PyTorch: any device, any float dtype, differentiable, bounded memory.

It is what every faster engine is judged against, and what serves where there is none. A bin is the sum
over the outer product of its row taps and its column taps (see `taps`), and `backward` is the same sum
with reading and writing exchanged. A volume is a map that has the rows of all its slices. Only cells that a
tap names are ever read, so a NaN elsewhere in a map stays elsewhere.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layout import empty as empty
from .layout import rows_of
from .schema import Pooling
from .taps import Taps, corners_of, lay_axes, product, taps_of

# Elements of the largest temporary. About eight of them live at once, in float64 at worst, so
# scratch stays under 256 MB whatever the number of RoIs.
_BLOCK = 2**21
_SLAB = 2**14  # RoIs whose sampling points are laid out at once


def forward(
    out: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """Pool every RoI from its map.

    Args:
        out: `(K, C, PH, PW)`, any strides, any float dtype; filled. A RoI whose box is not finite,
            or whose image or level does not exist, becomes NaN; of a derivative zero.
        features: L maps `(N, C, H_l, W_l)`, any strides, any float dtypes. Or L volumes
            `(N, C, D_l, H_l, W_l)`, and then `out` is `(K, C, PD, PH, PW)`.
        rois: `(K, 5)` image index, x1, y1, x2, y2, in the working precision; image coordinates. Of volumes
            `(K, 7)`, image index, x1, y1, z1, x2, y2, z2.
        levels: `(K,)` int64, the index of each RoI's map; None for the staircase of `pooling`.
        pooling: scales, grid and bins.

    Returns:
        Whether some RoI could not be pooled; None by an engine that does not count them, such as this.
    """
    out.fill_(pooling.lost)
    if levels is None:
        levels = pooling.staircase.levels(rois[:, 1:])
    bins = rows_of(out)
    for level, feature in enumerate(features):
        rows, corners, scales = _poolable(rois, levels, level, len(feature), len(features), pooling)
        for part, lo, hi, ys, xs in _blocks(corners, rows, out.shape[1], feature.shape[2:], scales, pooling):
            pooled = _gather(rows_of(feature[:, lo:hi]), rois[part, 0].long(), ys, xs)
            bins[part, lo:hi] = pooled.to(out.dtype)
    if bins.data_ptr() != out.data_ptr():  # which had strides that rows do not have
        out.copy_(bins.view(out.shape))


def backward(
    grads: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """The adjoint of `forward` in the features.

    Args:
        grads: one gradient map `(N, C, H_l, W_l)` or `(N, C, D_l, H_l, W_l)` per level; filled, with the same
            bits every time. RoIs that `forward` answers with NaN add nothing.
        grad: `(K, C, PH, PW)` or `(K, C, PD, PH, PW)`, the gradient of the output.
        rois: as in `forward`.
        levels: as in `forward`.
        pooling: as in `forward`.
    """
    if levels is None:
        levels = pooling.staircase.levels(rois[:, 1:])
    bins = rows_of(grad)
    for level, result in enumerate(grads):
        images, channels, *size = result.shape
        rows, corners, scales = _poolable(rois, levels, level, images, len(grads), pooling)
        # Sums are kept in the working precision: for a few channels at a time, to bound them.
        step = max(1, 4 * _BLOCK // (images * math.prod(size)))
        for first in range(0, channels, step):
            share = bins[:, first : first + step]
            total = rois.new_zeros(images * math.prod(size), share.shape[1])
            for part, lo, hi, ys, xs in _blocks(corners, rows, share.shape[1], size, scales, pooling):
                piece = share[part, lo:hi].to(rois.dtype)
                flat = math.prod(size[:-1]), size[-1]
                _scatter(total[:, lo:hi], piece, rois[part, 0].long(), ys, xs, flat)
            result[:, first : first + step] = total.view(images, *size, -1).movedim(-1, 1)


def _poolable(
    rois: Tensor, levels: Tensor, level: int, images: int, maps: int, pooling: Pooling
) -> tuple[Tensor, Tensor, Sequence[float]]:
    """The RoIs of a level that can be pooled: finite box, existing image.

    Returns:
        Their indices, the corners of all RoIs in cells of the map, and its scales.
    """
    image, scales = rois[:, 0], pooling.scales_of(maps)[level]
    corners, finite = corners_of(rois, scales)
    exists = (image.trunc() >= 0) & (image < images)
    return (finite & exists & (levels == level)).nonzero()[:, 0], corners, scales


def _blocks(
    corners: Tensor,
    rows: Tensor,
    channels: int,
    size: Sequence[int],
    scales: Sequence[float],
    pooling: Pooling,
) -> Iterator[tuple[Tensor, int, int, Taps, Taps]]:
    """Cut the work into blocks of bounded size: RoIs `part`, channels `lo:hi`, and the taps.

    RoIs of many taps come first, so that a block holds RoIs of about the same size.
    """
    *_, pooled_width = pooling.output_size
    pooled_rows = math.prod(pooling.output_size[:-1])
    for slab in torch.split(rows, _SLAB):
        sizes = [torch.full_like(slab, extent) for extent in size]
        axes = lay_axes(corners[slab], sizes, scales, pooling)
        visits = torch.stack([p.number.amax(1) for p in axes]).amax(0).clamp(min=1)
        visits, order = visits.sort(descending=True, stable=True)
        # Of columns with one row at a time, and of all rows of a volume.
        widest = torch.maximum(visits * pooled_width, (2 * visits) ** (len(axes) - 1) / 2)
        cost = (2 * widest * pooled_rows).tolist()
        start = 0
        while start < len(order):
            one_roi = int(cost[start])
            step = max(1, min(channels, _BLOCK // one_roi))
            part = order[start : start + max(1, _BLOCK // (one_roi * step))]
            ys, *inner, xs = (taps_of(p.of(part), 0, int(p.number[part].max())) for p in axes)
            for taps, extent in zip(inner, sizes[1:-1], strict=True):
                ys = product(ys, taps, extent[part][:, None])
            for lo in range(0, channels, step):
                yield slab[part], lo, min(lo + step, channels), ys, xs
            start += len(part)


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


def _scatter(total: Tensor, grad: Tensor, image: Tensor, ys: Taps, xs: Taps, size: tuple[int, int]) -> None:
    """Write: add `(K, C, PH, PW)` into `(N*H*W, C)`, in an order that depends on the RoIs alone."""
    rois, bins, taps = xs.cell.shape
    column = xs.cell.view(rois, 1, bins * taps)
    share = grad.movedim(1, 3).repeat_interleave(taps, dim=2)
    for t in range(ys.cell.shape[2]):
        weight, touched = _outer(ys, t, xs)
        value = torch.where(touched, share * weight, 0.0).flatten(0, 2)
        row = image[:, None, None] * size[0] + ys.cell[:, :, t, None]
        cell = (row * size[1] + column).flatten()
        if total.is_cuda:  # sorts before it adds; scatter_add_ would use atomics here
            total.index_put_((cell,), value, accumulate=True)
        else:  # one thread per channel; index_put_ would use atomics here
            total.scatter_add_(0, cell[:, None].expand_as(value), value)


def _outer(ys: Taps, t: int, xs: Taps) -> tuple[Tensor, Tensor]:
    """Weight and reach of row tap `t` with every column tap, `(K, PH, PW * T, 1)`."""
    weight = ys.weight[:, :, t, None] * xs.weight.flatten(1)[:, None]
    touched = ys.touched[:, :, t, None] & xs.touched.flatten(1)[:, None]
    return weight[..., None], touched[..., None]
