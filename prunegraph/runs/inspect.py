"""``prunegraph inspect``: what can be pruned, what it costs, what is frozen and why."""

from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegraph.artefacts.masked import MaskedNetwork
from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.errors import ModelError
from prunegraph.core.extras import Late
from prunegraph.core.masks import ChannelMask, Float64Array
from prunegraph.core.user_code import HF_PREFIX, is_factory
from prunegraph.data import load_dataset
from prunegraph.graph import ExampleInputs, StructureGraph, unwrap
from prunegraph.graph.costs.latency import smallest_mask
from prunegraph.graph.costs.macs import PARAMS
from prunegraph.models import build_model, load, load_weights, weights_info
from prunegraph.runs.export import read_run
from prunegraph.runs.options.config import DataConfig
from prunegraph.runs.options.tools import InspectConfig
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import (
    DEFAULT_ARCH,
    custom_dataset,
    named_dataset,
    resolve_arch,
    structure_of,
    trained_size,
)

plots = Late("prunegraph.runs.report.plots")

KNOWN_INPUTS: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((1, 8, 8), 10),
    "clutter": ((1, 16, 16), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "imagenet": ((3, 224, 224), 1000),
}
"""Image shape and number of classes of data sets that need not be read to know them."""

MOST_NAMED = 2
"""So many layers that are tied to a group are named."""

NUM_TOKENS = 16
"""Tokens that a language model is analysed on."""

MOST_ROWS = 25
"""Groups that are shown without ``--all``."""


def run_inspect(config: InspectConfig, console: Console) -> dict[str, Any]:
    """Analyse a network, print and draw what was found, return it as ``--json`` prints it."""
    mask: ChannelMask | None = None
    if config.run is None:
        arch, graph = _analyse(config)
    else:
        saved = read_run(config.run, config.arch)
        if isinstance(saved, MaskedNetwork):
            return _show_zeros(saved, console)
        arch, graph, mask = saved.info.arch, saved.graph, saved.mask
    content = {"arch": arch, **graph.to_json()}
    if mask is not None:
        cost = graph.cost(mask)
        widths = graph.group_widths(mask)
        content["kept"] = {"macs": cost.macs, "params": cost.params, "widths": widths}
    if not config.json:
        _print(content, graph, console, len(graph.groups) if config.all else MOST_ROWS)
    if config.plot is not None:
        plots.save_figure(plots.draw_groups(graph, _title(content), mask), config.plot)
        console.say(f"the groups are drawn in {config.plot}")
    return content


def _analyse(config: InspectConfig) -> tuple[str, StructureGraph]:
    """Build the network that the options name and analyse it; return its name too."""
    device = resolve_device(config.device)
    images = (config.weights, config.dataset, config.image_size, config.num_classes)
    name = config.arch or ""
    model: nn.Module
    inputs: ExampleInputs
    if name.startswith(HF_PREFIX) and not any(images):
        model = load(name)
        inputs = example_of(model)
    else:
        name, model, inputs = _classifier(config)
    inputs = tree_map(lambda value: value.to(device), inputs)
    graph = structure_of(name, model.to(device).eval(), inputs, config)
    assert graph is not None  # without a budget
    return name, graph


def _classifier(config: InspectConfig) -> tuple[str, nn.Module, Tensor]:
    """Return a classifier of images, its name, and an image for it."""
    info = weights_info(config.weights) if config.weights else None
    arch = resolve_arch(config.arch, config.weights, info)
    dataset = named_dataset(config.dataset, config.weights, info)
    image_shape, num_classes = _input_of(config, arch, dataset, trained_size(config, info))
    model = unwrap(build_model(arch, num_classes=num_classes, image_shape=image_shape))
    if config.weights is not None:
        load_weights(model, config.weights)
    generator = torch.Generator().manual_seed(config.seed)
    return arch, model, torch.randn(1, *image_shape, generator=generator)


def example_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a network of transformers takes: a few tokens, or an image, as its config says.

    Raises:
        ModelError: it takes something else.
    """
    network: Any = model
    name, config = network.main_input_name, network.config
    if name == "input_ids":
        return {name: torch.arange(NUM_TOKENS)[None] % config.get_text_config().vocab_size}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(1, channels, side, side, generator=generator)}
    msg = f"{type(model).__name__} takes {name}: use pg.analyse(model, example_inputs) in Python"
    raise ModelError(msg)


def _show_zeros(saved: MaskedNetwork, console: Console) -> dict[str, Any]:
    """Print the zeros of each weight of a network, counted in it, and return them."""
    mask, table = saved.mask, Table(title=escape(f"{saved.info.arch}: {saved.mask.pattern}"))
    for head in ("weight", "size", "zeros"):
        table.add_column(head, justify="left" if head == "weight" else "right")
    zeros = {}
    for name, parameter in mask.parameters_of(saved.model).items():
        zeros[name] = int((parameter == 0).sum()) / parameter.numel()
        table.add_row(escape(name), f"{parameter.numel():,}", f"{100 * zeros[name]:.2f} %")
    console.table(table)
    network = mask.sparsity * mask.size / sum(item.numel() for item in saved.model.parameters())
    console.say(
        f"{100 * mask.sparsity:.2f} % of {mask.size:,} prunable weights are zero, "
        f"{100 * network:.2f} % of the network"
    )
    return {
        "arch": saved.info.arch,
        "pattern": str(mask.pattern),
        "sparsity": mask.sparsity,
        "network_sparsity": network,
        "mask_digest": mask.digest(),
        "zeros": zeros,
    }


def _title(content: dict[str, Any]) -> str:
    """Return the title of a picture or table."""
    title = f"{content['arch']}: {content['macs']:,} MACs, {content['params']:,} parameters"
    if "kept" in content:
        kept = content["kept"]
        title += f"; kept: {kept['macs']:,} MACs, {kept['params']:,} parameters"
    return title


def _input_of(
    config: InspectConfig, arch: str, dataset: str | None, side: int | None
) -> tuple[tuple[int, int, int], int]:
    """Return image shape and number of classes without reading a data set, where that can be."""
    if dataset is None:
        dataset = _usual_dataset(arch)
    if dataset in KNOWN_INPUTS and config.data_dir is None:
        (channels, height, width), num_classes = KNOWN_INPUTS[dataset]
    else:
        if is_factory(dataset):
            images = custom_dataset(dataset, DataConfig(data_dir=config.data_dir), None)
        else:
            images = load_dataset(dataset, data_dir=config.data_dir, image_size=side)
        (channels, height, width), num_classes = images.image_shape, images.num_classes
    if side is not None:
        height = width = side
    return (channels, height, width), config.num_classes or num_classes


def _usual_dataset(arch: str) -> str:
    """Return the data set whose images a network usually takes."""
    if arch.startswith(DEFAULT_ARCH):
        return "digits"
    return "imagenet" if ":" in arch else "cifar10"


def _print(content: dict[str, Any], graph: StructureGraph, console: Console, most: int) -> None:
    """Print a row for each group, the frozen operations, and what can go.

    Args:
        content: what ``--json`` prints.
        graph: the structure.
        console: where to print.
        most: rows that are shown.
    """
    widths = content.get("kept", {}).get("widths")
    table = Table(title=escape(_title(content)))
    for head in ("group", "width", *["kept"] * (widths is not None), "parameters", "MACs"):
        table.add_column(head, justify="left" if head == "group" else "right", overflow="fold")
    table.add_column("tied to it")
    table.add_column("frozen because")
    params, words = params_by_group(graph), tied_in_words(graph)
    for number, group in enumerate(content["groups"][:most]):
        table.add_row(
            escape(group["name"]),
            str(group["size"]),
            *([] if widths is None else [str(widths.get(group["name"], group["size"]))]),
            f"{params[number]:,.0f}",
            f"{100 * group['macs_share']:.1f} %",
            escape(words[number]),
            escape(group["frozen"] or ""),
        )
    console.table(table)
    if (hidden := len(content["groups"]) - most) > 0:
        console.say(f"{hidden} more groups: --all shows them")
    for frozen in content["frozen_ops"][:most]:
        console.say(
            f"frozen by {frozen['op']} in {frozen['module'] or 'the network'}: {frozen['reason']}"
        )
    free = int(graph.free.sum())
    groups = sum(group["frozen"] is None for group in content["groups"])
    console.say(
        f"{free} of {graph.num_units} prunable units can be removed, in {groups} groups; "
        f"at least {least_macs(graph):.1%} of the MACs remain"
    )
    memory = graph.peak_memory(graph.dense_mask())
    console.say(f"activations take {memory:,} bytes at once for one input")


def params_by_group(graph: StructureGraph) -> Float64Array:
    """Return ``[G]`` parameters by the group of their first axis with channels."""
    params = np.zeros(len(graph.groups))
    for term in graph.cost_model.terms:
        if term.kind == PARAMS and term.axes:
            first, *others = term.axes
            each = term.coefficient * float(np.prod([len(axis) for axis in others]))
            params += each * np.bincount(graph.group_of[first], minlength=len(params))
    return params


def tied_in_words(graph: StructureGraph) -> list[str]:
    """Return for each group what else writes its channels, and what reads them."""
    writers: list[list[str]] = [[] for _ in graph.groups]
    readers: list[list[str]] = [[] for _ in graph.groups]
    for op in graph.ops:
        for found, units in ((writers, op.out_units), (readers, op.in_units)):
            for number in np.unique(graph.group_of[units]):
                found[number].append(op.name.partition("#")[0])
    return [
        "; ".join(
            f"{what} {_shorten(names)}"
            for what, names in (
                (
                    "summed with" if graph.summed[group.units].any() else "as wide as",
                    [name for name in dict.fromkeys(writers[number]) if name != group.name],
                ),
                ("read by", list(dict.fromkeys(readers[number]))),
            )
            if names
        )
        for number, group in enumerate(graph.groups)
    ]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def least_macs(graph: StructureGraph) -> float:
    """Return the least share of the MACs that can remain."""
    least = smallest_mask(graph, Budget(keep_macs=1.0))
    return graph.cost(least).macs / max(graph.dense_cost.macs, 1)
