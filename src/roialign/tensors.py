"""The maps, boxes and levels of the public calls, checked; see `arguments`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rois import in_dtype
from .schema import DTYPES
from .values import advice_for, items, layout_shown

# Of maps with one, two and three axes: how they are laid out, and how boxes are given.
SHAPES = "(N, C, H, W), or of a volume (N, C, D, H, W), or of a sequence (N, C, T)"
_PER_IMAGE = {n: f"a list with a tensor (L, {n}) per image" for n in (2, 4, 6)}


def check_features(
    argument: str, features: Iterable[Tensor], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Maps of `SHAPES` that agree in everything but size, dtype and strides."""
    if isinstance(features, Tensor):
        got = layout_shown(features) if features.is_nested else f"one tensor of shape {tuple(features.shape)}"
        raise TypeError(f"{argument} must be a list of maps, got {got}")
    features = items(argument, features, "a list of maps")
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
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"{label(i)} must have shape {SHAPES}, got {tuple(shape)}")
        images, channels, *size = shape
        if 0 in size:
            raise ValueError(f"{label(i)} must have at least one cell along each axis, got {tuple(shape)}")
        if i == 0:
            continue
        if len(shape) != first.dim():
            raise ValueError(
                f"{label(i)} must have the axes of {label(0)}, {tuple(first.shape)}, got {tuple(shape)}"
            )
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


def check_boxes(label: str, boxes: Tensor, columns: int, feature: Tensor, maps: str = "") -> None:
    """Rows of real numbers, as many columns as said, on the device of another tensor.

    Where that is the first of the `maps` of two axes, or no map, it need not be named.
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(boxes).__name__}")
    if boxes.layout != torch.strided or boxes.is_nested:
        raise TypeError(f"{label} must be a dense tensor, got {layout_shown(boxes)}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        of_maps = "" if feature.dim() in (2, 4) else f" for {maps} of shape {tuple(feature.shape)}"
        raise ValueError(
            f"{label} must have shape ({'LK'[columns % 2]}, {columns}){of_maps}, got {tuple(boxes.shape)}"
        )
    if boxes.is_complex() or boxes.dtype == torch.bool or boxes.is_quantized:
        raise TypeError(f"{label} must hold real numbers, got {boxes.dtype}")
    if boxes.device != feature.device:
        raise ValueError(f"{label} must be on the device of the maps, {feature.device}, got {boxes.device}")


def check_boxlists(boxlists: Iterable[Tensor]) -> Sequence[Tensor]:
    """Tensors `(L, 4)` on one device."""
    if isinstance(boxlists, Tensor):
        raise TypeError(f"boxlists must be a list of tensors (L, 4), got {type(boxlists).__name__}")
    boxlists = items("boxlists", boxlists, "a list of tensors (L, 4)")
    for i, b in enumerate(boxlists):
        check_boxes(f"boxlists[{i}]", b, 4, b)
        if b.device != boxlists[0].device:
            raise ValueError(f"boxlists[{i}] must be on the device {boxlists[0].device}, got {b.device}")
    return boxlists


def check_boxes_of_images(boxes: Any, features: list[Tensor], maps: str) -> list[Tensor]:
    """One tensor `(L, 4)` of `(x1, y1, x2, y2)` per image that the maps have; or of the axes that they have.

    A tensor `(N, L, 4)` holds one per image, and one `(L, 4)` is the one of a single image.
    """
    images, columns = features[0].shape[0], 2 * (features[0].dim() - 2)
    if hasattr(boxes, "ndim"):
        boxes = _boxes_in_one("boxes", boxes, images, columns)
    boxes = items("boxes", boxes, _PER_IMAGE[columns])
    checked = []
    for i, b in enumerate(boxes):
        corners = b if type(b) is Tensor else _corners(f"boxes[{i}]", b, features[0].device)
        check_boxes(f"boxes[{i}]", corners, columns, features[0], maps)
        checked.append(corners)
    if len(boxes) > images:
        raise ValueError(
            f"boxes must hold at most one tensor per image, got {len(boxes)} for {images} images"
        )
    return checked


def are_boxes_of_images(boxes: Tensor, axes: int) -> bool:
    """Whether one tensor holds boxes `(x1, y1, x2, y2)` image by image, rather than rois."""
    return boxes.is_nested or boxes.dim() == 3 or boxes.shape[-1:] == (2 * axes,)


def _boxes_in_one(label: str, boxes: Any, images: int, columns: int) -> list[Any]:
    """The boxes of each image, where one tensor or array has those of all."""
    rule = _PER_IMAGE[columns]
    if getattr(boxes, "is_nested", False):
        raise TypeError(f"{label} must be {rule}, got {layout_shown(boxes)}")
    if boxes.ndim == 3 and boxes.shape[2] == columns:
        return [boxes[i] for i in range(boxes.shape[0])]
    if boxes.ndim == 2 and boxes.shape[1] == columns and images == 1:
        return [boxes]
    raise ValueError(
        f"{label} must be {rule}, or one tensor (N, L, {columns}), "
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


def used_names(x: Mapping[str, Tensor], featmap_names: Sequence[str]) -> list[str]:
    """The names, in their order, of the maps that there are."""
    if not isinstance(x, Mapping):
        raise TypeError(f"x must be a dict of maps by name, got {type(x).__name__}")
    names = [name for name in featmap_names if name in x]
    if not names:
        raise ValueError(f"x must hold a map named in featmap_names {list(featmap_names)}, got {list(x)}")
    return names
