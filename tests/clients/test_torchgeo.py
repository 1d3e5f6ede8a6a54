"""torchgeo: a training step of the tasks that detect objects and segment instances."""

import pytest
import torch
from both import assert_same, gradients_of

pytest.importorskip("torchgeo")
from torchgeo.trainers import InstanceSegmentationTask, ObjectDetectionTask

SIDE = 256
BOXES = [[20.0, 30.0, 120.0, 150.0], [100.0, 90.0, 220.0, 240.0], [5.0, 5.0, 40.0, 60.0]]


def batch():
    """Two images of three objects."""
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    return {
        "image": torch.rand(2, 3, SIDE, SIDE),
        "bbox_xyxy": torch.tensor([BOXES] * 2),
        "label": torch.tensor([[1, 2, 1]] * 2),
        "mask": torch.stack([masks] * 2),
    }


def training(make):
    """A training step of a task, without the optimizer's."""
    torch.manual_seed(0)
    task, samples = make(), batch()
    task.train()

    def step():
        torch.manual_seed(0)  # which proposals are sampled
        task.zero_grad()
        loss = task.training_step(samples, 0)
        loss.backward()
        return {"loss": [loss.detach()], "gradients": gradients_of(task)}

    return step


def detection():
    return training(lambda: ObjectDetectionTask(backbone="resnet18", num_classes=3, trainable_layers=5))


def segmentation():
    return training(lambda: InstanceSegmentationTask(num_classes=3))


MEASURED = {
    "torchgeo `ObjectDetectionTask`": detection,
    "torchgeo `InstanceSegmentationTask`": segmentation,
}


@pytest.mark.parametrize("task", [detection, segmentation])
def test_loss_and_gradients(task):
    assert_same(task())
