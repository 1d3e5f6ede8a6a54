"""Translation to standard ONNX operators, for `torch.onnx.export(..., dynamo=True)`.

ONNX has a RoIAlign of one map. So the graph assigns the levels, has `RoiAlign` pool the RoIs of each
level from its map, and puts the results back in order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from .levels import map_levels_of, serving_steps, wanted_level

op: Any = opset18  # its types are those of values, and here are symbols
_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The forward operator of this package in standard ONNX operators (opset 18 or later).

    Returns:
        A table for `torch.onnx.export`: `custom_translation_table=roialign.onnx.translation_table()`,
        together with `dynamo=True`. A box that names an image or a level that does not exist gives NaN.
    """
    return {torch.ops.roialign.multiscale_roi_align.default: _multiscale_roi_align}


def _multiscale_roi_align(
    features: Sequence[Any],
    rois: Any,
    levels: Any,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: float,
) -> Any:
    working = rois.dtype
    image = _column(rois, 0)
    boxes = op.Slice(rois, [1], [5], [1])
    if levels is None:
        levels = _assign_levels(boxes, scales, canonical_scale, canonical_level, working)
    images = op.Cast(op.Shape(features[0], start=0, end=1), to=working)
    exists = op.And(op.Greater(image, _number(-1, working)), op.Less(image, images))
    shape = op.Concat(
        op.Shape(rois, start=0, end=1),
        op.Shape(features[0], start=1, end=2),
        op.Constant(value_ints=[pooled_height, pooled_width]),
        axis=0,
    )
    out = op.Expand(_number(math.nan, working), shape)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        served = op.And(
            op.Equal(levels, _number(level, _INT64)), op.And(exists, _finite(boxes, scale, working))
        )
        rows = op.Reshape(op.NonZero(served), op.Constant(value_ints=[-1]))
        pooled = op.RoiAlign(
            feature if feature.dtype == working else op.Cast(feature, to=working),
            op.Gather(boxes, rows),
            op.Cast(op.Gather(image, rows), to=_INT64),
            mode="avg",
            output_height=pooled_height,
            output_width=pooled_width,
            sampling_ratio=max(sampling_ratio, 0),  # 0: adaptive
            spatial_scale=scale,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )
        out = op.ScatterND(out, op.Unsqueeze(rows, op.Constant(value_ints=[1])), pooled)
    return out if features[0].dtype == working else op.Cast(out, to=features[0].dtype)


def _number(value: float, dtype: ir.DataType) -> Any:
    """A constant scalar."""
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def _column(t: Any, index: int) -> Any:
    return op.Gather(t, _number(index, _INT64), axis=1)


def _finite(boxes: Any, scale: float, working: ir.DataType) -> Any:
    """Whether a box has a place and a size on a map of this scale."""
    low, high = (op.Mul(op.Slice(boxes, [i], [i + 2], [1]), _number(scale, working)) for i in (0, 2))
    finite = op.Less(op.Abs(op.Concat(low, high, op.Sub(high, low), axis=1)), _number(math.inf, working))
    return op.Equal(op.ReduceMin(op.Cast(finite, to=_INT32), [1], keepdims=0), _number(1, _INT32))


def _assign_levels(
    boxes: Any,
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    working: ir.DataType,
) -> Any:
    """`levels.assign_levels`; ONNX has no log2, so the ratio is held against where the level changes."""
    x1, y1, x2, y2 = (_column(boxes, i) for i in range(4))
    size = op.Sqrt(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)))
    ratio = op.Div(size, _number(canonical_scale, working))
    finest, steps = serving_steps(map_levels_of(scales))
    index = op.Expand(_number(finest, _INT64), op.Shape(size))
    for level, delta in steps:
        least = _least_ratio_beyond(level, canonical_level, working)
        beyond = op.Cast(op.GreaterOrEqual(ratio, _number(least, working)), to=_INT64)
        index = op.Add(index, op.Mul(beyond, _number(delta, _INT64)))
    return index


def _least_ratio_beyond(level: int, canonical_level: float, working: ir.DataType) -> float:
    """The least number that equation 1 takes beyond `level`, found among all floats of its precision."""
    double = working == ir.DataType.DOUBLE
    bits, dtype = (torch.int64, torch.float64) if double else (torch.int32, torch.float32)

    def number(code: int) -> torch.Tensor:  # positive floats are ordered as their bits are
        return torch.tensor(code, dtype=bits).view(dtype)

    low, high = 0, int(torch.tensor(math.inf, dtype=dtype).view(bits))
    while high - low > 1:
        middle = (low + high) // 2
        if wanted_level(number(middle), canonical_level) > level:
            high = middle
        else:
            low = middle
    return float(number(high))
