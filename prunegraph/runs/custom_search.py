"""The agent's search for a network of any task: its owner says what is good."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.agent.options import AgentOptions
from prunegraph.agent.train import train_agent
from prunegraph.artefacts.pruned import WEIGHTS_SUFFIX
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.outcome import Outcome
from prunegraph.core.reading import checked
from prunegraph.core.tensors import parameter_digest
from prunegraph.env import ChannelPruningEnv, PruningTask, cell_name
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import (
    AttentionUnit,
    ExampleInputs,
    StructureGraph,
    analyse,
    copy_network,
    unwrap,
)
from prunegraph.graph.costs.latency_budget import TOLERANCE
from prunegraph.graph.pyg import to_pyg
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.room import most_samples
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.criteria.taylor import measure
from prunegraph.methods.prior import NUM_PRIORS, measure_divergence, rank_priors
from prunegraph.rewards import unpack_bits
from prunegraph.runs.adapt import NUM_SUIT_NETWORKS, Use, adapt, features_by_start, first_context
from prunegraph.runs.agent_options import agent_config, env_config
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.policies import find_policy
from prunegraph.runs.predicted_latency import layer_times
from prunegraph.runs.prune import PruneResult, structure_report, warn_if_unequal
from prunegraph.runs.report.speed import latencies
from prunegraph.tasks.batches import check_loader, num_samples
from prunegraph.tasks.custom import CustomTask, Loss, cross_entropy, custom

LAST = 2
"""Networks that are kept for the end of a search: the policy's own mask, the ledger's best. With
``reconstruct`` one more: the one that is returned, fitted layer by layer."""


def search(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    evaluate: Callable[[nn.Module], float],
    calibration_data: Iterable[Any],
    loss: Loss = cross_entropy,
    keep_macs: float | None = None,
    keep_params: float | None = None,
    max_memory: int | None = None,
    max_latency: float | None = None,
    round_to: int | None = None,
    attention: AttentionUnit = "head",
    networks: int = 400,
    num_batches: int = 8,
    reconstruct: bool = True,
    policy: Path | str | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> PruneResult:
    """Search with the agent for the best mask of a network, whatever its task.

    Args:
        model: the trained network, on the device where it runs; it is left as it is.
        example_inputs: what its forward takes.
        evaluate: how good a network is, higher = better, on the scale of an accuracy in [0, 1]
            (mAP, IoU, R^2, ...). Measure it on data that neither training nor the final report
            sees. It is given pruned networks in eval mode, and may not change them.
        calibration_data: batches of shuffled training data, as the loss takes them.
        loss: of a network on a batch, the mean over its samples: what importances are measured by,
            and the forward that batch norm is recalibrated with. Default: ``cross_entropy`` of
            (images, class numbers).
        keep_macs: at most this share of the multiply-adds remains.
        keep_params: at most this share of the parameters remains.
        max_memory: at most this many bytes of activations alive at once, on ``example_inputs``.
        max_latency: at most this many milliseconds a forward of ``example_inputs``, by a prediction
            of layer times, which are measured here first; the report says what it takes.
        round_to: keep a multiple of this many channels in every group.
        attention: what can leave it: "head", a whole one, or "width", a part of all of them.
        networks: pruned networks that are evaluated, at the most: updates of 16 begin while they
            fit, and a mask that comes again is not run again.
        num_batches: how many batches are taken.
        reconstruct: the kept weights take over what the removed channels gave, by least squares
            on these batches (``Reconstruction``); those of the final network layer by layer
            (``LayerwiseReconstruction``), if ``evaluate`` gives it more then.
        policy: search on from a trained one; see ``prune``.
        seed: of the search.
        checkpoint: ``.safetensors`` file, with a JSON beside it (two with ``max_latency``), from
            which an interrupted search goes on. Of another network, budget, seed, policy or other
            batches it is refused (a loader that shuffles needs a seeded ``generator``); what
            ``evaluate`` and ``loss`` measure it cannot tell: give a changed one another file.
        progress: called after each update with its record: ``networks``, ``accuracy`` (the mean
            score), ``best_accuracy``, ...

    Returns:
        The pruned, recalibrated network - fine-tune it next - and its report.

    Raises:
        PruneGraphError: the network cannot be analysed, the budget cannot be met, there is no
            data, or a score is not a number.
    """
    budget = Budget(
        keep_macs=keep_macs,
        keep_params=keep_params,
        max_memory=max_memory,
        max_latency=max_latency,
        round_to=round_to,
    )
    initial = None if policy is None else find_policy(Path(policy))
    if checkpoint is not None and Path(checkpoint).suffix != WEIGHTS_SUFFIX:
        msg = f"checkpoint={checkpoint} must end in {WEIGHTS_SUFFIX}: the scores go beside it"
        raise ConfigError(msg)
    config = agent_config(
        SearchOptions(agent=AgentOptions(metric="accuracy")), seed, initial, (budget,)
    )
    config = replace(config, max_memory=max_memory, max_latency=max_latency)
    names = config.network.feature_names
    last = LAST + reconstruct
    least = (
        config.episodes_per_update
        + 1
        + last
        + NUM_PRIORS
        + (initial is not None) * NUM_SUIT_NETWORKS
    )
    if networks < least:
        msg = f"networks={networks} allows no update of the policy: give at least {least}"
        raise ConfigError(msg)
    graph = analyse(model, example_inputs, attention=attention)
    dense = copy_network(unwrap(model)).eval()
    check_loader(calibration_data, "calibration_data")
    taken = list(itertools.islice(calibration_data, num_batches))
    task = custom(
        dense, example_inputs, train=taken, score=evaluate, higher_is_better=True, loss=loss
    )
    graph = _predicting(dense, graph, budget, example_inputs, checkpoint)
    identity = {
        "network": parameter_digest(dense),
        "budget": budget.as_dict(),
        "seed": seed,
        "attention": attention,
        "policy": None if initial is None else parameter_digest(initial.network),
        "calibration_data": task.train.fingerprint(),
        "reconstruct": reconstruct,
    }
    dense_score = task.dense_score.value
    statistics = dict(measure(task, graph))
    evaluator = Evaluator(
        task,
        graph,
        reconstruction=Reconstruction.on_samples(task, graph, task.train) if reconstruct else None,
        log=None if checkpoint is None else _log(Path(checkpoint), identity),
    )
    divergence = partial(measure_divergence, evaluator)
    ranks = rank_priors(divergence, graph, statistics, budget)
    starting = features_by_start(graph, statistics, budget, names, ranks)
    features = next(iter(starting.values()))
    if initial is not None:
        use = Use(
            graph=graph,
            budget=budget,
            features=starting,
            project=partial(graph.project, budget=budget),
            divergence=divergence,
        )
        adapted = adapt(initial, [use])
        initial, features = adapted.policy, starting[adapted.starts[0]]
    play = PruningTask(
        name="network", graph=graph, node_features=features, evaluator=evaluator, budget=budget
    )
    environment = replace(env_config(SearchOptions(), config, seed), subset_size=None)

    result = train_agent(
        [partial(ChannelPruningEnv, play, environment)],
        [graph],
        config,
        total_networks=networks - last,
        initial=initial,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        memory=_Memory(evaluator),
        progress=progress,
    )
    scores = result.policy.logits(to_pyg(graph), features, first_context(budget))
    masks = [graph.project(scores + result.offsets[0], budget)]
    best = result.competition.ledger(cell_name(play.name, budget)).best_bits
    if best:  # found before an interruption, perhaps
        masks.append(graph.mask(unpack_bits(best, graph.num_units)))
    chosen = max(masks, key=lambda mask: evaluator.evaluate(mask).accuracy)
    warn_if_unequal(dense, graph, chosen, example_inputs)
    network = evaluator.nearest(chosen, *(_in_turn(task, graph) if reconstruct else []))
    report = structure_report(graph, chosen, budget)
    report["dense"]["score"] = dense_score
    report["pruned"]["score"] = task.score(network).value
    report["networks_evaluated"] = len(evaluator.known()) + reconstruct
    if max_latency is not None:
        report["latency_ms"] = times = latencies(dense, graph, chosen, example_inputs)
        if times["pruned"] > TOLERANCE * max_latency:
            warnings.warn(
                f"the pruned network takes {times['pruned']:.3g} ms on {times['on']}, "
                f"{max_latency:g} were asked for: the prediction was too low, or the "
                "machine does more now; ask for less",
                stacklevel=2,
            )
    return PruneResult(model=network, mask=chosen, graph=graph, report=report)


@dataclass(frozen=True, eq=False)
class _Memory:
    """Outcomes whose masks are not run again."""

    evaluator: Evaluator

    def state(self) -> list[dict[str, Any]]:
        """Return them as JSON values."""
        return [asdict(found) for found in self.evaluator.known()]

    def restore(self, state: Any) -> None:
        """Know them again."""
        self.evaluator.remember(checked(state, list[Outcome], "its memory"))


def _log(checkpoint: Path, identity: Mapping[str, Any]) -> OutcomeLog:
    """Return what an earlier start has measured, beside the agent's checkpoint.

    Raises:
        ArtefactError: it is damaged, of another search, or lost.
    """
    path = checkpoint.with_suffix(".json")
    if checkpoint.is_file() and not path.is_file():
        msg = f"{checkpoint} has lost {path.name}, which names its search: give another one"
        raise ArtefactError(msg)
    log = OutcomeLog(path, identity)
    log.write()  # before the agent's, which does not name the search
    return log


def _predicting(
    dense: nn.Module,
    graph: StructureGraph,
    budget: Budget,
    example_inputs: ExampleInputs,
    checkpoint: Path | str | None,
) -> StructureGraph:
    """Return the structure with a prediction of its latency, if that is limited.

    It is the same one after an interruption.
    """
    if budget.max_latency is None:
        return graph
    path = None if checkpoint is None else Path(checkpoint).with_suffix(".latency.json")
    name = type(dense).__name__
    table = layer_times(dense, graph, budget, example_inputs, path=path, name=name)
    return replace(graph, latency_model=table)


def _in_turn(task: CustomTask, graph: StructureGraph) -> list[Callable[[], Reconstruction]]:
    """Return what fits layer by layer: on as many samples as memory allows, on the first batch.

    Its owner's score decides whether it is taken, so all batches may be fitted on.
    """
    last = task.train.take(torch.tensor([len(task.train) - 1]))
    most = most_samples(graph, num_samples(task.example_inputs))

    def fit(size: int) -> Reconstruction:
        samples = task.train.sample(size, 0)
        return LayerwiseReconstruction.on_samples(task, graph, samples, held_out=last)

    return [partial(fit, most), partial(fit, 1)]
