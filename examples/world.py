"""The processes that torchrun started, or the one that there is without it."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class World(NamedTuple):
    """Which of how many processes this one is, and where it computes."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def join_world(device_type: str) -> Iterator[World]:
    """Join the other processes if torchrun started this one, and leave them in the end."""
    device = torch.device(device_type)
    if not dist.is_torchelastic_launched():
        yield World(0, 1, device)
        return
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def average(values: list[float], world: World) -> list[float]:
    """The mean over all processes, so that all of them see the same and decide alike."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return (total / world.size).tolist()


def gather(found: list[T], world: World) -> list[T]:
    """What all processes found."""
    if world.size == 1:
        return found
    shares: list[list[T]] = [[]] * world.size
    dist.all_gather_object(shares, found)
    return list(itertools.chain.from_iterable(shares))


def tell(world: World, message: str) -> None:
    """Say something once, whatever the number of processes."""
    if world.rank == 0:
        print(message, file=sys.stderr)
