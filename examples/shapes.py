"""A dataset of circles, rectangles and triangles that lie on top of one another, drawn on demand.

Image `index` of a dataset depends on its seed and its index alone: no files, the same on every machine
and in every process.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

CLASSES = ("background", "circle", "rectangle", "triangle")  # background is torchvision's class 0

MOST_SHAPES = 6
RADII = (0.09, 0.28)  # of the circle around a shape, as a fraction of the image's side
LEAST_VISIBLE = 0.4  # of its area: a shape that would leave less of another is not drawn


class ShapesDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images `(3, H, W)` in [0, 1] with the targets that torchvision's detectors train on.

    A mask is of what is visible: shapes drawn later hide parts of those drawn earlier.

    Args:
        indices: which images; ranges that do not meet share no image.
        size: height and width of an image, in pixels.
        seed: another seed gives other images.
    """

    def __init__(self, indices: range, size: int = 96, seed: int = 0) -> None:
        self.indices = indices
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image `item`, and its boxes `(L, 4)` in pixels, labels `(L,)` and masks `(L, H, W)`, L >= 1."""
        index = self.indices[item]
        rng = np.random.default_rng((self.seed, index))
        pixels, masks, labels = draw_scene(rng, self.size)
        visible = torch.from_numpy(masks)
        boxes = masks_to_boxes(visible)
        boxes[:, 2:] += 1  # masks_to_boxes names the last pixel; a box ends at that pixel's far edge
        target = {
            "boxes": boxes,
            "labels": torch.tensor(labels),
            "masks": visible.to(torch.uint8),
            "image_id": torch.tensor(index),
        }
        return torch.from_numpy(pixels), target


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw shapes one over the other.

    Returns:
        The image `(3, size, size)`, the visible masks `(L, size, size)` and the labels `(L,)`.
    """
    pixels = draw_background(rng, size)
    masks: list[np.ndarray] = []
    areas: list[int] = []  # of whole shapes
    labels: list[int] = []
    for _ in range(rng.integers(2, MOST_SHAPES + 1)):
        label = int(rng.integers(1, len(CLASSES)))
        mask, colour = draw_shape(rng, size, label), rng.uniform(0.35, 1, (3, 1))
        visible = [other & ~mask for other in masks]
        if all(v.sum() >= LEAST_VISIBLE * area for v, area in zip(visible, areas, strict=True)):
            masks, areas, labels = [*visible, mask], [*areas, int(mask.sum())], [*labels, label]
            pixels[:, mask] = colour
    pixels += rng.normal(0, 0.04, pixels.shape)  # grain, over shapes too
    return pixels.clip(0, 1).astype(np.float32), np.stack(masks), labels


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dark clouds of random colours, `(3, size, size)`."""
    clouds = torch.from_numpy(rng.uniform(0, 0.5, (1, 3, 8, 8)))
    return F.interpolate(clouds, (size, size), mode="bilinear", align_corners=True)[0].numpy()


def draw_shape(rng: np.random.Generator, size: int, label: int) -> np.ndarray:
    """The mask `(size, size)` of one shape, turned at random, within the image."""
    radius = size * rng.uniform(*RADII)
    x, y = rng.uniform(radius, size - radius, 2)
    dx, dy = np.arange(size) + 0.5 - x, np.arange(size)[:, None] + 0.5 - y
    if CLASSES[label] == "circle":
        return dx**2 + dy**2 <= radius**2
    turn = rng.uniform(0, 2 * np.pi)
    if CLASSES[label] == "rectangle":
        shape = rng.uniform(0.4, 1.1)  # the angle to a corner; a square's is pi / 4
        directions = turn + np.arange(4) * np.pi / 2
        distances = radius * np.array([np.cos(shape), np.sin(shape)] * 2)
    else:  # the inscribed circle of an equilateral triangle has half the radius of the one around it
        directions = turn + np.arange(3) * 2 * np.pi / 3
        distances = np.full(3, radius / 2)
    sides = zip(directions, distances, strict=True)
    return np.logical_and.reduce([np.cos(a) * dx + np.sin(a) * dy <= d for a, d in sides])
