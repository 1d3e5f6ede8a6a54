"""What people gave the operator, by their public reports, and what they should have had."""

import warnings

import pytest
import torch

import roialign
from roialign import multiscale_roi_align, roi_align
from roialign.testing import random_boxes


def test_boxes_of_all_images_in_one_tensor():
    maps = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)]
    boxes = random_boxes([5, 5], image_size=(64, 64))
    together = torch.stack(boxes)
    expected = multiscale_roi_align(maps, boxes, 2, [1 / 4, 1 / 8], 2)
    assert torch.equal(multiscale_roi_align(maps, together, 2, [1 / 4, 1 / 8], 2), expected)
    assert torch.equal(multiscale_roi_align(maps, together.numpy(), 2, [1 / 4, 1 / 8], 2), expected)
    assert torch.equal(roi_align(maps[0], together, 2, 1 / 4, 2), roi_align(maps[0], boxes, 2, 1 / 4, 2))
    one = roi_align(maps[0][:1], [boxes[0]], 2, 1 / 4, 2)
    for form in (boxes[0], (boxes[0],), boxes[0].numpy(), [boxes[0].numpy()]):
        assert torch.equal(roi_align(maps[0][:1], form, 2, 1 / 4, 2), one)


def test_bounding_boxes_of_every_format():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    corners = torch.tensor([[2.0, 3.0, 6.0, 7.0]])
    size = corners[:, 2:] - corners[:, :2]
    numbers = {
        "XYXY": corners,
        "XYWH": torch.cat((corners[:, :2], size), 1),
        "CXCYWH": torch.cat((corners[:, :2] + size / 2, size), 1),
    }
    expected = roi_align(x, [corners], 1, 1.0, 2)
    assert expected.item() == 44  # torchvision takes XYWH for corners
    for name, given in numbers.items():
        boxes = tv_tensors.BoundingBoxes(given, format=name, canvas_size=(8, 8))
        pooled = roi_align(x, [boxes], 1, 1.0, 2)
        assert type(pooled) is torch.Tensor
        assert torch.equal(pooled, expected)
        assert torch.equal(multiscale_roi_align([x], [boxes], 1, [1.0], 2), expected)
    if "XYWHR" in tv_tensors.BoundingBoxFormat.__members__:
        turned = tv_tensors.BoundingBoxes(torch.ones(1, 5), format="XYWHR", canvas_size=(8, 8))
        with pytest.raises(ValueError, match="sides along the axes, got format XYWHR"):
            roi_align(x, [turned], 1, 1.0, 2)


class Indexed:
    def __init__(self, *sides):
        self.sides = sides

    def __len__(self):
        return len(self.sides)

    def __getitem__(self, i):
        return self.sides[i]


@pytest.mark.parametrize(
    "shape", [(3, 96, 128), (96, 128, 3), torch.Size((3, 96, 128)), torch.tensor([96, 128]), Indexed(96, 128)]
)
def test_sizes_of_images_as_shapes(shape):
    x = {"0": torch.rand(1, 2, 24, 32), "1": torch.rand(1, 2, 12, 16)}
    boxes = random_boxes([6], image_size=(96, 128))
    pooler = roialign.MultiScaleRoIAlign(["0", "1"], 2, 2)
    assert torch.equal(pooler(x, boxes, [shape]), pooler(x, boxes, [(96, 128)]))


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32])
def test_quantised_maps(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.quantize_per_tensor(torch.rand(2, 3, 8, 8), 0.01, 5, dtype)
        plain = torch.tensor([[0, 1.0, 2, 6, 7], [1, 0, 0, 7, 5]])
        for boxes in (plain, torch.quantize_per_tensor(plain, 1.0, 0, dtype)):
            pooled = roi_align(x, boxes, 2, 1.0, 2)
            expected = roi_align(x.dequantize(), plain, 2, 1.0, 2)
            assert (pooled.dtype, pooled.q_scale(), pooled.q_zero_point()) == (dtype, 0.01, 5)
            torch.testing.assert_close(pooled.dequantize(), expected, rtol=0, atol=0.0051)
        # In qint32 this ends the process by an illegal instruction in PyTorch 2.6.
        channels = torch.quantize_per_channel(
            torch.rand(1, 2, 4, 4), torch.ones(2), torch.zeros(2), 1, torch.quint8
        )
    with pytest.raises(TypeError, match="input must be quantised per tensor"):
        roi_align(channels, plain, 2)


def test_a_ratio_of_zero_as_a_float_is_refused():
    with pytest.raises(TypeError, match=r"sampling_ratio must be an integer, got 0\.0"):
        roi_align(torch.rand(1, 1, 4, 4), [torch.zeros(1, 4)], 2, 1.0, 0.0)
