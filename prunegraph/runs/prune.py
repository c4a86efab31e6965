"""Pruning in one call, for a network and a data loader at hand."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, DataError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import AttentionUnit, ExampleInputs, StructureGraph, analyse, evaluation_mode
from prunegraph.graph.apply import unequal
from prunegraph.graph.costs.latency import measure_latency_table
from prunegraph.graph.costs.latency_budget import project_budget
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.sequential import LayerwiseReconstruction, most_samples
from prunegraph.methods.criteria.taylor import measure, measure_divergence, sensitivity
from prunegraph.methods.prior import rank_priors
from prunegraph.runs.adapt import Use, adapt, features_by_start, num_decision_networks
from prunegraph.runs.policies import find_policy
from prunegraph.runs.report.speed import latencies
from prunegraph.tasks.batches import num_samples
from prunegraph.tasks.classification import model_device, place_images

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult:
    """What ``prune`` returns.

    Attributes:
        model: the pruned, recalibrated network; fine-tune it next.
        mask: which prunable units were kept.
        graph: the structure of the dense network.
        report: costs before and after, widths, and what was measured, as JSON values.
    """

    model: nn.Module
    mask: ChannelMask
    graph: StructureGraph
    report: Mapping[str, Any]


class LoadedImages:
    """Images and labels in memory, as an ``ImageSource``.

    Args:
        images: ``[n, c, h, w]`` as the network takes them.
        labels: ``[n]`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        channels, height, width = images.shape[1:]
        self.image_shape = (channels, height, width)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Return the images at ``index``; there is no augmentation to draw."""
        del augment
        return self.images[index]

    def fingerprint(self) -> str:
        """Return a hash of images and labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    policy: Path | str,
    calibration_data: Iterable[Batch],
    keep_macs: float | None = None,
    keep_params: float | None = None,
    max_memory: int | None = None,
    max_latency: float | None = None,
    round_to: int | None = None,
    attention: AttentionUnit = "head",
    num_images: int = 1024,
    reconstruct: bool = True,
    seed: int = 0,
) -> PruneResult:
    """Prune a network with a trained policy: no search, no training.

    Args:
        model: the trained network; it is left as it is.
        example_inputs: what its forward takes.
        policy: resnet-cifar, which comes with the package; run folder of ``prunegraph train``, or a
            policy file.
        calibration_data: batches of training images ``[b, c, h, w]``, or of (images, labels
            ``[b]``), normalised and shuffled; without labels the network's own answers are used.
        keep_macs: at most this share of the multiply-adds remains.
        keep_params: at most this share of the parameters remains.
        max_memory: at most this many bytes of activations alive at once, on ``example_inputs``.
        max_latency: at most this many milliseconds a forward of ``example_inputs``, measured here.
        round_to: keep a multiple of this many channels in every group.
        attention: what can leave it: "head", a whole one, or "width", a part of all of them.
        num_images: how many images calibrate; masks are compared on as many further ones. Where
            there are fewer, some that calibrate fill up.
        reconstruct: the kept weights take over what the removed channels gave, by least squares
            on the calibration data (``Reconstruction``); those of the final network layer by layer
            (``LayerwiseReconstruction``), if its outputs are nearer to the dense network's then.
        seed: fixes what is drawn from them.

    Returns:
        The pruned network, in eval mode, and its report.

    Raises:
        PruneGraphError: the network cannot be analysed or is no classifier, the budget cannot be
            met, the policy cannot be read, or images and labels do not fit.
    """
    budget = Budget(
        keep_macs=keep_macs,
        keep_params=keep_params,
        max_memory=max_memory,
        max_latency=max_latency,
        round_to=round_to,
    )
    if num_images < 1:
        msg = f"num_images={num_images} must be at least 1"
        raise ConfigError(msg)
    trained = find_policy(Path(policy))
    graph = analyse(model, example_inputs, attention=attention)
    channels = example_inputs.shape[1] if isinstance(example_inputs, Tensor) else None
    source = _gather(model, calibration_data, 2 * num_images, channels)
    index = torch.arange(len(source.labels))
    train = TrainSplit(source, index[:num_images])
    search = SearchSplit(source, index[-num_images:])
    device = model_device(model)
    if device.type == "cpu" and any(item.dtype == torch.float16 for item in model.parameters()):
        msg = "the network's weights are float16, which a CPU does not train: give model.float()"
        raise ModelError(msg)
    evaluator = Evaluator(
        model,
        graph,
        search=search,
        calibration=train,
        num_calibration=num_images,
        seed=seed,
        device=device,
        kl=True,
        reconstruction=Reconstruction.on_images(model, graph, train, seed=seed, device=device)
        if reconstruct
        else None,
    )
    statistics = dict(measure(model, graph, train, seed=seed, device=device))
    names = trained.network.config.feature_names
    if "sensitivity" in names:
        statistics["sensitivity"] = sensitivity(evaluator, graph, statistics["taylor"], by="kl")
    divergence = partial(measure_divergence, evaluator)
    starts = rank_priors(divergence, graph, statistics, budget) if "start" in names else ()
    timed = budget.max_latency is not None
    table = measure_latency_table(model, graph, example_inputs, budget=budget) if timed else None
    use = Use(
        graph=graph,
        budget=budget,
        features=features_by_start(graph, statistics, budget, names, starts),
        project=lambda scores: project_budget(model, graph, scores, budget, example_inputs, table),
        divergence=divergence,
    )
    adapted = adapt(trained, [use])
    mask = adapted.masks[0]
    warn_if_unequal(model, graph, mask, example_inputs)
    report = {
        **structure_report(graph, mask, budget),
        "networks_evaluated": num_decision_networks(trained, graph),
        "start": adapted.starts[0],
        "share": adapted.share,
        "calibration_images": len(train),
    }
    if timed:
        report["latency_ms"] = latencies(model, graph, mask, example_inputs)
    if reconstruct:
        batch = train.sample(most_samples(graph, num_samples(example_inputs)), seed)
        again = LayerwiseReconstruction.on_images(model, graph, batch, seed=seed, device=device)
        small = evaluator.nearest(mask, again)
    else:
        small = evaluator.prune(mask)
    return PruneResult(model=small.eval(), mask=mask, graph=graph, report=report)


def warn_if_unequal(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example_inputs: ExampleInputs
) -> None:
    """Warn if the pruned network computes something else than the zero-masked one."""
    problem = unequal(model, graph, mask, example_inputs)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def structure_report(graph: StructureGraph, mask: ChannelMask, budget: Budget) -> dict[str, Any]:
    """Return budget, costs and widths before and after, as JSON values."""
    cost, dense = graph.cost(mask), graph.dense_cost
    return {
        "budget": budget.as_dict(),
        "dense": {
            "macs": dense.macs,
            "params": dense.params,
            "peak_memory": graph.peak_memory(graph.dense_mask()),
        },
        "pruned": {
            "macs": cost.macs,
            "params": cost.params,
            "peak_memory": graph.peak_memory(mask),
            "widths": graph.group_widths(mask),
            "mask_digest": mask.digest(),
        },
    }


@torch.no_grad()
def _gather(
    model: nn.Module, batches: Iterable[Batch], num_images: int, channels: int | None
) -> LoadedImages:
    """Return the first images of a loader, labelled by the network itself where it has none."""
    check_loader(batches)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in batches:
        found = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if not all(isinstance(part, Tensor) for part in found[:2]):
            msg = (
                f"calibration_data holds batches of {type(batch).__name__}, not images or (images, "
                "labels): wrap the loader"
            )
            raise DataError(msg)
        if len(found) > 1 and (found[1].is_floating_point() or found[1].dim() != 1):
            msg = (
                f"calibration_data holds labels of {found[1].dtype} and shape "
                f"{list(found[1].shape)}, not class numbers [b]: leave the labels out"
            )
            raise DataError(msg)
        if found[0].dim() != 4 or found[0].shape[1] != (channels or found[0].shape[1]):
            msg = (
                f"calibration_data holds batches of shape {list(found[0].shape)}, not images "
                f"[b, {channels or 'c'}, h, w]: give them as the network takes them"
            )
            raise DataError(msg)
        if images and found[0].shape[1:] != images[0].shape[1:]:
            msg = (
                f"calibration_data holds images of {list(images[0].shape[1:])} and "
                f"{list(found[0].shape[1:])}: resize or crop them to one size"
            )
            raise DataError(msg)
        if len(found) > 1 and len(found[1]) != len(found[0]):
            msg = f"calibration_data holds {len(found[1])} labels for {len(found[0])} images"
            raise DataError(msg)
        images.append(found[0].cpu())
        labels.append(found[1].cpu().long() if len(found) > 1 else _answers(model, found[0]))
        count += len(found[0])
        if count >= num_images:
            break
    if not count:
        msg = "calibration_data holds no images: give a loader of training images"
        raise DataError(msg)
    source = LoadedImages(torch.cat(images)[:num_images], torch.cat(labels)[:num_images])
    num_classes = _logits(model, source.images[:1]).shape[1]
    least, most = (int(label) for label in source.labels.aminmax())
    if not 0 <= least <= most < num_classes:
        msg = (
            f"calibration_data holds labels from {least} to {most}, and the network tells classes "
            f"0 to {num_classes - 1} apart: number them as it does"
        )
        raise DataError(msg)
    return source


def check_loader(data: object) -> None:
    """Raise DataError for what yields no batches: a data set yields one sample at a time."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        msg = (
            f"calibration_data is a data set ({type(data).__name__}), which gives one sample at a "
            "time: give torch.utils.data.DataLoader(it, batch_size=128, shuffle=True)"
        )
        raise DataError(msg)
    if not isinstance(data, Iterable):
        msg = f"calibration_data is a {type(data).__name__}: give a loader of training images"
        raise DataError(msg)


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    return _logits(model, images).argmax(1).cpu()


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with evaluation_mode(model):
        logits: object = model(place_images(images, model))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = (
            f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        )
        msg = (
            f"the network returns {found}, not logits [images, classes]: wrap it, or use "
            "prunegraph.search, which takes any loss"
        )
        raise ModelError(msg)
    return logits
