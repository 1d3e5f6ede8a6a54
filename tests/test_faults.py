"""What goes wrong around the CPU engine - disks, packages - and what then happens; see docs/reliability.md.

Each fault gets a process of its own, where it is real: a mount that cannot be written, a disk that is full.
`test_interruptions` has those of threads and signals; `test_cpu`, `test_import`, `test_doctor` and
`test_warmup` those that need no process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SOURCE, finish, run, start

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made as Linux makes them")

KEPT_NOWHERE = "compiled kernels cannot be kept, each process compiles anew"


# the folder of compiled kernels


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A folder of compiled kernels: those of `forward`."""
    folder = tmp_path_factory.mktemp("warm")
    run("assert_right()", NUMBA_CACHE_DIR=str(folder))
    assert len(list(folder.rglob("*.nbc"))) == 7
    return folder


@pytest.fixture
def copy(warm, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(warm, tmp_path / "copy"))


def compiled(*, anew: int) -> str:
    """A program that pools and asserts how many kernels were compiled anew."""
    return f"""
assert_right()
from roialign.cpu import forward, slots, tables
kernels = [tables.survey, tables.sort, tables.fill, forward.group, forward.run, slots.share_out]
misses = sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)
assert misses == {anew}, misses
"""


def mounted(script: str) -> tuple[str, ...]:
    """A command in front of another that gives it mounts of its own; skips where that is not allowed."""
    wrap = ("unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]))
    wrap += ("sh", "-ec", f'{script}; exec "$@"', "--")
    if shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    return wrap


def read_only(*folders: Path) -> tuple[str, ...]:
    """Mounts on which nothing can be written."""
    return mounted("; ".join(f'mount --bind "{f}" "{f}"; mount -o remount,bind,ro "{f}"' for f in folders))


@pytest.fixture
def installed(tmp_path):
    """A copy of the package, without what is compiled, and an empty home."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "roialign", tmp_path / "site" / "roialign", ignore=ignore)
    (tmp_path / "home").mkdir()
    return {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "home")}


def test_a_home_and_an_installation_that_cannot_be_written(installed, tmp_path):
    wrap = read_only(tmp_path)
    printed = run(
        "from roialign import doctor\nassert_right(); print(doctor.setting_rows())", wrap=wrap, **installed
    )
    assert printed.count(KEPT_NOWHERE) == 1
    assert "none: kernels are compiled anew by every process" in printed


@pytest.mark.parametrize("locked", ["site", "site and home"])
def test_kernels_compiled_ahead_serve_where_nothing_can_be_written(warm, installed, tmp_path, locked):
    """As in a container: compiled when the image was made, by root, who may write beside the source."""
    (folder,) = warm.iterdir()
    shutil.copytree(folder, tmp_path / "site" / "roialign" / "cpu" / "__pycache__")
    wrap = read_only(*(tmp_path / name for name in locked.split(" and ")))
    printed = run(compiled(anew=0), wrap=wrap, **installed)
    assert printed.count(KEPT_NOWHERE) == ("home" in locked)


def test_a_full_disk(tmp_path):
    wrap = mounted(f'mount -t tmpfs -o size=64k tmpfs "{tmp_path}"')
    printed = run("assert_right()", wrap=wrap, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed.count(KEPT_NOWHERE) == 1
    assert "No space left on device" in printed


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path):
    """As a full disk, where no mount is allowed."""
    program = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
assert_right()
"""
    printed = run(program, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed.count(KEPT_NOWHERE) == 1
    assert "File too large" in printed
    assert not list(tmp_path.rglob("*.tmp*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("ending", "damage"), [("nbi", truncate), ("nbc", garble), ("nbc", flip_a_bit)])
def test_damaged_kernels_are_compiled_anew_and_replaced(copy, ending, damage):
    for name in ("forward.group", "tables.sort"):
        (path,) = copy.rglob(f"{name}*.{ending}")
        damage(path)
    assert run(compiled(anew=2), NUMBA_CACHE_DIR=str(copy)) == ""
    assert run(compiled(anew=0), NUMBA_CACHE_DIR=str(copy)) == ""


def test_a_kernel_under_the_name_of_another_is_not_run(copy):
    """As when processes compile for different types at once: the index of one, the kernel of the other."""
    run("feature = feature.double(); assert_right()", NUMBA_CACHE_DIR=str(copy))
    first, second = sorted(copy.rglob("forward.run*.nbc"))
    shutil.copy(second, first)
    assert run(compiled(anew=1), NUMBA_CACHE_DIR=str(copy)) == ""


def test_several_processes_compile_into_one_folder(tmp_path):
    dtypes = ("float", "float", "double")
    programs = [f"feature = feature.{dtype}(); assert_right()" for dtype in dtypes]
    together = [start(program, NUMBA_CACHE_DIR=str(tmp_path)) for program in programs]
    assert [finish(process) for process in together] == [""] * len(dtypes)
    for program in programs[1:]:
        assert run(program, NUMBA_CACHE_DIR=str(tmp_path)) == ""


# Numba and Triton that are broken

SLOW = "cannot be used, the slow reference serves instead"
BROKEN = {
    "missing": ("numba", "import sys; raise ModuleNotFoundError('no module named numba', name='numba')"),
    "raises": ("numba", "raise RuntimeError('built for another NumPy')"),
    "lacks what is used": ("numba", ""),
    "llvmlite raises": ("llvmlite", "raise OSError('libLLVM.so: cannot open shared object file')"),
}


@pytest.mark.parametrize(("package", "content"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_numba(package, content, tmp_path):
    (tmp_path / f"{package}.py").write_text(content)
    program = """
assert_right(both)
assert_right(both)
from roialign import doctor
print(doctor.engine_rows()[0])
"""
    printed = run(program, PYTHONPATH=f"{tmp_path}{os.pathsep}{SOURCE}")
    assert printed.count(SLOW) == 1
    assert "roialign.cpu.engine cannot be used" in printed


def test_numba_told_not_to_compile():
    assert run("assert_right(both); assert_right(both)", NUMBA_DISABLE_JIT="1").count(SLOW) == 1


def test_a_broken_triton(tmp_path):
    """The CPU engine does not care; a GPU would be served by the reference, with a warning."""
    (tmp_path / "triton.py").write_text("raise RuntimeError('no driver')")
    program = "assert_right(both); print(ops.engine('cuda').__name__)"
    printed = run(program, PYTHONPATH=f"{tmp_path}{os.pathsep}{SOURCE}")
    assert printed.count(SLOW) == 1
    assert "RuntimeError: no driver" in printed
    assert printed.splitlines()[0] == "roialign.reference" or "roialign.reference" in printed
