"""What the layers of a block read while it runs, added up to their Hessians."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph.trace.calls import CallMode
from prunegraph.layerwise.capture import linear_arguments
from prunegraph.layerwise.sampling import TRANSPOSED, sampled_inputs
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import PrunableWeight

POSITIONS = 32
"""Positions of each sample that a convolution's statistics are of; of tokens all are taken."""

TILE = 512
"""Columns of a Gram matrix that are added to at once, from the diagonal down: it is symmetric."""

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Gram:
    """The sum of x x^T over the positions that a layer reads.

    Attributes:
        total: ``[G, B, B]``, right on and below the diagonal alone.
        reads: what it has read in its first run, by which another layer that reads the same is
            told; None afterwards.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.reads: list[Tensor] | None = []

    def add(self, rows: Tensor) -> None:
        """Add float32 rows ``[G, S, B]``, whatever precision the network runs in."""
        groups, positions, width = rows.shape
        if self.total is None:
            self.total = rows.new_zeros(groups, width, width)
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, width, TILE):
                columns = slice(start, start + TILE)
                self.total[:, start:, columns] += rows[:, :, start:].mT @ rows[:, :, columns]
        self.count += positions

    def mean(self) -> Tensor:
        """Return ``[G, B, B]``."""
        assert self.total is not None
        lower = self.total.tril() / max(self.count, 1)
        return lower + lower.tril(-1).mT


class Reads(CallMode):
    """Adds up what layers read while the network runs.

    Linear layers are seen where their weight is used, in a function too (``dt_proj`` of Mamba);
    others where they are called. A linear layer that reads the very tensors of another is its twin.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, PrunableWeight]) -> None:
        super().__init__()
        self._layers = layers
        self._grams: dict[str, _Gram] = {}
        self._twins: dict[str, str] = {}
        self._linear: dict[int, str] = {}
        self._handles = ExitStack()
        for name, layout in layers.items():
            module = model.get_submodule(layout.module)
            if isinstance(module, nn.Linear):
                self._linear[id(module.weight)] = name
            else:
                hook = self._hook(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.enter_context(handle)

    def __exit__(self, *exception: Any) -> None:
        """Let the network be as it was."""
        super().__exit__(*exception)
        self._handles.close()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        generator = torch.Generator().manual_seed(0)  # other positions in each batch

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs, *_ = (*args, *kwargs.values())
            rows = read_rows(module, self._layers[name], inputs, generator)
            self._grams.setdefault(name, _Gram()).add(rows)

        return add

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Look at the arguments of a product with the weight of a linear layer; call it."""
        if function is F.linear:
            inputs, weight, _ = linear_arguments(*args, **kwargs)
            if id(weight) in self._linear:
                self._add_linear(self._linear[id(weight)], inputs)
        elif function in MATMULS and id(args[0]) in self._linear:  # [C, B] @ [..., B, S]
            self._add_linear(self._linear[id(args[0])], args[1].transpose(-1, -2))
        return function(*args, **kwargs)

    def _add_linear(self, name: str, inputs: Tensor) -> None:
        if name in self._twins:
            return
        gram = self._grams.setdefault(name, _Gram())
        gram.add(inputs.reshape(1, -1, inputs.shape[-1]).float())
        if gram.reads is not None:
            gram.reads.append(inputs)

    def forget(self) -> None:
        """End a run: let go of the tensors by which twins are told."""
        fresh: dict[tuple[int, ...], str] = {}
        for name, gram in [*self._grams.items()]:
            reads = tuple(map(id, gram.reads or ()))
            gram.reads = None
            if reads and (twin := fresh.setdefault(reads, name)) != name:
                self._twins[name] = twin
                del self._grams[name]

    def hessians(self) -> dict[str, Sequence[Hessian]]:
        """Return those of each layer that ran; twins share theirs."""
        made: dict[str, Sequence[Hessian]] = {
            name: [Hessian(part, name=name) for part in gram.mean()]
            for name, gram in self._grams.items()
        }
        return made | {name: made[twin] for name, twin in self._twins.items()}


def read_rows(
    module: nn.Module, layout: PrunableWeight, inputs: Tensor, generator: torch.Generator
) -> Tensor:
    """Return ``[G, S, B]`` float32 the rows that the matrix of a layer is multiplied by.

    Args:
        module: a linear layer or convolution.
        layout: how its weight is seen as a matrix.
        inputs: what it reads in one call.
        generator: draws the positions of convolutions.
    """
    if len(layout.shape) == 2:
        return inputs.reshape(1, -1, inputs.shape[-1]).float()
    rows = sampled_inputs(module, inputs, generator, least=POSITIONS * len(inputs))
    rows = rows.reshape(len(rows), layout.groups, layout.num_inputs)
    if isinstance(module, TRANSPOSED):  # reads its kernel backwards
        taps = torch.Size(layout.shape[2:]).numel()
        rows = rows.unflatten(2, (-1, taps)).flip(3).flatten(2)
    return rows.transpose(0, 1)
