"""A kernel in PTX, as basic blocks of instructions."""

import re
from typing import Any, NamedTuple

import numpy as np

_BITS = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
DTYPES: dict[str, Any] = {
    **_BITS,
    **{f"u{n}": np.dtype(f"u{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"f{n // 8}").type for n in (16, 32, 64)},
}


class Instruction(NamedTuple):
    """One line."""

    line: int  # of the text, from 0; what line information will name
    guard: str  # a predicate register, "!" before it if negated, or ""
    name: str  # add.rn.f32
    operands: list[str]

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    @property
    def type(self) -> str:
        """The last type in its name: of the operands, where there are two of them."""
        types = [part for part in self.parts if re.fullmatch(r"(bf|[bfsu])\d+(x\d+)?|pred", part)]
        return types[-1] if types else ""


class Kernel(NamedTuple):
    """One entry of a text."""

    text: list[str]
    name: str
    parameters: list[tuple[str, str]]  # type and name
    registers: dict[str, str]  # register to type
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # label to block
    sources: dict[int, str]  # line of the text to a line of a source file


def _split(operands: str) -> list[str]:
    return [o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if o.strip()]


def parse(text: str) -> Kernel:
    """The only kernel of a text."""
    lines = text.split("\n")
    name = re.search(r"\.entry\s+([\w$]+)", text)
    parameters = re.findall(r"\.param\s+\.(\w+)[^\n]*?\s([\w$]+_param_\d+)", text)
    assert name is not None
    assert len(re.findall(r"\.entry", text)) == 1
    registers: dict[str, str] = {}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    sources: dict[int, str] = {}
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", text))
    source, depth = "", 0
    for number, line in enumerate(lines):
        if found := re.match(r"\s*\.loc\b.*//\s*(\S+?:\d+)", line):
            source = found.group(1)
        code = line.split("//")[0].strip()
        if code in ("{", "}"):
            depth += 1 if code == "{" else -1
            if depth == 0 and code == "}":
                break
            continue
        if not depth:
            continue
        if found := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", code):
            kind, prefix, count = found.groups()
            kind = kind if kind == "pred" else f"b{kind[1:]}"
            registers |= {f"{prefix}{i}": kind for i in range(int(count))}
            continue
        if found := re.match(r"([\w$]+):$", code):
            if found.group(1) not in targets:
                continue
            if blocks[-1]:
                blocks.append([])
            labels[found.group(1)] = len(blocks) - 1
            continue
        if code.startswith("."):
            continue
        for statement in filter(None, (s.strip() for s in code.split(";"))):
            parsed = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", statement)
            assert parsed, f"not understood: {line}"
            negated, guard, op, operands = parsed.groups()
            sources[number] = source
            blocks[-1].append(Instruction(number, negated + guard if guard else "", op, _split(operands)))
            if op.split(".")[0] in ("bra", "ret", "exit"):
                blocks.append([])
    return Kernel(lines, name.group(1), parameters, registers, blocks, labels, sources)
