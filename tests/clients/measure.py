"""How long a client pools with torchvision's engine and with ours: `python tests/clients/measure.py [NAME]`.

A step of the client is run once and its calls of torchvision are kept; then these are run again, alone, with
either engine by turns. The last columns are the whole step of the client, by turns too.
"""

import argparse
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from both import Step, medians, recorded

CLIENTS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
PAIRS = ("forward", "forward and backward", "step")


def row(name: str, step: Step, turns: int) -> str:
    calls = recorded(step)

    def forward() -> None:
        with torch.no_grad():
            for call in calls:
                call.forward()

    def both_ways() -> None:
        for call in calls:
            call.both_ways()

    pairs = [medians(run, turns) for run in (forward, both_ways)] + [medians(step, turns)]
    cells = [f"{theirs * 1e3:.2f} | {ours * 1e3:.2f} | {theirs / ours:.1f}" for theirs, ours in pairs]
    return f"| {name} | {len(calls)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CLIENTS)}; all by default")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    names = options.names or CLIENTS
    if len(names) > 1:
        for name in names:  # a process each: what one loads and starts must not slow another
            subprocess.run([sys.executable, __file__, name, "--turns", str(options.turns)], check=True)
        return
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    try:
        client = importlib.import_module(names[0])
    except pytest.skip.Exception as reason:
        print(f"| {names[0]} | {reason.msg} |")
        return
    columns = [f"{pair}: torchvision, ms | ours, ms | times" for pair in PAIRS]
    print(f"| client | calls | {' | '.join(columns)} |")
    for title, build in client.MEASURED.items():
        print(row(title, build(), options.turns), flush=True)


if __name__ == "__main__":
    main()
