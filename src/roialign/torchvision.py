"""What needs torchvision: the module as a subclass of its own, and our engines behind its operators.

The constructors of torchvision's `FasterRCNN`, `MaskRCNN` and `KeypointRCNN` demand such a subclass.
"""

import torchvision.ops

from . import pooler
from .install import install as install
from .install import is_installed as is_installed
from .install import uninstall as uninstall


class MultiScaleRoIAlign(pooler.MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign):  # type: ignore[misc]
    """`roialign.MultiScaleRoIAlign` that is also a `torchvision.ops.MultiScaleRoIAlign`."""
