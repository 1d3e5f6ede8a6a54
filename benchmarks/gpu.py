"""Verify and measure the GPU engine beside torchvision: `PYTHONPATH=src python benchmarks/gpu.py`.

It first checks what the engine promises - torchvision's values and gradients, the same bits 20 times,
CUDA graphs, torch.compile, no synchronisation - and then measures with CUDA events. Times are medians
of interleaved runs. `--json FILE` writes them down; `--verify` stops after the checks. `--once` does neither:
it runs every kernel once, as in `ncu --csv python benchmarks/gpu.py --once`, for counters to be held against
`python -m benchmarks.gpu_model --blocks`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

import roialign
from roialign import ops
from roialign.bench.workloads import make_boxes
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.schema import Pooling
from roialign.testing import assert_within_budget, pyramid

STRIDES = [4, 8, 16, 32]
SCALES = [1 / s for s in STRIDES]
SIZE = (800, 1344)
NAMES = [str(i) for i in range(len(STRIDES))]
CHANNELS = 256
ROUNDS = 30

Run = Callable[[], Any]


def inputs(counts: Sequence[int], dtype: torch.dtype, layout: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Feature maps, and boxes as a proposal network gives them."""
    features = pyramid(
        STRIDES, image_size=SIZE, images=len(counts), channels=CHANNELS, dtype=dtype, layout=layout
    )
    boxes = [b.cuda() for b in make_boxes(sum(counts), SIZE).split(list(counts))]
    return {name: f.cuda() for name, f in zip(NAMES, features, strict=True)}, boxes


def poolers(output_size: int) -> tuple[Any, Any]:
    return (
        roialign.MultiScaleRoIAlign(NAMES, output_size, 2),
        torchvision.ops.MultiScaleRoIAlign(NAMES, output_size, 2),
    )


def step(pool: Any, x: dict[str, Tensor], boxes: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """The result and the gradient of every map."""
    leaves = {name: f.detach().requires_grad_() for name, f in x.items()}
    out = pool(leaves, boxes, [SIZE] * len(boxes))
    grads = torch.autograd.grad(out, list(leaves.values()), out.detach() if weight is None else weight)
    return [out.detach(), *grads]


def verify() -> None:
    ours, theirs = poolers(7)
    for layout in ("contiguous", "channels_last"):
        x, boxes = inputs([60, 40], torch.float32, layout)
        weight = torch.randn(100, CHANNELS, 7, 7, device="cuda")
        exact = [b.double() for b in boxes]
        truth = step(theirs, {n: f.double() for n, f in x.items()}, exact, weight.double())
        same = step(theirs, x, boxes, weight)
        first = step(ours, x, boxes, weight)
        for a, t, r in zip(first, truth, same, strict=True):
            assert_within_budget(a, truth=t, reference=r)
        print(f"{layout}: within the error budget of torchvision")
        for _ in range(20):
            again = step(ours, x, boxes, weight)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        print(f"{layout}: the same bits 20 times, forward and backward")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(ours, x, boxes, weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        print(f"{layout}: no synchronisation")
        check_graph(ours, x, boxes, weight, first)
        print(f"{layout}: replayed from a CUDA graph")
        compiled = torch.compile(ours, fullgraph=True)
        for a, b in zip(step(compiled, x, boxes, weight), first, strict=True):
            torch.testing.assert_close(a, b)
        print(f"{layout}: compiled")


def check_graph(pool: Any, x: dict[str, Tensor], boxes: list[Tensor], weight: Tensor, expected: list[Tensor]):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(pool, x, boxes, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(pool, x, boxes, weight)
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def milliseconds(runs: dict[str, Run]) -> dict[str, float]:
    """Medians of interleaved runs, each from event to event. The caches are as the last run left them."""
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def replayed(run: Run) -> Run:
    """The same from a CUDA graph: the kernels alone, without the time the host takes to launch them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes per millisecond, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds({"copy": lambda: target.copy_(source)})["copy"]


def touched_bytes(x: dict[str, Tensor], boxes: list[Tensor]) -> int:
    """Bytes of the cells that pooling reads: those where the gradient of all ones is not zero."""
    ones = {name: f[:, :1].float() for name, f in x.items()}
    pool, _ = poolers(7)
    leaves = {name: f.detach().requires_grad_() for name, f in ones.items()}
    out = pool(leaves, boxes, [SIZE] * len(boxes))
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    item = next(iter(x.values())).element_size()
    return sum(int((g != 0).sum()) for g in grads) * CHANNELS * item


def workload(
    name: str, counts: Sequence[int], size: int, dtype: torch.dtype, layout: str, training: bool
) -> dict[str, Any]:
    x, boxes = inputs(counts, dtype, layout)
    # torchvision wants boxes and features of one dtype.
    their_boxes = [b.to(dtype) for b in boxes]
    ours, theirs = poolers(size)
    shapes = [SIZE] * len(counts)
    rois = boxes_to_rois(boxes, x["0"], torch.float32)
    features = list(x.values())
    pooling = Pooling((size, size), SCALES, 2, False, *staircase(SCALES, 224, 4, torch.float32))

    def kernels() -> None:
        out = torch.ops.roialign.multiscale_roi_align(features, rois, None, *pooling)
        if training:
            grads = [torch.empty_like(f) for f in features]
            ops.engine("cuda").backward(grads, out, rois, None, pooling)

    if training:
        runs: dict[str, Run] = {
            "roialign": lambda: step(ours, x, boxes),
            "torchvision": lambda: step(theirs, x, their_boxes),
        }
    else:
        runs = {
            "roialign": lambda: ours(x, boxes, shapes),
            "torchvision": lambda: theirs(x, their_boxes, shapes),
        }
    with torch.set_grad_enabled(training):
        runs["kernels alone"] = replayed(kernels)
        times = milliseconds(runs)
    pooled = sum(counts) * CHANNELS * size * size * features[0].element_size()
    moved = touched_bytes(x, boxes) + pooled
    if training:
        moved += pooled + sum(f.numel() * f.element_size() for f in features)
    kind = str(dtype).removeprefix("torch.")
    return {"workload": name, "dtype": kind, "layout": layout, "bytes": moved, "ms": times}


def measure() -> list[dict[str, Any]]:
    table = [("box head", [1000], 7, False), ("mask head", [100], 14, False)]
    table += [("training 2 x 512", [512, 512], 7, True)]
    table += [(f"K = {k}", [k], 7, False) for k in (1, 16, 256, 4096, 16384)]
    rows = []
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e6:.0f} GB/s")
    print(
        f"{'workload':17} {'dtype':9} {'layout':14} {'ms':>8} {'alone':>8} {'of copy':>8} {'torchvision':>12}"
    )
    for name, counts, size, training in table:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                row = workload(name, counts, size, dtype, layout, training)
                ms = row["ms"]
                row["of copy bandwidth"] = row["bytes"] / bandwidth / ms["kernels alone"]
                row["faster"] = ms["torchvision"] / ms["roialign"]
                rows.append(row)
                line = f"{name:17} {row['dtype']:9} {layout:14} {ms['roialign']:8.3f}"
                line += f" {ms['kernels alone']:8.3f} {row['of copy bandwidth']:8.0%}"
                print(f"{line} {ms['torchvision']:8.3f} {row['faster']:4.1f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--verify", action="store_true", help="check, but do not measure")
    parser.add_argument("--once", help="run the kernels, for a profiler", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    if arguments.once:
        for layout in ("contiguous", "channels_last"):
            x, boxes = inputs([512, 512], torch.float32, layout)
            step(poolers(7)[0], x, boxes)
        torch.cuda.synchronize()
        return
    verify()
    if arguments.verify:
        return
    rows = measure()
    if arguments.json:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        report = {"gpu": torch.cuda.get_device_name(), **versions, "rows": rows}
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
