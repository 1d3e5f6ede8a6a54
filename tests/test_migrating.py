"""The code of docs/migrating.md against the rules of detectron2 and mmdetection, transcribed anew.

Neither package can be had as a wheel. detectron2 calls torchvision's kernel, and mmcv's computes the same
values, so torchvision's pools here for both, level by level.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.ops
from test_exact import weights

import roialign
from roialign.testing import pyramid, random_boxes

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
STRIDES = [4, 8, 16, 32]
BOUNDARIES = [112.0, 224.0, 448.0]


@pytest.fixture(scope="module")
def page():
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(block, namespace)
    return namespace


def detectron2_rule(boxes, strides, size, level, eps=1e-8):
    """`clamp(floor(level + log2(sqrt(area) / size + eps)), low, high) - low`."""
    low, high = int(math.log2(strides[0])), int(math.log2(strides[-1]))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return torch.clamp(torch.floor(level + torch.log2(area.sqrt() / size + eps)), low, high).long() - low


def mmdetection_rule(boxes, strides, finest_scale):
    """`clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, L - 1)`."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return torch.clamp(torch.floor(torch.log2(area.sqrt() / finest_scale + 1e-6)), 0, len(strides) - 1).long()


def boundary_boxes(corner=0.0):
    """Squares on each boundary and on the 40 float32 numbers to either side."""
    sides = torch.tensor(BOUNDARIES).view(torch.int32)[:, None] + torch.arange(-40, 41, dtype=torch.int32)
    sides = sides.flatten().view(torch.float32)[:, None]
    return torch.cat((torch.full((len(sides), 2), corner), (sides + corner).expand(-1, 2)), 1)


def any_boxes():
    return torch.cat((boundary_boxes(), boundary_boxes(3.0), *random_boxes([5000], image_size=(800, 1344))))


@pytest.mark.parametrize("strides", [STRIDES, [2, 4, 8, 16, 32, 64], [8, 16], [16]], ids=str)
@pytest.mark.parametrize(("size", "level"), [(224, 4), (100, 3)])
def test_levels_are_detectron2s(page, strides, size, level):
    boxes = any_boxes()
    map_levels = page["detectron2_levels"]([1 / s for s in strides], size, level)
    expected = detectron2_rule(boxes, strides, size, level)
    assert torch.equal(map_levels([boxes]), expected)
    assert torch.equal(map_levels([boxes[:100], boxes[100:100], boxes[100:]]), expected)


@pytest.mark.parametrize("strides", [STRIDES, [8, 16, 32], [4, 16, 64, 128, 256]], ids=str)
@pytest.mark.parametrize("finest_scale", [56, 40])
def test_levels_are_mmdetections(page, strides, finest_scale):
    boxes = any_boxes()
    map_levels = page["mmdetection_levels"](len(strides), finest_scale)
    assert torch.equal(map_levels([boxes]), mmdetection_rule(boxes, strides, finest_scale))


@pytest.mark.parametrize("which", ["pooler", "extractor"])
def test_values(page, which):
    features = pyramid(STRIDES, image_size=(640, 800), images=2, channels=2, dtype=torch.float64)
    boxes = random_boxes([60, 40], image_size=(640, 800))
    rows = torch.cat(boxes)
    levels = (
        detectron2_rule(rows, STRIDES, 224, 4) if which == "pooler" else mmdetection_rule(rows, STRIDES, 56)
    )
    rois = torch.cat((torch.tensor([0.0] * 60 + [1.0] * 40)[:, None], rows), 1).double()
    expected = torch.empty(100, 2, 7, 7, dtype=torch.float64)
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        on = levels == level
        assert on.any()
        expected[on] = torchvision.ops.roi_align(feature, rois[on], 7, 1 / stride, 0, True)
    actual = page[which](dict(zip(["p2", "p3", "p4", "p5"], features, strict=True)), boxes)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rule", ["detectron2", "old detectron2", "mmdetection"])
def test_rules_differ_from_torchvisions_only_just_below_a_boundary(rule):
    boxes = boundary_boxes()
    ours = roialign.LevelMapper(2, 5)([boxes])
    theirs = {
        "detectron2": detectron2_rule(boxes, STRIDES, 224, 4),
        "old detectron2": detectron2_rule(boxes, STRIDES, 224, 4, eps=np.finfo(float).eps),
        "mmdetection": mmdetection_rule(boxes, STRIDES, 56),
    }[rule]
    ulps = torch.arange(-40, 41).repeat(3)[ours != theirs]
    assert len(ulps) > 0
    assert ((ulps < 0) & (ulps > -15)).all()
    assert (ours - theirs)[ours != theirs].eq(1).all()  # ours takes the coarser map


@pytest.mark.parametrize("finest", [4, 8])
def test_finest_scale_as_canonical_scale(finest):
    """What the table says of `finest_scale`, away from the boundaries."""
    strides = [finest * 2**i for i in range(4)]
    boxes = random_boxes([5000], image_size=(800, 1344), seed=2)
    level = int(math.log2(finest))
    mapper = roialign.LevelMapper(level, level + 3, canonical_scale=56, canonical_level=level)
    assert torch.equal(mapper(boxes), mmdetection_rule(boxes[0], strides, 56))


def test_boxes_inside_out_and_not_finite_have_a_level(page):
    boxes = [
        torch.tensor(
            [[40.0, 8.0, 8.0, 30.0], [8.0, 8.0, 8.0, 8.0], [torch.nan, 0, 9, 9], [0, 0, torch.inf, 9]]
        )
    ]
    for map_levels in (page["pooler"].map_levels, page["extractor"].map_levels):
        assert map_levels(boxes).tolist() == [0, 0, 0, 3]


def test_gradients_of_boxes_are_those_of_precise_roi_pooling(page):
    """As an end of a bin moves: what lies there less the mean, over the length. Ends move with the box."""
    rois, surface, bins = page["rois"], page["features"][0].double(), page["pooled_height"]
    corners = (rois.detach().double()[0, 1:] * page["spatial_scale"]).tolist()
    ends_and_means = []
    for axis, extent in enumerate(surface.shape[:0:-1]):
        low, high = corners[axis], corners[axis + 2]
        ends = low + (high - low) * torch.arange(bins + 1, dtype=torch.float64) / bins
        hats = (1 - (ends[:, None] - torch.arange(extent)).abs()).clamp(min=0)
        ends_and_means.append((hats, weights(low + 0.5, high + 0.5, bins, extent, True), (high - low) / bins))
    (x_hats, x_means, width), (y_hats, y_means, height) = ends_and_means
    mean = torch.einsum("py,cyx,qx->cpq", y_means, surface, x_means)
    torch.testing.assert_close(page["pooled"][0].double(), mean, rtol=1e-4, atol=1e-5)
    at_x = torch.einsum("py,cyx,qx->cpq", y_means, surface, x_hats)
    at_y = torch.einsum("py,cyx,qx->cqp", y_hats, surface, x_means)
    share = torch.arange(bins + 1, dtype=torch.float64) / bins
    expected = []
    for there, size, flat in ((at_x, width, mean), (at_y, height, mean.mT)):
        start, end = (flat - there[..., :-1]) / size, (there[..., 1:] - flat) / size
        of_low = start * (1 - share[:-1]) + end * (1 - share[1:])
        of_high = start * share[:-1] + end * share[1:]
        expected.append([(2 * flat * of).sum() * page["spatial_scale"] for of in (of_low, of_high)])
    (x1, x2), (y1, y2) = expected
    torch.testing.assert_close(rois.grad[0, 1:].double(), torch.stack((x1, y1, x2, y2)), rtol=1e-4, atol=1e-4)
