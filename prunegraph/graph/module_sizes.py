"""After surgery: modules' sizes set again from their parameters, attention made slim."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from prunegraph.core.errors import SurgeryError
from prunegraph.graph.slim_attention import SlimMultiheadAttention, is_dense_attention


def fix_module_sizes(
    dense: nn.Module, pruned: nn.Module, kept: Mapping[int, Mapping[int, Tensor]]
) -> None:
    """Set ``in_channels``, ``num_features``, ``groups`` and the like of every module.

    Args:
        dense: the network before surgery.
        pruned: its pruned copy, changed in place; the same modules in the same order.
        kept: ``id`` of a dense parameter -> axis -> kept positions, where it lost some.
    """
    for (name, old), new in zip(dense.named_modules(), pruned.modules(), strict=True):
        weight = getattr(new, "weight", None)
        rows = kept.get(id(_stored_weight(old)), {}).get(0)
        if isinstance(new, nn.Transformer):
            norm = getattr(new.encoder, "norm", None)
            new.d_model = norm.weight.shape[0] if isinstance(norm, nn.LayerNorm) else new.d_model
        if isinstance(new, nn.RNNBase | nn.RNNCellBase):
            _fix_recurrent(old, new)
        elif isinstance(new, _NormBase):
            sized = weight if isinstance(weight, Tensor) else new.running_mean
            new.num_features = new.num_features if sized is None else sized.shape[0]
        elif isinstance(weight, Tensor):
            _fix(name, new, weight, rows)


def _stored_weight(module: nn.Module) -> object:
    """Return the parameter that is a module's weight, or from which that is computed."""
    parametrized = is_parametrized(module, "weight")
    made = module.get_submodule("parametrizations.weight") if parametrized else module
    for name in ("original1", "original", "weight_v", "weight_orig"):
        if name in made._parameters:
            return made._parameters[name]
    return getattr(module, "weight", None)


def slim_attentions(
    dense: nn.Module, pruned: nn.Module, kept: Mapping[int, Mapping[int, Tensor]]
) -> nn.Module:
    """Put a slim module in the place of every ``nn.MultiheadAttention`` that lost something.

    Args:
        dense: the network before surgery.
        pruned: its copy, whose parameters are sliced already.
        kept: ``id`` of a dense parameter -> axis -> kept positions, where it lost some.

    Returns:
        The network: ``pruned`` itself unless that is an attention module.
    """
    heads: dict[int, int] = {}
    for module in dense.modules():
        if is_dense_attention(module) and any(id(item) in kept for item in module.parameters()):
            packed = module.in_proj_weight
            weight = module.q_proj_weight if packed is None else packed
            rows = kept.get(id(weight), {}).get(0)
            heads[id(module)] = module.num_heads
            if rows is not None:
                queries = rows[: module.embed_dim].view(module.num_heads, module.head_dim)
                heads[id(module)] = int(queries.any(1).sum())
    return _with_slim(dense, pruned, heads)


def _with_slim(dense: nn.Module, network: nn.Module, heads: Mapping[int, int]) -> nn.Module:
    """Put slim modules into a network, by ``id`` of a dense attention how many heads it has."""
    slim: dict[int, nn.Module] = {}  # a module may be used under several names
    for path, module in list(dense.named_modules(remove_duplicate=False)) if heads else ():
        if (key := id(module)) in heads:
            if key not in slim:
                sliced = network.get_submodule(path)
                assert isinstance(sliced, nn.MultiheadAttention)
                slim[key] = SlimMultiheadAttention.from_sliced(sliced, heads[key])
            network = replace_module(network, path, slim[key])
    return network


def slim_all_attentions(model: nn.Module) -> nn.Module:
    """Put a slim module in the place of every ``nn.MultiheadAttention``; return the network."""
    dense = filter(is_dense_attention, model.modules())
    return _with_slim(model, model, {id(module): module.num_heads for module in dense})


def is_self_attention(module: nn.Module, leaf: str) -> bool:
    """Return whether a weight makes queries, keys and values, of one tensor perhaps."""
    return isinstance(module, SlimMultiheadAttention) and leaf == "in_proj_weight"


def replace_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at ``path`` and return the root, which is ``module`` itself for ``""``."""
    if not path:
        return module
    root.set_submodule(path, module)
    return root


def _fix(name: str, module: nn.Module, weight: Tensor, kept: Tensor | None) -> None:
    """Set the size attributes of one module that has a weight."""
    if isinstance(module, _ConvNd):
        _fix_convolution(name, module, weight, kept)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
        module.num_groups = _surviving_groups(name, module.num_groups, kept)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = weight.shape


def _fix_recurrent(old: nn.Module, new: nn.RNNBase | nn.RNNCellBase) -> None:
    """Set what a recurrent layer or cell reads, and how many units it has."""
    parameters, before = dict(new.named_parameters(recurse=False)), new.hidden_size
    name = "weight_ih_l0" if isinstance(new, nn.RNNBase) else "weight_ih"
    if name in parameters:  # else it is computed from others, and whole
        rows, new.input_size = parameters[name].shape
        new.hidden_size = before * rows // old.get_parameter(name).shape[0]
    if isinstance(new, nn.RNNBase):
        new.flatten_parameters()  # on a GPU, one block of memory


def _fix_convolution(name: str, module: _ConvNd, weight: Tensor, kept: Tensor | None) -> None:
    """Set channels and groups; axis 0 of the weight runs over the groups in either direction."""
    module.groups = _surviving_groups(name, module.groups, kept)
    first, second = weight.shape[0], weight.shape[1] * module.groups
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second
    else:
        module.out_channels, module.in_channels = first, second


def _surviving_groups(name: str, groups: int, kept: Tensor | None) -> int:
    """Return how many groups keep a channel; those that do must keep equally many."""
    if kept is None or groups == 1:
        return groups
    widths = kept.view(groups, -1).sum(1)
    survivors = widths[widths > 0]
    if not bool((survivors == survivors[0]).all()):
        msg = (
            f"module {name!r} has {groups} groups, of which the mask keeps unequal widths "
            f"{sorted(set(survivors.tolist()))}: its groups must be tied position by position"
        )
        raise SurgeryError(msg)
    return int(survivors.numel())
