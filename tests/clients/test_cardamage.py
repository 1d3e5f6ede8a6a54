"""cardamage: a Mask R-CNN of one map with dilated stages, aligned and adaptive; it only infers."""

import pytest
import torch
from both import assert_same, gradients_of, loss_of

pytest.importorskip("cardamage")
from cardamage import CarDamageModel


def inference():
    """Boxes, scores and masks of one image, and the gradients of masks."""
    torch.manual_seed(0)
    model = CarDamageModel(backbone_depth=50, score_thresh=0.0, rpn_post_nms_topk=300).eval()
    image = torch.randn(1, 3, 256, 320)

    def step():
        model.zero_grad()
        (found,) = model(image)
        loss_of([found["masks"]]).backward()
        results = {name: [found[name].detach()] for name in ("boxes", "scores", "masks")}
        return {**results, "gradients": gradients_of(model)}

    return step


MEASURED = {"cardamage `CarDamageModel`": inference}


def test_outputs_and_gradients():
    assert_same(inference())
