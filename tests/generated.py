"""Whole problems for the public functions, drawn by Hypothesis, and a judge for what comes of them.

The truth is the definition with sums in float64: sampling points and weights are computed in the working
precision, as the contract says, so that a point on a boundary lies on the same side. What is left between it
and an engine are the roundings of the sums, and those can be counted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import roialign
from roialign import ops, reference
from roialign.arguments import points_of
from roialign.levels import staircase
from roialign.schema import Pooling
from roialign.taps import Pieces, Points, Taps
from roialign.testing import LAYOUTS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.DTYPES}
BOX_DTYPES = {**DTYPES, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}
MIXTURES = (("float32", "bfloat16"), ("float16", "float32"), ("float64", "float32"), ("bfloat16", "float16"))
STRIDES = (1, 2, 4, 8, 16, 32, 64, 0.5, 3, 14, 5.7)


def _one_row(t: Tensor) -> Tensor:
    return t[:, :, :1].contiguous().expand(t.shape)


def _one_column(t: Tensor) -> Tensor:
    return t[..., :1].contiguous().expand(t.shape)


def _one_value(t: Tensor) -> Tensor:
    return t[:1, :1, :1, :1].contiguous().expand(t.shape)


def _sliding(t: Tensor) -> Tensor:
    """Rows that overlap: each starts a cell after the one before."""
    _, channels, height, width = t.shape
    return t.contiguous().as_strided(t.shape, (channels * height * width, height * width, 1, 1))


def _in_order(order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Axes in an order in memory, outermost first."""
    back = [order.index(axis) for axis in range(len(order))]
    return lambda t: t.permute(*order).contiguous().permute(*back)


ANY_LAYOUT = {
    **LAYOUTS,
    **{"order " + "".join("NCHW"[i] for i in order): _in_order(order) for order in permutations(range(4))},
    "one row": _one_row,
    "one column": _one_column,
    "one value": _one_value,
    "sliding": _sliding,
}
ROWS_LAYOUT = {  # of boxes
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: torch.stack((torch.full_like(t, 99), t), 2).repeat_interleave(2, 0)[::2, :, 1],
    "expanded": lambda t: t[:1].contiguous().expand(t.shape),
}
# How a loss may look at what is pooled: the gradient comes back with the strides of the view undone.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "transposed": lambda t: t.transpose(2, 3),
    "channels last": lambda t: t.permute(0, 2, 3, 1),
    "channels first": lambda t: t.transpose(0, 1),
    "all turned": lambda t: t.permute(3, 2, 1, 0),
    "vectors": lambda t: t.flatten(1),
    "bins": lambda t: t.flatten(2).transpose(1, 2),
    "squeezed": lambda t: t.squeeze(3).squeeze(2),
    "axis more": lambda t: t.transpose(2, 3)[:, :, None],
}


class Storage(NamedTuple):
    """How a tensor lies in its memory, apart from its layout: nothing that its values tell."""

    offset: int = 0  # elements before it
    lone: tuple[int, ...] = ()  # strides of those axes that have size 1, where they mean nothing

    def lay(self, t: Tensor) -> Tensor:
        """The same values and strides, among NaNs."""
        if t.numel() == 0:
            return t
        stride = [
            lone if size == 1 else step
            for size, step, lone in zip(t.shape, t.stride(), self.lone or t.stride(), strict=False)
        ]
        values = t.as_strided((extent(t),), (1,))
        memory = torch.full((self.offset + len(values) + 1,), 0, dtype=t.dtype)
        if t.dtype.is_floating_point:
            memory.fill_(torch.nan)
        memory[self.offset : -1] = values
        return memory.as_strided(t.shape, stride, self.offset)


def extent(t: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))


class Map(NamedTuple):
    """One feature map."""

    height: int
    width: int
    stride: float
    dtype: str
    layout: str
    storage: Storage = Storage()


class Problem(NamedTuple):
    """All arguments of one call, in numbers that Hypothesis can make smaller."""

    maps: list[Map]
    images: int
    channels: int
    boxes: list[list[list[float]]]  # per image
    box_dtype: str
    box_layout: str
    box_storage: Storage
    output_size: tuple[int, int]
    sampling_ratio: int | str
    aligned: bool
    canonical: tuple[float, float]
    given_levels: list[int] | None  # instead of equation 1
    way: str  # through the public API
    grad_layout: str
    grad_storage: Storage
    view: str
    spoilt: list[tuple[int, int, float]]  # map, place in it, value
    spoilt_grad: float | None
    twice: bool  # backward of backward too
    seed: int


def beside(number: float, steps: int) -> float:
    """The float32 that lies so many steps from a number."""
    target = torch.tensor(math.copysign(math.inf, steps))
    result = torch.tensor(number, dtype=torch.float32)
    for _ in range(abs(steps)):
        result = torch.nextafter(result, target)
    return result.item()


spoils = st.sampled_from([math.nan, math.inf, -math.inf])
halves = st.integers(-8, 60).map(lambda n: n / 2)
coordinates = st.one_of(
    st.floats(-20, 60, width=32),
    halves,
    st.builds(lambda n, stride: n * stride, halves, st.sampled_from(STRIDES)),
    st.builds(
        lambda n, stride, steps: beside(n * stride, steps),
        halves,
        st.sampled_from(STRIDES),
        st.integers(-2, 2),
    ),
)
wild = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e9, -1e9, 1e4, 1e-40, -1e-45, 0.0]),
    st.floats(width=32),
)
boxes = st.one_of(
    st.tuples(coordinates, coordinates, st.floats(0, 64, width=32), st.floats(0, 64, width=32)).map(
        lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
    ),
    st.lists(coordinates, min_size=4, max_size=4),  # half of them inside out
    st.tuples(coordinates, coordinates).map(lambda point: [*point, *point]),  # without area
    st.lists(st.one_of(coordinates, wild), min_size=4, max_size=4),
)


storages = st.builds(
    Storage,
    st.sampled_from([0, 0, 1, 3, 8, 17]),
    st.just(()) | st.lists(st.sampled_from([0, 1, 7, 1000]), min_size=4, max_size=4).map(tuple),
)

# The engines take 16 channels at a time, or 64.
any_channels = st.one_of(st.sampled_from([1, 1, 15, 16, 17, 64, 65]), st.integers(1, 70))


def sizes(most: int) -> st.SearchStrategy[int]:
    """1 as often as all others."""
    return st.just(1) | st.integers(1, most)


@st.composite
def problems(
    draw: Any,
    *,
    most_maps: int = 11,
    most_cells: int = 24,
    channels: st.SearchStrategy[int] = any_channels,
    most_boxes: int = 5,
    most_bins: int = 15,
    dtypes: Sequence[str] = tuple(DTYPES),
    mixed: bool = True,
) -> Problem:
    """Any problem at all."""
    n = draw(st.integers(1, most_maps))
    palettes = MIXTURES if mixed and draw(st.booleans()) else [(dtype,) for dtype in dtypes]
    palette = draw(st.sampled_from(palettes))
    any_layout = st.sampled_from(list(LAYOUTS)) | st.sampled_from(list(ANY_LAYOUT))
    one_layout = draw(st.none() | any_layout)
    maps = [
        Map(
            draw(sizes(most_cells)),
            draw(sizes(most_cells)),
            draw(st.sampled_from(STRIDES)),
            draw(st.sampled_from(palette)),
            one_layout or draw(any_layout),
            draw(storages),
        )
        for _ in range(n)
    ]
    images = draw(st.sampled_from([1, 1, 2, 3, 0]))
    lists = draw(st.integers(0, images))
    drawn = [draw(st.lists(boxes, max_size=most_boxes)) for _ in range(lists)]
    count = sum(map(len, drawn))
    way = draw(st.sampled_from(["functional", "module", *(["lists", "rows"] if n == 1 else [])]))
    given = None
    if way in ("functional", "module") and draw(st.booleans()):
        given = draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count))
    return Problem(
        maps=maps,
        images=images,
        channels=draw(channels),
        boxes=drawn,
        box_dtype=draw(st.sampled_from(["float32", "float32", *BOX_DTYPES])),
        box_layout=draw(st.sampled_from(list(ROWS_LAYOUT))),
        box_storage=draw(storages),
        output_size=(draw(sizes(most_bins)), draw(sizes(most_bins))),
        sampling_ratio=draw(st.one_of(st.integers(-1, 5), st.just("exact"))),
        aligned=draw(st.booleans()),
        canonical=draw(st.sampled_from([(224.0, 4.0), (28.0, 4.0), (7.3, 2.5), (1e-3, 0.0)])),
        given_levels=given,
        way=way,
        grad_layout=draw(any_layout),
        grad_storage=draw(storages),
        view=draw(st.sampled_from(["itself", "transposed"]) | st.sampled_from(list(VIEWS))),
        spoilt=draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 999), spoils), max_size=2)),
        spoilt_grad=draw(st.none() | spoils),
        twice=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Call:
    """A problem made of tensors."""

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        generator = torch.Generator().manual_seed(p.seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.scales = [1 / m.stride for m in p.maps]
        self.features = []
        for i, m in enumerate(p.maps):
            values = noise(p.images, p.channels, m.height, m.width)
            for which, place, spoil in p.spoilt:
                if which == i and values.numel():
                    values.view(-1)[place % values.numel()] = spoil
            self.features.append(m.storage.lay(ANY_LAYOUT[m.layout](values.to(DTYPES[m.dtype]))))
        self.boxes = [self._boxes(rows) for rows in p.boxes]
        self.working = reference_dtype(self.features)
        self.count = sum(map(len, p.boxes))
        self.rois = torch.zeros(self.count, 5, dtype=self.working)
        if self.boxes:
            self.rois[:, 0] = torch.tensor([float(i) for i, b in enumerate(p.boxes) for _ in b])
            self.rois[:, 1:] = torch.cat([b.to(self.working) for b in self.boxes])
        if p.box_layout != "expanded":  # the boxes are; their images may differ
            self.rois = p.box_storage.lay(ROWS_LAYOUT[p.box_layout](self.rois))
        self.levels = None
        if p.given_levels is not None:
            self.levels = p.box_storage.lay(torch.tensor(p.given_levels, dtype=torch.int64))
        shape = (self.count, p.channels, *p.output_size)
        grad = noise(*shape)
        if p.spoilt_grad is not None and grad.numel():
            grad.view(-1)[p.seed % grad.numel()] = p.spoilt_grad
        self.grad = grad.to(self.features[0].dtype)
        self.grad = p.grad_storage.lay(ANY_LAYOUT[p.grad_layout](self.grad))
        self.view = VIEWS[p.view]

    def _boxes(self, rows: list[list[float]]) -> Tensor:
        dtype = BOX_DTYPES[self.problem.box_dtype]
        result = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
        if not dtype.is_floating_point:
            result = result.nan_to_num(0).clamp(0 if dtype == torch.uint8 else -1000, 250)
        result = result.to(dtype)
        return self.problem.box_storage.lay(ROWS_LAYOUT[self.problem.box_layout](result))

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        """Through the public API."""
        p = self.problem
        if p.way in ("lists", "rows"):
            regions = self.boxes if p.way == "lists" else self.rois
            return roialign.roi_align(
                features[0], regions, p.output_size, self.scales[0], p.sampling_ratio, p.aligned
            )
        scale, level = p.canonical
        if p.way == "functional":
            return roialign.multiscale_roi_align(
                features, self.boxes, p.output_size, self.scales, p.sampling_ratio,
                aligned=p.aligned, canonical_scale=scale, canonical_level=level, levels=self.levels,
            )  # fmt: skip
        names = [f"map {i}" for i in range(len(features))]
        pooler = roialign.MultiScaleRoIAlign(
            [*names, "absent"], p.output_size, p.sampling_ratio, canonical_scale=scale, canonical_level=level,
            aligned=p.aligned, scales=dict(zip(names, self.scales, strict=True)),
            map_levels=None if self.levels is None else lambda _: self.levels,
        )  # fmt: skip
        x = {"unused": torch.empty(0), **dict(zip(reversed(names), reversed(features), strict=True))}
        return pooler(x, self.boxes)

    def truth(self, features: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The definition with sums in float64, and its gradients."""
        p = self.problem
        steps = staircase(self.scales, *self.canonical, self.working)
        out = torch.empty(self.count, p.channels, *p.output_size, dtype=torch.float64)
        taps = reference.taps_of

        def exact(points: Points | Pieces, start: int, side: int) -> Taps:
            result = taps(points, start, side)
            return result._replace(weight=result.weight.double())

        leaves = [f.detach().double().requires_grad_() for f in features]
        ratio = points_of(p.sampling_ratio)
        pooling = Pooling(p.output_size, self.scales, ratio, p.aligned, *steps)
        with mock.patch.object(reference, "taps_of", exact):
            reference.forward(out, leaves, self.rois, self.levels, pooling)
        none = [torch.zeros_like(leaf) for leaf in leaves]
        if not out.requires_grad:  # no box can be pooled
            return out, none
        grads = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True)
        return out.detach(), [n if g is None else g for n, g in zip(none, grads, strict=True)]

    @property
    def canonical(self) -> tuple[float, float]:
        """What `roi_align`, which has one map, cannot be told."""
        return (224.0, 4.0) if self.problem.way in ("lists", "rows") else self.problem.canonical

    def terms(self) -> int:
        """The most cells that a bin reads."""
        p = self.problem
        if isinstance(p.sampling_ratio, int) and p.sampling_ratio > 0:
            return (2 * p.sampling_ratio) ** 2
        # Points of an adaptive grid lie half a cell apart or more; pieces are cut once a cell.
        return math.prod(4 * (max(getattr(m, side) for m in p.maps) + 2) for side in ("height", "width"))


def judge(call: Call) -> None:
    """Pool forward, backward and backward again, and hold all of it against the truth."""
    features = [f.detach().requires_grad_() for f in call.features]
    grad = call.grad.detach()
    if call.problem.view != "itself":  # as the loss would have it
        grad = call.view(grad).clone(memory_format=torch.contiguous_format)
    grad.requires_grad_()
    with poisoned():
        pooled = call.pool(features)
        grads = torch.autograd.grad(call.view(pooled), features, grad, create_graph=True)
        again = torch.autograd.grad(grads, grad, call.features) if call.problem.twice else ()
    assert pooled.dtype == features[0].dtype
    assert [g.dtype for g in grads] == [f.dtype for f in features]

    truth, true_grads = call.truth(call.features, call.grad)
    size, grad_sizes = call.truth([f.abs() for f in call.features], call.grad.abs())
    terms = call.terms()
    assert_sums_agree(pooled, truth, size, terms, call.working)
    for result in again:  # backward of backward is forward
        assert_sums_agree(result, call.view(truth), call.view(size), terms, call.working)
    terms *= call.count * math.prod(call.problem.output_size)
    for actual, expected, magnitude in zip(grads, true_grads, grad_sizes, strict=True):
        assert_sums_agree(actual, expected, magnitude, terms, call.working)


def assert_sums_agree(
    actual: Tensor, truth: Tensor, magnitude: Tensor, terms: int, working: torch.dtype
) -> None:
    """Assert that only the roundings of sums of so many terms lie between a result and the truth.

    Roundings of either sign add up to about the root of their number; twice that, and eight for those of
    a single term, are allowed, of the size of the sum of absolute terms. Then comes one to the dtype.
    """
    assert actual.shape == truth.shape
    info = torch.finfo(actual.dtype)
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    error = (actual.double() - truth).abs()
    allowed = (8 + 2 * math.sqrt(terms)) * (torch.finfo(working).eps * magnitude + torch.finfo(working).tiny)
    allowed += info.eps * truth.abs() + info.tiny * info.eps
    wrong = finite & ~(error <= allowed)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"at {place} of {tuple(actual.shape)}: got {actual[place]:.9g}, truth {truth[place]:.9g}, "
            f"error {error[place]:.3g}, allowed {allowed[place]:.3g}"
        )


def reference_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The working precision."""
    return torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory for results that is full of NaN: whatever an engine does not write will show."""
    engine = ops.engine("cpu")
    empty: Callable[..., Tensor] = engine.empty
    with mock.patch.object(engine, "empty", lambda *args: empty(*args).fill_(torch.nan)):
        yield
