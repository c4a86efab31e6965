"""What training alone uses, as auxiliary classifiers, follows the channels that it reads."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunegraph.graph.graph import FrozenOp, StructureGraph
from prunegraph.graph.trace.labels import NEUTRAL, labelled
from prunegraph.graph.trace.recording import Recording, SizeUse

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Of whose parts an input may choose some."""

NOT_FOLLOWED = "read in training alone, beside what is left whole"


def unused_weights(model: nn.Module, recording: Recording) -> set[str]:
    """Return the names of the parameters that a forward did not touch."""
    return {name for name, _ in model.named_parameters()} - recording.touched


def unread_weights(recording: Recording) -> set[str]:
    """Return the names of the weights whose outputs no layer reads, and which are no outputs.

    Training may: a variational network's layer of deviations is run and left out in eval mode.
    """
    component = recording.store.components()
    labels = [labelled(op.in_labels) for op in recording.ops]
    read = torch.zeros(len(component), dtype=torch.bool)
    read[component[torch.cat([*labels, torch.tensor([*recording.store.events]).long()])]] = True
    return {
        op.param
        for op in recording.ops
        if op.param is not None and not bool(read[component[labelled(op.out_labels)]].any())
    }


def layers_not_run(
    model: nn.Module, recording: Recording, graph: StructureGraph
) -> tuple[str, ...]:
    """Return the layers that did not run, and whose inputs are as wide as what may be pruned."""
    widths = {len(graph.groups[number].units) for number in graph.free_groups}
    unused = unused_weights(model, recording) - recording.axis_labels.keys()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wide = (name for name in unused if any(size in widths for size in shapes[name][1:2]))
    return tuple(sorted({name.rpartition(".")[0] or name for name in wide}))


def join_siblings(model: nn.Module, recording: Recording) -> None:
    """Prune experts that the example did not visit like those that it did, so that others may.

    Of the parts of a ``ModuleList``, a ``ModuleDict`` or a list of parameters, with parameters and
    buffers of the same names, some may be used for some inputs alone. They are experts if those
    that were used read and write the same channels, or have them for themselves; layers of a
    chain, and exits that end in the network's outputs, are none, and stay whole. So do axes of
    other sizes.
    """
    used = recording.touched
    experts = _Experts(recording)
    for path, container in model.named_modules():
        if not isinstance(container, CONTAINERS):
            continue
        held: list[tuple[str, nn.Module | Tensor]] = [*container.named_children()]
        held += container.named_parameters(recurse=False)
        parts = {f"{path}.{name}" if path else name: dict(_held(part)) for name, part in held}
        visited = {name for name, own in parts.items() if any(name + k in used for k in own)}
        for name in sorted(parts.keys() - visited):
            own = parts[name]
            alike = [each for each in sorted(visited) if parts[each].keys() == own.keys()]
            layers = "" in own and own[""].ndim > 1 and len(alike) == 1  # of a chain, perhaps
            if alike and not layers and experts.are(alike, own.keys()):
                for key, tensor in own.items():
                    _join_like(recording, alike[0] + key, name + key, tensor)


class _Experts:
    """Tells parts of which one is used or another from layers that follow each other."""

    def __init__(self, recording: Recording) -> None:
        self._labels = recording.axis_labels
        self._component = recording.store.components()
        self._outputs: set[int] = set().union(*map(self._components, recording.outputs))
        self._owners: dict[int, set[str]] = {}
        for name, axes in self._labels.items():
            for own in axes.values():
                for component in self._components(own):
                    self._owners.setdefault(component, set()).add(name)

    def are(self, parts: list[str], keys: Iterable[str]) -> bool:
        """Return whether parts with these parameters and buffers are experts."""
        return all(self._fits(parts, key) for key in keys)

    def _fits(self, parts: list[str], key: str) -> bool:
        axes = [self._labels.get(part + key, {}) for part in parts]
        for axis in axes[0]:
            known = [own[axis] for own in axes if axis in own]
            components = [self._components(labels) for labels in known]
            if components[0] & self._outputs:
                return False
            shared = all(torch.equal(self._component[known[0]], self._component[e]) for e in known)
            alone = all(
                all(name.startswith(f"{part}.") for c in own for name in self._owners[c])
                for part, own in zip(parts, components, strict=False)
            )
            if not (shared or alone):
                return False
        return True

    def _components(self, labels: Tensor) -> set[int]:
        return set(self._component[labelled(labels)].tolist())


def _held(part: nn.Module | Tensor) -> list[tuple[str, Tensor]]:
    """Return what follows the path of a part in the names of its tensors, and these."""
    if isinstance(part, Tensor):
        return [("", part)]
    return [(f".{name}", item) for name, item in (*part.named_parameters(), *part.named_buffers())]


def _join_like(recording: Recording, known: str, name: str, tensor: Tensor) -> None:
    """Give the axes of a parameter or buffer the labels of another's that are as long."""
    labels = recording.axis_labels.get(known, {})
    fitting = {axis: own for axis, own in labels.items() if own.numel() == tensor.shape[axis]}
    if fitting:
        recording.axis_labels[name] = fitting
    elements = recording.element_labels.get(known)
    if elements is not None and elements.shape == tensor.shape:
        recording.element_labels[name] = elements


def join_training(recording: Recording, training: Recording, unread: set[str]) -> None:
    """Tie the inputs of weights that training alone uses to the channels that they read.

    What lies between such weights has no labels, and stays whole. What training alone cannot lose
    does not hold back the forward in eval mode.

    Args:
        recording: of the forward in eval mode; gains labels.
        training: of the forward in training mode.
        unread: the ``unread_weights`` of ``recording``.
    """
    join = _Join(recording, training)
    join.read(unread)
    in_eval = recording.touched
    for name in [name for name in training.axis_labels if name not in in_eval]:
        for axis, labels in training.axis_labels[name].items():
            own = join.follow(name, labels)
            if own is not None:
                recording.axis_labels.setdefault(name, {})[axis] = own
    for name in [name for name in training.element_labels if name not in in_eval]:
        own = join.follow(name, training.element_labels[name])
        if own is not None:
            recording.element_labels[name] = own
    join.tie()
    recording.reads |= training.reads


class _Join:
    """Knows the labels in eval mode of what a forward in training mode labels.

    Args:
        recording: of the forward in eval mode.
        training: of the forward in training mode.
    """

    def __init__(self, recording: Recording, training: Recording) -> None:
        self._recording, self._training = recording, training
        self._component = training.store.components()
        self._known = torch.full((int(self._component.max()) + 1,), NEUTRAL)
        self._joined = torch.zeros(len(self._known), dtype=torch.bool)
        self._shared = [
            (self._component[labels], recording.axis_labels[name][axis])
            for name, axes in training.axis_labels.items()
            for axis, labels in axes.items()
            if labels.numel() > 1 and axis in recording.axis_labels.get(name, {})
        ]
        for components, labels in self._shared:
            self._known[components] = labels

    def follow(self, name: str, labels: Tensor) -> Tensor | None:
        """Return labels in eval mode of a weight's, or None if none of its channels has any."""
        components = self._component[labels]
        followed = self._known[components] != NEUTRAL
        is_raw = labels.ndim > 1
        if labels.numel() == 1 or not followed.any() or (is_raw and not followed.all()):
            return None
        store = self._recording.store
        own = store.fresh(labels.numel()).view(labels.shape)
        store.unite(own[followed], self._known[components[followed]])
        cause = FrozenOp(op="parameter", module=name, reason=NOT_FOLLOWED)
        store.freeze(own[~followed], cause)
        self._joined[components] = True
        return own

    def read(self, weights: set[str]) -> None:
        """Let what training ties to the outputs of these weights be tied."""
        for op in self._training.ops:
            if op.param in weights:
                self._joined[self._component[labelled(op.out_labels)]] = True

    def tie(self) -> None:
        """Tie what the weights that were followed tie, and take over the sizes they need."""
        for components, labels in self._shared:
            tied = self._joined[components]
            self._recording.store.unite(labels[tied], self._known[components[tied]])
        self._take_over(self._training.size_uses, self._recording.size_uses)
        self._take_over(self._training.filled, self._recording.filled)

    def _take_over(self, uses: list[SizeUse], own: list[SizeUse]) -> None:
        modules = {use.module for use in own}
        for use in uses:
            neutral = use.labels == NEUTRAL
            labels = torch.where(neutral, NEUTRAL, self._known[self._component[use.labels]])
            if use.module not in modules and torch.equal(labels == NEUTRAL, neutral):
                own.append(replace(use, labels=labels))
