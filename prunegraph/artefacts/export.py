"""Networks as files for other programs; each is read back and compared before it is written."""

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegraph.artefacts.pruned import WEIGHTS_SUFFIX, PrunedNetwork, load_pruned, save_pruned
from prunegraph.core.errors import ConfigError, ExportError
from prunegraph.core.files import write_bytes
from prunegraph.core.tensors import state_tensors, to_safetensors
from prunegraph.graph import ExampleInputs, copy_network, evaluation_mode, unwrap
from prunegraph.graph.trace.calls import tensors_in

ExportFormat = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[ExportFormat, str] = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "safetensors": WEIGHTS_SUFFIX,
}

TOLERANCE = 1e-4
"""Largest accepted difference relative to the largest output."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Runner = Callable[[Arguments], list[Tensor]]


def export(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Path | str,
    *,
    format: ExportFormat = "onnx",  # the command line's word for it
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[int] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a network for use elsewhere, once the file's own outputs have been found equal.

    Args:
        model: the network; exported in eval mode on the CPU.
        example_inputs: what its forward takes, the batch as axis 0 of every tensor.
        path: the file to write; it ends in ``.onnx``, ``.pt2`` or ``.safetensors``.
        format: ``"onnx"``, ``"torch-export"`` (a ``.pt2`` program) or ``"safetensors"`` (weights).
        dynamic_batch: let the file take any batch size; False = that of the example.
        dynamic_axes: further axes whose size may be another one than the example's, such as 1 for
            tokens and 2 and 3 for images: that axis of every input that has it. The file is
            compared at twice the example's sizes, too.
        metadata: texts that the file holds by name: ``metadata_props`` of ONNX, ``extra_files`` of
            a program, the metadata of weights.

    Returns:
        The path.

    Raises:
        ConfigError: unknown format, another suffix than its own, or an axis that no input has.
        ExportError: the exporter fails, a library is missing, or the outputs differ; nothing is
            written then.
        ArtefactError: the file cannot be written.
    """
    writers = {"onnx": _to_onnx, "torch-export": _to_program, "safetensors": _to_weights}
    if format not in writers:
        msg = (
            f"unknown export format {format!r}: choose from {', '.join(SUFFIXES)}; "
            "prunegraph.artefacts.sparse.save_sparse writes sparse files"
        )
        raise ConfigError(msg)
    if Path(path).suffix != SUFFIXES[format]:
        msg = f"{path} must end in {SUFFIXES[format]}, as {format} files do"
        raise ConfigError(msg)
    network = copy_network(unwrap(model)).cpu().eval()
    example = _arguments(example_inputs)
    dynamic = _checked_axes(example, dynamic_axes, dynamic_batch=dynamic_batch)
    if dynamic_batch:
        example = _with_batch(example, 2)  # exporters take a batch of one for a constant
    checked = [example]
    if dynamic_batch:
        checked.append(_with_batch(example, 3))
    if dynamic_axes:
        checked.append(_twice_along(example, dynamic_axes))
    with evaluation_mode(network):
        try:
            content, runner = writers[format](network, example, dict(metadata or {}), dynamic)
            for arguments in checked:
                _compare(format, network, runner, arguments)
        except ExportError:
            raise
        except Exception as error:
            reason = " ".join(str(_first_cause(error)).split())[:300]
            hint = "; if its forward fixes the batch size, use dynamic_batch=False" * dynamic_batch
            if dynamic_axes:
                hint += f"; if it fixes one of the axes {list(dynamic_axes)}, leave that out"
            msg = f"{format} export of {type(network).__name__} failed: {reason}{hint}"
            raise ExportError(msg) from error
    write_bytes(path, content)
    return Path(path)


def export_recipe(
    network: PrunedNetwork,
    example_inputs: ExampleInputs,
    path: Path | str,
    build_model: Callable[[], nn.Module],
) -> Path:
    """Write weights and the recipe that cuts a freshly built dense network to fit them.

    Before anything is written, the recipe is applied to such a network and its outputs compared.

    Args:
        network: the pruned network, as ``load_pruned`` returned it.
        example_inputs: what its forward takes.
        path: the ``.safetensors`` file; the recipe goes to ``.recipe.json`` beside it. Read both
            back with ``load_pruned(path, build_model)``.
        build_model: makes the dense network; its weights do not matter.

    Returns:
        The path.

    Raises:
        ConfigError: the file has another suffix.
        ExportError: the outputs differ.
        ArtefactError: a file cannot be written, or the recipe does not fit what is built.
    """
    path = Path(path)
    if path.suffix != WEIGHTS_SUFFIX:
        msg = (
            f"{path} must end in {WEIGHTS_SUFFIX}: its recipe goes to a file of that name beside it"
        )
        raise ConfigError(msg)

    def save(where: Path) -> None:
        save_pruned(
            where,
            model=network.model,
            mask=network.mask,
            graph=network.graph,
            info=network.info,
        )

    example = _arguments(example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / path.name)
        images = isinstance(example_inputs, Tensor) and example_inputs.is_floating_point()
        given = None if images else example_inputs  # images are known by the shape that is saved
        rebuilt = load_pruned(Path(folder) / path.name, build_model, given).model
    with evaluation_mode(network.model), evaluation_mode(rebuilt):
        _compare("safetensors", network.model, partial(_run, rebuilt), example)
    save(path)
    return path


def _arguments(example_inputs: ExampleInputs) -> Arguments:
    inputs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, example_inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _checked_axes(
    example: Arguments, axes: Sequence[int], *, dynamic_batch: bool
) -> dict[int, Any]:
    """Return which axes may vary, and by which rule of ``torch.export``."""
    most = max((tensor.dim() for tensor in tensors_in(example)), default=0)
    for axis in axes:
        if not 0 < axis < most:
            msg = f"dynamic_axes holds {axis}: name axes from 1 to {most - 1} (0 is the batch)"
            raise ConfigError(msg)
    found: dict[int, Any] = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    if dynamic_batch:
        found[0] = torch.export.Dim("batch", min=1)
    return found


def _with_batch(arguments: Arguments, size: int) -> Arguments:
    """Return the arguments with ``size`` different examples along axis 0 of every tensor."""
    return _varied(arguments, lambda value: torch.cat([value] * size)[:size], seed=size)


def _twice_along(arguments: Arguments, axes: Sequence[int]) -> Arguments:
    """Return the arguments with twice as many different entries along some axes."""

    def repeat(value: Tensor) -> Tensor:
        for axis in axes:
            if axis < value.dim():
                value = torch.cat([value] * 2, dim=axis)
        return value

    return _varied(arguments, repeat, seed=0)


def _varied(arguments: Arguments, repeat: Callable[[Tensor], Tensor], seed: int) -> Arguments:
    """Return the arguments repeated, with noise that makes the parts differ.

    Those of an example without negative numbers have none either.
    """

    def vary(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        copies = repeat(value).clone()
        if copies.is_floating_point():
            noise = torch.Generator().manual_seed(seed)
            if bool((copies >= 0.0).all() and copies.any()):
                copies *= torch.rand(copies.shape, generator=noise, dtype=copies.dtype) + 0.5
            else:
                copies += torch.randn(copies.shape, generator=noise, dtype=copies.dtype)
        return copies

    varied: Arguments = tree_map(vary, arguments)
    return varied


def _run(network: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    args, kwargs = arguments
    return tensors_in(network(*args, **kwargs))


def _dynamic_shapes(arguments: Arguments, dynamic: Mapping[int, Any]) -> Any:
    """Return which axes may vary, in the structure of the arguments; None = none."""
    if not dynamic:
        return None

    def axes(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor) or not value.dim():
            return None
        return {axis: rule for axis, rule in dynamic.items() if axis < value.dim()}

    args, kwargs = tree_map(axes, arguments)
    return kwargs or args


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporters from warning of their own internals, and printing whole graphs."""
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _to_onnx(
    network: nn.Module, example: Arguments, metadata: dict[str, str], dynamic: Mapping[int, Any]
) -> tuple[bytes, Runner]:
    """Return an ONNX file and a function that runs it in onnxruntime."""
    # The ONNX libraries are an optional dependency: imported only where they are needed.
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it and says so less clearly
    except ImportError as error:
        msg = f"ONNX export needs {error.name}: pip install onnx onnxruntime onnxscript"
        raise ExportError(msg) from error
    args, kwargs = example
    with _quiet():
        program = torch.onnx.export(
            network,
            args,
            kwargs=kwargs or None,
            dynamic_shapes=_dynamic_shapes(example, dynamic),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    proto = program.model_proto
    for part in (proto.graph, *proto.functions):  # lines of code and paths of this machine
        for item in (*part.node, *part.value_info):
            del item.metadata_props[:]
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(arguments: Arguments) -> list[Tensor]:
        feed = {name: t.numpy() for name, t in zip(names, tensors_in(arguments), strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return content, run


def _to_program(
    network: nn.Module, example: Arguments, metadata: dict[str, str], dynamic: Mapping[int, Any]
) -> tuple[bytes, Runner]:
    """Return a ``torch.export`` program and a function that runs what was read back."""
    args, kwargs = example
    shapes = _dynamic_shapes(example, dynamic)
    buffer = io.BytesIO()
    with _quiet():
        exported = torch.export.export(network, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(exported, buffer, extra_files=metadata)
        content = buffer.getvalue()
        program = torch.export.load(io.BytesIO(content)).module()
    return content, lambda arguments: _run(program, arguments)


def _to_weights(
    network: nn.Module, _example: Arguments, metadata: dict[str, str], _dynamic: Mapping[int, Any]
) -> tuple[bytes, Runner]:
    """Return the weights alone and a function that runs a network with what was read back."""
    content = to_safetensors(state_tensors(network), metadata)
    reloaded = copy_network(network)
    tensors = safetensors.torch.load(content)
    with torch.no_grad():
        for name, tensor in state_tensors(reloaded).items():
            tensor.zero_().copy_(tensors[name])
    return content, lambda arguments: _run(reloaded, arguments)


def _compare(format_name: str, network: nn.Module, runner: Runner, arguments: Arguments) -> None:
    """Raise if the exported file's outputs are not those of the network."""
    expected, found = _run(network, arguments), runner(arguments)
    if [t.shape for t in expected] != [t.shape for t in found]:
        msg = f"the {format_name} file gives outputs of other shapes than the network"
        raise ExportError(msg)
    difference = max(map(_difference, expected, found), default=0.0)
    if difference <= TOLERANCE:
        return
    if any(map(_difference, expected, _run(network, arguments))):
        msg = (
            f"{type(network).__name__} draws random numbers in eval mode, so that no file can be "
            "compared with it: let it draw none there"
        )
        raise ExportError(msg)
    msg = (
        f"the {format_name} file's outputs differ from the network's by {difference:.1e} of the "
        f"largest (at most {TOLERANCE:.0e} is accepted): nothing was written"
    )
    raise ExportError(msg)


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest finite number of the first tensor."""
    differs = (one != other) & ~(one.isnan() & other.isnan())  # minus infinity is an answer too
    if not differs.any():
        return 0.0
    measured = one.double().abs()[one.isfinite()]
    scale = measured.max().clamp_min(1e-12) if measured.numel() else 1.0
    difference = (one.double() - other.double()).abs()[differs] / scale
    return float(difference.nan_to_num(math.inf, math.inf).max())
