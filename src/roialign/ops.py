"""Which engine does the work of an operator, and what it may count on.

`roialign::multiscale_roi_align` and its backward are one operator each for all levels. An engine is
a module with `empty`, `forward(out, ...)` and `backward(grads, ...)`, as in `reference.py`; what to
allocate is decided here, once for the real and the fake kernels, and engines fill it. Exported programs
call the operators too, so arguments are checked here: no engine reads what is not there.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import gradients, reference, schema
from .apart import do_apart
from .layout import is_channels_last
from .plain import autograd_is_below, is_plain, is_recorded
from .schema import DTYPES, Maps, Pooling
from .taps import EXACT

# device type -> module of its engine, imported when first run. Any other device: the reference.
# On "xpu" the GPU engine has never been run; Triton serves it as it does "cuda".
ENGINES: dict[str, str] = {
    "cpu": "roialign.cpu.engine",
    "cuda": "roialign.gpu.engine",
    "xpu": "roialign.gpu.engine",
}


def engine(device_type: str) -> ModuleType:
    """The engine that serves a device."""
    name = ENGINES.get(device_type)
    return _load(name) if name else reference


@functools.cache
def _load(name: str) -> ModuleType:
    try:
        return do_apart(importlib.import_module, name)
    except Exception as error:  # a Numba or Triton that is missing or broken can raise anything
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{name} cannot be used, the slow reference serves instead ({reason})", stacklevel=2)
        return reference


@contextmanager
def use_reference() -> Iterator[None]:
    """Let the reference serve every device, in all threads, while the context lasts."""
    saved = dict(ENGINES)
    ENGINES.clear()
    try:
        yield
    finally:
        ENGINES.update(saved)


def _empty_output(engine: Any, features: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    first = features[0]
    shape = (rois.shape[0], first.shape[1], *pooling.output_size)
    out: Tensor = engine.empty(shape, first.dtype, first.device, is_channels_last(first))
    return out


def _empty_grads(engine: Any, grad: Tensor, maps: Maps) -> list[Tensor]:
    images = maps.shape[0]
    channels = grad.shape[1]  # of those that are here, should the maps be sharded along channels
    return [
        engine.empty((images, channels, *size), DTYPES[dtype], grad.device, last)
        for size, dtype, last in zip(maps.sizes, maps.dtypes, maps.channels_last, strict=True)
    ]


def _require(holds: bool, rule: str, received: Callable[[], object]) -> None:
    if not holds:
        raise ValueError(f"{schema.NAMESPACE}: {rule}, got {received()}")


def _shown(*tensors: Tensor) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, str(t.device)) for t in tensors]


def _check_features(features: Sequence[Tensor]) -> None:
    """As `arguments` does, for those who call the operator itself."""
    _require(len(features) > 0, "features must hold at least one map", lambda: 0)
    first = features[0]
    for f in features:
        sound = f.dim() == first.dim() in (4, 5) and f.shape[:2] == first.shape[:2] and min(f.shape[2:]) > 0
        _require(
            sound and f.dtype in DTYPES and f.device == first.device,
            "features must be non-empty maps (N, C, H, W) or (N, C, D, H, W) of one N, C and device, "
            "of float32, float64, float16 or bfloat16",
            lambda: _shown(*features),
        )


def _check_rois(
    rois: Tensor, levels: Tensor | None, dtypes: Sequence[torch.dtype], axes: int, device: torch.device
) -> None:
    working, columns = torch.float64 if torch.float64 in dtypes else torch.float32, 1 + 2 * axes
    _require(
        rois.dim() == 2 and rois.shape[1] == columns and rois.dtype == working and rois.device == device,
        f"rois must have shape (K, {columns}), {working} and device {device}",
        lambda: _shown(rois),
    )
    if levels is not None:
        sound = levels.dim() == 1 and levels.shape[0] == rois.shape[0] and levels.dtype == torch.int64
        _require(
            sound and levels.device == device,
            f"levels must have shape (K,), int64 and device {device}",
            lambda: _shown(levels),
        )


def _check_pooling(pooling: Pooling, maps: int, axes: int) -> None:
    size, scales, ratio, _, thresholds, order, _, derivative = pooling
    _require(
        len(size) == axes and min(size) > 0, "output_size must be a positive integer per axis", lambda: size
    )
    _require(
        len(scales) in (maps, maps * axes), "scales must hold one number per map, or per axis", lambda: scales
    )
    _require(0 <= derivative <= 2 * axes, "derivative must be 0 or a column of the rois", lambda: derivative)
    _require(ratio >= EXACT, "sampling_ratio must be 0 or more, or -1, which is exact", lambda: ratio)
    _require(
        len(order) == len(thresholds) + 1 and min(order) >= 0 and max(order) < maps,
        "order must hold a map for each threshold and one more",
        lambda: (thresholds, order),
    )


def check(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling) -> None:
    """Raise an error about arguments that no engine can take."""
    _check_features(features)
    axes = features[0].dim() - 2
    _check_rois(rois, levels, [f.dtype for f in features], axes, features[0].device)
    _check_pooling(pooling, len(features), axes)


def _check_backward(grad: Tensor, rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Pooling) -> None:
    shape, dtypes, channels_last = maps
    n, axes = len(dtypes), len(pooling.output_size)
    _require(axes in (2, 3), "output_size must be a positive integer per axis", lambda: pooling.output_size)
    _require(
        n > 0 and len(shape) == 2 + axes * n and len(channels_last) == n and min(shape[2:]) > 0,
        "shape, dtypes and channels_last must describe the same maps",
        lambda: maps,
    )
    _require(
        min(dtypes) >= 0 and max(dtypes) < len(DTYPES), "dtypes must be indices of a dtype", lambda: dtypes
    )
    _check_rois(rois, levels, [DTYPES[i] for i in dtypes], axes, grad.device)
    _check_pooling(pooling, n, axes)
    _require(
        grad.dim() == 2 + axes
        and grad.shape[0] == rois.shape[0]
        and tuple(grad.shape[2:]) == tuple(pooling.output_size)
        and grad.dtype in DTYPES,
        "grad must have shape (K, C, *output_size)",
        lambda: _shown(grad),
    )


def _check_rows(rois: Tensor, levels: Tensor | None, images: int, maps: int) -> None:
    """Raise an error for the first row of an image or a level that does not exist."""
    if rois.shape[0] == 0:
        return
    checks = [("boxes", "image index", rois[:, 0], -1.0, images)]
    if levels is not None:
        checks.append(("levels", "level", levels, -1, maps))
    for argument, what, index, above, stop in checks:
        least, most = torch.aminmax(index)
        if not (least > above and most < stop):  # also when there is a NaN
            row = int((~((index > above) & (index < stop))).nonzero()[0, 0])
            raise ValueError(f"{argument}[{row}] must have its {what} in [0, {stop}), got {index[row]:g}")


def _pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool, of arguments that have been checked but for the rows of rois and levels."""
    device = rois.device.type
    module = engine(device)
    out = _empty_output(module, features, rois, pooling)
    lost = module.forward(out, features, rois, levels, pooling) if out.numel() else None
    if lost is not False and device == "cpu":
        _check_rows(rois, levels, features[0].shape[0], len(features))
    return out


class _PlainPool(Function):
    """`gradients._Pool` for autograd alone: with the context set up in forward `apply` takes 2 us, not 11."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gradients._Pool.setup_context(ctx, args)
        pooling, rois, levels, *features = args
        return _pool(features, rois, levels, pooling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return gradients._Pool.backward(ctx, grad, scatter)


_apply_plain = super(Function, _PlainPool).apply


def pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool, of arguments that have been checked: by the operator, unless calling its kernel is the same."""
    tensors = (*features, rois) if levels is None else (*features, rois, levels)
    if is_plain(tensors):
        if not is_recorded(tensors):
            return _pool(features, rois, levels, pooling)
        if not autograd_is_below():
            out: Tensor = _apply_plain(pooling, rois, levels, *features)
            return out
    return schema.pool(features, rois, levels, pooling)


def scatter(grad: Tensor, rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Pooling) -> list[Tensor]:
    """The adjoint of `pool`, likewise. Hooks may have been at the arguments, so they are checked."""
    tensors = (grad, rois) if levels is None else (grad, rois, levels)
    if is_plain(tensors) and not is_recorded(tensors):
        return _backward(grad, rois, levels, *maps, *pooling)
    return schema.scatter(grad, rois, levels, maps, pooling)


def _forward(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, *rest: Any) -> Tensor:
    pooling = Pooling(*rest)
    check(features, rois, levels, pooling)
    return _pool(features, rois, levels, pooling)


def _forward_fake(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, *rest: Any) -> Tensor:
    pooling = Pooling(*rest)
    return _empty_output(reference, features, rois, pooling)


def _backward(grad: Tensor, rois: Tensor, levels: Tensor | None, *rest: Any) -> list[Tensor]:
    maps, pooling = Maps(*rest[:3]), Pooling(*rest[3:])
    _check_backward(grad, rois, levels, maps, pooling)
    module = engine(grad.device.type)
    grads = _empty_grads(module, grad, maps)
    if grads[0].numel():
        module.backward(grads, grad, rois, levels, pooling)
    return grads


def _backward_fake(grad: Tensor, rois: Tensor, levels: Tensor | None, *rest: Any) -> list[Tensor]:
    return _empty_grads(reference, grad, Maps(*rest[:3]))


for _operator, _kernel, _fake in (
    (schema.forward_operator(), _forward, _forward_fake),
    (schema.backward_operator(), _backward, _backward_fake),
):
    _name = _operator.name()
    schema.LIBRARY.impl(_name.split("::")[1], _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_name, _fake, lib=schema.LIBRARY)
gradients.register()
