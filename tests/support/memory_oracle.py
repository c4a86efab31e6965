"""The oracle of peak memory: what a forward really allocates, followed storage by storage."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from prunegraph.core.masks import ChannelMask
from prunegraph.graph import ExampleInputs, StructureGraph, call_forward, evaluation_mode, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.trace.calls import tensors_in


class _Allocations(TorchDispatchMode):
    """Follows the storages of everything that operations return.

    Args:
        weights: tensors that do not count.
        inputs: tensors that count from the start.
    """

    def __init__(self, weights: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {StorageWeakRef(tensor.untyped_storage()) for tensor in weights}
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self._count(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count what is alive right after it."""
        out = func(*args, **(kwargs or {}))
        self._count(tensors_in(out))
        return out

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if StorageWeakRef(storage) not in self._weights:
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))


def measure_peak_memory(model: nn.Module, inputs: ExampleInputs) -> int:
    """Return the most bytes of activations alive at once in a forward in eval mode.

    Inputs, outputs and all that is made on the way count, each storage once however many tensors
    view it, until the last of them dies; parameters and buffers do not count.
    """
    model = unwrap(model)
    allocations = _Allocations([*model.parameters(), *model.buffers()], tensors_in(inputs))
    with evaluation_mode(model), allocations:
        output = call_forward(model, inputs)
    del output  # was held until here: a caller holds it too
    return allocations.peak


def assert_memory_equals_measured(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, inputs: ExampleInputs
) -> int:
    """Assert that the graph's peak memory is what the pruned network takes.

    Args:
        model: the dense network; it is left as it is.
        graph: its structure.
        mask: which units stay.
        inputs: those that were analysed.

    Returns:
        The peak in bytes.

    Raises:
        AssertionError: the two differ.
    """
    said = graph.peak_memory(mask)
    measured = measure_peak_memory(apply_mask(model, graph, mask), inputs)
    if said != measured:
        msg = (
            f"the graph says {said} bytes for mask {mask.digest()}, the pruned network takes "
            f"{measured}"
        )
        raise AssertionError(msg)
    return said
