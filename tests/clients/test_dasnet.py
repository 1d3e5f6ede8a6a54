"""dasnet: a Mask R-CNN for events in distributed acoustic sensing, with masks of 42 x 42."""

import pytest
import torch
from both import assert_same, gradients_of

pytest.importorskip("dasnet")
from dasnet.model.dasnet import build_model

SIDE = 224
BOXES = [[20.0, 30.0, 120.0, 150.0], [60.0, 90.0, 200.0, 210.0]]


def training():
    """A training step on one image with two events."""
    torch.manual_seed(0)
    model = build_model(num_classes=3, pretrained_backbone=False, min_size=SIDE, max_size=SIDE).train()
    image, masks = torch.rand(3, SIDE, SIDE), torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    target = {"boxes": torch.tensor(BOXES), "labels": torch.tensor([1, 2])}
    target |= {"masks": masks.float(), "attention_masks": torch.ones(2, SIDE, SIDE)}

    def step():
        torch.manual_seed(0)  # which proposals are sampled
        model.zero_grad()
        losses = model([image], [target])
        sum(losses.values()).backward()
        return {"losses": [t.detach() for t in losses.values()], "gradients": gradients_of(model)}

    return step


MEASURED = {"dasnet `build_model`": training}


def test_losses_and_gradients():
    assert_same(training())
