"""The modules: signature, representation, state, and what they honour."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
import torchvision.ops as peer
from torchvision.ops.poolers import LevelMapper

import roialign
import roialign.torchvision
from roialign.testing import LAYOUTS, pyramid, random_boxes

SIZE = (160, 192)
STRIDES = [4, 8, 16, 32]
SCALES = [1 / s for s in STRIDES]
NAMES = ["0", "1", "2", "3"]
ATTRIBUTES = ["featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level"]
BOXES = random_boxes([30], image_size=SIZE)


def maps(**options) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, pyramid(STRIDES, image_size=SIZE, **options), strict=True))


def constant_maps(strides, size) -> dict[str, torch.Tensor]:
    """Each filled with its own place, so that the output says which map a box came from."""
    return {
        str(i): torch.full((1, 1, size // s, size // s), float(i), dtype=torch.float32)
        for i, s in enumerate(strides)
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (roialign.MultiScaleRoIAlign, peer.MultiScaleRoIAlign),
        (roialign.RoIAlign, peer.RoIAlign),
        (roialign.roi_align, peer.roi_align),
        (roialign.LevelMapper, LevelMapper),
        (roialign.MultiScaleRoIAlign.forward, peer.MultiScaleRoIAlign.forward),
        (roialign.RoIAlign.forward, peer.RoIAlign.forward),
        (roialign.LevelMapper.__call__, LevelMapper.__call__),
    ],
)
def test_every_call_that_torchvision_takes_is_taken(ours, theirs):
    ours, theirs = (inspect.signature(f).parameters for f in (ours, theirs))
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default or name == "image_shapes", name


@pytest.mark.parametrize("output_size", [7, (7, 5), [3, 4]], ids=str)
@pytest.mark.parametrize("canonical", [{}, {"canonical_scale": 100, "canonical_level": 3}], ids=str)
@pytest.mark.parametrize("cls", [roialign.MultiScaleRoIAlign, roialign.torchvision.MultiScaleRoIAlign])
def test_multiscale_repr_and_attributes_are_torchvisions(cls, output_size, canonical):
    ours = cls(["a", "b"], output_size, 2, **canonical)
    theirs = peer.MultiScaleRoIAlign(["a", "b"], output_size, 2, **canonical)
    assert repr(ours) == repr(theirs)
    for name in [*ATTRIBUTES, "scales", "map_levels"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.state_dict() == {}


@pytest.mark.parametrize("output_size", [7, (7, 5)], ids=str)
def test_roi_align_repr_and_attributes_are_torchvisions(output_size):
    ours = roialign.RoIAlign(output_size, 0.25, 2, aligned=True)
    theirs = peer.RoIAlign(output_size, 0.25, 2, aligned=True)
    assert repr(ours) == repr(theirs)
    for name in ("output_size", "spatial_scale", "sampling_ratio", "aligned"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"aligned": True}, "aligned=True"), ({"scales": [1 / 14]}, f"scales=[{1 / 14}]")],
)
def test_repr_shows_what_torchvision_lacks(options, shown):
    pooler = roialign.MultiScaleRoIAlign(["a"], 7, 2, **options)
    assert repr(pooler) == (
        f"MultiScaleRoIAlign(featmap_names=['a'], output_size=(7, 7), sampling_ratio=2, {shown})"
    )


def test_roi_align_module_is_the_function():
    feature, boxes = maps(images=1)["1"], random_boxes([10], image_size=SIZE)
    module = roialign.RoIAlign((3, 5), 1 / 8, 2, aligned=True)
    assert torch.equal(module(feature, boxes), roialign.roi_align(feature, boxes, (3, 5), 1 / 8, 2, True))


def test_multiscale_module_is_the_function():
    x = maps()
    options = {"canonical_scale": 56, "canonical_level": 3, "aligned": True}
    module = roialign.MultiScaleRoIAlign(NAMES, 5, 2, **options)
    expected = roialign.multiscale_roi_align(list(x.values()), BOXES, 5, SCALES, 2, **options)
    assert torch.equal(module(x, BOXES, [SIZE]), expected)


def test_subclass_is_an_instance_of_both():
    pooler = roialign.torchvision.MultiScaleRoIAlign(NAMES, 7, 2)
    assert isinstance(pooler, roialign.MultiScaleRoIAlign)
    assert isinstance(pooler, peer.MultiScaleRoIAlign)
    expected = roialign.MultiScaleRoIAlign(NAMES, 7, 2)(maps(), BOXES, [SIZE])
    assert torch.equal(pooler(maps(), BOXES, [SIZE]), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_pool_alike(duplicate):
    pooler = roialign.MultiScaleRoIAlign(NAMES, 7, 2, scales=SCALES, aligned=True)
    assert torch.equal(duplicate(pooler)(maps(), BOXES), pooler(maps(), BOXES))


def unpickled_as_ours(pooler: torch.nn.Module) -> torch.nn.Module:
    """Pickled as torchvision's, loaded where our classes stand in the place of torchvision's."""
    pickled = pickle.dumps(pooler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.ops.poolers.MultiScaleRoIAlign", roialign.torchvision.MultiScaleRoIAlign)
        patch.setattr("torchvision.ops.poolers.LevelMapper", roialign.LevelMapper)
        patch.setattr(sys.modules["torchvision.ops.roi_align"], "RoIAlign", roialign.RoIAlign)
        loaded = pickle.loads(pickled)
    assert isinstance(loaded, roialign.MultiScaleRoIAlign | roialign.RoIAlign)
    return loaded


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("absent", [[], ["canonical_scale", "canonical_level"]], ids=["new", "old"])
def test_pickles_of_torchvisions_pooler_load_as_ours(absent, used):
    """Also one made after a call, which stored the scales of that call, with images of another size."""
    theirs = peer.MultiScaleRoIAlign(NAMES, 3, 2)
    small = [random_boxes([5], image_size=(64, 64)), [(64, 64)]]
    if used:
        theirs(dict(zip(NAMES, pyramid([2, 4, 8, 16], image_size=(64, 64)), strict=True)), *small)
    for name in absent:
        delattr(theirs, name)
    loaded = unpickled_as_ours(theirs)
    expected = peer.MultiScaleRoIAlign(NAMES, 3, 2)
    assert repr(loaded) == repr(expected)
    torch.testing.assert_close(loaded(maps(), BOXES, [SIZE]), expected(maps(), BOXES, [SIZE]))
    assert torch.equal(copy.deepcopy(loaded)(maps(), BOXES, [SIZE]), loaded(maps(), BOXES, [SIZE]))


def test_what_was_set_by_hand_survives_in_a_pickle_of_torchvisions_pooler():
    theirs = peer.MultiScaleRoIAlign(NAMES, 3, 2)
    theirs.scales, theirs.map_levels = SCALES, LevelMapper(2, 5, canonical_scale=50)
    loaded = unpickled_as_ours(theirs)
    torch.testing.assert_close(loaded(maps(), BOXES, [SIZE]), theirs(maps(), BOXES, [SIZE]))


def test_what_torchvision_could_have_inferred_stays_in_a_pickle_of_ours():
    ours = roialign.MultiScaleRoIAlign(NAMES, 3, 2, scales=SCALES, map_levels=LevelMapper(2, 5))
    assert pickle.loads(pickle.dumps(ours)).scales == SCALES


def test_a_pickle_of_torchvisions_roi_align_loads_as_ours():
    theirs = peer.RoIAlign(3, 1 / 8, 2)
    del theirs.aligned  # before torchvision 0.6
    feature, boxes = maps(images=1)["1"], random_boxes([10], image_size=SIZE)
    expected = peer.roi_align(feature, boxes, 3, 1 / 8, 2)
    torch.testing.assert_close(unpickled_as_ours(theirs)(feature, boxes), expected)


@pytest.mark.parametrize("names", [["2", "0"], ["0", "2", "absent"], ["2", "x", "0"]], ids=str)
def test_other_maps_and_absent_names_are_passed_over(names):
    used = {name: f for name, f in maps().items() if name in names}
    expected = roialign.MultiScaleRoIAlign(["0", "2"], 3, 2)(used, BOXES, [SIZE])
    assert torch.equal(roialign.MultiScaleRoIAlign(names, 3, 2)(maps(), BOXES, [SIZE]), expected)


@pytest.mark.parametrize(
    "scales",
    [SCALES, tuple(SCALES), dict(zip(NAMES, SCALES, strict=True))],
    ids=["list", "tuple", "dict"],
)
@pytest.mark.parametrize("given", ["at construction", "on the module"])
def test_scales_are_honoured_without_image_shapes(scales, given):
    pooler = roialign.MultiScaleRoIAlign(NAMES, 7, 2, scales=scales if given == "at construction" else None)
    pooler.scales = scales
    expected = peer.MultiScaleRoIAlign(NAMES, 7, 2)(maps(), BOXES, [SIZE])
    torch.testing.assert_close(pooler(maps(), BOXES, None), expected)
    torch.testing.assert_close(pooler(maps(), BOXES, [(7, 7)]), expected)  # sizes do not matter then


def test_scales_belong_to_names_also_when_some_are_absent():
    pooler = roialign.MultiScaleRoIAlign(["absent", "0", "1"], 3, 2, scales=[1 / 64, 1 / 4, 1 / 8])
    x = {name: f for name, f in maps().items() if name in ("0", "1")}
    expected = roialign.MultiScaleRoIAlign(["0", "1"], 3, 2, scales=[1 / 4, 1 / 8])(x, BOXES)
    assert torch.equal(pooler(x, BOXES), expected)


def test_any_positive_scale_is_honoured():
    feature = pyramid([14], image_size=(224, 224))[0]
    boxes = random_boxes([10], image_size=(224, 224))
    actual = roialign.MultiScaleRoIAlign(["p"], 7, 2, scales=[1 / 14])({"p": feature}, boxes)
    torch.testing.assert_close(actual, peer.roi_align(feature, boxes, 7, 1 / 14, 2))


@pytest.mark.parametrize("given", ["at construction", "on the module"])
def test_map_levels_is_honoured(given):
    def by_width(boxlists):
        return torch.cat([(b[:, 2] - b[:, 0] > 50).long() for b in boxlists])

    pooler = roialign.MultiScaleRoIAlign(
        ["0", "1"], 1, 2, map_levels=by_width if given == "at construction" else None
    )
    pooler.map_levels = by_width
    boxes = [
        torch.tensor([[0.0, 0.0, 60.0, 9.0]]),
        torch.tensor([[0.0, 0.0, 9.0, 60.0], [9.0, 9.0, 99.0, 99.0]]),
    ]
    x = {name: f.expand(2, -1, -1, -1) for name, f in constant_maps([4, 8], 128).items()}
    assert pooler(x, boxes, [(128, 128)] * 2).flatten().tolist() == [1, 0, 1]


def test_torchvisions_scales_and_mapper_set_by_hand_give_its_result():
    ours, theirs = (cls(NAMES, 7, 2) for cls in (roialign.MultiScaleRoIAlign, peer.MultiScaleRoIAlign))
    for pooler in (ours, theirs):
        pooler.scales = [1 / 5, 1 / 9, 1 / 17, 1 / 33]
        pooler.map_levels = LevelMapper(2, 5, canonical_scale=50)
    torch.testing.assert_close(ours(maps(), BOXES, [SIZE]), theirs(maps(), BOXES, [SIZE]))


@pytest.mark.parametrize(
    ("strides", "side", "served_by"),
    [
        ([4, 8, 16, 32], 20, 0),
        ([4, 8, 16, 32], 120, 1),
        ([4, 8, 16, 32], 230, 2),
        ([4, 8, 16, 32], 500, 3),
        ([32, 16, 8, 4], 20, 3),
        ([32, 16, 8, 4], 500, 0),
        ([8, 32], 230, 1),  # wants 16: the next coarser map
        ([8, 32], 460, 1),
        ([8, 32], 120, 0),
        ([32, 8], 230, 0),
        ([4, 64], 120, 1),
        ([16, 32, 32], 500, 1),  # of two maps of a level the first
        ([16, 16, 32], 500, 2),
        ([4, 8], 500, 1),  # beyond the coarsest: the coarsest
        ([32, 64], 20, 0),
    ],
)
@pytest.mark.usefixtures("engine")
def test_level_that_serves_a_box(strides, side, served_by):
    pooler = roialign.MultiScaleRoIAlign([str(i) for i in range(len(strides))], 1, 2)
    out = pooler(
        constant_maps(strides, 512), [torch.tensor([[2.0, 2.0, 2.0 + side, 2.0 + side]])], [(512, 512)]
    )
    assert out.item() == served_by


def test_nothing_is_remembered_between_calls():
    pooler = roialign.MultiScaleRoIAlign(NAMES, 7, 2)
    before = dict(vars(pooler))
    for size, strides in [((64, 64), [2, 4, 8, 16]), (SIZE, STRIDES), ((320, 256), [8, 16, 32, 64])]:
        x = dict(zip(NAMES, pyramid(strides, image_size=size), strict=True))
        boxes = random_boxes([10], image_size=size)
        expected = peer.MultiScaleRoIAlign(NAMES, 7, 2)(x, boxes, [size])
        torch.testing.assert_close(pooler(x, boxes, [size]), expected)
        assert vars(pooler) == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("engine")
def test_output_has_the_memory_format_of_the_first_used_map(layout):
    x = maps(layout=[layout, "channels_last", "contiguous", "contiguous"], images=2)
    out = roialign.MultiScaleRoIAlign(NAMES, 7, 2)(dict(reversed(x.items())), random_boxes([5, 5]), [SIZE])
    innermost = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert out.is_contiguous(memory_format=innermost)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = roialign.MultiScaleRoIAlign(NAMES, 7, 2)

    def forward(self, x, boxes, image_shapes):
        return self.pool(x, boxes, image_shapes).flatten(1)


def test_fx_keeps_the_pooling_whole():
    traced = torch.fx.symbolic_trace(Head())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [roialign.functional.pool_named_maps]
    assert torch.equal(traced(maps(), BOXES, [SIZE]), Head()(maps(), BOXES, [SIZE]))


@pytest.mark.parametrize("function", ["roi_align", "multiscale_roi_align"])
def test_fx_keeps_the_functions_whole(function):
    def head(features, boxes):
        if function == "roi_align":
            return roialign.functional.roi_align(features, boxes, 3) * 2
        return roialign.functional.multiscale_roi_align(features, boxes, 3, [1 / 4]) * 2

    traced = torch.fx.symbolic_trace(head)
    assert getattr(roialign.functional, function) in [node.target for node in traced.graph.nodes]
