"""What the counts of a launch cost on a GPU, as the largest of several bounds.

Every number of the GPU stands here, and every one is an assumption: sizes, clock and DRAM are those of
data sheets; throughputs of pipes are those that NVIDIA documents for compute capability 9.0, and latencies
and L2's bandwidth those that others report, none of them looked up again or measured here.

The counts are exact for the programs that ran, but what is made of them has not met a GPU. Its form was
not blind, either: a plain maximum of the bounds gave 0.37 and 0.78 ms where an estimate by hand of the
same backward kernels had 0.66 and 1.4. With `crowded` and `drain`, which a maximum leaves out, it gives
0.57 and 0.98. That the two agree is no measurement.
"""

import heapq
import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from .emulator import SECTOR, WARP, Counts
from .ptx import Kernel
from .sass import Code, Operation, cycles

SCHEDULERS = 4  # per SM
REGISTERS = 65536  # per SM; a warp gets them by 256
MOST_WARPS, MOST_PROGRAMS, SHARED = 64, 32, 227 * 1024  # per SM
EFFICIENCY = 0.8  # of issue slots and of pipes, that code with such a mixture uses; assumed
L2_BANDWIDTH = 5.5e12  # bytes per second, read by all SMs; as others report
SLICES = 96  # of L2; each adds one float per cycle; assumed
TAGS = 1  # lines that an SM's L1 looks up per cycle; assumed
L1_HIT, L2_HIT, DRAM_LATENCY = 35, 270, 600  # cycles until a load has come; as others report
SHORT = 30  # cycles of shared memory, conversions, constants and special functions; as others report
GAP = 2e-6  # seconds from one launch to the next in a graph; assumed

# Cycles that a scheduler's pipe is taken by an instruction of a warp.
PIPES = {
    "xu": dict.fromkeys(("MUFU", "F2I", "I2F", "FRND", "POPC", "FLO", "F2F", "BREV"), 8),
    "alu": dict.fromkeys(
        (
            *(
                "IADD3",
                "VIADD",
                "LEA",
                "IABS",
                "IMNMX",
                "VIMNMX",
                "ISETP",
                "LOP3",
                "SHF",
                "PRMT",
                "SGXT",
                "BMSK",
            ),
            *("SEL", "CSEL", "FSEL", "FMNMX", "FSETP", "PLOP3", "P2R", "R2P", "I2FP", "F2FP"),
        ),
        2,
    ),
    "multiply": {"IMAD": 2},
    "fma": dict.fromkeys(("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"), 1),
    "float64": dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), 2),
}


class Gpu(NamedTuple):
    """What differs between GPUs of one architecture."""

    name: str
    sms: int
    clock: float  # cycles per second
    dram: float  # bytes per second
    l2: int  # bytes


GPUS = {
    "h100": Gpu("H100 SXM", 132, 1.755e9, 3.35e12, 50 << 20),
    "h200": Gpu("H200 SXM", 132, 1.755e9, 4.8e12, 50 << 20),
}


class Visited(NamedTuple):
    """A block of PTX."""

    visits: float  # of a warp of a program, on average
    instructions: int  # of the machine
    cycles: float  # of a visit, if the warp is alone
    source: str  # where most of it comes from


class Cost(NamedTuple):
    """Of one launch."""

    name: str
    grid: int
    sampled: int  # programs that were run
    registers: int
    resident: int  # warps per SM
    instructions: float  # of warps, in the whole launch
    per_program: float  # those of one warp of a program, on average
    lines_per_load: float
    sectors_per_load: float
    l2_bytes: float
    seconds: dict[str, float]  # by bound
    longest: float  # seconds that the longest program takes alone
    drain: float  # seconds at the end in which programs run beside too few others
    files: dict[str, float]  # instructions of a warp of a program, by where they come from
    blocks: list[Visited]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def total(self) -> float:
        return self.seconds[self.bound] + self.drain + GAP


def resident_warps(registers: int, warps: int, shared: int) -> int:
    """Warps of programs of so many that an SM holds at a time."""
    per_warp = math.ceil(registers * WARP / 256) * 256
    programs = min(
        REGISTERS // per_warp // warps, MOST_WARPS // warps, MOST_PROGRAMS, SHARED // (shared + 1024)
    )
    return programs * warps


def crowded(work: float, alone: float, warps: int) -> float:
    """How long `warps` take on average for what each needs a unit for, one after another.

    Each needs it for `work` in all and takes `alone` in all if there are no others. Below what the unit
    can serve, warps still meet there by chance: mean value analysis of a closed queue.
    """
    waiting, time = 0.0, alone
    for n in range(1, warps + 1):
        served = work * (1 + waiting)
        time = (served + max(alone - work, 0)) / n
        waiting = served / time
    return time


def drain(alone: np.ndarray, slots: float) -> float:
    """How much longer programs take, in their order on so many slots, than if work were even."""
    free = [0.0] * max(round(slots), 1)
    for time in alone:
        heapq.heapreplace(free, free[0] + float(time))
    return max(max(free) - float(alone.sum()) / len(free), 0.0)


def cost(
    name: str,
    kernel: Kernel,
    counts: Counts,
    code: Code,
    *,
    grid: int,
    threads: int,
    shared: int,
    dram: float,
    gpu: Gpu,
) -> Cost:
    """The bounds of one launch; `dram` is how many bytes DRAM must bring or take."""
    warps = threads // WARP
    scale = grid / counts.programs
    runs = counts.warps.sum(1)
    instructions: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for origin, operations in code.blocks:
        for o in operations:
            times = runs[origin] / code.copies.get(origin, 1)
            instructions[o.base] += times
            files[kernel.sources.get(o.line, "").split(":")[0]] += times / counts.programs / warps
    accesses = [a for a in counts.accesses.values() if a.space == "global"]
    loads = [a for a in accesses if a.kind == "load"]
    asked = {kind: sum(a.sectors for a in accesses if a.kind == kind) for kind in ("store", "atomic")}
    # What a load asks for anew may have been brought by another load.
    missed = counts.sectors / max(sum(a.distinct for a in loads), 1)
    l2_bytes = SECTOR * scale * (counts.sectors + asked["store"] + asked["atomic"])
    lookups = sum(a.lines if a.space == "global" else a.requests for a in counts.accesses.values())
    requests = sum(a.requests for a in loads)
    far = L2_HIT + min(dram / l2_bytes, 1.0) * (DRAM_LATENCY - L2_HIT)

    def latency(o: Operation) -> float:
        if o.base not in ("LDG", "ATOMG"):
            return SHORT
        access = counts.accesses.get(o.line)
        if access is None or not access.requests:
            return L1_HIT
        return (
            L1_HIT
            + access.distinct / access.sectors * missed * (far - L1_HIT)
            + access.lines / access.requests
            - 1
        )

    # A warp's own time on every visit of a block; warps of a program run side by side.
    own = np.zeros(len(counts.warps))
    for origin, operations in code.blocks:
        own[origin] += cycles(operations, latency) / code.copies.get(origin, 1)
    alone = (own[:, None] * counts.warps).sum(0) / warps / gpu.clock  # seconds of each program
    resident = resident_warps(code.registers, warps, shared)
    slots = min(gpu.sms * resident // warps, grid)
    resident = min(resident, math.ceil(slots * warps / gpu.sms))
    per_sm, per_scheduler = gpu.sms * gpu.clock, gpu.sms * SCHEDULERS * gpu.clock * EFFICIENCY
    latency_bound = alone.sum() * scale / slots

    def shared_by(work: float, sharing: float) -> float:
        return crowded(work, latency_bound * sharing, max(round(sharing), 1))

    issue = sum(instructions.values())
    seconds = {
        "issue": shared_by(issue * scale / per_scheduler, resident / SCHEDULERS),
        "L1": shared_by(lookups * scale / (per_sm * TAGS), resident),
        "L2": l2_bytes / L2_BANDWIDTH,
        "DRAM": dram / gpu.dram,
        "latency": latency_bound,
    }
    for pipe, taken in PIPES.items():
        used = sum(instructions[n] * c for n, c in taken.items())
        seconds[pipe] = shared_by(used * scale / per_scheduler, resident / SCHEDULERS)
    if adds := sum(a.lanes for a in accesses if a.kind == "atomic"):
        seconds["atomics"] = adds * scale / (SLICES * gpu.clock)
    return Cost(
        name, grid, counts.programs, code.registers, resident, issue * scale,
        issue / counts.programs / warps, sum(a.lines for a in loads) / max(requests, 1),
        sum(a.sectors for a in loads) / max(requests, 1), l2_bytes, seconds, alone.max(),
        drain(alone, slots / scale), dict(files.most_common()), visited(kernel, counts, code, own, warps),
    )  # fmt: skip


def visited(kernel: Kernel, counts: Counts, code: Code, own: np.ndarray, warps: int) -> list[Visited]:
    """The blocks that ran."""
    rows = []
    for b, block in enumerate(kernel.blocks):
        sources = Counter(kernel.sources[i.line] for i in block)
        visits = counts.warps[b].sum() / counts.programs / warps
        copies = code.copies.get(b, 1)
        instructions = sum(len(operations) for origin, operations in code.blocks if origin == b) // copies
        if visits and instructions:
            rows.append(Visited(visits, instructions, own[b], sources.most_common(1)[0][0]))
    return rows
