"""What recurrent layers do to labels.

A unit is a row of every gate and a column of the recurrent weight. One that is removed was zero at
every step: its gates are silent, and it begins at zero. The layers and directions of a module have
equally many units, so those of one number leave together.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from prunegraph.graph.graph import FrozenOp
from prunegraph.graph.rules.shared.constants import freeze_if_constant
from prunegraph.graph.rules.shared.products import record_product
from prunegraph.graph.rules.shared.weights import record_linear, tie_parameter
from prunegraph.graph.trace.attribute_reads import is_custom
from prunegraph.graph.trace.labels import along, labelled, narrow_constant, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall
from prunegraph.graph.trace.recording import RecordedOp, Recording, SizeUse
from prunegraph.graph.trace.weight_views import recurrent_weights

STATE = "model output: the state of {} is returned, and whoever feeds it back relies on its width"


def fused_recurrent(recorder: LabelRecorder, call: OpCall) -> None:
    """All steps in one op, of ``[steps, batch, in]`` or, packed, of ``[all steps, in]``.

    ``mkldnn_rnn_layer`` is one layer in one direction; those of GPUs are the whole.
    """
    names = [argument.name for argument in call.func._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    cells: list[Sequence[Tensor]]
    if call.name == "mkldnn_rnn_layer":
        cells = [[given[f"weight{place}"] for place in range(4 if given["has_biases"] else 2)]]
        directions, states = 1, (given["hx_"], given["cx_"])
    else:
        stride, weights = given["weight_stride0"], given["weight"]
        cells = [weights[first : first + stride] for first in range(0, len(weights), stride)]
        directions, states = 1 + given["bidirectional"], (given["hx"], given["cx"])
    source: Tensor = given["input"]
    if any(recorder.axis_labels(weight, 0) is None for cell in cells for weight in cell[:2]):
        recorder.freeze_all(call, "recurrent layer with computed weights")
        size = sum(weight.numel() for cell in cells for weight in cell if weight.ndim == 2)
        record_product(recorder, prod(source.shape[:-1]) * size)
        return
    channels = recorder.channel_labels(recorder.labels_of(source), -1)
    carried: list[Tensor] = []
    for first in range(0, len(cells), directions):
        parts = [
            _cell(recorder, call, source, channels, cell)
            for cell in cells[first : first + directions]
        ]
        channels, carried = torch.cat([part[0] for part in parts]), parts[0]
    out, *after = call.outputs()
    recorder.set_labels(out, along(channels, out.ndim - 1, out.shape))
    for before, state, labels in zip(states, after, carried, strict=False):
        if before is None:  # a GRU has no cell state
            continue
        recorder.store.unite(
            recorder.labels_of(before), along(labels, before.ndim - 1, before.shape)
        )
        recorder.set_labels(state, along(labels, state.ndim - 1, state.shape))


def _cell(
    recorder: LabelRecorder,
    call: OpCall,
    source: Tensor,
    channels: Tensor,
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Record one direction of one layer; return the labels of its output and of its cell state."""
    inputs, recurrent, *others = weights
    # in the order of a layer that runs step by step, so that the structure has one fingerprint
    columns, rows = recorder.stored_labels(inputs, 1), recorder.stored_labels(inputs, 0)
    units = recorder.stored_labels(recurrent, 1)
    freeze_if_constant(recorder, call, channels, columns)
    recorder.store.unite(channels, columns)
    for weight in (recurrent, *others[:2]):
        tie_parameter(recorder, weight, rows)
    products = [(inputs, columns, rows), (recurrent, units, rows)]
    state = units
    if others and others[-1].ndim == 2:
        state = recorder.stored_labels(others[-1], 1)
        products.append((others[-1], state, units))
    for weight, read, made in products:
        record_linear(recorder, weight, read, made, prod(source.shape[:-1]))
    return [units, state]


def pack(recorder: LabelRecorder, call: OpCall) -> None:
    """Sequences ``[steps, batch, ...]`` without what pads them: ``[all steps, ...]``."""
    labels = recorder.labels_of(call.args[0])
    if {0, 1} & set(varying_axes(labels)):
        recorder.freeze_inputs(call, "channels lie along the steps or the batch")
    packed = call.out[0]
    recorder.set_labels(packed, labels[:1, 0].expand(packed.shape))


def resolve_recurrent(model: nn.Module, recording: Recording) -> None:
    """Tie what belongs to a unit, and let the products of all steps with one weight be one."""
    tie_units(model, recording)
    stored = recurrent_weights(model)
    ops: dict[object, RecordedOp] = {}
    for number, op in enumerate(recording.ops):
        key = (op.module, op.param) if op.param in stored else number
        macs, spatial = op.macs_coefficient, op.spatial
        if key in ops:
            macs, spatial = macs + ops[key].macs_coefficient, spatial + ops[key].spatial
        ops[key] = replace(op, macs_coefficient=macs, spatial=spatial)
    recording.ops[:] = ops.values()


def tie_units(model: nn.Module, recording: Recording) -> None:
    """Tie the gates of each unit, its column of the recurrent weight, and units of one number.

    The module around one may have made its first state, with the number of units that it read.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            continue
        units: list[Tensor] = []
        for name, _ in module.named_parameters(path, recurse=False):
            kind = name.rpartition(".")[2].partition("_l")[0]
            axes = recording.axis_labels.get(name, {})
            units += [labels for axis, labels in axes.items() if (kind, axis) != ("weight_ih", 1)]
        if getattr(module, "proj_size", 0):
            cause = FrozenOp(op="lstm", module=path, reason="projects its units to fewer of them")
            for labels in units:
                recording.store.freeze(labels, cause)
        elif units:
            first = units[0][: module.hidden_size]
            for labels in units:
                recording.store.unite(labels.view(-1, module.hidden_size), first)
            owner = _own_module_around(model, path)
            use = SizeUse(module=owner, labels=first, axis=0, by_name=True)
            recording.size_uses.append(use)
            others = recording.makers.get(module.hidden_size, set()) - {owner}
            recording.filled += [replace(use, module=other) for other in sorted(others)]


def _own_module_around(model: nn.Module, path: str) -> str:
    """Return the path of the nearest module around another that is of the user's own class."""
    while path:
        path = path.rpartition(".")[0]
        if is_custom(type(model.get_submodule(path))):
            break
    return path


def returned_state(recording: Recording, labels: Tensor, model: nn.Module) -> FrozenOp | None:
    """Return why channels of an output stay, if it is the state of a recurrent layer."""
    names = sorted(recurrent_weights(model))
    known = {name: recording.axis_labels.get(name, {}).get(1) for name in names}
    units = {name: own for name, own in known.items() if "weight_hh" in name and own is not None}
    own = labelled(narrow_constant(labels)).unique()
    if not units or not len(own):
        return None
    component = recording.store.components()
    for name, those in units.items():
        if bool(torch.isin(component[own], component[those]).all()):
            module = name.rpartition(".")[0]
            return FrozenOp(op="output", module=module, reason=STATE.format(module or "it"))
    return None
