"""Run programs of a launch, as PTX says, on NumPy arrays of lanes; count blocks, and memory by warps.

Of all lanes, those that are furthest behind in the text run next, so lanes that parted meet again where
the hardware lets them, and all threads of a program reach a barrier together.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .launches import Launch
from .ptx import DTYPES, Kernel
from .translate import Translator

WARP = 32
SECTOR, LINE = 32, 128  # bytes that L2 hands over, and that a tag of L1 stands for
_HALVES = (np.uint32(0), np.uint32(16))
LANES = 1 << 17  # that run at a time


def placed(arguments: list[Any]) -> tuple[list[Any], list[tuple[int, np.ndarray]]]:
    """Tensors as addresses, each at a multiple of 512 as an allocator does; and their memory."""
    buffers: dict[int, tuple[int, np.ndarray]] = {}
    base, placed = 1 << 20, []
    for a in arguments:
        if not isinstance(a, Tensor):
            placed.append(a)
            continue
        storage = a.untyped_storage()
        if storage.data_ptr() not in buffers:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            buffers[storage.data_ptr()] = (base, whole.numpy())
            base += -(-storage.nbytes() // 512) * 512 + 512
        placed.append(buffers[storage.data_ptr()][0] + a.storage_offset() * a.element_size())
    return placed, list(buffers.values())


@dataclass
class Access:
    """What the warps ask for at one instruction: sums over all programs that ran."""

    kind: str  # load, store or atomic
    space: str  # global or shared
    requests: int = 0
    lanes: int = 0
    lines: int = 0
    sectors: int = 0
    distinct: int = 0  # sectors that differ, program by program


class Counts(NamedTuple):
    """How often programs did what."""

    programs: int
    warps: np.ndarray  # [blocks, programs]: how many warps of a program ran a block, all visits together
    accesses: dict[int, Access]  # by line of the text
    sectors: int  # that loads ask for and that differ, program by program


class Machine:
    """Some programs of a grid of one dimension, side by side."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        programs: np.ndarray,
    ) -> None:
        threads, shared = launch.threads, launch.shared
        arguments, buffers = placed(launch.arguments)
        self.kernel, self.threads = kernel, threads
        assert len(arguments) == len(kernel.parameters), (len(arguments), kernel.parameters)
        self.parameters = np.zeros(len(arguments), np.uint64)
        for slot, ((kind, _), value) in enumerate(zip(kernel.parameters, arguments, strict=True)):
            self.parameters[slot : slot + 1].view(DTYPES[kind])[0] = value
        self.lanes = len(programs) * threads
        tid = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.program = np.repeat(np.arange(len(programs)), threads)
        self.specials = {
            "%tid.x": tid,
            "%laneid": tid % WARP,
            "%ctaid.x": np.repeat(programs.astype(np.uint32), threads),
            "%ntid.x": np.array([threads], np.uint32),
            "%nctaid.x": np.array([launch.grid], np.uint32),
        }
        self.registers: dict[str, np.ndarray] = {}
        self.bases, self.buffers = np.array([base for base, _ in buffers]), [data for _, data in buffers]
        self.shared = np.zeros(len(programs) * shared, np.uint8)
        self.shared_bytes = shared
        self.accesses: dict[int, Access] = {}
        self.seen: dict[int, list[np.ndarray]] = {}  # programs and sectors, by line

    # What blocks do with registers. `n` holds the lanes that run, or is None: all.

    def take(self, register: str, n: Any) -> np.ndarray:
        value = self.registers[register]
        return value if n is None else value[n]

    def put(self, register: str, value: np.ndarray, n: Any) -> None:
        if n is None:
            self.registers[register] = np.broadcast_to(value, self.lanes).copy()
            return
        if register not in self.registers:
            self.registers[register] = np.zeros(self.lanes, value.dtype)
        self.registers[register][n] = value

    def special(self, name: str, n: Any) -> np.ndarray:
        value = self.specials[name]
        return value if n is None or len(value) == 1 else value[n]

    def parameter(self, where: np.ndarray, dtype: Any) -> np.ndarray:
        assert not (where % 8).any(), "within a parameter"
        return self.parameters[where // 8].view(dtype)[:: 8 // np.dtype(dtype).itemsize]

    # Arithmetic that NumPy has in another form.

    @staticmethod
    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.broadcast_arrays(a, b)
        quotient = a // np.where(b == 0, 1, b).astype(a.dtype)
        return quotient + ((a < 0) != (b < 0)) * (quotient * b != a) if a.dtype.kind == "i" else quotient

    @classmethod
    def remainder(cls, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a - cls.quotient(a, b).astype(a.dtype) * b).astype(a.dtype)

    @staticmethod
    def shift(a: np.ndarray, by: np.ndarray, sign: str) -> np.ndarray:
        bits = 8 * a.dtype.itemsize
        function = operator.lshift if sign == "<<" else operator.rshift
        shifted = function(a, np.minimum(by, bits - 1).astype(a.dtype))
        return np.where(by < bits, shifted, a.dtype.type(0)) if a.dtype.kind == "u" else shifted

    @staticmethod
    def leading_zeros(a: np.ndarray) -> np.ndarray:
        return (32 - np.frexp(a.view(np.uint32).astype(np.float64))[1]).astype(np.uint32)

    @staticmethod
    def reversed_bits(a: np.ndarray) -> np.ndarray:
        return np.packbits(np.unpackbits(a.view(np.uint8))[::-1]).view(a.dtype)[::-1]

    @staticmethod
    def halves(function: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Two numbers of 16 bits at a time."""
        low, high = (function((a >> by).astype(np.uint16), (b >> by).astype(np.uint16)) for by in _HALVES)
        return low.astype(np.uint32) | (high.astype(np.uint32) << _HALVES[1])

    @staticmethod
    def permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(1, np.uint32)
        for byte in range(4):
            which = (selector >> np.uint32(4 * byte)) & np.uint32(7)
            value = (both >> (which.astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
            result = result | (value << np.uint32(8 * byte))
        return result

    @staticmethod
    def to_integer(a: np.ndarray, dtype: Any) -> np.ndarray:
        """Saturated, and NaN is 0."""
        info = np.iinfo(dtype)
        wide = np.nan_to_num(a.astype(np.float64), nan=0.0)
        whole = np.clip(wide, float(info.min), float(info.max))
        return np.where(wide >= float(info.max), info.max, whole.astype(dtype)).astype(dtype)

    @staticmethod
    def to_half(a: np.ndarray, kind: str) -> np.ndarray:
        if kind == "f16":
            return a.astype(np.float16).view(np.uint16)
        bits = a.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)

    # Between lanes.

    def _by_warp(self, a: np.ndarray, n: Any) -> np.ndarray:
        count = self.lanes if n is None else len(n)
        whole = n is None or (count % WARP == 0 and (n[::WARP] % WARP == 0).all())
        assert whole, "a warp exchanges values when some of its lanes are elsewhere"
        return np.broadcast_to(a, count).reshape(-1, WARP)

    def reduce(self, a: np.ndarray, how: str, n: Any) -> np.ndarray:
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}[how]
        return np.repeat(function.reduce(self._by_warp(a, n), axis=1), WARP).astype(a.dtype)

    def shuffle(self, a: np.ndarray, by: np.ndarray, how: str, n: Any) -> np.ndarray:
        lane, by = np.arange(WARP), self._by_warp(by, n).astype(np.int64)
        source = {"bfly": lane ^ by, "idx": by % WARP, "down": lane + by, "up": lane - by}[how]
        source = np.where((source < 0) | (source >= WARP), lane, source)
        return np.take_along_axis(self._by_warp(a, n), np.broadcast_to(source, (len(by), WARP)), 1).ravel()

    def barrier(self, n: Any) -> None:
        counts = np.bincount(self.program if n is None else self.program[n])
        assert np.isin(counts, (0, self.threads)).all(), "threads of a program part at a barrier"

    # Memory.

    def load(
        self, line: int, space: str, where: Any, dtype: Any, parts: int, guard: Any, n: Any
    ) -> list[Any]:
        lanes, where, kept = self._ask("load", line, space, where, guard, n)
        size = np.dtype(dtype).itemsize
        results = []
        for part in range(parts):
            got = np.zeros(len(where), dtype)
            for data, chosen, offsets in self._places(space, lanes, where + part * size, size):
                got[chosen] = data.view(dtype)[offsets]
            full = got
            if kept is not None:
                full = np.zeros(len(kept), dtype)
                full[kept] = got
            results.append(full)
        return results

    def store(self, line: int, space: str, where: Any, values: Any, guard: Any, n: Any) -> None:
        dtype = values[0].dtype
        lanes, where, kept = self._ask("store", line, space, where, guard, n)
        count = self.lanes if n is None else len(n)
        for part, value in enumerate(values):
            value = np.broadcast_to(value, count)
            value = value if kept is None else value[kept]
            for data, chosen, offsets in self._places(
                space, lanes, where + part * dtype.itemsize, dtype.itemsize
            ):
                data.view(dtype)[offsets] = value[chosen]

    def atomic(
        self, line: int, how: str, where: Any, value: Any, in_order: bool, guard: Any, n: Any
    ) -> np.ndarray:
        """What lay there before, lane by lane, if that is asked for."""
        lanes, where, kept = self._ask("atomic", line, "global", where, guard, n)
        count = self.lanes if n is None else len(n)
        value = np.broadcast_to(value, count)
        given, before = value if kept is None else value[kept], np.zeros(len(lanes), value.dtype)
        names = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
        }
        for data, chosen, offsets in self._places("global", lanes, where, value.dtype.itemsize):
            memory = data.view(value.dtype)
            if in_order:
                for lane, offset in zip(np.arange(len(lanes))[chosen], offsets, strict=True):
                    before[lane] = memory[offset]
                    memory[offset] = names[how](memory[offset], given[lane])
            else:
                names[how].at(memory, offsets, given[chosen])
        if kept is None:
            return before
        old = np.zeros(count, value.dtype)
        old[kept] = before
        return old

    def _matrix(self, line: int, kind: str, where: Any, matrices: int, trans: bool, n: Any) -> Any:
        """Where in shared memory the two halves of each lane's registers lie, in units of 16 bits."""
        count = self.lanes if n is None else len(n)
        rows = self._by_warp(np.broadcast_to(where, count), n)[:, : 8 * matrices]
        lanes = (np.arange(count) if n is None else n).reshape(-1, WARP)[:, : 8 * matrices]
        self._ask(kind, line, "shared", where, None, n)
        base = (self.program[lanes] * self.shared_bytes + rows) // 2
        assert ((rows >= 0) & (rows + 16 <= self.shared_bytes)).all(), "outside of shared memory"
        lane = np.arange(WARP)
        for matrix in range(matrices):
            of = base[:, 8 * matrix : 8 * matrix + 8]
            for half in (0, 1):
                row, column = lane // 4, lane % 4 * 2 + half
                row, column = (column, row) if trans else (row, column)
                yield matrix, half, (of[:, row] + column).ravel()

    def load_matrices(self, line: int, where: Any, matrices: int, trans: bool, n: Any) -> list[np.ndarray]:
        count = self.lanes if n is None else len(n)
        results = [np.zeros(count, np.uint32) for _ in range(matrices)]
        for matrix, half, places in self._matrix(line, "load", where, matrices, trans, n):
            results[matrix] |= self.shared.view(np.uint16)[places].astype(np.uint32) << np.uint32(16 * half)
        return results

    def store_matrices(self, line: int, where: Any, values: Any, trans: bool, n: Any) -> None:
        count = self.lanes if n is None else len(n)
        for matrix, half, places in self._matrix(line, "store", where, len(values), trans, n):
            value = np.broadcast_to(values[matrix], count) >> np.uint32(16 * half)
            self.shared.view(np.uint16)[places] = value.astype(np.uint16)

    def _places(self, space: str, lanes: np.ndarray, where: np.ndarray, size: int) -> list[Any]:
        """Buffers, which of the lanes are in each, and where."""
        assert not (where % size).any(), "an address is not aligned"
        if space == "shared":
            assert ((where >= 0) & (where + size <= self.shared_bytes)).all(), "outside of shared memory"
            return [(self.shared, slice(None), (self.program[lanes] * self.shared_bytes + where) // size)]
        buffer = np.searchsorted(self.bases, where, "right") - 1
        places = []
        for b in np.unique(buffer):
            chosen = slice(None) if (buffer == b).all() else buffer == b
            offsets = where[chosen] - self.bases[b]
            inside = b >= 0 and (offsets + size <= self.buffers[b].nbytes).all()
            assert inside, f"{self.kernel.name} leaves a buffer"
            places.append((self.buffers[b], chosen, offsets // size))
        return places

    def _ask(
        self, kind: str, line: int, space: str, where: Any, guard: Any, n: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Count what warps ask for. Returns lanes that do, their addresses, and the guard if some do not."""
        lanes = np.arange(self.lanes) if n is None else n
        where = np.broadcast_to(where, len(lanes))
        kept = None
        if guard is not None:
            kept = np.broadcast_to(guard, len(lanes))
            if kept.all():
                kept = None
            else:
                lanes, where = lanes[kept], where[kept]
        access = self.accesses.setdefault(line, Access(kind, space))
        if len(lanes):
            warp = lanes // WARP
            access.lanes += len(lanes)
            access.requests += 1 + int(np.count_nonzero(np.diff(warp)))
            if space == "global":
                pairs = np.unique((warp << 43) | (where // SECTOR))
                access.sectors += len(pairs)
                lines = pairs // (LINE // SECTOR)
                access.lines += 1 + int(np.count_nonzero(np.diff(lines)))
                program = (pairs >> 43) // (self.threads // WARP)
                seen = self.seen.setdefault(line, [])
                seen.append(np.unique((program << 43) | (pairs & ((1 << 43) - 1))))
                if sum(map(len, seen[1:])) > LANES:
                    seen[:] = [np.unique(np.concatenate(seen))]
        return lanes, where, kept

    def run(self) -> Counts:
        translator = Translator(self.kernel)
        blocks = [translator.block(b) for b in range(len(self.kernel.blocks))]
        programs = self.lanes // self.threads
        warps = np.zeros((len(blocks), programs), np.int64)
        at = np.zeros(self.lanes, np.int32)
        with np.errstate(all="ignore"):
            while (b := int(at.min())) < len(blocks):
                n = np.flatnonzero(at == b)
                present = np.unique(n // WARP) if len(n) < self.lanes else np.arange(self.lanes // WARP)
                warps[b] += np.bincount(present // (self.threads // WARP), minlength=programs)
                some = None if len(n) == self.lanes else n
                taken = blocks[b].run(self, some)
                lanes = slice(None) if some is None else some
                at[lanes] = b + 1
                if blocks[b].end:
                    goes = len(blocks) if blocks[b].end == "ret" else blocks[b].target
                    at[lanes] = goes if taken is True else np.where(taken, goes, b + 1)
        for line, seen in self.seen.items():
            seen[:] = [np.unique(np.concatenate(seen))]
            self.accesses[line].distinct = len(seen[0])
        loads = [seen[0] for line, seen in self.seen.items() if self.accesses[line].kind == "load"]
        sectors = len(np.unique(np.concatenate(loads))) if loads else 0
        return Counts(programs, warps, self.accesses, sectors)


def run(kernel: Kernel, launch: Launch, programs: np.ndarray) -> Counts:
    """Some programs of a launch, `LANES` lanes at a time."""
    step = max(LANES // launch.threads, 1)
    parts = [Machine(kernel, launch, programs[at : at + step]).run() for at in range(0, len(programs), step)]
    accesses: dict[int, Access] = {}
    for part in parts:
        for line, a in part.accesses.items():
            total = accesses.setdefault(line, Access(a.kind, a.space))
            for field in ("requests", "lanes", "lines", "sectors", "distinct"):
                setattr(total, field, getattr(total, field) + getattr(a, field))
    sectors = sum(part.sectors for part in parts)
    return Counts(len(programs), np.concatenate([p.warps for p in parts], 1), accesses, sectors)
