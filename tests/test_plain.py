"""Past the dispatcher only where it has nothing to do: whoever has a say in a call still has it."""

import enum
import math
import threading
import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import roialign
from roialign import ops, plain, reference, schema
from roialign.levels import staircase
from roialign.testing import pyramid, random_boxes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.:FutureWarning", "ignore::torch.jit.TracerWarning", "ignore:.*prototype:UserWarning"
)

SIZE = (32, 40)
SCALES = [1 / 4, 1 / 8]
BOXES = random_boxes([4, 2], image_size=SIZE)
FORWARD, BACKWARD = "roialign::multiscale_roi_align", "roialign::multiscale_roi_align_backward"


def maps(**options) -> list[Tensor]:
    return pyramid([4, 8], image_size=SIZE, images=2, channels=3, **options)


def leaves() -> list[Tensor]:
    return [f.requires_grad_() for f in maps()]


def pool(features, boxes=BOXES) -> Tensor:
    return roialign.multiscale_roi_align(features, boxes, (3, 2), SCALES, 2, canonical_scale=14)


def pool_and_back(features) -> Tensor:
    out = pool(features)
    out.sum().backward()
    return out


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The operators that were called for, rather than their kernels."""
    called = []

    def noting(name, operator):
        return lambda *args: called.append(name) or operator(*args)

    for name in ("pool", "scatter"):
        monkeypatch.setattr(schema, name, noting(name, getattr(schema, name)))
    return called


class Two(enum.IntEnum):
    TWO = 2


class Half(float):
    pass


class Subclass(Tensor):
    pass


class ParameterSubclass(torch.nn.Parameter):
    pass


def complex_maps() -> list[Tensor]:
    return [torch.complex(f, -f) for f in maps()]


def wrapper_that_outlived_its_transform() -> Tensor:
    kept = []
    torch.func.vmap(lambda t: kept.append(t) or t)(torch.rand(2, 3))
    return kept[0]


PLAIN = {
    "a tensor": lambda: torch.rand(2),
    "float64": lambda: torch.rand(2, dtype=torch.float64),
    "bfloat16": lambda: torch.rand(2, dtype=torch.bfloat16),
    "a view": lambda: torch.rand(3, 3).t()[1:],
    "a leaf": lambda: torch.rand(2, requires_grad=True),
    "a result": lambda: torch.rand(2, requires_grad=True) * 2,
    "a parameter": lambda: torch.nn.Parameter(torch.rand(2)),
    "the real part of a conjugate": lambda: complex_maps()[0].conj().real,
}
STRANGE = {
    "a negative view": lambda: complex_maps()[0].conj().imag,
    "a conjugate": lambda: complex_maps()[0].conj(),
    "functional": lambda: torch._to_functional_tensor(torch.rand(2)),
    "zeros without memory": lambda: torch._efficientzerotensor((2,)),
    "on another device": lambda: torch.rand(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.quint8),
    "fake": lambda: FakeTensorMode().from_tensor(torch.rand(2)),
    "a subclass": lambda: torch.rand(2).as_subclass(Subclass),
    "a subclass of Parameter": lambda: ParameterSubclass(torch.rand(2)),
    "outlived its transform": wrapper_that_outlived_its_transform,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors(kind):
    assert plain.is_plain([torch.rand(1), PLAIN[kind]()])


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_tensors(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strange = STRANGE[kind]()
    assert not plain.is_plain([torch.rand(1), strange])
    assert plain.is_plain([torch.rand(1)])


def pool_with_hooks() -> Tensor:
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return pool_and_back(leaves())


def pool_looking_for_anomalies() -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return pool_and_back(leaves())


WITHOUT_OPERATOR = {
    "eager": lambda: pool(maps()),
    "no_grad": lambda: torch.no_grad()(pool)(leaves()),
    "inference mode": lambda: torch.inference_mode()(lambda: pool(maps()))(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(pool)(maps()),
    "recorded": lambda: pool(leaves()),
    "backward": lambda: pool_and_back(leaves()),
    "one of the maps": lambda: pool_and_back([maps()[0], leaves()[1]]),
    "a parameter": lambda: pool_and_back([torch.nn.Parameter(f) for f in maps()]),
    "saved tensors": pool_with_hooks,
    "anomaly mode": pool_looking_for_anomalies,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("situation", WITHOUT_OPERATOR)
def test_without_the_operator(situation, calls):
    WITHOUT_OPERATOR[situation]()
    assert calls == []


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operators():
    with Dispatches() as mode:
        pool_and_back(leaves())
    assert {FORWARD, BACKWARD} <= mode.seen
    with torch.no_grad(), Dispatches() as mode:
        pool(maps())
    assert FORWARD in mode.seen


def test_a_mode_of_backward_only_sees_its_operator():
    out = pool(leaves())
    with Dispatches() as mode:
        out.sum().backward()
    assert BACKWARD in mode.seen


def test_a_mode_of_another_thread_sees_nothing():
    thread = threading.Thread(target=pool, args=(maps(),))
    with Dispatches() as mode:
        thread.start()
        thread.join()
    assert mode.seen == set()


def test_function_modes_see_the_operator():
    with Functions() as mode:
        pool(maps())
    assert FORWARD.replace("::", ".") + ".default" in mode.seen


def test_flops_are_counted():
    def flops(*_args, out_shape, **_kwargs):
        return math.prod(out_shape)

    mapping = {torch.ops.roialign.multiscale_roi_align: flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = pool(maps())
    assert counter.get_total_flops() == out.numel()


@pytest.mark.parametrize("profile", [torch.autograd.profiler.profile, torch.profiler.profile])
def test_profiles_show_the_operators(profile):
    with profile() as profiled:
        pool_and_back(leaves())
    assert {FORWARD, BACKWARD} <= {event.key for event in profiled.key_averages()}


def test_traces_hold_the_operator():
    feature, boxes = maps()[0], BOXES[0]

    def align(feature, boxes):
        return roialign.roi_align(feature, [boxes], 2, 1 / 4, 2)

    assert "torchvision::roi_align" in str(torch.jit.trace(align, (feature, boxes)).graph)
    for tracing_mode in ("real", "fake", "symbolic"):
        assert (
            "roialign.multiscale_roi_align" in make_fx(align, tracing_mode=tracing_mode)(feature, boxes).code
        )


def pool_on_a_default_device() -> Tensor:
    with torch.device("cpu"):
        return pool(maps())


def dual() -> Tensor:
    with forward_ad.dual_level():
        return pool([forward_ad.make_dual(f, f) for f in maps()])


def vmapped() -> Tensor:
    return torch.func.vmap(lambda *features: pool(features))(*(torch.stack([f, f]) for f in maps()))


def fake() -> Tensor:
    with FakeTensorMode() as mode:
        out = pool([mode.from_tensor(f) for f in maps()], [mode.from_tensor(b) for b in BOXES])
    assert type(out) is not Tensor
    return out


WITH_OPERATOR = {
    "vmap": vmapped,
    "grad": lambda: torch.func.grad(lambda f, g: pool([f, g]).sum())(*maps()),
    "jvp": lambda: torch.func.jvp(lambda *f: pool(f), tuple(maps()), tuple(maps())),
    "functionalize": lambda: torch.func.functionalize(lambda *f: pool(f))(*maps()),
    "dual numbers": dual,
    "fake tensors": fake,
    "a subclass": lambda: pool([f.as_subclass(Subclass) for f in maps()]),
    "a negative view": lambda: pool([f.conj().imag for f in complex_maps()]),
    "a default device": pool_on_a_default_device,
}


@pytest.mark.parametrize("situation", WITH_OPERATOR)
def test_with_the_operator(situation, calls):
    WITH_OPERATOR[situation]()
    assert "pool" in calls


def test_a_negative_view_is_pooled_as_what_it_means():
    features = [f.conj().imag for f in complex_maps()]
    assert torch.equal(pool(features), pool([f.resolve_neg() for f in features]))
    boxes = [torch.complex(b, -b).conj().imag for b in BOXES]
    assert boxes[0].is_neg()
    assert torch.equal(pool(maps(), boxes), pool(maps()))


def test_a_subclass_comes_back():
    out = pool([f.as_subclass(Subclass) for f in maps()])
    assert type(out) is Subclass
    assert torch.equal(out.as_subclass(Tensor), pool(maps()))


# the same results


def test_numbers_of_classes_of_their_own_are_plain_numbers_to_the_engine():
    """As the operator makes them."""
    boxes = [b[:1] for b in BOXES]
    actual = roialign.roi_align(maps()[0], boxes, (Two.TWO, Two.TWO), Half(0.5), Two.TWO, True)
    assert torch.equal(actual, roialign.roi_align(maps()[0], boxes, 2, 0.5, 2, True))


@pytest.fixture(params=[True, False], ids=["either", "operator"])
def either_way(request, monkeypatch):
    """Also of a PyTorch that does not say what it does, where every call is one of the operator."""
    monkeypatch.setattr(plain, "_complete", request.param and plain._complete)


def test_first_and_second_derivatives_are_those_of_the_operator(monkeypatch, calls):
    def derivatives():
        features = leaves()
        out = pool(features)
        firsts = torch.autograd.grad(out.pow(3).sum(), features, create_graph=True)
        seconds = torch.autograd.grad(sum(f.pow(2).sum() for f in firsts), features)
        return [out, *firsts, *seconds]

    actual = derivatives()
    assert set(calls) == {"scatter", "pool"}  # where a graph is made of the first, and for the second
    monkeypatch.setattr(plain, "_complete", False)
    for a, e in zip(actual, derivatives(), strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.usefixtures("either_way")
def test_what_is_recorded():
    assert pool(maps()).grad_fn is None
    assert torch.no_grad()(pool)(leaves()).grad_fn is None
    assert pool([maps()[0], leaves()[1]]).requires_grad
    assert pool(maps(), [b.clone().requires_grad_() for b in BOXES]).requires_grad
    with torch.inference_mode():
        assert pool(maps()).is_inference()
    with torch._C._AutoDispatchBelowAutograd():  # as within an operator
        assert pool(leaves()).grad_fn is None


@pytest.mark.usefixtures("either_way")
def test_no_map_is_saved_and_hooks_have_what_is():
    features, saved = leaves(), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t.double(), lambda t: t.float()):
        out = pool(features)
    out.sum().backward()
    assert [t.shape for t in saved if t.dtype == torch.float32][:1] == [(6, 5)]
    assert sum(t.numel() for t in saved) <= 2 * 30
    expected = leaves()
    pool(expected).sum().backward()
    assert torch.equal(features[0].grad, expected[0].grad)


@pytest.mark.usefixtures("either_way")
def test_what_hooks_make_of_saved_boxes_is_not_trusted():
    with saved_tensors_hooks(lambda t: t, lambda t: t[:2]):
        out = pool(leaves())
        with pytest.raises(ValueError, match=r"grad must have shape \(K, C"):
            out.sum().backward()


@pytest.mark.usefixtures("either_way", "engine")
@pytest.mark.parametrize("recorded", [False, True])
def test_images_that_do_not_exist_are_refused_by_row(recorded):
    rois = torch.tensor([[0.0, 1, 1, 9, 9], [1.0, torch.nan, 1, 9, 9], [2.0, 1, 1, 9, 9]])
    feature = torch.rand(2, 3, 8, 8, requires_grad=recorded)
    with pytest.raises(ValueError, match=r"boxes\[2\] must have its image index in \[0, 2\), got 2"):
        roialign.roi_align(feature, rois, 2)
    out = roialign.roi_align(feature, rois[:2], 2)
    assert out[1].isnan().all()
    with pytest.raises(ValueError, match=r"boxes\[2\]"):
        roialign.roi_align(feature[:, :0], rois, 2)  # no channels, so nothing to pool


def test_engines_say_whether_a_roi_was_lost(monkeypatch):
    pooling = schema.Pooling((2, 2), SCALES, 2, False, *staircase(SCALES, 14, 4, torch.float32))
    sound = torch.tensor([[0.0, 1, 1, 9, 9], [1.0, 3, 1, 9, 30]])
    out = torch.empty(2, 3, 2, 2)
    for row, column, value in [(1, 0, 2.0), (0, 0, -1.0), (1, 0, torch.nan), (0, 3, torch.inf)]:
        rois = sound.clone()
        rois[row, column] = value
        assert ops.engine("cpu").forward(out, maps(), rois, None, pooling) in (True, None)
    assert ops.engine("cpu").forward(out, maps(), sound, torch.tensor([0, 2]), pooling) in (True, None)
    assert reference.forward(out, maps(), sound, None, pooling) is None
    if ops.engine("cpu") is not reference:
        assert ops.engine("cpu").forward(out, maps(), sound, None, pooling) is False
        monkeypatch.setattr(ops, "_check_rows", None)  # need not be called
        pool(maps())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int16, torch.uint8])
def test_boxes_are_joined_as_by_the_operators_of_pytorch(dtype, monkeypatch):
    boxes = [(b * 3).to(dtype) for b in random_boxes([3, 0, 2], image_size=SIZE)]
    features = [torch.cat((f, f)) for f in maps()]
    joined = roialign.functional._rois_of_lists(boxes, features)
    monkeypatch.setattr(plain, "_complete", False)
    assert torch.equal(joined, roialign.functional._rois_of_lists(boxes, features))
    assert joined.dtype == torch.float32
