"""What a task kernel is told: a row of int64, numbers and addresses, named by a NamedTuple.

A thread that helps knows no types of Python. It is given two addresses, that of the row and that of memory of
its own, and the kernel takes the row apart again.
"""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from numba import types
from numba.extending import intrinsic

from .jit import part
from .lanes import Scratch
from .simd import LANES


def pack(job: tuple[Any, ...]) -> "array[int]":
    """The numbers of a NamedTuple and those in it, one after the other."""
    return array("q", _numbers(job))


def _numbers(job: tuple[Any, ...]) -> Iterator[int]:
    for value in job:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value


@intrinsic
def unpack(typing: Any, kind: Any, address: Any) -> Any:
    """A NamedTuple of a class, or of those that it is annotated with, from the numbers at an address."""
    result = _type(kind.instance_class)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row = builder.inttoptr(args[1], context.get_value_type(types.int64).as_pointer())
        places = itertools.count()

        def build(type_: Any) -> Any:
            if not isinstance(type_, types.BaseTuple):
                return builder.load(builder.gep(row, [context.get_constant(types.intp, next(places))]))
            return context.make_tuple(builder, type_, [build(each) for each in type_])

        return build(result)

    return result(kind, types.intp), codegen


def _type(annotation: Any) -> Any:
    if not hasattr(annotation, "_fields"):
        return types.int64
    fields = [_type(annotation.__annotations__[name]) for name in annotation._fields]
    if all(field == types.int64 for field in fields):
        return types.NamedUniTuple(types.int64, len(fields), annotation)
    return types.NamedTuple(fields, annotation)


def lay_scratch(line: int, entries: Sequence[int], size: int) -> tuple[Scratch, int]:
    """Where in a thread's memory its scratch lies, and how many bytes that takes.

    Args:
        line: numbers in each of four lists of offsets.
        entries: of 16 numbers, in each of the rest.
        size: bytes of such a number.
    """
    line = -(-8 * line // 64) * 64
    starts = itertools.accumulate((line, line, line, line, *(n * LANES * size for n in entries)), initial=0)
    *offsets, stop = starts
    return Scratch(*offsets), stop


@part
def scratch_in(offsets, memory):
    """The scratch that lies at such offsets in a thread's memory."""
    return Scratch(
        memory + offsets.src_row,
        memory + offsets.src_column,
        memory + offsets.dst_row,
        memory + offsets.dst_column,
        memory + offsets.cells,
        memory + offsets.sums,
        memory + offsets.results,
    )
