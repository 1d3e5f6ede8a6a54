"""What is particular to the CPU engine: threads, forks, memory, its ways through a map, its cache."""

import gc
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from roialign import layout, multiscale_roi_align, ops, reference, roi_align
from roialign.schema import Pooling
from roialign.testing import assert_within_budget, pyramid, random_boxes

numba = pytest.importorskip("numba")

from roialign.cpu import engine, jit, memory  # noqa: E402


def grads_of(feature, boxes, *args):
    leaf = feature.detach().requires_grad_()
    pooled = roi_align(leaf, boxes, *args)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(pooled.shape, generator=generator).to(pooled.dtype)
    (grad,) = torch.autograd.grad(pooled, leaf, weight)
    return pooled.detach(), grad


def assert_matches_reference(feature, boxes, *args):
    ours = grads_of(feature, boxes, *args)
    with ops.use_reference():
        same = grads_of(feature, boxes, *args)
        truth = grads_of(feature.double(), [b.double() for b in boxes], *args)
    for got, expected, exact in zip(ours, same, truth, strict=True):
        assert_within_budget(got, reference=expected, truth=exact)


LONG = torch.tensor([[-40.0, -40.0, 500.0, 500.0], [3.0, 5.0, 380.0, 20.0], [10.0, 0.0, 30.0, 400.0]])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("output_size", [(1, 1), (3, 40)])
def test_boxes_as_large_as_a_large_map(layout, sampling_ratio, output_size):
    """More cells than are packed at once, and more than a ring holds."""
    feature = torch.rand(1, 17, 380, 380).contiguous(memory_format=layout)
    assert_matches_reference(feature, [LONG], output_size, 1.0, sampling_ratio)


@pytest.mark.parametrize("output_size", [(1, 1), (2, 3)])
def test_bins_of_more_cells_than_are_listed_at_once(output_size):
    feature = torch.rand(1, 72, 70, 60).contiguous(memory_format=torch.channels_last)
    assert_matches_reference(feature, [LONG / 6], output_size, 1.0, 0)


@pytest.mark.parametrize("channels", [1, 7, 8, 15, 16, 17, 40, 64, 72, 130])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_number_of_channels(channels, layout):
    feature = torch.rand(2, channels, 20, 9).contiguous(memory_format=layout)
    boxes = random_boxes([20, 20], image_size=(80, 36))
    for sampling_ratio in (2, 0):
        assert_matches_reference(feature, boxes, (5, 4), 0.25, sampling_ratio)


@pytest.mark.parametrize("channels", [24, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_of_several_dtypes_and_layouts_at_once(dtype, channels):
    maps = [
        torch.rand(2, channels, 32, 40),
        torch.rand(2, channels, 16, 20).to(dtype),
        torch.rand(2, channels, 8, 10).contiguous(memory_format=torch.channels_last),
    ]
    boxes = random_boxes([40, 40], image_size=(128, 160))
    arguments = (boxes, 7, [1 / 4, 1 / 8, 1 / 16], 2)

    def pool(maps):
        leaves = [m.detach().requires_grad_() for m in maps]
        pooled = multiscale_roi_align(leaves, *arguments, canonical_scale=56)
        return [pooled.detach(), *torch.autograd.grad(pooled, leaves, weight.to(pooled.dtype))]

    weight = torch.randn(80, channels, 7, 7)
    ours = pool(maps)
    with ops.use_reference():
        theirs, truth = pool(maps), pool([m.double() for m in maps])
    for actual, expected, exact, like in zip(ours, theirs, truth, [maps[0], *maps], strict=True):
        assert actual.dtype == expected.dtype == like.dtype
        if like.dtype == torch.float64:  # the truth is rounded likewise
            torch.testing.assert_close(actual, exact)
        else:
            assert_within_budget(actual, truth=exact, reference=expected)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_for_some_of_the_boxes_at_a_time_change_no_bit(monkeypatch, dtype, layout, ratio, given):
    """Slabs in forward; in backward whole maps, and maps by parts whose rings are kept between the parts."""
    maps = pyramid([4, 8], image_size=(48, 80), images=2, channels=70, dtype=dtype, layout=layout)
    boxes = random_boxes([150, 90], image_size=(48, 80))
    boxes[0][17] = torch.nan
    levels = torch.arange(240) % 2 if given else None

    def call():
        leaves = [m.detach().requires_grad_() for m in maps]
        pooled = multiscale_roi_align(
            leaves, boxes, (3, 2), [1 / 4, 1 / 8], ratio, levels=levels, canonical_scale=40
        )
        grad = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).to(dtype)
        return pooled, *torch.autograd.grad(pooled, leaves, grad)

    whole = call()
    for room, slab, kept in ((2000, 2**16, 0), (1500, 50, 10**6), (1, 2**16, 10**5), (10**6, 100, 0)):
        for name, value in (("_ROOM", room), ("_ROOM_TURNED", room), ("_SLAB", slab), ("_KEPT", kept)):
            monkeypatch.setattr(engine, name, value)
        for again, once in zip(call(), whole, strict=True):
            torch.testing.assert_close(again, once, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_after_fork():
    program = """
import os, torch
from roialign import roi_align
from roialign.cpu import threads
threads._WORTH_A_THREAD = 1
torch.set_num_threads(2)
feature, boxes = torch.rand(1, 64, 64, 64), [torch.tensor([[1.0, 2, 200, 180]]).repeat(50, 1)]
before = roi_align(feature, boxes, 7, 0.25, 2)
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    after = roi_align(feature, boxes, 7, 0.25, 2)
    os._exit(0 if torch.equal(before, after) else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_large_results_lie_in_memory_that_is_used_again(dtype, channels_last):
    shape = (70, 1024, 8, 8)
    memory._idle.clear()
    first = memory.empty(shape, dtype, torch.device("cpu"), channels_last)
    assert first.shape == shape
    assert first.dtype == dtype
    assert layout.is_channels_last(first) == channels_last
    address, part = first.data_ptr(), first[3:5]
    del first
    gc.collect()
    assert not memory._idle  # a view still lives
    del part
    gc.collect()
    assert len(memory._idle) == 1
    assert memory.empty(shape, dtype, torch.device("cpu"), channels_last).data_ptr() == address


def test_little_memory_lies_idle():
    memory._idle.clear()
    held = [
        memory.empty((1, 40, 1024, 1024), torch.float32, torch.device("cpu"), False).view(-1)[:1]
        for _ in range(4)
    ]
    assert not memory._idle  # four times 160 MB in use, never touched
    del held
    gc.collect()
    assert sum(map(len, memory._idle)) <= memory._MOST_IDLE


def test_a_small_block_does_not_serve_a_large_result_nor_the_reverse():
    memory._idle.clear()
    small = memory.empty((1, 2, 1024, 1024), torch.float32, torch.device("cpu"), False)
    address = small.data_ptr()
    del small
    large = memory.empty((1, 20, 1024, 1024), torch.float32, torch.device("cpu"), False)
    assert large.data_ptr() != address
    del large
    gc.collect()
    again = memory.empty((1, 2, 1024, 1024), torch.float32, torch.device("cpu"), False)
    assert again.data_ptr() == address


@pytest.mark.parametrize("page", [2**12, 2**14, 2**16])
def test_advice_is_given_for_whole_pages_of_the_system(page, monkeypatch):
    """4 kB as on most, 16 kB as on some ARM, 64 kB as on others: the kernel refuses all else."""
    given = []
    monkeypatch.setattr(memory, "_madvise", lambda *arguments: given.append(arguments))
    monkeypatch.setattr("mmap.PAGESIZE", page)
    block = np.empty(4 * 2**20, np.uint8)[8:]
    memory._prefer_huge_pages(block)
    ((start, size, advice),) = given
    assert start % page == size % page == 0
    begin = block.ctypes.data
    assert begin <= start < begin + page
    assert begin + len(block) - page < start + size <= begin + len(block)
    assert advice == 14  # MADV_HUGEPAGE


def test_kernels_that_cannot_be_kept_are_compiled_all_the_same(monkeypatch, caplog):
    def no_place(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(jit, "njit", no_place)
    monkeypatch.setattr(jit, "_said", False)
    with caplog.at_level(logging.WARNING, "roialign"):
        kernels = [jit.kernel(lambda x: x + 1), jit.kernel(lambda x: x + 2)]
    assert [k(1) for k in kernels] == [2, 3]
    assert [r.message for r in caplog.records] == [
        "compiled kernels cannot be kept, each process compiles anew: "
        "cannot cache function: no locator available"
    ]


def test_a_full_disk_costs_time_only(monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.FunctionCache.save_overload", full)
    monkeypatch.setattr(jit, "_said", False)

    def plus_three(x):
        return x + 3

    with caplog.at_level(logging.WARNING, "roialign"):
        assert jit.kernel(plus_three)(1) == 4
    assert "No space left on device" in caplog.text


def test_an_arena_is_no_other_calls_and_serves_again():
    first, second = memory.Arena(), memory.Arena()
    places = [arena.take(size) for arena in (first, second) for size in (1, 64, 1000)]
    assert all(place % 64 == 0 for place in places)
    assert len(set(places)) == 6
    assert places[1] >= places[0] + 1
    assert places[2] >= places[1] + 64
    mark = first.mark()
    again = first.take(100)
    huge = first.take(2**31)  # more than there is in a block
    assert len(memory.integers(huge, 2**28)) == 2**28
    first.rewind(mark)
    assert first.take(100) == again
    first.give_back()
    assert memory.Arena().take(1) == places[0]


@pytest.mark.slow
def test_more_than_two_to_the_31_outputs():
    """pytorch/vision#8206: torchvision crashes here on a CPU, and gives zeros on a GPU."""
    feature = torch.rand(1, 256, 50, 50).to(torch.bfloat16)
    box = torch.tensor([[4.0, 5.0, 180.0, 170.0]])
    rois = 172_000
    pooled = roi_align(feature, [box.repeat(rois, 1)], 7, 0.25, 2)
    assert pooled.numel() > 2**31
    with ops.use_reference():
        expected = roi_align(feature, [box], 7, 0.25, 2)
    for row in (0, 1, rois // 2, 171_196, 171_197, rois - 1):  # 2^31 lies in row 171,196
        torch.testing.assert_close(pooled[row], expected[0], rtol=2**-7, atol=0)
    leaf = feature.requires_grad_()
    (grad,) = torch.autograd.grad(
        roi_align(leaf, [box.repeat(rois, 1)], 7, 0.25, 2), leaf, torch.ones_like(pooled)
    )
    weight = torch.empty_like(feature, dtype=torch.float64)
    pooling = Pooling((7, 7), [0.25], 2, False, (), (0,))
    one = torch.cat((torch.zeros(1, 1), box), 1)
    reference.backward([weight], torch.ones_like(pooled[:1]), one, None, pooling)
    # Sums of 172,000 equal terms in float32: their roundings need not cancel.
    torch.testing.assert_close(grad.double(), rois * weight, rtol=2e-2, atol=0)


def test_a_map_with_more_cells_in_a_row_than_float32_can_count():
    """`float32(extent - 1)` rounds up to the extent: the cell after the last must not be read."""
    width = 2**24 + 4
    memory = torch.zeros(width + 64)
    memory[width:] = torch.nan  # not the map's
    for shape in ((1, 1, 1, width), (1, 1, width, 1)):
        leaf = memory[:width].view(shape).requires_grad_()
        start, stop = width - 20.0, width + 40.0
        wide = shape[3] == width
        box = torch.tensor([[0, start, 0, stop, 1] if wide else [0, 0, start, 1, stop]])
        size = (1, 8) if wide else (8, 1)
        for ratio in (2, 0):
            out = roi_align(leaf, box, size, 1.0, ratio)
            assert (out == 0).all()
            (grad,) = torch.autograd.grad(out.sum(), leaf)
            with ops.use_reference():
                expected = roi_align(leaf, box, size, 1.0, ratio)
                assert (expected == 0).all()
                (same,) = torch.autograd.grad(expected.sum(), leaf)
            torch.testing.assert_close(grad.flatten()[-64:], same.flatten()[-64:])
            assert grad.flatten()[-1] > 0
