"""Any model of torchvision as a module that gives feature maps, with their strides."""

import difflib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from regions import BadInputError

PROBE = (256, 384)  # an image whose maps tell their stride: 2 : 3, and whole at every stride up to 128


class MapKind(NamedTuple):
    """What the map of a node is like."""

    stride: int
    channels: int
    channels_last: bool  # (N, H, W, C), as within a Swin transformer


class Backbone(NamedTuple):
    """What makes maps, and what they are like."""

    body: nn.Module  # images -> {node: map}
    kinds: dict[str, MapKind]  # by node
    mean: Tensor  # of RGB in [0, 1], for normalisation
    std: Tensor
    is_pyramid: bool  # a region is pooled from the level that suits it; else from every map, side by side

    def channels(self) -> int:
        """Channels of what is pooled."""
        each = [kind.channels for kind in self.kinds.values()]
        return each[0] if self.is_pyramid else sum(each)


def build_backbone(name: str, weights: str, nodes: list[str] | None, device: torch.device) -> Backbone:
    """Build what leads to the maps of a torchvision model; of a detector, its feature pyramid."""
    detectors = models.list_models(module=models.detection)
    known = [*models.list_models(module=models), *detectors]
    if name not in known:
        like = " or ".join(difflib.get_close_matches(name, known)) or "resnet50"
        raise BadInputError(f"--backbone must be torchvision's, such as {like}, got {name}")
    entries = {"none": None, **models.get_model_weights(name).__members__}
    is_file = Path(weights).suffix in (".pth", ".pt", ".safetensors")
    if weights not in entries and not is_file:
        known = ", ".join(entries)
        raise BadInputError(f"--weights must be a .pth, .pt or .safetensors file, or {known}, got {weights}")
    entry = entries.get(weights)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    torch.manual_seed(0)  # without weights, every process must still have the same
    if name in detectors:
        model = models.get_model(name, weights=entry, weights_backbone=None).eval()
        mean, std = model.transform.image_mean, model.transform.image_std
        body, kinds = pyramid_of(model, nodes)
    else:
        body, kinds = extractor_of(models.get_model(name, weights=entry).eval(), nodes)
        if entry:
            mean, std = entry.transforms().mean, entry.transforms().std
    if is_file:
        load_weights(body, Path(weights))
    mean, std = (torch.tensor(values, device=device) for values in (mean, std))
    return Backbone(body.eval().to(device), kinds, mean, std, name in detectors)


def load_weights(body: nn.Module, path: Path) -> None:
    """Load a state dict, or a checkpoint of torchvision's training scripts; heads are passed over."""
    try:
        is_pickle = path.suffix != ".safetensors"
        state = torch.load(path, "cpu", weights_only=True) if is_pickle else load_file(path)
        state = state.get("model", state)
        state = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}
        missing = body.load_state_dict(state, strict=False).missing_keys
    except Exception as error:  # what is no state dict fails in ways of its own
        raise BadInputError(f"--weights must be a state dict of the backbone, got {path}: {error}") from None
    if missing:
        raise BadInputError(f"--weights must hold all weights of the backbone, {path} lacks {missing[0]}")


def pyramid_of(detector: nn.Module, nodes: list[str] | None) -> tuple[nn.Module, dict[str, MapKind]]:
    """The feature pyramid of a detector, and the levels to pool from: by default, those that its heads do."""
    maps = probe(detector.backbone)
    pooler = getattr(getattr(detector, "roi_heads", None), "box_roi_pool", None)
    default = [name for name in getattr(pooler, "featmap_names", maps) if name in maps]
    kinds = choose(nodes or default, maps)
    if len({kind.channels for kind in kinds.values()}) > 1:
        raise BadInputError(f"--nodes must name maps with equally many channels, of{listing(maps)}")
    return detector.backbone, kinds


def extractor_of(model: nn.Module, nodes: list[str] | None) -> tuple[nn.Module, dict[str, MapKind]]:
    """The part of a classifier that leads to these nodes, by default to the last map before its head."""
    try:
        names = get_graph_node_names(model, suppress_diff_warning=True)[1]
        maps = probe(create_feature_extractor(model, names, suppress_diff_warning=True))
    except (AssertionError, RuntimeError) as error:  # a ViT, of one size
        reason = str(error).splitlines()[0]
        raise BadInputError(f"--backbone must take images of any size, as swin_t does: {reason}") from None
    ends = {}  # the last node of every module, layer4.2.relu_2 of layer4
    for name in names[1:]:
        words = name.split(".")
        ends |= {".".join(words[: i + 1]): name for i in range(len(words))}
    known = {node: maps[end] for node, end in ends.items() if end in maps}
    bodies = [end for node, end in ends.items() if end in maps and not end.startswith("classifier")]
    last = max(bodies, key=names.index, default=None)
    kinds = choose(nodes or [node for node, end in ends.items() if end == last][:1], known)
    return create_feature_extractor(model, list(kinds), suppress_diff_warning=True), kinds


@torch.inference_mode()
def probe(body: nn.Module) -> dict[str, MapKind]:
    """The maps among what a module gives, told by their shapes."""
    kinds = {}
    for node, value in body(torch.zeros(1, 3, *PROBE)).items():
        for channels_last, axes in ((True, (1, 2, 3)), (False, (2, 3, 1))):
            if isinstance(value, Tensor) and value.dim() == 4:
                height, width, channels = (value.shape[axis] for axis in axes)
                stride = 2 ** round(math.log2(PROBE[0] / height))
                misfit = abs(PROBE[0] / stride - height), abs(PROBE[1] / stride - width)
                if max(misfit) <= 1 and stride <= 128:  # poolings without padding lose a cell
                    kinds[node] = MapKind(stride, channels, channels_last)
    return kinds


def choose(nodes: list[str], kinds: dict[str, MapKind]) -> dict[str, MapKind]:
    """The maps of these nodes."""
    unknown = [node for node in nodes if node not in kinds]
    if unknown or not nodes:
        raise BadInputError(f"--nodes must name maps, got {unknown or 'none'}; there are{listing(kinds)}")
    return {node: kinds[node] for node in nodes}


def listing(kinds: dict[str, MapKind]) -> str:
    """The nodes that one might want, each on a line: modules, not what is within their blocks."""
    shown = {node: kind for node, kind in kinds.items() if node.count(".") < 2}
    return "".join(f"\n  {node}: stride {k.stride}, {k.channels} channels" for node, k in shown.items())
