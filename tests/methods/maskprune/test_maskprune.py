"""MaskPrune: gates that are a pruning, an exact budget, one shape, the same after a kill."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError, PruneGraphError
from prunegraph.graph import StructureGraph, copy_network
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.rounding import restrict
from prunegraph.layerwise.solve import Hessian, remove_columns
from prunegraph.methods.context import Context, make_problem
from prunegraph.methods.maskprune.gates import Gates, Shares, gated_units
from prunegraph.methods.maskprune.method import MaskPrune, _Training
from prunegraph.methods.maskprune.refit import Refit
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.registry import make_method
from prunegraph.models import resized_network
from prunegraph.tasks.causal_lm import CausalLM
from prunegraph.training.loop import FinetuneConfig, finetune
from support.language import encode, tiny_llama
from support.networks import Mixed

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

UNIFORM = pg.Budget(keep_params=0.85, uniform=True)
SHORT = MaskPrune(steps=40, batch_size=4)


@pytest.fixture(scope="module")
def task() -> CausalLM:
    """Return a Llama that has learned something, so that its outputs tell units apart."""
    words = "".join(f"{n % 10} and {n % 7} make {n % 10 + n % 7}. " for n in range(300))
    task = pg.tasks.causal_lm(tiny_llama(), encode, calibration=[words], window=32)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.01)
    for number in range(3):
        for batch in task.batches(task.train, 16, seed=number):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
    task.model.zero_grad()
    return replace(task, model=task.model.eval())


@pytest.fixture(scope="module")
def graph(task: CausalLM) -> StructureGraph:
    return pg.analyse(task.model, task.example_inputs)


def problem_of(
    task: CausalLM, graph: StructureGraph, budget: pg.Budget = UNIFORM, **given: Any
) -> Problem:
    problem = make_problem(task, graph, budget, reconstruct=False, num_calibration=64)
    return replace(problem, **given)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


IDS = torch.arange(64).reshape(2, 32)


def test_gates_of_one_change_nothing_and_gates_of_zero_are_the_pruned_network(
    task: CausalLM, graph: StructureGraph
) -> None:
    model = copy_network(task.model)
    gates = Gates(model, graph)
    assert torch.equal(logits(model, IDS), logits(task.model, IDS))
    assert len(gates.units) == 2 * (32 + 2)  # neurons and groups of heads, not the hidden width
    keep = np.ones(graph.num_units, dtype=bool)
    keep[gates.units[[3, 5, 40]]] = False
    with torch.no_grad():
        gates.values[~torch.from_numpy(keep[gates.units])] = 0.0
    expected = apply_mask(task.model, graph, graph.mask(keep))
    assert torch.allclose(logits(model, IDS), logits(expected, IDS), atol=1e-5)
    names = {name for name, _ in task.model.named_parameters()}
    gates.fold()
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.allclose(logits(model, IDS), logits(expected, IDS), atol=1e-5)


def test_what_something_else_reads_too_has_no_gates(
    mixed: Mixed, task: CausalLM, graph: StructureGraph
) -> None:
    convolutions = pg.analyse(mixed, torch.randn(1, 3, 8, 8))
    for network, found in ((mixed, convolutions), (task.model, graph)):
        groups = {*found.group_of[gated_units(network, found)].tolist()}
        assert groups
        assert groups < {*found.free_groups.tolist()}
    model = copy_network(mixed.eval())
    gates = Gates(model, convolutions)
    keep = np.ones(convolutions.num_units, dtype=bool)
    for group in {*convolutions.group_of[gates.units].tolist()}:
        keep[convolutions.groups[group].units[1::2]] = False
    with torch.no_grad():
        gates.values[~torch.from_numpy(keep[gates.units])] = 0.0
        images = torch.randn(2, 3, 8, 8)
        slim = apply_mask(mixed, convolutions, convolutions.mask(keep))
        assert torch.allclose(model(images), slim(images), atol=1e-4)


def test_weights_that_stay_take_over_what_closed_gates_did(
    task: CausalLM, graph: StructureGraph
) -> None:
    model = copy_network(task.model)
    gates = Gates(model, graph)
    batches = list(task.train.batches(8))
    refit = Refit(copy_network(task.model), gates.weights, batches, task.forward)
    name = "model.layers.1.mlp.down_proj.weight"
    read: list[Tensor] = []
    layer = task.model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            task.forward(task.model, batch)
        gates.values[::3] = 0.5
    handle.remove()
    rows, places = torch.cat(read), torch.from_numpy(gates.places[name])
    hessian = Hessian(rows.T @ rows / len(rows))
    weight = task.model.get_parameter(name).detach()
    alone = weight.square().sum(0) / hessian.inverse.diagonal()
    errors = refit.errors(gates)[gates.places[name]]
    assert errors.min() == pytest.approx(float(alone.min()), rel=1e-3)  # the first that would go
    assert errors.argmin() == int(alone.argmin())
    keep = torch.ones_like(gates.values)
    keep[1::4] = 0.0
    before = weight * torch.where(keep > 0.0, gates.values.detach(), 1.0)[places]
    refit.close(gates, keep)
    gone = torch.nonzero(keep[places] == 0.0).flatten()
    expected = remove_columns(before.double(), gone, hessian)
    assert torch.allclose(gates.weights[name].detach().double(), expected, atol=1e-3)
    assert not torch.allclose(expected.float(), before * keep[places], atol=1e-2)
    assert torch.equal(gates.values.detach(), keep)


def test_slopes_of_the_cost_are_those_of_its_differences(
    task: CausalLM, graph: StructureGraph
) -> None:
    units = gated_units(task.model, graph)
    limits = graph.limits(UNIFORM)[:2]
    shares = Shares(graph, units, limits, np.array([False, True]))
    start = np.array([0.7, 0.6])
    value, slopes = shares.gap(start, 1.0)
    for kind in range(2):
        step = np.eye(2)[kind] * 1e-6
        assert (shares.gap(start + step, 1.0)[0] - value) / 1e-6 == pytest.approx(slopes[kind])
    assert shares.gap(np.ones(2), 0.0)[0] == pytest.approx(0.0)
    assert shares.gap(shares.least, 0.0)[0] == pytest.approx(-1.0)
    assert shares.gap(shares.even(1.0), 1.0)[0] == pytest.approx(0.0, abs=1e-6)


def pruned(task: CausalLM, graph: StructureGraph, method: MaskPrune, **given: Any) -> Result:
    return method.prune(problem_of(task, graph, **given))


def test_the_budget_is_met_with_one_shape_that_a_config_holds(
    task: CausalLM, graph: StructureGraph
) -> None:
    result = pruned(task, graph, SHORT)
    mask = result.channels
    widths = graph.group_widths(mask)
    assert graph.fits(mask, UNIFORM)
    assert widths["model.layers.0.mlp.gate_proj"] == widths["model.layers.1.mlp.gate_proj"] < 32
    assert mask == graph.project(mask.keep.astype(np.float32), UNIFORM)  # nothing more fits
    assert result.model is not None
    resized = resized_network(result.model, {"input_ids": IDS})
    assert torch.equal(logits(resized, IDS), logits(result.model, IDS))
    assert not torch.equal(
        logits(result.model, IDS), logits(apply_mask(task.model, graph, mask), IDS)
    )
    assert len(result.details["losses"]) == 40


def test_without_uniform_layers_may_differ(task: CausalLM, graph: StructureGraph) -> None:
    budget = pg.Budget(keep_params=0.85)
    result = pruned(task, graph, replace(SHORT, refit=False), budget=budget)
    widths = graph.group_widths(result.channels)
    assert graph.fits(result.channels, budget)
    assert widths["model.layers.0.mlp.gate_proj"] != widths["model.layers.1.mlp.gate_proj"]


def divergence(task: CausalLM, model: nn.Module | None) -> float:
    assert model is not None
    batch = next(iter(task.search.batches(16)))
    with torch.no_grad():
        return float(task.divergence(task.forward(model, batch), task.forward(task.model, batch)))


@pytest.mark.parametrize("minimax", [True, False])
def test_weights_that_learn_with_their_gates_are_nearer_to_the_dense_network(
    task: CausalLM, graph: StructureGraph, minimax: bool
) -> None:
    given = replace(SHORT, minimax=minimax, lr=1e-4, steps=80, refit=False)
    learned, alone = (
        divergence(task, pruned(task, graph, replace(given, lr=lr)).model) for lr in (given.lr, 0.0)
    )
    refitted = divergence(task, pruned(task, graph, replace(given, lr=0.0, refit=True)).model)
    cut = apply_mask(task.model, graph, graph.project(np.zeros(graph.num_units), UNIFORM))
    assert learned < alone < divergence(task, cut)
    assert refitted < alone


def test_minimax_closes_the_gates_beyond_the_target(task: CausalLM, graph: StructureGraph) -> None:
    training = _Training(replace(SHORT, steps=150), problem_of(task, graph))
    result = training.run()
    above, _ = training.shares.gap(np.array(training.state.shares), 1.0)
    assert abs(above) < 0.1
    assert result.details["beyond"] < 0.05
    assert min(training.state.layers) >= 0.0
    assert max(training.state.layers) > 0.0


ADMM = 14.8
"""Perplexity of StruPrune at these widths (docs/results.md)."""


class Killed(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("step", [4, 9, 37])
def test_a_killed_pruning_goes_on_to_the_same_result(
    task: CausalLM, graph: StructureGraph, tmp_path: Path, step: int
) -> None:
    whole = pruned(task, graph, SHORT)

    def kill(percent: int, _: str) -> None:
        if percent >= 100 * step // 40:
            raise Killed

    with pytest.raises(Killed):
        pruned(task, graph, SHORT, folder=tmp_path, progress=kill)
    told: list[int] = []
    again = pruned(
        task, graph, SHORT, folder=tmp_path, progress=lambda percent, _: told.append(percent)
    )
    assert len(told) < 40
    assert again.mask == whole.mask
    assert again.details == whole.details
    assert again.model is not None
    assert whole.model is not None
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_short_calibration_warns_with_the_number_needed(task: CausalLM) -> None:
    few = replace(task, model=tiny_llama(intermediate_size=48))
    graph = pg.analyse(few.model, few.example_inputs)
    with pytest.warns(UserWarning, match=r"32 tokens, fewer than the 48 .* give 768 or more"):
        result = MaskPrune(steps=10).prune(problem_of(few, graph, num_calibration=1))
    assert graph.fits(result.channels, UNIFORM)


def test_a_checkpoint_of_another_pruning_or_a_damaged_one_is_refused(
    task: CausalLM, graph: StructureGraph, tmp_path: Path
) -> None:
    short = MaskPrune(steps=10, batch_size=2)
    pruned(task, graph, short, folder=tmp_path)
    with pytest.raises(ArtefactError, match=r"of another pruning .different lr.: delete it"):
        pruned(task, graph, replace(short, lr=0.01), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"own.gates"', b'"own.gatez"'))
    with pytest.raises(ArtefactError, match="is damaged: delete it"):
        pruned(task, graph, short, folder=tmp_path)
    file.write_bytes(content[:-8])
    with pytest.raises(ArtefactError, match="truncated"):
        pruned(task, graph, short, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 3}, "steps=3 must"), ({"batch_size": 0}, "batch_size=0"), ({"lr": -1.0}, "lr=-1")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MaskPrune(**options)


def test_weights_of_16_bits_keep_their_type(task: CausalLM, graph: StructureGraph) -> None:
    half = replace(task, model=copy_network(task.model).to(torch.bfloat16))
    model = MaskPrune(steps=10).prune(problem_of(half, graph)).model
    assert model is not None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model, IDS).isfinite().all())


def test_parameters_that_do_not_learn_do_not_learn_afterwards(
    task: CausalLM, graph: StructureGraph
) -> None:
    model = copy_network(task.model)
    model.get_input_embeddings().requires_grad_(False)
    result = SHORT.prune(problem_of(replace(task, model=model), graph))
    assert result.model is not None
    learn = {name: item.requires_grad for name, item in model.named_parameters()}
    assert {n: item.requires_grad for n, item in result.model.named_parameters()} == learn
    assert not all(learn.values())


def test_a_divergence_without_end_is_told(task: CausalLM, graph: StructureGraph) -> None:
    broken = replace(task, model=copy_network(task.model))
    with torch.no_grad():
        broken.model.get_parameter("model.norm.weight")[0] = torch.nan
    with pytest.raises(PruneGraphError, match="dense network is nan in step 1: lower lr, now"):
        MaskPrune(refit=False).prune(problem_of(broken, graph))


def test_what_gates_cannot_reach_is_refused_before_any_work(
    task: CausalLM, graph: StructureGraph
) -> None:
    with pytest.raises(BudgetError, match="maskprune has no gates for them") as told:
        MaskPrune().check(problem_of(task, graph, pg.Budget(keep_params=0.3)))
    least = float(str(told.value).split()[-3])  # give 0.5 or more
    MaskPrune().check(problem_of(task, graph, pg.Budget(keep_params=least)))
    with pytest.raises(
        BudgetError, match="needs keep_macs or keep_params, the budget is max_memory="
    ):
        MaskPrune().check(problem_of(task, graph, pg.Budget(max_memory=10_000)))
    with pytest.raises(BudgetError, match="zeroes single weights"):
        MaskPrune().check(problem_of(task, graph, pg.Budget(sparsity=0.5)))


@pytest.mark.data
def test_stories_masks_that_train_beat_those_that_do_not_but_no_training_after_obs(
    shared_dir: Path,
) -> None:
    where = shared_dir / "pack" / "models" / "stories260k"
    rows = np.load(where / "stories-257.npy").astype(np.int64)
    task = pg.tasks.causal_lm(
        where, calibration=rows[:64], search=rows[64:151], calibration_tokens=None
    )
    graph = pg.analyse(task.model, task.example_inputs)
    heads = {i: "stays" for i, group in enumerate(graph.groups) if "mlp" not in group.name}
    neurons = restrict(graph, heads, {})
    problem = problem_of(task, neurons, pg.Budget(keep_params=0.6604, uniform=True))
    both, masks = (
        task.score(MaskPrune(batch_size=2, **given).prune(problem).model or task.model).value
        for given in ({}, {"lr": 0.0})
    )
    wanda, obs = (
        make_method(f"{name}/uniform").prune(problem).channels for name in ("wanda", "obs")
    )
    assert both < ADMM < masks < task.score(apply_mask(task.model, neurons, wanda)).value
    context = Context(task=task, structure=neurons, num_calibration=64)
    assert context.reconstruction is not None
    model = apply_mask(task.model, neurons, obs)
    context.reconstruction.apply(model, obs)
    recipe = FinetuneConfig(
        epochs=6,
        batch_size=2,
        peak_lr=3e-3,
        warmup_epochs=0.6,
        optimizer="adamw",
        distill_weight=1.0,
    )
    own = replace(task, train=problem.calibration)
    finetune(model.requires_grad_(), own, recipe, seed=0, teacher=task.model)
    assert task.score(model).value < both  # the training, not the mask, makes the difference
