"""Walks through a network block by block: what the matrices of one read, then the next.

Each block is measured on what the changed blocks before it return. One block's statistics are in
memory at a time, and the hidden states of the calibration data. A walk that was interrupted goes on
at the next block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.memory import return_freed_memory
from prunegraph.layerwise.block_files import BlockFiles
from prunegraph.layerwise.chain import Chain, Reached
from prunegraph.layerwise.order import Segment, find_segments, hooked
from prunegraph.layerwise.reads import Reads
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import PrunableWeight

STATES = 2**30
"""Bytes of hidden states that may be kept; above, each block runs the network from its start."""

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """One matrix of a block, as a method sees it.

    Attributes:
        name: of its parameter.
        weight: ``[C, B]`` float32 a row for each output.
        hessians: of its groups, one each ``C / len(hessians)`` rows; one if it is no grouped
            convolution. Matrices that read the same share one.
        seen: whether a call was seen; if not, the Hessian is the identity.
    """

    name: str
    weight: Tensor
    hessians: Sequence[Hessian]
    seen: bool = True


Change = Callable[[Matrix], tuple[Tensor, Tensor] | None]
"""From a matrix to its new weight ``[C, B]`` and which entries stay ``[C, B]``; None: it stays."""


@dataclass(eq=False)
class BlockWalk:
    """Changes the matrices of a network one block after the other.

    Attributes:
        model: the network, in eval mode; its prunable weights are changed.
        weights: the prunable weights that are changed.
        batches: calibration data.
        forward: runs a network on a batch.
        blocks: glob of the names of blocks; default: see ``find_segments``.
        folder: where finished blocks are kept; None: nowhere.
        identity: what names the walk; a folder of another one is refused.
        notes: what changing a weight notes of it, by name; kept with the blocks.
        progress: called with the number of finished blocks, and of all.
        unseen: weights of which no call was seen, after the walk.
    """

    model: nn.Module
    weights: Mapping[str, PrunableWeight]
    batches: Sequence[Any]
    forward: Forward
    _: KW_ONLY
    blocks: str | None = None
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    unseen: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._files = BlockFiles(folder=self.folder, identity=self.identity)
        self._keep: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, change: Change) -> dict[str, Tensor]:
        """Change every matrix; return which weights stay ``[C, B]``, by parameter name.

        Raises:
            ArtefactError: the folder holds another walk.
            ModelError: what a matrix reads is not finite.
        """
        self._files.open()
        segments = find_segments(
            self.model,
            self.weights,
            lambda: self._run(self.model, self.batches[0]),
            blocks=self.blocks,
        )
        total, done = sum(len(segment.blocks) for segment in segments), 0
        for segment in [*segments, None]:
            for names, hessians in self._measured(segment, done):
                if hessians is None:
                    self._load(done, names)
                else:
                    self._change(names, hessians, change)
                    self._save(done, names)
                del hessians
                return_freed_memory()  # masks that stay lie between what has gone
                done += 1
                if self.progress is not None:
                    self.progress(min(done, total), total)
        self.unseen = [name for name in self.weights if name not in self._keep]
        self._change(self.unseen, {}, change)
        return self._keep

    def _measured(
        self, segment: Segment | None, done: int
    ) -> Iterator[tuple[list[str], dict[str, Sequence[Hessian]] | None]]:
        """Yield the matrices of each block with what they read; None for a block that is on disk.

        They are to be changed before the next block is asked for.

        Args:
            segment: the blocks; None = all that no block holds, as one block.
            done: number of blocks before them.
        """
        if segment is None:
            rest = [name for name in self.weights if name not in self._keep]
            if rest:
                yield (
                    rest,
                    self._hessians(rest, done, map(partial(self._run, self.model), self.batches)),
                )
            return
        if segment.place is None or segment.size * len(self.batches) > STATES:
            for number, path in enumerate(segment.blocks):
                names = self._inside(path)
                yield names, self._hessians(names, number + done, self._whole_runs(path))
            return
        chains = [
            Chain(self.model, segment, partial(self._run, batch=batch)) for batch in self.batches
        ]
        for number, path in enumerate(segment.blocks):
            names, looks = self._inside(path), map(methodcaller("look", number), chains)
            yield names, self._hessians(names, number + done, looks)
            if number + 1 < len(segment.blocks):
                for chain in chains:
                    chain.advance(number)

    def _whole_runs(self, path: str) -> Iterator[None]:
        """Run the network on each batch until a block has run as often as it does."""
        block = self.model.get_submodule(path)
        calls, most = 0, 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == most:
                raise Reached

        with hooked([block.register_forward_hook(count)]):
            for batch in self.batches:
                calls = 0
                self._run(self.model, batch)
                most = most or calls  # learnt from the first batch, which runs to its end
                yield

    def _run(self, model: nn.Module, batch: Any) -> None:
        try:
            self.forward(model, batch)
        except Reached:
            return

    def _hessians(
        self, names: Sequence[str], number: int, runs: Iterator[None]
    ) -> dict[str, Sequence[Hessian]] | None:
        """Return what the matrices of a block read while it runs; None if the block is on disk."""
        if self._files.has(number):
            return None
        reads = Reads(self.model, {name: self.weights[name] for name in names})
        with reads:
            for _ in runs:
                reads.forget()
        return reads.hessians()

    def _inside(self, path: str) -> list[str]:
        return [
            name
            for name, weight in self.weights.items()
            if weight.module == path or weight.module.startswith(f"{path}.")
        ]

    def _change(
        self, names: Sequence[str], hessians: Mapping[str, Sequence[Hessian]], change: Change
    ) -> None:
        """Change the matrices of a block."""
        for name in names:
            if name not in hessians and name not in self.unseen:
                continue  # a layer that did not run in this block may run in a later one
            parameter, layout = self.model.get_parameter(name), self.weights[name]
            matrix = layout.matrix(parameter.detach()).float()
            identity = Hessian(torch.eye(matrix.shape[1], device=matrix.device), name=name)
            given = Matrix(
                name=name,
                weight=matrix,
                hessians=hessians.get(name, [identity] * layout.groups),
                seen=name in hessians,
            )
            changed, keep = change(given) or (matrix, torch.ones_like(matrix, dtype=torch.bool))
            parameter.copy_(layout.tensor(changed.to(parameter.dtype)))
            self._keep[name] = layout.tensor(keep).cpu()

    def _save(self, number: int, names: Sequence[str]) -> None:
        changed = [name for name in names if name in self._keep]
        tensors: dict[str, Tensor] = {
            f"weight:{name}": self.model.get_parameter(name) for name in changed
        }
        tensors |= {f"keep:{name}": self._keep[name] for name in changed}
        for name in self.notes.keys() & set(changed):
            tensors[f"note:{name}"] = torch.tensor(self.notes[name], dtype=torch.float64)
        self._files.save(number, tensors)

    def _load(self, number: int, names: Sequence[str]) -> None:
        """Take over the block that an earlier start has changed.

        Raises:
            ArtefactError: the file is damaged, or of another block.
        """
        tensors = self._files.load(number)
        for name in names:
            if f"weight:{name}" not in tensors:
                continue
            weight, keep = tensors[f"weight:{name}"], tensors.get(f"keep:{name}")
            parameter = self.model.get_parameter(name)
            if keep is None or not weight.shape == keep.shape == parameter.shape:
                raise self._files.misfit(number, name)
            parameter.copy_(weight)
            self._keep[name] = keep.bool()
            if f"note:{name}" in tensors:
                self.notes[name] = float(tensors[f"note:{name}"].sum())
