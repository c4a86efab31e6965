"""Least-squares compensation: the kept weights take over what the removed channels gave."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from prunegraph.errors import ModelError
from prunegraph.graph import StructureGraph
from prunegraph.pruning.evaluation import place_images
from prunegraph.pruning.reads import Read, readable_copy, reads
from prunegraph.types import IntArray, KeepMask, TrainSplit

POSITIONS = 16
"""Output positions that are sampled of a layer in each batch, the same in all its images."""

BATCH_SIZE = 32

MOST_INPUTS = 5000
"""Layers that read more values an output are left as they are: a Gram matrix has their square."""

TINY = 1e-30

RIDGE = 0.02
"""Share of an input's own energy that speaks for leaving its weight as it is."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What one layer reads, over all sampled outputs; D = input channels times kernel taps.

    Attributes:
        mean: ``[D]``; zeros where nothing behind the layer takes up a shift of its outputs.
        products: ``[D, D]`` mean products of the inputs, less those of ``mean``.
    """

    mean: Tensor
    products: Tensor


class Compensation:
    """Changes the kept weights of a pruned network so that its layers' outputs stay as they were.

    A layer gave ``W x``; without the removed inputs R it gives ``V x_K`` with the V that is
    nearest in mean square over sampled inputs of the dense network:
    ``V = W_K + W_R C_RK (C_KK + ridge)^-1``. C are the inputs' covariances where a bias, which is
    moved too, or a batch norm takes up the mean, else their mean products. The reconstruction of He
    et al. 2017 (ICCV, "Channel Pruning for Accelerating Very Deep Neural Networks"), here for all
    layers at once with inputs of the dense network; the change of the weights is that of the
    optimal brain surgeon for the layer's squared error (Hassibi and Stork 1993). No label is read.

    Linear layers and convolutions in two dimensions without groups are compensated. Other layers,
    such with a forward of their own or a weight under several names, and those that read more than
    ``MOST_INPUTS`` values stay as they are.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        run: runs the network that it is given on train images.
        seed: fixes which outputs are sampled.
        device: where the network runs.

    Raises:
        ModelError: a layer reads what is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: StructureGraph,
        run: Callable[[nn.Module], None],
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self._graph = graph
        dense = readable_copy(model, device)
        self._weights = dict(dense.named_parameters(remove_duplicate=False))
        sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)

        def visit(read: Read) -> None:
            rows = sampled_inputs(read, generator)
            if rows is not None:
                name = str(read.op.param)
                count, total, products = sums.get(name, (0, *rows.new_zeros(2).double()))
                total = total + rows.sum(0).double()
                products = products + (rows.T @ rows).double()
                sums[name] = (count + len(rows), total, products)

        with torch.no_grad(), reads(dense, graph, visit):
            run(dense)
        tied = _tied(self._weights)
        absorbing = self._absorbing(dense)
        self._moments = {
            name: _moments(name, *found, centred=name in absorbing)
            for name, found in sums.items()
            if name not in tied
        }

    @classmethod
    def on_images(
        cls,
        model: nn.Module,
        graph: StructureGraph,
        images: TrainSplit,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> "Compensation":
        """Measure on train images, without augmentation."""

        def run(network: nn.Module) -> None:
            for batch, _ in images.batches(BATCH_SIZE):
                network(place_images(batch, network))

        return cls(model, graph, run, seed=seed, device=device)

    def _absorbing(self, dense: nn.Module) -> set[str]:
        """Return the weights behind which a bias or a batch norm takes up a constant."""
        normed: set[int] = set()
        for path, module in dense.named_modules(remove_duplicate=False):
            axes = self._graph.param_classes.get(f"{path}.running_mean")
            if isinstance(module, _BatchNorm) and axes is not None:
                normed.update(axes[0].tolist())
        return {
            str(op.param)
            for op in self._graph.ops
            if _bias_name(str(op.param)) in self._weights or normed.issuperset(op.out_classes)
        }

    @torch.no_grad()
    def apply(self, pruned: nn.Module, mask: KeepMask) -> None:
        """Change the weights and biases of a network that ``apply_mask`` has made, in place.

        Args:
            pruned: the network.
            mask: what it keeps.
        """
        parameters = dict(pruned.named_parameters(remove_duplicate=False))
        for name, moments in self._moments.items():
            axes = self._graph.param_classes.get(name, {})
            if 1 not in axes or mask.keep[axes[1]].all():
                continue
            dense = self._weights[name].flatten(1)  # [out, D]
            if 0 in axes:
                dense = dense[_bits(mask, axes[0], dense)]
            taps = dense.shape[1] // axes[1].size
            kept = _bits(mask, axes[1], dense).repeat_interleave(taps)  # [D]
            change = _change(dense, kept, moments.products)
            weight, bias = parameters[name], parameters.get(_bias_name(name))
            new = dense[:, kept] + change
            weight.copy_(new.view_as(weight))
            if bias is not None:
                shift = dense[:, ~kept] @ moments.mean[~kept] - change @ moments.mean[kept]
                bias.add_(shift.to(bias.dtype))


def sampled_inputs(read: Read, generator: torch.Generator) -> Tensor | None:
    """Return what sampled outputs of a layer are made of; None if it is another kind of layer.

    Args:
        read: the call.
        generator: draws the outputs' positions.

    Returns:
        ``[S, D]``; the product with the flattened weight ``[out, D]`` is the outputs without bias.
    """
    module, inputs = read.module, read.activation
    if type(module).forward is nn.Linear.forward:
        rows = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs[:, None]  # [B, L, D]
        rows = rows[:, _draw(rows.shape[1], generator)]
    elif (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and module.groups == 1
    ):
        rows = _patches(module, inputs, generator)
    else:
        return None
    return rows.flatten(0, 1) if rows.shape[-1] <= MOST_INPUTS else None


def _patches(module: nn.Conv2d, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``[B, L, channels * taps]`` what a convolution reads at sampled positions."""
    padding = module._reversed_padding_repeated_twice  # of every padding, "same" included
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(padding):
        inputs = F.pad(inputs, padding, mode=mode)
    width = inputs.shape[3]
    starts, offsets = [], []
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        count = (inputs.shape[2 + axis] - dilation * (kernel - 1) - 1) // stride + 1
        starts.append(stride * torch.arange(count))
        offsets.append(dilation * torch.arange(kernel))
    corners = (width * starts[0][:, None] + starts[1]).flatten()
    taps = (width * offsets[0][:, None] + offsets[1]).flatten()
    corners = corners[_draw(len(corners), generator)]
    index = (corners[:, None] + taps).to(inputs.device)  # [L, taps]
    return inputs.flatten(2)[:, :, index].movedim(2, 1).flatten(2)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Return positions, ``POSITIONS`` at the most."""
    return torch.randperm(count, generator=generator)[:POSITIONS]


def _tied(parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _moments(name: str, count: int, total: Tensor, products: Tensor, *, centred: bool) -> Moments:
    if not bool(products.isfinite().all()):
        msg = f"what {name} reads is not finite: check the network's weights and its images"
        raise ModelError(msg)
    mean = total / count if centred else torch.zeros_like(total)
    return Moments(mean.float(), (products / count - torch.outer(mean, mean)).float())


def _bits(mask: KeepMask, classes: IntArray, like: Tensor) -> Tensor:
    return torch.from_numpy(mask.keep[classes]).to(like.device)


def _change(dense: Tensor, kept: Tensor, products: Tensor) -> Tensor:
    """Return ``[out, kept]`` what the kept weights gain."""
    system = products[kept][:, kept]
    energy = system.diagonal()
    scale = (energy + 1e-6 * energy.mean()).clamp_min(TINY).rsqrt()  # inputs of equal energy
    system = scale[:, None] * system * scale
    system.diagonal().add_(RIDGE)
    lost = dense[:, ~kept] @ (products[~kept][:, kept] * scale)  # [out, kept]
    return torch.cholesky_solve(lost.T, torch.linalg.cholesky(system)).T * scale
