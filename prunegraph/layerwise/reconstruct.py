"""Least-squares reconstruction: the kept weights make up for the removed channels."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from prunegraph.core.errors import MaskError
from prunegraph.core.masks import ChannelMask, IntArray
from prunegraph.core.splits import Batch, ReadyBatches, TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.graph.module_sizes import is_self_attention
from prunegraph.graph.trace.calls import WatchedCalls
from prunegraph.layerwise.capture import Read, layer_inputs, readable_copy
from prunegraph.layerwise.guard import REJECTED, Guard
from prunegraph.layerwise.order import hooked
from prunegraph.layerwise.room import batch_size, warn_of_few, widest
from prunegraph.layerwise.sampling import (
    LAYERS,
    input_axis,
    outputs_first,
    rows_needed,
    sampled_inputs,
)
from prunegraph.layerwise.statistics import (
    MOST_INPUTS,
    InputRows,
    InputSums,
    ProductStatistics,
    RowStatistics,
)
from prunegraph.tasks.batches import num_tokens
from prunegraph.tasks.classification import model_device

BATCH_SIZE = 32

MARK = "_returned_by"
"""Attribute of a tensor: the weight of the layer that returned it, and its version then."""

HELD_OUT = 64
"""Samples on which the outputs of a network with and without reconstruction are compared."""

HELD_OUT_TOKENS = 4096
"""Of tokens so many, at most: each is a prediction to compare."""


class Reconstruction:
    """Changes the kept weights of a pruned network so that its layers' outputs stay as they were.

    A layer gave ``W x``; without the removed inputs R it gives ``V x_K`` with the V that is
    nearest in mean square over sampled inputs of the dense network:
    ``V = W_K + W_R C_RK (C_KK + ridge)^-1``. C are the inputs' covariances where a bias, which is
    moved too, or a batch norm right behind takes up the mean (recalibrate it afterwards), else
    their mean products. The reconstruction of He et al. 2017 (ICCV, "Channel Pruning for
    Accelerating Very Deep Neural Networks"), here for all layers at once with inputs of the dense
    network; the change of the weights is that of the optimal brain surgeon for the layer's squared
    error (Hassibi and Stork 1993). No label is read.

    Linear layers, modules that compute what such a layer does (``input_axis``), and convolutions,
    transposed or not, are reconstructed, those with groups group by group (not transposed ones).
    Other layers, such with a weight under several names, and those called by keyword or whose
    weight is used without them (elsewhere, too: a tied autoencoder's) stay as they are, but where
    it is given to ``linear`` (``LinearCalls``).

    No reconstruction is kept that moves the network's outputs on held-out data further from the
    dense network's than they are without it (``Guard``).

    Args:
        model: the dense network; never changed.
        graph: its structure.
        run: runs the network that it is given, a copy on ``device``, on training data.
        held_out: the same, for a few other samples, on which outputs are compared; default:
            ``run`` itself, so that the fit and the comparison share their data.
        seed: fixes which outputs are sampled.
        device: where the network runs; None = where it is.

    Raises:
        ModelError: a layer reads what is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: StructureGraph,
        run: Callable[[nn.Module], None],
        *,
        held_out: Callable[[nn.Module], None] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        self._graph, self._run, self._seed = graph, run, seed
        self._dense = dense = readable_copy(model, device or model_device(model), None)
        parameters = dict(dense.named_parameters(remove_duplicate=False))
        tied = _tied(parameters)
        axes = _input_axes(dense, graph)
        self._axes = {name: axis for name, axis in axes.items() if name not in tied}
        generator = torch.Generator().manual_seed(seed)
        calls: Counter[str] = Counter()
        found: dict[str, list[InputSums | InputRows]] = {}
        forwards: list[None] = []
        fitted_later = self._prepare()
        counting = dense.register_forward_pre_hook(lambda *_: forwards.append(None))

        def visit(read: Read) -> None:
            name, values = str(read.op.param), read.activation
            calls[name] += 1
            if name in self._axes:
                sums = found.setdefault(name, [])
                if name not in fitted_later:
                    known = sums[0].count if sums else 0
                    least = rows_needed(read.module, values, values.shape[-1]) - known
                    rows = sampled_inputs(read.module, values, generator, least)
                    _add(sums, rows.chunk(getattr(read.module, "groups", 1), dim=1), seed)

        shown = layer_inputs(dense, graph, visit, attentions=True)
        with torch.no_grad(), counting, shown, _normed(dense) as normed:
            self._look()
        uses = Counter(str(op.param) for op in graph.ops)  # what else reads it was not seen
        sums = {
            name: own for name, own in found.items() if calls[name] >= uses[name] * len(forwards)
        }
        biased = {name for name in sums if bias_name(name) in parameters.keys() - tied}
        self._centred = {name for name in sums if name in biased or name in normed}
        self._input_statistics: dict[str, list[ProductStatistics | RowStatistics]] = {
            name: [part.statistics(name, centred=name in self._centred) for part in own]
            for name, own in sums.items()
            if own
        }
        self._weights = {name: self._laid(name, parameters[name]) for name in sums}
        self._biases = {name: parameters[bias_name(name)] for name in biased}
        watched = held_out is not None or bool(forwards)
        self._guard = Guard(dense, held_out or run, seed) if watched else None
        self._finish()

    @classmethod
    def on_samples(
        cls,
        task: Task,
        graph: StructureGraph,
        samples: TrainSplit,
        *,
        held_out: TrainSplit | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> Self:
        """Measure on train samples of a task, without augmentation.

        ``LayerwiseReconstruction`` takes them as one batch, which has to fit into memory.

        Args:
            task: the dense network, which is never changed, and its forward.
            graph: its structure.
            samples: what the layers are fitted on.
            held_out: ``HELD_OUT`` samples, about, on which outputs are compared; default: the last
                ones of ``samples``, an eighth at most, or the last of several ready batches. They
                are left out of the fit.
            seed: fixes which outputs are sampled.
            device: where the network runs; None = where it is.
        """
        if held_out is None:
            samples, held_out = _parted(samples)
        size = batch_size(task, graph, BATCH_SIZE)
        if not isinstance(samples.source, ReadyBatches):  # of which each holds many samples
            warn_of_few(_num_tokens(samples) * len(samples), widest(graph))

        def send(batches: Callable[[], Iterable[Batch]], network: nn.Module) -> None:
            for batch in batches():
                task.forward(network, batch)

        run = partial(send, partial(cls._batches, samples, size))
        compared = partial(send, partial(held_out.batches, size))
        return cls(task.model, graph, run, held_out=compared, seed=seed, device=device)

    @staticmethod
    def _batches(samples: TrainSplit, size: int) -> Iterable[Batch]:
        return samples.batches(size)

    def _prepare(self) -> Container[str]:
        """Return the weights of layers whose inputs are measured when they are fitted."""
        return ()

    def _look(self) -> None:
        """Run the dense network on what its layers' inputs are measured on."""
        self._run(self._dense)

    def _finish(self) -> None:
        """Do what is left when the layers' inputs are known."""

    def unguarded(self) -> Self:
        """Return the same without the comparison on held-out data, for those who score networks."""
        other = copy.copy(self)
        other._guard = None
        return other

    def apply(self, pruned: nn.Module, mask: ChannelMask) -> None:
        """Change the weights and biases of a network that ``apply_mask`` has made, in place.

        It warns, and leaves them as they are, if the outputs on held-out data get worse or are all
        alike.

        Args:
            pruned: the network.
            mask: what it keeps.

        Raises:
            MaskError: the network is not of this mask.
        """
        kept = self.fit(pruned, mask)
        problem = None if self._guard is None else self._guard.problem
        if problem is not None:
            told = (
                "the reconstruction is kept unchecked" if kept else "the weights stay as they were"
            )
            warnings.warn(f"{told}: {problem}", stacklevel=2)
        elif not kept:
            warnings.warn(REJECTED, stacklevel=2)

    @torch.no_grad()
    def fit(self, pruned: nn.Module, mask: ChannelMask) -> bool:
        """Do as ``apply``, for searches: without a warning; return whether the fit is kept."""
        if self._guard is None:
            self._fit_all(pruned, mask)
            return True
        self._guard.problem = None
        names = {*self._weights, *map(bias_name, self._biases)}
        named = pruned.named_parameters(remove_duplicate=False)
        changed = [*(item for name, item in named if name in names), *pruned.buffers()]
        before = [item.clone() for item in changed]
        self._fit_all(pruned, mask)
        fitted, outputs = [item.clone() for item in changed], self._guard.outputs(pruned)
        _give(changed, before)
        if self._guard.rejects(self._guard.outputs(pruned), outputs):
            return False
        _give(changed, fitted)
        return True

    def _fit_all(self, pruned: nn.Module, mask: ChannelMask) -> None:
        for name in self._input_statistics:
            self._fit_at_once(name, pruned, mask)

    def _fit_at_once(self, name: str, pruned: nn.Module, mask: ChannelMask) -> None:
        """Fit one layer on what it read in the dense network."""
        found = self._fitted_at_once(name, mask)
        if found is not None:
            self._put(name, pruned, self._stays(name, mask)[0], *found)

    def _fitted_at_once(self, name: str, mask: ChannelMask) -> tuple[Tensor, Tensor] | None:
        """Return a layer's weights ``[out, kept]`` and what its bias gains; None: it stays."""
        out, kept = self._stays(name, mask)
        changes = name in self._input_statistics and not bool(kept.all())
        if not (changes and kept.any() and out.any()):
            return None
        statistics = self._input_statistics[name]
        weight = self._weights[name].flatten(1).float()  # [out, D]
        count = len(statistics)
        groups = zip(statistics, weight.chunk(count), out.chunk(count), strict=True)
        fitted = [_fitted(own, part[stays], kept) for own, part, stays in groups]
        new, shift = (torch.cat(parts) for parts in zip(*fitted, strict=True))
        return new, shift

    def _stays(self, name: str, mask: ChannelMask) -> tuple[Tensor, Tensor]:
        """Return which outputs ``[out]`` and inputs of a group ``[D]`` of a layer a mask keeps."""
        axes, inputs = self._graph.param_units[name], self._axes[name]
        weight = self._weights[name].flatten(1)
        out = torch.ones_like(weight[:, 0], dtype=torch.bool)
        if 1 - inputs in axes:
            out = _bits(mask, axes[1 - inputs], weight)
        kept = _bits(mask, axes[inputs], weight)
        return out, kept.repeat_interleave(weight.shape[1] // len(kept))

    def _put(
        self, name: str, pruned: nn.Module, out: Tensor, weight: Tensor, shift: Tensor
    ) -> None:
        """Give a layer new weights ``[out, kept]``, and the bias, if it has one, what it gains."""
        parameters = dict(pruned.named_parameters(remove_duplicate=False))
        weight = weight.unflatten(1, (-1, *self._weights[name].shape[2:]))
        _write(parameters.get(name), name, self._laid(name, weight))
        if name in self._biases:
            bias = bias_name(name)
            _write(parameters.get(bias), bias, self._biases[name][out].float() + shift)

    def _laid(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with its outputs first, or one with its outputs first as it is stored."""
        return weight if self._axes[name] == 1 else outputs_first(weight)


def drawn_samples(train: TrainSplit, most: int, seed: int) -> tuple[TrainSplit, TrainSplit | None]:
    """Return samples to fit on, and others to compare outputs on.

    Of few images some are in both. Windows of tokens, which always are few, are in one alone.
    Where all ready batches are fitted on, none are left.

    Args:
        train: the samples that there are.
        most: samples to fit on.
        seed: fixes the draw.
    """
    if isinstance(train.source, ReadyBatches):
        samples = train.sample(most, seed)
        left = torch.arange(len(samples), min(len(samples) + 1, len(train)))
        return samples, train.take(left) if len(left) else None
    if _num_tokens(train):
        return _parted(train.sample(most + max(_few(train), 1), seed))
    more = train.sample(most + HELD_OUT, seed)
    return train.sample(most, seed), more.take(torch.arange(len(more))[-HELD_OUT:])


def _parted(samples: TrainSplit) -> tuple[TrainSplit, TrainSplit]:
    """Return samples to fit on, and the last ones to compare outputs on: all of too few."""
    count, few = len(samples), _few(samples)
    order = torch.arange(count)
    return samples.take(order[: count - few]), samples.take(order[count - few :] if few else order)


def _few(samples: TrainSplit) -> int:
    """Return how many samples are held out of a fit."""
    count, tokens = len(samples), _num_tokens(samples)
    if isinstance(samples.source, ReadyBatches):
        return min(1, count // 2)
    if tokens:
        return min(max(HELD_OUT_TOKENS // tokens, 1), -(-count // 8), count // 2)
    return min(HELD_OUT, count // 8)


def _num_tokens(samples: TrainSplit) -> int:
    return num_tokens(samples.source.load(samples.index[:1])) if len(samples) else 0


def _add(sums: list[InputSums | InputRows], parts: Sequence[Tensor], seed: int) -> None:
    """Add the rows of each group of a layer; the seed fixes which are kept, where rows are kept."""
    if not sums:
        few = parts[0].shape[1] <= MOST_INPUTS
        sums += [InputSums(own) if few else InputRows(seed) for own in parts]
    for known, own in zip(sums, parts, strict=True):
        known.add(own)


def _give(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _input_axes(network: nn.Module, graph: StructureGraph) -> dict[str, int]:
    """Return the axis of inputs of the weights that can be reconstructed.

    They may lose inputs, in one way alone.
    """
    uses: dict[str, set[bytes]] = {}
    for op in graph.ops:
        uses.setdefault(str(op.param), set()).add(op.in_units.tobytes())
    modules = dict(network.named_modules(remove_duplicate=False))
    found = {}
    for op in graph.ops:
        name = str(op.param)
        path, _, leaf = name.rpartition(".")
        if len(uses[name]) > 1 or op.computed or path not in modules:
            continue  # what is stored would not add up as what is computed does
        axis = input_axis(modules[path]) if leaf == "weight" else None
        axis = 1 if is_self_attention(modules[path], leaf) else axis
        units = None if axis is None else graph.param_units.get(name, {}).get(axis)
        if axis is not None and units is not None and graph.free[units].any():
            found[name] = axis
    return found


def _tied(parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


@contextmanager
def _normed(model: nn.Module) -> Iterator[set[str]]:
    """Fill a set with the weights of layers whose every output a batch norm alone has read."""
    returned: dict[str, int] = {}
    normed: dict[str, int] = {}
    result: set[str] = set()

    def mark(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.is_inference():  # which has no version
                returned[name] = returned.get(name, 0) + 1
                setattr(output, MARK, (name, output._version))

        return hook

    def note(module: nn.Module, args: Any) -> None:
        name, version = getattr(args[0], MARK, ("", None)) if args else ("", None)
        if name and args[0]._version == version:  # nothing has changed it in place
            normed[name] = normed.get(name, 0) + 1

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(note))
        elif isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(mark(f"{path}.weight".removeprefix("."))))
    others: set[str] = set()
    with hooked(handles), WatchedCalls(partial(_note_reader, others)):
        yield result
    alone = {name for name, count in returned.items() if normed.get(name) == count}
    result.update(alone - others)


def _note_reader(
    others: set[str], function: Any, given: Sequence[Any], results: Sequence[Any]
) -> None:
    """Note whose marked outputs a function computes with that is no batch norm; sizes do not."""
    if function is not F.batch_norm and any(isinstance(leaf, Tensor) for leaf in results):
        marks = (getattr(leaf, MARK, None) for leaf in given)
        others.update(mark[0] for mark in marks if mark is not None)


def bias_name(weight: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{weight.removesuffix('weight')}bias"


def _fitted(
    statistics: ProductStatistics | RowStatistics, weight: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what weights ``[out, D]`` become ``[out, kept]``, and what their biases gain."""
    change = statistics.change(weight, kept)
    shift = weight[:, ~kept] @ statistics.mean[~kept] - change @ statistics.mean[kept]
    return weight[:, kept] + change, shift


def _bits(mask: ChannelMask, units: IntArray, like: Tensor) -> Tensor:
    return torch.from_numpy(mask.keep[units]).to(like.device)


def _write(parameter: Tensor | None, name: str, values: Tensor) -> None:
    """Replace a parameter's values."""
    if parameter is None or parameter.numel() != values.numel():
        found = "none" if parameter is None else str(tuple(parameter.shape))
        msg = f"{name} is {found}, not of {values.numel()} values: give the network of this mask"
        raise MaskError(msg)
    parameter.copy_(values.view_as(parameter))
