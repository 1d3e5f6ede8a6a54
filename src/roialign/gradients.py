"""The gradients of both operators, of any kind: one pair of functions, each the adjoint of the other.

Pooling is linear in the features. So the derivative of either operator is itself, its gradient is the other,
and no feature map is kept, unless boxes have gradients. A batch of feature sets with the same boxes is pooled
as more channels; with boxes of their own, as more images.

Where boxes have gradients, these are poolings too, one for each column of the rois, with derivatives for the
weights of the taps. So what holds of the features holds of them; but in the boxes they have none again.

The functions serve eager mode and compilers under the Autograd key, and `torch.func` before its transforms
take an operator apart, since there an `autograd.Function` has rules of its own for each of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import schema
from .layout import is_channels_last
from .schema import DTYPES, Maps, Pooling

_PRODUCTS = 2**18  # numbers at once, which a cache holds
_below_autograd = torch._C._AutoDispatchBelowAutograd


class _Pool(Function):
    """Features to pooled features."""

    @staticmethod
    def forward(pooling: Pooling, rois: Tensor, levels: Tensor | None, *features: Tensor) -> Tensor:
        with _below_autograd():
            return schema.pool(features, rois, levels, pooling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None = None) -> None:
        ctx.pooling, rois, levels, *features = inputs
        _save(ctx, rois, levels, *(features if ctx.pooling.box_gradients else ()))
        ctx.maps = Maps(
            [*features[0].shape[:2], *(size for f in features for size in f.shape[2:])],
            [DTYPES.index(f.dtype) for f in features],
            [is_channels_last(f) for f in features],
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, scatter: Any = schema.scatter) -> tuple[Any, ...]:
        grads: Sequence[Tensor | None] = (None,) * len(ctx.maps.dtypes)
        if grad is None:
            return None, None, None, *grads
        rois, levels, *features = ctx.saved_tensors
        _, of_rois, _, *of_features = ctx.needs_input_grad
        if any(of_features):
            grads = scatter(grad, rois, levels, ctx.maps, ctx.pooling)
        boxes = _of_boxes(features, grad, rois, levels, ctx.pooling) if of_rois else None
        return None, boxes, None, *grads

    @staticmethod
    def jvp(ctx: Any, _pooling: Any, rois_tangent: Any, _levels: Any, *tangents: Any) -> Any:
        rois, levels, *features = ctx.saved_tensors
        moved = []
        if rois_tangent is not None:
            for column, pooling in _columns(rois, ctx.pooling):
                slope = schema.pool(features, rois, levels, pooling)
                moved.append(slope * _per_roi(rois_tangent[:, column], slope))
        if any(t is not None for t in tangents):
            moved.append(schema.pool(_filled(tangents, ctx.maps), rois, levels, ctx.pooling))
        return sum(moved[1:], moved[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, pooling: Pooling, rois: Tensor, levels: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        _, rois_dim, levels_dim, *dims = in_dims
        if rois_dim is None and levels_dim is None:
            more_channels = [
                _batch(f, dim, size, 1).flatten(1, 2) for f, dim in zip(features, dims, strict=True)
            ]
            out = schema.pool(more_channels, rois, levels, pooling)
            return _split(out, 1, size), 1
        batched = any(dim is not None for dim in dims)
        images = features[0].shape[:1] if dims[0] is None else features[0].movedim(dims[0], 0).shape[1:2]
        rois, levels = _join_rois(rois, rois_dim, levels, levels_dim, size, images[0] if batched else None)
        if batched:
            features = tuple(
                _batch(f, dim, size, 0).flatten(0, 1) for f, dim in zip(features, dims, strict=True)
            )
        out = schema.pool(features, rois, levels, pooling)
        return _split(out, 0, size), 0


class _Once(Function):
    """The rois of a derivative, which are differentiated in them already.

    A function of its own: autograd passes it by where nobody asks for what is behind it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rois: Tensor) -> Tensor:
        return rois.view_as(rois)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError("box_gradients have no second derivative in the boxes")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _Once.backward(ctx, tangent)


class _Scatter(Function):
    """The adjoint of `_Pool`: gradients of pooled features to those of the features."""

    @staticmethod
    def forward(
        maps: Maps, pooling: Pooling, grad: Tensor, rois: Tensor, levels: Tensor | None
    ) -> tuple[Tensor, ...]:
        with _below_autograd():
            return tuple(schema.scatter(grad, rois, levels, maps, pooling))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.maps, ctx.pooling, grad, rois, levels = inputs
        _save(ctx, rois, levels, *([grad] if ctx.pooling.box_gradients else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 5
        rois, levels, *saved = ctx.saved_tensors
        values = _filled(grads, ctx.maps)
        _, _, of_grad, of_rois, _ = ctx.needs_input_grad
        pooled = schema.pool(values, rois, levels, ctx.pooling) if of_grad else None
        boxes = _of_boxes(values, saved[0], rois, levels, ctx.pooling) if of_rois and saved else None
        return None, None, pooled, boxes, None

    @staticmethod
    def jvp(ctx: Any, _maps: Any, _pooling: Any, tangent: Any, rois_tangent: Any, _levels: Any) -> Any:
        rois, levels, *saved = ctx.saved_tensors
        moved = []
        if rois_tangent is not None:
            for column, pooling in _columns(rois, ctx.pooling):
                share = saved[0] * _per_roi(rois_tangent[:, column], saved[0])
                moved.append(schema.scatter(share, rois, levels, ctx.maps, pooling))
        if tangent is not None:
            moved.append(schema.scatter(tangent, rois, levels, ctx.maps, ctx.pooling))
        return tuple(sum(parts[1:], parts[0]) for parts in zip(*moved, strict=True))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        maps: Maps,
        pooling: Pooling,
        grad: Tensor,
        rois: Tensor,
        levels: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        _, _, grad_dim, rois_dim, levels_dim = in_dims
        images, channels, *sizes = maps.shape
        if rois_dim is None and levels_dim is None:
            shape = [images, size * channels, *sizes]
            grad, place = _batch(grad, grad_dim, size, 1).flatten(1, 2), 1
        else:
            shape = [size * images, channels, *sizes]
            rois, levels = _join_rois(rois, rois_dim, levels, levels_dim, size, images)
            grad, place = _batch(grad, grad_dim, size, 0).flatten(0, 1), 0
        grads = schema.scatter(grad, rois, levels, maps._replace(shape=shape), pooling)
        return tuple(_split(g, place, size) for g in grads), (place,) * len(grads)


def register() -> None:
    """Make these functions the gradients of the operators."""
    _register(schema.forward_operator, _Pool, _of_pool, lambda out: out)
    _register(schema.backward_operator, _Scatter, _of_scatter, list)


def _of_pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    pooling = Pooling(*rest)
    return pooling, _at_most_once(rois, pooling), levels, *features


def _of_scatter(grad: Tensor, rois: Tensor, levels: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    maps, pooling = Maps(*rest[:3]), Pooling(*rest[3:])
    return maps, pooling, grad, _at_most_once(rois, pooling), levels


def _at_most_once(rois: Tensor, pooling: Pooling) -> Tensor:
    differentiable = pooling.derivative and pooling.box_gradients
    return _Once.apply(rois) if differentiable else rois


def _register(
    operator: Callable[[], Any],
    function: Any,
    arguments: Callable[..., tuple[Any, ...]],
    result: Callable[[Any], Any],
) -> None:
    """Register a function, given what turns the operator's arguments into its own and its result back."""
    apply_here = super(Function, function).apply  # without what torch.func adds, which takes 20 us

    def autograd(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], list) else args[:1]  # the features, or the gradient
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*first, args[1]))
        if wanted or forward_ad._current_level >= 0:
            return result(apply_here(*arguments(*args)))
        with _below_autograd():
            return operator()(*args)

    def functorch(*args: Any) -> Any:
        transform = torch._C._functorch.peek_interpreter_stack().key()
        if transform == torch._C._functorch.TransformType.Functionalize:
            return _functionalize(operator(), args)
        return result(function.apply(*arguments(*args)))

    def batched(*args: Any) -> Any:
        return result(_batched(function, arguments(*args)))

    name = operator().name().split("::")[1].removesuffix(".default")
    schema.LIBRARY.impl(name, autograd, "Autograd")
    # Reached only while a transform of torch.func is active, so it costs nothing otherwise.
    schema.LIBRARY.impl(name, functorch, "FuncTorchDynamicLayerFrontMode")
    # The older vmap, by which autograd takes a batch of gradients (`is_grads_batched`).
    schema.LIBRARY.impl(name, batched, "Batched")


def _functionalize(operator: Any, args: tuple[Any, ...]) -> Any:
    """Neither operator mutates or is a view: what is within the functional tensors is all that counts."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    interpreter: Any = retrieve_current_functorch_interpreter()
    context = FunctorchFunctionalizeAPI(interpreter)
    inner = context.unwrap_tensors(args)
    with context.redispatch_to_next():
        return context.wrap_tensors(operator(*inner))


def _batched(function: Any, args: tuple[Any, ...]) -> Any:
    """Apply the rule for a batch dimension to tensors of the older vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level > 1:
        raise NotImplementedError("batches of gradients of batches of gradients: use torch.func.vmap")

    def is_batched(arg: Any) -> bool:
        return isinstance(arg, Tensor) and torch._C._functorch.is_legacy_batchedtensor(arg)

    in_dims = [0 if is_batched(arg) else None for arg in args]
    args = tuple(torch._remove_batch_dim(a, level, 1, 0) if is_batched(a) else a for a in args)
    size = next(arg.shape[0] for arg, dim in zip(args, in_dims, strict=True) if dim == 0)
    out, dims = function.vmap(_Batch(size), in_dims, *args)

    def batch(t: Tensor, dim: int) -> Tensor:  # in front also in memory, as forward mode wants it
        return torch._add_batch_dim(t.movedim(dim, 0).contiguous(), 0, level)

    return batch(out, dims) if isinstance(out, Tensor) else tuple(map(batch, out, dims))


class _Batch(NamedTuple):
    """What a rule for a batch dimension is told."""

    batch_size: int


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    # A tangent that is missing must not look like one that is zero: boxes may not have any.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _filled(tensors: Sequence[Tensor | None], maps: Maps) -> list[Tensor]:
    """One tensor per map, zeros where there is none."""
    like = next(t for t in tensors if t is not None)
    return [
        like.new_zeros((*maps.shape[:2], *size), dtype=DTYPES[dtype]) if t is None else t
        for t, size, dtype in zip(tensors, maps.sizes, maps.dtypes, strict=True)
    ]


def _of_boxes(
    values: Sequence[Tensor], grad: Tensor, rois: Tensor, levels: Tensor | None, pooling: Pooling
) -> Tensor | None:
    """The gradient of the rois, given that of the pooled values; the index of the image has none."""
    if not pooling.box_gradients:
        return None
    if pooling.derivative:
        return torch.zeros_like(rois)  # which nobody sees: it goes to `_Once`
    gradient = [torch.zeros_like(rois[:, 0])]
    for _, derivative in _columns(rois, pooling):
        slope = schema.pool(values, rois, levels, derivative)
        gradient.append(_products(slope, grad, rois.dtype))
    return torch.stack(gradient, 1)


def _products(slope: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner product of two pooled tensors for each RoI, in a precision."""
    if is_channels_last(slope):
        slope, grad = slope.movedim(1, -1), grad.movedim(1, -1)
    if type(slope) is not Tensor or type(grad) is not Tensor or slope.numel() <= _PRODUCTS:
        return _sum_of_products(slope.to(dtype), grad.to(dtype))  # a loop would be unrolled, or not local
    at_once = max(1, _PRODUCTS * len(slope) // slope.numel())
    parts = zip(torch.split(slope, at_once), torch.split(grad, at_once), strict=True)
    return torch.cat([_sum_of_products(s.to(dtype), g.to(dtype)) for s, g in parts])


def _sum_of_products(slope: Tensor, grad: Tensor) -> Tensor:
    """What does not move adds nothing, be the gradient there NaN, as of a RoI that cannot be pooled."""
    return torch.where(slope == 0, slope, slope * grad).sum(list(range(1, slope.dim())))


def _columns(rois: Tensor, pooling: Pooling) -> Iterator[tuple[int, Pooling]]:
    """The columns that boxes have in the rois, each with the pooling of its derivative."""
    if not pooling.box_gradients:
        raise NotImplementedError(
            "boxes must not carry a tangent: pooling has no derivative in the boxes without box_gradients"
        )
    for column in range(1, rois.shape[1]):
        yield column, pooling._replace(derivative=column)


def _per_roi(number: Tensor, like: Tensor) -> Tensor:
    """One number per RoI, to be multiplied with what is pooled."""
    return number.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _batch(t: Tensor, dim: int | None, size: int, place: int) -> Tensor:
    """Put the batch dimension at `place`; a tensor without one is repeated."""
    if dim is not None:
        return t.movedim(dim, place)
    return t.unsqueeze(place).expand(*t.shape[:place], size, *t.shape[place:])


def _split(t: Tensor, place: int, size: int) -> Tensor:
    """The batch dimension apart again."""
    return t.reshape(*t.shape[:place], size, t.shape[place] // size, *t.shape[place + 1 :])


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
