"""The same module, made a subclass of torchvision's, for code that checks.

The constructors of torchvision's `FasterRCNN`, `MaskRCNN` and `KeypointRCNN` demand one.
"""

import torchvision.ops

from . import pooler


class MultiScaleRoIAlign(pooler.MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign):  # type: ignore[misc]
    """`roialign.MultiScaleRoIAlign` that is also a `torchvision.ops.MultiScaleRoIAlign`."""
