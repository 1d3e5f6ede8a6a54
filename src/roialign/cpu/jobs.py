"""What a task kernel is told: a row of int64, numbers and addresses, named by a NamedTuple.

A thread that helps knows no types of Python. It is given two addresses, that of the row and that of memory of
its own, and the kernel takes the row apart again.
"""

import itertools
from array import array
from collections.abc import Iterator
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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


def lay(sizes: tuple[Any, ...]) -> tuple[Any, int]:
    """Where in a thread's memory its scratch lies, given a NamedTuple of bytes; and how many that takes."""
    *offsets, stop = itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0)
    return type(sizes)(*offsets), stop


@intrinsic
def scratch_in(typing: Any, offsets: Any, memory: Any) -> Any:
    """The scratch that lies at such offsets in a thread's memory: a NamedTuple of addresses."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        moved = [builder.add(args[1], each) for each in cgutils.unpack_tuple(builder, args[0])]
        return context.make_tuple(builder, offsets, moved)

    return offsets(offsets, types.intp), codegen
