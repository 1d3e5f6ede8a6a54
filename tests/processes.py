"""Programs in processes of their own, where faults are real."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
ON_X86 = platform.machine() in ("x86_64", "AMD64")
ACCESS_VIOLATION = 0xC0000005  # how Windows ends a process

# What is pooled is right if it is what the reference pools.
PRELUDE = """
import os, signal, threading, time
import torch
import roialign
from roialign import ops, roi_align
from roialign.testing import random_boxes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have its background jobs ignore it
torch.set_num_threads(2)
feature = torch.rand(1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
boxes = random_boxes([200], image_size=(256, 256))

def forward():
    return [roi_align(feature, boxes, 7, 0.25, 2)]

def both():
    leaf = feature.detach().requires_grad_()
    out = roi_align(leaf, boxes, 7, 0.25, 2)
    return [out.detach(), *torch.autograd.grad(out, leaf, out.detach())]

def assert_right(pool=forward):
    with ops.use_reference():
        expected = pool()
    for actual, wanted in zip(pool(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)

def share_every_call():
    from roialign.cpu import threads
    threads._WORTH_A_THREAD = 1
"""


def python_path(*first: object) -> str:
    """Where a program looks for packages: there, and where those who started the tests said."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def start(program: str, *, wrap: tuple[str, ...] = (), **environment: str) -> "subprocess.Popen[str]":
    """Start a program in a process of its own; a `PYTHONPATH` given comes before that of the tests."""
    path = python_path(environment.pop("PYTHONPATH", SOURCE))
    return subprocess.Popen(
        [*wrap, sys.executable, "-c", PRELUDE + program],
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(code: int) -> bool:
    """Whether an exit code is that of a process that was ended because it used a wrong address."""
    return code in (-signal.SIGSEGV, ACCESS_VIOLATION)


def finish(process: "subprocess.Popen[str]", code: int = 0, seconds: float = 240) -> str:
    """Wait for a program; returns what it printed, errors last."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("hangs: " + "".join(process.communicate())) from None
    assert process.returncode == code, out + err
    return out + err


def run(program: str, *, seconds: float = 240, **options: str) -> str:
    """Start a program and wait for it."""
    return finish(start(program, **options), seconds=seconds)
