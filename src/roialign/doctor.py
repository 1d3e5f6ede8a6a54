"""What is installed, which engine serves which device, and whether the results are right."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import MultiScaleRoIAlign, __version__, ops, reference, schema

HELP = "show versions, engines and a self-check"

_DEMO = 'pip install "roialign[demo]"'


class Package(NamedTuple):
    """A package that roialign can use."""

    name: str  # as it is imported
    purpose: str
    remedy: str
    distribution: str = ""  # as it is installed, where that differs


PACKAGES = (
    Package("numba", "the CPU engine", "pip install numba"),
    Package("triton", "the GPU engine", "comes with CUDA builds of torch"),
    Package("torchvision", "its detectors; part of the self-check", "pip install torchvision"),
    Package("onnxruntime", "running exported models", "pip install onnxruntime"),
    Package("matplotlib", "the pictures of demo, bench and roialign.plot", _DEMO),
    Package("skimage", "the sample photograph of demo", _DEMO, "scikit-image"),
    Package("rich", "tables and progress bars", _DEMO),
)

# Features and weights lie in [0, 1]; the coordinates, of at most 16 cells, carry rounding errors of
# some 16 * 2^-24, and a value changes by at most one per cell on either axis.
TOLERANCE = 1e-5  # in float32
PATIENCE = 900  # seconds, for a slow machine that compiles everything

_NAMES = ["p2", "p3", "p4", "p5"]
_ANSWER = "roialign answers "


class Check(NamedTuple):
    """The outcome of one comparison."""

    what: str
    result: str
    passed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor takes none."""


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if every check passed, else 1."""
    print_table("Packages", ("package", "version", "used for", "to get it"), package_rows())
    print_table("Engines", ("device", "available", "engine"), engine_rows())
    print_table("Settings", ("setting", "value"), setting_rows())
    checks = list(outcomes(comparisons()))
    print_table("Self-check", ("comparison", "result"), [(c.what, c.result) for c in checks])
    passed = all(check.passed for check in checks)
    print("Everything checked is right." if passed else "The self-check FAILED: do not trust results.")
    return 0 if passed else 1


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: Callable[[str], str] = lambda cell: "",
) -> None:
    """Print rows as a table, with rich where it is installed, else as plain lines.

    Args:
        title: above the table.
        columns: their heads.
        rows: a text for each column.
        style: rich's name of the style of a text.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        print(title)
        for row in [columns, *rows]:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(f"  {line}".rstrip())
        print()
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell, style(cell)) for cell in row))  # as text: an error may hold brackets
    console.print(table)


def package_rows() -> list[tuple[str, str, str, str]]:
    """Name, version or what is wrong with it, purpose and remedy of every package."""
    rows = [
        ("roialign", __version__, "", ""),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})", "", ""),
        ("torch", torch.__version__, "everything", ""),
    ]
    for package in PACKAGES:
        name = package.distribution or package.name
        state, usable = package_state(package)
        rows.append((name, state, package.purpose, "" if usable else package.remedy))
    return rows


def package_state(package: Package) -> tuple[str, bool]:
    """The version of a package, or what is wrong with it; and whether it can be imported."""
    if importlib.util.find_spec(package.name) is None:
        return "missing", False
    try:
        module = importlib.import_module(package.name)
    except Exception as error:  # a package built for another torch or NumPy can raise anything
        return f"broken: {first_line(error)}", False
    try:
        return importlib.metadata.version(package.distribution or package.name), True
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "found")), True


def engine_rows() -> list[tuple[str, str, str]]:
    """Device type, whether there is one, and the module that serves it."""
    return [(device, availability(device), engine_name(device)) for device in ("cpu", "cuda", "mps", "xpu")]


def availability(device: str) -> str:
    """`yes`, with the name of a GPU, or `no`."""
    if device == "cpu":
        return "yes"
    backend = torch.backends.mps if device == "mps" else getattr(torch, device)
    if not backend.is_available():
        return "no"
    return f"yes: {backend.get_device_name()}" if hasattr(backend, "get_device_name") else "yes"


def engine_name(device: str) -> str:
    """The module that serves a device, and if it is only the reference, why."""
    name = ops.ENGINES.get(device)
    if name is None:
        return f"{reference.__name__} (plain PyTorch)"
    try:
        module = importlib.import_module(name)
        of_volumes = "" if getattr(module, "MOST_AXES", 3) == 3 else f"; of volumes {reference.__name__}"
        return module.__name__ + of_volumes
    except Exception as error:
        return f"{reference.__name__} (plain PyTorch, slow): {name} cannot be used: {first_line(error)}"


def setting_rows() -> list[tuple[str, str]]:
    """Threads, the folder of compiled kernels where the CPU engine has one, and what torchvision runs."""
    rows = [("threads", f"{torch.get_num_threads()}, torch.get_num_threads()")]
    cache_folder = getattr(ops.engine("cpu"), "cache_folder", None)
    if cache_folder is not None:
        rows.append(
            ("kernel cache", str(cache_folder() or "none: kernels are compiled anew by every process"))
        )
    if importlib.util.find_spec("torchvision") is not None:
        rows.append(("torchvision's operators", _behind_torchvision()))
    return rows


def _behind_torchvision() -> str:
    try:
        from .torchvision import is_installed
    except Exception as error:
        return f"torchvision is broken: {first_line(error)}"
    return (
        "run by roialign"
        if is_installed()
        else "its own; roialign.torchvision.install() puts ours behind them"
    )


def comparisons() -> list[str]:
    """Names of what is compared: every device that is there in every dtype it has, and torchvision."""
    devices = [device for device in ("cpu", "cuda", "mps", "xpu") if availability(device) != "no"]
    return [*(f"{device} {dtype}" for device in devices for dtype in dtypes_of(device)), "torchvision"]


def dtypes_of(device: str) -> list[str]:
    """Names of the dtypes of maps that a device can hold."""
    lacks = device == "mps"
    if device == "xpu":
        lacks = not getattr(torch.xpu.get_device_properties(), "has_fp64", True)
    return [str(d).removeprefix("torch.") for d in schema.DTYPES if not (lacks and d == torch.float64)]


def outcomes(names: Sequence[str]) -> Iterator[Check]:
    """Compare in a process of its own: one that ends it is reported, and another goes on with the rest."""
    while names:
        checks, end = _outcomes_of_process(names)
        yield from checks
        names = names[len(checks) :]
        if names:
            yield Check(_title(names[0]), f"FAILED: {end}", False)
            names = names[1:]


def _outcomes_of_process(names: Sequence[str]) -> tuple[list[Check], str]:
    """The outcomes that it gave, and how it ended."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from roialign import doctor; doctor.answer({names!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
            end = _ending(process.returncode, err)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            end = f"no answer in {PATIENCE} s"
    lines = [line.removeprefix(_ANSWER) for line in out.splitlines() if line.startswith(_ANSWER)]
    return [Check(*json.loads(line)) for line in lines], end


def _ending(status: int, errors: str) -> str:
    how = f"the process ended with status {status}"
    if status < 0:
        known = {s.value for s in signal.Signals}
        how = f"the process was ended by {signal.Signals(-status).name if -status in known else -status}"
    return ": ".join([how, *errors.strip().splitlines()[-1:]])


def answer(names: Sequence[str]) -> None:
    """Compare, and print each outcome for the process that waits for it."""
    for name in names:
        check = torchvision_check() if name == "torchvision" else device_check(*name.split())
        print(f"\n{_ANSWER}{json.dumps(check)}", flush=True)


def _title(name: str) -> str:
    return "cpu with torchvision" if name == "torchvision" else f"{name} with the reference in float64"


def device_check(device: str, dtype: str = "float32") -> Check:
    """Values and gradients, for both kinds of sampling, aligned or not."""
    what = _title(f"{device} {dtype}")
    kind: torch.dtype = getattr(torch, dtype)
    cases = [(sampling_ratio, aligned) for sampling_ratio in (2, -1) for aligned in (False, True)]
    try:
        error = max_or_nan([_error(device, kind, *case) for case in cases])
    except Exception as failure:  # the report is for installations where anything may go wrong
        return Check(what, f"FAILED: {first_line(failure)}", False)
    return _verdict(what, error, tolerance(kind))


def tolerance(dtype: torch.dtype) -> float:
    """Of the largest value: what sums in the working precision may be off, and one rounding of the result."""
    half = dtype in (torch.float16, torch.bfloat16)
    sums = torch.float32 if half else dtype
    rounding = torch.finfo(dtype).eps / 2 if half else 0.0
    return TOLERANCE * torch.finfo(sums).eps / torch.finfo(torch.float32).eps + rounding


def max_or_nan(errors: Sequence[float]) -> float:
    """The largest, or a NaN if there is one, which `max` may pass over."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def torchvision_check() -> Check:
    """Compare values with `torchvision.ops.MultiScaleRoIAlign`, if it is there."""
    what = _title("torchvision")
    if importlib.util.find_spec("torchvision") is None:
        return Check(what, "skipped: torchvision is missing", True)
    pyramid, boxes = _sample()
    arguments = (pyramid, [boxes], [(64, 64)])
    try:
        from torchvision.ops import MultiScaleRoIAlign as Theirs

        theirs = Theirs(_NAMES, 7, 2, canonical_scale=28)(*arguments)
    except Exception as error:  # "operator torchvision::nms does not exist" and its kin
        return Check(what, f"skipped: torchvision is broken: {first_line(error)}", True)
    try:
        ours = MultiScaleRoIAlign(_NAMES, 7, 2, canonical_scale=28)(*arguments)
    except Exception as failure:
        return Check(what, f"FAILED: {first_line(failure)}", False)
    return _verdict(what, float((ours - theirs).abs().max()), TOLERANCE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sample() -> tuple[dict[str, Tensor], Tensor]:
    """A pyramid of a 64 x 64 image and boxes for each of its levels, one beyond the image."""
    generator = torch.Generator().manual_seed(0)
    pyramid = {
        name: torch.rand(1, 3, 16 // 2**i, 16 // 2**i, generator=generator) for i, name in enumerate(_NAMES)
    }
    boxes = [[3, 5, 12, 17], [10, 8, 31, 30], [8, 12, 50, 49], [1, 2, 63, 62], [40, 40, 90, 70], [7, 7, 7, 7]]
    return pyramid, torch.tensor(boxes, dtype=torch.float32)


def _error(device: str, dtype: torch.dtype, sampling_ratio: int, aligned: bool) -> float:
    """The largest deviation from the reference in float64, over values and gradients."""
    got = _values_and_gradients(device, dtype, dtype, sampling_ratio, aligned)
    with ops.use_reference():
        expected = _values_and_gradients("cpu", dtype, torch.float64, sampling_ratio, aligned)
    # A cell's gradient sums over many bins; relative to the largest it is as exact as a value.
    return max_or_nan(
        [float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True)]
    )


def _values_and_gradients(
    device: str, given: torch.dtype, dtype: torch.dtype, sampling_ratio: int, aligned: bool
) -> list[Tensor]:
    """Pooled values and the gradient of each map, of numbers that `given` can hold; in float64 on the CPU."""
    pyramid, boxes = _sample()
    maps = {name: f.to(given).to(device, dtype).requires_grad_() for name, f in pyramid.items()}
    pooler = MultiScaleRoIAlign(_NAMES, 7, sampling_ratio, canonical_scale=28, aligned=aligned)
    pooled = pooler(maps, [boxes.to(device)], [(64, 64)])
    weights = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(1)).to(given)
    gradients = torch.autograd.grad(pooled, list(maps.values()), weights.to(device, dtype))
    return [t.detach().cpu().double() for t in (pooled, *gradients)]


def _verdict(what: str, error: float, allowed: float) -> Check:
    passed = error <= allowed  # false for a NaN
    return Check(what, f"{'passed' if passed else 'FAILED'}: largest difference {error:.1e}", passed)
