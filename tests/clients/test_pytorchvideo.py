"""pytorchvideo: the ResNet with an RoI head that recognises what each person of a clip does."""

import pytest
import torch
from both import assert_same, gradients_of, loss_of

pytest.importorskip("pytorchvideo")
from pytorchvideo.models.resnet import create_resnet_with_roi_head


def clip():
    """A step with a clip of four frames and five boxes."""
    torch.manual_seed(0)
    model = create_resnet_with_roi_head().eval()
    frames = torch.rand(1, 3, 4, 224, 224, requires_grad=True)
    corner, side = torch.rand(5, 2) * 100, torch.rand(5, 2) * 120
    boxes = torch.cat((torch.zeros(5, 1), corner, corner + side), 1)

    def step():
        model.zero_grad()
        frames.grad = None
        scores = model(frames, boxes)
        loss_of([scores]).backward()
        return {"scores": [scores], "frames": [frames.grad], "gradients": gradients_of(model)}

    return step


MEASURED = {"pytorchvideo `create_resnet_with_roi_head`": clip}


def test_outputs_and_gradients():
    assert_same(clip())
