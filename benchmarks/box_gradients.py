"""What gradients of the boxes cost: forward and backward of the box head, with them and without.

    python benchmarks/box_gradients.py

One process, by turns, medians; workloads of `python -m roialign bench`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import roialign
from roialign.bench.timing import Effort, milliseconds
from roialign.bench.workloads import FULL, STRIDES, WORKLOADS, make_boxes, make_maps


def step(maps: list[Tensor], boxes: Tensor, leaves: list[Tensor], ratio: int | str, grad: Tensor) -> None:
    scales = [1 / stride for stride in STRIDES.values()]
    with_boxes = boxes.requires_grad
    pooled = roialign.multiscale_roi_align(maps, [boxes], 7, scales, ratio, box_gradients=with_boxes)
    torch.autograd.grad(pooled, leaves, grad)


def main() -> None:
    calls: dict[str, Callable[[], None]] = {}
    for name in ("box-head", "box-head-channels-last"):
        workload = WORKLOADS[name]
        fixed = list(make_maps(workload, FULL).values())
        maps = [feature.detach().requires_grad_() for feature in fixed]
        still = make_boxes(workload.boxes, FULL.image)
        boxes = still.clone().requires_grad_()
        layout = torch.channels_last if workload.channels_last else torch.contiguous_format
        grad = torch.rand(len(boxes), FULL.channels, 7, 7).contiguous(memory_format=layout)
        for ratio in (2, "exact"):
            of_maps = partial(step, maps, still, maps, ratio, grad)
            of_both = partial(step, maps, boxes, [*maps, boxes], ratio, grad)
            of_boxes = partial(step, fixed, boxes, [boxes], ratio, grad)
            for what, call in (("maps", of_maps), ("maps and boxes", of_both), ("boxes", of_boxes)):
                calls[f"{name}, ratio {ratio}, gradients of {what}"] = call
    for name, spread in milliseconds(calls, Effort(60.0)).items():
        print(f"{name:66} {spread['median']:6.1f} ms")


if __name__ == "__main__":
    main()
