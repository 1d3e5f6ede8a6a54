"""Pooling by torchvision's operator of one map: for programs that are to run where this package is not.

TorchScript compiles these functions from their source, so they are written in what it knows;
`torch.jit.trace`, and the older ONNX export that is built on it, run them. The result is that of our
operators but for what torchvision has no answer to: boxes of NaN or infinity, images that do not exist.
"""

import importlib
import math
import sys

import torch
from torch import Tensor
from torch.jit.annotations import BroadcastingList2

from .apart import do_apart
from .levels import wanted_level


def is_available() -> bool:
    """Whether there is torchvision, and with it the operator."""
    try:
        do_apart(importlib.import_module, "torchvision")  # which must not become part of a trace
    except Exception:  # one built for another torch can raise anything
        return False
    return hasattr(torch.ops.torchvision, "roi_align")


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is at work."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())  # to a compiler a constant


def is_exporting() -> bool:
    """Whether `torch.export` is at work."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()  # PyTorch 2.6


def is_leaving() -> bool:
    """Whether a program is made that this package's operator cannot be part of, but torchvision's can.

    Such are traces and older ONNX models; and ONNX models by `torch.export`, where nobody has imported the
    translation of our operator, but somebody torchvision, whose translations are looked up at the start.
    """
    if is_tracing():
        return is_available()
    to_onnx = is_exporting() and torch.onnx.is_in_onnx_export()
    return to_onnx and f"{__package__}.onnx" not in sys.modules and "torchvision" in sys.modules


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """`functional.roi_align`."""
    rois = boxes if isinstance(boxes, Tensor) else boxes_to_rois(boxes, [input])
    return pool([input], rois, None, output_size, [spatial_scale], sampling_ratio, aligned, 224.0, 4.0)


def multiscale_roi_align(
    features: list[Tensor],
    boxes: list[Tensor],
    output_size: BroadcastingList2[int],
    scales: list[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224.0,
    canonical_level: float = 4.0,
    levels: Tensor | None = None,
) -> Tensor:
    """`functional.multiscale_roi_align`."""
    rois = boxes_to_rois(boxes, features)
    return pool(
        features, rois, levels, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )


def pool_named_maps(
    x: dict[str, Tensor],
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]] | None,
    featmap_names: list[str],
    output_size: BroadcastingList2[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: float,
    aligned: bool,
    scales: list[float] | None,
) -> Tensor:
    """`functional.pool_named_maps`."""
    features: list[Tensor] = []
    used: list[float] = []
    for i, name in enumerate(featmap_names):
        if name in x:
            features.append(x[name])
            if scales is not None and len(scales) == len(featmap_names):
                used.append(scales[i])
    if len(features) == 0:
        raise ValueError("x must hold a map named in featmap_names")
    if len(used) > 0:
        scales = used
    if scales is None:
        if image_shapes is None:
            raise ValueError("image_shapes must be given unless scales are")
        scales = infer_scales(features, image_shapes)
    rois = boxes_to_rois(boxes, features)
    return pool(
        features, rois, None, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )


def pool(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> Tensor:
    """Pool the RoIs of every level from its map, and put the results in the order of the RoIs."""
    if len(scales) != len(features):
        raise ValueError("scales must hold one number per map that is used")
    dtype = features[0].dtype
    if len(features) == 1:
        return _pool_one(features[0], rois, output_size, scales[0], sampling_ratio, aligned)
    if levels is None:
        levels = levels_of(rois, scales, canonical_scale, canonical_level)
    shape = [rois.shape[0], features[0].shape[1], output_size[0], output_size[1]]
    pooled = torch.zeros(shape, dtype=dtype, device=rois.device)
    for level, feature in enumerate(features):
        rows = torch.where(levels == level)[0]
        part = _pool_one(feature, rois[rows], output_size, scales[level], sampling_ratio, aligned)
        pooled = pooled.index_put([rows], part.to(dtype))
    return pooled


def _pool_one(
    feature: Tensor, rois: Tensor, output_size: list[int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    # torchvision wants one dtype for both, and has no bfloat16 on a CPU.
    pooled = torch.ops.torchvision.roi_align(
        feature.to(rois.dtype), rois, scale, output_size[0], output_size[1], max(sampling_ratio, 0), aligned
    )
    return pooled.to(feature.dtype)  # type: ignore[no-any-return]


def boxes_to_rois(boxes: list[Tensor], features: list[Tensor]) -> Tensor:
    """`rois.boxes_to_rois`, in the working dtype of the maps."""
    dtype = torch.float32
    for feature in features:
        if feature.dtype == torch.float64:
            dtype = torch.float64
    parts = [torch.zeros([0, 5], dtype=dtype, device=features[0].device)]
    for i, b in enumerate(boxes):
        b = b.to(dtype)
        parts.append(torch.cat([torch.full_like(b[:, :1], i), b], dim=1))
    return torch.cat(parts)


def infer_scales(features: list[Tensor], image_shapes: list[tuple[int, int]]) -> list[float]:
    """`levels.infer_scales`."""
    height, width = 0, 0
    for shape in image_shapes:
        height, width = max(height, shape[0]), max(width, shape[1])
    scales: list[float] = []
    for feature in features:
        strides = [_log2_ratio(height, feature.shape[2]), _log2_ratio(width, feature.shape[3])]
        scales.append(math.pow(0.5, float(max(strides))))
    return scales


def _log2_ratio(image: int, cells: int) -> int:
    image, cells = image * image, cells * cells
    k = 0
    while image >= 2 * cells:
        cells, k = 4 * cells, k + 1
    while image > 0 and 2 * image < cells:
        image, k = 4 * image, k - 1
    return k


def levels_of(rois: Tensor, scales: list[float], canonical_scale: float, canonical_level: float) -> Tensor:
    """Equation 1, as `levels.staircase` has it: the index of the map of each RoI."""
    map_levels: list[int] = []
    for scale in scales:
        map_levels.append(int(round(-math.log(scale) / math.log(2.0))))  # noqa: PERF401, RUF046
    steps = sorted(map_levels)
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    wanted = wanted_level(torch.sqrt(area), canonical_scale, canonical_level)
    index = torch.full_like(area, map_levels.index(steps[0]), dtype=torch.int64)
    for i in range(len(steps) - 1):
        coarser = torch.full_like(index, map_levels.index(steps[i + 1]))
        index = torch.where(wanted > steps[i], coarser, index)
    return index
