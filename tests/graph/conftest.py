from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from prunegraph.graph import StructureGraph, analyse
from prunegraph.testing.structure_check import check_structure


@pytest.fixture
def check_all() -> Callable[[nn.Module, Any], StructureGraph]:
    """Analyses a network, checks random masks of it, and returns its structure."""

    def analysed(model: nn.Module, inputs: Any) -> StructureGraph:
        graph = analyse(model.eval(), inputs)
        result = check_structure(model, inputs, seed=0, num_masks=3)
        assert result.num_compared
        assert not result.failures
        return graph

    return analysed
