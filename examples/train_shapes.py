"""Train torchvision's Mask R-CNN on generated shapes, with torchvision's poolers and with roialign's.

    python examples/train_shapes.py                       # both in turn, and compare
    python examples/train_shapes.py --pooler roialign     # one of them
    python examples/train_shapes.py --resume              # go on after Ctrl-C
    torchrun --nproc-per-node 2 examples/train_shapes.py  # on two processes

From one seed both start from the same weights, see the same images and draw the same proposals, so
that only rounding tells their losses apart. Needs `pip install "roialign[examples]"`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shapes import CLASSES, ShapesDataset
from shapes_report import LOSSES, Row, Run, detect, read_log, write_report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from world import World, average, gather, join_world, tell

from roialign import convert_poolers

POOLERS = ("roialign", "torchvision")
PARTS = ("model", "optimizer", "scheduler")  # of a trainer, whose states a checkpoint holds
# The arguments that a curve depends on: a resumed run must have them as its checkpoint has.
SHAPING = (
    "steps",
    "batch_size",
    "learning_rate",
    "image_size",
    "train_images",
    "test_images",
    "seed",
    "dtype",
)
MAX_NORM = 10.0  # of the gradient, against a rare bad batch early on


class ArgumentsError(Exception):
    """The command cannot be carried out; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate and write the report; returns the exit code."""
    args = parse_arguments(argv)
    with join_world(args.device) as world:
        try:
            check_arguments(args, world)
            runs = {pooler: run(args, pooler, world) for pooler in args.poolers}
            if world.rank == 0:
                write_report(args.out, runs, held_out(args))
        except ArgumentsError as error:
            tell(world, f"train_shapes.py: error: {error}")
            return 2
        except KeyboardInterrupt:
            tell(world, "interrupted; the same command with --resume goes on from here")
            return 130
    return 0


def run(args: argparse.Namespace, pooler: str, world: World) -> Run:
    """Train with one of the poolers and detect the shapes of the held-out images."""
    model, rows = train(args, pooler, world)
    mine = range(world.rank, args.test_images, world.size)
    found = gather(detect(model, held_out(args), mine), world)
    return Run(rows, found)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="train_shapes.py",
        description="Train Mask R-CNN on generated shapes, with roialign's poolers and torchvision's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pooler", choices=[*POOLERS, "both"], default="both", help="whose poolers")
    add("--out", type=Path, default=Path("runs/shapes"), help="folder for logs, checkpoints and report")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, where there are any")
    add("--steps", type=at_least(1), default=800, help="of the optimizer")
    add("--batch-size", type=at_least(1), default=4, help="images per step, of all processes together")
    add("--learning-rate", type=float, default=0.001, help="the highest of the schedule")
    add("--image-size", type=at_least(1), default=96, help="height and width in pixels")
    add("--train-images", type=at_least(1), default=2000, help="in the training set")
    add("--test-images", type=at_least(1), default=200, help="in the held-out set")
    add("--checkpoint-every", type=at_least(1), default=100, metavar="STEPS", help="and at the end")
    add("--seed", type=at_least(0), default=0, help="of weights, images, their order, sampled proposals")
    add("--dtype", choices=["float32", "float64"], default="float32", help="of weights and images")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=best, help="where to compute")
    args = parser.parse_args(argv)
    args.poolers = POOLERS if args.pooler == "both" else (args.pooler,)
    return args


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers, for argparse."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
        return int(text)

    return read


def check_arguments(args: argparse.Namespace, world: World) -> None:
    """Raise an `ArgumentsError` for what argparse cannot know to be wrong."""
    if args.batch_size % world.size:
        rule = f"must be a multiple of the number of processes, {world.size}"
        raise ArgumentsError(f"--batch-size {rule}, got {args.batch_size}")
    if args.train_images < args.batch_size:
        raise ArgumentsError(
            f"--train-images must be at least --batch-size, {args.batch_size}, got {args.train_images}"
        )
    if args.image_size % 32:  # torchvision would pad it to one
        raise ArgumentsError(f"--image-size must be a multiple of 32, got {args.image_size}")
    if not 0 < args.learning_rate < math.inf:
        raise ArgumentsError(f"--learning-rate must be positive, got {args.learning_rate}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentsError(
            f"--out must be a folder that can be made, got {str(args.out)!r}: {error}"
        ) from None
    for path in (checkpoint_of(args, pooler) for pooler in args.poolers):
        if path.exists() and not args.resume:
            raise ArgumentsError(f"--out must hold no run, or --resume be given, got {str(path)!r}")


def build_model(args: argparse.Namespace, pooler: str) -> MaskRCNN:
    """Mask R-CNN with a ResNet-18 FPN, its heads and anchors made for small images."""
    # Without pretrained weights, normalise everywhere (arXiv:1811.08883); by groups, since the batches are
    # too small for statistics of their own, and so that it matters not how many processes share one.
    norm = functools.partial(nn.GroupNorm, 16)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    channels = 128
    backbone = BackboneWithFPN(
        resnet18(norm_layer=norm), layers, [64, 128, 256, 512], channels, norm_layer=norm
    )
    levels = list(layers.values())
    size = args.image_size
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2, canonical_scale=size),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [64, 64], [256], norm),
        box_predictor=FastRCNNPredictor(256, len(CLASSES)),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2, canonical_scale=size),
        mask_head=MaskRCNNHeads(channels, (64, 64), dilation=1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(64, 64, len(CLASSES)),
        min_size=size,
        max_size=size,
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=150,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_detections_per_img=20,
    )
    return convert_poolers(model) if pooler == "roialign" else model


def held_out(args: argparse.Namespace) -> ShapesDataset:
    """The images that are never trained on."""
    return ShapesDataset(range(args.test_images), args.image_size, args.seed)


def load_batches(args: argparse.Namespace, world: World, start: int) -> DataLoader[Any]:
    """This process's share of every batch from step `start` on."""
    images = range(args.test_images, args.test_images + args.train_images)
    dataset = ShapesDataset(images, args.image_size, args.seed)
    sampler = DistributedSampler(dataset, world.size, world.rank, seed=args.seed, drop_last=True)
    share = args.batch_size // world.size
    # Laid out ahead, the order of the images does not depend on where a run was resumed.
    order = list(itertools.islice(shuffled(sampler), start * share, args.steps * share))
    batches = [order[i : i + share] for i in range(0, len(order), share)]
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    )


def shuffled(sampler: DistributedSampler[Any]) -> Iterator[int]:
    """Indices epoch after epoch, each in an order of its own."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


class Trainer:
    """A detector in training, and all that a checkpoint keeps of it."""

    def __init__(self, args: argparse.Namespace, pooler: str, world: World) -> None:
        torch.manual_seed(args.seed)
        self.args, self.world = args, world
        self.dtype = getattr(torch, args.dtype)
        self.model = build_model(args, pooler).to(world.device, self.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.learning_rate, args.steps, pct_start=0.1
        )
        self.detector = DistributedDataParallel(self.model) if world.size > 1 else self.model
        self.step = 0

    def compute_losses(
        self, images: tuple[Tensor, ...], targets: tuple[dict[str, Tensor], ...]
    ) -> dict[str, Tensor]:
        """The losses of a batch by name, differentiable."""
        # The detector samples proposals at random. With a seed for every step there is no state of a
        # generator to save, and none that one run could have left different from another.
        entropy = (self.args.seed, self.step, self.world.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        return self.detector(
            [self.put(image) for image in images],
            [{name: self.put(value) for name, value in target.items()} for target in targets],
        )

    def descend(self, loss: Tensor) -> None:
        """Take one step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def train_step(self, images: tuple[Tensor, ...], targets: tuple[dict[str, Tensor], ...]) -> list[float]:
        """Take one step on this process's share of a batch; returns its losses, as they were before."""
        losses = self.compute_losses(images, targets)
        self.descend(sum(losses.values()))
        return torch.stack([losses[name].detach() for name in LOSSES]).tolist()

    def put(self, value: Tensor) -> Tensor:
        """Move an image or part of a target to where the model is, in the precision that it has."""
        return value.to(self.world.device, self.dtype if value.is_floating_point() else None)

    def save(self, path: Path) -> None:
        """Write a checkpoint; whoever reads at any moment finds the old one or the new one, whole."""
        state = {
            "step": self.step,
            "arguments": run_arguments(self.args, self.world),
            "torch": str(torch.__version__),
            **{name: getattr(self, name).state_dict() for name in PARTS},
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, if it is of the same run."""
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        for name, value in run_arguments(self.args, self.world).items():
            if value != state["arguments"][name]:
                rule = f"must be {state['arguments'][name]} to resume {str(path)!r}"
                raise ArgumentsError(f"{name} {rule}, got {value}")
        if state["torch"] != torch.__version__:
            tell(self.world, f"{path} is of torch {state['torch']}: the curve may go on a little differently")
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def run_arguments(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """What the curve of this run depends on, by the names that the user knows."""
    shaping = {"--" + name.replace("_", "-"): getattr(args, name) for name in SHAPING}
    return {**shaping, "the number of processes": world.size}


def train(args: argparse.Namespace, pooler: str, world: World) -> tuple[MaskRCNN, list[Row]]:
    """Train from the start, or from a checkpoint, to the end; a row of the log for every step."""
    checkpoint, log_path = checkpoint_of(args, pooler), args.out / pooler / "log.jsonl"
    trainer = Trainer(args, pooler, world)
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
        tell(world, f"{checkpoint}: going on after step {trainer.step}")
    rows = read_log(log_path, trainer.step)  # a log may have run ahead of its checkpoint
    trainer.detector.train()
    with defer_interrupt() as asked, open_log(log_path, rows, world) as log, show_progress(world) as bar:
        task = bar.add_task(pooler, total=args.steps, completed=trainer.step, figures="")
        for images, targets in load_batches(args, world, trainer.step):
            start = time.perf_counter()
            losses = trainer.train_step(images, targets)
            seconds = time.perf_counter() - start
            *losses, seconds, stop = average([*losses, seconds, asked.is_set()], world)
            rows.append(Row(trainer.step, sum(losses), *losses, seconds))
            print(json.dumps(rows[-1]._asdict()), file=log, flush=True)
            figures = f"loss {sum(losses):.3f}  {1 / seconds:.2f} steps/s"
            bar.update(task, completed=trainer.step, figures=figures)
            if not math.isfinite(sum(losses)):
                raise FloatingPointError(
                    f"the loss of step {trainer.step} is {sum(losses)}; lower --learning-rate"
                )
            ended = stop or trainer.step == args.steps
            if world.rank == 0 and (ended or trainer.step % args.checkpoint_every == 0):
                trainer.save(checkpoint)
            if stop:
                raise KeyboardInterrupt
    return trainer.model, rows


def checkpoint_of(args: argparse.Namespace, pooler: str) -> Path:
    """Where a run keeps its checkpoint."""
    return args.out / pooler / "checkpoint.pt"


@contextlib.contextmanager
def defer_interrupt() -> Iterator[threading.Event]:
    """Note Ctrl-C, for the loop to look at between steps: half a step is in no checkpoint."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def open_log(path: Path, rows: list[Row], world: World) -> Iterator[IO[str]]:
    """Begin a log with these rows; that of the first process alone is kept."""
    if world.rank > 0:
        path = Path(os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        log.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
        yield log


def show_progress(world: World) -> Progress:
    """A bar with the loss and the speed, shown by the first process."""
    return Progress(
        TextColumn("{task.description:>11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=world.rank > 0,
    )


if __name__ == "__main__":
    sys.exit(main())
