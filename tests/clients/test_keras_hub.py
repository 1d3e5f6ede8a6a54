"""keras-hub: `roi_align` of its SAM 3, torch backend; maps lie channels last, bfloat16 becomes float32."""

import os

import pytest
import torch
from both import assert_same, loss_of

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras_hub")
import keras
from keras_hub.src.models.sam3.roi_align import roi_align

if keras.backend.backend() != "torch":
    pytest.skip("another backend than torch does not call torchvision", allow_module_level=True)


def pool(dtype=torch.float32):
    """A step of the pooling alone, of the size of SAM 3: one image of 1008 x 1008, eight boxes."""
    torch.manual_seed(0)
    maps = torch.randn(1, 72, 72, 256).to(dtype).requires_grad_()
    corner, side = torch.rand(8, 2) * 40, torch.rand(8, 2) * 30
    rois = torch.cat((torch.zeros(8, 1), corner, corner + side), 1).to(dtype)

    def step():
        pooled = roi_align(maps, rois, (7, 7), height=72, width=72, hidden_dim=256)
        return {"pooled": [pooled], "gradients": [*torch.autograd.grad(loss_of([pooled]), maps)]}

    return step


MEASURED = {"keras-hub `roi_align`": pool}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients(dtype):
    assert_same(pool(dtype))
