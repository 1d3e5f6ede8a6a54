"""The machine code of a kernel: its instructions, and how long a warp takes over them if it is alone.

The PTX is assembled anew with a line number of its own for every instruction, which the assembler keeps
as line information; nothing else of its output changes. So each basic block of machine code is known to
come from a block of PTX, and runs as often as that does.

An instruction holds 21 bits of scheduling: for how many cycles to stall, which of six barriers it frees
when its result has come, and for which it waits. A warp runs in order, so they say how long it takes.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .launches import TOOLS
from .ptx import Kernel

MEMORY = ("LDG", "STG", "RED", "REDG", "ATOMG", "ATOM", "LDS", "STS")


class Operation(NamedTuple):
    """One instruction of the machine."""

    name: str  # IADD3, LDG.E.128
    line: int  # of the PTX, from 0; -1: unknown
    stall: int
    sets: list[int]  # barriers that it frees later
    waits: list[int]
    target: str  # of a call

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


class Code(NamedTuple):
    """What the assembler made of a kernel."""

    blocks: list[tuple[int, list[Operation]]]  # block of PTX it comes from, and its operations
    copies: dict[int, int]  # block of PTX to how often it was laid out
    registers: int


def _annotated(kernel: Kernel) -> str:
    """The text with a line number at every instruction."""
    lines = {i.line for block in kernel.blocks for i in block}
    last = max(lines)
    result = []
    for number, line in enumerate(kernel.text):
        code = line.split("//")[0].strip()
        if number > last and code == "}":
            return "\n".join([*result, "}"])
        if code.startswith((".loc", ".file")):
            continue
        if number in lines:
            result.append(f".loc 1 {number + 1} 0")
        result.append(code)
        if code.startswith(".address_size"):
            result.append('.file 1 "ptx"')
    raise AssertionError("no end of the kernel")


def assemble(kernel: Kernel, options: tuple[str, ...]) -> Code:
    target = re.search(r"\.target\s+(sm_\w+)", "\n".join(kernel.text))
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(_annotated(kernel))
        command = [TOOLS / "ptxas", "-lineinfo", "-v", f"--gpu-name={target[1]}", *options]
        done = subprocess.run([*command, source, "-o", cubin], check=True, capture_output=True, text=True)
        dump = [TOOLS / "nvdisasm", "-g", "-c", "-hex", cubin]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    used = re.search(r"Used (\d+) registers", done.stdout + done.stderr)
    assert used, done.stderr
    return _code(kernel, text, int(used[1]))


def _operations(text: str) -> dict[str, list[list[Operation]]]:
    """Basic blocks of each function."""
    functions: dict[str, list[list[Operation]]] = {"": [[]]}
    blocks, line = functions[""], -1
    rows = iter(text.split("\n"))
    for row in rows:
        if found := re.match(r'\s*//## File "ptx", line (\d+)', row):
            line = int(found[1]) - 1
        elif found := re.match(r"(\$__internal\S*|\.L_\S*):", row):
            if found[1][0] == "$":
                blocks = functions[found[1]] = []
            blocks.append([])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);\s*/\* 0x", row):
            bits = int(re.search(r"0x([0-9a-f]+)", next(rows))[1], 16) >> 41
            frees = [n for n in (bits >> 5 & 7, bits >> 8 & 7) if n < 6]
            waits = [n for n in range(6) if bits >> (11 + n) & 1]
            called = re.search(r"`\((\S+)\)", found[2])
            name = found[1]
            blocks[-1].append(
                Operation(name, line, max(bits & 15, 1), frees, waits, called[1] if called else "")
            )
            if name.startswith(("BRA", "EXIT", "CALL", "RET")):
                blocks.append([])
    return functions


def _code(kernel: Kernel, text: str, registers: int) -> Code:
    block_of = {i.line: b for b, block in enumerate(kernel.blocks) for i in block}
    blocks = []
    functions = _operations(text)
    for operations in functions.pop(""):
        origins = Counter(block_of[o.line] for o in operations if o.line in block_of)
        # The slow paths of divisions are for denormals.
        slow = any(o.base == "CALL" and "slowpath" in o.target for o in operations)
        if origins and not slow and operations[0].base not in ("NOP",):
            blocks.append((origins.most_common(1)[0][0], operations))
    for origin, operations in list(blocks):
        for o in operations:
            if o.base == "CALL":  # a division of integers of 64 bits: as often as it is called
                blocks += [(origin, b) for b in functions[o.target] if b]
    laid_out: dict[int, Counter[int]] = {}
    for _, operations in blocks:
        for o in operations:
            if o.base in MEMORY and o.line in block_of:
                laid_out.setdefault(block_of[o.line], Counter())[o.line] += 1
    copies = {block: max(count.values()) for block, count in laid_out.items()}
    return Code(blocks, copies, registers)


def cycles(operations: list[Operation], latency: Callable[[Operation], float]) -> float:
    """How long one warp takes over a block if it is alone."""
    now, done = 0.0, [0.0] * 6
    for o in operations:
        now = max([now, *(done[n] for n in o.waits)])
        for n in o.sets:
            done[n] = max(done[n], now + latency(o))
        now += o.stall
    return max(now, *done)
