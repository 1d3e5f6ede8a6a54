"""What people give for numbers, lists and tensors: read as Python's own, and shown in errors."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def integer_of(value: Any) -> int | None:
    """A whole number as Python's, a symbolic one as it is; None for what is none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool):
        return None
    if hasattr(value, "ndim"):
        return integer_of(values_of(value))
    return operator.index(value) if hasattr(type(value), "__index__") else None


def values_of(array: Any) -> Any:
    """The numbers of an array or a tensor in Python's lists, or its one number if it has no axes."""
    try:
        return array.tolist() if array.ndim else array.item()  # the compiler knows only this for a float
    except RuntimeError:  # a tensor that has no numbers, or not in a row: meta, sparse, nested
        return None


def shown(value: Any) -> str:
    """A value as an error shows it: in full if that is short."""
    if isinstance(value, str):
        return f"the string {value!r}"
    short = isinstance(value, (int, float, complex, list, tuple, type(None)))
    return repr(value) if short else type(value).__name__


def layout_shown(t: Tensor) -> str:
    """How a tensor that is not dense lies, in words."""
    return "a nested tensor" if t.is_nested else f"layout {t.layout}"


def advice_for(t: Tensor) -> str:
    """How to make a tensor floating point, where that is a matter of one call."""
    if t.is_quantized:
        return "; convert it with .dequantize()"
    return "" if t.is_complex() else "; convert it with .float()"


def items(argument: str, value: Any, rule: str) -> Sequence[Any]:
    """A list or a tuple as it is; as a list what else has an order: an array, a dict's view, a generator."""
    if isinstance(value, (list, tuple)):
        return value
    unordered = isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable)
    items = None if unordered else values_of(value) if hasattr(value, "ndim") else list(value)
    if not isinstance(items, list):
        raise TypeError(f"{argument} must be {rule}, got {shown(value)}")
    return items


def sequence(argument: str, value: Any, rule: str) -> Sequence[Any]:
    """Likewise, also of what can only be indexed, which is all that torchvision asks."""
    kind = type(value)
    indexed = not isinstance(value, Iterable) and hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    return items(argument, list(value) if indexed else value, rule)
