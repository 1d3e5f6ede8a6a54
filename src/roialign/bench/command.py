"""The command: what is asked for, what is measured, and how it is told."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..warmup import track
from . import busy, memory, probes, shapes
from .contest import THEIRS, agreement, find_libraries, make_calls, race
from .tables import print_report
from .timing import Effort, milliseconds, threads
from .workloads import FULL, QUICK, TINY, WORKLOADS, Library, Size, Workload, make_boxes, make_maps

HELP = "time roialign against torchvision"

FLOOR, FIRST_CALL, BUSY, GROWTH, MODELS, MEMORY = "floor", "first-call", "busy", "growth", "models", "memory"
SHAPES = "shapes"
SECTIONS = [*WORKLOADS, BUSY, FLOOR, FIRST_CALL, GROWTH, MODELS, MEMORY, SHAPES]
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
    add("--minutes", type=float, default=10.0, help="for the shapes, about (default: %(default)s)")
    add("--threads", type=int, help="of all that is timed (default: torch's choice)")
    add("--json", metavar="FILE", help="write all numbers to a file")
    add("--plot", metavar="FILE.png", help="draw the ratios, and the time against the number of boxes")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 if the times mean nothing, 2 if the arguments cannot be used."""
    try:
        _check(args)
        with threads(args.threads):
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
    for row in (report["shapes"] or {"rows": []})["rows"]:
        if not row["agrees"]:
            yield f"shapes, {row['name']}: the results DIFFER, do not trust the times"
    for row in report["models"]:
        if not row["agrees"]:
            yield f"{row['name']}, {row['what']}: the results DIFFER, do not trust the times"


def _check(args: argparse.Namespace) -> None:
    """Find before the measurement what would go wrong after it."""
    for option in ("seconds", "repeats", "minutes", "threads"):
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
    on_demand = {BUSY, MODELS, MEMORY, SHAPES}  # they take minutes
    if args.plot is None:
        on_demand.add(GROWTH)
    wanted = args.only or [s for s in SECTIONS if s not in on_demand]
    libraries, skipped = find_libraries()
    settings = {"engine": ops.engine("cpu").__name__, "threads": torch.get_num_threads(), "quick": args.quick}
    report: Report = {
        "machine": probes.machine(),
        "versions": probes.versions(),
        "settings": settings | effort._asdict(),
        "skipped": skipped,
        "workloads": [],
        "floor": None,
        "first_call": None,
        "busy": [],
        "growth": None,
        "models": [],
        "memory": [],
        "shapes": None,
    }
    for section in track("measuring", [s for s in SECTIONS if s in wanted and s != SHAPES]):
        if section == FLOOR:
            report["floor"] = probes.floor(size)
        elif section == FIRST_CALL:
            report["first_call"] = probes.first_call()
        elif section == BUSY:
            report["busy"] = busy.measure(size, effort, libraries)
        elif section == GROWTH:
            report["growth"] = growth(size, effort, libraries)
        elif section == MODELS:
            report["models"] = _measure_models(effort, args.quick, skipped)
        elif section == MEMORY:
            report["memory"] = memory.scratch(args.quick)
        else:
            report["workloads"].append(_measure(WORKLOADS[section], args, libraries, skipped))
    if SHAPES in wanted and THEIRS not in skipped:  # with a progress of their own
        minutes = args.minutes / 20 if args.quick else args.minutes
        counts = [] if args.threads is None else [args.threads]
        report["shapes"] = shapes.measure(minutes, effort, args.quick, libraries, counts)
    return report


def _measure_models(effort: Effort, quick: bool, skipped: Mapping[str, str]) -> list[Report]:
    if THEIRS in skipped:
        return []
    from .models import measure_models

    return measure_models(effort, quick)


def _measure(
    workload: Workload, args: argparse.Namespace, libraries: Mapping[str, Library], skipped: dict[str, str]
) -> Report:
    """Times, ratio, largest difference and memory of one workload."""
    size = workload.size_of(args.quick)
    maps = make_maps(workload, size)
    calls = make_calls(workload, size, maps, libraries)
    orders: dict[str, Tensor] = {}
    if args.peers and workload.is_plain:
        from .peers import find_peers

        peers, missing = find_peers(workload, maps, make_boxes(size.boxes_of(workload.boxes), size.image))
        skipped |= missing
        calls |= {name: peer.call for name, peer in peers.items()}
        orders = {name: peer.order for name, peer in peers.items()}
    row = {
        "name": workload.name,
        "boxes": size.boxes_of(workload.boxes),
        "bins": workload.bins,
        "what": describe(workload),
    }
    row |= agreement(workload, calls, orders) | race(calls, Effort(args.seconds, args.repeats))
    extra_mb = None if workload.size == TINY else probes.extra_memory(workload.name, args.quick)
    return row | {"extra_mb": extra_mb}


def describe(workload: Workload) -> str:
    """What is done, in words."""
    sampling = f"{workload.ratio} points per bin and axis" if workload.ratio else "adaptive sampling"
    passes = "forward and backward" if workload.timed == "both" else workload.timed
    words = [passes, sampling, "channels_last" if workload.channels_last else "NCHW"]
    if workload.size not in (None, TINY):
        height, width = workload.size.image
        words.append(f"{workload.images} x {workload.size.channels} x {height} x {width}")
    words += ["maps that require a gradient"] * (workload.grad and workload.timed == "forward")
    words += ["torchvision in float32"] * (workload.dtype != torch.float32)
    return ", ".join(words)


def growth(size: Size, effort: Effort, libraries: Mapping[str, Library]) -> list[Report]:
    """Times of the box head by number of boxes."""
    box_head = WORKLOADS["box-head"]
    maps = make_maps(box_head, size)
    effort = effort._replace(seconds=effort.seconds / 4)
    points = []
    for count in sorted({size.boxes_of(count) for count in COUNTS}):
        workload = box_head._replace(boxes=count)
        calls = make_calls(workload, size._replace(share=1.0), maps, libraries)
        points.append({"boxes": count, "ms": milliseconds(calls, effort)})
    return points
