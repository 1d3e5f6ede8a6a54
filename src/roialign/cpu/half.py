"""float16 to float32 and back, as LLVM IR, on any processor.

Most convert by an instruction. Where there is none - x86 before F16C, and whatever Numba is told to
compile for by `NUMBA_CPU_NAME` - LLVM calls a function of its runtime instead, which a process need not
have: LLVM then ends the process. There the bits are computed, as the instruction would: exactly, NaN made
quiet with its payload kept, subnormal halves whatever the thread does with subnormal float32.
"""

import functools
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

_PROBE = """
define <{n} x float> @widen{n}(<{n} x half> %value) {{
  %wide = fpext <{n} x half> %value to <{n} x float>
  ret <{n} x float> %wide
}}
define <{n} x half> @round{n}(<{n} x float> %value) {{
  %half = fptrunc <{n} x float> %value to <{n} x half>
  ret <{n} x half> %half
}}
"""
_RUNTIME = ("extendhfsf2", "truncsfhf2", "gnu_h2f_ieee", "gnu_f2h_ieee")  # what LLVM may call instead

# Of float32, whose bits are sign, 8 of exponent and 23 of fraction; a half has 5 and 10.
_SHIFT = 13  # of the fraction
_REBIAS = (127 - 15) << 23  # between the exponents
_INFINITY, _QUIET = 0xFF << 23, 1 << 22
_HALF_INFINITY, _HALF_QUIET, _HALF_NORMAL = 0x1F << 10, 1 << 9, 1 << 10


def converts(context: Any) -> bool:
    """Whether the processor that Numba compiles for has instructions for it."""
    try:
        return _converts(*context.codegen().magic_tuple())
    except Exception:  # another Numba may not tell; computing the bits is right everywhere
        return False


@functools.cache
def _converts(triple: str, cpu: str, features: str) -> bool:
    """Ask LLVM: compile conversions and look whether they became calls."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    module = llvm.parse_assembly("".join(_PROBE.format(n=n) for n in (1, 8, 16)))
    assembly = machine.emit_assembly(module)
    return not any(name in assembly for name in _RUNTIME)


def widen(builder: ir.IRBuilder, value: ir.Value, n: int, *, native: bool) -> ir.Value:
    """A vector of `n` halves, as int16, to float32."""
    floats = ir.VectorType(ir.FloatType(), n)
    if native:
        return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), n)), floats)
    ints = ir.VectorType(ir.IntType(32), n)
    splat = functools.partial(_splat, ints)
    bits = builder.zext(value, ints)
    size = builder.and_(bits, splat(0x7FFF))
    sign = builder.shl(builder.xor(bits, size), splat(16))

    normal = builder.add(builder.shl(size, splat(_SHIFT)), splat(_REBIAS))
    # A subnormal half is a whole number of 2^-24, and neither it nor the step is subnormal as a float32.
    whole = builder.sitofp(size, floats)
    small = builder.bitcast(builder.fmul(whole, ir.Constant(floats, [2.0**-24] * n)), ints)
    infinite = builder.or_(builder.shl(size, splat(_SHIFT)), splat(_INFINITY))

    wide = builder.select(builder.icmp_signed("<", size, splat(_HALF_NORMAL)), small, normal)
    wide = builder.select(builder.icmp_signed(">=", size, splat(_HALF_INFINITY)), infinite, wide)
    quiet = builder.or_(wide, splat(_QUIET))
    wide = builder.select(builder.icmp_signed(">", size, splat(_HALF_INFINITY)), quiet, wide)
    return builder.bitcast(builder.or_(wide, sign), floats)


def narrow(builder: ir.IRBuilder, value: ir.Value, n: int, *, native: bool) -> ir.Value:
    """A vector of `n` float32 to the nearest halves, or the even one of two, as int16."""
    shorts = ir.VectorType(ir.IntType(16), n)
    if native:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), n)), shorts)
    floats, ints = value.type, ir.VectorType(ir.IntType(32), n)
    splat = functools.partial(_splat, ints)
    bits = builder.bitcast(value, ints)
    size = builder.and_(bits, splat(0x7FFFFFFF))
    sign = builder.lshr(builder.xor(bits, size), splat(16))

    odd = builder.and_(builder.lshr(size, splat(_SHIFT)), splat(1))
    up = builder.add(odd, splat((1 << (_SHIFT - 1)) - 1 - _REBIAS))
    normal = builder.lshr(builder.add(size, up), splat(_SHIFT))
    # The last place of a float32 beside 1/2 is 2^-24, that of a subnormal half: the sum rounds to it.
    half = ir.Constant(floats, [0.5] * n)
    sum_ = builder.bitcast(builder.fadd(builder.bitcast(size, floats), half), ints)
    small = builder.sub(sum_, builder.bitcast(half, ints))
    nan = builder.and_(builder.lshr(size, splat(_SHIFT)), splat(_HALF_QUIET - 1))
    nan = builder.or_(nan, splat(_HALF_INFINITY | _HALF_QUIET))

    least_normal = splat(_REBIAS + (1 << 23))
    result = builder.select(builder.icmp_signed("<", size, least_normal), small, normal)
    beyond = builder.icmp_signed(">=", size, splat(_REBIAS + (0x1F << 23)))  # 2^16
    result = builder.select(beyond, splat(_HALF_INFINITY), result)
    result = builder.select(builder.icmp_signed(">", size, splat(_INFINITY)), nan, result)
    return builder.trunc(builder.or_(result, sign), shorts)


def _splat(vector: ir.VectorType, number: int) -> ir.Constant:
    return ir.Constant(vector, [number] * vector.count)
