"""Whole models of torchvision: the same detections, losses and gradients, with hooks and sharing kept."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign, RoIAlign
from torchvision.ops.poolers import LevelMapper

import roialign
import roialign.torchvision
from roialign import convert_poolers

SMALL = {"weights": None, "weights_backbone": None, "min_size": 96, "max_size": 128}
FEW = {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 6, "box_score_thresh": 0.0}
TRAINING = {"rpn_post_nms_top_n_train": 40, "box_batch_size_per_image": 16}
MODELS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"num_classes": 4},
    "maskrcnn_resnet50_fpn_v2": {"num_classes": 4},
    "keypointrcnn_resnet50_fpn": {"num_classes": 2, "num_keypoints": 5},
}
TRAINED = ["fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn_v2"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(detection, name)(**SMALL, **FEW, **TRAINING, **MODELS[name])


def images(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator).to(dtype) for size in [(120, 150), (100, 80)]]


def targets(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    result = []
    for height, width in [(120, 150), (100, 80)]:
        boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [2.0, 2.0, width - 3.0, height - 4.0]], dtype=dtype)
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[:, 10:30, 10:30] = 1
        result.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    return result


def poolers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, MultiScaleRoIAlign)]


# In float64: a last bit of float32 may reorder the nearly equal scores of random weights.
@pytest.mark.parametrize("name", MODELS)
def test_detections_stay(name):
    model = build(name).double().eval()
    with torch.no_grad():
        expected = model(images(torch.float64))
        actual = convert_poolers(model)(images(torch.float64))
    assert poolers_of(model)
    assert {type(pooler) for pooler in poolers_of(model)} == {roialign.torchvision.MultiScaleRoIAlign}
    assert all(len(found["boxes"]) >= 5 for found in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_gradients_stay(name):
    model = build(name).double().train()
    results = []
    for convert in (lambda m: m, convert_poolers):
        converted = convert(copy.deepcopy(model))
        torch.manual_seed(2)  # proposals are sampled
        losses = converted(images(torch.float64), targets(torch.float64))
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad for n, p in converted.named_parameters() if p.grad is not None}))
    assert any(g.any() for n, g in results[0][1].items() if n.startswith("backbone"))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_boxes_stay_in_a_model_of_lower_precision(dtype):
    """What the box head gets, from the same boxes: there detections may differ in their last bit."""
    model = build("fasterrcnn_mobilenet_v3_large_320_fpn").eval()
    seen = []
    model.roi_heads.box_roi_pool.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(images(torch.float32))
        (x, boxes, shapes), expected = seen.pop()
        pooler = convert_poolers(model).roi_heads.box_roi_pool
        actual = pooler({name: f.to(dtype) for name, f in x.items()}, boxes, shapes)
    assert actual.dtype == dtype
    # Two roundings, of the features and of the result.
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=eps * float(expected.abs().max()))


class TinyBackbone(nn.Module):
    out_channels = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, x):
        maps = [self.conv(x)]
        for _ in range(4):
            maps.append(nn.functional.max_pool2d(maps[-1], 2, ceil_mode=True))
        return {str(i): f for i, f in enumerate(maps)}


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (detection.FasterRCNN, "box_roi_pool"),
        (detection.MaskRCNN, "mask_roi_pool"),
        (detection.KeypointRCNN, "keypoint_roi_pool"),
    ],
)
def test_constructors_of_torchvision_take_the_subclass(cls, argument):
    torch.manual_seed(0)
    pooler = roialign.torchvision.MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
    options = {"num_classes": 3, "min_size": 64, "max_size": 64, **FEW}
    model = cls(TinyBackbone(), **options, **{argument: pooler}).eval()
    with torch.no_grad():
        assert len(model([torch.rand(3, 64, 64)])[0]["boxes"]) > 0
    with pytest.raises(TypeError, match=argument):
        cls(TinyBackbone(), **options, **{argument: roialign.MultiScaleRoIAlign(["0"], 14, 2)})


class TwoHeads(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first = first
        self.heads = nn.ModuleList([second, nn.Linear(2, 2)])


def used(**state) -> MultiScaleRoIAlign:
    pooler = MultiScaleRoIAlign(["a", "b"], (7, 5), 2, canonical_scale=100, canonical_level=3)
    for name, value in state.items():
        setattr(pooler, name, value)
    return pooler


def test_a_shared_pooler_stays_one():
    pooler = used()
    model = convert_poolers(TwoHeads(pooler, pooler))
    assert model.first is model.heads[0]
    assert type(model.first) is roialign.torchvision.MultiScaleRoIAlign


def test_poolers_of_all_kinds_in_one_model():
    model = TwoHeads(used(), RoIAlign((3, 4), 0.25, 2, aligned=True))
    linear, shown = model.heads[1], repr(model)
    assert convert_poolers(model) is model
    assert type(model.heads[0]) is roialign.RoIAlign
    assert model.heads[1] is linear
    assert repr(model) == shown
    assert convert_poolers(model).first is model.first  # again: nothing left to do


@pytest.mark.parametrize(
    ("pooler", "cls"),
    [(used, roialign.torchvision.MultiScaleRoIAlign), (lambda: RoIAlign(7, 0.5, 2), roialign.RoIAlign)],
    ids=["MultiScaleRoIAlign", "RoIAlign"],
)
def test_a_bare_pooler_is_converted_in_place(pooler, cls):
    pooler = pooler()
    shown = repr(pooler)
    assert convert_poolers(pooler) is pooler
    assert type(pooler) is cls
    assert repr(pooler) == shown


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), roialign.RoIAlign(7, 1.0, 2)]
)
def test_a_model_without_torchvisions_poolers_is_returned_as_it_is(model):
    children = list(model.children())
    assert convert_poolers(model) is model
    assert list(model.children()) == children


@pytest.mark.parametrize("training", [True, False])
def test_state_and_hooks_are_kept(training):
    calls = []
    pooler = used().train(training)
    pooler.note = "mine"
    pooler.register_buffer("kept", torch.ones(2))
    pooler.register_forward_pre_hook(lambda module, args: calls.append("before"))
    pooler.register_forward_hook(lambda module, args, out: calls.append("after"))
    converted = convert_poolers(TwoHeads(pooler, nn.Identity())).first
    assert converted.training is training
    assert converted.note == "mine"
    assert converted.state_dict().keys() == {"kept"}
    assert (converted.canonical_scale, converted.canonical_level) == (100, 3)
    converted({"a": torch.rand(1, 2, 16, 16)}, [torch.tensor([[0.0, 0, 9, 9]])], [(64, 64)])
    assert calls == ["before", "after"]


def by_area(boxlists):
    return torch.zeros(sum(map(len, boxlists)), dtype=torch.int64)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ({}, False),
        ({"scales": [1 / 4, 1 / 8], "map_levels": LevelMapper(2, 3, 100, 3)}, False),  # inferred
        ({"scales": [1 / 4, 1 / 8], "map_levels": LevelMapper(2, 3, 30)}, True),
        ({"scales": [1 / 14, 1 / 28], "map_levels": LevelMapper(4, 5)}, True),
        ({"scales": [1 / 4, 1 / 8], "map_levels": by_area}, True),
        ({"scales": [1 / 14, 1 / 28], "map_levels": by_area}, True),
        ({"scales": [1 / 14, 1 / 28]}, False),  # without a mapper torchvision infers both
        ({"map_levels": by_area}, False),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, bool) else ", ".join(f"{k}={v}" for k, v in value.items())
    ),
)
def test_scales_set_by_hand_are_kept_and_inferred_ones_dropped(state, kept):
    converted = convert_poolers(used(**state))
    assert converted.scales == (state["scales"] if kept else None)
    assert converted.map_levels is (state["map_levels"] if kept else None)


@pytest.mark.parametrize(
    "state",
    [
        {"scales": [1 / 4, 1 / 8], "map_levels": by_area},
        {"scales": [1 / 4, 1 / 8], "map_levels": LevelMapper(2, 3, 30)},
        {"scales": [1 / 5, 1 / 9], "map_levels": LevelMapper(2, 3, 30)},
        {"scales": [1 / 14, 1 / 28]},
        {"map_levels": by_area},
    ],
    ids=str,
)
@pytest.mark.parametrize("absent", ["none", "first", "last"])
def test_a_pooler_with_state_by_hand_pools_as_before(state, absent):
    """Also with scales that follow the maps that are there, rather than the names."""
    names = {"none": ["a", "b"], "first": ["absent", "a", "b"], "last": ["a", "b", "absent"]}[absent]
    pooler = used(**state)
    pooler.featmap_names = names
    x = {"a": torch.rand(1, 3, 32, 32), "b": torch.rand(1, 3, 16, 16)}
    arguments = x, [torch.tensor([[3.0, 4.0, 90.0, 80.0], [50.0, 60.0, 70.0, 73.0]])], [(128, 128)]
    converted = convert_poolers(copy.deepcopy(pooler))
    torch.testing.assert_close(converted(*arguments), pooler(*arguments))
