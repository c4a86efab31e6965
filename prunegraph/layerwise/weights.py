"""The weights that methods of single weights may prune, each as a matrix of outputs and inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunegraph.core.errors import MaskError, ModelError
from prunegraph.core.pattern import Pattern
from prunegraph.core.weight_mask import WeightMask
from prunegraph.layerwise.sampling import LAYERS, TRANSPOSED

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

MOST_LEFT = 0.05
"""So much of a network may lie in other matrices without a word: small ones are everywhere."""


@dataclass(frozen=True)
class PrunableWeight:
    """How one weight is seen as a matrix with a row for each output.

    Attributes:
        module: name of the layer that holds it.
        shape: its own shape.
        inputs_first: whether its first axis holds inputs: of transposed convolutions, and of the
            ``Conv1D`` of transformers.
        groups: groups of channels that a convolution keeps apart.
    """

    module: str
    shape: tuple[int, ...]
    inputs_first: bool = False
    groups: int = 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def num_inputs(self) -> int:
        """Weights of a row: inputs of an output, times the numbers of a kernel."""
        outputs = self.shape[1] * self.groups if self.inputs_first else self.shape[0]
        return self.size // outputs

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``[outputs, inputs]``.

        A row holds the input channels in order, and for each its kernel.
        """
        if not self.inputs_first:
            return tensor.reshape(self.shape[0], -1)
        grouped = tensor.reshape(self.groups, -1, *self.shape[1:])  # [G, in / G, out / G, ...]
        return grouped.transpose(1, 2).reshape(-1, self.num_inputs)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``[outputs, inputs]`` in the weight's own shape."""
        if not self.inputs_first:
            return matrix.reshape(self.shape)
        inputs, outputs, *kernel = self.shape
        grouped = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return grouped.transpose(1, 2).reshape(self.shape)


def prunable_weights(model: nn.Module) -> dict[str, PrunableWeight]:
    """Return the weights that may be pruned, by parameter name, in the order of the modules.

    They are the weights of linear layers and convolutions, and of the ``Conv1D`` of transformers.
    Biases, norms and embeddings stay, a linear layer that is tied to an embedding or gives the
    logits of a network of transformers too, and depthwise convolutions, whose outputs read one
    channel. A
    weight that several layers share comes once, under its first name. Weights that other layers
    hold, such as ``in_proj_weight`` of ``nn.MultiheadAttention`` or those of an LSTM, stay.

    Raises:
        ModelError: there are none, or one is computed from other parameters.
    """
    seen = _staying(model)
    found: dict[str, PrunableWeight] = {}
    for path, module in model.named_modules():
        if not _is_layer(module):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = module._parameters.get("weight")
        if weight is None:
            msg = (
                f"{name} is computed from other parameters (a parametrisation), which would undo "
                "the zeros: make it plain first, with torch.nn.utils.parametrize."
                "remove_parametrizations(module, 'weight'), or prune.remove of a mask"
            )
            raise ModelError(msg)
        groups = getattr(module, "groups", 1)
        depthwise = groups > 1 and groups == getattr(module, "in_channels", 0)
        if id(weight) not in seen and weight.numel() and not depthwise:
            seen.add(id(weight))
            inputs_first = isinstance(module, TRANSPOSED) or is_conv1d(module)
            found[name] = PrunableWeight(path, tuple(weight.shape), inputs_first, groups)
    if not found:
        msg = f"{type(model).__name__} has no linear layer or convolution whose weights can go"
        raise ModelError(msg)
    return found


def few_reached(model: nn.Module) -> str | None:
    """Say which share of a network ``prunable_weights`` are, if others of its weights could go.

    Those are matrices that no linear layer or convolution holds: experts of one parameter, the
    projections of ``nn.MultiheadAttention``, an LSTM. Embeddings and heads are none of them.
    """
    reached = sum(weight.size for weight in prunable_weights(model).values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    known = _staying(model)
    known |= {id(each._parameters.get("weight")) for each in model.modules() if _is_layer(each)}
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in known
    }
    if sum(left.values()) <= MOST_LEFT * whole:
        return None
    most, others = max(left, key=left.__getitem__), len(left) - 1
    more = f" and {others} other parameter{'s' * (others > 1)} stay" if others else " stays"
    return (
        "single weights are pruned in linear layers and convolutions alone, "
        f"{100 * reached / whole:.1f} % of the network: {most}{more} whole"
    )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) or is_conv1d(module)


def _staying(model: nn.Module) -> set[int]:
    """Return the ids of weights of embeddings, and of what gives a network's logits."""
    found = {id(each.weight) for each in model.modules() if isinstance(each, EMBEDDINGS)}
    head = getattr(model, "get_output_embeddings", lambda: None)()  # of transformers
    return {*found, id(getattr(head, "weight", None)), *_heads(model)}


def _heads(model: nn.Module) -> set[int]:
    """Return the ids of weights that lie outside of the body of a network of transformers."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(body, nn.Module):
        return set()
    own = {id(parameter) for parameter in body.parameters()}
    return {id(parameter) for parameter in model.parameters()} - own


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is the ``Conv1D`` of transformers: a linear layer, inputs first."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def check_pattern(mask: WeightMask, model: nn.Module) -> None:
    """Check that the zeros of a mask lie where its pattern says.

    Raises:
        MaskError: a weight breaks the pattern, or is none that may be pruned.
    """
    mask.parameters_of(model)
    weights = prunable_weights(model)
    for name, bits in mask.keep.items():
        if name not in weights:
            msg = f"{name} is no weight of a linear layer or convolution, and the mask prunes it"
            raise MaskError(msg)
        parts = weights[name].matrix(bits).chunk(weights[name].groups)
        if not all(_follows(part, mask.pattern) for part in parts):
            msg = f"the zeros of {name} do not follow the pattern {mask.pattern} of the mask"
            raise MaskError(msg)


def _follows(keep: Tensor, pattern: Pattern) -> bool:
    """Tell whether keep bits ``[outputs, inputs]``, of a group of channels, follow a pattern."""
    if pattern.kind == "n:m":
        if keep.shape[1] % pattern.group:
            return False
        return bool((keep.reshape(-1, pattern.group).sum(1) == pattern.num_kept).all())
    if pattern.kind == "unstructured":
        return True
    return bool((keep == keep[:1]).all())
