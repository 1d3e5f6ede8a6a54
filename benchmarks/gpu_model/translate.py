"""PTX as Python: each basic block becomes a function on NumPy arrays of lanes.

A register of a block is an array of as many elements as lanes run the block, or of one where all agree.
Between blocks registers are kept as bits, in arrays over all lanes. What is translated is what Triton and
NVCC emit for the kernels here; another instruction is an error, not a guess.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .operands import Operands
from .ptx import DTYPES, Instruction, Kernel

_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
# Instructions that are an expression of their operands, all of one type.
_PLAIN = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "rem": "m.remainder({}, {})",
    "neg": "-{}",
    "abs": "np.abs({})",
    "copysign": "np.copysign({1}, {0})",
    "sqrt": "np.sqrt({})",
    "rcp": "1 / {}",
    "not": "~{}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "brev": "m.reversed_bits({})",
    "cvta": "{}",
    "ex2": "np.exp2({})",
    "lg2": "np.log2({})",
    "sin": "np.sin({})",
    "cos": "np.cos({})",
}


class Block(NamedTuple):
    """A basic block that can be run."""

    run: Callable[..., Any] | None  # (machine, lanes) -> whether each goes to `target`
    target: int  # of the branch at its end, else the next block
    end: str  # "bra", "ret" or ""


class Translator(Operands):
    """Makes functions of the basic blocks of a kernel; `_name` translates the instructions of that name."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names = {"np": np}
        named = [
            (register, b)
            for b, block in enumerate(kernel.blocks)
            for i in block
            for register in re.findall(r"%\w+", " ".join([i.guard, *i.operands]))
        ]
        self.uses = Counter(register for register, _ in named)
        blocks_of = Counter(register for register, _ in set(named))
        self.shared = {register for register, blocks in blocks_of.items() if blocks > 1}
        # Where parameters lie: 8 bytes for each, since code may choose between their addresses.
        self.slots = {name: slot for slot, (_, name) in enumerate(kernel.parameters)}

    def block(self, index: int) -> Block:
        """One block, as a function."""
        self.lines = []
        self.types, self.written = {}, set()
        end, target = "", index + 1
        for i in self.kernel.blocks[index]:
            if {"sat", "relu", "cc"} & set(i.parts):
                self.refuse(i)
            if i.parts[0] in ("bra", "ret", "exit"):
                end = "bra" if i.parts[0] == "bra" else "ret"
                target = self.kernel.labels[i.operands[0]] if end == "bra" else -1
                guard = self.guard(i)
                self.save()
                self.lines.append(f"return {guard or True}")
            else:
                getattr(self, f"_{i.parts[0]}", self._expression)(i)
        if not end:
            self.save()
        source = "\n ".join(["def block(m, n):", *(self.lines or ["pass"])])
        local: dict[str, Any] = {}
        exec(compile(source, f"{self.kernel.name} block {index}", "exec"), self.names, local)
        return Block(local["block"], target, end)

    def _expression(self, i: Instruction) -> None:
        if i.parts[0] in ("add", "sub") and i.type in ("s16x2", "u16x2"):
            function = "np.add" if i.parts[0] == "add" else "np.subtract"
            self.plain(i, f"m.halves({function}, {{}}, {{}})", "u32")
        elif i.parts[0] in _PLAIN:
            self.plain(i, _PLAIN[i.parts[0]])
        else:
            self.refuse(i)

    def plain(self, i: Instruction, template: str, kind: str = "", result: str = "") -> None:
        """An instruction that is an expression of its operands, all of one type."""
        kind = kind or i.type
        self.set(
            i, i.operands[0], template.format(*(self.get(o, kind) for o in i.operands[1:])), result or kind
        )

    def _mul(self, i: Instruction) -> None:
        if "wide" in i.parts or "hi" in i.parts:
            self.wide(i, "{} * {}")
        else:
            self.plain(i, "{} * {}")

    def wide(self, i: Instruction, template: str) -> None:
        kind = i.type
        assert kind[1:] in ("16", "32"), i.name
        double = f"{kind[0]}{2 * int(kind[1:])}"
        a, b = (f"{self.get(o, kind)}.astype(np.{DTYPES[double].__name__})" for o in i.operands[1:3])
        rest = [self.get(o, double) for o in i.operands[3:]]
        value = template.format(a, b, *rest)
        if "hi" in i.parts:
            value = f"(({value}) >> {self.integer(int(kind[1:]), double)}).astype(np.{DTYPES[kind].__name__})"
            self.set(i, i.operands[0], value, kind)
        else:
            self.set(i, i.operands[0], value, double)

    def _mad(self, i: Instruction) -> None:
        if "wide" in i.parts:
            self.wide(i, "{} * {} + {}")
        else:
            assert "hi" not in i.parts, i.name
            self.plain(i, "{} * {} + {}")

    def _fma(self, i: Instruction) -> None:
        if i.type == "f32":  # the product is exact in float64; the sum is rounded twice
            f64 = "{}.astype(np.float64)"
            self.plain(i, f"({f64} * {f64} + {f64}).astype(np.float32)")
        else:
            self.plain(i, "{} * {} + {}")

    def _div(self, i: Instruction) -> None:
        self.plain(i, "{} / {}" if i.type[0] == "f" else "m.quotient({}, {})")

    def _min(self, i: Instruction) -> None:
        self.plain(i, "np.minimum({}, {})" if i.type[0] != "f" or "NaN" in i.parts else "np.fmin({}, {})")

    def _max(self, i: Instruction) -> None:
        self.plain(i, "np.maximum({}, {})" if i.type[0] != "f" or "NaN" in i.parts else "np.fmax({}, {})")

    def _popc(self, i: Instruction) -> None:
        self.plain(i, "np.bitwise_count({}).astype(np.uint32)", result="u32")

    def _clz(self, i: Instruction) -> None:
        self.plain(i, "m.leading_zeros({})", result="u32")

    def _shl(self, i: Instruction) -> None:
        self.shift(i, "<<", i.type.replace("b", "u"))

    def _shr(self, i: Instruction) -> None:
        self.shift(i, ">>", i.type.replace("b", "u"))

    def shift(self, i: Instruction, sign: str, kind: str) -> None:
        bits = int(kind[1:])
        a, by = self.get(i.operands[1], kind), self.get(i.operands[2], "u32")
        most = bits - 1 if kind[0] == "s" else bits
        value = f"m.shift({a}, np.minimum({by}, {self.constant(most, 'u32')}), {sign!r})"
        self.set(i, i.operands[0], value, kind)

    def _bfe(self, i: Instruction) -> None:
        unsigned, signed = i.type.replace("s", "u"), i.type.replace("u", "s")
        bits = self.constant(int(i.type[1:]), "u32")
        a, start, length = self.get(i.operands[1], unsigned), *(self.get(o, "u32") for o in i.operands[2:])
        left = f"m.shift({a}, {bits} - {start} - {length}, '<<')"
        if i.type[0] == "s":
            left = f"{left}.view(np.{DTYPES[signed].__name__})"
        self.set(i, i.operands[0], f"m.shift({left}, {bits} - {length}, '>>')", i.type)

    def _prmt(self, i: Instruction) -> None:
        assert i.parts == ["prmt", "b32"], i.name
        self.plain(i, "m.permuted_bytes({}, {}, {})", "u32")

    def _createpolicy(self, i: Instruction) -> None:
        self.set(i, i.operands[0], self.constant(0, "u64"), "u64")

    def _ldmatrix(self, i: Instruction) -> None:
        self.matrices(i, i.operands[0], i.operands[1], "load_matrices")

    def _stmatrix(self, i: Instruction) -> None:
        self.matrices(i, i.operands[1], i.operands[0], "store_matrices")

    def matrices(self, i: Instruction, registers: str, address: str, what: str) -> None:
        """Move 8 x 8 matrices of 16 bits: a register of a warp for each."""
        assert {"m8n8", "b16"} <= set(i.parts), i.name
        names = [r.strip() for r in registers.strip("{} ").split(",")]
        where, guard = self.address(address), self.guard(i)
        assert not guard, "a warp that moves matrices does it together"
        trans = "trans" in i.parts
        if what == "load_matrices":
            self.lines.append(f"loaded = m.load_matrices({i.line}, {where}, {len(names)}, {trans}, n)")
            for number, name in enumerate(names):
                self.set(i, name, f"loaded[{number}]", "u32")
        else:
            values = ", ".join(self.get(name, "u32") for name in names)
            self.lines.append(f"m.store_matrices({i.line}, {where}, ({values},), {trans}, n)")

    def _setp(self, i: Instruction) -> None:
        compare, kind = i.parts[1], i.type
        a, b = self.get(i.operands[1], kind), self.get(i.operands[2], kind)
        unordered = kind[0] == "f" and compare.endswith("u") and compare != "neu"
        if compare in ("num", "nan"):
            value = f"np.isnan({a}) | np.isnan({b})"
            value = f"({value})" if compare == "nan" else f"~({value})"
        elif compare == "neu":
            value = f"({a} != {b})"
        elif kind[0] == "f" and compare == "ne":
            value = f"(({a} < {b}) | ({a} > {b}))"
        else:
            value = f"({a} {_COMPARE[compare[:2]]} {b})"
            if unordered:
                value = f"({value} | np.isnan({a}) | np.isnan({b}))"
        combine = {"and": "&", "or": "|", "xor": "^"}.get(i.parts[2])
        if combine:
            last = i.operands[3]
            with_ = self.get(last.lstrip("!"), "pred")
            value = f"({value} {combine} {'~' if last[0] == '!' else ''}{with_})"
        first, _, second = i.operands[0].partition("|")
        self.set(i, first, value, "pred")
        if second:
            self.set(i, second, f"~{self.get(first, 'pred')}", "pred")

    def _selp(self, i: Instruction) -> None:
        a, b = self.get(i.operands[1], i.type), self.get(i.operands[2], i.type)
        self.set(i, i.operands[0], f"np.where({self.get(i.operands[3], 'pred')}, {a}, {b})", i.type)

    def _mov(self, i: Instruction) -> None:
        target, source = i.operands
        kind = i.type
        if source[0] == "{":
            parts = source.strip("{} ").split(",")
            width = int(kind[1:]) // len(parts)
            wide = [f"{self.get(p.strip(), f'u{width}')}.astype(np.{DTYPES[kind].__name__})" for p in parts]
            shifted = [f"({w} << np.{DTYPES[kind].__name__}({width * n}))" for n, w in enumerate(wide)]
            self.set(i, target, " | ".join(shifted), kind)
        elif target[0] == "{":
            parts = target.strip("{} ").split(",")
            width = int(kind[1:]) // len(parts)
            narrow = f"np.{DTYPES[f'u{width}'].__name__}"
            for n, part in enumerate(parts):
                by = f"np.{DTYPES[kind].__name__}({width * n})"
                self.set(i, part.strip(), f"({self.get(source, kind)} >> {by}).astype({narrow})", f"u{width}")
        else:
            self.set(i, target, self.get(source, kind), kind)

    def _cvt(self, i: Instruction) -> None:
        to, source = [part for part in i.parts if part in DTYPES or part.startswith(("bf16", "f16x2"))]
        how = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
        rounding = next((how[part] for part in i.parts if part in how), "")
        if to in ("bf16x2", "f16x2"):
            high, low = (f"m.to_half({self.get(o, source)}, {to[:-2]!r})" for o in i.operands[1:])
            self.set(i, i.operands[0], f"({high}.astype('u4') << np.uint32(16)) | {low}", "u32")
        elif to == "bf16":
            self.set(i, i.operands[0], f"m.to_half({self.get(i.operands[1], source)}, 'bf16')", "u16")
        elif source == "bf16":
            a = self.get(i.operands[1], "u16")
            self.set(i, i.operands[0], f"({a}.astype('u4') << np.uint32(16)).view('f4')", to)
        else:
            a = self.get(i.operands[1], source)
            if source[0] == "f" and to[0] != "f":
                value = f"m.to_integer({rounding}({a}), np.{DTYPES[to].__name__})"
            elif rounding:
                value = f"{rounding}({a}).astype(np.{DTYPES[to].__name__}, copy=False)"
            else:
                value = f"{a}.astype(np.{DTYPES[to].__name__}, copy=False)"
            self.set(i, i.operands[0], value, to)

    def _ld(self, i: Instruction) -> None:
        if "param" in i.parts:
            value = f"m.parameter({self.address(i.operands[1])}, np.{DTYPES[i.type].__name__})"
            self.set(i, i.operands[0], value, i.type)
            return
        targets = [t.strip() for t in i.operands[0].strip("{} ").split(",")]
        space = "shared" if any(part.startswith("shared") for part in i.parts) else "global"
        where, guard = self.address(i.operands[1]), self.guard(i) or "None"
        call = (
            f"m.load({i.line}, {space!r}, {where}, np.{DTYPES[i.type].__name__}, {len(targets)}, {guard}, n)"
        )
        self.lines.append(f"loaded = {call}")
        for n, target in enumerate(targets):
            self.set(i, target, f"loaded[{n}]", i.type)

    def _st(self, i: Instruction) -> None:
        values = [v.strip() for v in i.operands[1].strip("{} ").split(",")]
        space = "shared" if any(part.startswith("shared") for part in i.parts) else "global"
        tuple_ = ", ".join(self.get(v, i.type) for v in values)
        where, guard = self.address(i.operands[0]), self.guard(i) or "None"
        self.lines.append(f"m.store({i.line}, {space!r}, {where}, ({tuple_},), {guard}, n)")

    def _atom(self, i: Instruction) -> None:
        how = next((part for part in i.parts if part in ("add", "min", "max", "and", "or")), "")
        assert how, i.name
        assert "global" in i.parts, i.name
        where, guard = self.address(i.operands[-2]), self.guard(i) or "None"
        old = i.operands[0] if len(i.operands) == 3 else "_"
        in_order = self.uses.get(old, 0) > 1
        value = self.get(i.operands[-1], i.type.replace("b", "u"))
        self.lines.append(f"old = m.atomic({i.line}, {how!r}, {where}, {value}, {in_order}, {guard}, n)")
        self.set(i, old, "old", i.type)

    _red = _atom

    def _redux(self, i: Instruction) -> None:
        self.set(i, i.operands[0], f"m.reduce({self.get(i.operands[1], i.type)}, {i.parts[2]!r}, n)", i.type)

    def _shfl(self, i: Instruction) -> None:
        a, by = self.get(i.operands[1], "u32"), self.get(i.operands[2], "u32")
        target, _, inside = i.operands[0].partition("|")
        assert not inside, i.name
        self.set(i, target, f"m.shuffle({a}, {by}, {i.parts[2]!r}, n)", "u32")

    def _bar(self, i: Instruction) -> None:
        self.lines.append("m.barrier(n)")

    _barrier = _bar
