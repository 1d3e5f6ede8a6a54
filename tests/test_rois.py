"""Boxes per image -> rois."""

import pytest
import torch

from roialign.rois import boxes_to_rois, working_dtype


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.float64], torch.float64),
    ],
)
def test_working_dtype(dtypes, expected):
    assert working_dtype([torch.empty(0, dtype=dtype) for dtype in dtypes]) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize(
    ("counts", "images"),
    [([], []), ([0], []), ([2], [0, 0]), ([1, 0, 2], [0, 2, 2]), ([0, 0, 1], [2])],
    ids=str,
)
def test_rows_are_image_and_box(counts, images, dtype):
    boxes = [torch.arange(4 * n).view(n, 4).to(dtype) for n in counts]
    rois = boxes_to_rois(boxes, torch.empty(1, 1, 1, 1), torch.float32)
    assert rois.shape == (sum(counts), 5)
    assert rois.dtype == torch.float32
    assert rois[:, 0].tolist() == images
    assert rois[:, 1:].flatten().tolist() == [x for n in counts for x in range(4 * n)]


def test_image_index_is_exact_beside_bfloat16_boxes():
    """bfloat16 counts to 256: rounded to it, image 257 would read image 256."""
    boxes = [torch.ones(1, 4, dtype=torch.bfloat16)] * 300
    assert boxes_to_rois(boxes, torch.empty(1, 1, 1, 1), torch.float32)[:, 0].tolist() == list(range(300))


def test_rows_do_not_share_memory_with_boxes():
    boxes = torch.zeros(2, 4)
    boxes_to_rois([boxes], torch.empty(1, 1, 1, 1), torch.float32).fill_(1)
    assert boxes.eq(0).all()
