"""Where poolers are found in a model, and what is said of those that `convert_poolers` leaves."""

import collections
import copy
import re

import pytest
import torch
from torch import nn
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

import roialign
import roialign.torchvision
from roialign import convert_poolers
from roialign.convert import FoundPooler, find_poolers

OURS = roialign.torchvision.MultiScaleRoIAlign
# A pyramid with a gap and a box for the map that is not there: torchvision gives zeros.
TELLING = (
    {"a": torch.ones(1, 1, 64, 64), "b": torch.ones(1, 1, 16, 16)},
    [torch.tensor([[10.0, 10.0, 500.0, 500.0]])],
    [(512, 512)],
)


def pooler() -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["a", "b"], 1, 2)


class Holder(nn.Module):
    """Holds what it is given as attributes, in the manner of `self.name = value`."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, boxes, image_shapes):
        return self.pool(x, boxes, image_shapes)


class Own(MultiScaleRoIAlign):
    pass


Pair = collections.namedtuple("Pair", ["box", "mask"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcomes(model: nn.Module) -> dict[str, str]:
    return {place.name: place.outcome for place in find_poolers(model)}


def test_the_probe_tells_them_apart():
    assert pooler()(*TELLING).item() == 0
    assert OURS(["a", "b"], 1, 2)(*TELLING).item() == 1


def test_one_pooler_under_two_names_of_one_parent():
    shared = pooler()
    model = convert_poolers(Holder(box_pool=shared, mask_pool=shared))
    assert type(model.box_pool) is OURS
    assert model.mask_pool is model.box_pool
    assert outcomes(model) == {"box_pool": "ours", "mask_pool": "ours"}


def inside_itself():
    cycle = [pooler()]
    cycle.append((cycle,))
    return cycle


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (lambda: [pooler(), RoIAlign(1, 1.0, 2)], ["[0]", "[1]"]),
        (lambda: (pooler(), None, [pooler()]), ["[0]", "[2][0]"]),
        (lambda: {"box": pooler(), 3: {"mask": [pooler()]}}, ["['box']", "[3]['mask'][0]"]),
        (lambda: Pair(pooler(), 2), ["[0]"]),
        (lambda: collections.deque([collections.OrderedDict(a=pooler())]), ["[0]['a']"]),
        (lambda: {pooler()}, ["[0]"]),
        (lambda: [nn.Sequential(nn.ReLU(), pooler())], ["[0].1"]),
        (inside_itself, ["[0]"]),
    ],
    ids=["list", "tuple", "dict", "namedtuple", "deque", "set", "module in a list", "list in itself"],
)
def test_poolers_in_plain_containers(held, names):
    held = held()
    model = Holder(pools=held, again=held)
    assert outcomes(model) == {f"pools{name}": "convertible" for name in names}
    places = find_poolers(model)
    assert convert_poolers(model) is model
    assert outcomes(model) == {f"pools{name}": "ours" for name in names}
    assert [place.module for place in find_poolers(model)] == [place.module for place in places]
    assert model.pools is model.again is held


def test_poolers_in_attributes_that_are_no_submodules():
    model = Holder(head=Holder())
    model.head.__dict__.update(pool=pooler(), parent=model)  # unregistered, and a way back
    convert_poolers(model)
    assert outcomes(model) == {"head.pool": "ours"}
    assert model.head(*TELLING).item() == 1


def test_nothing_is_computed_to_find_poolers():
    class Touchy(Holder):
        @property
        def pool_of_the_day(self):
            raise AssertionError("asked")

        def __getattr__(self, name):
            raise AssertionError(name)

    class Proxy:
        __class__ = property(lambda self: pytest.fail("asked"))

    model = Touchy(proxies=[Proxy()])
    vars(model)["proxy"] = Proxy()
    assert find_poolers(model) == []


def test_bound_methods_and_closures_follow():
    """What holds the pooler where nobody can look holds it still."""
    model = Holder(pool=pooler())
    call, inner = model.pool.__call__, model.pool
    convert_poolers(model)
    assert call(*TELLING).item() == 1
    assert inner is model.pool


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("how", ["model", "pooler", "pooler in place"])
@pytest.mark.filterwarnings("ignore:Graph break")
def test_compiled_before_it_is_converted(how, used_before):
    model = Holder(pool=pooler())
    if how == "pooler in place":
        model.pool.compile(backend="eager")
    elif how == "pooler":
        model.pool = torch.compile(model.pool, backend="eager")
    compiled = torch.compile(model, backend="eager") if how == "model" else model
    if used_before:
        assert compiled(*TELLING).item() == 0
    assert convert_poolers(compiled) is compiled
    assert compiled(*TELLING).item() == 1


def replaced_forward():
    patched = pooler()
    original = patched.forward
    patched.forward = lambda *args: original(*args)
    return patched


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (replaced_forward, "its forward was replaced on the instance: convert before that"),
        (lambda: Own(["a"], 1, 2), f"its class, {__name__}.Own, is a subclass of torchvision's"),
        (lambda: torch.jit.script(RoIAlign(1, 1.0, 2)), "TorchScript has compiled it: convert before that"),
        (lambda: torch.jit.script(pooler()), "TorchScript has compiled it: convert before that"),
    ],
    ids=["replaced forward", "subclass", "TorchScript", "TorchScript, multiscale"],
)
def test_what_is_left_is_named(module, reason):
    module = module()
    state, model = dict(vars(module)), Holder(head=Holder(pool=module), other=pooler())
    message = f"convert_poolers left poolers of torchvision: head.pool ({reason})"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        assert convert_poolers(model) is model
    assert caught[0].filename == __file__
    assert type(model.other) is OURS
    assert model.head.pool is module
    assert dict(vars(module)) == state
    assert find_poolers(model) == [
        FoundPooler("head.pool", module, "left", reason),
        FoundPooler("other", model.other, "ours"),
    ]


def test_all_that_is_left_stands_in_one_warning():
    model = Holder(pools=[Own(["a"], 1, 2), replaced_forward()])
    with pytest.warns(UserWarning, match=r"pools\[0\] \(.*subclass.*\); pools\[1\] \(its forward") as caught:
        convert_poolers(model)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"the model itself \(its class"):
        convert_poolers(model.pools[0])


def test_a_subclass_of_ours_is_ours():
    class OwnOfOurs(OURS):
        pass

    assert outcomes(convert_poolers(OwnOfOurs(["a"], 1, 2))) == {"": "ours"}


def test_torchvisions_class_is_known_also_where_ours_stands_in_its_place(monkeypatch):
    model = Holder(pool=pooler())
    monkeypatch.setattr("torchvision.ops.MultiScaleRoIAlign", OURS)
    monkeypatch.setattr("torchvision.ops.poolers.MultiScaleRoIAlign", OURS)
    assert convert_poolers(model)(*TELLING).item() == 1


def test_a_module_without_its_constructor_run():
    assert find_poolers(Holder.__new__(Holder)) == []


def test_copies_of_a_converted_model_are_converted():
    model = convert_poolers(Holder(pool=pooler()))
    assert outcomes(copy.deepcopy(model)) == {"pool": "ours"}
