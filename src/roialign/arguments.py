"""The arguments of the public calls, checked: with `tensors` the only file that raises errors about them.

Each error names the argument, the rule and the value received. Every function returns the argument in
the one form that the rest of the package knows. What people nearly always give - Python's own numbers,
lists and tuples - is recognised first, in a few comparisons that a compiler can trace; whatever else
torchvision takes (NumPy's numbers, tensors without axes, arrays, views of a dict) comes after.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .levels import largest, log2_strides, per_axis
from .taps import EXACT
from .values import integer_of, items, sequence, shown, values_of

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)  # what nearly all give


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


def check_output_size(output_size: Any, axes: int = 2) -> tuple[int, ...]:
    """`(PH, PW)` from one number or two; in three axes `(PD, PH, PW)`, in one `(PW,)`."""
    rule = ("one integer", "one integer or two", "one integer or three")[axes - 1]
    one = isinstance(output_size, (int, torch.SymInt)) or not isinstance(output_size, Iterable)
    size = (output_size,) * axes if one else items("output_size", output_size, rule)
    if len(size) != axes:
        raise ValueError(f"output_size must be {rule}, got {shown(output_size)}")
    bins = tuple([integer_of(n) for n in size])
    for n in bins:
        if n is None:
            raise TypeError(f"output_size must be made of integers, got {shown(output_size)}")
        if n < 1:
            raise ValueError(f"output_size must be at least 1, got {shown(output_size)}")
    return bins  # type: ignore[return-value]


def check_size_of_module(output_size: Any) -> tuple[int, ...]:
    """Likewise, of a module, which is yet to see its maps."""
    given = output_size if isinstance(output_size, (list, tuple)) else ()
    return check_output_size(output_size, len(given) if len(given) in (1, 3) else 2)


def size_of_module(output_size: Any, axes: int) -> tuple[int, ...]:
    """The `output_size` of a module for maps of so many axes: two equal numbers may have been one."""
    if axes != 2 and isinstance(output_size, (list, tuple)) and len(set(output_size)) == 1:
        output_size = output_size[0]
    return check_output_size(output_size, axes)


def check_torchvision_has(ratio: int, axes: int, one_scale: bool, box_gradients: bool) -> None:
    """Refuse by name what torchvision's operator has not, where a program is made for it."""
    of_torchvision = "no form in torchvision's operator; use torch.export"
    if ratio == EXACT:
        raise TypeError(f'sampling_ratio "exact" has {of_torchvision}')
    if axes != 2:
        raise TypeError(f"maps of {axes} axes have {of_torchvision}")
    if not one_scale:
        raise TypeError(f"scales per axis have {of_torchvision}")
    if box_gradients:
        raise TypeError(f"box_gradients have {of_torchvision}")


def check_featmap_names(featmap_names: Iterable[str]) -> Sequence[str]:
    """Names of the maps to pool from: at least one, in order."""
    names = items("featmap_names", featmap_names, "a list of names")
    if len(names) == 0:
        raise ValueError(f"featmap_names must name at least one map, got {names!r}")
    for name in names:
        if not isinstance(name, Hashable):
            raise TypeError(f"featmap_names must be a list of names, got {names!r}")
    return names


def check_map_levels(map_levels: Any) -> None:
    """A function from the boxes to their levels, or None for equation 1."""
    if map_levels is not None and not callable(map_levels):
        raise TypeError(f"map_levels must be a function from boxes to levels, got {shown(map_levels)}")


def check_scales(scales: Iterable[Any], maps: int, axes: int = 2) -> list[float]:
    """A positive number per map; or, where some map has one for each axis, those of each, map by map."""
    scales = items("scales", scales, "a list with a number per map")
    if len(scales) != maps:
        raise ValueError(f"scales must hold one number per map, got {len(scales)} for {maps} maps")
    if are_numbers(scales):
        return [check_positive("each of scales", s) for s in scales]
    checked = [check_scale("each of scales", s, axes) for s in scales]
    if max([len(of_map) for of_map in checked]) == 1:
        return [scale for of_map in checked for scale in of_map]
    return [scale for of_map in checked for scale in (of_map * axes)[:axes]]


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether none is something else, be it a list or an array."""
    return all(isinstance(value, _NUMBERS) for value in values)


def check_scale(argument: str, scale: Any, axes: int | None = None) -> list[float]:
    """A positive number, or one for each axis of a map; None: of maps that are yet to come."""
    if isinstance(scale, _NUMBERS):
        return [check_positive(argument, scale)]
    if isinstance(scale, (list, tuple)) or getattr(scale, "ndim", 0) == 1:
        of_axes = items(argument, scale, "a number, or one per axis")
        if len(of_axes) != axes and axes is not None:
            raise ValueError(
                f"{argument} must be a number, or one for each of {axes} axes, got {shown(scale)}"
            )
        return [check_positive(argument, each) for each in of_axes]
    return [check_positive(argument, scale)]


def check_module_scales(scales: Any) -> Any:
    """The `scales` of a module as it keeps them: none, by name, or a list that can be read again."""
    if scales is None or isinstance(scales, Mapping):
        return scales
    return items("scales", scales, "a list with a number per name, or a dict by name")


def scales_of_names(
    scales: Any, names: list[str], featmap_names: Sequence[str], axes: int = 2
) -> list[float]:
    """The scales of the maps that are used, of scales by name or one per entry of `featmap_names`."""
    if not isinstance(scales, Mapping):
        scales = check_module_scales(scales)
        if len(scales) not in (len(featmap_names), len(names)):
            raise ValueError(
                "scales must hold one number per entry of featmap_names "
                f"{list(featmap_names)}, got {list(scales)}"
            )
        if len(scales) == len(names):  # one per map used: what torchvision stores
            return check_scales(scales, len(names), axes)
        scales = dict(zip(featmap_names, scales, strict=True))
    missing = [name for name in names if name not in scales]
    if missing:
        raise ValueError(f"scales must hold every map that is used, {names}, got none for {missing}")
    return check_scales([scales[name] for name in names], len(names), axes)


def check_scales_are_not_strides(
    scales: Sequence[float], map_sizes: Sequence[Sequence[int]], image_shapes: Any
) -> None:
    """Refuse a scale above 1 on a map with far fewer cells than it says: strides, given for scales.

    A scale above 1 says that a map is finer than its image; padding can only add cells to that. So a map
    with at most a quarter of them, along every axis, is not what `scales` say, and nearly all of its
    boxes would be pooled from beyond its edges, as zeros. No scale up to 1 is questioned: images
    shrunk for the network, padding and gaps look like any of those. Whole numbers are compared, only
    for scales above 1, so that a compiled graph has no guard more than it needs.
    """
    if image_shapes is None or max(scales) <= 1:
        return
    axes = len(map_sizes[0])
    shapes = check_image_shapes(image_shapes, 0, axes)
    pixels = [max([0, *(shape[axis] for shape in shapes)]) for axis in range(axes)]
    for of_map, cells in zip(per_axis(scales, len(map_sizes), axes), map_sizes, strict=True):
        fewer = [4 * n <= math.floor(s) * side for s, n, side in zip(of_map, cells, pixels, strict=True)]
        if min(of_map) > 1 and all(fewer):
            sizes = [" x ".join(map(str, size)) for size in (cells, pixels)]
            raise ValueError(
                f"scales must be cells per pixel, 1 / stride, got {of_map[0]:g} for a map of {sizes[0]} "
                f"cells and images of up to {sizes[1]} pixels; for a stride give 1 / {of_map[0]:g}"
            )


def check_strides_agree(map_sizes: Sequence[Sequence[int]], image_shapes: Sequence[Sequence[int]]) -> None:
    """Refuse to infer scales of volumes whose strides seem to differ from axis to axis, as those of scans do.

    Of maps and images nearly all have one stride for both axes, and what seems to differ is padding.
    """
    if len(map_sizes[0]) < 3 or len(image_shapes) == 0:
        return
    image = largest(image_shapes)
    for size in map_sizes:
        strides = log2_strides(size, image)
        if min(strides) < max(strides):
            raise ValueError(
                "scales must be given for volumes whose strides differ by axis, got a volume of "
                f"{tuple(size)} cells for images of up to {tuple(image)}"
            )


def check_image_shapes(image_shapes: Any, images: int, axes: int = 2) -> list[tuple[int, ...]]:
    """`(height, width)` of each image, in whole pixels; or as many numbers as the maps have axes."""
    if image_shapes is None:
        raise ValueError("image_shapes must be given unless scales are, got None")
    rule = ("(length,)", "(height, width)", "(depth, height, width)")[axes - 1]
    shapes = sequence("image_shapes", image_shapes, f"a list with {rule} per image")
    if len(shapes) == 0 and images > 0:
        raise ValueError(
            f"image_shapes must hold the size of each image, got none for {images} boxes tensors"
        )
    return [_image_shape(f"image_shapes[{i}]", shape, axes, rule) for i, shape in enumerate(shapes)]


def _image_shape(label: str, shape: Any, axes: int, rule: str) -> tuple[int, ...]:
    size = sequence(label, shape, rule)
    if axes == 2 and len(size) == 3:
        size = _of_image(label, size)
    if len(size) != axes:
        raise ValueError(f"{label} must be {rule}, at least 1, got {tuple(size)}")
    pixels = tuple([_pixels(label, side) for side in size])
    if min(pixels) < 1:
        raise ValueError(f"{label} must be {rule}, at least 1, got {tuple(size)}")
    return pixels


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


def _number(argument: str, value: Any) -> float:
    if isinstance(value, float):
        return float(value)
    plain = value
    if not isinstance(value, (int, torch.SymInt, torch.SymFloat)) and hasattr(value, "ndim"):
        plain = values_of(value)
    if isinstance(plain, bool) or not hasattr(type(plain), "__float__"):
        raise TypeError(f"{argument} must be a number, got {shown(value)}")
    return float(plain)
