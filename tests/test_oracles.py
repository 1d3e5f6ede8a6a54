"""Oracles that share no code with torchvision: ONNX Runtime, grid_sample, and sums done by hand."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

import roialign
from roialign.testing import LAYOUTS, assert_within_budget, pyramid, random_boxes

pytestmark = pytest.mark.usefixtures("engine")

SIZE = (160, 192)
STRIDES = [4, 8, 16, 32]
SCALES = [1 / s for s in STRIDES]
ONNX_DTYPES = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE}


def onnx_roi_align(
    feature: Tensor,
    boxes: Tensor,
    image: Tensor,
    output_size: tuple[int, int],
    scale: float,
    ratio: int,
    aligned: bool,
) -> Tensor:
    dtype = ONNX_DTYPES[feature.dtype]
    node = helper.make_node(
        "RoiAlign",
        ["x", "rois", "image"],
        ["out"],
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=max(ratio, 0),
        spatial_scale=scale,
    )
    graph = helper.make_graph(
        [node],
        "roi_align",
        [
            helper.make_tensor_value_info("x", dtype, [None] * 4),
            helper.make_tensor_value_info("rois", dtype, [None, 4]),
            helper.make_tensor_value_info("image", TensorProto.INT64, [None]),
        ],
        [helper.make_tensor_value_info("out", dtype, [None] * 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {"x": feature.contiguous().numpy(), "rois": boxes.numpy(), "image": image.numpy()}
    return torch.from_numpy(session.run(None, inputs)[0])


def levels_by_numpy(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.numpy().T
    wanted = np.floor(4 + np.log2(np.sqrt((x2 - x1) * (y2 - y1)) / np.float32(56)) + np.float32(1e-6))
    return torch.from_numpy(np.clip(wanted, 2, 5).astype(np.int64) - 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3, -1])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (14, 2)], ids=str)
def test_onnx_runtime_level_by_level(output_size, ratio, aligned, layout):
    features = pyramid(STRIDES, image_size=SIZE, images=2, layout=layout)
    boxes = random_boxes([20, 15], image_size=SIZE)
    rows = torch.cat(boxes)
    image = torch.tensor([0] * 20 + [1] * 15)
    levels = levels_by_numpy(rows)
    results = {dtype: torch.empty(35, 4, *output_size, dtype=dtype) for dtype in ONNX_DTYPES}
    for dtype, result in results.items():
        for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
            on = levels == level
            assert on.any()
            result[on] = onnx_roi_align(
                feature.to(dtype), rows[on].to(dtype), image[on], output_size, scale, ratio, aligned
            )
    actual = roialign.multiscale_roi_align(
        features, boxes, output_size, SCALES, ratio, aligned=aligned, canonical_scale=56
    )
    assert_within_budget(actual, truth=results[torch.float64], reference=results[torch.float32])


def by_grid_sample(
    feature: Tensor, box: list[float], output_size, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign of one box, its points looked up by PyTorch's own sampler; float64."""
    points = []
    for low, high, bins in ((box[1], box[3], output_size[0]), (box[0], box[2], output_size[1])):
        start = low * scale - 0.5 * aligned
        size = high * scale - 0.5 * aligned - start
        size = size if aligned else max(size, 1.0)
        grid = ratio if ratio > 0 else int(np.ceil(size / bins))
        points.append(torch.tensor(start + (np.arange(bins * grid) + 0.5) * size / (bins * grid)))
    height, width = feature.shape[2:]
    y, x = torch.meshgrid(*points, indexing="ij")
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), 2)[None]
    values = F.grid_sample(feature, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return F.adaptive_avg_pool2d(values * inside, output_size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3, -1])
def test_grid_sample(ratio, aligned, layout):
    feature = pyramid([8], image_size=SIZE, images=2, dtype=torch.float64, layout=layout)[0]
    boxes = random_boxes([0, 15], image_size=SIZE, dtype=torch.float64, seed=1)
    actual = roialign.roi_align(feature, boxes, (3, 5), 1 / 8, ratio, aligned)
    expected = [by_grid_sample(feature[1:], box, (3, 5), 1 / 8, ratio, aligned) for box in boxes[1].tolist()]
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("aligned", "first"),
    [
        (False, 7.5),  # the first bin is centred on (1.25, 1.25): 5 * 1.25 + 1.25
        (True, 4.5),  # half a cell to the upper left
    ],
)
@pytest.mark.parametrize("ratio", [1, 2, 0])
def test_four_by_four_bins_by_hand(ratio, aligned, first, dtype):
    """A map that grows by 1 along x and 5 along y; bins of half a cell."""
    feature = torch.arange(25, dtype=dtype).view(1, 1, 5, 5)
    out = roialign.roi_align(feature, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], 4, 1.0, ratio, aligned)
    assert out[0, 0].tolist() == [[first + 2.5 * i + 0.5 * j for j in range(4)] for i in range(4)]


@pytest.mark.parametrize(
    ("box", "aligned", "expected"),
    [
        # A row of cells 1, 2, 3, 4; one bin, two points per axis.
        ([0.0, 0.0, 2.0, 1.0], False, 2.0),  # points 0.5 and 1.5: (1.5 + 2.5) / 2
        ([2.0, 0.0, 4.0, 1.0], False, 3.75),  # points 2.5 and 3.5: (3.5 + 4) / 2, the last cell repeats
        ([3.0, 0.0, 5.0, 1.0], False, 2.0),  # points 3.5 and 4.5, the latter outside: 4 / 2
        ([-2.0, 0.0, 0.0, 1.0], False, 0.5),  # points -1.5, outside, and -0.5, clamped to 0: 1 / 2
        ([1.0, 0.0, 1.0, 0.0], False, 2.5),  # no area: one cell, points 1.25 and 1.75
        ([1.0, 0.0, 3.0, 1.0], True, 2.5),  # half a cell to the left: points 1.0 and 2.0
    ],
)
def test_one_bin_by_hand(box, aligned, expected):
    feature = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    assert roialign.roi_align(feature, [torch.tensor([box])], 1, 1.0, 2, aligned).item() == expected


def test_gradient_by_hand():
    """One bin, one point at (y, x) = (0.5, 1.25): halves of the two rows, 3 : 1 of the two columns."""
    feature = torch.zeros(1, 1, 2, 4, requires_grad=True)
    out = roialign.roi_align(feature, [torch.tensor([[0.75, 0.0, 1.75, 1.0]])], 1, 1.0, 1)
    (grad,) = torch.autograd.grad(out.sum(), feature)
    assert grad[0, 0].tolist() == [[0, 0.375, 0.125, 0], [0, 0.375, 0.125, 0]]


@pytest.mark.parametrize("ratio", [1, 2, 5, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_bin_of_a_plane_is_its_value_at_the_centre(aligned, ratio):
    y, x = torch.meshgrid(torch.arange(20.0).double(), torch.arange(24.0).double(), indexing="ij")
    plane = (3 * y - 2 * x + 1)[None, None]
    box = torch.tensor([[8.3, 9.1, 41.7, 30.9]], dtype=torch.float64)
    out = roialign.roi_align(plane, [box], (4, 3), 1 / 2, ratio, aligned)
    x1, y1, x2, y2 = (box[0] / 2 - 0.5 * aligned).tolist()
    for i, j in np.ndindex(4, 3):
        centre = 3 * (y1 + (i + 0.5) * (y2 - y1) / 4) - 2 * (x1 + (j + 0.5) * (x2 - x1) / 3) + 1
        assert out[0, 0, i, j].item() == pytest.approx(centre, rel=1e-12)
