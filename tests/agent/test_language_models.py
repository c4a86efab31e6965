"""Searches of language models: by the divergence, resumed, and policies that move to others."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunegraph as pg
from prunegraph.agent.method import AgentSearch, AppliedPolicy
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.search import train_policy
from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import TestSplit
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.features import in_stream
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.context import Context
from prunegraph.methods.method import SUBSET_TOKENS
from prunegraph.methods.prior import MEAN, TOKEN_PRIORS
from prunegraph.methods.registry import make_method
from prunegraph.tasks.causal_lm import CausalLM
from support.language import TEXT, encode, tiny_llama

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

BUDGET = Budget(keep_params=0.7)
AGENT = AgentSearch(options=AgentOptions(update_size=4, surrogate_steps=2, swaps=4))
NETWORKS = 28


class Unread:
    """Test text that nobody may read."""

    def load(self, index: torch.Tensor, augment: Any = None) -> Any:
        msg = "a search has read test text"
        raise AssertionError(msg)

    def fingerprint(self) -> str:
        return "unread"


class Stop(BaseException):
    """Ends a search at once."""


def make(**sizes: Any) -> CausalLM:
    return pg.tasks.causal_lm(
        tiny_llama(**sizes),
        encode,
        calibration=[TEXT],
        test=TestSplit(Unread(), torch.arange(4)),
        window=16,
        calibration_tokens=256,
    )


@pytest.fixture(scope="module")
def task() -> CausalLM:
    return make()


@pytest.fixture(scope="module")
def graph(task: CausalLM) -> StructureGraph:
    return analyse(task.model, task.example_inputs)


@pytest.mark.parametrize("method", [AGENT, "cem", "random_search"], ids=["agent", "cem", "random"])
def test_a_search_goes_on_where_it_was_killed_and_reads_no_test_text(
    method: Any, task: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = make_method(method) if isinstance(method, str) else method
    plain, ran = Evaluator._measure, 0
    limit: float = math.inf

    def measured(self: Evaluator, mask: ChannelMask, subset: torch.Tensor | None) -> Any:
        nonlocal ran
        ran += 1
        if ran > limit:
            raise Stop
        return plain(self, mask, subset)

    def prune(**options: Any) -> pg.PruneResult:
        return pg.prune(task, chosen, BUDGET, networks=NETWORKS, **options)

    monkeypatch.setattr(Evaluator, "_measure", measured)
    wanted = prune()
    assert wanted.graph is not None
    assert wanted.graph.fits(wanted.mask, BUDGET)  # type: ignore[arg-type]
    least = NETWORKS - AGENT.options.update_size if chosen is AGENT else 1  # some draw masks twice
    assert least <= wanted.report["networks_evaluated"] <= NETWORKS
    whole, ran = ran, 0
    limit = 2 * whole // 3
    with pytest.raises(Stop):
        prune(checkpoint=tmp_path)
    ran, limit = 0, math.inf
    again = prune(checkpoint=tmp_path)
    assert ran <= whole - 2 * whole // 3 + 1
    assert again.mask == wanted.mask
    for ours, theirs in zip(again.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_masks_are_compared_by_the_divergence_on_few_tokens_after_a_fit_at_once(
    task: CausalLM, graph: StructureGraph
) -> None:
    context = Context(task=task, structure=graph)
    problem = context.problem(BUDGET, max_networks=NETWORKS)
    assert problem.subset_size == SUBSET_TOKENS // 16
    evaluator = problem.evaluator
    mask = problem.project(problem.priors()[0].scores)
    outcome = evaluator.evaluate(mask, evaluator.draw_subset(4, seed=0))
    assert outcome.kl is not None
    assert outcome.steady == -outcome.kl < 0.0
    assert isinstance(context.reconstruction, LayerwiseReconstruction)  # of the final network
    assert type(evaluator.reconstruction) is pg.Reconstruction
    plain = Context(task=task, structure=graph, reconstruct=False).problem(BUDGET).evaluator
    assert evaluator.evaluate(mask).kl < plain.evaluate(mask).kl  # type: ignore[operator]
    guarded = evaluator.prune(mask, context._at_once)
    free = evaluator.prune(mask)  # equal, where the guard has no objection
    for one, other in zip(guarded.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_search_by_divergence_judges_priors_as_it_judges_masks(
    task: CausalLM, graph: StructureGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Context(task=task, structure=graph).problem(BUDGET, max_networks=NETWORKS)
    plain, scored = Evaluator._measure, list[str]()

    def measured(self: Evaluator, mask: ChannelMask, subset: torch.Tensor | None) -> Any:
        assert self.search is not None
        scored.append(self.search.fingerprint())
        return plain(self, mask, subset)

    monkeypatch.setattr(Evaluator, "_measure", measured)
    result = AGENT.prune(problem)
    assert task.search is not None
    assert {*scored} == {task.search.fingerprint()}
    assert len(scored) <= result.networks <= NETWORKS


def test_priors_and_random_allocations_leave_the_hidden_width_whole(
    task: CausalLM, graph: StructureGraph
) -> None:
    problem = Context(task=task, structure=graph, reconstruct=False).problem(
        Budget(keep_params=0.8), max_networks=12
    )
    names = {prior.name for prior in problem.priors()}
    assert names == {*TOKEN_PRIORS, MEAN}
    stream = in_stream(graph) & graph.free
    assert stream.sum() == 16  # of the hidden width; heads with rotary angles are no stream
    drawn = make_method("random_search").prune(problem).channels
    assert drawn.keep[stream].all()
    assert not drawn.keep[graph.free].all()


def test_a_policy_decides_on_networks_of_another_depth_and_width(
    task: CausalLM, graph: StructureGraph
) -> None:
    context = Context(task=task, structure=graph)
    family = train_policy([context.problem(BUDGET, max_networks=NETWORKS)], AGENT.options)
    assert family.policy.record["data"]["task"] == "causal_lm"
    for sizes in ({"num_hidden_layers": 3}, {"hidden_size": 24, "intermediate_size": 40}):
        other = make(seed=1, **sizes)
        result = pg.prune(other, AppliedPolicy(family.policy), BUDGET)
        assert result.graph is not None
        assert result.graph.fits(result.mask, BUDGET)  # type: ignore[arg-type]
        assert np.isfinite(result.report["pruned"]["score"])
