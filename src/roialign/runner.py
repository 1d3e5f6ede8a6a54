"""Run a program with our engines behind torchvision's RoIAlign: no line of it changes.

python -m roialign run train.py --epochs 3
python -m roialign run -m package.module --flag
"""

import argparse
import os
import runpy
import sys

HELP = "run a Python program with these engines behind torchvision's RoIAlign"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A script or a module, and what it is given."""
    parser.usage = "python -m roialign run [-m MODULE | SCRIPT] ..."
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module, as after `python -m`")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script, as after `python`")


def run(args: argparse.Namespace) -> int:
    """Run it as `__main__`, as Python does; its exit code is that of the process."""
    program = args.module or args.script
    if not program:
        print("python -m roialign run: name a script, or a module after -m", file=sys.stderr)
        return 2
    from .torchvision import install

    install()
    sys.argv[:] = program
    if args.module:
        sys.path[0] = os.getcwd()
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
        runpy.run_path(program[0], run_name="__main__")
    return 0
