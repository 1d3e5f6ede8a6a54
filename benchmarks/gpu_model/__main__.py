"""What a launch of the GPU engine will cost, without a GPU: `PYTHONPATH=src python -m benchmarks.gpu_model`.

Nothing is described by hand. A call is made as ever, and its kernels are compiled as they are launched.
Of each grid some programs are run in PTX (`emulator`), with real boxes: that counts how often each basic
block runs, and which sectors and lines each warp asks for at each load and store. The machine code of the
blocks (`sass`) turns that into instructions, and into the time that a warp takes if it is alone. `cost`
makes bounds of them, of which the largest, with the drain at the end of the grid and the gap between two
launches, is the prediction. torchvision's kernels, from the PTX in its wheel, go the same way; the copies
around them are bytes through DRAM, and the waiting of its host is left out.

Programs are spread evenly over the grid, about a thousand; a launch that others follow runs in full, since
they may read what it wrote. Maps have no values, so kernels must not branch on values of maps.

What is not modelled: hits in L1 between programs, misses in L2 of what was there before (DRAM moves each
sector once), conflicts between banks of shared memory, atomics that meet at an address, the host.

The first line of a launch: its time; instructions of all warps, in millions; those of one warp of a
program; lines and sectors that a load of a warp asks for; megabytes that L2 gives and takes; warps per SM;
the largest bounds. A bound of a unit holds the waiting for it and the warps' own time, where warps are too
few to hide it: so several may be near each other. `--blocks` shows where a warp spends its time.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from roialign import multiscale_roi_align
from roialign.bench.workloads import make_boxes
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.schema import Pooling

from . import cost, launches, sass
from .emulator import LANES, run
from .ptx import parse

STRIDES, SIZE, CHANNELS = (4, 8, 16, 32), (800, 1344), 256


class Workload(NamedTuple):
    """Named as in `benchmarks/gpu.py`, where that has it."""

    name: str
    counts: Sequence[int]
    passes: tuple[str, ...] = ("forward",)
    size: int = 7
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad: str = ""  # layout of the gradient, if not that of the maps
    smallest: float = 0.0  # side of the boxes in pixels, if they are to be large
    ratio: int = 2

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {kind}, {self.layout}"


WORKLOADS = [
    Workload("box head", [1000]),
    Workload("box head", [1000], layout="channels_last"),
    Workload("box head", [1000], dtype=torch.bfloat16),
    Workload("box head", [1000], dtype=torch.bfloat16, layout="channels_last"),
    Workload("mask head", [100], size=14),
    Workload("adaptive", [1000], ratio=0),
    Workload("adaptive", [1000], ratio=0, layout="channels_last"),
    Workload("backward", [512], ("backward",)),
    Workload("backward", [512], ("backward",), layout="channels_last"),
    Workload("NCHW gradient", [512], ("backward",), layout="channels_last", grad="contiguous"),
    Workload("large boxes", [512], ("backward",), smallest=448),
    Workload("training 2 x 512", [512, 512], ("forward", "backward")),
    Workload("16 images", [512] * 16, ("backward",)),
]


def measured(row: dict[str, Any]) -> Workload:
    """What `benchmarks/gpu.py` measured."""
    w = {w.name: w for w in WORKLOADS}.get(row["workload"])
    if w is None:
        name, _, count = row["workload"].partition(" = ")
        assert name == "K", f"unknown workload {row['workload']}"
        w = Workload(row["workload"], [int(count)])
    return w._replace(dtype=getattr(torch, row["dtype"]), layout=row["layout"])


def inputs(w: Workload) -> tuple[list[Tensor], Tensor, Pooling, Tensor]:
    """Maps without values, which cost no memory, and boxes as a proposal network gives them."""
    boxes = make_boxes(sum(w.counts), SIZE)
    if w.smallest:
        many = make_boxes(64 * sum(w.counts), SIZE)
        area = (many[:, 2] - many[:, 0]) * (many[:, 3] - many[:, 1])
        boxes = many[area >= w.smallest**2][: sum(w.counts)]
        assert len(boxes) == sum(w.counts)
    features = [
        empty((len(w.counts), CHANNELS, math.ceil(SIZE[0] / s), math.ceil(SIZE[1] / s)), w.dtype, w.layout)
        for s in STRIDES
    ]
    rois = boxes_to_rois(list(boxes.split(list(w.counts))), features[0], torch.float32)
    scales = [1 / s for s in STRIDES]
    pooling = Pooling((w.size, w.size), scales, w.ratio, False, *staircase(scales, 224, 4, torch.float32))
    grad = empty((len(rois), CHANNELS, w.size, w.size), w.dtype, w.grad or w.layout)
    return features, rois, pooling, grad


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


def touched(w: Workload, features: list[Tensor], rois: Tensor) -> int:
    """Bytes of the sectors that pooling must read."""
    leaves = [torch.zeros(len(f), 1, *f.shape[2:], requires_grad=True) for f in features]
    scales = [1 / s for s in STRIDES]
    boxes = list(rois[:, 1:].split(list(w.counts)))
    multiscale_roi_align(leaves, boxes, w.size, scales, 2).sum().backward()
    item = features[0].element_size()
    cells = cost.SECTOR // item
    total = 0
    for leaf in leaves:
        mask = leaf.grad != 0
        if w.layout == "channels_last":
            total += int(mask.sum()) * CHANNELS * item
        else:
            flat = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % cells))
            total += int(flat.view(-1, cells).any(1).sum()) * CHANNELS * cost.SECTOR
    return total


def floor_bytes(w: Workload, what: str, features: list[Tensor], rois: Tensor) -> int:
    """Bytes that any implementation must move: maps or their gradients, and pooled values."""
    pooled = len(rois) * CHANNELS * w.size**2 * features[0].element_size()
    maps = touched(w, features, rois) if what == "forward" else sum(f.nbytes for f in features)
    return pooled + maps


def programs(grid: int, most: int) -> np.ndarray:
    """Some of a grid. The step has no divisor in common with it, so tiles and channels are all met."""
    step = math.ceil(grid / most)
    while math.gcd(step, grid) > 1:
        step += 1
    return np.arange(0, grid, step)


def modelled(launch: launches.Launch, complete: bool, dram: float, gpu: cost.Gpu) -> cost.Cost:
    """Run programs of a launch, all of them if later launches read what it writes.

    `dram` is how many bytes DRAM must bring or take for it.
    """
    kernel = parse(launch.ptx)
    code = sass.assemble(kernel, launch.options)
    chosen = programs(launch.grid, launch.grid if complete else LANES // launch.threads)
    counts = run(kernel, launch, chosen)
    return cost.cost(
        launch.name, kernel, counts, code, grid=launch.grid, threads=launch.threads, shared=launch.shared,
        dram=dram, gpu=gpu,
    )  # fmt: skip


def result(w: Workload, what: str, gpu: cost.Gpu, with_theirs: bool) -> dict[str, Any]:
    """Of one pass: launches of ours and of torchvision's, and the least time."""
    features, rois, pooling, grad = inputs(w)
    grad_or_none = grad if what == "backward" else None
    floor = floor_bytes(w, what, features, rois)
    mine = launches.ours(features, rois, pooling, grad_or_none)
    main = next(i for i, x in enumerate(mine) if x.name.startswith(what))  # those before it write tables
    ours = [modelled(x, i < main, floor if i == main else 0, gpu) for i, x in enumerate(mine)]
    theirs, copied = [], 0
    if with_theirs and w.dtype == torch.float32:
        maps = sum(f.nbytes for f in features)
        # RoIs of a map are taken out and put back; maps or gradients are copied to NCHW, gradients zeroed.
        copied = 3 * grad.nbytes if what == "forward" else 2 * grad.nbytes + maps
        copied += 2 * maps if w.layout == "channels_last" else 0
        theirs = [
            modelled(x, False, floor * x.arguments[0] / grad.numel(), gpu)
            for x in launches.theirs(features, rois, pooling, grad_or_none)
        ]
    return {
        "workload": w.name, "dtype": str(w.dtype).removeprefix("torch."), "layout": w.layout, "pass": what,
        "gpu": gpu.name, "floor ms": 1e3 * floor / gpu.dram,
        "ours": ours, "torchvision": theirs, "torchvision copies ms": 1e3 * copied / gpu.dram,
        "ours ms": 1e3 * sum(c.total for c in ours), "torchvision ms": 1e3 * sum(c.total for c in theirs),
    }  # fmt: skip


def lines(r: dict[str, Any], blocks: bool) -> Iterator[str]:
    """A result as rows of the table."""
    yield f"{r['workload']}, {r['dtype']}, {r['layout']}: {r['pass']}"
    for who in ("ours", "torchvision"):
        for c in r[who]:
            bounds = sorted(c.seconds.items(), key=lambda item: -item[1])[:4]
            yield (
                f"  {who:11} {c.name:17} {1e3 * c.total:7.3f} ms {c.instructions / 1e6:8.2f} M "
                f"{c.per_program:8.0f} {c.lines_per_load:6.1f} {c.sectors_per_load:6.1f} "
                f"{c.l2_bytes / 1e6:8.1f} {c.resident:3d}  "
                + ", ".join(f"{name} {1e3 * s:.3f}" for name, s in bounds)
                + f"; longest {1e3 * c.longest:.3f}, drain {1e3 * c.drain:.3f}"
            )
            if blocks and all(c.files):
                yield "    " + ", ".join(f"{file} {count:.0f}" for file, count in c.files.items())
            for b in c.blocks if blocks else ():
                what = f"{b.instructions:4d} instructions, {b.cycles:6.0f} cycles alone, {b.source}"
                yield f"    {b.visits:8.2f} visits of {what}"
    theirs = f", torchvision {r['torchvision ms']:.3f} and copies {r['torchvision copies ms']:.3f}"
    yield f"  = ours {r['ours ms']:.3f} ms{theirs if r['torchvision'] else ''}, floor {r['floor ms']:.3f}"


def written(r: dict[str, Any]) -> dict[str, Any]:
    """A result as JSON: launches with all bounds and blocks, by name."""
    launched = {
        who: [{**c._asdict(), "blocks": [b._asdict() for b in c.blocks]} for c in r[who]]
        for who in ("ours", "torchvision")
    }
    return {**r, **launched}


def compared(results: list[dict[str, Any]], ms: dict[str, float]) -> Iterator[str]:
    """The passes of a workload beside what was measured: our kernels alone, and torchvision's module."""
    pairs = [("ours", "kernels alone", sum(r["ours ms"] for r in results))]
    if all(r["torchvision"] for r in results):
        theirs = sum(r["torchvision ms"] + r["torchvision copies ms"] for r in results)
        pairs.append(("torchvision", "torchvision", theirs))
    for who, name, model in pairs:
        yield f"  {who}: predicted {model:.3f} ms, measured {ms[name]:.3f}, ratio {model / ms[name]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", help="only those with this in their name", default="")
    parser.add_argument("--gpu", choices=cost.GPUS, default="h100")
    parser.add_argument("--ours", help="leave torchvision out", action="store_true")
    parser.add_argument("--blocks", help="how often each basic block runs", action="store_true")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--measured", help="file that benchmarks/gpu.py wrote, to compare with")
    arguments = parser.parse_args()
    rows: list[Any] = [{} for _ in WORKLOADS]
    workloads = WORKLOADS
    if arguments.measured:
        with open(arguments.measured) as file:
            rows = json.load(file)["rows"]
        workloads = [measured(row) for row in rows]
    print(
        f"  {'who':11} {'launch':17} {'predicted':>10} {'warp instr.':>10} {'per warp':>8} {'lines':>6} "
        f"{'sectors':>6} {'L2 MB':>8} {'warps':>3}  bounds, ms"
    )
    results = []
    for w, row in zip(workloads, rows, strict=True):
        if arguments.workload not in str(w):
            continue
        passes = [result(w, what, cost.GPUS[arguments.gpu], not arguments.ours) for what in w.passes]
        for r in passes:
            print(*lines(r, arguments.blocks), sep="\n", flush=True)
        if row:
            print(*compared(passes, row["ms"]), sep="\n", flush=True)
        results += passes
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([written(r) for r in results], file, indent=2)


if __name__ == "__main__":
    main()
