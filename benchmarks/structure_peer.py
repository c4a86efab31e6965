"""Torch-Pruning's side of the benchmark ``structure.py``, by the interface that its docs show."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from prunegraph.graph.masked_norm import MaskedNorm, mean_over_kept

PRUNING_RATIO = 0.5


def peer_form(model: nn.Module) -> nn.Module:
    """Return a copy as Torch-Pruning's examples prepare it: attention spelt out, gradients on."""
    prepared = copy.deepcopy(model).requires_grad_(True)
    for module in prepared.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
    return prepared


def build_graph(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """Return Torch-Pruning's dependency graph.

    It calls ``model(*example_inputs)``: a bare tensor would be taken apart along its batch.
    """
    return tp.DependencyGraph().build_dependency(model, example_inputs=(example,))


def covered_modules(graph: tp.DependencyGraph, ignored: list[nn.Module]) -> set[int]:
    """Return ``id`` of each module and raw parameter that some prunable group slices."""
    covered: set[int] = set()
    for group in graph.get_all_groups(ignored_layers=[m for r in ignored for m in r.modules()]):
        covered.update(id(dependency.target.module) for dependency, _ in group)
    return covered


def covered_params(model: nn.Module, covered: set[int], names: Iterable[str]) -> int:
    """Return how many elements of the named parameters lie in covered modules.

    The projections inside ``nn.MultiheadAttention`` are covered with it.
    """
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=isinstance(module, nn.MultiheadAttention)):
            owners.setdefault(id(parameter), {id(parameter)}).add(id(module))
    params = dict(model.named_parameters())
    return sum(params[name].numel() for name in names if owners[id(params[name])] & covered)


def prunable_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the number of heads of each query, key, value projection."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        count = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        if count is None and hasattr(module, "q_proj"):
            count = module.config.num_attention_heads
        if not isinstance(count, int):
            continue
        fewer = getattr(getattr(module, "config", None), "num_key_value_heads", None) or count
        for name in ("qkv", "query", "q_proj"):
            if isinstance(getattr(module, name, None), nn.Module):
                heads[getattr(module, name)] = count
        for name in ("key", "value", "k_proj", "v_proj"):
            if isinstance(getattr(module, name, None), nn.Module):
                heads[getattr(module, name)] = fewer
    return heads


def make_pruner(model: nn.Module, example: Tensor, ignored: list[nn.Module]) -> tp.BasePruner:
    """Return a pruner of half of the channels of every layer, by random importance.

    Dimensions of heads are pruned as its examples do; whole heads where rotary embeddings fix the
    dimensions.
    """
    heads = prunable_heads(model)
    whole = any("rotary" in name for name, _ in model.named_modules())
    widths = {m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return tp.pruner.BasePruner(
        model,
        example_inputs=(example,),
        importance=tp.importance.RandomImportance(),
        global_pruning=False,
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=whole,
        prune_head_dims=not whole,
        head_pruning_ratio=PRUNING_RATIO if whole else 0.0,
        round_to=max(widths, default=None),
    )


def set_sizes(model: nn.Module, pruner: tp.BasePruner) -> None:
    """Set the attributes that Torch-Pruning leaves to its users, as its examples do."""
    for module in model.modules():
        if hasattr(module, "hidden_dim") and hasattr(module, "conv_proj"):  # torchvision's vit
            module.hidden_dim = module.conv_proj.out_channels
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
        elif hasattr(module, "query") and hasattr(module, "num_attention_heads"):
            module.num_attention_heads = pruner.num_heads[module.query]
            module.all_head_size = module.query.out_features
            module.attention_head_size = module.all_head_size // module.num_attention_heads
        elif hasattr(module, "q_proj") and pruner.prune_num_heads:
            queries, keys = module.q_proj.out_features, module.k_proj.out_features
            module.num_key_value_groups = queries // keys
        elif hasattr(module, "q_proj"):
            module.head_dim = module.q_proj.out_features // pruner.num_heads[module.q_proj]


def write_positions(model: nn.Module) -> None:
    """Overwrite every float parameter and buffer with the positions of its elements.

    What survives pruning then tells which elements did; positions are exact in float64.
    """
    for tensor in _floats(model).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def restore_values(pruned: nn.Module, dense: nn.Module) -> nn.Module:
    """Put the dense values back into a network of positions.

    Returns:
        The zero-masked dense network: what did not survive is zero, and layer and RMS norms see
        only what did.
    """
    values, parameters = _floats(dense), dict(dense.named_parameters(remove_duplicate=False))
    survivors = {name: tensor.data.round().long() for name, tensor in _floats(pruned).items()}
    masked = copy.deepcopy(dense)
    silent = _floats(masked)
    for name, tensor in _floats(pruned).items():
        value = values[name].data
        tensor.data = value.flatten()[survivors[name]]
        if name in parameters:
            keep = torch.zeros(value.numel(), dtype=torch.bool)
            keep[survivors[name].flatten()] = True
            silent[name].data = value * keep.view(value.shape)
    for path, norm in dense.named_modules():
        if not type(norm).__name__.endswith(("LayerNorm", "LayerNorm2d", "RMSNorm")):
            continue
        if f"{path}.weight" in survivors:
            keep = torch.zeros(norm.weight.shape[0], dtype=torch.bool)
            keep[survivors[f"{path}.weight"]] = True
            if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
                masked.set_submodule(path, MaskedNorm(masked.get_submodule(path), {0: keep}))
            else:
                axis = -3 if type(norm).__name__.endswith("2d") else -1
                mean_over_kept(masked.get_submodule(path), (keep, axis))
    return masked


def _floats(model: nn.Module) -> dict[str, Any]:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}
