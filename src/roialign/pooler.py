"""The modules: signature, representation and state. No maths."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# As modules, so that torch.fx finds the functions it keeps whole.
from . import arguments, functional, portable

# By name: torchvision need not be installed, nor its class stand where it stood.
LEVEL_MAPPERS = ("torchvision.ops.poolers.LevelMapper", "roialign.mapper.LevelMapper")


class MultiScaleRoIAlign(nn.Module):
    """Pool regions of interest from a feature pyramid: a drop-in for `torchvision.ops.MultiScaleRoIAlign`.

    Each box is pooled from the level that equation 1 of the FPN paper (arXiv:1612.03144) gives it;
    where the pyramid has no such level, from the next coarser one, else the coarsest.

    Args:
        featmap_names: names of the maps to use; those absent from the input are passed over.
        output_size: bins per RoI, `(PH, PW)`, or one number for both; `(PD, PH, PW)` of volumes.
        sampling_ratio: sampling points per bin and axis; if not positive, as many as the bin has
            cells, rounded up; "exact" for the integral over the bin.
        canonical_scale: side in pixels of the square box that belongs to `canonical_level`.
        canonical_level: k0 of equation 1; level k has stride `2^k`.
        aligned: shift boxes by half a cell, as Detectron2 does.
        scales: cells per pixel, `1 / stride`: one per entry of `featmap_names`, or by name. Any
            positive numbers. Without them, each call takes the powers of two that fit its shapes.
            A call whose `image_shapes` say that a scale above 1 is a stride is refused. In place of a
            number there may be one for each axis of the map.
        map_levels: a function from the list of boxes to `(K,)` integers, the index of each box's
            map among the maps used, in the order of `featmap_names`; instead of equation 1.
        box_gradients: whether boxes have gradients, once; see `multiscale_roi_align`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `featmap_names` is empty, `output_size` less than 1, a number not finite.

    Examples:
        >>> pooler = MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2)
        >>> x = {"0": torch.rand(1, 8, 64, 64), "1": torch.rand(1, 8, 32, 32)}
        >>> boxes = [torch.tensor([[10.0, 20.0, 90.0, 120.0]])]
        >>> pooler(x, boxes, [(256, 256)]).shape
        torch.Size([1, 8, 7, 7])
    """

    # What a pickle of torchvision's class lacks, whichever its version, where this class stands in its place.
    aligned = False
    canonical_scale = 224
    canonical_level = 4
    box_gradients = False  # nor those of our own first version

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int | str,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        scales: Sequence[float | Sequence[float]] | Mapping[str, float | Sequence[float]] | None = None,
        map_levels: functional.LevelMap | None = None,
        box_gradients: bool = False,
    ) -> None:
        # Not super(): beside torchvision's class, whose __init__ takes other arguments.
        nn.Module.__init__(self)
        arguments.check_positive("canonical_scale", canonical_scale)
        arguments.check_number("canonical_level", canonical_level)
        arguments.check_map_levels(map_levels)
        self.featmap_names = arguments.check_featmap_names(featmap_names)
        self.sampling_ratio = arguments.check_sampling_ratio(sampling_ratio)
        self.output_size = arguments.check_size_of_module(output_size)
        self.scales = arguments.check_module_scales(scales)
        self.map_levels = map_levels
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.aligned = arguments.check_flag("aligned", aligned)
        self.box_gradients = arguments.check_flag("box_gradients", box_gradients)

    def forward(
        self,
        x: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Pool the boxes of a batch.

        Args:
            x: maps `(N, C, H_l, W_l)` by name, in any order; float32, float64, float16, bfloat16. Or
                volumes `(N, C, D_l, H_l, W_l)`, or sequences `(N, C, T_l)`.
            boxes: per image a tensor `(L, 4)` of `(x1, y1, x2, y2)` in pixels of the image, not of
                a map; any real dtype; L may be 0. Of volumes `(L, 6)`, `(x1, y1, z1, x2, y2, z2)`; of
                sequences `(L, 2)`, `(x1, x2)`.
            image_shapes: `(height, width)` of each image in pixels, before padding; of volumes
                `(depth, height, width)`, of sequences `(length,)`. Not needed where `scales` are set.

        Returns:
            `(K, C, PH, PW)`: the RoIs of all images in order, in the dtype and memory format of
            the first map used. A box with a NaN or an infinity gives NaN.

        Raises:
            TypeError: an argument is of the wrong kind or dtype.
            ValueError: no map is named in `featmap_names`; a wrong shape, number or device; more
                boxes tensors than images; `image_shapes` missing when needed, or at odds with `scales`.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return portable.pool_named_maps(
                x,
                boxes,
                image_shapes,
                self.featmap_names,  # type: ignore[arg-type]
                self.output_size,
                self.sampling_ratio,  # type: ignore[arg-type]
                float(self.canonical_scale),
                float(self.canonical_level),
                self.aligned,
                self.scales,
            )
        else:  # noqa: RET505 - else TorchScript compiles it, too
            return functional.pool_named_maps(
                x,
                boxes,
                image_shapes,
                self.featmap_names,
                self.output_size,
                self.sampling_ratio,
                self.canonical_scale,
                self.canonical_level,
                self.aligned,
                self.scales,
                self.map_levels,
                self.box_gradients,
            )

    def __prepare_scriptable__(self) -> "MultiScaleRoIAlign":
        """The module, if TorchScript can compile it; called by `torch.jit.script`."""
        _check_scriptable(self)
        if self.map_levels is not None:
            raise TypeError("map_levels must be None in TorchScript, which cannot call it; use torch.export")
        if not isinstance(self.scales, (list, type(None))) or not arguments.are_numbers(self.scales or ()):
            raise TypeError(f"scales must be a list in TorchScript, one number per map, got {self.scales!r}")
        if not isinstance(self.featmap_names, list):
            raise TypeError(f"featmap_names must be a list in TorchScript, got {self.featmap_names!r}")
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state if "aligned" in state else from_torchvision(state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        shown = ["featmap_names", "output_size", "sampling_ratio"]
        defaults = {"aligned": False, "scales": None, "map_levels": None, "box_gradients": False}
        shown += [name for name, default in defaults.items() if getattr(self, name) is not default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"


def _check_scriptable(module: nn.Module) -> None:
    if not portable.is_available():
        raise RuntimeError(
            f"torch.jit.script compiles a {type(module).__name__} to torchvision's operator, and torchvision "
            "is not installed; use torch.export"
        )
    if isinstance(module.sampling_ratio, str):
        raise TypeError(
            f"sampling_ratio must be an integer in TorchScript, got {module.sampling_ratio!r}; "
            "use torch.export"
        )
    if module.box_gradients:
        raise TypeError("box_gradients must be False in TorchScript; use torch.export")
    size = module.output_size
    if isinstance(size, (list, tuple)) and len(size) != 2:
        raise TypeError(f"output_size must be of two axes in TorchScript, got {size!r}; use torch.export")


def from_torchvision(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a `torchvision.ops.MultiScaleRoIAlign` as one of ours, without what it inferred."""
    inferred = {"scales": None, "map_levels": None} if is_inferred(state) else {}
    return {**state, "aligned": False, **inferred}


def is_inferred(state: dict[str, Any]) -> bool:
    """Whether torchvision inferred scales and mapper, rather than a user set them by hand."""
    scales, mapper = state.get("scales"), state.get("map_levels")
    if scales is None or mapper is None:  # then torchvision infers both anew
        return True
    if f"{type(mapper).__module__}.{type(mapper).__qualname__}" not in LEVEL_MAPPERS:
        return False
    if any(math.frexp(scale)[0] != 0.5 for scale in scales):  # not all are powers of two
        return False
    by_shapes = {
        "k_min": -math.log2(scales[0]),
        "k_max": -math.log2(scales[-1]),
        "s0": state.get("canonical_scale", 224),
        "lvl0": state.get("canonical_level", 4),
        "eps": 1e-6,
    }
    return bool(vars(mapper) == by_shapes)


class RoIAlign(nn.Module):
    """RoIAlign on one map, as `torchvision.ops.RoIAlign`; see `roi_align`.

    Args:
        output_size: bins per RoI, `(PH, PW)`, or one number for both.
        spatial_scale: cells of the map per pixel of the image; or one for each axis of the map.
        sampling_ratio: sampling points per bin and axis; adaptive if not positive; or "exact".
        aligned: shift boxes by half a cell.
        box_gradients: whether boxes have gradients.
    """

    aligned = False  # for a pickle of torchvision's before it had the argument
    box_gradients = False  # and for those of ours before they had this one

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float | Sequence[float],
        sampling_ratio: int | str,
        aligned: bool = False,
        *,
        box_gradients: bool = False,
    ) -> None:
        super().__init__()
        arguments.check_size_of_module(output_size)
        arguments.check_scale("spatial_scale", spatial_scale)
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = arguments.check_sampling_ratio(sampling_ratio)
        self.aligned = arguments.check_flag("aligned", aligned)
        self.box_gradients = arguments.check_flag("box_gradients", box_gradients)

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """Pool `rois` from `input`; see `roi_align`."""
        how = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return functional.roi_align(input, rois, *how)
        else:  # noqa: RET505 - else TorchScript compiles it, too
            return functional.roi_align(input, rois, *how, box_gradients=self.box_gradients)

    def __prepare_scriptable__(self) -> "RoIAlign":
        """Likewise."""
        _check_scriptable(self)
        if not arguments.are_numbers([self.spatial_scale]):
            raise TypeError(
                f"spatial_scale must be a number in TorchScript, got {self.spatial_scale!r}; use torch.export"
            )
        return self

    def __repr__(self) -> str:
        shown = ("output_size", "spatial_scale", "sampling_ratio", "aligned")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"
