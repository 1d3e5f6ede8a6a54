"""Under torch.func: gradients, a batch of feature sets, and compositions, held against loops and autograd."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import roialign
from roialign.testing import pyramid, random_boxes

SIZE = (32, 40)
STRIDES = [4, 8]
SCALES = [1 / s for s in STRIDES]
BOXES = random_boxes([4, 2], image_size=SIZE)


def maps(seed: int = 0, **options) -> list[torch.Tensor]:
    return pyramid(STRIDES, image_size=SIZE, images=2, channels=3, seed=seed, **options)


def stacked(count: int, dim: int = 0) -> list[torch.Tensor]:
    return [torch.stack(level, dim) for level in zip(*(maps(seed) for seed in range(count)), strict=True)]


def pool(*features: torch.Tensor, boxes=BOXES, **options) -> torch.Tensor:
    return roialign.multiscale_roi_align(features, boxes, (3, 2), SCALES, 2, canonical_scale=14, **options)


def loss(*features: torch.Tensor) -> torch.Tensor:
    return pool(*features).pow(3).sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_grad_is_that_of_autograd(layout):
    features = maps(layout=layout)
    leaves = [f.clone().requires_grad_() for f in features]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for actual, e in zip(grad(loss, argnums=(0, 1))(*features), expected, strict=True):
        assert torch.equal(actual, e)
        assert actual.stride() == e.stride()


def test_grad_of_grad():
    features = maps(dtype=torch.float64)

    def penalty(*features):
        return sum(g.pow(2).sum() for g in grad(loss, argnums=(0, 1))(*features))

    leaves = [f.clone().requires_grad_() for f in features]
    firsts = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    expected = torch.autograd.grad(sum(g.pow(2).sum() for g in firsts), leaves)
    for actual, e in zip(grad(penalty, argnums=(0, 1))(*features), expected, strict=True):
        torch.testing.assert_close(actual, e)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own forward mode uses it
def test_forward_mode_is_pooling_the_tangents():
    features, tangents = maps(), maps(seed=1)
    out, tangent = jvp(pool, tuple(features), tuple(tangents))
    assert torch.equal(out, pool(*features))
    assert torch.equal(tangent, pool(*tangents))
    _, tangent = jvp(lambda first: pool(first, features[1]), (features[0],), (tangents[0],))
    assert torch.equal(tangent, pool(tangents[0], torch.zeros_like(features[1])))


def test_jacrev_is_the_matrix_of_the_operator():
    features, (tangent, _) = maps(dtype=torch.float64), maps(seed=1, dtype=torch.float64)
    jacobian = jacrev(pool)(*features)
    expected = pool(tangent, torch.zeros_like(features[1]))
    torch.testing.assert_close(torch.tensordot(jacobian, tangent, 4), expected)


@pytest.mark.parametrize("dim", [0, 2, 4])
def test_vmap_over_feature_sets(dim):
    expected = torch.stack([pool(*maps(seed)) for seed in range(3)])
    torch.testing.assert_close(vmap(pool, in_dims=dim)(*stacked(3, dim)), expected)


def test_vmap_over_one_of_the_maps():
    first, second = stacked(3)
    expected = torch.stack([pool(f, second[0]) for f in first])
    torch.testing.assert_close(vmap(pool, in_dims=(0, None))(first, second[0]), expected)


@pytest.mark.parametrize("given_levels", [False, True])
@pytest.mark.parametrize("own_features", [False, True])
def test_vmap_over_boxes(own_features, given_levels):
    features = stacked(3) if own_features else maps()
    boxes = [
        torch.stack([random_boxes([count], image_size=SIZE, seed=s)[0] for s in range(3)]) for count in (4, 2)
    ]
    levels = torch.arange(18).view(3, 6) % 2

    def one(features, boxes, levels):
        return pool(*features, boxes=boxes, levels=levels if given_levels else None)

    def member(i):
        return one([f[i] for f in features] if own_features else features, [b[i] for b in boxes], levels[i])

    actual = vmap(one, in_dims=(0 if own_features else None, 0, 0))(features, boxes, levels)
    torch.testing.assert_close(actual, torch.stack([member(i) for i in range(3)]))


def test_an_image_that_does_not_exist_is_not_the_next_members():
    rois = torch.tensor([[[0.0, 0, 0, 9, 9]], [[0.0, 0, 0, 9, 9]]])
    rois[0, 0, 0] = 1.0  # each member has one image
    with pytest.raises(ValueError, match="must have its image index"):
        vmap(lambda f, r: roialign.roi_align(f, r, 2))(torch.rand(2, 1, 3, 8, 8), rois)


@pytest.mark.parametrize("batched", ["features", "boxes", "both"])
def test_gradients_per_sample(batched):
    dims = {"features": (0, None), "boxes": (None, 0), "both": (0, 0)}[batched]
    features = stacked(3) if dims[0] == 0 else maps()
    boxes = [torch.stack([random_boxes([4], image_size=SIZE, seed=s)[0] for s in range(3)])]
    if dims[1] is None:
        boxes = [boxes[0][0]]

    def loss(features, boxes):
        return pool(*features, boxes=boxes).pow(2).sum()

    actual = vmap(grad(loss), in_dims=dims)(features, boxes)
    for i in range(3):
        own = [f[i] for f in features] if dims[0] == 0 else features
        expected = grad(loss)(own, [b[i] for b in boxes] if dims[1] == 0 else boxes)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[i], e)


def test_vjp_under_vmap_is_the_adjoint():
    features = maps(dtype=torch.float64)
    out, pull = vjp(pool, *features)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    for g, f in zip(vmap(pull)(cotangents), features, strict=True):
        assert g.shape == (3, *f.shape)
    dots = [(c * out).sum() for c in cotangents]
    pulled = vmap(pull)(cotangents)
    for i, dot in enumerate(dots):
        torch.testing.assert_close(sum((g[i] * f).sum() for g, f in zip(pulled, features, strict=True)), dot)


def test_functional_call_and_grad_in_the_parameters():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Conv2d(3, 2, 1)
            self.pool = roialign.MultiScaleRoIAlign(["0", "1"], 2, 2)

        def forward(self, features):
            return self.pool(dict(zip("01", map(self.scale, features), strict=True)), BOXES, [SIZE] * 2)

    head, features = Head(), maps()
    params = dict(head.named_parameters())
    actual = grad(lambda p: functional_call(head, p, (features,)).square().sum())(params)
    head(features).square().sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad)


def test_compiled_gradient():
    torch._dynamo.reset()
    features = maps()
    compiled = torch.compile(grad(loss, argnums=(0, 1)), backend="aot_eager", fullgraph=True)
    for actual, e in zip(compiled(*features), grad(loss, argnums=(0, 1))(*features), strict=True):
        torch.testing.assert_close(actual, e)


# forward mode and batches of gradients, without and with torch.func; boxes close over


X = torch.randn(1, 2, 6, 6, dtype=torch.float64)
TANGENT = torch.randn_like(X)
REGIONS = torch.tensor([[0, 1, 1, 4, 4], [0, 0, 0, 5, 5]], dtype=torch.float64)


def pool_x(x):
    return roialign.roi_align(x, REGIONS, (2, 3), 0.5, 2)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(requires_grad):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X.clone().requires_grad_(requires_grad), TANGENT)
        value, tangent = forward_ad.unpack_dual(pool_x(dual))
    torch.testing.assert_close(value, pool_x(X))
    torch.testing.assert_close(tangent, pool_x(TANGENT))


def test_dual_numbers_on_some_of_the_maps_and_of_the_gradient():
    """The derivative of backward, and maps without a tangent."""
    other = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([0, 1])

    def pool(x, y):
        boxes = [REGIONS[:, 1:]]
        return roialign.multiscale_roi_align([x, y], boxes, 2, [0.5, 0.25], 2, levels=levels)

    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(), TANGENT)
        out = pool(x, other)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, pool(TANGENT, other * 0))
        square = (out * out).sum()
        grads = torch.autograd.grad(square, (x, other))
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    leaves = X.clone().requires_grad_(), other
    expected = torch.autograd.grad((2 * pool(*leaves) * pool(TANGENT, other.detach() * 0)).sum(), leaves)
    for tangent, e in zip(tangents, expected, strict=True):
        torch.testing.assert_close(tangent, e)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # PyTorch's own
def test_linearize():
    value, linear = torch.func.linearize(pool_x, X)
    torch.testing.assert_close(value, pool_x(X))
    torch.testing.assert_close(linear(TANGENT), pool_x(TANGENT))


@pytest.mark.filterwarnings("ignore:We've integrated functorch into PyTorch")
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_jacobian_vectorized(strategy):
    def jacobian(**options):
        return torch.autograd.functional.jacobian(pool_x, X, **options)

    torch.testing.assert_close(jacobian(vectorize=True, strategy=strategy), jacobian())


def test_a_batch_of_gradients():
    leaf = X.clone().requires_grad_()
    out = pool_x(leaf)
    grads = torch.randn(5, *out.shape, dtype=torch.float64)
    (batch,) = torch.autograd.grad(out, leaf, grads, is_grads_batched=True, retain_graph=True)
    for one, g in zip(batch, grads, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, leaf, g, retain_graph=True)[0])


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap` instead")  # PyTorch's own, in 2.6
def test_gradcheck_of_every_kind():
    leaf = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(pool_x, leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(pool_x, leaf, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: pool_x(x).pow(2), leaf, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_functionalize():
    torch.testing.assert_close(torch.func.functionalize(pool_x)(X), pool_x(X))

    def of_a_list(x):
        return roialign.multiscale_roi_align([x, x * 2], [REGIONS[:, 1:]], 2, [0.5, 0.25], 2)

    torch.testing.assert_close(torch.func.functionalize(of_a_list)(X), of_a_list(X))


@pytest.mark.parametrize("way", ["dual numbers", "jvp"])
def test_a_tangent_of_boxes_is_refused_by_name(way):
    boxes = REGIONS[:, 1:]

    def pool(boxes):
        return roialign.roi_align(X, [boxes], 2, 0.5, 2)

    def dual(boxes):
        with forward_ad.dual_level():
            return pool(forward_ad.make_dual(boxes, torch.ones_like(boxes)))

    def jvp(boxes):
        return torch.func.jvp(pool, (boxes,), (torch.ones_like(boxes),))

    with pytest.raises(NotImplementedError, match="boxes must not carry a tangent"):
        (jvp if way == "jvp" else dual)(boxes)
