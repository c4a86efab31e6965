"""From a network to a channel-level graph: what can be removed, what it costs."""

from prunegraph.core.budget import AttentionUnit
from prunegraph.core.task import ExampleInputs
from prunegraph.graph.analyse import (
    analyse,
    call_forward,
    cast_inputs,
    evaluation_mode,
    fresh,
    repeatable,
    unwrap,
)
from prunegraph.graph.copying import copy_network
from prunegraph.graph.graph import FrozenOp, Group, OpNode, StructureGraph

__all__ = [
    "AttentionUnit",
    "ExampleInputs",
    "FrozenOp",
    "Group",
    "OpNode",
    "StructureGraph",
    "analyse",
    "call_forward",
    "cast_inputs",
    "copy_network",
    "evaluation_mode",
    "fresh",
    "repeatable",
    "unwrap",
]
