"""The definition, in plain PyTorch: any device, any float dtype, differentiable, bounded memory.

It is what every faster engine is judged against, and what serves where there is none. A bin is the sum
over the outer product of its row taps and its column taps (see `taps`), and `backward` is the same sum
with reading and writing exchanged. Only cells that a tap names are ever read, so a NaN elsewhere in a map
stays elsewhere.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layout import empty as empty
from .schema import Pooling
from .taps import Taps, lay_points, taps_of

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
            or whose image or level does not exist, becomes NaN.
        features: L maps `(N, C, H_l, W_l)`, any strides, any float dtypes.
        rois: `(K, 5)` image index, x1, y1, x2, y2, in the working precision; image coordinates.
        levels: `(K,)` int64, the index of each RoI's map; None for the staircase of `pooling`.
        pooling: scales, grid and bins.

    Returns:
        Whether some RoI could not be pooled; None by an engine that does not count them, such as this.
    """
    out.fill_(torch.nan)
    if levels is None:
        levels = pooling.staircase.levels(rois[:, 1:])
    for level, feature in enumerate(features):
        rows = _poolable_rows(rois, levels == level, len(feature), pooling.scales[level])
        for part, lo, hi, ys, xs in _blocks(rois, rows, out.shape[1], feature, level, pooling):
            pooled = _gather(feature[:, lo:hi], rois[part, 0].long(), ys, xs)
            out[part, lo:hi] = pooled.to(out.dtype)


def backward(
    grads: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> None:
    """The adjoint of `forward` in the features.

    Args:
        grads: one gradient map `(N, C, H_l, W_l)` per level; filled, with the same bits every time.
            RoIs that `forward` answers with NaN add nothing.
        grad: `(K, C, PH, PW)`, the gradient of the output.
        rois: as in `forward`.
        levels: as in `forward`.
        pooling: as in `forward`.
    """
    if levels is None:
        levels = pooling.staircase.levels(rois[:, 1:])
    for level, result in enumerate(grads):
        images, channels, height, width = result.shape
        rows = _poolable_rows(rois, levels == level, images, pooling.scales[level])
        # Sums are kept in the working precision: for a few channels at a time, to bound them.
        step = max(1, 4 * _BLOCK // (images * height * width))
        for first in range(0, channels, step):
            share = grad[:, first : first + step]
            total = rois.new_zeros(images * height * width, share.shape[1])
            for part, lo, hi, ys, xs in _blocks(rois, rows, share.shape[1], result, level, pooling):
                piece = share[part, lo:hi].to(rois.dtype)
                _scatter(total[:, lo:hi], piece, rois[part, 0].long(), ys, xs, (height, width))
            result[:, first : first + step] = total.view(images, height, width, -1).movedim(3, 1)


def _poolable_rows(rois: Tensor, on_level: Tensor, images: int, scale: float) -> Tensor:
    """Indices of the RoIs of this level that can be pooled: finite box, existing image."""
    image = rois[:, 0]
    corners = rois[:, 1:] * scale
    finite = corners.isfinite().all(1) & (corners[:, 2:] - corners[:, :2]).isfinite().all(1)
    exists = (image.trunc() >= 0) & (image < images)
    return (finite & exists & on_level).nonzero()[:, 0]


def _blocks(
    rois: Tensor, rows: Tensor, channels: int, feature: Tensor, level: int, pooling: Pooling
) -> Iterator[tuple[Tensor, int, int, Taps, Taps]]:
    """Cut the work into blocks of bounded size: RoIs `part`, channels `lo:hi`, and the taps.

    RoIs of many taps come first, so that a block holds RoIs of about the same size.
    """
    (pooled_height, pooled_width), ratio = pooling.output_size, pooling.sampling_ratio
    for slab in torch.split(rows, _SLAB):
        x1, y1, x2, y2 = (rois[slab, 1:] * pooling.scales[level]).unbind(1)
        height, width = (torch.full_like(slab, extent) for extent in feature.shape[2:])
        y_points = lay_points(y1, y2, pooled_height, height, ratio, pooling.aligned)
        x_points = lay_points(x1, x2, pooled_width, width, ratio, pooling.aligned)
        visits = torch.maximum(y_points.number.amax(1), x_points.number.amax(1)).clamp(min=1)
        visits, order = visits.sort(descending=True, stable=True)
        cost = (2 * visits * pooled_height * pooled_width).tolist()
        start = 0
        while start < len(order):
            one_roi = int(cost[start])
            step = max(1, min(channels, _BLOCK // one_roi))
            part = order[start : start + max(1, _BLOCK // (one_roi * step))]
            ys, xs = (taps_of(p.of(part), 0, int(p.number[part].max())) for p in (y_points, x_points))
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
