"""Layers that training alone uses, as auxiliary classifiers, follow the channels that they read."""

import torch
from torch import nn

from prunegraph.graph.recording import Recording
from prunegraph.graph.structure import FrozenOp

NOT_FOLLOWED = "read in training alone, beside what is left whole"


def unused_weights(model: nn.Module, recording: Recording) -> set[str]:
    """Return the names of the parameters that a forward did not touch."""
    used = recording.axis_labels.keys() | recording.element_labels.keys()
    return {name for name, _ in model.named_parameters() if name not in used}


def join_training(recording: Recording, training: Recording, unused: set[str]) -> None:
    """Tie the inputs of weights that training alone uses to the channels that they read.

    What lies between such weights has no labels, and stays whole.

    Args:
        recording: of the forward in eval mode; gains labels.
        training: of the forward in training mode.
        unused: names of weights that the forward in eval mode does not touch.
    """
    component = torch.from_numpy(training.store.components())
    known = torch.full((int(component.max()) + 1,), -1)  # a label of each component in eval mode
    shared = [
        (component[labels], recording.axis_labels[name][axis])
        for name, axes in training.axis_labels.items()
        for axis, labels in axes.items()
        if labels.numel() > 1 and axis in recording.axis_labels.get(name, {})
    ]
    for components, labels in shared:
        known[components] = labels
    joined = torch.zeros(len(known), dtype=torch.bool)
    for name in sorted(unused & training.axis_labels.keys()):
        for axis, labels in training.axis_labels[name].items():
            components = component[labels]
            followed = known[components] >= 0
            if labels.numel() == 1 or not followed.any():
                continue
            own = recording.store.fresh(labels.numel())
            recording.axis_labels.setdefault(name, {})[axis] = own
            recording.store.unite(own[followed], known[components[followed]])
            cause = FrozenOp(op="parameter", module=name, reason=NOT_FOLLOWED)
            recording.store.freeze(own[~followed], cause)
            joined[components] = True
    for components, labels in shared:
        tied = joined[components]
        recording.store.unite(labels[tied], known[components[tied]])
    for label, event in training.store.events.items():
        place = component[label]
        if joined[place] and known[place] >= 0:
            recording.store.freeze(known[place : place + 1], event.cause, expected=event.expected)
