"""What was measured, as tables on the terminal."""

from collections.abc import Mapping
from typing import Any

from ..doctor import print_table
from .contest import OURS, THEIRS
from .heat import print_shapes

Report = dict[str, Any]


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
    if report["busy"]:
        _print_busy(report["busy"])
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
    if report["shapes"]:
        print_shapes(report["shapes"])


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


def _print_busy(rows: list[Report]) -> None:
    names = _contestants(rows)
    columns = ("busy threads", *(f"{name}, {what}" for name in names for what in ("median", "95 %")))
    cells = [
        (str(row["busy"]), *(_short(row["ms"][name][what]) for name in names for what in ("median", "p95")))
        for row in rows
    ]
    print_table(
        f"Box head, {rows[0]['boxes']} boxes, beside threads of pure Python, milliseconds", columns, cells
    )


def _print_growth(points: list[Report]) -> None:
    names = _contestants(points)
    rows = [(str(p["boxes"]), *(_show(p["ms"].get(name)) for name in names)) for p in points]
    print_table("Box head by number of boxes, milliseconds", ("boxes", *names), rows)


def _print_memory(rows: list[Report]) -> None:
    counts = list(rows[0]["mb"])
    cells = [
        (
            str(row["channels"]),
            row["direction"],
            row["grid"],
            *("-" if mb is None else f"{mb:.1f}" for mb in row["mb"].values()),
        )
        for row in rows
    ]
    print("Peak memory beyond arguments and results; 7 x 7 bins, four maps of 800 x 1344 pixels.\n")
    print_table("Scratch, MB", ("channels", "", "grid", *(f"{count} boxes" for count in counts)), cells)


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
