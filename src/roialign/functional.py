"""The functional form: check the arguments, call one operator.

The only file that raises errors about arguments; each names the argument, the rule and the value.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from . import ops as ops  # which the operators come with
from . import schema
from .levels import infer_scales, staircase
from .rois import boxes_to_rois, working_dtype
from .schema import DTYPES, Pooling

LevelMap = Callable[[list[Tensor]], Tensor]


@torch.fx.wrap
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int = -1,
    *,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    levels: Tensor | None = None,
) -> Tensor:
    """Pool each box from the level of a feature pyramid that suits its size.

    RoIAlign of Mask R-CNN (arXiv:1703.06870), levels by equation 1 of FPN (arXiv:1612.03144). The
    level of a box is the nearest coarser one that the pyramid has, else its coarsest.

    Args:
        features: maps `(N, C, H_l, W_l)`, in any order, of float32, float64, float16 or bfloat16,
            with any strides; half types are summed in float32.
        boxes: per image a tensor `(L, 4)` of `(x1, y1, x2, y2)`, in pixels of the image, of any
            real dtype; carried in float32 (float64 with float64 features). At most N of them.
        output_size: bins per RoI, `(PH, PW)`, or one number for both.
        scales: cells of each map per pixel of the image, `1 / stride`; any positive numbers.
        sampling_ratio: sampling points per bin and axis; if not positive, as many as the bin has
            cells, rounded up.
        aligned: shift boxes by half a cell, as Detectron2 does, so that cell centres lie at
            whole numbers; and do not widen boxes of less than one cell.
        canonical_scale: side in pixels of the square box that belongs to `canonical_level`.
        canonical_level: k0 of equation 1; level k has stride `2^k`.
        levels: `(K,)` integers, the index in `features` of the map of each box, instead of
            equation 1.

    Returns:
        `(K, C, PH, PW)`, K being the number of boxes of all images, in the dtype and the memory
        format of the first map. A box with a NaN or an infinity gives NaN, and no gradient.
        Differentiable in the features, twice; not in the boxes.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a wrong shape, size, number or device; more boxes tensors than images.

    Examples:
        >>> pyramid = [torch.rand(1, 8, 64 // 2**k, 64 // 2**k) for k in range(4)]
        >>> boxes = [torch.tensor([[10.0, 20.0, 90.0, 120.0]])]
        >>> multiscale_roi_align(pyramid, boxes, 7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32]).shape
        torch.Size([1, 8, 7, 7])
    """
    features = _check_features("features", features)
    rois = _rois_of_lists(boxes, features)
    return _pool(
        features, rois, levels, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )


@torch.fx.wrap
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign on one map, as `torchvision.ops.roi_align` (arXiv:1703.06870).

    Args:
        input: `(N, C, H, W)`, float32, float64, float16 or bfloat16, any strides.
        boxes: `(K, 5)` rows of `(image index, x1, y1, x2, y2)`, or per image a tensor `(L, 4)` of
            `(x1, y1, x2, y2)`; in pixels of the image.
        output_size: bins per RoI, `(PH, PW)`, or one number for both.
        spatial_scale: cells of the map per pixel of the image.
        sampling_ratio: sampling points per bin and axis; if not positive, as many as the bin has
            cells, rounded up.
        aligned: shift boxes by half a cell, as Detectron2 does.

    Returns:
        `(K, C, PH, PW)` in the dtype and memory format of `input`. A box with a NaN or an infinity
        gives NaN.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a wrong shape, size, number or device; on the CPU also an image index outside
            `[0, N)`. On other devices, where looking would cost a synchronisation, that RoI is NaN.
    """
    features = _check_features("input", [input])
    if isinstance(boxes, Tensor):
        _check_boxes("boxes", boxes, 5, features[0])
        rois = boxes.to(working_dtype(features))
    else:
        rois = _rois_of_lists(boxes, features)
    _check_scales("spatial_scale", [spatial_scale], 1)
    return _pool(features, rois, None, output_size, [spatial_scale], sampling_ratio, aligned, 224, 4)


@torch.fx.wrap
def pool_named_maps(
    x: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]] | None,
    featmap_names: Sequence[str],
    output_size: int | Sequence[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: float,
    aligned: bool,
    scales: Sequence[float] | Mapping[str, float] | None,
    map_levels: LevelMap | None,
) -> Tensor:
    """`MultiScaleRoIAlign.forward` as a function: one leaf for `torch.fx`."""
    names = _used_names(x, featmap_names)
    features = _check_features("x", [x[name] for name in names], names)
    sizes = [(f.shape[2], f.shape[3]) for f in features]
    if scales is not None:
        map_scales = _scales_of_names(scales, names, featmap_names)
    else:
        map_scales = infer_scales(sizes, _check_image_shapes(image_shapes, boxes))
    rois = _rois_of_lists(boxes, features)
    levels = map_levels(list(boxes)) if map_levels is not None and len(boxes) else None
    return _pool(
        features,
        rois,
        levels,
        output_size,
        map_scales,
        sampling_ratio,
        aligned,
        canonical_scale,
        canonical_level,
    )


def _pool(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> Tensor:
    size = check_output_size(output_size)
    if levels is not None:
        levels = _check_levels(levels, rois)
    if not canonical_scale > 0:
        raise ValueError(f"canonical_scale must be positive, got {canonical_scale}")
    scales = _check_scales("scales", scales, len(features))
    steps = staircase(scales, canonical_scale, canonical_level, rois.dtype)
    pooling = Pooling(size, scales, max(sampling_ratio, 0), aligned, *steps)
    return schema.pool(features, rois, levels, pooling)


def check_output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    """`(PH, PW)` from one number or two."""
    size = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(size) != 2:
        raise ValueError(f"output_size must be one integer or two, got {output_size!r}")
    for bins in size:
        if not isinstance(bins, (int, torch.SymInt)):  # a union stops older compilers
            raise TypeError(f"output_size must be made of integers, got {output_size!r}")
        if bins < 1:
            raise ValueError(f"output_size must be at least 1, got {output_size!r}")
    return size


def check_featmap_names(featmap_names: Sequence[str]) -> None:
    """Names of the maps to pool from: a non-empty sequence, and not one string."""
    if isinstance(featmap_names, str):
        raise TypeError(f"featmap_names must be a list of names, got the string {featmap_names!r}")
    if len(featmap_names) == 0:
        raise ValueError(f"featmap_names must name at least one map, got {featmap_names!r}")


def _check_features(
    argument: str, features: Sequence[Tensor], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Maps `(N, C, H, W)` that agree in everything but size, dtype and strides."""
    if isinstance(features, Tensor):
        raise TypeError(f"{argument} must be a list of maps, got one tensor of shape {tuple(features.shape)}")
    if len(features) == 0:
        raise ValueError(f"{argument} must hold at least one map, got none")

    def label(i: int) -> str:
        return argument if argument == "input" else f"{argument}[{names[i] if names else i!r}]"

    first = features[0]
    for i, f in enumerate(features):
        if not isinstance(f, Tensor):
            raise TypeError(f"{label(i)} must be a tensor, got {type(f).__name__}")
        if f.dtype not in DTYPES:
            raise TypeError(f"{label(i)} must be float32, float64, float16 or bfloat16, got {f.dtype}")
        if f.dim() != 4:
            raise ValueError(f"{label(i)} must have shape (N, C, H, W), got {tuple(f.shape)}")
        if f.shape[2] < 1 or f.shape[3] < 1:
            raise ValueError(f"{label(i)} must have at least one row and one column, got {tuple(f.shape)}")
        if f.shape[0] != first.shape[0] or f.shape[1] != first.shape[1]:
            raise ValueError(
                f"{label(i)} must have the images and channels of {label(0)}, "
                f"({first.shape[0]}, {first.shape[1]}), got ({f.shape[0]}, {f.shape[1]})"
            )
        if f.device != first.device:
            raise ValueError(
                f"{label(i)} must be on the device of {label(0)}, {first.device}, got {f.device}"
            )
    return list(features)


def _check_boxes(label: str, boxes: Tensor, columns: int, feature: Tensor) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(boxes).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(
            f"{label} must have shape ({'LK'[columns == 5]}, {columns}), got {tuple(boxes.shape)}"
        )
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{label} must hold real numbers, got {boxes.dtype}")
    if boxes.device != feature.device:
        raise ValueError(f"{label} must be on the device of the maps, {feature.device}, got {boxes.device}")


def _rois_of_lists(boxes: Sequence[Tensor], features: list[Tensor]) -> Tensor:
    if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a list with a tensor (L, 4) per image, got {type(boxes).__name__}")
    images = features[0].shape[0]
    if len(boxes) > images:
        raise ValueError(
            f"boxes must hold at most one tensor per image, got {len(boxes)} for {images} images"
        )
    for i, b in enumerate(boxes):
        _check_boxes(f"boxes[{i}]", b, 4, features[0])
    return boxes_to_rois(boxes, features[0], working_dtype(features))


def _check_scales(argument: str, scales: Sequence[float], maps: int) -> list[float]:
    if len(scales) != maps:
        raise ValueError(f"{argument} must hold one number per map, got {len(scales)} for {maps} maps")
    scales = [float(s) for s in scales]
    for s in scales:
        if not 0 < s < math.inf:
            raise ValueError(f"{argument} must be positive and finite, got {s}")
    return scales


def _check_levels(levels: Tensor, rois: Tensor) -> Tensor:
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.is_complex():
        kind = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        raise TypeError(f"levels must be a tensor of integers, got {kind}")
    if levels.dim() != 1 or levels.shape[0] != rois.shape[0]:
        raise ValueError(f"levels must have shape ({rois.shape[0]},), one per box, got {tuple(levels.shape)}")
    if levels.device != rois.device:
        raise ValueError(f"levels must be on the device of the boxes, {rois.device}, got {levels.device}")
    return levels.to(torch.int64)


def _used_names(x: Mapping[str, Tensor], featmap_names: Sequence[str]) -> list[str]:
    check_featmap_names(featmap_names)
    if not isinstance(x, Mapping):
        raise TypeError(f"x must be a dict of maps by name, got {type(x).__name__}")
    names = [name for name in featmap_names if name in x]
    if not names:
        raise ValueError(f"x must hold a map named in featmap_names {list(featmap_names)}, got {list(x)}")
    return names


def _scales_of_names(
    scales: Sequence[float] | Mapping[str, float], names: list[str], featmap_names: Sequence[str]
) -> list[float]:
    if not isinstance(scales, Mapping):
        if len(scales) not in (len(featmap_names), len(names)):
            raise ValueError(
                "scales must hold one number per entry of featmap_names "
                f"{list(featmap_names)}, got {list(scales)}"
            )
        if len(scales) == len(names):  # one per map used: what torchvision stores
            return list(scales)
        scales = dict(zip(featmap_names, scales, strict=True))
    missing = [name for name in names if name not in scales]
    if missing:
        raise ValueError(f"scales must hold every map that is used, {names}, got none for {missing}")
    return [scales[name] for name in names]


def _check_image_shapes(
    image_shapes: Sequence[tuple[int, int]] | None, boxes: Sequence[Tensor]
) -> Sequence[tuple[int, int]]:
    if image_shapes is None:
        raise ValueError("image_shapes must be given unless scales are, got None")
    if len(image_shapes) == 0 and len(boxes) > 0:
        raise ValueError(
            f"image_shapes must hold the size of each image, got none for {len(boxes)} boxes tensors"
        )
    for i, shape in enumerate(image_shapes):
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
            raise ValueError(f"image_shapes[{i}] must be (height, width), at least 1, got {tuple(shape)}")
    return image_shapes
