"""Hold the emulator of PTX against PyTorch: small Triton kernels, and torchvision's own from its wheel."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torchvision
import triton
import triton.language as tl
from gpu_emulated import execute

from benchmarks.gpu_model import launches
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.schema import Pooling
from roialign.testing import pyramid, random_boxes

N = tl.constexpr(256)


@triton.jit
def sums(x, out):
    i, j = tl.arange(0, 128), tl.arange(0, 64)
    tile = tl.load(x + i[:, None] * 64 + j[None, :])
    tl.store(out + i, tl.sum(tile, 1))
    tl.store(out + 128 + j, tl.max(tile, 0))


@triton.jit
def scans(x, out):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, tl.cumsum(value, 0))
    place = tl.cumsum((value > 0).to(tl.int32), 0) - 1
    tl.store(out + N + place, i.to(tl.float32), mask=value > 0)


@triton.jit
def orders(x, out):
    i = tl.arange(0, N)
    value = tl.load(x + i, eviction_policy="evict_last")
    tl.store(out + i, tl.sort(value))
    tl.store(out + N + i, tl.gather(value, i * 7 % N, 0))
    tl.store(out + 2 * N, tl.argmax(value, 0).to(tl.float32))


@triton.jit
def products(x, out):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    a, b = tl.load(x + at), tl.load(x + 1024 + at)
    tl.store(out + at, tl.dot(a, b, input_precision="ieee"))
    tl.store(out + 1024 + at, tl.trans(a.to(tl.bfloat16)).to(tl.float32))


@triton.jit
def integers(x, out):
    i = tl.arange(0, N)
    k = i.to(tl.int64) * 7 - 500
    tl.store(out + i, (k // 13).to(tl.float32))
    tl.store(out + N + i, (k % 11).to(tl.float32))
    bits = tl.load(x).to(tl.int32, bitcast=True)
    count = 0
    while bits != 0:
        bits = bits & (bits - 1)
        count += 1
    tl.store(out + 2 * N + i, i * 0.0 + count)


@triton.jit
def atomics(x, out):
    i = tl.arange(0, N)
    tl.atomic_add(out + i % 7, tl.load(x + i), mask=i < 200)
    place = tl.atomic_add(out.to(tl.pointer_type(tl.int32)) + 7 + 0 * i, 1 + 0 * i)
    tl.store(out + 8 + place, i.to(tl.float32))


def check(kernel, expected, x):
    out = torch.zeros(4096)
    with launches.recorded(execute):
        kernel[(1,)](x, out)
    torch.testing.assert_close(out[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    print(kernel.__name__)


def small_kernels():
    x = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    v, i = x[:256], torch.arange(256)
    tile = x.view(128, 64)
    check(sums, torch.cat((tile.sum(1), tile.amax(0))), x)
    check(scans, torch.cat((v.cumsum(0), i[v > 0].float())), x)
    check(orders, torch.cat((v.sort().values, v[i * 7 % 256], v.argmax()[None].float())), x)
    a, b = x[:2048].view(2, 32, 32)
    check(products, torch.cat(((a @ b).flatten(), a.bfloat16().float().T.flatten())), x)
    k, ones = i * 7 - 500, bin(int(v[0].view(torch.int32)) & 0xFFFFFFFF).count("1")
    quotient = torch.div(k, 13, rounding_mode="trunc").float()
    check(integers, torch.cat((quotient, torch.fmod(k, 11).float(), torch.full((256,), float(ones)))), x)
    added = torch.zeros(7).index_add_(0, i[:200] % 7, v[:200])
    counted = torch.tensor([256], dtype=torch.int32).view(torch.float32)
    check(atomics, torch.cat((added, counted, i.float())), x)


def torchvisions_kernels():
    scales = [1 / 4, 1 / 16]
    features = pyramid([4, 16], image_size=(64, 96), images=2, channels=3)
    rois = boxes_to_rois(random_boxes([9, 7], image_size=(64, 96)), features[0], torch.float32)
    pooling = Pooling((7, 7), scales, 2, False, *staircase(scales, 28, 4, torch.float32))
    forward = list(launches.theirs(features, rois, pooling, None))
    backward = list(launches.theirs(features, rois, pooling, torch.empty(0)))
    for f, scale, there, back in zip(features, scales, forward, backward, strict=True):
        there.arguments[1] = f
        grad, mine = back.arguments[1].normal_(), there.arguments[10]
        execute(there)
        execute(back)
        leaf = f.clone().requires_grad_()
        pooled = torchvision.ops.roi_align(leaf, mine, 7, scale, 2)
        torch.testing.assert_close(there.arguments[11], pooled.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            back.arguments[10], torch.autograd.grad(pooled, leaf, grad)[0], rtol=1e-4, atol=1e-4
        )
        print("torchvision", there.name)


if __name__ == "__main__":
    small_kernels()
    if torchvision.version.cuda is not None:
        torchvisions_kernels()
    print("all agree")
