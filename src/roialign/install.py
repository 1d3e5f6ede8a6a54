"""Our engines behind torchvision's own operators, for every caller in the process.

`torchvision::roi_align` and its backward keep their names and schemas: a graph that is captured has them as
ever. What changes is what they run on the devices that have an engine here, and what they can be asked:
half maps with float32 boxes, second derivatives, forward mode, `torch.func`. Where autograd or a transform
has a say the call becomes one of our own operator, which has all the rules.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
import torchvision.ops.poolers as poolers
from torch import Tensor
from torch.autograd import forward_ad

from . import functional, ops, reference, schema
from .plain import is_plain
from .pooler import is_inferred
from .portable import is_exporting, is_tracing
from .rois import in_dtype, working_dtype
from .schema import DTYPES, Maps, Pooling

_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # of the devices that have engines
_lock = threading.RLock()
_library: Any = None  # of the kernels, while they are in force
_pool_levels: Any = None  # torchvision's function, while ours stands in its place


def install(*, pooler: bool = True) -> AbstractContextManager[None]:
    """Put our engines behind torchvision's RoIAlign, for every caller in the process.

    `torchvision.ops.roi_align`, `RoIAlign` and `MultiScaleRoIAlign`, programs in TorchScript, compiled and
    exported ones: none of them changes, and no model need be converted. On the CPU, and on a GPU where the
    GPU engine serves. Quantised maps and other devices remain torchvision's.

    Any number of threads may call this and `uninstall`. But PyTorch does not guard its table of kernels
    against calls that run while it changes, so do it where no other thread is pooling: at the start.

    Args:
        pooler: whether `torchvision.ops.MultiScaleRoIAlign` pools all its levels in one call, too, except
            in what is traced, scripted or exported. Else it makes one call for each level, as ever.

    Returns:
        A context manager that on leaving restores what was before. It need not be entered.

    Raises:
        RuntimeError: this torchvision has no operators: it was built for another torch.

    Examples:
        >>> import torchvision
        >>> with install():
        ...     torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 1)
        tensor([[[[1.]]]])
    """
    before = is_installed(), _pool_levels is not None
    with _lock:
        _set(True, pooler)
    return _Restore(before)


def uninstall() -> None:
    """Undo `install`: torchvision is as it was. Without it, nothing happens."""
    with _lock:
        _set(False, False)


def is_installed() -> bool:
    """Whether our engines are behind torchvision's operators."""
    return _library is not None


class _Restore(AbstractContextManager[None]):
    def __init__(self, before: tuple[bool, bool]) -> None:
        self.before = before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _set(*self.before)


def _set(operators: bool, whole: bool) -> None:
    """Have the operators, and the pooling of all levels, be ours or torchvision's."""
    global _library, _pool_levels
    if operators and _library is None:
        _library = _override()
    elif not operators and _library is not None:
        _library._destroy()
        _library = None
    if whole and _pool_levels is None:
        _pool_levels = poolers._multiscale_roi_align
        poolers._multiscale_roi_align = _over(_pool_levels, _served())
    elif not whole and _pool_levels is not None:
        poolers._multiscale_roi_align = _pool_levels
        _pool_levels = None


def _override() -> Any:
    """Register our kernels; they stand before torchvision's until the library is destroyed."""
    if not hasattr(torch.ops.torchvision, "roi_align"):
        raise RuntimeError("torchvision must have its operators, got a build for another version of torch")
    library: Any = torch.library.Library("torchvision", "IMPL")  # type: ignore[no-untyped-call]
    kernels: list[tuple[str, Callable[..., Any], str]] = []
    for device in _served():
        key = _KEYS[device]
        kernels += [
            ("roi_align", _forward, key),
            ("roi_align", _forward_recorded, f"Autograd{key}"),
            ("roi_align", functools.partial(_forward_autocast, device), f"Autocast{key}"),
            ("_roi_align_backward", _backward, key),
            ("_roi_align_backward", _backward_recorded, f"Autograd{key}"),
        ]
    for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):
        kernels += [("roi_align", _forward_ours, key), ("_roi_align_backward", _backward_ours, key)]
    kernels += [("roi_align", _forward_fake, "Meta"), ("_roi_align_backward", _backward_fake, "Meta")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is what is wanted
        for name, kernel, key in kernels:
            # Not by `impl` of the library, which keeps a list of its own and may refuse what is on it.
            library.m.impl(name, key, kernel, False)
    return library


def _served() -> list[str]:
    """Devices of this machine that have an engine of ours."""
    gpus = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
    return [device for device in ("cpu", *gpus) if ops.engine(device) is not reference]


def _taken(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> tuple[list[Tensor], Tensor, None, Pooling]:
    """The arguments of torchvision's operator as ours has them."""
    pooling = Pooling((height, width), [scale], max(ratio, 0), aligned, (), (0,))
    return [input], in_dtype(rois, working_dtype([input])), None, pooling


def _forward(*args: Any) -> Tensor:
    features, rois, levels, pooling = _taken(*args)
    return ops._forward(features, rois, levels, *pooling)


def _forward_ours(*args: Any) -> Tensor:
    return schema.pool(*_taken(*args))


def _forward_recorded(input: Tensor, rois: Tensor, *how: Any) -> Tensor:
    """Where nothing is recorded, what is captured remains torchvision's operator."""
    if is_plain((input, rois)):
        taken = _taken(input, rois, *how)
        ops.check(*taken)
        return ops.pool(*taken)
    if _is_recorded(input, rois):
        return _forward_ours(input, rois, *how)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchvision.roi_align.default(input, rois, *how)  # type: ignore[no-any-return]


def _forward_autocast(device: str, input: Tensor, rois: Tensor, *how: Any) -> Tensor:
    """Maps are read as they are; torchvision makes a float32 copy of them."""
    with torch.autocast(device, enabled=False):
        rois = in_dtype(rois, working_dtype([input]))
        return torch.ops.torchvision.roi_align.default(input, rois, *how)  # type: ignore[no-any-return]


def _forward_fake(*args: Any) -> Tensor:
    features, rois, levels, pooling = _taken(*args)
    return ops._forward_fake(features, rois, levels, *pooling)


def _given(
    grad: Tensor, rois: Tensor, scale: float, height: int, width: int, images: int, channels: int,
    rows: int, columns: int, ratio: int, aligned: bool,
) -> tuple[Tensor, Tensor, None, Maps, Pooling]:  # fmt: skip
    """The arguments of torchvision's backward as ours has them."""
    maps = Maps([images, channels, rows, columns], [DTYPES.index(grad.dtype)], [False])
    pooling = Pooling((height, width), [scale], max(ratio, 0), aligned, (), (0,))
    return grad, in_dtype(rois, working_dtype([grad])), None, maps, pooling


def _backward(*args: Any) -> Tensor:
    grad, rois, levels, maps, pooling = _given(*args)
    return ops._backward(grad, rois, levels, *maps, *pooling)[0]


def _backward_ours(*args: Any) -> Tensor:
    return schema.scatter(*_given(*args))[0]


def _backward_recorded(grad: Tensor, rois: Tensor, *how: Any) -> Tensor:
    if _is_recorded(grad, rois):
        return _backward_ours(grad, rois, *how)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchvision._roi_align_backward.default(grad, rois, *how)  # type: ignore[no-any-return]


def _backward_fake(*args: Any) -> Tensor:
    grad, rois, levels, maps, pooling = _given(*args)
    return ops._backward_fake(grad, rois, levels, *maps, *pooling)[0]


def _is_recorded(tensor: Tensor, rois: Tensor) -> bool:
    """Whether autograd, in either mode, has a say."""
    wanted = torch.is_grad_enabled() and (tensor.requires_grad or rois.requires_grad)
    return wanted or forward_ad._current_level >= 0


def _over(original: Callable[..., Tensor], devices: list[str]) -> Callable[..., Tensor]:
    """What stands in the place of `torchvision.ops.poolers._multiscale_roi_align`."""

    @functools.wraps(original)
    def pool(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: list[int],
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Tensor:
        leaving = is_tracing() or is_exporting()
        if leaving or scales is None or mapper is None or x_filtered[0].device.type not in devices:
            return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
        canonical: dict[str, Any] = {
            "canonical_scale": getattr(mapper, "s0", 224),
            "canonical_level": getattr(mapper, "lvl0", 4),
        }
        by_area = is_inferred({"scales": scales, "map_levels": mapper, **canonical})
        levels = None if by_area else mapper(boxes)
        return functional.multiscale_roi_align(
            x_filtered, boxes, output_size, scales, sampling_ratio, levels=levels, **canonical
        )

    pool.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return pool
