"""The functional form: have the arguments checked, call one operator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, portable, tensors
from . import ops as ops  # which others reach by this name
from .levels import infer_scales, staircase
from .rois import boxes_to_rois, in_dtype, on_one_row, working_dtype
from .schema import Pooling

LevelMap = Callable[[list[Tensor]], Tensor]


@torch.fx.wrap
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float | Sequence[float]],
    sampling_ratio: int | str = -1,
    *,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    levels: Tensor | None = None,
    box_gradients: bool = False,
) -> Tensor:
    """Pool each box from the level of a feature pyramid that suits its size.

    RoIAlign of Mask R-CNN (arXiv:1703.06870), levels by equation 1 of FPN (arXiv:1612.03144). The
    level of a box is the nearest coarser one that the pyramid has, else its coarsest.

    Args:
        features: maps `(N, C, H_l, W_l)`, in any order, of float32, float64, float16 or bfloat16,
            with any strides; half types are summed in float32. Or volumes `(N, C, D_l, H_l, W_l)`, or
            sequences `(N, C, T_l)`.
        boxes: per image a tensor `(L, 4)` of `(x1, y1, x2, y2)`, in pixels of the image, of any
            real dtype; carried in float32 (float64 with float64 features). At most N of them. Of
            volumes `(L, 6)`, `(x1, y1, z1, x2, y2, z2)`; of sequences `(L, 2)`, `(x1, x2)`.
        output_size: bins per RoI, `(PH, PW)`, or one number for both; `(PD, PH, PW)` of volumes.
        scales: cells of each map per pixel of the image, `1 / stride`; any positive numbers; of each
            map one, or one for each of its axes, in their order: `(height, width)`.
        sampling_ratio: sampling points per bin and axis; if not positive, as many as the bin has
            cells, rounded up; "exact" for the integral of the bilinear surface over the bin.
        aligned: shift boxes by half a cell, as Detectron2 does, so that cell centres lie at
            whole numbers; and do not widen boxes of less than one cell.
        canonical_scale: side in pixels of the square box that belongs to `canonical_level`; of other
            boxes the geometric mean of their sides counts.
        canonical_level: k0 of equation 1; level k has stride `2^k`.
        levels: `(K,)` integers, the index in `features` of the map of each box, instead of
            equation 1.
        box_gradients: whether boxes have gradients, once. The level of a box, the number of points
            of an adaptive grid and a size that was widened count as constants.

    Returns:
        `(K, C, PH, PW)`, K being the number of boxes of all images, in the dtype and the memory
        format of the first map. A box with a NaN or an infinity gives NaN, and no gradient.
        Differentiable in the features, twice.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a wrong shape, size, number or device; more boxes tensors than images.

    Examples:
        >>> pyramid = [torch.rand(1, 8, 64 // 2**k, 64 // 2**k) for k in range(4)]
        >>> boxes = [torch.tensor([[10.0, 20.0, 90.0, 120.0]])]
        >>> multiscale_roi_align(pyramid, boxes, 7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32]).shape
        torch.Size([1, 8, 7, 7])
    """
    features = tensors.check_features("features", features)
    rois = _rois_of_lists(tensors.check_boxes_of_images(boxes, features, "features"), features)
    axes = features[0].dim() - 2
    scales = arguments.check_scales(scales, len(features), axes)
    if levels is not None:
        levels = tensors.check_levels("levels", levels, rois.shape[0], rois.device)
    size = arguments.check_output_size(output_size, axes)
    how = sampling_ratio, aligned, canonical_scale, canonical_level, box_gradients
    return _pool(features, rois, levels, size, scales, *how)


@torch.fx.wrap
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int | str = -1,
    aligned: bool = False,
    *,
    box_gradients: bool = False,
) -> Tensor:
    """RoIAlign on one map, as `torchvision.ops.roi_align` (arXiv:1703.06870).

    Args:
        input: `(N, C, H, W)`, float32, float64, float16 or bfloat16, any strides. Or a volume
            `(N, C, D, H, W)`, or a sequence `(N, C, T)`.
        boxes: `(K, 5)` rows of `(image index, x1, y1, x2, y2)`, or per image a tensor `(L, 4)` of
            `(x1, y1, x2, y2)`; in pixels of the image. Of volumes `(K, 7)` or `(L, 6)`, with
            `(x1, y1, z1, x2, y2, z2)`; of sequences `(K, 3)` or `(L, 2)`, with `(x1, x2)`.
        output_size: bins per RoI, `(PH, PW)`, or one number for both; `(PD, PH, PW)` of volumes.
        spatial_scale: cells of the map per pixel of the image; or one for each axis of the map, in
            their order, `(height, width)`.
        sampling_ratio: sampling points per bin and axis; if not positive, as many as the bin has
            cells, rounded up; "exact" for the integral of the bilinear surface over the bin.
        aligned: shift boxes by half a cell, as Detectron2 does.
        box_gradients: whether boxes have gradients, once; see `multiscale_roi_align`.

    Returns:
        `(K, C, PH, PW)` in the dtype and memory format of `input`. A box with a NaN or an infinity
        gives NaN.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a wrong shape, size, number or device; on the CPU also an image index outside
            `[0, N)`. On other devices, where looking would cost a synchronisation, that RoI is NaN.
    """
    if isinstance(input, Tensor) and input.is_quantized:
        if box_gradients:
            raise TypeError("box_gradients must be False for a quantised input, which has no gradients")
        how = output_size, spatial_scale, sampling_ratio, aligned
        return _roi_align_quantized(input, boxes, *how)
    features = tensors.check_features("input", [input])
    axes = features[0].dim() - 2
    if isinstance(boxes, Tensor) and not tensors.are_boxes_of_images(boxes, axes):
        tensors.check_boxes("boxes", boxes, 1 + 2 * axes, input, "an input")
        rois = in_dtype(boxes, working_dtype(features))
    else:
        rois = _rois_of_lists(tensors.check_boxes_of_images(boxes, features, "an input"), features)
    size = arguments.check_output_size(output_size, axes)
    scales = arguments.check_scale("spatial_scale", spatial_scale, axes)
    return _pool(features, rois, None, size, scales, sampling_ratio, aligned, 224.0, 4.0, box_gradients)


@torch.fx.wrap
def pool_named_maps(
    x: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]] | None,
    featmap_names: Sequence[str],
    output_size: int | Sequence[int],
    sampling_ratio: int | str,
    canonical_scale: float,
    canonical_level: float,
    aligned: bool,
    scales: Any,
    map_levels: LevelMap | None,
    box_gradients: bool = False,
) -> Tensor:
    """`MultiScaleRoIAlign.forward` as a function: one leaf for `torch.fx`."""
    names = tensors.used_names(x, featmap_names)
    features = tensors.check_features("x", [x[name] for name in names], names)
    sizes = [f.shape[2:] for f in features]
    axes = len(sizes[0])
    boxes = tensors.check_boxes_of_images(boxes, features, "maps in x")
    if scales is not None:
        map_scales = arguments.scales_of_names(scales, names, featmap_names, axes)
        arguments.check_scales_are_not_strides(map_scales, sizes, image_shapes)
    else:
        shapes = arguments.check_image_shapes(image_shapes, len(boxes), axes)
        arguments.check_strides_agree(sizes, shapes)
        map_scales = infer_scales(sizes, shapes)
    size = arguments.size_of_module(output_size, axes)
    rois = _rois_of_lists(boxes, features)
    levels = _levels_of_map(map_levels, boxes, rois)
    how = sampling_ratio, aligned, canonical_scale, canonical_level, box_gradients
    return _pool(features, rois, levels, size, map_scales, *how)


def _roi_align_quantized(input: Tensor, boxes: Tensor | Sequence[Tensor], *how: Any) -> Tensor:
    """Pool the numbers that a quantised map stands for, and quantise the result as the map is."""
    if input.qscheme() != torch.per_tensor_affine:
        raise TypeError(f"input must be quantised per tensor, got {input.qscheme()}")
    lists = [boxes] if isinstance(boxes, Tensor) else boxes
    plain = [b.dequantize() if b.is_quantized else b for b in lists]
    pooled = roi_align(input.dequantize(), plain[0] if isinstance(boxes, Tensor) else plain, *how)
    return torch.quantize_per_tensor(pooled, input.q_scale(), input.q_zero_point(), input.dtype)


# What TorchScript compiles where these functions are called.
for _function, _form in (
    (roi_align, portable.roi_align),
    (multiscale_roi_align, portable.multiscale_roi_align),
):
    setattr(_function, "__prepare_scriptable__", lambda form=_form: form)  # noqa: B010


def _pool(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    size: tuple[int, ...],
    scales: list[float],
    sampling_ratio: int | str,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
    box_gradients: bool,
) -> Tensor:
    maps, axes = len(features), len(size)
    ratio = arguments.points_of(sampling_ratio)
    aligned = arguments.check_flag("aligned", aligned)
    box_gradients = arguments.check_flag("box_gradients", box_gradients)
    canonical_scale = arguments.check_positive("canonical_scale", canonical_scale)
    canonical_level = arguments.check_number("canonical_level", canonical_level)
    if portable.is_leaving():
        arguments.check_torchvision_has(ratio, axes, len(scales) == maps, box_gradients)
        how = list(size), list(scales), ratio, aligned, canonical_scale, canonical_level
        return portable.pool(features, rois, levels, *how)
    steps = staircase(scales, canonical_scale, canonical_level, rois.dtype, maps, axes)
    if axes == 1:  # a sequence is a map of one row, which every box has for its own
        features, rois = [f.unsqueeze(2) for f in features], on_one_row(rois)
        size, scales = (1, *size), [each for scale in scales for each in (1.0, scale)]
    pooled = ops.pool(features, rois, levels, Pooling(size, scales, ratio, aligned, *steps, box_gradients))
    return pooled.squeeze(2) if axes == 1 else pooled


def _rois_of_lists(boxes: Sequence[Tensor], features: list[Tensor]) -> Tensor:
    return boxes_to_rois(boxes, features[0], working_dtype(features))


def _levels_of_map(map_levels: LevelMap | None, boxes: Sequence[Tensor], rois: Tensor) -> Tensor | None:
    arguments.check_map_levels(map_levels)
    if map_levels is None or len(boxes) == 0:  # without images nobody's function need work
        return None
    levels = map_levels(list(boxes))
    return tensors.check_levels("the result of map_levels", levels, rois.shape[0], rois.device)
