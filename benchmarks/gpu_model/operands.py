"""Registers and operands of PTX as expressions in Python."""

import re
from typing import Any

import numpy as np

from .ptx import DTYPES, Instruction, Kernel


class Operands:
    """The code of a block so far, and how its registers are held."""

    kernel: Kernel
    names: dict[str, Any]  # constants
    slots: dict[str, int]  # of parameters
    shared: set[str]  # registers of more than one block
    lines: list[str]
    types: dict[str, str]  # registers at hand and how their bits are viewed at present
    written: set[str]

    def save(self) -> None:
        for register in sorted(self.written & self.shared):
            bits = self.kernel.registers[register]
            self.lines.append(f"m.put({register!r}, {self.get(register, bits)}, n)")

    def refuse(self, i: Instruction) -> None:
        raise NotImplementedError(f"{i.name} in line {i.line + 1} of the PTX of {self.kernel.name}")

    @staticmethod
    def local(register: str) -> str:
        return "r_" + register[1:].replace(".", "_")

    def constant(self, value: Any, kind: str) -> str:
        """The name of an array of one element."""
        array = np.array([value], DTYPES[kind])
        name = f"c_{kind}_{array.tobytes().hex()}"
        self.names[name] = array
        return name

    def get(self, operand: str, kind: str) -> str:
        """An operand as an expression of a type."""
        if operand.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid")):
            return f"m.special({operand!r}, n).view(np.{DTYPES[kind].__name__})"
        if operand.startswith("%"):
            bits = self.kernel.registers[operand]
            name = self.local(operand)
            if operand not in self.types:
                self.lines.append(f"{name} = m.take({operand!r}, n)")
                self.types[operand] = bits
            if DTYPES[kind]().itemsize != DTYPES[bits]().itemsize and "pred" not in (kind, bits):
                small = DTYPES[kind]().itemsize < DTYPES[bits]().itemsize
                assert small, f"{operand} as {kind}"
                return f"{self.get(operand, bits)}.astype(np.{DTYPES[kind].__name__})"
            if DTYPES[self.types[operand]] is not DTYPES[kind]:
                return f"{name}.view(np.{DTYPES[kind].__name__})"
            return name
        if found := re.match(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})$", operand):
            bits = np.array(int(found.group(1), 16), f"u{len(found.group(1)) // 2}")
            return self.constant(bits.view(f"f{bits.itemsize}") if kind[0] == "f" else bits, kind)
        if re.match(r"-?(0x)?[0-9a-fA-F]+U?$", operand):
            return self.integer(int(operand.removesuffix("U"), 0), kind)
        if operand in ("true", "false"):
            return self.constant(operand == "true", kind)
        if operand in self.slots:
            return self.constant(8 * self.slots[operand], kind)
        if operand.startswith("global_smem"):  # shared memory begins at 0
            return self.constant(0, kind)
        raise NotImplementedError(f"operand {operand}")

    def integer(self, value: int, kind: str) -> str:
        if kind[0] == "f":
            kind_bits = f"u{kind[1:]}"
            return f"{self.integer(value, kind_bits)}.view(np.{DTYPES[kind].__name__})"
        if kind == "pred":
            return self.constant(bool(value), kind)
        bits = 8 * DTYPES[kind]().itemsize
        value &= (1 << bits) - 1
        if kind[0] == "s" and value >> (bits - 1):
            value -= 1 << bits
        return self.constant(value, kind)

    def guard(self, i: Instruction) -> str:
        if not i.guard:
            return ""
        value = self.get(i.guard.lstrip("!"), "pred")
        return f"~{value}" if i.guard[0] == "!" else value

    def set(self, i: Instruction, register: str, value: str, kind: str) -> None:
        """Assign an expression of a type."""
        if register == "_":
            return
        bits = self.kernel.registers[register]
        if DTYPES[kind]().itemsize != DTYPES[bits]().itemsize:  # a narrow value in a wide register
            wide = ("s" if kind[0] == "s" else "u") + bits[1:]
            value, kind = f"({value}).astype(np.{DTYPES[wide].__name__})", wide
        if guard := self.guard(i):
            value = f"np.where({guard}, {value}, {self.get(register, kind)})"
        self.lines.append(f"{self.local(register)} = {value}")
        self.types[register] = kind
        self.written.add(register)

    def address(self, operand: str) -> str:
        inner = operand.strip("[] ")
        base, _, offset = inner.partition("+")
        base, by = base.strip(), int(offset or 0)
        if base.startswith("%"):
            kind = self.kernel.registers[base].replace("b", "s")
            value = f"{self.get(base, kind)}.astype(np.int64, copy=False)"
        else:
            value = self.get(base, "s64")
        return f"{value} + {by}" if by else value
