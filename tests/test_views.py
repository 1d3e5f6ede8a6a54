"""Gradients that come back through views of what was pooled, whose strides are no tensor's of its shape.

A stride says nothing along an axis of size 1, and `is_contiguous` does not look at it: nor may an engine.
"""

import pytest
import torch

import roialign
from roialign import ops
from roialign.testing import pyramid

SIZES = [(7, 1), (1, 7), (1, 1), (7, 7)]
BOXES = [torch.tensor([[1.0, 1, 9, 9], [0, 0, 11, 11], [2, 3, 5, 6], [4, 4, 8, 11], [0, 2, 7, 9]])]
CHANNELS = (1, 16, 64)
VIEWS = {
    "transposed": lambda t: t.transpose(2, 3),
    "channels last": lambda t: t.permute(0, 2, 3, 1),
    "all turned": lambda t: t.permute(3, 2, 1, 0),
}


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gradient_of_loss(feature, output_size, view):
    leaf = feature.detach().requires_grad_()
    pooled = view(roialign.roi_align(leaf, BOXES, output_size, 1.0, 2))
    return torch.autograd.grad((pooled * noise(*pooled.shape, dtype=leaf.dtype)).sum(), leaf)[0]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("output_size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_a_loss_of_a_view(dtype, output_size, view):
    for channels in CHANNELS:
        for layout in ("contiguous", "channels_last"):
            (feature,) = pyramid([1], image_size=(12, 12), channels=channels, dtype=dtype, layout=layout)
            actual = gradient_of_loss(feature, output_size, view)
            with ops.use_reference():
                expected = gradient_of_loss(feature, output_size, lambda t: view(t.clone()))
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("strides", [(0, 0, 0, 0), (1, 1, 1, 1), (1000,) * 4, (7, 1, 1000, 0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 6, 1), (1, 16, 1, 6), (1, 1, 5, 6), (1, 64, 1, 1), (1, 1, 1, 1)])
def test_strides_of_axes_of_size_1(shape, strides):
    """Of maps, boxes, levels and gradients."""

    def restride(t):
        lone = zip(t.shape, t.stride(), strides, strict=False)
        return t.as_strided(t.shape, [new if size == 1 else old for size, old, new in lone])

    feature, box = noise(*shape), torch.tensor([[0.0, 0, 0, 4, 4]]).double()
    grad, level = noise(1, shape[1], *shape[2:]), torch.tensor([0])

    def pool(lay):
        leaf = lay(feature).detach().requires_grad_()
        boxes = [lay(box[:, 1:].contiguous())]
        one = roialign.roi_align(leaf, lay(box), shape[2:], 1.0, 2)
        other = roialign.multiscale_roi_align([leaf], boxes, shape[2:], [1.0], 2, levels=lay(level))
        return [one, other, *torch.autograd.grad([one, other], leaf, [lay(grad), lay(grad)])]

    for actual, expected in zip(pool(restride), pool(torch.Tensor.contiguous), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_loss_of_a_view_compiled(backend):
    sizes = SIZES[:3]
    features = [pyramid([1], image_size=(12, 12), channels=8, dtype=dtype)[0] for dtype in ops.DTYPES]
    if backend == "inductor":  # takes its time
        sizes, features = sizes[:1], features[:1]
    for output_size in sizes:
        torch._dynamo.reset()

        def loss(leaf, weight, output_size=output_size):
            pooled = roialign.roi_align(leaf, BOXES, output_size, 1.0, 2).transpose(2, 3)
            return (pooled * weight).sum()

        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        for feature in features:
            leaf = feature.detach().requires_grad_()
            weight = noise(5, 8, *reversed(output_size), dtype=leaf.dtype)
            (actual,) = torch.autograd.grad(compiled(leaf, weight), leaf)
            with ops.use_reference():
                (expected,) = torch.autograd.grad(loss(leaf, weight), leaf)
            torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()
