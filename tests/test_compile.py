"""Through torch.compile, on the public functions: whole graphs, dynamic sizes, few compilations."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import roialign
from roialign.testing import pyramid, random_boxes

SIZE = (64, 80)
STRIDES = [4, 8, 16]
NAMES = ["0", "1", "2"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def named_maps(scale: int = 1, **options) -> dict[str, torch.Tensor]:
    size = (SIZE[0] * scale, SIZE[1] * scale)
    return dict(zip(NAMES, pyramid(STRIDES, image_size=size, images=2, **options), strict=True))


def pooler(**options) -> roialign.MultiScaleRoIAlign:
    return roialign.MultiScaleRoIAlign(NAMES, 3, 2, canonical_scale=28, **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"scales": [1 / 4, 1 / 8, 1 / 16]}], ids=["inferred", "scales"])
def test_compiled_module(options, dynamic):
    module = pooler(**options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count, scale in [(3, 1), (5, 1), (8, 2)]:
        sizes = [(SIZE[0] * scale, SIZE[1] * scale)] * 2
        x = {name: f.requires_grad_() for name, f in named_maps(scale).items()}
        boxes = random_boxes([count, count + 1], image_size=sizes[0])
        actual, expected = compiled(x, boxes, sizes), module(x, boxes, sizes)
        assert torch.equal(actual, expected)
        for a, e in zip(*(torch.autograd.grad(o.sum(), x.values()) for o in (actual, expected)), strict=True):
            assert torch.equal(a, e)


def test_number_of_boxes_does_not_compile_anew():
    module = pooler(scales=[1 / 4, 1 / 8, 1 / 16])
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, b: module(x, [b]), backend=backend, fullgraph=True, dynamic=True)
    for count in (3, 7, 20, 100):
        boxes = random_boxes([count], image_size=SIZE)
        assert torch.equal(compiled(named_maps(), boxes[0]), module(named_maps(), boxes))
    assert len(graphs) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "module",
    [
        roialign.MultiScaleRoIAlign(["0", "1"], (np.int64(2), np.int64(3)), np.int64(2)),
        roialign.MultiScaleRoIAlign(["0", "1"], np.int64(2), 2, scales=1 / np.array([4, 8])),
        roialign.MultiScaleRoIAlign(["0", "1"], 2, 2, scales=[np.float64(2), 1]),
    ],
    ids=["size", "scales", "scales above 1"],
)
def test_modules_made_with_numbers_of_numpy_compile(module, dynamic):
    x, boxes = named_maps(), random_boxes([3, 4], image_size=SIZE)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(x, boxes, [(8, 9)] * 2), module(x, boxes, [(8, 9)] * 2))


def test_numbers_may_be_arguments_of_the_graph():
    feature, boxes = named_maps()["0"], random_boxes([3, 4], image_size=SIZE)

    def head(feature, boxes, size, scale, ratio, canonical):
        return roialign.multiscale_roi_align(
            [feature], boxes, (size, feature.shape[3]), [scale], ratio, canonical_scale=canonical
        )

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)
    for numbers in [(3, 0.5, 2, 100), (5, 0.25, 3, 50.0)]:
        assert torch.equal(compiled(feature, boxes, *numbers), head(feature, boxes, *numbers))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_functions(layout):
    feature = pyramid([4], image_size=SIZE, images=2, layout=layout)[0]
    boxes = random_boxes([4, 2], image_size=SIZE)

    def head(feature, boxes):
        single = roialign.roi_align(feature, boxes, (2, 3), 1 / 4, 2, aligned=True)
        return single + roialign.multiscale_roi_align([feature], boxes, (2, 3), [1 / 4], aligned=True)

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(feature, boxes), head(feature, boxes))


def test_errors_are_raised_from_compiled_code_as_well():
    compiled = torch.compile(
        lambda f, b: roialign.roi_align(f, b, 2), backend="aot_eager", fullgraph=True, dynamic=True
    )
    with pytest.raises(ValueError, match=r"boxes\[1\] must have its image index in \[0, 1\), got 3"):
        compiled(torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4], [3.0, 0, 0, 4, 4]]))


# Inductor of PyTorch 2.6 warns of a setting of its own that it cannot save.
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_default_backend_forward_and_backward(dynamic):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 9, 2)).train()
    pool = pooler(scales=[1 / 4, 1 / 8, 1 / 16])

    def head(x, boxes):
        return module(pool({name: f.relu() for name, f in x.items()}, boxes) * 2)

    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic)
    for count in (3, 7):
        x = {name: f.requires_grad_() for name, f in named_maps().items()}
        boxes = random_boxes([count, 5], image_size=SIZE)
        actual, expected = compiled(x, boxes), head(x, boxes)
        torch.testing.assert_close(actual, expected)
        leaves = [*x.values(), *module.parameters()]
        for a, e in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e)


def count_compilations(calls, **options) -> int:
    """Run the module forward and backward, with each `(box counts, image size)`; hold it against eager."""
    module, counter = pooler(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for counts, size in calls:
        maps = pyramid(STRIDES, image_size=size, images=2, channels=3)
        x = {name: f.requires_grad_() for name, f in zip(NAMES, maps, strict=True)}
        boxes = random_boxes(counts, image_size=size)
        if options.get("unbacked"):
            for b in boxes:
                mark_unbacked(b, 0)
        actual, expected = compiled(x, boxes, [size] * 2), module(x, boxes, [size] * 2)
        assert torch.equal(actual, expected)
        for a, e in zip(*(torch.autograd.grad(o.sum(), x.values()) for o in (actual, expected)), strict=True):
            assert torch.equal(a, e)
    return counter.frame_count


def test_image_sizes_do_not_compile_anew():
    # The first has no side that another dimension has, which would tie the two together.
    sizes = [(96, 128), (64, 80), (416, 608), (160, 80), (480, 640)]
    assert count_compilations([((37, 41), size) for size in sizes]) == 1


def test_one_compilation_serves_any_number_of_boxes():
    counts = [(37, 41), (43, 29), (0, 7), (1, 3), (0, 0), (1, 0), (2, 2), (100, 11)]
    assert count_compilations([(count, SIZE) for count in counts], unbacked=True) == 1


def test_sizes_of_0_and_1_cost_a_compilation_each_as_everywhere_in_pytorch():
    counts = [(37, 41), (43, 29), (0, 41), (1, 41), (2, 41), (0, 29), (1, 29), (100, 11)]
    assert count_compilations([(count, (96, 128)) for count in counts]) == 3


def test_explain_finds_no_break_where_torchvision_has_some():
    arguments = named_maps(), random_boxes([3, 4], image_size=SIZE), [SIZE] * 2
    assert torch._dynamo.explain(pooler())(*arguments).graph_break_count == 0
    theirs = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2, canonical_scale=28)
    assert torch._dynamo.explain(theirs)(*arguments).graph_break_count > 0


@pytest.mark.filterwarnings("ignore")
def test_converted_mask_rcnn_has_no_break_in_its_poolers():
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=5,
        box_detections_per_img=2,
    )
    with torch.no_grad():
        report = torch._dynamo.explain(roialign.convert_poolers(model.eval()))([torch.rand(3, *SIZE)])
    places = {Path(reason.user_stack[-1].filename) for reason in report.break_reasons}
    # Folders, not parts of a path: a clone of this repository is itself called roialign.
    theirs, ours = (Path(package.__file__).parent for package in (torchvision, roialign))
    assert any(place.is_relative_to(theirs) for place in places)
    assert not any(place.name == "poolers.py" or place.is_relative_to(ours) for place in places)


def test_training_mode_and_autocast_compile():
    convolution, pool = torch.nn.Conv2d(4, 4, 1), pooler(scales=[1 / 4, 1 / 8, 1 / 16])

    def head(x, boxes):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return pool({name: convolution(f) for name, f in x.items()}, boxes)

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    x, boxes = named_maps(), random_boxes([3, 4], image_size=SIZE)
    actual, expected = compiled(x, boxes), head(x, boxes)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)
    weight = convolution.weight
    grads = [torch.autograd.grad(out.float().square().sum(), weight)[0] for out in (actual, expected)]
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32", "float16"), ("float32", "bfloat16", "float32")], ids=str
)
def test_mixed_dtypes_among_levels_give_the_dtype_of_the_first(dtypes):
    x = {n: f.to(getattr(torch, d)) for (n, f), d in zip(named_maps().items(), dtypes, strict=True)}
    boxes = random_boxes([6, 4], image_size=SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(pooler(), backend="aot_eager", fullgraph=True)
        actual, expected = compiled(x, boxes, [SIZE] * 2), pooler()(x, boxes, [SIZE] * 2)
    assert actual.dtype == getattr(torch, dtypes[0])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_boxes_in_float32(dtype):
    x = {name: f.to(dtype) for name, f in named_maps().items()}
    boxes = random_boxes([6, 4], image_size=SIZE)
    expected = pooler()(x, boxes, [SIZE] * 2)
    with torch.autocast("cpu", dtype=dtype):
        actual = pooler()(x, boxes, [SIZE] * 2)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
