"""Both operators in plain ATen: eager's numbers, and a compiled program that runs without this package."""

import doctest
import os
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim

import roialign
from roialign import layout, ops
from roialign.arguments import points_of
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.testing import LAYOUTS, assert_within_budget, hostile_boxes, pyramid, random_boxes

SIZE = (64, 80)
STRIDES = [4, 8, 16]
SCALES = [1 / s for s in STRIDES]
BOXES = [torch.cat((random_boxes([20], image_size=SIZE)[0], hostile_boxes())), *random_boxes([7], seed=3)]

forward_op = torch.ops.roialign.multiscale_roi_align
backward_op = torch.ops.roialign.multiscale_roi_align_backward
lowered_forward, lowered_backward = roialign.decompositions().values()


def arguments(ratio=2, aligned=False, levels=None, boxes=BOXES, dtype=torch.float32, **options) -> tuple:
    features = pyramid(STRIDES, image_size=SIZE, images=2, channels=3, dtype=dtype, **options)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    rois = boxes_to_rois(boxes, features[0], working)
    steps = staircase(SCALES, 28, 4, working)
    return features, rois, levels, (3, 2), SCALES, points_of(ratio), aligned, *steps


def in_double(args: tuple) -> tuple:
    features, rois, *rest = args
    return [f.double() for f in features], rois.double(), *rest


def backward_arguments(features, rois, levels, output_size, *pooling) -> tuple:
    grad = torch.randn(len(rois), features[0].shape[1], *output_size, dtype=features[0].dtype)
    shape = [*features[0].shape[:2], *(side for f in features for side in f.shape[2:])]
    dtypes = [ops.DTYPES.index(f.dtype) for f in features]
    return (
        grad,
        rois,
        levels,
        shape,
        dtypes,
        [layout.is_channels_last(f) for f in features],
        output_size,
        *pooling,
    )


RATIOS = [1, 2, 4, 5, -1, "exact"]  # one sum, and a loop over blocks of points


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_forward_is_the_operators(ratio, aligned):
    args = arguments(ratio, aligned)
    actual, expected = lowered_forward(*args), forward_op(*args)
    assert expected.isnan().any()
    # The same boxes in double round to other levels and points; so only those of the same numbers count.
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=2e-6)
    sound = arguments(ratio, aligned, boxes=random_boxes([9, 7], image_size=SIZE))
    assert_within_budget(
        lowered_forward(*sound), truth=forward_op(*in_double(sound)), reference=forward_op(*sound)
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_backward_is_the_operators_and_repeatable(ratio, aligned):
    args = backward_arguments(*arguments(ratio, aligned))
    actual = lowered_backward(*args)
    for a, again, expected in zip(actual, lowered_backward(*args), backward_op(*args), strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(a, again)


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, ratio):
    args = arguments(ratio, dtype=dtype, boxes=random_boxes([9, 7], image_size=SIZE))
    actual, expected = lowered_forward(*args), forward_op(*args)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
    grads = backward_arguments(*args)
    for a, e in zip(lowered_backward(*grads), backward_op(*grads), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_laid_out_as_the_operators(layout):
    args = arguments(layout=[layout, "channels_last", "contiguous"])
    grads = backward_arguments(*args)
    pairs = [(lowered_forward(*args), forward_op(*args))]
    pairs += zip(lowered_backward(*grads), backward_op(*grads), strict=True)
    for actual, expected in pairs:
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, -1])
def test_no_boxes(ratio):
    args = arguments(ratio, boxes=[])
    assert lowered_forward(*args).shape == (0, 3, 3, 2)
    assert not any(g.any() for g in lowered_backward(*backward_arguments(*args)))


def test_levels_and_images_that_do_not_exist_give_nan():
    rois = torch.tensor([[i, 2.0, 2.0, 30.0, 30.0] for i in (0, 1, 2, -1, torch.nan, 0, 0)])
    levels = torch.tensor([0, 2, 1, 1, 1, 3, -1])
    features, _, _, *rest = arguments()
    out = lowered_forward(features, rois, levels, *rest)
    assert out.flatten(1).isnan().all(1).tolist() == [False, False, True, True, True, True, True]
    torch.testing.assert_close(out[:2], forward_op(features, rois[:2], levels[:2], *rest))


@pytest.mark.parametrize("ratio", [2, -1])
def test_a_nan_elsewhere_in_a_map_stays_elsewhere(ratio):
    """Only cells that a sampling point touches count: those are the cells that get a gradient."""
    args = arguments(ratio, boxes=random_boxes([5, 3], image_size=SIZE))
    expected = forward_op(*args)
    ones = torch.ones_like(expected)
    touched = backward_op(ones, *backward_arguments(*args)[1:])
    spoilt = [
        f.masked_fill((t == 0).all(1, keepdim=True), torch.nan) for f, t in zip(args[0], touched, strict=True)
    ]
    assert sum(int(f.isnan().sum()) for f in spoilt) > 100
    spoilt_args = (spoilt, *args[1:])
    result = forward_op(*spoilt_args)
    torch.testing.assert_close(lowered_forward(*spoilt_args), result, equal_nan=True)
    assert result.isfinite().any()


class Head(torch.nn.Module):
    def __init__(self, *ratios):
        super().__init__()
        names = ["0", "1", "2"]
        options = {"scales": SCALES, "canonical_scale": 28}
        self.pools = torch.nn.ModuleList(
            roialign.MultiScaleRoIAlign(names, (3, 2), ratio, **options) for ratio in ratios
        )

    def forward(self, x, boxes):
        return [pool(x, [boxes]) for pool in self.pools]


def named_maps(size=SIZE, **options) -> dict[str, torch.Tensor]:
    return dict(zip("012", pyramid(STRIDES, image_size=size, channels=3, **options), strict=True))


def lowered_program(*ratios: int) -> torch.export.ExportedProgram:
    sizes = {name: {2: Dim.AUTO, 3: Dim.AUTO} for name in "012"}
    program = torch.export.export(
        Head(*ratios),
        (named_maps(), random_boxes([5], image_size=SIZE)[0]),
        dynamic_shapes={"x": sizes, "boxes": {0: Dim.AUTO}},
    )
    return program.run_decompositions(roialign.decompositions())


CASES = [(0, SIZE), (1, SIZE), (40, SIZE), (7, (96, 160))]


@pytest.mark.parametrize("ratio", [2, -1])
def test_exported_program_without_the_operator(ratio):
    program = lowered_program(ratio)
    assert all("roialign" not in str(node.target) for node in program.graph.nodes)
    for count, size in CASES:
        inputs = named_maps(size, seed=count), random_boxes([count], image_size=size, seed=count)[0]
        torch.testing.assert_close(program.module()(*inputs), Head(ratio)(*inputs))


@pytest.mark.parametrize("ratio", [2, -1])
def test_traced_gradient_without_the_operator(ratio):
    """AOTAutograd with the table: neither the forward nor the backward graph names this package."""
    targets = []

    def compiler(graph, _inputs):
        targets.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, decompositions=roialign.decompositions())
    features, rois, levels, *rest = arguments(ratio, boxes=random_boxes([6, 4], image_size=SIZE))
    features = [f.requires_grad_() for f in features]
    compiled = torch.compile(forward_op, backend=backend, fullgraph=True)
    outs = compiled(features, rois, levels, *rest), forward_op(features, rois, levels, *rest)
    grads = [torch.autograd.grad(out.pow(2).sum(), features) for out in outs]
    assert len(targets) == 2
    assert not any("roialign" in target for graph in targets for target in graph)
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


ALONE = """
import sys
sys.modules["roialign"] = None  # importing it raises
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(*inputs), expected)
assert not hasattr(torch.ops.roialign, "multiscale_roi_align")
print("same")
"""


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_package_runs_where_roialign_cannot_be_imported(tmp_path):
    package = torch._inductor.aoti_compile_and_package(
        lowered_program(2, -1), package_path=str(tmp_path / "model.pt2")
    )
    cases = []
    for count, size in CASES:
        inputs = named_maps(size, seed=count), random_boxes([count], image_size=size, seed=count)[0]
        cases.append((inputs, Head(2, -1)(*inputs)))
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", ALONE, package, str(tmp_path / "cases.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ)
    assert done.stdout == "same\n", done.stderr


def test_example_of_the_docstring():
    result = doctest.testmod(roialign, extraglobs={"torch": torch})
    assert (result.failed, result.attempted) == (0, 5)
