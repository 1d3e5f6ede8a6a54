"""What a detector makes of the held-out shapes: detections, average precision, a table and a picture.

python examples/shapes_report.py ONE/log.jsonl OTHER/log.jsonl  # how long two curves stay together
"""

import contextlib
import io
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import CLASSES, ShapesDataset
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
COLOURS = ("#000000", "#56B4E9", "#F0E442", "#CC79A7")  # of CLASSES, after Okabe and Ito
SHOWN_IMAGES, SHOWN_SCORE = 5, 0.5

Detection = dict[str, Any]  # in COCO's format: image_id, category_id, bbox, segmentation, score


class Row(NamedTuple):
    """A step of training, as the log has it."""

    step: int  # counted from 1
    loss: float  # the sum of those below, before the step was taken
    loss_objectness: float
    loss_rpn_box_reg: float
    loss_classifier: float
    loss_box_reg: float
    loss_mask: float
    seconds: float  # without loading the images


class Run(NamedTuple):
    """What came of one run of training."""

    rows: list[Row]
    detections: list[Detection]


@torch.inference_mode()
def detect(model: nn.Module, dataset: ShapesDataset, items: Iterable[int]) -> list[Detection]:
    """Detect the shapes of these items of a dataset, in COCO's format."""
    weight = next(model.parameters())
    model.eval()
    found: list[Detection] = []
    for item in items:
        image, target = dataset[item]
        (output,) = model([image.to(weight)])
        masks = output["masks"][:, 0] > 0.5  # (L, 1, H, W) probabilities
        found += annotate(int(target["image_id"]), output["boxes"], output["labels"], masks, output["scores"])
    return found


def annotate(image_id: int, boxes: Tensor, labels: Tensor, masks: Tensor, scores: Tensor) -> list[Detection]:
    """COCO's format of `(L, 4)` boxes x1, y1, x2, y2, `(L, H, W)` masks, and `(L,)` labels and scores."""
    sizes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)  # x, y, width, height
    rows = zip(sizes.tolist(), labels.tolist(), masks.cpu().numpy(), scores.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": label,
            "bbox": box,
            "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
            "score": score,
        }
        for box, label, mask, score in rows
    ]


def decode(shape: Detection) -> np.ndarray:
    """The mask `(H, W)` of a detection."""
    with warnings.catch_warnings():  # pycocotools 2.0 has an __array__ of before NumPy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        return rle.decode(shape["segmentation"]).astype(bool)


def annotate_target(target: dict[str, Tensor]) -> list[Detection]:
    """The shapes that are there, as if they had been detected with certainty."""
    boxes, ones = target["boxes"], torch.ones(len(target["boxes"]))
    return annotate(int(target["image_id"]), boxes, target["labels"], target["masks"], ones)


def ground_truth(dataset: ShapesDataset) -> COCO:
    """The targets of a dataset, as pycocotools wants them."""
    coco = COCO()
    annotations = [annotation for _, target in dataset for annotation in annotate_target(target)]
    for i, annotation in enumerate(annotations, 1):  # COCOeval takes id 0 for no match
        annotation.update(id=i, iscrowd=0, area=float(rle.area(annotation["segmentation"])))
    coco.dataset = {
        "images": [{"id": i, "height": dataset.size, "width": dataset.size} for i in dataset.indices],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES) if i > 0],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precision(detections: list[Detection], truth: COCO) -> dict[str, float]:
    """COCO's average precision of boxes and masks, over IoU 0.5 to 0.95 and at 0.5."""
    names = ("box AP", "box AP50", "mask AP", "mask AP50")
    if not detections:  # loadRes would look at the first
        return dict.fromkeys(names, 0.0)
    values: list[float] = []
    for kind in ("bbox", "segm"):
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(detections), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values += evaluation.stats[:2].tolist()
    return dict(zip(names, values, strict=True))


def read_log(path: Path, steps: int | None = None) -> list[Row]:
    """The rows of a log, of its first steps if so many are named; none if there is no log."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()[:steps]]


def relative_difference(ours: list[Row], theirs: list[Row]) -> np.ndarray:
    """Of the losses, step by step."""
    a, b = (np.array([row.loss for row in rows]) for rows in (ours, theirs))
    return np.abs(a - b) / np.abs(b)


def agreement(ours: list[Row], theirs: list[Row]) -> dict[str, float]:
    """How many steps two curves stay within some relative differences, counted from the first."""
    difference = relative_difference(ours, theirs)
    return {f"steps within {d:g}": int(np.argmax([*(difference > d), True])) for d in (1e-6, 1e-4, 1e-2)}


def last_loss(rows: list[Row]) -> float:
    """The mean over the last tenth of the steps."""
    return statistics.fmean(row.loss for row in rows[-math.ceil(len(rows) / 10) :])


def median_ms(rows: list[Row]) -> float:
    """The median time of a step in milliseconds; the first may have to compile."""
    return 1000 * statistics.median(row.seconds for row in rows[1:] or rows)


def write_report(out: Path, runs: Mapping[str, Run], dataset: ShapesDataset) -> None:
    """Write `result.json` and `report.png`, and print the result."""
    truth = ground_truth(dataset)
    result: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        training = {"loss, last tenth": last_loss(run.rows), "ms per step": median_ms(run.rows)}
        result[name] = average_precision(run.detections, truth) | training
    print_table(result)
    if len(runs) > 1:
        first, second = (run.rows for run in runs.values())
        result["agreement"] = agreement(first, second)
        result["agreement"]["times faster per step"] = median_ms(second) / median_ms(first)
        print_table({"agreement": result["agreement"]})
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_report(runs, dataset).savefig(out / "report.png")
    print(f"wrote {out / 'result.json'} and {out / 'report.png'}")


def print_table(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print named figures, a column for each mapping of the same names."""
    table = Table("", *columns, box=box.SIMPLE_HEAD)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{figures[name]:.4g}" for figures in columns.values()))
    Console().print(table)


def draw_report(runs: Mapping[str, Run], dataset: ShapesDataset) -> "Figure":
    """Held-out images, as they are and as the first run sees them, over the loss curves of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9.6), dpi=100)
    upper, lower = figure.subfigures(2, height_ratios=(6, 3.6))
    items = range(min(SHOWN_IMAGES, len(dataset)))
    pictures = upper.subplots(2, SHOWN_IMAGES, squeeze=False)
    upper.subplots_adjust(0.03, 0.01, 0.995, 0.96, wspace=0.04, hspace=0.04)
    name, run = next(iter(runs.items()))
    for axes in pictures.flat:
        axes.set(xticks=[], yticks=[])
    pictures[0, 0].set_ylabel("ground truth", fontsize=12)
    pictures[1, 0].set_ylabel(f"predicted, {name}", fontsize=12)
    for item in items:
        image, target = dataset[item]
        found = (d for d in run.detections if d["image_id"] == int(target["image_id"]))
        seen = [d for d in found if d["score"] >= SHOWN_SCORE]
        draw_shapes(pictures[0, item], image, annotate_target(target), with_scores=False)
        draw_shapes(pictures[1, item], image, seen, with_scores=True)
    draw_curves(lower, runs)
    return figure


def draw_shapes(axes: "Axes", image: Tensor, shapes: list[Detection], with_scores: bool) -> None:
    """An image with the mask, the box and the label of each shape."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    pixels = image.movedim(0, 2).numpy().copy()
    for shape in shapes:
        mask = decode(shape)
        pixels[mask] = 0.35 * pixels[mask] + 0.65 * np.array(to_rgb(colour_of(shape)))
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    for shape in shapes:
        x, y, w, h = shape["bbox"]
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour_of(shape), linewidth=1.6))
    label_shapes(axes, shapes, with_scores)


def label_shapes(axes: "Axes", shapes: list[Detection], with_scores: bool) -> None:
    """Write each label at a corner of its box where no other label is."""
    taken: list[tuple[float, float, float, float]] = []
    side = axes.get_xlim()[1]
    high = 0.062 * side
    for shape in sorted(shapes, key=lambda shape: shape["bbox"][1]):
        text = CLASSES[shape["category_id"]] + (f" {shape['score']:.2f}" if with_scores else "")
        wide = 0.026 * side * len(text)
        x, y, w, h = shape["bbox"]
        corners = itertools.product((y - high, y + h, y, y + h - high), (x, x + w - wide))
        inside = [
            (left, top, left + wide, top + high)
            for top, left in ((top, min(max(left, 0), side - wide)) for top, left in corners)
            if 0 <= top <= side - high
        ]
        place = min(inside, key=lambda place: sum(overlap(place, other) for other in taken))
        taken.append(place)
        axes.text(
            *place[:2],
            text,
            fontsize=8,
            family="monospace",
            va="top",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": colour_of(shape), "edgecolor": "none"},
        )


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes x1, y1, x2, y2 share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def colour_of(shape: Detection) -> str:
    """The colour of its class."""
    return COLOURS[shape["category_id"]]


def draw_curves(figure: "SubFigure", runs: Mapping[str, Run]) -> None:
    """The loss of every run, and by how much those of two differ."""
    from matplotlib.ticker import LogLocator

    curves, *beside = figure.subplots(1, len(runs), squeeze=False)[0]
    figure.subplots_adjust(0.06, 0.14, 0.985, 0.9, wspace=0.16)
    styles = (("#56B4E9", 4), ("#D55E00", 1))  # a thin line on a broad one: both are seen where they agree
    for (name, run), (colour, width) in zip(runs.items(), styles, strict=False):
        steps = [row.step for row in run.rows]
        curves.plot(steps, [row.loss for row in run.rows], color=colour, linewidth=width, label=name)
    curves.set(title="loss", xlabel="step", yscale="log")
    curves.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_formatter("{x:g}")
    curves.legend(frameon=False)
    for axes in beside:
        first, second = (run.rows for run in runs.values())
        difference = relative_difference(first, second).clip(min=np.finfo(float).eps)
        axes.plot([row.step for row in first], difference, ".", color="#0072B2", markersize=3)
        axes.set(title="difference of the two losses, relative", xlabel="step", yscale="log")
    for axes in (curves, *beside):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print_table({"agreement": agreement(*(read_log(Path(path)) for path in sys.argv[1:3]))})
