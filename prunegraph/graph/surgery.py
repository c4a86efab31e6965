"""Temporary minimal surgery until pruning/surgery.py lands."""

import copy

import numpy as np
import torch
from torch import nn

from prunegraph.graph.structure import StructureGraph
from prunegraph.types import KeepMask


def _set(model, name, value):
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=module._parameters[leaf].requires_grad)
    else:
        module._buffers[leaf] = value


def apply_mask(model: nn.Module, graph: StructureGraph, mask: KeepMask) -> nn.Module:
    model = copy.deepcopy(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, axes in graph.param_classes.items():
        value = tensors[name].detach()
        for axis, classes in axes.items():
            index = torch.from_numpy(np.flatnonzero(mask.keep[classes]))
            value = value.index_select(axis, index)
        _set(model, name, value.clone())
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1 and m.weight.shape[1] == 1 and not m.transposed:
            m.groups = m.weight.shape[0] * m.groups // m.out_channels
            
    for path, (inside, outside) in graph.gathers.items():
        m = model.get_submodule(path)
        keep_in, keep_out = mask.keep[inside], mask.keep[outside]
        new = np.where(keep_in, np.cumsum(keep_in) - 1, -1)
        new = np.append(new, -1)
        m.index = torch.from_numpy(new[m.index.numpy()[keep_out]])
    return model


def zero_mask(model: nn.Module, graph: StructureGraph, mask: KeepMask) -> nn.Module:
    model = copy.deepcopy(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, axes in graph.param_classes.items():
            for axis, classes in axes.items():
                index = torch.from_numpy(np.flatnonzero(~mask.keep[classes]))
                tensors[name].index_fill_(axis, index, 0)
    for path, (inside, outside) in graph.gathers.items():
        m = model.get_submodule(path)
        m.index[torch.from_numpy(~mask.keep[outside])] = -1
    return model
