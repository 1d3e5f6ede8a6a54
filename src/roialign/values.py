"""What people give for numbers and tensors: read as Python's numbers, and shown in errors."""

import operator
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
