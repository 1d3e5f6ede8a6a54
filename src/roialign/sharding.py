"""Rules for `DTensor`: what is sharded along channels or boxes is pooled where it lies.

Pooling treats channels alike and boxes alike. So maps sharded along channels give a result sharded along
channels, and boxes sharded along K give a result sharded along K, neither with any communication. In
backward, the first gives gradients sharded along channels; the second gives each rank the sum over its
own boxes, `Partial`, which DTensor adds up where it is needed.

    import roialign.sharding
    roialign.sharding.register()
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, RuntimeSchemaInfo, StrategyType
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.experimental import register_sharding

Placements = tuple[list[Any], list[Any]]  # of the results, and of the arguments


def register() -> None:
    """Teach `DTensor` both operators of this package; once per process is enough.

    Raises:
        RuntimeError: `DTensor` has no place for the gradients of several maps, as before PyTorch 2.9.
    """
    if not hasattr(OpSchema, "return_type_list_tensor_like"):
        raise RuntimeError(f"sharding must have PyTorch 2.9 or later, got {torch.__version__}")
    operators = torch.ops.roialign
    register_sharding(operators.multiscale_roi_align.default)(_forward)
    # register_sharding takes a list of tensors for one result, so for this one what it does is written out.
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        operators.multiscale_roi_align_backward.default,
        _backward_strategy,
        RuntimeSchemaInfo(static_argnum=3, needs_pytree=True),
    )


def _forward(features: Sequence[Any], rois: Any, levels: Any, *pooling: Any) -> list[Placements]:
    def rule(out: Any, feature: Any, boxes: Any) -> Placements:
        given_levels = None if levels is None else boxes
        return [out], [*[feature] * len(features), boxes, given_levels, *[None] * len(pooling)]

    return [
        rule(Replicate(), Replicate(), Replicate()),
        rule(Shard(1), Shard(1), Replicate()),
        rule(Shard(0), Replicate(), Shard(0)),
        rule(Partial(), Partial(), Replicate()),  # linear in the features
    ]


def _backward(grad: Any, rois: Any, levels: Any, shape: Sequence[int], *rest: Any) -> list[Placements]:
    maps = (len(shape) - 2) // 2

    def rule(out: Any, pooled: Any, boxes: Any) -> Placements:
        given_levels = None if levels is None else boxes
        return [out] * maps, [pooled, boxes, given_levels, None, *[None] * len(rest)]

    return [
        rule(Replicate(), Replicate(), Replicate()),
        rule(Shard(1), Shard(1), Replicate()),
        rule(Partial(), Shard(0), Shard(0)),
        rule(Partial(), Partial(), Replicate()),
    ]


def _backward_strategy(schema: OpSchema) -> StrategyType:
    arguments: Any = schema.args_schema
    rules = _backward(*arguments)
    return expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(),
        schema,
        [results + inputs for results, inputs in rules],
        input_index=len(rules[0][0]),
    )
