"""What Linux has and other systems lack, taken away: tests are still collected, the engine still serves.

No other system runs here. So this shows that nothing asks for what is not there, and no more.
"""

import os
import subprocess
import sys

import pytest
from processes import SOURCE, python_path, run

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is taken away is Linux's")

TESTS = SOURCE.parent / "tests"

# What could not be had as another system's.
BEFORE = """
import functorch.compile, numba, pytest, sysconfig, torchvision
sysconfig.get_config_vars()
"""
GONE = {
    "darwin": """
import os, sys
sys.platform = "darwin"
del os.sched_getaffinity
""",
    "win32": """
import ctypes, os, signal, sys
sys.platform = "win32"
for name in ("fork", "getuid", "register_at_fork", "sched_getaffinity", "sysconf", "WIFSIGNALED"):
    delattr(os, name)
for name in ("SIGALRM", "SIGBUS", "SIGKILL", "SIGXFSZ", "alarm", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
sys.modules |= dict.fromkeys(("fcntl", "pty", "pwd", "resource", "termios"))
_load = ctypes.CDLL.__init__
def load(self, name, *args, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    _load(self, name, *args, **options)
ctypes.CDLL.__init__ = load
""",
}


@pytest.mark.parametrize("gone", GONE.values(), ids=GONE.keys())
def test_tests_are_collected(gone, tmp_path):
    for needed in ("onnx", "onnxruntime"):  # without which not all tests can be collected
        pytest.importorskip(needed)
    program = f"{BEFORE}{gone}\n"
    program += f"sys.exit(pytest.main(['--collect-only', '-qqs', '-p', 'no:cacheprovider', {str(TESTS)!r}]))"
    environment = os.environ | {"PYTHONPATH": python_path(SOURCE)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_parity.py" in done.stdout


RIGHT = """
share_every_call()
assert_right(both)
from roialign.cpu import engine, memory, threads
assert ops.engine("cpu") is engine
assert threads._pool.helpers == 0
assert memory._madvise is None
assert memory.empty((1, 1, 2048, 2048), torch.float32, torch.device("cpu"), False).fill_(1).sum() == 2**22
"""


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        (GONE["darwin"], "undefined symbol: dispatch_semaphore_wait"),
        (GONE["win32"], "kernel32: cannot open shared object file"),
    ],
    ids=GONE.keys(),
)
def test_a_system_whose_functions_are_not_found(gone, says):
    """Callers do it all, and the log says so, once."""
    printed = run("import numba\n" + gone + RIGHT)
    assert printed.count("the CPU engine has no helper threads: ") == 1
    assert says in printed


# A C library of another make, or one linked into the interpreter, which cannot be asked.
LIBRARIES = {
    "without sem_init and madvise": "if name in ('sem_init', 'madvise'): raise AttributeError(name)",
    "without any": "raise AttributeError(name)",
    "not to be asked": "",
}
ANOTHER = """
import ctypes, numba
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        {lacks}
        return super().__getattr__(name)
    def __init__(self, name, *args, **options):
        if name is None and {closed}:
            raise OSError("Dynamic loading not supported")
        super().__init__(name, *args, **options)
ctypes.CDLL = Library
"""


@pytest.mark.parametrize("name", LIBRARIES)
def test_another_c_library(name):
    lacks = LIBRARIES[name]
    printed = run(ANOTHER.format(lacks=lacks or "pass", closed=not lacks) + RIGHT)
    assert printed.count("the CPU engine has no helper threads: ") == 1


def test_a_c_library_that_lacks_madvise_alone_has_helpers():
    program = ANOTHER.format(lacks="if name == 'madvise': raise AttributeError(name)", closed=False) + RIGHT
    assert run(program.replace("helpers == 0", "helpers == 1")) == ""
