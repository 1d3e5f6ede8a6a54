"""Errors against a float64 truth: ours, the reference's and torchvision's; the table of docs/accuracy.md.

Run: python benchmarks/error_budget.py
"""

import contextlib

import torch
import torchvision.ops

from roialign import multiscale_roi_align, ops
from roialign.testing import pyramid, random_boxes

STRIDES = (4, 8, 16, 32)
SCALES = [1 / s for s in STRIDES]
SIZE = (800, 1344)
NAMES = [str(i) for i in range(len(STRIDES))]


def errors(dtype: torch.dtype, sampling_ratio: int) -> dict[str, tuple[float, float]]:
    """Largest error of values and of gradients, relative to the largest value, by implementation."""
    maps = pyramid(STRIDES, image_size=SIZE, channels=16, dtype=dtype)
    boxes = [b.clamp(min=0, max=SIZE[1]) for b in random_boxes([300], image_size=SIZE)]
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 16, 7, 7, generator=generator).to(dtype)

    def ours(maps, boxes):
        return multiscale_roi_align(maps, boxes, 7, SCALES, sampling_ratio)

    def reference(maps, boxes):
        with ops.use_reference():
            return ours(maps, boxes)

    def torchvisions(maps, boxes):
        pooler = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, sampling_ratio)
        return pooler(dict(zip(NAMES, maps, strict=True)), [b.to(maps[0].dtype) for b in boxes], [SIZE])

    def run(pool, dtype):
        leaves = [m.to(dtype).requires_grad_() for m in maps]
        pooled = pool(leaves, boxes)
        with ops.use_reference() if pool is reference else contextlib.nullcontext():
            grads = torch.autograd.grad(pooled, leaves, weight.to(dtype))
        return [pooled.detach(), *grads]

    truth = run(reference, torch.float64)
    found = {}
    for name, pool in {"roialign": ours, "reference": reference, "torchvision": torchvisions}.items():
        try:
            got = run(pool, dtype)
        except RuntimeError:  # bfloat16
            continue
        relative = [
            float((g.double() - t).abs().max() / t.abs().max()) for g, t in zip(got, truth, strict=True)
        ]
        found[name] = relative[0], max(relative[1:])
    return found


def main() -> None:
    """Print the table."""
    print("| features | sampling | | roialign | reference | torchvision |\n|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for sampling_ratio in (2, 0):
            found = errors(dtype, sampling_ratio)
            for i, what in enumerate(("values", "gradients")):
                cells = [
                    f"{found[n][i]:.1e}" if n in found else "cannot"
                    for n in ("roialign", "reference", "torchvision")
                ]
                sampling = f"{sampling_ratio} x {sampling_ratio}" if sampling_ratio else "adaptive"
                print(f"| {str(dtype)[6:]} | {sampling} | {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
