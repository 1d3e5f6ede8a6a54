"""Compile all kernels for machines that are not here, and list what they call that is not in them.

Run: python tests/machines/cross_compile.py

LLVM makes code for every processor and system, wherever it runs. Numba is told that it runs elsewhere, and
every kernel that `warmup` compiles here is compiled for there. Nothing of it is run. A kernel is one piece:
what it calls is either Numba's or Python's, which are loaded with it, or the system's, or else LLVM ends the
process when the kernel is first needed. Exits with 1 if there is any such call.
"""

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

MACHINES = {  # those with packages of PyTorch and Numba: the least processor, and a common one
    "aarch64-unknown-linux-gnu": ("generic", "neoverse-v1"),
    "arm64-apple-darwin23.0.0": ("apple-m1",),
    "x86_64-pc-windows-msvc": ("x86-64", "x86-64-v3"),
    "x86_64-unknown-linux-gnu": ("x86-64", "x86-64-v3"),
}
# In the assembly of all of them; names with fewer or more underscores in front are the same.
NAME = r"\"?_*([A-Za-z][\w@]*?)(?:@PLT)?\"?"
CALL = re.compile(rf"^\s+(?:bl?|callq?|jmp|movabsq)\s+\$?{NAME}(?=[\s,;]|$)", re.MULTILINE)
DEFINED = re.compile(rf"^{NAME}:|^\s+\.(?:comm|lcomm)\s+{NAME},", re.MULTILINE)
LOADED = re.compile(r"Py[A-Z_]|numba_|NRT_")  # with Numba and Python, by their own names
# Of every C library; the last two of some. Processors round down and up by instruction, but old ones of x86.
SYSTEM = {"memcpy", "memmove", "memset", "floor", "floorf", "ceil", "ceilf", "bzero", "chkstk"}


def kernels() -> Iterator[tuple[str, Any]]:
    """All kernels by name, without their parts."""
    import importlib
    import pkgutil

    import roialign.cpu

    for module in sorted(m.name for m in pkgutil.iter_modules(roialign.cpu.__path__)):
        content = vars(importlib.import_module(f"roialign.cpu.{module}"))
        for name, value in content.items():
            options = getattr(value, "targetoptions", None)
            if options and not options.get("no_cpython_wrapper") and value.__module__.endswith(module):
                yield f"{module}.{name}", value


def compile_here() -> dict[str, list[Any]]:
    """Names and signatures of the kernels that `warmup` compiles, or finds compiled."""
    from roialign import warmup

    for variant in warmup.variants(warmup.DTYPES):
        warmup.compile_variant(variant)
    return {name: list(kernel.overloads) for name, kernel in kernels()}


def compile_there(triple: str) -> Counter[str]:
    """Compile for another machine; how many kernels make each call that nobody answers."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: triple  # before Numba and the kernels ask
    from numba.core import codegen, cpu

    # Nothing is laid into this process: neither kernels nor what Numba has compiled for its own use.
    codegen.JITCodeLibrary._finalize_specific = lambda self: None
    codegen.JITCPUCodegen._add_module = lambda self, module: None
    libraries: list[Any] = []

    def no_executable(self: Any, library: Any, description: Any, environment: Any) -> Any:
        library._ensure_finalized()
        libraries.append(library)
        return [].append

    cpu.CPUContext.get_executable = no_executable
    wanted: dict[str, list[Any]] = pickle.load(sys.stdin.buffer)
    calls: Counter[str] = Counter()
    for name, kernel in kernels():
        for signature in wanted[name]:
            kernel._compiler.compile(signature, None)
            assembly = libraries[-1].get_asm_str()
            defined = {name for pair in DEFINED.findall(assembly) for name in pair}
            called = set(CALL.findall(assembly)) - defined - SYSTEM
            calls.update(call for call in called if not LOADED.match(call))
            calls["kernels"] += 1
    return calls


def main() -> int:
    wanted = compile_here()
    print(f"{sum(map(len, wanted.values()))} kernels, by their signatures, of {len(wanted)}")
    nobody_answers = False
    for triple, processors in MACHINES.items():
        for cpu in processors:
            done = subprocess.run(
                [sys.executable, __file__, triple],
                input=pickle.dumps(wanted),
                env={**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""},
                stdout=subprocess.PIPE,
                check=True,
            )
            calls = pickle.loads(done.stdout)
            count = calls.pop("kernels")
            nobody_answers |= bool(calls)
            listed = ", ".join(f"{name} in {n}" for name, n in sorted(calls.items())) or "none"
            print(f"{triple}, {cpu}: {count} compiled; calls that nobody answers: {listed}", flush=True)
    return int(nobody_answers)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.stdout.buffer.write(pickle.dumps(compile_there(sys.argv[1])))
    else:
        sys.exit(main())
