"""Boxes refined by gradient ascent on a photograph, as a tracker does from one frame to the next.

What a box pools from the first frame is its template. In the next frame, nearer, elsewhere, darker and noisy,
a box that is off its target climbs to where it pools the same. Its corners are the only parameters.
`python examples/box_refinement.py` needs the extra `demo`.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from skimage.filters import gaussian
from torch import Tensor

from roialign import demo, plot, roi_align

BINS, STEPS, PIXELS_PER_STEP = 8, 100, 3.0
NAMES = ("face", "mission patch")
BOXES = torch.tensor([demo.ASTRONAUT[name] for name in NAMES])  # (2, 4), in the first frame
ZOOM, CORNER = 1.25, (70, 45)  # the next frame is a window of the first made larger
TRUE = BOXES * ZOOM - torch.tensor(CORNER * 2)
STARTS = torch.tensor([[180.0, 85, 320, 205], [70, 360, 178, 462]])
TITLES = "first frame: the templates", "next frame", "IoU, by sampling_ratio", "correlation with the template"
SKY, _, _, _, ORANGE, RED, BLUE = plot.COLOURS


def frames(blur: float = 0) -> list[Tensor]:
    """The first frame and the next, `(3, 512, 512)`, blurred by so many pixels."""
    first = demo.sample_image()
    larger = F.interpolate(first[None], scale_factor=ZOOM, mode="bicubic", antialias=True)[0].clamp(0, 1)
    window = larger[:, CORNER[1] :, CORNER[0] :][:, :512, :512]
    noise = torch.randn(window.shape, generator=torch.Generator().manual_seed(0))
    both = first, (0.7 * window**1.3 + 0.03 * noise).clamp(0, 1)
    return [torch.from_numpy(gaussian(f.numpy(), blur, channel_axis=0)) for f in both]


def look(frame: Tensor, boxes: Tensor, ratio: int | str) -> Tensor:
    """What boxes `(K, 4)` show, `(K, 3, BINS, BINS)`, and how that changes as they move."""
    return roi_align(frame[None], [boxes], BINS, 1.0, ratio, aligned=True, box_gradients=True)


def agreement(pooled: Tensor, template: Tensor) -> Tensor:
    """The normalised correlation of each: brightness and contrast make no difference."""
    a, b = (t - t.mean((2, 3), keepdim=True) for t in (pooled, template))
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


def refine(first: Tensor, later: Tensor, starts: Tensor, ratio: int | str) -> Tensor:
    """Let boxes climb, each by itself, from starts `(N, 2, 4)`. Where they were, `(STEPS + 1, N, 2, 4)`."""
    template = look(first, BOXES, ratio).repeat(len(starts), 1, 1, 1)
    path, boxes = [starts], starts.clone().requires_grad_()
    adam = torch.optim.Adam([boxes], PIXELS_PER_STEP, maximize=True)
    shorter = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        adam.zero_grad()
        agreement(look(later, boxes.flatten(0, 1), ratio), template).sum().backward()
        adam.step()
        shorter.step()
        path.append(boxes.detach().clone())
    return torch.stack(path)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes `(..., 4)`."""
    common = torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]
    shared, *areas = (t.clamp(min=0).prod(-1) for t in (common, *(t[..., 2:] - t[..., :2] for t in (a, b))))
    return shared / (sum(areas) - shared)


def draw() -> Figure:
    """The templates; boxes before and after, with the ways of their corners; the IoU; what was climbed."""
    figure = Figure(figsize=(9.6, 4.7), layout="constrained")
    axes = figure.subplot_mosaic("abc;abd", width_ratios=(1, 1, 1.3))
    first, later = frames()
    for place, frame, x, y in (("a", first, (60, 330), (475, 30)), ("b", later, (40, 340), (505, 10))):
        plot.show_image(axes[place], frame)
        axes[place].set(xlim=x, ylim=y, xticks=[], yticks=[])
    offsets = torch.arange(-60, 60.5, 0.5)
    moved = TRUE[1] + offsets[:, None] * torch.tensor([1, 0, 1, 0])
    for ratio, colour in ((2, RED), ("exact", BLUE)):
        path = refine(first, later, STARTS[None], ratio)[:, 0]
        for i, style in enumerate(("--", "-")):
            axes["c"].plot(iou(path[:, i], TRUE[i]), style, color=colour, label=f"{ratio}, {NAMES[i]}")
        pooled, template = look(later, moved, ratio), look(first, BOXES[1:], ratio)
        axes["d"].plot(offsets, agreement(pooled, template), color=colour)
    for i in range(len(NAMES)):
        draw_lines(axes["a"], BOXES[i], "white")
        draw_lines(axes["b"], path[:, i], "white", width=1)
        draw_lines(axes["b"], STARTS[i], ORANGE)
        draw_lines(axes["b"], path[-1, i], SKY)
    axes["b"].legend(axes["b"].lines[-2:], ("before", "after"), loc="lower right", fontsize=9)
    axes["c"].legend(ncols=2, loc="lower right", fontsize=8, frameon=False, handlelength=1.6, columnspacing=1)
    axes["c"].set(ylim=(0, 1.08), xlabel="step")
    axes["d"].set(xlabel="pixels from the patch, to the right")
    for place, title in zip("abcd", TITLES, strict=True):
        axes[place].set_title(title, fontsize=10)
        axes[place].grid(alpha=0.3)
    return figure


def draw_lines(axes: Axes, boxes: Tensor, colour: str, width: float = 2) -> None:
    """A box `(4,)`, or the ways of its corners, `(N, 4)`, to be seen on any picture."""
    outline = [withStroke(linewidth=2 * width, foreground="black")]
    style = {"color": colour, "linewidth": width, "path_effects": outline}
    axes.plot(boxes[..., [0, 2, 2, 0, 0]], boxes[..., [1, 1, 3, 3, 1]], **style)


def main(argv: list[str] | None = None) -> None:
    """Refine, print what came of it, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="box_refinement.png", help="the picture (default: %(default)s)")
    out = parser.parse_args(argv).out
    spread = 0.8 * torch.rand(100, 2, 4, generator=torch.Generator().manual_seed(0)) - 0.4
    starts = torch.cat((STARTS[None], TRUE + spread * (TRUE[:, 2:] - TRUE[:, :2]).repeat(1, 2)))
    print(f"IoU before and after {STEPS} steps; and of 100 random starts, how many came above 0.95")
    for blur, ratio in itertools.product((0, 4), ("exact", 0, 2)):
        found = iou(refine(*frames(blur), starts, ratio), TRUE)
        for i, name in enumerate(NAMES):
            old, new, passed = found[0, 0, i], found[-1, 0, i], (found[-1, 1:, i] > 0.95).sum()
            print(f"blur {blur}, ratio {ratio!s:5}, {name:13}: {old:.2f} -> {new:.3f}; {passed:3}")
    draw().savefig(out, dpi=110)


if __name__ == "__main__":
    main()
