"""Every argument of every public callable, given every kind of thing that it is not."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import roialign

MAPS = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)]
BOXES = [torch.tensor([[4.0, 4.0, 40.0, 30.0]]), torch.tensor([[0.0, 8.0, 9.0, 60.0]])]


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says PyTorch
        return torch.nested.nested_tensor([torch.rand(3, 8, 8), torch.rand(3, 8, 9)], layout=layout)


def compressed() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(5).to_sparse_csr()


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.linspace(0, 25, 384).reshape(2, 3, 8, 8), 0.1, 0, torch.quint8)


class Whole(int):
    """A class of numbers is no number, and as a function it gives no tensor."""

    def __new__(cls, *_arguments):
        return super().__new__(cls, 1)


KINDS = {  # made anew for each call, for a generator is read once
    "None": lambda: None,
    "string": lambda: "a",
    "empty string": lambda: "",
    "bytes": lambda: b"ab",
    "float": lambda: 0.5,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "complex": lambda: 1 + 2j,
    "bool": lambda: True,
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "NumPy integer": lambda: np.int64(2),
    "NumPy float": lambda: np.float32(0.5),
    "NumPy bool": lambda: np.bool_(True),
    "pair": lambda: (2, 3),
    "pair of NumPy integers": lambda: (np.int64(2), np.int64(3)),
    "pair of floats": lambda: [0.5, 0.25],
    "empty list": list,
    "nested list": lambda: [[1, 2], [3, 4]],
    "list of None": lambda: [None, None],
    "list of strings": lambda: ["0.5", "2"],
    "list of bools": lambda: [True, True],
    "list of objects": lambda: [object(), object()],
    "list of lists of strings": lambda: [["a", "b"], ["c", "d"]],
    "list of rank 0": lambda: [torch.tensor(2), torch.tensor(3)],
    "list of sparse": lambda: [torch.rand(2, 4).to_sparse()],
    "list of nested": lambda: [nested(torch.strided)],
    "list of sparse maps": lambda: [MAPS[0].to_sparse(), MAPS[1].to_sparse()],
    "list of complex boxes": lambda: [torch.rand(1, 4, dtype=torch.complex64)],
    "list of quantised": lambda: [quantised(), quantised()],
    "dict": lambda: {0: 0.5, 1: 0.25},
    "dict of None": lambda: {"a": None, "b": None},
    "dict of lists": lambda: {"a": [1], "b": [2]},
    "dict of sparse": lambda: {"a": MAPS[0].to_sparse(), "b": MAPS[1].to_sparse()},
    "dict of quantised": lambda: {"a": quantised(), "b": quantised()},
    "keys": lambda: {"a": 0, "b": 1}.keys(),
    "generator": lambda: (name for name in "ab"),
    "generator of numbers": lambda: (s for s in (0.5, 0.25)),
    "set": lambda: {2, 3},
    "object": object,
    "class": lambda: Whole,
    "function of None": lambda: lambda boxes: None,
    "function of a float tensor": lambda: lambda boxes: torch.zeros(2),
    "function of too few": lambda: lambda boxes: torch.zeros(1, dtype=torch.int64),
    "function of a sparse tensor": lambda: lambda boxes: torch.tensor([0, 1]).to_sparse(),
    "array": lambda: np.array([2, 3]),
    "array of rank 0": lambda: np.array(2),
    "array of rank 2": lambda: np.array([[64, 64]]),
    "array of strings": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, object()]),
    "tensor of rank 0": lambda: torch.tensor(2),
    "floating tensor of rank 0": lambda: torch.tensor(0.5),
    "complex tensor of rank 0": lambda: torch.tensor(2 + 0j),
    "sparse tensor of rank 0": lambda: torch.tensor(2.0).to_sparse(),
    "meta tensor of rank 0": lambda: torch.tensor(2, device="meta"),
    "tensor of rank 1": lambda: torch.tensor([2, 3]),
    "floating tensor of rank 1": lambda: torch.tensor([0.5, 0.25]),
    "tensor of one": lambda: torch.tensor([2]),
    "tensor of rank 2": lambda: torch.zeros(2, 2),
    "tensor of rank 3": lambda: torch.zeros(2, 3, 4),
    "tensor of rank 5": lambda: torch.zeros(1, 2, 3, 4, 4),
    "sparse tensor": lambda: torch.rand(2, 5).to_sparse(),
    "compressed tensor": compressed,
    "sparse map": lambda: MAPS[0].to_sparse(),
    "map of oneDNN": lambda: MAPS[0].to_mkldnn(),
    "complex tensor": lambda: torch.zeros(2, 5, dtype=torch.complex64),
    "complex map": lambda: MAPS[0] + 0j,
    "integer map": lambda: MAPS[0].to(torch.uint8),
    "quantised map": quantised,
    "nested tensor": lambda: nested(torch.strided),
    "jagged tensor": lambda: nested(torch.jagged),
}

MULTISCALE = {
    "features": MAPS,
    "boxes": BOXES,
    "output_size": 3,
    "scales": [1 / 4, 1 / 8],
    "sampling_ratio": 2,
    "aligned": False,
    "canonical_scale": 28,
    "canonical_level": 3,
    "levels": None,
}
SINGLE = {
    "input": MAPS[0],
    "boxes": BOXES,
    "output_size": 3,
    "spatial_scale": 1 / 4,
    "sampling_ratio": 2,
    "aligned": False,
}
CONSTRUCTOR = {
    "featmap_names": ["a", "b"],
    "output_size": 3,
    "sampling_ratio": 2,
    "canonical_scale": 28,
    "canonical_level": 3,
    "aligned": False,
    "scales": None,
    "map_levels": None,
}
FORWARD = {
    "x": dict(zip("ab", MAPS, strict=True)),
    "boxes": BOXES,
    "image_shapes": [(8, 8), (8, 8)],  # maps finer than images, so that scales above 1 are right
}


def pool_with_module(**arguments):
    options = {name: value for name, value in arguments.items() if name not in FORWARD}
    pooler = roialign.MultiScaleRoIAlign(**options)
    first, second = (pooler(*(arguments[name] for name in FORWARD)) for _ in range(2))
    assert torch.equal(first, second)  # nothing that it was given has been used up
    return first


def align_with_module(input, boxes, **options):
    return roialign.RoIAlign(**options)(input, boxes)


MAPPER = {"k_min": 2, "k_max": 5, "canonical_scale": 28, "canonical_level": 3, "eps": 1e-6, "boxlists": BOXES}


def map_levels(boxlists, **options):
    return roialign.LevelMapper(**options)(boxlists)


CALLS = {
    "LevelMapper": (map_levels, MAPPER),
    "multiscale_roi_align": (roialign.multiscale_roi_align, MULTISCALE),
    "roi_align": (roialign.roi_align, SINGLE),
    "RoIAlign": (align_with_module, SINGLE),
    "MultiScaleRoIAlign": (pool_with_module, CONSTRUCTOR | FORWARD),
}

PAIRS = ("pair", "pair of NumPy integers", "list of rank 0", "array", "tensor of rank 1")
PAIRS_OF_FLOATS = ("pair of floats", "generator of numbers", "floating tensor of rank 1")

# What is taken as well, and what it means. Nothing else may give a result.
TAKEN = {
    "output_size": {"NumPy integer": 2} | dict.fromkeys(PAIRS, (2, 3)),
    "sampling_ratio": {
        "minus one": -1,
        "zero": 0,
        "NumPy integer": 2,
        "array of rank 0": 2,
        "tensor of rank 0": 2,
    },
    "aligned": {"bool": True, "NumPy bool": True, "zero": False},
    "spatial_scale": {
        "float": 0.5,
        "NumPy integer": 2,
        "NumPy float": 0.5,
        "array of rank 0": 2,
        "tensor of rank 0": 2,
        "floating tensor of rank 0": 0.5,
        "sparse tensor of rank 0": 2,
    },
    "canonical_level": {"minus one": -1, "zero": 0},
    "scales": dict.fromkeys(PAIRS, (2, 3))
    | dict.fromkeys(PAIRS_OF_FLOATS, (0.5, 0.25))
    | {"nested list": [(1, 2), (3, 4)]},  # of each map one for each axis
    "featmap_names": dict.fromkeys(("keys", "generator", "array of strings"), ("a", "b")),
    "boxes": {"empty list": [], "tensor of rank 3": list(torch.zeros(2, 3, 4))},
    "image_shapes": {"array of rank 2": [(64, 64)], "nested list": [(1, 2), (3, 4)]},
    "levels": {"None": None},
    "map_levels": {"None": None},
}
TAKEN["canonical_level"] |= TAKEN["spatial_scale"]
TAKEN["canonical_scale"] = TAKEN["spatial_scale"]
TAKEN["k_min"] = TAKEN["sampling_ratio"]
TAKEN["k_max"] = dict.fromkeys(("NumPy integer", "array of rank 0", "tensor of rank 0"), 2)
TAKEN["eps"] = TAKEN["canonical_level"]
TAKEN["spatial_scale"] = (
    TAKEN["spatial_scale"]
    | dict.fromkeys(PAIRS, (2, 3))
    | dict.fromkeys(("pair of floats", "floating tensor of rank 1"), (0.5, 0.25))
)
TAKEN["boxlists"] = {"empty list": []}
TAKEN_BY = {
    "MultiScaleRoIAlign": {"scales": {"None": None}},
    "roi_align": {"input": {"quantised map": quantised()}},
    "RoIAlign": {"input": {"quantised map": quantised()}},
}


def wrong(name: str, argument: str, kind: str) -> str | None:
    """What is wrong with the outcome of a call with one argument of some kind; None if nothing is."""
    call, good = CALLS[name]
    meaning = TAKEN.get(argument, {}) | TAKEN_BY.get(name, {}).get(argument, {})
    try:
        actual = call(**good | {argument: KINDS[kind]()})
    except Exception as error:
        refused = isinstance(error, (TypeError, ValueError)) and argument in str(error)
        return None if refused and kind not in meaning else f"{type(error).__name__}: {error}"
    if kind not in meaning:
        return "taken"
    return None if torch.equal(actual, call(**good | {argument: meaning[kind]})) else "another result"


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, good) in CALLS.items() for argument in good]
)
def test_any_kind_is_taken_for_what_it_means_or_refused_by_name(name, argument):
    outcomes = {kind: wrong(name, argument, kind) for kind in KINDS}
    assert {kind: outcome for kind, outcome in outcomes.items() if outcome} == {}
