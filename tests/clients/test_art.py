"""adversarial-robustness-toolbox: what an attack asks of a detector, predictions and the loss's gradient."""

import numpy as np
import pytest
import torch
from both import assert_same
from torchvision.models.detection import fasterrcnn_resnet50_fpn

pytest.importorskip("art")
from art.estimators.object_detection import PyTorchFasterRCNN

SIDE = 224


def attack():
    """A step of an attack on one image with two objects."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=SIDE, max_size=SIDE, box_score_thresh=0.0
    )
    shape = (3, SIDE, SIDE)
    detector = PyTorchFasterRCNN(model, input_shape=shape, clip_values=(0, 1), device_type="cpu")
    image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    boxes = np.array([[10, 20, 110, 140], [60, 50, 200, 220]], dtype=np.float32)
    labels = [{"boxes": boxes, "labels": np.array([1, 3])}]

    def step():
        torch.manual_seed(0)  # which proposals are sampled
        (found,) = detector.predict(image)
        gradient = detector.loss_gradient(image, labels)
        return {
            "boxes": [torch.from_numpy(found["boxes"])],
            "scores": [torch.from_numpy(found["scores"])],
            "gradients": [torch.from_numpy(gradient)],
        }

    return step


MEASURED = {"adversarial-robustness-toolbox `PyTorchFasterRCNN`": attack}


def test_predictions_and_gradients():
    assert_same(attack())
