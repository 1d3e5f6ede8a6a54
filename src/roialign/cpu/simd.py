"""Sixteen channels at a time: the few vector operations that Numba lacks, as LLVM IR.

A `Lanes` value is a vector of 16 float32 or float64 held in registers, whatever width the machine
has. Memory is named by address: arrays would be counted, sliced and passed around at a cost that
shows in the inner loops and in compile time. Its element type is named by a *tag*, any number of
type float32, float64, uint16 for float16, or int16 for bfloat16 (NumPy has no bfloat16, and Numba
no float16 arithmetic). Half types widen on load and round once, to nearest even, on store.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from . import half

LANES = 16

_HALF = types.uint16
_BFLOAT = types.int16


class Lanes(types.Type):
    """Numba's type of 16 numbers in registers."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_work_ir(fe_type.dtype), LANES))


def work_type(storage: Any) -> Any:
    """The Numba type that values of a storage type are computed in."""
    return types.float64 if storage == types.float64 else types.float32


def _work_ir(work: Any) -> ir.Type:
    return ir.DoubleType() if work == types.float64 else ir.FloatType()


def _storage_ir(storage: Any) -> ir.Type:
    if storage in (_HALF, _BFLOAT):
        return ir.IntType(16)
    return _work_ir(storage)


def _widen(context: Any, builder: ir.IRBuilder, value: ir.Value, storage: Any, n: int) -> ir.Value:
    """Storage -> work, for a vector of `n`."""
    floats, ints = ir.VectorType(ir.FloatType(), n), ir.VectorType(ir.IntType(32), n)
    if storage == _HALF:
        return half.widen(builder, value, n, native=half.converts(context))
    if storage == _BFLOAT:  # the upper half of a float32
        wide = builder.zext(value, ints)
        return builder.bitcast(builder.shl(wide, ir.Constant(ints, [16] * n)), floats)
    return value


def _round(context: Any, builder: ir.IRBuilder, value: ir.Value, storage: Any, n: int) -> ir.Value:
    """Work -> storage, to nearest even, for a vector of `n`."""
    shorts, ints = ir.VectorType(ir.IntType(16), n), ir.VectorType(ir.IntType(32), n)
    if storage == _HALF:
        return half.narrow(builder, value, n, native=half.converts(context))
    if storage == _BFLOAT:

        def splat(number: int) -> ir.Constant:
            return ir.Constant(ints, [number] * n)

        bits = builder.bitcast(value, ints)
        odd = builder.and_(builder.lshr(bits, splat(16)), splat(1))
        rounded = builder.add(bits, builder.add(odd, splat(0x7FFF)))
        quiet = builder.or_(bits, splat(0x400000))  # adding could carry a NaN into infinity
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, splat(16)), shorts)
    return value


def _convert(builder: ir.IRBuilder, value: ir.Value, work: Any, n: int) -> ir.Value:
    """To another working precision, which a map has beside one of float64."""
    wanted = ir.VectorType(_work_ir(work), n)
    if value.type == wanted:
        return value
    return builder.fpext(value, wanted) if work == types.float64 else builder.fptrunc(value, wanted)


def _load(context: Any, builder: ir.IRBuilder, address: ir.Value, storage: Any, n: int) -> ir.Value:
    element = _storage_ir(storage)
    vector = ir.VectorType(element, n)
    pointer = builder.inttoptr(address, vector.as_pointer())
    value = builder.load(pointer, align=storage.bitwidth // 8)
    return _widen(context, builder, value, storage, n)


def _store(
    context: Any, builder: ir.IRBuilder, address: ir.Value, value: ir.Value, storage: Any, n: int
) -> None:
    value = _round(context, builder, _convert(builder, value, work_type(storage), n), storage, n)
    pointer = builder.inttoptr(address, value.type.as_pointer())
    builder.store(value, pointer, align=storage.bitwidth // 8)


@intrinsic
def load(typing: Any, tag: Any, address: Any) -> Any:
    """16 consecutive numbers at an address."""
    sig = Lanes(work_type(tag))(tag, types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(context, builder, args[1], tag, LANES)

    return sig, codegen


@intrinsic
def store(typing: Any, tag: Any, address: Any, value: Any) -> Any:
    """Write 16 consecutive numbers at an address."""
    sig = types.void(tag, types.intp, value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(context, builder, args[1], args[2], tag, LANES)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def zeros(typing: Any, tag: Any) -> Any:
    """16 zeros in the working precision of a storage type."""
    lanes = Lanes(work_type(tag))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.VectorType(_work_ir(lanes.dtype), LANES), None)

    return lanes(tag), codegen


@intrinsic
def fma(typing: Any, weight: Any, value: Any, total: Any) -> Any:
    """`weight * value + total`, lane by lane, fused where the machine can, in the precision of `total`."""
    sig = total(total.dtype, value, total)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = args[2].type
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)
        name = f"llvm.fmuladd.v{LANES}f{total.dtype.bitwidth}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(vector, [vector] * 3))
        return builder.call(function, [spread, _convert(builder, args[1], total.dtype, LANES), args[2]])

    return sig, codegen


@intrinsic
def fma_one(typing: Any, weight: Any, value: Any, total: Any) -> Any:
    """The same of single numbers, with the same bits; `value` may be of another working precision."""
    sig = total(total, value, total)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weight, value, total_ = args
        value = context.cast(builder, value, sig.args[1], total)
        name = f"llvm.fmuladd.f{total.bitwidth}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(total_.type, [total_.type] * 3))
        return builder.call(function, [weight, value, total_])

    return sig, codegen


@intrinsic
def load_one(typing: Any, tag: Any, address: Any) -> Any:
    """One number at an address, in the working precision."""
    sig = work_type(tag)(tag, types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(_load(context, builder, args[1], tag, 1), ir.IntType(32)(0))

    return sig, codegen


@intrinsic
def store_one(typing: Any, tag: Any, address: Any, value: Any) -> Any:
    """Write one number, given in the working precision, at an address."""
    sig = types.void(tag, types.intp, work_type(tag))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(args[2].type, 1)
        single = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.IntType(32)(0))
        _store(context, builder, args[1], single, tag, 1)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def transpose8(
    typing: Any, src_tag: Any, src: Any, src_step: Any, dst_tag: Any, dst: Any, dst_step: Any
) -> Any:
    """Copy an 8 x 8 tile, rows becoming columns, converting on the way; steps are in bytes."""
    sig = types.void(src_tag, types.intp, types.intp, dst_tag, types.intp, types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, src, src_step, _, dst, dst_step = args
        rows = []
        for i in range(8):
            address = builder.add(src, builder.mul(src_step, src_step.type(i)))
            rows.append(_load(context, builder, address, src_tag, 8))
        low = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0, 8, 1, 9, 2, 10, 3, 11])
        high = ir.Constant(ir.VectorType(ir.IntType(32), 8), [4, 12, 5, 13, 6, 14, 7, 15])
        for _ in range(3):  # three perfect shuffles of the rows transpose the tile
            pairs = [(rows[i], rows[i + 4]) for i in range(4)]
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in (low, high)]
        for i, row in enumerate(rows):
            address = builder.add(dst, builder.mul(dst_step, dst_step.type(i)))
            _store(context, builder, address, row, dst_tag, 8)
        return context.get_dummy_value()

    return sig, codegen


def _prefetch(builder: ir.IRBuilder, address: ir.Value, write: int) -> None:
    byte, number = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
    nearest, data = number(3), number(1)
    builder.call(function, [builder.inttoptr(address, byte.as_pointer()), number(write), nearest, data])


@intrinsic
def prefetch_read(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, soon to be read. It need not be there: nothing is read."""
    sig = types.void(types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _prefetch(builder, args[0], 0)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def prefetch_write(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, soon to be written. It need not be there."""
    sig = types.void(types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _prefetch(builder, args[0], 1)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Add one to the int64 at an address, atomically; return what it was."""
    sig = types.int64(types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return sig, codegen


@intrinsic
def get(typing: Any, address: Any, i: Any) -> Any:
    """Entry `i` of the int64 array at an address."""
    sig = types.int64(types.intp, types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_entry(builder, *args))

    return sig, codegen


@intrinsic
def put(typing: Any, address: Any, i: Any, value: Any) -> Any:
    """Set entry `i` of the int64 array at an address."""
    sig = types.void(types.intp, types.intp, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _entry(builder, *args[:2]))
        return context.get_dummy_value()

    return sig, codegen


def _entry(builder: ir.IRBuilder, address: ir.Value, i: ir.Value) -> ir.Value:
    return builder.gep(builder.inttoptr(address, ir.IntType(64).as_pointer()), [i])


@intrinsic
def size_of(typing: Any, tag: Any) -> Any:
    """Bytes of a number of the tag's type."""
    sig = types.int64(tag)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.IntType(64)(tag.bitwidth // 8)

    return sig, codegen


TAGS = {
    "float32": np.float32(0),
    "float64": np.float64(0),
    "float16": np.uint16(0),
    "bfloat16": np.int16(0),
}
