"""Translation to standard ONNX operators, for `torch.onnx.export(..., dynamo=True)`.

ONNX has a RoIAlign of one map. So the graph assigns the levels, has `RoiAlign` pool the RoIs of each
level from its map, and puts the results back in order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import ir, opset18
from onnxscript.function_libs.torch_lib import registration

from . import schema
from .schema import Pooling
from .taps import EXACT

op: Any = opset18  # its types are those of values, and here are symbols
_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The forward operator of this package in standard ONNX operators (opset 18 or later).

    The import of this module is enough: it adds the translation to those that `torch.onnx.export` knows. The
    table is for those who would rather say it.

    Returns:
        A table for `torch.onnx.export`: `custom_translation_table=roialign.onnx.translation_table()`,
        together with `dynamo=True`. A box that names an image or a level that does not exist gives NaN.
    """
    return {schema.forward_operator(): _multiscale_roi_align}


def _multiscale_roi_align(features: Sequence[Any], rois: Any, levels: Any, *rest: Any) -> Any:
    pooling = Pooling(*rest)
    if pooling.sampling_ratio == EXACT:
        raise NotImplementedError(
            'sampling_ratio "exact" has no form in ONNX, whose RoiAlign sums a grid of points'
        )
    if len(pooling.output_size) != 2:
        raise NotImplementedError("volumes have no form in ONNX, whose RoiAlign is of maps (N, C, H, W)")
    height, width = pooling.output_size
    working = rois.dtype
    image = _column(rois, 0)
    boxes = op.Slice(rois, [1], [5], [1])
    if levels is None:
        levels = _levels(boxes, pooling, working)
    images = op.Cast(op.Shape(features[0], start=0, end=1), to=working)
    exists = op.And(op.Greater(image, _number(-1, working)), op.Less(image, images))
    shape = op.Concat(
        op.Shape(rois, start=0, end=1),
        op.Shape(features[0], start=1, end=2),
        op.Constant(value_ints=[height, width]),
        axis=0,
    )
    out = op.Expand(_number(math.nan, working), shape)
    for level, (feature, scales) in enumerate(zip(features, pooling.scales_of(len(features)), strict=True)):
        placed, (y_scale, scale) = boxes, scales
        if y_scale != scale:  # RoiAlign has one for both axes: it is told of boxes in cells of the map
            in_cells = op.Constant(value=ir.tensor([scale, y_scale] * 2, dtype=working))
            placed, scale = op.Mul(boxes, in_cells), 1.0
        served = op.And(
            op.Equal(levels, _number(level, _INT64)), op.And(exists, _finite(placed, scale, working))
        )
        if pooling.aligned and pooling.sampling_ratio == 0:
            # A box that is inside out has no points. ONNX Runtime takes its grid, which is negative, for an
            # overflow, and fails the whole run; so it is not told of such boxes.
            empty = op.And(served, _inside_out(placed, scale, working))
            bins = op.Unsqueeze(empty, op.Constant(value_ints=[1, 2, 3]))
            out = op.Where(bins, _number(0.0, working), out)
            served = op.And(served, op.Not(empty))
        rows = op.Reshape(op.NonZero(served), op.Constant(value_ints=[-1]))
        pooled = op.RoiAlign(
            feature if feature.dtype == working else op.Cast(feature, to=working),
            op.Gather(placed, rows),
            op.Cast(op.Gather(image, rows), to=_INT64),
            mode="avg",
            output_height=height,
            output_width=width,
            sampling_ratio=pooling.sampling_ratio,
            spatial_scale=scale,
            coordinate_transformation_mode="half_pixel" if pooling.aligned else "output_half_pixel",
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


def _inside_out(boxes: Any, scale: float, working: ir.DataType) -> Any:
    """Whether an aligned box has no size on one of the axes."""
    half = _number(0.5, working)
    low, high = (
        op.Sub(op.Mul(op.Slice(boxes, [i], [i + 2], [1]), _number(scale, working)), half) for i in (0, 2)
    )
    size = op.ReduceMin(op.Sub(high, low), [1], keepdims=0)
    return op.LessOrEqual(size, _number(0.0, working))


def _levels(boxes: Any, pooling: Pooling, working: ir.DataType) -> Any:
    """`Staircase.levels`."""
    x1, y1, x2, y2 = (_column(boxes, i) for i in range(4))
    area = op.Mul(op.Sub(x2, x1), op.Sub(y2, y1))
    index = op.Expand(_number(pooling.order[0], _INT64), op.Shape(area))
    for threshold, finer, coarser in pooling.staircase.steps():
        beyond = op.Cast(op.GreaterOrEqual(area, _number(threshold, working)), to=_INT64)
        index = op.Add(index, op.Mul(beyond, _number(coarser - finer, _INT64)))
    return index


def _register() -> None:
    """Add the translation to onnxscript's; that of an earlier import of this package is replaced."""
    name = f"{schema.NAMESPACE}::multiscale_roi_align"
    if name in registration.default_registry:
        registration.default_registry[name].overloads.clear()
    registration.torch_op(name, trace_only=True)(_multiscale_roi_align)


_register()
