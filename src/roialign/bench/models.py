"""Whole detectors of torchvision, before and after `convert_poolers`."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import convert_poolers
from .timing import Effort, milliseconds, ratio

DETECTORS = {
    "Faster R-CNN, MobileNetV3": "fasterrcnn_mobilenet_v3_large_fpn",
    "Faster R-CNN, ResNet-50": "fasterrcnn_resnet50_fpn",
    "Mask R-CNN, ResNet-50": "maskrcnn_resnet50_fpn",
}
CANDIDATES = 1000  # detections that pass the threshold; a trained detector's are of that order
OBJECTS = 10  # in the image, for training


class Size(NamedTuple):
    """What the detectors see."""

    image: tuple[int, int]
    shorter: int  # side that they scale images to


FULL = Size((800, 1344), 800)
QUICK = Size((96, 128), 96)


def measure_models(effort: Effort, quick: bool) -> list[dict[str, Any]]:
    """Time inference and a training step of each detector, on one image, with random weights."""
    return [row for name in DETECTORS for row in _measure(name, effort, QUICK if quick else FULL)]


def _measure(name: str, effort: Effort, size: Size) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    image = torch.rand(3, *size.image)
    before = make_detector(DETECTORS[name], image, size)
    detectors = {"torchvision": before, "roialign": convert_poolers(copy.deepcopy(before))}
    for what, run in (("inference", infer), ("training step", make_step(_target(size)))):
        calls = {pooler: functools.partial(run, model, image) for pooler, model in detectors.items()}
        agrees = _agree(*(call() for call in calls.values()))
        ms = milliseconds(calls, effort)
        yield {
            "name": name,
            "what": what,
            "ms": ms,
            "ratio": ratio(ms["torchvision"], ms["roialign"]),
            "agrees": agrees,
        }


def make_detector(name: str, image: Tensor, size: Size) -> Any:
    """A detector with random weights that does as much as a trained one.

    Batch norms are given the statistics of the image, so that maps are neither zero nor infinite, and the
    threshold of scores lets some detections pass.
    """
    from torchvision.models import get_model

    model = get_model(name, weights=None, weights_backbone=None, min_size=size.shorter, max_size=1344)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(model.transform([image])[0].tensors)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    scores: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda _m, _i, out: scores.append(out[0]))
    infer(model, image)
    hook.remove()
    found = scores[0].softmax(1)[:, 1:].flatten()
    model.roi_heads.score_thresh = float(found.topk(min(CANDIDATES, len(found))).values[-1])
    return model


def infer(model: Any, image: Tensor) -> list[Tensor]:
    """Detections of one image."""
    model.eval()
    with torch.inference_mode():
        detections: dict[str, Tensor] = model([image])[0]
    return list(detections.values())


def make_step(target: dict[str, Tensor]) -> Callable[[Any, Tensor], list[Tensor]]:
    """A training step that draws the same samples each time and, its rate being zero, changes nothing."""

    def step(model: Any, image: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        optimiser.zero_grad()
        losses: dict[str, Tensor] = model([image], [dict(target)])
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        optimiser.step()
        return [loss.detach() for loss in losses.values()]

    return step


def _target(size: Size) -> dict[str, Tensor]:
    """Some objects: boxes, labels, and masks, which Faster R-CNN passes over."""
    height, width = size.image
    extent = torch.tensor([width, height])
    sides = (0.1 + 0.4 * torch.rand(OBJECTS, 2)) * extent
    corners = torch.rand(OBJECTS, 2) * (extent - sides)
    boxes = torch.cat((corners, corners + sides), 1).round()
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.arange(1, OBJECTS + 1), "masks": masks}


def _agree(theirs: list[Tensor], ours: list[Tensor]) -> bool:
    """Whether detections or losses are the same but for rounding."""
    return all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)
        for a, b in zip(theirs, ours, strict=True)
    )
