"""Analyse a network: which channels can be removed, what belongs together, what it costs."""

import contextlib
import itertools
import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from prunegraph.core.budget import AttentionUnit
from prunegraph.core.errors import ConfigError, ModelError, PruneGraphError, first_line
from prunegraph.core.seeding import seeded
from prunegraph.core.task import ExampleInputs
from prunegraph.graph.build import MODEL_INPUT, MODEL_OUTPUT, PARAMETRISED
from prunegraph.graph.copying import copy_network, drop_kept, hears_of_training, put_modes
from prunegraph.graph.drawn import drawn_inputs, drawn_network, has_no_values
from prunegraph.graph.graph import FrozenOp, StructureGraph
from prunegraph.graph.proof.copies import check_copies, containers, entries
from prunegraph.graph.proof.fixes import Fixes
from prunegraph.graph.proof.inputs import filled, shortened, smaller_images
from prunegraph.graph.proof.subjects import ERRORS, Forward, is_sound
from prunegraph.graph.proof.trial import failing_frame
from prunegraph.graph.rules.recurrent import resolve_recurrent, returned_state
from prunegraph.graph.rules.shared.copied_heads import copies_for_heads, heads_of_copies
from prunegraph.graph.rules.table import RULES
from prunegraph.graph.trace.calls import tensors_in
from prunegraph.graph.trace.computed_weights import rules_for
from prunegraph.graph.trace.recorder import LabelRecorder, Rule
from prunegraph.graph.trace.recording import Recording
from prunegraph.graph.trace.training_layers import (
    join_siblings,
    join_training,
    layers_not_run,
    unread_weights,
    unused_weights,
)


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def fresh(example_inputs: ExampleInputs) -> ExampleInputs:
    """Return a copy of the inputs, for a forward that may write into them."""
    copied: ExampleInputs = tree_map_only(Tensor, Tensor.clone, example_inputs)
    return copied


def call_forward(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model on a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def evaluation_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put a model in eval mode without gradients, and every module's mode back afterwards.

    With ``training`` it is put in training mode, without gradients too.
    """
    modes = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    _ = model.train() if training else model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        put_modes(modes)


def _shapes(example_inputs: ExampleInputs) -> str:
    shapes = ", ".join(str([*item.shape]) for item in tensors_in(example_inputs))
    kind = type(example_inputs).__name__
    return f"inputs of shape {shapes}" if shapes else f"a {kind} without a tensor"


def _check_finite(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            msg = f"{name} has no shape yet: run the network once, which makes its lazy modules"
            raise ModelError(msg)
    for name, tensor in model.named_parameters():
        _check_sound(name, tensor)
    for module_name, module in model.named_modules():
        of_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        for name, tensor in module.named_buffers(module_name, recurse=False):
            masks = () if of_norm else (math.inf, -math.inf)  # as a causal attention adds them
            _check_sound(name, tensor, masks)


def _check_sound(name: str, tensor: Tensor, allowed: tuple[float, ...] = ()) -> None:
    """Refuse NaN and infinite values that are not allowed."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):  # one pass
        return
    sound = torch.isfinite(tensor)
    for value in allowed:
        sound |= tensor == value
    if not bool(sound.all()):
        msg = f"{name} holds NaN or infinite values; load sound weights"
        raise ModelError(msg)


def _check_arguments(model: object, attention: str) -> None:
    """Refuse what is no network of Python code, and units that there are not."""
    if attention not in get_args(AttentionUnit):
        msg = f"attention={attention!r}: give one of {', '.join(get_args(AttentionUnit))}"
        raise ConfigError(msg)
    if torch.get_default_device().type == "meta":
        msg = "an analysis computes: leave torch.device('meta') once the network is made"
        raise ConfigError(msg)
    if not isinstance(model, nn.Module):
        msg = f"{type(model).__name__} is no network: give a torch.nn.Module"
        raise ModelError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        msg = f"{type(model).__name__} is compiled: prune the network that it was scripted from"
        raise ModelError(msg)
    if isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):
        msg = (
            f"{type(model).__name__} was made by torch.export, which fixes sizes and cannot be put "
            "in eval mode: prune the network that it was exported from"
        )
        raise ModelError(msg)


def _check_plain(model: nn.Module) -> None:
    """Refuse weights that are computed by wrappers, which surgery cannot slice."""
    for path, module in model.named_modules():
        name = path or type(model).__name__
        where = type(module).__module__
        quantised = where.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
        if quantised and not isinstance(module, FloatFunctional):  # which adds plain tensors
            msg = f"{name} is quantised: prune the network before it is quantised"
            raise ModelError(msg)
        if where.startswith(("torch.ao.quantization.fake", "torch.ao.quantization.observer")):
            msg = f"{name} measures for quantisation: prune the network before it is prepared"
            raise ModelError(msg)
        for buffer, _ in module.named_buffers(recurse=False):
            weight = buffer.removesuffix("_mask")
            if f"{weight}_orig" in module._parameters:
                msg = (
                    f"{name}.{weight} is masked by torch.nn.utils.prune: make the mask permanent "
                    f"first, with torch.nn.utils.prune.remove(module, {weight!r})"
                )
                raise ModelError(msg)


@contextmanager
def repeatable(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Let a forward that draws random numbers draw the same ones each time, and no one else's."""
    on_gpu = torch.cuda.is_available()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda}) if on_gpu else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a forward's
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        with seeded(seed, devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give what a forward writes its state back: buffers, counters, caches, layers made late."""
    owned = [vars(module) for module in model.modules()]
    values, inside = [value for own in owned for value in own.values()], containers(model)
    before = [
        (part, dict(part) if isinstance(part, dict) else list(part)) for part in (*owned, *inside)
    ]
    values += [
        item for part in inside for item in (part.values() if isinstance(part, dict) else part)
    ]
    tensors = [
        (value, value.clone())
        for value in values
        if isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and not value.is_inference()  # nothing may write into those
        and value.layout is torch.strided
    ]
    try:
        yield
    finally:
        for tensor, held in tensors:
            if not torch.equal(tensor, held):
                tensor.data.copy_(held)
        for part, then in before:
            if entries(part) == entries(then):
                continue
            part.clear()
            if isinstance(part, dict | set):
                part.update(then)
            else:
                part.extend(then)


def _to_be_run(model: nn.Module) -> nn.Module:
    """Return a copy of a network that may change its weights where its mode changes, as LoRA's."""
    if not hears_of_training(model):
        return model
    copied = copy_network(model, share=True)
    drop_kept(copied)
    return copied


def _record_all(
    model: nn.Module, examples: Sequence[ExampleInputs], attention: AttentionUnit
) -> LabelRecorder:
    """Record the forward in eval mode, and where it leaves something out, in training mode too."""
    rules: Mapping[str, Rule] = RULES
    recorder = _record(model, examples, attention, rules)
    if recorder.recording.computed:
        custom_rules = rules_for(recorder.recording.computed)
        again = _record(model, examples, attention, custom_rules)
        if again.recording.computed < recorder.recording.computed:
            recorder, rules = again, custom_rules
    copies = copies_for_heads(recorder.recording) if attention == "head" else set()
    if copies:
        rules = heads_of_copies(rules, copies)
        recorder = _record(model, examples, attention, rules)
    _check_followed(recorder.recording)
    unread = unread_weights(recorder.recording)
    if unread or unused_weights(model, recorder.recording):
        with contextlib.suppress(ModelError, *ERRORS):  # it may need targets, or more examples
            copied = copy_network(model)  # in training a forward may change weights
            training = _record(copied, examples, attention, rules, training=True)
            if computed := training.recording.computed - recorder.recording.computed:
                rules = rules_for(computed | recorder.recording.computed)  # NoisyNet's, say
                training = _record(copied, examples, attention, rules, training=True)
            join_training(recorder.recording, training.recording, unread)
    if unused_weights(model, recorder.recording):
        join_siblings(model, recorder.recording)
    recorder.recording.resolve_wide_outputs()
    return recorder


def _check_followed(recording: Recording) -> None:
    """Refuse parametrised weights that are not pruned as the parameters of which they are made."""
    raw, followed = (
        {name.partition(PARAMETRISED)[0] for name in names if PARAMETRISED in name}
        for names in (recording.element_labels, recording.axis_labels)
    )
    if raw - followed:
        msg = (
            f"{min(raw - followed)} has parametrised weights that cannot be followed: make them "
            "plain first, with torch.nn.utils.parametrize.remove_parametrizations(module, "
            "tensor_name)"
        )
        raise ModelError(msg)


def _record(
    model: nn.Module,
    examples: Sequence[ExampleInputs],
    attention: AttentionUnit,
    rules: Mapping[str, Rule],
    *,
    training: bool = False,
) -> LabelRecorder:
    """Record the forward of each example; the multiply-adds are those of the first."""
    recorder = LabelRecorder(model, rules, by_width=attention == "width")
    with evaluation_mode(model, training=training):
        first, *others = examples
        outputs = [_record_forward(recorder, model, first)]
        number = len(recorder.recording.ops)
        outputs += [_record_forward(recorder, model, other) for other in others]
        recorder.recording.ops[number:] = [
            replace(op, macs_coefficient=0.0) for op in recorder.recording.ops[number:]
        ]
    cause = FrozenOp(op="output", module="", reason=MODEL_OUTPUT)
    for output in outputs:
        labelled = [recorder.labels_of(tensor) for tensor in tensors_in(output)]
        recorder.recording.outputs += labelled
        for number, labels in enumerate(labelled):
            state = returned_state(recorder.recording, labels, model) if number else None
            recorder.store.freeze(labels, state or cause, expected=state is None)
        recorder.recording.note_positions(tensors_in(output), cause)
    recorder.recording.resolve_parts_of_axes()
    recorder.recording.resolve_splits()
    recorder.recording.resolve_stacks()
    recorder.recording.resolve_parts()
    resolve_recurrent(model, recorder.recording)
    recorder.recording.resolve_constants()
    return recorder


def _record_forward(
    recorder: LabelRecorder, model: nn.Module, example_inputs: ExampleInputs
) -> Any:
    """Run and record one forward; return its output."""
    example_inputs = fresh(example_inputs)
    cause = FrozenOp(op="input", module="", reason=MODEL_INPUT)
    for tensor in tensors_in(example_inputs):
        recorder.lifetimes.add_input(tensor)
        recorder.set_labels(tensor, recorder.store.frozen(cause, tensor.shape, expected=True))
    try:
        with recorder.recorded():
            return call_forward(model, example_inputs)
    except PruneGraphError:
        raise
    except Exception as error:  # a user's forward may raise anything
        message = first_line(error)
        frame = failing_frame(model, error)
        where = type(model).__name__ if frame is None else frame[0] or type(model).__name__
        if any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(example_inputs)):
            msg = f"{type(model).__name__} fails on NumPy arrays: give torch.from_numpy of them"
            raise ModelError(msg) from error
        if (operator := re.search(r"(?:HigherOrderOperator|HOP) (\w+)", message)) is not None:
            msg = (
                f"{where} calls {operator[1]}, inside which nothing can be followed: analyse it "
                "with plain operations in its place (for flex_attention, "
                "torch.nn.functional.scaled_dot_product_attention)"
            )
            raise ModelError(msg) from error
        msg = (
            f"the forward of {type(model).__name__} fails in {where} on "
            f"{_shapes(example_inputs)}: {message}; give example inputs that the forward accepts "
            "(on the command line: by --dataset)"
        )
        raise ModelError(msg) from error


def cast_inputs(example_inputs: ExampleInputs, dtype: torch.dtype | None) -> ExampleInputs:
    """Return the inputs with those of floating point in another precision; None = as they are."""
    if dtype is None:
        return example_inputs
    cast: ExampleInputs = tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example_inputs
    )
    return cast


def runner(*examples: ExampleInputs) -> Forward:
    """Return what calls a network on each of the inputs."""

    def run(network: nn.Module, dtype: torch.dtype | None, *, seed: int = 0) -> Any:
        with repeatable(network, seed):
            return [call_forward(network, cast_inputs(fresh(each), dtype)) for each in examples]

    return run


def _to_prove_on(
    model: nn.Module, recorder: LabelRecorder, example_inputs: ExampleInputs
) -> ExampleInputs:
    """Return inputs that hide nothing and are small, where the forward takes them."""
    for change in (filled, shortened):
        changed = change(model, example_inputs)
        if changed is not None and is_sound(model, runner(changed)):
            example_inputs = changed
    for smaller in smaller_images(model, example_inputs):
        if recorder.takes_same_steps(partial(call_forward, model, fresh(smaller))):
            return smaller
    return example_inputs


def analyse(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    others: Sequence[ExampleInputs] = (),
    trial: bool = True,
    attention: AttentionUnit = "head",
) -> StructureGraph:
    """Run the forward once and return what can be pruned.

    Layers that no example runs are told of in a warning (``StructureGraph.not_run``).

    The model is left as it was: parameters, buffers, hooks and training flags.

    Args:
        model: any eager network; DDP and torch.compile wrappers are taken off. Weights, and
            inputs, on the meta device are drawn when they are read: ``StructureGraph.proof``.
        example_inputs: what its forward takes: a tensor, a tuple, or a dict of keyword arguments.
        others: inputs whose forwards take other branches, so that their layers are pruned along;
            costs are those of ``example_inputs`` alone.
        trial: prune every unit, in rounds, and compare with the zero-masked network; units that
            the forward cannot lose (literal sizes) are frozen with the reason.
        attention: what a unit of attention is: a whole head, or one position of the width of all
            heads. For both, prune by one, analyse the pruned network by the other.

    Raises:
        ConfigError: there is no such ``attention``; the default device is meta.
        ModelError: the forward fails, weights are not finite, or nothing can be pruned.
    """
    _check_arguments(model, attention)
    model = unwrap(model)
    _check_plain(model)
    is_drawn = has_no_values(model)
    if is_drawn:
        model = drawn_network(model)
        example_inputs, *others = (drawn_inputs(model, item) for item in (example_inputs, *others))
    else:
        _check_finite(model)
    model = _to_be_run(model)
    with state_kept(model), repeatable(model):
        recorder = _record_all(model, [example_inputs, *others], attention)
    fixes = Fixes(model, recorder.recording, attention)
    if not trial:
        graph = fixes.builder().build()
    else:
        with evaluation_mode(model):
            with state_kept(model):
                example_inputs = _to_prove_on(model, recorder, example_inputs)
            run = runner(example_inputs, *others)
            graph = fixes.resolve(run, lately=check_copies(model, run))
        graph = replace(graph, proof="drawn weights" if is_drawn else "own weights")
    if not graph.free.any():
        reasons = "; ".join(dict.fromkeys(item.reason for item in graph.frozen_ops))
        msg = (
            f"{type(model).__name__} has nothing to prune: {reasons or 'no inner channels'}; "
            "a prunable network has a convolution or linear layer that feeds another"
        )
        raise ModelError(msg)
    graph = replace(graph, not_run=layers_not_run(model, recorder.recording, graph))
    if graph.not_run:
        msg = (
            f"no example runs {', '.join(graph.not_run)}, which may read channels that are pruned: "
            "give others=[inputs that do], exclude what feeds them, or take them off"
        )
        warnings.warn(msg, stacklevel=2)
    return graph
