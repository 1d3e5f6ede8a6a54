"""The command line: `python -m roialign`."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from . import __version__, bench, demo, doctor, runner, warmup

# A command is a module with HELP, add_arguments(parser) and run(args) -> exit code. They import
# nothing heavy before they run.
COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "doctor": doctor,
    "warmup": warmup,
    "bench": bench,
    "run": runner,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without a command, print the help."""
    parser = argparse.ArgumentParser(
        prog="python -m roialign", description="Pool regions of interest from feature pyramids."
    )
    parser.add_argument("--version", action="version", version=f"roialign {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
