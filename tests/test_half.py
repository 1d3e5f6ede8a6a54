"""float16 on any processor: converted by an instruction, or by integer arithmetic where there is none."""

import pytest
import torch
from processes import ON_X86, run

numba = pytest.importorskip("numba")

from numba.core.registry import cpu_target  # noqa: E402

from roialign.cpu import half, simd  # noqa: E402

F32, F16 = simd.TAGS["float32"], simd.TAGS["float16"]
LANES = simd.LANES

only_x86 = pytest.mark.skipif(not ON_X86, reason="other processors all have the instruction")

# Pools every half and many float32 through maps of one cell, which are read with a weight of 1: what comes
# out is what went in, widened or rounded. Among the float32 are each half, the ties, and their neighbours.
PROGRAM = """
from roialign import multiscale_roi_align

def pooled(values, dtype):
    channels = values.numel()
    maps = [torch.zeros(1, channels, 1, 1, dtype=dtype), values.view(1, channels, 1, 1)]
    if layout == "channels_last":
        maps = [m.as_strided(m.shape, (channels, 1, channels, channels)) for m in maps]
    box = [torch.tensor([[0.5, 0.5, 0.5, 0.5]])]
    levels = torch.tensor([1])
    out = multiscale_roi_align(maps, box, 1, scales=[1.0, 1.0], sampling_ratio=1, aligned=True, levels=levels)
    return out.flatten()

def assert_same_numbers(actual, expected):
    assert actual.dtype == expected.dtype
    both_nan = actual.isnan() & expected.isnan()
    wrong = (actual != expected) & ~both_nan
    assert not wrong.any(), (actual[wrong], expected[wrong])

halves = torch.arange(2**16).to(torch.int16).view(torch.float16)
low, high = halves[:2**15 - 2**10], halves[1:2**15 - 2**10 + 1]
ties = (low.double() + high.double().clamp(max=65536.0)) / 2
special = torch.tensor([65519.99, 65520.0, 65536.0, 1e9, 1e-45, 1e-40, 2**-25, 2**-14])
wide = torch.cat([low.double(), ties, special]).float()
wide = torch.cat([wide, wide.nextafter(torch.tensor(0.0)), wide.nextafter(torch.tensor(torch.inf))])
wide = torch.cat([wide, -wide, halves.float()])

for layout in ("contiguous", "channels_last"):
    assert_same_numbers(pooled(halves, torch.float32), halves.float())
    assert_same_numbers(pooled(halves, torch.float16), halves)
    assert_same_numbers(pooled(wide, torch.float16), wide.half())
    assert_same_numbers(pooled(wide.double(), torch.float16), wide.half())
"""


@only_x86
@pytest.mark.parametrize("cpu", ["generic", "nehalem"])
def test_pooling_without_the_instruction(cpu, tmp_path):
    run(PROGRAM, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))


def test_pooling_on_this_processor():
    run(PROGRAM)


def converted(tensor, to, *, native, monkeypatch):
    """Convert between float32 and float16, bits as integers, 16 and 8 at a time and one by one."""
    monkeypatch.setattr(half, "converts", lambda context: native)
    from_tag, to_tag = (F32, F16) if to == torch.float16 else (F16, F32)

    @numba.njit
    def by_sixteens(src, dst, n):
        for i in range(0, n, LANES):
            simd.store(
                to_tag, dst + i * simd.size_of(to_tag), simd.load(from_tag, src + i * simd.size_of(from_tag))
            )

    @numba.njit
    def one_by_one(src, dst, n):
        for i in range(n):
            value = simd.load_one(from_tag, src + i * simd.size_of(from_tag))
            simd.store_one(to_tag, dst + i * simd.size_of(to_tag), value)

    @numba.njit
    def by_tiles(src, dst, n):
        for i in range(0, n, 64):  # a tile transposed twice is a tile
            src_step, dst_step = 8 * simd.size_of(from_tag), 8 * simd.size_of(to_tag)
            tile = dst + i * simd.size_of(to_tag)
            simd.transpose8(from_tag, src + i * simd.size_of(from_tag), src_step, to_tag, tile, dst_step)
            simd.transpose8(to_tag, tile, dst_step, to_tag, tile, dst_step)

    results = []
    for convert in (by_sixteens, one_by_one, by_tiles):
        out = torch.empty(tensor.shape, dtype=to)
        convert(tensor.data_ptr(), out.data_ptr(), tensor.numel())
        results.append(out.view(torch.int16 if to == torch.float16 else torch.int32))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    return results[0]


def every_half():
    return torch.arange(2**16).to(torch.int16).view(torch.float16)


def floats_around_every_half():
    """Every sign and exponent with the first 7 bits of the fraction; the rest such as ties are made of."""
    rest = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, 0x5000, 0x8000, 0xF000, 0xFFFF]
    bits = (torch.arange(2**16)[:, None] << 16 | torch.tensor(rest)).flatten()
    return bits.to(torch.int32).view(torch.float32)


def without_payload(bits):
    """Bits with every NaN the same: what PyTorch makes of one depends on the processor and on the place."""
    nan = bits.view(torch.float16 if bits.dtype == torch.int16 else torch.float32).isnan()
    return bits.masked_fill(nan, -1)


CASES = [(every_half, torch.float32, torch.int32), (floats_around_every_half, torch.float16, torch.int16)]


@pytest.mark.parametrize(("values", "to", "bits"), CASES, ids=["widen", "round"])
def test_computed_bits_are_those_of_pytorch(values, to, bits, monkeypatch):
    actual = converted(values(), to, native=False, monkeypatch=monkeypatch)
    assert torch.equal(without_payload(actual), without_payload(values().to(to).view(bits)))
    nan = actual[actual.view(to).isnan()]
    quiet = 1 << (9 if to == torch.float16 else 22)
    assert len(nan)
    assert (nan & quiet).all()


@pytest.mark.skipif(not half.converts(cpu_target.target_context), reason="this one has no instruction")
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(("values", "to", "bits"), CASES, ids=["widen", "round"])
def test_computed_bits_are_those_of_the_instruction(values, to, bits, flush, monkeypatch):
    """To the payload of a NaN, also where a thread takes subnormal float32 for zeros."""
    torch.set_flush_denormal(flush)
    try:
        computed = converted(values(), to, native=False, monkeypatch=monkeypatch)
        assert torch.equal(computed, converted(values(), to, native=True, monkeypatch=monkeypatch))
    finally:
        torch.set_flush_denormal(False)


@only_x86
@pytest.mark.parametrize(
    ("cpu", "features", "expected"),
    [("generic", "", False), ("x86-64-v2", "", False), ("tremont", "", False), ("x86-64-v3", "", True),
     ("nehalem", "+f16c", True), ("x86-64-v3", "-f16c", False), ("sapphirerapids", "", True)],
)  # fmt: skip
def test_what_a_processor_has_is_known(cpu, features, expected):
    triple = cpu_target.target_context.codegen().magic_tuple()[0]
    assert half._converts(triple, cpu, features) == expected


def test_what_numba_does_not_tell_is_computed():
    assert half.converts(object()) is False
