"""The operators under `torch.func`: grad, vjp, jvp, jacrev, vmap, and compositions of them.

`torch.library.register_autograd` makes an `autograd.Function` without a `setup_context`, which functorch
refuses (https://github.com/pytorch/pytorch/issues/168393). So while a transform is active, and only then,
the operators become these functions, which have one, and rules for a batch dimension. Pooling a batch
of feature sets with the same boxes is pooling more channels; with boxes of their own, more images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .ops import DTYPES, is_channels_last


def multiscale_roi_align(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, *pooling: Any
) -> Tensor:
    """The forward operator."""
    out: Tensor = _Pool.apply(pooling, rois, levels, *features)
    return out


def multiscale_roi_align_backward(
    grad: Tensor, rois: Tensor, levels: Tensor | None, *maps_and_pooling: Any
) -> list[Tensor]:
    """The backward operator."""
    return list(_Scatter.apply(maps_and_pooling, grad, rois, levels))


class _Pool(Function):
    """Features to pooled features; `pooling` is what follows the levels in the operator's schema."""

    @staticmethod
    def forward(pooling: Sequence[Any], rois: Tensor, levels: Tensor | None, *features: Tensor) -> Tensor:
        out: Tensor = torch.ops.roialign.multiscale_roi_align(features, rois, levels, *pooling)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pooling, rois, levels, *features = inputs
        ctx.save_for_backward(rois, levels)
        ctx.save_for_forward(rois, levels)
        ctx.maps = (
            [*features[0].shape[:2], *(size for f in features for size in f.shape[2:])],
            [DTYPES.index(f.dtype) for f in features],
            [is_channels_last(f) for f in features],
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rois, levels = ctx.saved_tensors
        return None, None, None, *_Scatter.apply((*ctx.maps, *ctx.pooling[2:]), grad, rois, levels)

    @staticmethod
    def jvp(ctx: Any, _pooling: None, _rois: Any, _levels: Any, *tangents: Any) -> Any:
        rois, levels = ctx.saved_tensors
        shape, dtypes, _ = ctx.maps
        like = next(t for t in tangents if t is not None)
        sizes = zip(shape[2::2], shape[3::2], strict=True)
        features = [
            like.new_zeros((*shape[:2], *size), dtype=DTYPES[dtype]) if tangent is None else tangent
            for tangent, size, dtype in zip(tangents, sizes, dtypes, strict=True)
        ]
        return _Pool.apply(ctx.pooling, rois, levels, *features)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, pooling: Any, rois: Tensor, levels: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        _, rois_dim, levels_dim, *dims = in_dims
        if rois_dim is None and levels_dim is None:
            more_channels = [
                _batch(f, dim, size, 1).flatten(1, 2) for f, dim in zip(features, dims, strict=True)
            ]
            out = _Pool.apply(pooling, rois, levels, *more_channels)
            return out.unflatten(1, (size, -1)), 1
        batched = any(dim is not None for dim in dims)
        images = features[0].shape[:1] if dims[0] is None else features[0].movedim(dims[0], 0).shape[1:2]
        rois, levels = _join_rois(rois, rois_dim, levels, levels_dim, size, images[0] if batched else None)
        if batched:
            features = tuple(
                _batch(f, dim, size, 0).flatten(0, 1) for f, dim in zip(features, dims, strict=True)
            )
        out = _Pool.apply(pooling, rois, levels, *features)
        return out.unflatten(0, (size, -1)), 0


class _Scatter(Function):
    """The adjoint of `_Pool`; `more` is what follows the levels in the operator's schema."""

    @staticmethod
    def forward(more: Sequence[Any], grad: Tensor, rois: Tensor, levels: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.ops.roialign.multiscale_roi_align_backward(grad, rois, levels, *more))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.more, grad, rois, levels = inputs
        ctx.save_for_backward(rois, levels)
        ctx.save_for_forward(rois, levels)
        ctx.pooled = grad.shape[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rois, levels = ctx.saved_tensors
        return None, _Pool.apply((*ctx.pooled, *ctx.more[3:]), rois, levels, *grads), None, None

    @staticmethod
    def jvp(ctx: Any, _more: None, tangent: Any, _rois: Any, _levels: Any) -> Any:
        rois, levels = ctx.saved_tensors
        return _Scatter.apply(ctx.more, tangent, rois, levels)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, more: Any, grad: Tensor, rois: Tensor, levels: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        _, grad_dim, rois_dim, levels_dim = in_dims
        (images, channels, *sizes), *rest = more
        if rois_dim is None and levels_dim is None:
            shape = [images, size * channels, *sizes]
            grad, place = _batch(grad, grad_dim, size, 1).flatten(1, 2), 1
        else:
            shape = [size * images, channels, *sizes]
            rois, levels = _join_rois(rois, rois_dim, levels, levels_dim, size, images)
            grad, place = _batch(grad, grad_dim, size, 0).flatten(0, 1), 0
        grads = _Scatter.apply((shape, *rest), grad, rois, levels)
        return tuple(g.unflatten(place, (size, -1)) for g in grads), (place,) * len(grads)


def _batch(t: Tensor, dim: int | None, size: int, place: int) -> Tensor:
    """Put the batch dimension at `place`; a tensor without one is repeated."""
    if dim is not None:
        return t.movedim(dim, place)
    return t.unsqueeze(place).expand(*t.shape[:place], size, *t.shape[place:])


def _join_rois(
    rois: Tensor, rois_dim: int | None, levels: Tensor | None, levels_dim: int | None, size: int, images: Any
) -> tuple[Tensor, Tensor | None]:
    """One list of the RoIs of a batch. Given a number of images, each member has so many of its own."""
    rois = _batch(rois, rois_dim, size, 0)
    if images is not None:
        index = rois[..., :1]
        own = index + images * torch.arange(size, dtype=rois.dtype, device=rois.device)[:, None, None]
        # An index that does not exist must not become one of the next member's.
        own = torch.where((index > -1) & (index < images), own, torch.nan)
        rois = torch.cat((own, rois[..., 1:]), 2)
    if levels is not None:
        levels = _batch(levels, levels_dim, size, 0).flatten()
    return rois.flatten(0, 1), levels
