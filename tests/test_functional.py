"""Errors: each names the argument, the rule and what was received."""

import re

import pytest
import torch
from torch import Tensor

import roialign


def feature(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (2, 3, 16, 16), dtype=dtype, device=device)


BOXES = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)]


def pool(features=None, boxes=BOXES, output_size=2, scales=(1 / 4, 1 / 8), sampling_ratio=2, **options):
    features = [feature(), feature(2, 3, 8, 8)] if features is None else features
    return roialign.multiscale_roi_align(features, boxes, output_size, scales, sampling_ratio, **options)


def align(input=None, boxes=BOXES, output_size=2, **options):
    return roialign.roi_align(feature() if input is None else input, boxes, output_size, **options)


def module(
    x=None, boxes=BOXES, image_shapes=((64, 64), (64, 64)), names=("a", "b"), output_size=2, **options
):
    x = {"a": feature(), "b": feature(2, 3, 8, 8)} if x is None else x
    return roialign.MultiScaleRoIAlign(list(names), output_size, 2, **options)(x, boxes, image_shapes)


MULTISCALE = [
    # features
    (
        {"features": feature()},
        TypeError,
        "features must be a list of maps, got one tensor of shape (2, 3, 16, 16)",
    ),
    ({"features": []}, ValueError, "features must hold at least one map, got none"),
    ({"features": [feature(), "x"]}, TypeError, "features[1] must be a tensor, got str"),
    (
        {"features": [feature(), feature(dtype=torch.int64)]},
        TypeError,
        "features[1] must be float32, float64, float16 or bfloat16, got torch.int64; "
        "convert it with .float()",
    ),
    (
        {"features": [feature(dtype=torch.complex64)]},
        TypeError,
        "features[0] must be float32, float64, float16 or bfloat16, got torch.complex64",
    ),
    (
        {"features": [feature(), feature(2, 3, 8, 8).to_sparse()]},
        TypeError,
        "features[1] must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        {"features": [feature(3, 16, 16)] * 2},
        ValueError,
        "boxes[0] must have shape (L, 2) for features of shape (3, 16, 16), got (1, 4)",
    ),
    (
        {"features": [feature(), feature(2, 3, 0, 8)]},
        ValueError,
        "features[1] must have at least one cell along each axis, got (2, 3, 0, 8)",
    ),
    (
        {"features": [feature(), feature(2, 4, 8, 8)]},
        ValueError,
        "features[1] must have the images and channels of features[0], (2, 3), got (2, 4)",
    ),
    (
        {"features": [feature(), feature(1, 3, 8, 8)]},
        ValueError,
        "features[1] must have the images and channels of features[0], (2, 3), got (1, 3)",
    ),
    (
        {"features": [feature(), feature(2, 3, 8, 8, device="meta")]},
        ValueError,
        "features[1] must be on the device of features[0], cpu, got meta",
    ),
    # boxes
    (
        {"boxes": BOXES[0]},
        ValueError,
        "boxes must be a list with a tensor (L, 4) per image, or one tensor (N, L, 4), "
        f"got one of shape {tuple(BOXES[0].shape)} for 2 images",
    ),
    ({"boxes": {0: BOXES[0]}}, TypeError, "boxes must be a list with a tensor (L, 4) per image, got dict"),
    ({"boxes": [[0, 0, 8, 8]]}, TypeError, "boxes[0] must be a tensor, got list"),
    ({"boxes": [BOXES[0], torch.zeros(3, 5)]}, ValueError, "boxes[1] must have shape (L, 4), got (3, 5)"),
    ({"boxes": [torch.zeros(0)]}, ValueError, "boxes[0] must have shape (L, 4), got (0,)"),
    ({"boxes": [torch.zeros(4)]}, ValueError, "boxes[0] must have shape (L, 4), got (4,)"),
    (
        {"boxes": [torch.zeros(1, 4, dtype=torch.bool)]},
        TypeError,
        "boxes[0] must hold real numbers, got torch.bool",
    ),
    (
        {"boxes": [torch.zeros(1, 4, dtype=torch.complex64)]},
        TypeError,
        "boxes[0] must hold real numbers, got torch.complex64",
    ),
    (
        {"boxes": [torch.zeros(1, 4, device="meta")]},
        ValueError,
        "boxes[0] must be on the device of the maps, cpu, got meta",
    ),
    ({"boxes": BOXES * 2}, ValueError, "boxes must hold at most one tensor per image, got 4 for 2 images"),
    # output_size
    ({"output_size": 0}, ValueError, "output_size must be at least 1, got 0"),
    ({"output_size": (7, -1)}, ValueError, "output_size must be at least 1, got (7, -1)"),
    ({"output_size": (7, 7, 7)}, ValueError, "output_size must be one integer or two, got (7, 7, 7)"),
    ({"output_size": []}, ValueError, "output_size must be one integer or two, got []"),
    ({"output_size": 7.0}, TypeError, "output_size must be made of integers, got 7.0"),
    ({"output_size": (7, 7.5)}, TypeError, "output_size must be made of integers, got (7, 7.5)"),
    ({"output_size": "7"}, (TypeError, ValueError), "output_size must be "),
    ({"output_size": True}, TypeError, "output_size must be made of integers, got True"),
    ({"output_size": None}, TypeError, "output_size must be made of integers, got None"),
    # sampling_ratio, aligned
    ({"sampling_ratio": None}, TypeError, "sampling_ratio must be an integer, got None"),
    ({"sampling_ratio": (2, 2)}, TypeError, "sampling_ratio must be an integer, got (2, 2)"),
    ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio must be an integer, got 2.0"),
    ({"aligned": None}, TypeError, "aligned must be True or False, got None"),
    ({"aligned": "yes"}, TypeError, "aligned must be True or False, got the string 'yes'"),
    # scales
    ({"scales": 0.25}, TypeError, "scales must be a list with a number per map, got 0.25"),
    ({"scales": {0: 0.25}}, TypeError, "scales must be a list with a number per map, got dict"),
    ({"scales": ["1/4", "1/8"]}, TypeError, "each of scales must be a number, got the string '1/4'"),
    ({"scales": [1 / 4]}, ValueError, "scales must hold one number per map, got 1 for 2 maps"),
    ({"scales": [0.25, 0.0]}, ValueError, "each of scales must be positive and finite, got 0.0"),
    ({"scales": [0.25, -1]}, ValueError, "each of scales must be positive and finite, got -1.0"),
    ({"scales": [0.25, float("nan")]}, ValueError, "each of scales must be positive and finite, got nan"),
    ({"scales": [float("inf"), 1]}, ValueError, "each of scales must be positive and finite, got inf"),
    # canonical_scale
    ({"canonical_scale": 0}, ValueError, "canonical_scale must be positive and finite, got 0.0"),
    ({"canonical_scale": float("nan")}, ValueError, "canonical_scale must be positive and finite, got nan"),
    ({"canonical_scale": float("inf")}, ValueError, "canonical_scale must be positive and finite, got inf"),
    # canonical_level
    ({"canonical_level": float("nan")}, ValueError, "canonical_level must be finite, got nan"),
    ({"canonical_level": float("inf")}, ValueError, "canonical_level must be finite, got inf"),
    ({"canonical_level": "4"}, TypeError, "canonical_level must be a number, got the string '4'"),
    # levels
    ({"levels": [0]}, TypeError, "levels must be a tensor of integers, got list"),
    ({"levels": torch.zeros(1)}, TypeError, "levels must be a tensor of integers, got torch.float32"),
    (
        {"levels": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "levels must have shape (1,), one per box, got (2,)",
    ),
    (
        {"levels": torch.zeros(1, 1, dtype=torch.int64)},
        ValueError,
        "levels must have shape (1,), one per box, got (1, 1)",
    ),
    (
        {"levels": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "levels must be on the device of the boxes, cpu, got meta",
    ),
    ({"levels": torch.tensor([2])}, ValueError, "levels[0] must have its level in [0, 2), got 2"),
    ({"levels": torch.tensor([-1])}, ValueError, "levels[0] must have its level in [0, 2), got -1"),
]

SINGLE = [
    ({"input": [feature()]}, TypeError, "input must be a tensor, got list"),
    (
        {"input": feature(3, 16, 16)},
        ValueError,
        "boxes[0] must have shape (L, 2) for an input of shape (3, 16, 16), got (1, 4)",
    ),
    (
        {"input": feature(dtype=torch.int32)},
        TypeError,
        "input must be float32, float64, float16 or bfloat16, got torch.int32; convert it with .float()",
    ),
    ({"boxes": torch.zeros(3, 6)}, ValueError, "boxes must have shape (K, 5), got (3, 6)"),
    (
        {"boxes": torch.zeros(3, 4)},
        ValueError,
        "boxes must be a list with a tensor (L, 4) per image, or one tensor (N, L, 4), "
        "got one of shape (3, 4) for 2 images",
    ),
    ({"boxes": [torch.zeros(3, 5)]}, ValueError, "boxes[0] must have shape (L, 4), got (3, 5)"),
    ({"boxes": None}, TypeError, "boxes must be a list with a tensor (L, 4) per image, got None"),
    (
        {"boxes": torch.tensor([[2.0, 0, 0, 8, 8]])},
        ValueError,
        "boxes[0] must have its image index in [0, 2), got 2",
    ),
    ({"boxes": BOXES * 2}, ValueError, "boxes must hold at most one tensor per image, got 4 for 2 images"),
    ({"spatial_scale": 0}, ValueError, "spatial_scale must be positive and finite, got 0.0"),
    (
        {"spatial_scale": (0.25, 1, 1)},
        ValueError,
        "spatial_scale must be a number, or one for each of 2 axes, got (0.25, 1, 1)",
    ),
    ({"input": feature().to_mkldnn()}, TypeError, "input must be a dense tensor, got layout torch._mkldnn"),
    (
        {"boxes": torch.zeros(3, 5).to_sparse()},
        TypeError,
        "boxes must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"output_size": 0}, ValueError, "output_size must be at least 1, got 0"),
]

MODULE = [
    ({"names": []}, ValueError, "featmap_names must name at least one map, got []"),
    ({"output_size": 0}, ValueError, "output_size must be at least 1, got 0"),
    ({"x": [feature()]}, TypeError, "x must be a dict of maps by name, got list"),
    (
        {"x": {"c": feature(), "d": feature()}},
        ValueError,
        "x must hold a map named in featmap_names ['a', 'b'], got ['c', 'd']",
    ),
    (
        {"x": {"a": feature(), "b": feature(2, 8, 8)}},
        ValueError,
        "x['b'] must have the axes of x['a'], (2, 3, 16, 16), got (2, 8, 8)",
    ),
    (
        {"x": {"b": feature(2, 5, 8, 8), "a": feature()}},
        ValueError,
        "x['b'] must have the images and channels of x['a'], (2, 3), got (2, 5)",
    ),
    ({"image_shapes": None}, ValueError, "image_shapes must be given unless scales are, got None"),
    (
        {"image_shapes": []},
        ValueError,
        "image_shapes must hold the size of each image, got none for 2 boxes tensors",
    ),
    ({"image_shapes": (64, 64)}, TypeError, "image_shapes[0] must be (height, width), got 64"),
    (
        {"image_shapes": [(64, None)]},
        TypeError,
        "each side of image_shapes[0] must be a number, got None",
    ),
    (
        {"image_shapes": [(64, float("inf"))]},
        ValueError,
        "each side of image_shapes[0] must be finite, got inf",
    ),
    (
        {"image_shapes": [(64, 64), (0, 64)]},
        ValueError,
        "image_shapes[1] must be (height, width), at least 1, got (0, 64)",
    ),
    (
        {"image_shapes": [(3, 64, 3)]},
        ValueError,
        "image_shapes[0] must be (height, width), or of an image of 1, 3 or 4 channels, got (3, 64, 3)",
    ),
    (
        {"scales": [1 / 4]},
        ValueError,
        "scales must hold one number per entry of featmap_names ['a', 'b'], got [0.25]",
    ),
    (
        {"scales": {"a": 1 / 4}},
        ValueError,
        "scales must hold every map that is used, ['a', 'b'], got none for ['b']",
    ),
    ({"scales": [1 / 4, 0]}, ValueError, "each of scales must be positive and finite, got 0.0"),
    (
        {"map_levels": lambda boxes: torch.tensor([5])},
        ValueError,
        "levels[0] must have its level in [0, 2), got 5",
    ),
    (
        {"map_levels": lambda boxes: torch.tensor([0.0])},
        TypeError,
        "the result of map_levels must be a tensor of integers, got torch.float32",
    ),
    (
        {"map_levels": lambda boxes: None},
        TypeError,
        "the result of map_levels must be a tensor of integers, got NoneType",
    ),
    (
        {"map_levels": lambda boxes: torch.tensor([0, 0])},
        ValueError,
        "the result of map_levels must have shape (1,), one per box, got (2,)",
    ),
    ({"map_levels": 3}, TypeError, "map_levels must be a function from boxes to levels, got 3"),
]


@pytest.mark.parametrize(
    ("call", "arguments", "kind", "message"),
    [
        pytest.param(call, *row, id=f"{call.__name__}: {row[2]}")
        for call, rows in ((pool, MULTISCALE), (align, SINGLE), (module, MODULE))
        for row in rows
    ],
)
def test_error(call, arguments, kind, message):
    whole = "" if message.endswith(" ") else "$"
    with pytest.raises(kind, match=f"^{re.escape(message)}{whole}"):
        call(**arguments)


def test_one_name_is_not_a_list_of_names():
    with pytest.raises(TypeError, match=r"^featmap_names must be a list of names, got the string 'fpn'$"):
        roialign.MultiScaleRoIAlign("fpn", 7, 2)


@pytest.mark.parametrize("call", [pool, align, module])
def test_the_arguments_that_the_errors_start_from_are_right(call):
    assert call().shape == (1, 3, 2, 2)


@pytest.mark.parametrize("boxes", [[], [torch.zeros(0, 4)], [torch.zeros(0, 4)] * 2], ids=len)
@pytest.mark.parametrize("call", [pool, align, module])
def test_no_boxes_give_an_empty_result(call, boxes):
    assert call(boxes=boxes).shape == (0, 3, 2, 2)


def test_no_images_give_an_empty_result():
    x = {"a": torch.zeros(0, 3, 16, 16)}
    assert module(x=x, boxes=[], image_shapes=[]).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("boxes", [tuple(BOXES), BOXES[:1]], ids=["tuple", "fewer than images"])
def test_sequences_of_boxes(boxes):
    assert torch.equal(pool(boxes=boxes), pool())


def test_no_channels_give_an_empty_result():
    out = align(input=torch.zeros(2, 0, 16, 16).requires_grad_())
    assert out.shape == (1, 0, 2, 2)
    out.sum().backward()


@pytest.mark.parametrize("levels", [[0, 1, 1], [1, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_levels_choose_the_map(levels, dtype):
    features = [torch.full((1, 1, 16, 16), float(i)) for i in range(2)]
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(3, 4)]
    out = roialign.multiscale_roi_align(features, boxes, 1, [1, 1], levels=torch.tensor(levels, dtype=dtype))
    assert out.flatten().tolist() == levels
