"""`sampling_ratio="exact"`: a bin is the integral of the bilinear surface over it, divided by its area."""

import pytest
import torch
from torch import Tensor

import roialign
from roialign import ops
from roialign.testing import LAYOUTS, assert_within_budget, pyramid, random_boxes

SIZE = (48, 72)
STRIDES = [4, 8]
SCALES = [1 / s for s in STRIDES]


def antiderivative(t: Tensor) -> Tensor:
    """Of the hat `max(1 - |t|, 0)`."""
    t = t.clamp(-1, 1)
    return torch.where(t < 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)


def weights(low: float, high: float, bins: int, extent: int, aligned: bool) -> Tensor:
    """`(bins, extent)` by the formula of Precise RoI Pooling (arXiv:1807.11590), and its border by hand.

    Beyond the outermost centres the surface is constant for a cell, then nothing.
    """
    offset = 0.5 if aligned else 0.0
    start, size = low - offset, high - low
    size = size if aligned else max(size, 1.0)
    ends = start + torch.arange(bins + 1, dtype=torch.float64) * size / bins
    a, b = ends[:-1, None], ends[1:, None]
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    inside_a, inside_b = (e.clamp(0, extent - 1) for e in (a, b))
    cells = torch.arange(extent, dtype=torch.float64)
    total = antiderivative(inside_b - cells) - antiderivative(inside_a - cells)
    total[:, :1] += b.clamp(-1, 0) - a.clamp(-1, 0)
    total[:, -1:] += b.clamp(extent - 1, extent) - a.clamp(extent - 1, extent)
    return total / (b - a)


def by_formula(feature: Tensor, boxes: Tensor, size: tuple[int, int], scale: float, aligned: bool) -> Tensor:
    out = []
    for x1, y1, x2, y2 in (boxes.double() * scale).tolist():
        ys = weights(y1, y2, size[0], feature.shape[2], aligned)
        xs = weights(x1, x2, size[1], feature.shape[3], aligned)
        out.append(torch.einsum("py,cyx,qx->cpq", ys, feature[0].double(), xs))
    return torch.stack(out)


BOXES = torch.tensor(
    [
        [3.0, 4.0, 30.0, 21.0],
        [10.25, 7.5, 10.75, 7.75],  # within a cell
        [0.0, 0.0, 71.0, 47.0],
        [-9.0, -5.0, 20.0, 9.0],  # over the border
        [60.0, 40.0, 90.0, 70.0],
        [-30.0, -30.0, 120.0, 100.0],  # all around the map
        [8.0, 8.0, 16.0, 24.0],  # on whole cells
        [33.0, 30.0, 21.0, 12.0],  # inside out
        [200.0, 10.0, 230.0, 20.0],  # beside the map
    ]
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 7), (16, 33)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [2, 20, 70])
def test_the_published_formula(aligned, size, layout, channels):
    (feature,) = pyramid([4], image_size=SIZE, channels=channels, dtype=torch.float64, layout=layout)
    out = roialign.roi_align(feature, [BOXES], size, 0.25, "exact", aligned)
    expected = by_formula(feature, BOXES, size, 0.25, aligned)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("aligned", [False, True])
def test_it_is_the_limit_of_a_growing_grid(aligned):
    (feature,) = pyramid([4], image_size=SIZE, channels=3, dtype=torch.float64)
    exact = roialign.roi_align(feature, [BOXES], (3, 2), 0.25, "exact", aligned)
    errors = []
    for ratio in (8, 32, 128):
        grid = roialign.roi_align(feature, [BOXES], (3, 2), 0.25, ratio, aligned)
        errors.append(float((grid - exact).abs().max()))
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[2] < 0.03


def test_the_precise_pooling_of_others():
    """Whose centres of cells lie at whole numbers, and which widens no box."""
    (feature,) = pyramid([4], image_size=SIZE, channels=3, dtype=torch.float64)
    boxes = torch.tensor([[3.0, 4.0, 30.0, 21.0], [10.25, 7.5, 10.75, 7.75], [8.0, 8.0, 16.0, 24.0]])
    rois = torch.cat((torch.zeros(3, 1), boxes), 1) + torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5]) / 0.25
    out = roialign.roi_align(feature, rois, (3, 2), 0.25, "exact", aligned=True)
    torch.testing.assert_close(out, by_formula(feature, boxes + 2, (3, 2), 0.25, True), rtol=1e-9, atol=1e-9)
    (x1, y1, x2, y2), cells = (boxes[0].double() / 4).tolist(), torch.arange(18, dtype=torch.float64)
    ends = torch.linspace(x1, x2, 3, dtype=torch.float64)[:, None]
    xs = (antiderivative(ends[1:] - cells) - antiderivative(ends[:-1] - cells)) * 2 / (x2 - x1)
    ends = torch.linspace(y1, y2, 4, dtype=torch.float64)[:, None]
    ys = (antiderivative(ends[1:] - cells[:12]) - antiderivative(ends[:-1] - cells[:12])) * 3 / (y2 - y1)
    expected = torch.einsum("py,cyx,qx->cpq", ys, feature[0], xs)
    torch.testing.assert_close(out[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_agree_with_the_definition(dtype, layout):
    features = pyramid(STRIDES, image_size=SIZE, images=2, channels=20, dtype=dtype, layout=layout)
    boxes = [torch.cat((BOXES, *random_boxes([20], image_size=SIZE))), *random_boxes([9], seed=4)]
    boxes = [b.double() if dtype == torch.float64 else b for b in boxes]
    results = []
    for kind in (lambda t: t, lambda t: t, lambda t: t.double()):
        leaves = [kind(f).detach().requires_grad_() for f in features]
        given = [kind(b) for b in boxes]
        out = roialign.multiscale_roi_align(leaves, given, (3, 2), SCALES, "exact", canonical_scale=28)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(out.dtype)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
        if len(results) == 1:
            context = ops.use_reference()
            context.__enter__()
    context.__exit__(None, None, None)
    for actual, expected, truth in zip(*results, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        else:
            assert_within_budget(actual, truth=truth, reference=expected)


def test_gradients():
    features = [
        f.requires_grad_() for f in pyramid([8, 16], image_size=SIZE, channels=2, dtype=torch.float64)
    ]
    boxes = [BOXES[:5].double()]

    def pool(*maps):
        return roialign.multiscale_roi_align(maps, boxes, 2, [1 / 8, 1 / 16], "exact", canonical_scale=28)

    assert torch.autograd.gradcheck(pool, features)
    assert torch.autograd.gradgradcheck(pool, features)


def test_a_point_where_a_box_has_no_length():
    (feature,) = pyramid([1], image_size=(9, 9), channels=1)
    boxes = torch.tensor([[4.5, 3.5, 4.5, 3.5], [5.0, 2.5, 5.0, 6.5]])
    out = roialign.roi_align(feature, [boxes], 2, 1.0, "exact", aligned=True)
    torch.testing.assert_close(out[0], feature[0, :, 3:4, 4:5].expand(1, 2, 2))
    middle = (feature[0, 0, :, 4] + feature[0, 0, :, 5]) / 2
    upper = middle[2] / 4 + middle[3] / 2 + middle[4] / 4
    torch.testing.assert_close(out[1, 0, 0], upper.expand(2))


def test_modules():
    x = {"a": torch.rand(1, 3, 12, 18), "b": torch.rand(1, 3, 6, 9)}
    pooler = roialign.MultiScaleRoIAlign(["a", "b"], 2, "exact", scales=SCALES)
    out = pooler(x, [BOXES])
    assert "sampling_ratio=exact" in repr(pooler)
    expected = roialign.multiscale_roi_align(list(x.values()), [BOXES], 2, SCALES, "exact")
    assert torch.equal(out, expected)
    one = roialign.RoIAlign(2, 0.25, "exact")
    assert torch.equal(one(x["a"], [BOXES]), roialign.roi_align(x["a"], [BOXES], 2, 0.25, "exact"))


def test_compiled_and_exported():
    class Head(torch.nn.Module):
        def forward(self, feature, boxes):
            return roialign.roi_align(feature, [boxes], 3, 0.25, "exact")

    feature = torch.rand(1, 3, 12, 18)
    expected = Head()(feature, BOXES)
    assert torch.equal(torch.compile(Head(), fullgraph=True)(feature, BOXES), expected)
    program = torch.export.export(Head(), (feature, BOXES), dynamic_shapes=(None, {0: torch.export.Dim("k")}))
    assert torch.equal(program.module()(feature, BOXES[:4]), expected[:4])
    lowered = program.run_decompositions(roialign.decompositions())
    torch.testing.assert_close(lowered.module()(feature, BOXES[:4]), expected[:4])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_cannot_be_had_is_refused_by_name():
    feature = torch.rand(1, 3, 12, 18)
    with pytest.raises(ValueError, match=r'sampling_ratio must be an integer or "exact", got \'precise\''):
        roialign.roi_align(feature, [BOXES], 2, 0.25, "precise")
    with pytest.raises(ValueError, match="sampling_ratio"):
        roialign.MultiScaleRoIAlign(["a"], 2, "precise")
    pytest.importorskip("torchvision")
    for module in (roialign.RoIAlign(2, 0.25, "exact"), roialign.MultiScaleRoIAlign(["a"], 2, "exact")):
        with pytest.raises(TypeError, match="sampling_ratio must be an integer in TorchScript, got 'exact'"):
            torch.jit.script(module)
    with pytest.raises(TypeError, match="has no form in torchvision's operator"):
        torch.jit.trace(roialign.RoIAlign(2, 0.25, "exact"), (feature, torch.rand(3, 5)))
