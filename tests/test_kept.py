"""Compiled kernels on disk: whatever the package is imported from, whatever Numba makes of its cache."""

import compileall
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from processes import SOURCE, run

pytest.importorskip("numba")

KEPT_NOWHERE = "compiled kernels cannot be kept, each process compiles anew"

# A kernel and, in another file, the part that it is made of.
KERNEL = """
from .jit import kernel
from .lesser import step

@kernel
def run(x):
    return step(x)
"""
PART = """
from .jit import part

@part
def step(x):
    return x + {step}
"""
CALL = """
import sys
import numba
from roialign.cpu import greater
print("result", greater.run(0), "compiled", len(greater.run.stats.cache_misses))
"""


def as_source(folder: Path) -> Path:
    return folder


def as_zip(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.py*")):
            if "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(folder))
    return path


def as_bytecode(folder: Path) -> Path:
    assert compileall.compile_dir(folder, quiet=1, legacy=True)
    for file in folder.rglob("*.py"):
        file.unlink()
    return folder


def as_bytecode_of_source_elsewhere(folder: Path) -> Path:
    place = folder.with_suffix(".bytecode")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    assert compileall.compile_dir(place, quiet=1, legacy=True, stripdir=str(place), prependdir=str(folder))
    for file in place.rglob("*.py"):
        file.unlink()
    return place


def as_zip_of_bytecode(folder: Path) -> Path:
    return as_zip(as_bytecode(folder))


def version(step: int, form, folder: Path) -> Path:
    """The package with a kernel whose part adds `step`, to be imported from what is returned."""
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    cpu = folder / "roialign" / "cpu"
    (cpu / "greater.py").write_text(KERNEL)
    (cpu / "lesser.py").write_text(PART.format(step=step))
    return form(folder)


FORMS = [as_source, as_zip, as_bytecode, as_bytecode_of_source_elsewhere, as_zip_of_bytecode]


@pytest.mark.parametrize("form", FORMS)
def test_a_new_version_runs_its_own_kernels(form, tmp_path):
    """In the same place, with the same cache, and with nothing changed but a file that the kernel calls."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    for step in (1, 2):
        place = version(step, form, tmp_path / "site")
        assert f"result {step} compiled 1" in run(CALL, PYTHONPATH=str(place), **cache)
        again = run(CALL, PYTHONPATH=str(place), **cache)
        if form in (as_source, as_zip, as_bytecode_of_source_elsewhere):
            assert f"result {step} compiled 0" in again
        else:  # Numba wants a file of source to name its own after
            assert f"result {step} " in again
            assert again.count(KEPT_NOWHERE) == 1
        shutil.rmtree(tmp_path / "site")


def test_kernels_are_found_again_from_another_folder_and_with_other_comments(tmp_path):
    """Neither paths nor lines are in what counts; as in an image, whose kernels are compiled elsewhere."""
    first, second = (version(1, as_source, tmp_path / name) for name in ("first", "second"))
    lesser = second / "roialign" / "cpu" / "lesser.py"
    lesser.write_text("# a comment\n" + lesser.read_text())
    stamp = "from roialign.cpu import jit; print('stamp', jit._STAMP)"
    assert len({run(stamp, PYTHONPATH=str(place)) for place in (first, second)}) == 1
    lesser.write_text(PART.format(step=2))
    assert len({run(stamp, PYTHONPATH=str(place)) for place in (first, second)}) == 2


def test_of_unknown_make_they_are_not_kept(tmp_path):
    """As with an importer that does not show what it imports."""
    program = "import pkgutil; pkgutil.iter_modules = lambda *args: 1 / 0\n" + CALL
    place = version(1, as_source, tmp_path / "site")
    for _ in range(2):
        printed = run(program, PYTHONPATH=str(place), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert "result 1 compiled 1" in printed
        assert printed.count(f"{KEPT_NOWHERE}: what they are made of cannot be read") == 1


# Numba as it is, to everyone but us: it goes on to use what `hide` takes away.
HIDE = """
import sys, types
import numba, numba.core
from numba.core import caching
numba.njit(lambda x: x)(0)

def hide(module, *names):
    name = module.rpartition(".")[2]
    seen = types.ModuleType(module)
    seen.__dict__.update(vars(sys.modules[module]))
    for each in names or list(vars(seen)):
        delattr(seen, each)
    sys.modules[module] = seen
    setattr(numba.core, name, seen)
"""
GONE = {
    "caching": "hide('numba.core.caching')",
    "IndexDataCacheFile": "hide('numba.core.caching', 'IndexDataCacheFile')",
    "_cache_file": """
def use_another_file(self, *args, init=caching.Cache.__init__):
    init(self, *args)
    self.file = self.__dict__.pop("_cache_file")
caching.Cache.__init__ = use_another_file""",
    "_cache": "numba.core.dispatcher.Dispatcher.enable_caching = lambda self: None",
    "load and save take more": """
def load_more(self, sig, context): return self._cache_file.load(sig, context)
def save_more(self, sig, data): return self._cache_file.save(sig, data, self)
caching.Cache._load_overload, caching.Cache._save_overload = load_more, save_more""",
}


@pytest.mark.parametrize("gone", GONE.values(), ids=GONE.keys())
def test_another_cache_of_numba_costs_time_only(gone, tmp_path):
    place = version(1, as_source, tmp_path / "site")
    printed = run(HIDE + gone + CALL, PYTHONPATH=str(place), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert "result 1 compiled 1" in printed
    assert printed.count(KEPT_NOWHERE) == 1
    assert "Numba 0." in printed


LOCK_GONE = "hide('numba.core.compiler_lock', 'global_compiler_lock')\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_without_the_lock_of_the_compiler(tmp_path):
    place = version(1, as_source, tmp_path / "site")
    printed = run(HIDE + LOCK_GONE + CALL, PYTHONPATH=str(place), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert "result 1 compiled 1" in printed
    assert printed.count("a fork while another thread compiles may hang") == 1
    assert KEPT_NOWHERE not in printed


def test_the_engine_serves_without_all_that_is_not_documented():
    gone = "hide('numba.core.caching', '_CacheLocator', 'IndexDataCacheFile')\n"
    gone += "hide('numba.core.serialize', 'dumps')\n" + LOCK_GONE
    printed = run(HIDE + gone + "assert_right(); print(ops.engine('cpu').__name__)")
    assert "roialign.cpu.engine" in printed
    assert "slow reference" not in printed
    assert printed.count(KEPT_NOWHERE) == 1


def test_kernels_are_called_where_their_address_is_not_told():
    """Then documented ways compile them, in each process."""
    program = """
import numba
del numba.core.dispatcher.Dispatcher.get_compile_result
from roialign.cpu import threads
threads._WORTH_A_THREAD = 1
torch.set_num_threads(2)
assert_right()
"""
    assert run(program).count(f"{KEPT_NOWHERE}: Numba 0.") == 1


OTHER_LIBRARIES = {
    "": "_PartLibrary",
    "import numba.core.codegen; hide('numba.core.codegen', 'JITCodeLibrary')\n": "JITCodeLibrary",
    "import numba.core.codegen; numba.core.codegen.JITCodeLibrary = object\n": "JITCodeLibrary",
}


@pytest.mark.parametrize("other", OTHER_LIBRARIES)
def test_parts_are_compiled_as_part_of_kernels_only(other, tmp_path):
    """Where Numba is another, its own compiler serves: it only takes longer."""
    place = version(1, as_source, tmp_path / "site")
    program = HIDE + other + CALL + "(part,) = greater.step.overloads.values()\n"
    program += "print('library', type(part.library).__name__)"
    printed = run(program, PYTHONPATH=str(place), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert "result 1 compiled 1" in printed
    assert f"library {OTHER_LIBRARIES[other]}" in printed
    assert KEPT_NOWHERE not in printed
