"""Operator contracts: schemas, shapes, gradients, and which engine does the work.

`roialign::multiscale_roi_align` and its backward are one operator each for all levels. An engine is
a module with `empty`, `forward(out, ...)` and `backward(grads, ...)`, as in `reference.py`; what to
allocate is decided here, once for the real and the fake kernels, and engines fill it. The operator is
linear in the features, so backward saves no feature map and the backward of backward is forward.
"""

import functools
import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

_LIB = torch.library.Library("roialign", "DEF")  # type: ignore[no-untyped-call]

_POOLING = "float[] scales, int sampling_ratio, bool aligned, float canonical_scale, float canonical_level"
_LIB.define(  # type: ignore[no-untyped-call]
    "multiscale_roi_align(Tensor[] features, Tensor rois, Tensor? levels, "
    f"SymInt pooled_height, SymInt pooled_width, {_POOLING}) -> Tensor"
)
# `shape` is N, C, then H, W of each level; `dtypes` are indices into DTYPES.
_LIB.define(  # type: ignore[no-untyped-call]
    "multiscale_roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, "
    f"SymInt[] shape, int[] dtypes, bool[] channels_last, {_POOLING}) -> Tensor[]"
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

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
        return importlib.import_module(name)
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


def is_channels_last(t: Tensor) -> bool:
    """Whether channels lie innermost. A tensor that is also contiguous counts as contiguous."""
    return bool(t.stride(1) == 1 and t.stride(3) != 1)


def _empty_output(engine: Any, features: Sequence[Tensor], rois: Tensor, height: int, width: int) -> Tensor:
    first = features[0]
    shape = (rois.shape[0], first.shape[1], height, width)
    out: Tensor = engine.empty(shape, first.dtype, first.device, is_channels_last(first))
    return out


def _empty_grads(
    engine: Any,
    grad: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[bool],
) -> list[Tensor]:
    images, _, *sizes = shape
    channels = grad.shape[1]  # of those that are here, should the maps be sharded along channels
    return [
        engine.empty((images, channels, height, width), DTYPES[dtype], grad.device, last)
        for height, width, dtype, last in zip(sizes[::2], sizes[1::2], dtypes, channels_last, strict=True)
    ]


def _check_rows(rois: Tensor, levels: Tensor | None, images: int, maps: int) -> None:
    """Only the operator sees the data when the graph is compiled; on a GPU looking would be a sync."""
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


def _forward(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, height: int, width: int, *pooling: Any
) -> Tensor:
    if rois.device.type == "cpu":
        _check_rows(rois, levels, features[0].shape[0], len(features))
    module = engine(rois.device.type)
    out = _empty_output(module, features, rois, height, width)
    if out.numel():
        module.forward(out, features, rois, levels, *pooling)
    return out


def _forward_fake(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, height: int, width: int, *_pooling: Any
) -> Tensor:
    return _empty_output(reference, features, rois, height, width)


def _backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[bool],
    *pooling: Any,
) -> list[Tensor]:
    module = engine(grad.device.type)
    grads = _empty_grads(module, grad, shape, dtypes, channels_last)
    if grads[0].numel():
        module.backward(grads, grad, rois, levels, *pooling)
    return grads


def _backward_fake(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[bool],
    *_pooling: Any,
) -> list[Tensor]:
    return _empty_grads(reference, grad, shape, dtypes, channels_last)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, _, _, *ctx.pooling = inputs
    ctx.save_for_backward(rois, levels)
    ctx.shape = [*features[0].shape[:2], *(size for f in features for size in f.shape[2:])]
    ctx.dtypes = [DTYPES.index(f.dtype) for f in features]
    ctx.channels_last = [is_channels_last(f) for f in features]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    grads = torch.ops.roialign.multiscale_roi_align_backward(
        grad, rois, levels, ctx.shape, ctx.dtypes, ctx.channels_last, *ctx.pooling
    )
    return grads, *(None,) * 9


def _save_for_double_gradient(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, rois, levels, _, _, _, *ctx.pooling = inputs
    ctx.save_for_backward(rois, levels)
    ctx.pooled = grad.shape[2:]


def _double_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    out = torch.ops.roialign.multiscale_roi_align(grads, rois, levels, *ctx.pooled, *ctx.pooling)
    return out, *(None,) * 10


def _register(name: str, kernel: Any, fake: Any, gradient: Any, setup_context: Any) -> None:
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"roialign::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"roialign::{name}", gradient, setup_context=setup_context, lib=_LIB)

    def transformed(*args: Any) -> Any:
        return getattr(importlib.import_module("roialign.transforms"), name)(*args)

    # Reached only while a transform of torch.func is active, so it costs nothing otherwise.
    _LIB.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")  # type: ignore[no-untyped-call]


_register("multiscale_roi_align", _forward, _forward_fake, _gradient, _save_for_gradient)
_register(
    "multiscale_roi_align_backward",
    _backward,
    _backward_fake,
    _double_gradient,
    _save_for_double_gradient,
)
