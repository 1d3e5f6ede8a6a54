"""Through torch.compile and torch.export, on the public functions; whole graphs, dynamic sizes."""

import pytest
import torch

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


def test_exported_module():
    module = pooler()

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = module

        def forward(self, x, boxes):
            return self.pool(x, [boxes], [SIZE])

    boxes = torch.export.Dim("boxes", min=2, max=1000)
    program = torch.export.export(
        Head(),
        (named_maps(), random_boxes([5], image_size=SIZE)[0]),
        dynamic_shapes={"x": dict.fromkeys(NAMES), "boxes": {0: boxes}},
    )
    for count in (2, 30):
        other = random_boxes([count], image_size=SIZE, seed=count)[0]
        assert torch.equal(program.module()(named_maps(), other), module(named_maps(), [other], [SIZE]))
    assert [node.target for node in program.graph.nodes if "roialign" in str(node.target)] == [
        torch.ops.roialign.multiscale_roi_align.default
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_boxes_in_float32(dtype):
    x = {name: f.to(dtype) for name, f in named_maps().items()}
    boxes = random_boxes([6, 4], image_size=SIZE)
    expected = pooler()(x, boxes, [SIZE] * 2)
    with torch.autocast("cpu", dtype=dtype):
        actual = pooler()(x, boxes, [SIZE] * 2)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
