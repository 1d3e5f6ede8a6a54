"""How tensors are described: strides of axes of size 1 name nothing."""

import math

import pytest
import torch

import roialign
from roialign import layout

SIZES = [(1, 1), (1, 7), (7, 1), (3, 4)]


def relaid(t: torch.Tensor, stride: int) -> torch.Tensor:
    """The same numbers, with another stride for every axis of size 1."""
    strides = [stride if size == 1 else old for size, old in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_of_axes_of_size_1_do_not_matter(memory_format, size, channels, images):
    t = torch.empty(images, channels, *size).contiguous(memory_format=memory_format)
    described = {
        (layout.strides(r), layout.is_channels_last(r)) for r in (relaid(t, s) for s in (0, 1, 7, 10**12))
    }
    assert len(described) == 1
    ((strides, last),) = described
    assert last == (memory_format == torch.channels_last and channels > 1 and math.prod(size) > 1)
    for stride, real, n in zip(strides, t.stride(), t.shape, strict=True):
        assert n == 1 or stride == real
    # The bins of a pooled tensor are one run.
    assert strides[2] == size[1] * strides[3]


@pytest.mark.parametrize("output_size", [(7, 1), (1, 7), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_of_one_row_or_column_of_bins(dtype, channels, output_size):
    """However it arrives: transposed, expanded, cut out, with strange strides where an axis has size 1."""
    x = torch.randn(2, channels, 12, 12).to(dtype).requires_grad_()
    boxes = [torch.tensor([[1.0, 1, 9, 9], [0, 0, 11, 11], [2, 3, 5, 6]]), torch.tensor([[4.0, 4, 8, 11]])]
    out = roialign.roi_align(x, boxes, output_size, 1.0, 2)
    grad = torch.randn(out.shape).to(dtype)
    (expected,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    for stride in (0, 1, 2, 7, 1000):
        assert torch.equal(torch.autograd.grad(out, x, relaid(grad, stride), retain_graph=True)[0], expected)
    turned = torch.autograd.grad(out.transpose(2, 3), x, grad.transpose(2, 3).contiguous(), retain_graph=True)
    assert torch.equal(turned[0], expected)
    last = grad.to(memory_format=torch.channels_last)
    assert torch.equal(torch.autograd.grad(out, x, last, retain_graph=True)[0], expected)


@pytest.mark.parametrize("stride", [0, 1, 9])
@pytest.mark.parametrize("axes", [(2,), (3,), (2, 3), (0, 1)])
def test_maps_with_axes_of_size_1(axes, stride):
    shape = [1 if axis in axes else size for axis, size in enumerate((2, 17, 9, 10))]
    x = torch.randn(shape)
    boxes = torch.tensor([[0.0, 1, 1, 6, 7], [0, -1, 0, 3, 3]])
    leaves = [t.requires_grad_() for t in (x, relaid(x, stride))]
    outs = [roialign.roi_align(leaf, boxes, 3, 1.0, 2) for leaf in leaves]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in zip(outs, leaves, strict=True)]
    assert torch.equal(*grads)
