"""The arguments of the public calls, checked: the only file that raises errors about them.

Each error names the argument, the rule and the value received. Every function returns the argument in
the one form that the rest of the package knows. What people nearly always give - Python's own numbers,
lists and tuples - is recognised first, in a few comparisons that a compiler can trace; whatever else
torchvision takes (NumPy's numbers, tensors without axes, arrays, views of a dict) comes after.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rois import in_dtype
from .schema import DTYPES
from .taps import EXACT
from .values import advice_for, integer_of, layout_shown, shown, values_of


def check_integer(argument: str, value: Any) -> int:
    """A whole number; a symbolic one stays symbolic."""
    integer = integer_of(value)
    if integer is None:
        raise TypeError(f"{argument} must be an integer, got {shown(value)}")
    return integer


def check_number(argument: str, value: Any) -> float:
    """A finite real number."""
    number = _number(argument, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument} must be finite, got {number}")
    return number


def check_sampling_ratio(sampling_ratio: Any) -> int | str:
    """A whole number, or "exact"."""
    if isinstance(sampling_ratio, str):
        if sampling_ratio != "exact":
            raise ValueError(f'sampling_ratio must be an integer or "exact", got {sampling_ratio!r}')
        return sampling_ratio
    return check_integer("sampling_ratio", sampling_ratio)


def points_of(sampling_ratio: Any) -> int:
    """Sampling points per bin and axis, 0 for an adaptive grid, or `EXACT`."""
    ratio = check_sampling_ratio(sampling_ratio)
    return EXACT if isinstance(ratio, str) else max(ratio, 0)


def check_positive(argument: str, value: Any) -> float:
    """A finite number above zero."""
    number = _number(argument, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{argument} must be positive and finite, got {number}")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """True or False, also as NumPy has them, or as 1 or 0."""
    if isinstance(value, bool):
        return value
    plain = values_of(value) if hasattr(value, "ndim") else value
    if not isinstance(plain, int) or plain not in (0, 1):
        raise TypeError(f"{argument} must be True or False, got {shown(value)}")
    return bool(plain)


def check_output_size(output_size: Any) -> tuple[int, int]:
    """`(PH, PW)` from one number or two."""
    one = isinstance(output_size, (int, torch.SymInt)) or not isinstance(output_size, Iterable)
    size = (output_size,) * 2 if one else _items("output_size", output_size, "one integer or two")
    if len(size) != 2:
        raise ValueError(f"output_size must be one integer or two, got {shown(output_size)}")
    height, width = integer_of(size[0]), integer_of(size[1])
    if height is None or width is None:
        raise TypeError(f"output_size must be made of integers, got {shown(output_size)}")
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be at least 1, got {shown(output_size)}")
    return height, width


def check_featmap_names(featmap_names: Iterable[str]) -> Sequence[str]:
    """Names of the maps to pool from: at least one, in order."""
    names = _items("featmap_names", featmap_names, "a list of names")
    if len(names) == 0:
        raise ValueError(f"featmap_names must name at least one map, got {names!r}")
    for name in names:
        if not isinstance(name, Hashable):
            raise TypeError(f"featmap_names must be a list of names, got {names!r}")
    return names


def check_features(
    argument: str, features: Iterable[Tensor], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Maps `(N, C, H, W)` that agree in everything but size, dtype and strides."""
    if isinstance(features, Tensor):
        got = layout_shown(features) if features.is_nested else f"one tensor of shape {tuple(features.shape)}"
        raise TypeError(f"{argument} must be a list of maps, got {got}")
    features = _items(argument, features, "a list of maps")
    if len(features) == 0:
        raise ValueError(f"{argument} must hold at least one map, got none")

    def label(i: int) -> str:
        return argument if argument == "input" else f"{argument}[{names[i] if names else i!r}]"

    first = features[0]
    for i, f in enumerate(features):
        if not isinstance(f, Tensor):
            raise TypeError(f"{label(i)} must be a tensor, got {type(f).__name__}")
        if f.dtype not in DTYPES:
            raise TypeError(
                f"{label(i)} must be float32, float64, float16 or bfloat16, got {f.dtype}{advice_for(f)}"
            )
        if f.layout != torch.strided or f.is_nested:
            raise TypeError(f"{label(i)} must be a dense tensor, got {layout_shown(f)}")
        shape = f.shape
        if len(shape) != 4:
            raise ValueError(f"{label(i)} must have shape (N, C, H, W), got {tuple(shape)}")
        images, channels, height, width = shape
        if height < 1 or width < 1:
            raise ValueError(f"{label(i)} must have at least one row and one column, got {tuple(shape)}")
        if i == 0:
            continue
        if images != first.shape[0] or channels != first.shape[1]:
            raise ValueError(
                f"{label(i)} must have the images and channels of {label(0)}, "
                f"({first.shape[0]}, {first.shape[1]}), got ({images}, {channels})"
            )
        if f.device != first.device:
            raise ValueError(
                f"{label(i)} must be on the device of {label(0)}, {first.device}, got {f.device}"
            )
    return list(features)


def check_boxes(label: str, boxes: Tensor, columns: int, feature: Tensor) -> None:
    """Rows of real numbers, as many columns as said, on the device of another tensor."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(boxes).__name__}")
    if boxes.layout != torch.strided or boxes.is_nested:
        raise TypeError(f"{label} must be a dense tensor, got {layout_shown(boxes)}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(
            f"{label} must have shape ({'LK'[columns == 5]}, {columns}), got {tuple(boxes.shape)}"
        )
    if boxes.is_complex() or boxes.dtype == torch.bool or boxes.is_quantized:
        raise TypeError(f"{label} must hold real numbers, got {boxes.dtype}")
    if boxes.device != feature.device:
        raise ValueError(f"{label} must be on the device of the maps, {feature.device}, got {boxes.device}")


def check_boxlists(boxlists: Iterable[Tensor]) -> Sequence[Tensor]:
    """Tensors `(L, 4)` on one device."""
    if isinstance(boxlists, Tensor):
        raise TypeError(f"boxlists must be a list of tensors (L, 4), got {type(boxlists).__name__}")
    boxlists = _items("boxlists", boxlists, "a list of tensors (L, 4)")
    for i, b in enumerate(boxlists):
        check_boxes(f"boxlists[{i}]", b, 4, b)
        if b.device != boxlists[0].device:
            raise ValueError(f"boxlists[{i}] must be on the device {boxlists[0].device}, got {b.device}")
    return boxlists


def check_boxes_of_images(boxes: Any, features: list[Tensor]) -> list[Tensor]:
    """One tensor `(L, 4)` of `(x1, y1, x2, y2)` per image, of the images that the maps have.

    A tensor `(N, L, 4)` holds one per image, and one `(L, 4)` is the one of a single image.
    """
    images = features[0].shape[0]
    if hasattr(boxes, "ndim"):
        boxes = _boxes_in_one("boxes", boxes, images)
    boxes = _items("boxes", boxes, "a list with a tensor (L, 4) per image")
    if len(boxes) > images:
        raise ValueError(
            f"boxes must hold at most one tensor per image, got {len(boxes)} for {images} images"
        )
    checked = []
    for i, b in enumerate(boxes):
        corners = b if type(b) is Tensor else _corners(f"boxes[{i}]", b, features[0].device)
        check_boxes(f"boxes[{i}]", corners, 4, features[0])
        checked.append(corners)
    return checked


def are_boxes_of_images(boxes: Tensor) -> bool:
    """Whether one tensor holds boxes `(x1, y1, x2, y2)` image by image, rather than rois."""
    return boxes.is_nested or boxes.dim() == 3 or boxes.shape[-1:] == (4,)


def _boxes_in_one(label: str, boxes: Any, images: int) -> list[Any]:
    """The boxes of each image, where one tensor or array has those of all."""
    if getattr(boxes, "is_nested", False):
        raise TypeError(f"{label} must be a list with a tensor (L, 4) per image, got {layout_shown(boxes)}")
    if boxes.ndim == 3 and boxes.shape[2] == 4:
        return [boxes[i] for i in range(boxes.shape[0])]
    if boxes.ndim == 2 and boxes.shape[1] == 4 and images == 1:
        return [boxes]
    raise ValueError(
        f"{label} must be a list with a tensor (L, 4) per image, or one tensor (N, L, 4), "
        f"got one of shape {tuple(boxes.shape)} for {images} images"
    )


def _corners(label: str, boxes: Any, device: torch.device) -> Any:
    """Boxes of an array, or of torchvision's `BoundingBoxes`, as a tensor of `(x1, y1, x2, y2)`."""
    if not isinstance(boxes, Tensor):
        return torch.as_tensor(boxes, device=device) if hasattr(boxes, "__array_interface__") else boxes
    kind = getattr(boxes, "format", None)
    if kind is None:
        return boxes
    boxes = boxes.as_subclass(Tensor)
    name = getattr(kind, "value", kind)
    if name == "XYXY":
        return boxes
    if name not in ("XYWH", "CXCYWH"):
        raise ValueError(f"{label} must be boxes with sides along the axes, got format {name}")
    x, y, w, h = boxes.unbind(-1)
    if name == "CXCYWH":
        x, y = x - w / 2, y - h / 2
    return torch.stack((x, y, x + w, y + h), -1)


def check_levels(label: str, levels: Tensor, boxes: int, device: torch.device) -> Tensor:
    """The index of each box's map."""
    if not isinstance(levels, Tensor):
        raise TypeError(f"{label} must be a tensor of integers, got {type(levels).__name__}")
    if levels.is_floating_point() or levels.is_complex() or levels.is_quantized:
        raise TypeError(f"{label} must be a tensor of integers, got {levels.dtype}")
    if levels.layout != torch.strided or levels.is_nested:
        raise TypeError(f"{label} must be a dense tensor, got {layout_shown(levels)}")
    if levels.dim() != 1 or levels.shape[0] != boxes:
        raise ValueError(f"{label} must have shape ({boxes},), one per box, got {tuple(levels.shape)}")
    if levels.device != device:
        raise ValueError(f"{label} must be on the device of the boxes, {device}, got {levels.device}")
    return in_dtype(levels, torch.int64)


def check_map_levels(map_levels: Any) -> None:
    """A function from the boxes to their levels, or None for equation 1."""
    if map_levels is not None and not callable(map_levels):
        raise TypeError(f"map_levels must be a function from boxes to levels, got {shown(map_levels)}")


def check_scales(scales: Iterable[float], maps: int) -> list[float]:
    """A positive number per map."""
    scales = _items("scales", scales, "a list with a number per map")
    if len(scales) != maps:
        raise ValueError(f"scales must hold one number per map, got {len(scales)} for {maps} maps")
    return [check_positive("each of scales", s) for s in scales]


def check_module_scales(scales: Any) -> Any:
    """The `scales` of a module as it keeps them: none, by name, or a list that can be read again."""
    if scales is None or isinstance(scales, Mapping):
        return scales
    return _items("scales", scales, "a list with a number per name, or a dict by name")


def scales_of_names(scales: Any, names: list[str], featmap_names: Sequence[str]) -> list[float]:
    """The scales of the maps that are used, of scales by name or one per entry of `featmap_names`."""
    if not isinstance(scales, Mapping):
        scales = check_module_scales(scales)
        if len(scales) not in (len(featmap_names), len(names)):
            raise ValueError(
                "scales must hold one number per entry of featmap_names "
                f"{list(featmap_names)}, got {list(scales)}"
            )
        if len(scales) == len(names):  # one per map used: what torchvision stores
            return check_scales(scales, len(names))
        scales = dict(zip(featmap_names, scales, strict=True))
    missing = [name for name in names if name not in scales]
    if missing:
        raise ValueError(f"scales must hold every map that is used, {names}, got none for {missing}")
    return check_scales([scales[name] for name in names], len(names))


def check_scales_are_not_strides(
    scales: Sequence[float], map_sizes: Sequence[tuple[int, int]], image_shapes: Any
) -> None:
    """Refuse a scale above 1 on a map with far fewer cells than it says: strides, given for scales.

    A scale above 1 says that a map is finer than its image; padding can only add cells to that. So a map
    with at most a quarter of them, along both axes, is not what `scales` say, and nearly all of its
    boxes would be pooled from beyond its edges, as zeros. No scale up to 1 is questioned: images
    shrunk for the network, padding and gaps look like any of those. Whole numbers are compared, only
    for scales above 1, so that a compiled graph has no guard more than it needs.
    """
    if image_shapes is None or max(scales) <= 1:
        return
    sizes = check_image_shapes(image_shapes, 0)
    height, width = (max([0, *(size[axis] for size in sizes)]) for axis in (0, 1))
    for scale, (rows, columns) in zip(scales, map_sizes, strict=True):
        finer = math.floor(scale)
        if scale > 1 and 4 * rows <= finer * height and 4 * columns <= finer * width:
            raise ValueError(
                f"scales must be cells per pixel, 1 / stride, got {scale:g} for a map of {rows} x {columns} "
                f"cells and images of up to {height} x {width} pixels; for a stride give 1 / {scale:g}"
            )


def check_image_shapes(image_shapes: Any, images: int) -> list[tuple[int, int]]:
    """`(height, width)` of each image, in whole pixels."""
    if image_shapes is None:
        raise ValueError("image_shapes must be given unless scales are, got None")
    shapes = _sequence("image_shapes", image_shapes, "a list with (height, width) per image")
    if len(shapes) == 0 and images > 0:
        raise ValueError(
            f"image_shapes must hold the size of each image, got none for {images} boxes tensors"
        )
    return [_image_shape(f"image_shapes[{i}]", shape) for i, shape in enumerate(shapes)]


def _image_shape(label: str, shape: Any) -> tuple[int, int]:
    size = _sequence(label, shape, "(height, width)")
    if len(size) == 3:
        size = _of_image(label, size)
    if len(size) != 2:
        raise ValueError(f"{label} must be (height, width), at least 1, got {tuple(size)}")
    height, width = _pixels(label, size[0]), _pixels(label, size[1])
    if height < 1 or width < 1:
        raise ValueError(f"{label} must be (height, width), at least 1, got {tuple(size)}")
    return height, width


def _of_image(label: str, shape: Sequence[Any]) -> Sequence[Any]:
    """`(height, width)` of the shape of an image: `(C, H, W)` or `(H, W, C)`, of 1, 3 or 4 channels."""
    first, last = (integer_of(side) in (1, 3, 4) for side in (shape[0], shape[2]))
    if first == last:
        raise ValueError(
            f"{label} must be (height, width), or of an image of 1, 3 or 4 channels, got {tuple(shape)}"
        )
    return shape[1:] if first else shape[:2]


def _pixels(label: str, side: Any) -> int:
    """A side of an image; torchvision takes fractions of a pixel, which no image has."""
    integer = integer_of(side)
    return int(check_number(f"each side of {label}", side)) if integer is None else integer


def used_names(x: Mapping[str, Tensor], featmap_names: Sequence[str]) -> list[str]:
    """The names, in their order, of the maps that there are."""
    if not isinstance(x, Mapping):
        raise TypeError(f"x must be a dict of maps by name, got {type(x).__name__}")
    names = [name for name in featmap_names if name in x]
    if not names:
        raise ValueError(f"x must hold a map named in featmap_names {list(featmap_names)}, got {list(x)}")
    return names


def _items(argument: str, value: Any, rule: str) -> Sequence[Any]:
    """A list or a tuple as it is; as a list what else has an order: an array, a dict's view, a generator."""
    if isinstance(value, (list, tuple)):
        return value
    unordered = isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable)
    items = None if unordered else values_of(value) if hasattr(value, "ndim") else list(value)
    if not isinstance(items, list):
        raise TypeError(f"{argument} must be {rule}, got {shown(value)}")
    return items


def _sequence(argument: str, value: Any, rule: str) -> Sequence[Any]:
    """Likewise, also of what can only be indexed, which is all that torchvision asks."""
    kind = type(value)
    indexed = not isinstance(value, Iterable) and hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    return _items(argument, list(value) if indexed else value, rule)


def _number(argument: str, value: Any) -> float:
    if isinstance(value, float):
        return float(value)
    plain = value
    if not isinstance(value, (int, torch.SymInt, torch.SymFloat)) and hasattr(value, "ndim"):
        plain = values_of(value)
    if isinstance(plain, bool) or not hasattr(type(plain), "__float__"):
        raise TypeError(f"{argument} must be a number, got {shown(value)}")
    return float(plain)
