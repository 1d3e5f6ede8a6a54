"""Time roialign against torchvision on this machine, with the shapes of detectors and with all others.

Most workloads are of one image of 800 x 1344, four maps, 256 channels. The whole modules are called, in one
process and by turns, so that whatever else the machine does hits
all alike; a ratio is that of the medians. What limits any implementation is measured beside them.
"""

from .command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
