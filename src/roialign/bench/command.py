"""The command: what is asked for, what is measured, and how it is told."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import MultiScaleRoIAlign, ops, reference
from ..doctor import first_line, print_table
from ..warmup import track
from . import memory, probes
from .timing import Effort, milliseconds, ratio
from .workloads import FULL, QUICK, TINY, WORKLOADS, Call, Size, Workload, make_boxes, make_call, make_maps

HELP = "time roialign against torchvision"

OURS, THEIRS = "roialign", "torchvision"
FLOOR, FIRST_CALL, GROWTH, MODELS, MEMORY = "floor", "first-call", "growth", "models", "memory"
SECTIONS = [*WORKLOADS, FLOOR, FIRST_CALL, GROWTH, MODELS, MEMORY]
COUNTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 8000)  # boxes, of the growth

Report = dict[str, Any]


class BenchError(Exception):
    """What the user asked for cannot be done; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    names = "; ".join(SECTIONS)
    add("--only", action="append", choices=SECTIONS, metavar="NAME", help=f"can be repeated; one of: {names}")
    add("--peers", action="store_true", help="time ONNX Runtime and OpenVINO too, where installed")
    add("--quick", action="store_true", help="small workloads, to see that it works; the times mean little")
    add("--seconds", type=float, default=5.0, help="for each workload (default: %(default)s)")
    add("--repeats", type=int, help="of each workload, instead of --seconds")
    add("--threads", type=int, help="of all that is timed (default: torch's choice)")
    add("--json", metavar="FILE", help="write all numbers to a file")
    add("--plot", metavar="FILE.png", help="draw the ratios, and the time against the number of boxes")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 if the times mean nothing, 2 if the arguments cannot be used."""
    try:
        _check(args)
        with _threads(args.threads):
            report = measure(args)
    except BenchError as error:
        print(f"python -m roialign bench: {error}", file=sys.stderr)
        return 2
    print_report(report)
    _write(report, args)
    wrong = list(complaints(report))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def complaints(report: Report) -> Iterator[str]:
    """Why the times mean nothing."""
    if report["settings"]["engine"] == reference.__name__:
        yield "the CPU engine cannot be used, these are the times of the slow reference; see doctor"
    for row in report["workloads"]:
        if not row["agrees"]:
            yield f"{row['name']}: the results DIFFER, do not trust the times"
    for row in report["models"]:
        if not row["agrees"]:
            yield f"{row['name']}, {row['what']}: the results DIFFER, do not trust the times"


def _check(args: argparse.Namespace) -> None:
    """Find before the measurement what would go wrong after it."""
    for option in ("seconds", "repeats", "threads"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise BenchError(f"--{option} must be positive, got {value:g}")
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise BenchError(f"--{option} must be a file in a folder that exists, got {path!r}")
    if args.plot is not None:
        _check_picture(args.plot)


def _check_picture(path: str) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise BenchError(f'{error}; pip install "roialign[demo]"') from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:] not in kinds:
        raise BenchError(f"--plot must end in one of {', '.join(kinds)}, got {path!r}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    saved = torch.get_num_threads()
    torch.set_num_threads(count or saved)
    try:
        yield
    finally:
        torch.set_num_threads(saved)


def _write(report: Report, args: argparse.Namespace) -> None:
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    if args.plot is not None:
        from .plot import draw

        draw(report, args.plot)
        print(f"wrote {args.plot}")


def measure(args: argparse.Namespace) -> Report:
    """Everything that is asked for, as plain data: the content of `--json`."""
    size, effort = (QUICK if args.quick else FULL), Effort(args.seconds, args.repeats)
    on_demand = {MODELS, MEMORY} if args.plot is not None else {MODELS, MEMORY, GROWTH}  # they take minutes
    wanted = args.only or [s for s in SECTIONS if s not in on_demand]
    poolers, skipped = find_poolers()
    settings = {"engine": ops.engine("cpu").__name__, "threads": torch.get_num_threads(), "quick": args.quick}
    report: Report = {
        "machine": probes.machine(),
        "versions": probes.versions(),
        "settings": settings | effort._asdict(),
        "skipped": skipped,
        "workloads": [],
        "floor": None,
        "first_call": None,
        "growth": None,
        "models": [],
        "memory": [],
    }
    for section in track("measuring", [s for s in SECTIONS if s in wanted]):
        if section == FLOOR:
            report["floor"] = probes.floor(size)
        elif section == FIRST_CALL:
            report["first_call"] = probes.first_call()
        elif section == GROWTH:
            report["growth"] = growth(size, effort, poolers)
        elif section == MODELS:
            report["models"] = _measure_models(effort, args.quick, skipped)
        elif section == MEMORY:
            report["memory"] = memory.scratch(args.quick)
        else:
            report["workloads"].append(_measure(WORKLOADS[section], args, poolers, skipped))
    return report


def _measure_models(effort: Effort, quick: bool, skipped: Mapping[str, str]) -> list[Report]:
    if THEIRS in skipped:
        return []
    from .models import measure_models

    return measure_models(effort, quick)


def find_poolers() -> tuple[dict[str, Any], dict[str, str]]:
    """The classes to compare, by name; and if torchvision's cannot be used, why."""
    try:
        theirs = importlib.import_module("torchvision.ops").MultiScaleRoIAlign
    except Exception as error:  # "operator torchvision::nms does not exist" and its kin
        return {OURS: MultiScaleRoIAlign}, {THEIRS: first_line(error)}
    return {OURS: MultiScaleRoIAlign, THEIRS: theirs}, {}


def _measure(
    workload: Workload, args: argparse.Namespace, poolers: Mapping[str, Any], skipped: dict[str, str]
) -> Report:
    """Times, ratio, largest difference and memory of one workload."""
    size = workload.size or (QUICK if args.quick else FULL)
    maps = make_maps(workload, size)
    calls = _make_calls(workload, size, maps, poolers)
    orders: dict[str, Tensor] = {}
    if args.peers and workload.is_plain:
        from .peers import find_peers

        peers, missing = find_peers(workload, maps, make_boxes(size.boxes_of(workload.boxes), size.image))
        skipped |= missing
        calls |= {name: peer.call for name, peer in peers.items()}
        orders = {name: peer.order for name, peer in peers.items()}
    differences = _differences(calls, orders)
    ms = milliseconds(calls, Effort(args.seconds, args.repeats))
    return {
        "name": workload.name,
        "boxes": size.boxes_of(workload.boxes),
        "bins": workload.bins,
        "what": describe(workload),
        "ms": ms,
        "ratio": ratio(ms[THEIRS], ms[OURS]) if THEIRS in ms else None,
        "differences": differences,
        "agrees": differences.get(THEIRS, 0.0) <= workload.tolerance,
        "extra_mb": None if size == TINY else probes.extra_memory(workload.name, args.quick),
    }


def _make_calls(
    workload: Workload, size: Size, maps: Mapping[str, Tensor], poolers: Mapping[str, Any]
) -> dict[str, Call]:
    """Ours in the dtype of the workload, torchvision's in float32."""
    dtypes = {OURS: workload.dtype, THEIRS: torch.float32}
    return {
        name: make_call(workload, size, {k: f.to(dtypes[name]) for k, f in maps.items()}, pooler_class)
        for name, pooler_class in poolers.items()
    }


def _differences(calls: Mapping[str, Call], orders: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of results from ours, relative to the largest value."""
    ours = [t.detach().float() for t in calls[OURS]()]
    found = {}
    for name, call in calls.items():
        if name in orders:
            pairs = [(ours[0][orders[name]], torch.cat([*call()]))]
        elif name != OURS:
            pairs = list(zip(ours, call(), strict=True))
        else:
            continue
        found[name] = max(float((a - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)
    return found


def describe(workload: Workload) -> str:
    """What is done, in words."""
    sampling = f"{workload.ratio} points per bin and axis" if workload.ratio else "adaptive sampling"
    passes = "forward and backward" if workload.timed == "both" else workload.timed
    words = [passes, sampling, "channels_last" if workload.channels_last else "NCHW"]
    words += ["maps that require a gradient"] * (workload.grad and workload.timed == "forward")
    words += ["torchvision in float32"] * (workload.dtype != torch.float32)
    return ", ".join(words)


def growth(size: Size, effort: Effort, poolers: Mapping[str, Any]) -> list[Report]:
    """Times of the box head by number of boxes."""
    box_head = WORKLOADS["box-head"]
    maps = make_maps(box_head, size)
    effort = effort._replace(seconds=effort.seconds / 4)
    points = []
    for count in sorted({size.boxes_of(count) for count in COUNTS}):
        workload = box_head._replace(boxes=count)
        calls = _make_calls(workload, size._replace(share=1.0), maps, poolers)
        points.append({"boxes": count, "ms": milliseconds(calls, effort)})
    return points


def print_report(report: Report) -> None:
    """Print all that was measured as tables."""
    machine, settings = report["machine"], report["settings"]
    found = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    print(f"{machine['cpu']} ({machine['vectors']}), {machine['cores']} cores, {settings['threads']} threads")
    print(f"{found}; {settings['engine']}; {machine['date']}")
    if settings["quick"]:
        print("--quick: small workloads, the times mean little")
    for name, reason in report["skipped"].items():
        print(f"without {name}: {reason}")
    print()
    if report["workloads"]:
        _print_workloads(report["workloads"])
    if report["growth"]:
        _print_growth(report["growth"])
    if report["models"]:
        _print_models(report["models"])
    if report["memory"]:
        _print_memory(report["memory"])
    if report["floor"]:
        print_table("What limits any implementation", ("", ""), _floor_rows(report["floor"]))
    if report["first_call"]:
        print_table("First calls, in new processes", ("", ""), _first_call_rows(report["first_call"]))


def _contestants(rows: list[Report]) -> list[str]:
    """All names in the rows, in order."""
    return list(dict.fromkeys(name for row in rows for name in row["ms"]))


def _print_workloads(rows: list[Report]) -> None:
    names = _contestants(rows)
    columns = ("workload", "boxes, bins", *names, "ratio", "extra MB")
    cells = []
    for row in rows:
        size = f"{row['boxes']}, {row['bins']}x{row['bins']}"
        times = (_show(row["ms"].get(name)) for name in names)
        extra = "-" if row["extra_mb"] is None else f"{row['extra_mb']:.1f}"
        cells.append((row["name"], size, *times, _show(row["ratio"], "x"), extra))
    print("Medians, ± half the distance of the quartiles. Ratio: torchvision / roialign, of the medians.")
    print("Extra: peak memory of roialign beyond its results.\n")
    print_table("Workloads, milliseconds", columns, cells)


def _print_growth(points: list[Report]) -> None:
    names = _contestants(points)
    rows = [(str(p["boxes"]), *(_show(p["ms"].get(name)) for name in names)) for p in points]
    print_table("Box head by number of boxes, milliseconds", ("boxes", *names), rows)


def _print_memory(rows: list[Report]) -> None:
    counts = list(rows[0]["mb"])
    cells = [
        (row["direction"], row["grid"], *("-" if mb is None else f"{mb:.1f}" for mb in row["mb"].values()))
        for row in rows
    ]
    print(
        "Peak memory beyond arguments and results; one channel, 7 x 7 bins, four maps of 800 x 1344 pixels.\n"
    )
    print_table("Scratch, MB", ("", "grid", *(f"{count} boxes" for count in counts)), cells)


def _print_models(rows: list[Report]) -> None:
    cells = [
        (
            row["name"],
            row["what"],
            *(_show(row["ms"][name]) for name in (OURS, THEIRS)),
            _show(row["ratio"], "x"),
        )
        for row in rows
    ]
    columns = ("detector", "", OURS, THEIRS, "ratio")
    print_table("Whole detectors, one image, milliseconds", columns, cells)


def _show(values: Mapping[str, float] | None, unit: str = "") -> str:
    """The median and half the distance of the quartiles, as a percentage of it."""
    if values is None:
        return "-"
    percent = 50 * (values["q3"] - values["q1"]) / values["median"]
    return f"{_short(values['median'])}{unit} ±{percent:.0f}%"


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _floor_rows(floor: Mapping[str, float]) -> list[tuple[str, str]]:
    output = f"write the {floor['output_mb']:.1f} MB of box-head's output"
    return [
        ("copy, read and written", f"{floor['copy_gb_per_s']:.1f} GB/s"),
        (f"{output}, memory reused", f"{floor['write_reused_ms']:.2f} ms"),
        (f"{output}, memory fresh", f"{floor['write_fresh_ms']:.2f} ms"),
        (f"{output}, memory fresh, huge pages", f"{floor['write_fresh_huge_pages_ms']:.2f} ms"),
    ]


def _first_call_rows(seconds: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("import roialign, beyond import torch", f"{1000 * seconds['import_s']:.0f} ms")]
    for key, what in (("cold", "compiled"), ("cached", "from the disk")):
        rows += [
            (f"first {call}, {what}", f"{seconds[key][f'{call}_s']:.2f} s")
            for call in ("forward", "backward")
        ]
        if "numba_s" in seconds[key]:
            rows.append((f"Numba alone, one line, {what}", f"{seconds[key]['numba_s']:.2f} s"))
    return rows
