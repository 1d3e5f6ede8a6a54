import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from roialign import ops, warmup
from roialign.__main__ import main

pytest.importorskip("numba")


def run(*arguments, cache):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "roialign", "warmup", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache folder that was warmed up, and what was printed."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, run(cache=cache)


def kept(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb?")}


def test_kernels_are_kept(warm):
    cache, done = warm
    assert done.returncode == 0, done.stderr
    assert "compiling 16/16: bfloat16, channels_last, adaptive grid" in done.stderr
    files = len(kept(cache))
    assert files > 10
    assert done.stdout.startswith(f"{files} files, ")
    assert f" MB, {files} of them new, in " in done.stdout
    assert f"The kernels are kept in {cache}" in done.stdout


def test_kernels_are_found_again(warm):
    cache, _ = warm
    before = kept(cache)
    again = run("--dtypes", "float32", cache=cache)
    assert again.returncode == 0, again.stderr
    assert " MB, 0 of them new, in " in again.stdout
    assert kept(cache) == before


FIRST_CALLS = """
import itertools, sys
import torch, roialign
from roialign import ops

def pool(dtype, layout, ratio, channels, count):
    maps = [torch.rand(2, channels, 32 >> k, 32 >> k).to(dtype).to(memory_format=layout) for k in (0, 1)]
    x = {k: f.requires_grad_() for k, f in enumerate(maps)}
    boxes = [torch.rand(count, 4) * 60, torch.rand(0, 4)]
    pooler = roialign.MultiScaleRoIAlign([0, 1], 7, ratio)
    yield maps, pooler(x, boxes, [(128, 128)] * 2)
    yield maps[:1], roialign.roi_align(x[0], [b.to(dtype) for b in boxes], 3, 0.25, ratio, True)
    yield maps[:1], roialign.roi_align(x[0], torch.rand(count, 5).double(), 3, 0.25, ratio)
    levels = torch.zeros(count, dtype=torch.int64)
    given = {"scales": [0.25, 0.125], "levels": levels}
    yield maps, roialign.multiscale_roi_align(maps, boxes, 2, sampling_ratio=ratio, **given)

layouts = (torch.contiguous_format, torch.channels_last)
for call in itertools.product(ops.DTYPES, layouts, (0, 3), (1, 3, 16, 40, 64, 200), (5, 200)):
    for maps, pooled in pool(*call):
        for layout in layouts:
            grad = torch.rand_like(pooled).contiguous(memory_format=layout)
            torch.autograd.grad(pooled, maps, grad, retain_graph=True, allow_unused=True)
        pooled.sum().backward()

found = {
    f"{name}.{key}": kernel
    for name, module in list(sys.modules.items()) if name.startswith("roialign.cpu.")
    for key, kernel in vars(module).items() if hasattr(kernel, "py_func")
}
compiled = {name: dict(k.stats.cache_misses) for name, k in found.items() if k.stats.cache_misses}
assert not compiled, compiled
print("kernels", sum(bool(kernel.signatures) for kernel in found.values()))
"""


def test_what_is_warm_leaves_nothing_to_compile(warm):
    """Whatever is called first: any dtype, layout, grid, number of channels and boxes, and gradient."""
    cache, _ = warm
    before = kept(cache)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", FIRST_CALLS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.removeprefix("kernels")) > 5
    assert kept(cache) == before


def test_variants_cover_all_that_kernels_are_compiled_for():
    names = [str(variant) for variant in warmup.variants(warmup.DTYPES)]
    assert len(names) == len(set(names)) == 16
    assert list(warmup.DTYPES) == ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture
def compiled(monkeypatch):
    """Record the variants instead of compiling them."""
    variants = []
    monkeypatch.setattr(warmup, "compile_variant", variants.append)
    return variants


def test_dtypes_can_be_chosen(compiled, capsys):
    main(["warmup", "--dtypes", "bfloat16", "float64"])
    assert [v.dtype for v in compiled] == ["bfloat16"] * 4 + ["float64"] * 4
    with pytest.raises(SystemExit, match="2"):
        main(["warmup", "--dtypes", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_without_a_folder_it_says_so(compiled, monkeypatch, capsys):
    monkeypatch.setattr(ops, "engine", lambda device: SimpleNamespace(cache_folder=lambda: None))
    assert main(["warmup"]) == 1
    assert "python -m roialign warmup: compiled kernels cannot be kept" in capsys.readouterr().err


def test_with_a_full_disk_it_says_why(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.nbi").touch()
    monkeypatch.setattr(ops, "engine", lambda device: SimpleNamespace(cache_folder=lambda: str(tmp_path)))
    warn = logging.getLogger("roialign").warning
    monkeypatch.setattr(warmup, "compile_variant", lambda variant: warn("kept nowhere: %s", "disk full"))
    assert main(["warmup"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "python -m roialign warmup: kept nowhere: disk full"
    assert logging.getLogger("roialign").handlers == []


def test_where_nothing_is_compiled_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(ops, "engine", lambda device: SimpleNamespace())
    assert main(["warmup"]) == 1
    assert "there is nothing to compile: the CPU engine cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_track_yields_every_step(terminal, monkeypatch, capsys):
    console = pytest.importorskip("rich.console")
    monkeypatch.setattr(console.Console, "is_terminal", terminal)
    assert list(warmup.track("doing", ["a", "b"])) == ["a", "b"]
    assert ("doing 2/2: b\n" in capsys.readouterr().err) != terminal


def test_track_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert list(warmup.track("doing", ["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().err == "doing 1/2: a\ndoing 2/2: b\n"
