"""StruPrune: neurons and heads are cut a module at a time."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError, ModelError
from prunegraph.core.masks import IntArray
from prunegraph.core.precision import as_elsewhere
from prunegraph.core.splits import TrainSplit
from prunegraph.data import load_dataset
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import zero_mask
from prunegraph.graph.rounding import restrict
from prunegraph.layerwise.admm import Rows
from prunegraph.methods.context import make_problem
from prunegraph.methods.method import Problem
from prunegraph.methods.struprune import fit
from prunegraph.methods.struprune.method import MOST_REMOVED, StruPrune, _scores
from prunegraph.methods.struprune.modules import Module, find_modules
from prunegraph.tasks.causal_lm import CausalLM, causal_lm
from support.language import TEXT, encode, tiny_llama
from support.tasks import image_task

BARS = [(0.533, 18.5, 15.6), (0.267, 7.8, 7.2)]
"""Share of the neurons, perplexities of least squares and of ADMM, and a little more."""


def task_of(model: nn.Module, windows: int = 40) -> CausalLM:
    tokens = torch.tensor(encode(TEXT * 2))[: windows * 32].view(windows, 32)
    return causal_lm(model, encode, calibration=tokens, calibration_tokens=None)


@pytest.fixture(scope="module")
def llama() -> CausalLM:
    return task_of(tiny_llama(hidden_size=32, intermediate_size=64, num_hidden_layers=3))


@pytest.fixture(scope="module")
def graph(llama: CausalLM) -> StructureGraph:
    return analyse(llama.model, llama.example_inputs)


def problem_of(task: CausalLM, graph: StructureGraph, keep: float = 0.8, **given: Any) -> Problem:
    budget = Budget(keep_params=keep)
    return replace(make_problem(task, graph, budget, reconstruct=False), **given)


@pytest.mark.parametrize("heads", [False, True])
def test_rounds_do_not_raise_the_error_on_held_out_data(
    llama: CausalLM, graph: StructureGraph, heads: bool
) -> None:
    problem = problem_of(llama, graph)
    one_shot = StruPrune(rounds=0, heads=heads).prune(problem).details["errors"]
    result = StruPrune(rounds=4, heads=heads).prune(problem)
    first = next(name for name in one_shot if "down" in name)
    assert result.details["errors"][first] < one_shot[first]
    assert result.details["rounds"][first] > 0
    assert len(one_shot) == 6 if heads else 3


def test_what_is_cut_computes_what_is_silent(llama: CausalLM, graph: StructureGraph) -> None:
    problem = problem_of(llama, graph, keep=0.7)
    result = StruPrune(heads=True, rounds=1).prune(problem)
    cost = graph.cost(result.channels)
    assert result.model is not None
    assert cost.params == sum(item.numel() for item in result.model.parameters())
    assert cost.params <= 0.7 * graph.dense_cost.params
    heads = [
        len(np.unique(module.units)) - int(result.channels.keep[np.unique(module.units)].sum())
        for module in find_modules(graph, llama.model, heads=True)
        if not module.writers
    ]
    assert sum(heads) > 0
    ids = {"input_ids": torch.randint(256, (2, 32))}
    silent = zero_mask(llama.model, graph, result.channels)
    with torch.no_grad():
        assert not torch.allclose(result.model(**ids).logits, silent(**ids).logits, atol=1e-3)


def test_widths_are_uniform_or_follow_a_softmax(llama: CausalLM, graph: StructureGraph) -> None:
    modules = find_modules(graph, llama.model, heads=False)

    def removed(weights: dict[str, float], keep: float = 0.9) -> list[int]:
        mask = graph.project(_scores(graph, modules, weights), Budget(keep_params=keep))
        return [int((~mask.keep[module.units]).sum()) for module in modules]

    names = [module.reader for module in modules]
    even = removed({})
    assert max(even) - min(even) <= 1
    uneven = removed(dict(zip(names, (1.0, 2.0, 4.0), strict=True)))
    assert sum(uneven) == sum(even)
    assert uneven[1] == pytest.approx(2 * uneven[0], abs=2)
    assert uneven[2] == pytest.approx(4 * uneven[0], abs=3)
    most = removed(dict(zip(names, (1.0, 1.0, 100.0), strict=True)), keep=0.7)
    assert most[2] == int(MOST_REMOVED * 64)


def test_allocations_are_measured_on_held_out_data(llama: CausalLM, graph: StructureGraph) -> None:
    problem = problem_of(llama, graph)
    auto = StruPrune(allocation="auto", rounds=0).prune(problem)
    tried = auto.details["tried"]
    assert tried.keys() == {"uniform", "softmax, T=2", "softmax, T=4", "softmax, T=8"}
    assert auto.details["allocation"] == min(tried, key=tried.__getitem__)
    assert len(auto.details["importances"]) == 3
    found = {}
    for importance in ("loss", "error"):
        method = StruPrune(allocation="softmax", importance=importance, temperature=0.5, rounds=0)
        found[importance] = method.prune(problem).details["importances"]
    assert found["loss"] == auto.details["importances"] != found["error"]


def test_modules_are_measured_in_float32(
    llama: CausalLM, graph: StructureGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def choose(module: Module, rows: Rows, weight: Tensor, count: int) -> IntArray:
        seen.extend([(rows.inputs.T @ rows.inputs).dtype, rows.wanted.dtype])
        return known(module, rows, weight, count)

    known = fit.choose
    monkeypatch.setattr(fit, "choose", choose)
    with as_elsewhere(bfloat16=True):
        StruPrune(rounds=0, allocation="softmax").prune(problem_of(llama, graph))
    assert len(seen) == 12
    assert set(seen) == {torch.float32}


class _Stop(Exception):
    pass


def test_an_interrupted_run_ends_alike(
    llama: CausalLM, graph: StructureGraph, tmp_path: Path
) -> None:
    method = StruPrune(rounds=2, allocation="softmax")

    def stop(percent: int, _: str) -> None:
        if percent > 50:
            raise _Stop

    folder = tmp_path / "blocks"
    with pytest.raises(_Stop):
        method.prune(problem_of(llama, graph, folder=folder, progress=stop))
    assert len(list(folder.glob("block-*"))) == 2
    results = [method.prune(problem_of(llama, graph, folder=f)) for f in (folder, None)]
    states = [result.model.state_dict() for result in results if result.model is not None]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert results[0].details == results[1].details
    with pytest.raises(ArtefactError, match="another"):
        StruPrune(rounds=1).prune(problem_of(llama, graph, folder=folder))
    (folder / "block-0001.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError):
        method.prune(problem_of(llama, graph, folder=folder))


def test_one_block_is_in_memory() -> None:
    task = task_of(tiny_llama(num_hidden_layers=5))
    graph = analyse(task.model, task.example_inputs)
    alive: list[int] = []

    def count(_: int, __: str) -> None:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        held = {item.untyped_storage().data_ptr(): item.untyped_storage() for item in tensors}
        alive.append(sum(storage.nbytes() for storage in held.values()))

    StruPrune(rounds=1).prune(problem_of(task, graph, keep=0.9, progress=count))
    assert len(alive) == 5
    assert max(alive[1:4]) < 1.05 * alive[0]


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_plain_neurons_with_biases_are_served(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.OPTConfig(
            vocab_size=256, hidden_size=32, ffn_dim=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config).eval()
    task = task_of(model)
    graph = analyse(model, task.example_inputs)
    result = StruPrune(rounds=3).prune(problem_of(task, graph, keep=0.8))
    assert any(rounds > 0 for rounds in result.details["rounds"].values())
    other = make_problem(task, graph, Budget(keep_params=0.8))
    plain = other.unlabelled.prune(result.channels)
    fitted, cut = (_divergence(task, each) for each in (result.model, plain))
    assert fitted < 1.1 * cut


class Neurons(nn.Module):
    """Tokens, neurons beside their stream, and a head."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.activation = nn.Embedding(32, 8), activation
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        logits: Tensor = self.head(x + self.down(self.activation(self.up(x))))
        return logits


def test_an_activation_may_write_into_what_it_is_given() -> None:
    found = []
    for in_place in (False, True):
        ids = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(0))
        model = Neurons(nn.ReLU(inplace=in_place))
        task = pg.tasks.custom(
            model,
            ids[:1],
            train=[*ids.split(4)],
            loss=lambda network, batch: network(batch).square().mean(),
            score=lambda network: 0.0,
            higher_is_better=True,
        )
        problem = make_problem(task, analyse(model, ids[:1]), Budget(keep_params=0.9))
        found.append(StruPrune(rounds=2).prune(problem).details)
    assert found[0]["rounds"]["down.weight"] > 0
    assert found[0] == found[1]


def _divergence(task: CausalLM, model: nn.Module | None) -> float:
    assert model is not None
    ids = next(iter(task.search.batches(8)))["input_ids"]
    with torch.no_grad():
        found, dense = model(ids).logits, task.model(ids).logits
    return float(task.divergence(found, dense))


def test_a_short_calibration_warns_with_the_number_needed(
    llama: CausalLM, graph: StructureGraph
) -> None:
    few = replace(llama, train=llama.train.take(torch.arange(2)))
    with pytest.warns(UserWarning, match=r"32 tokens, fewer than the 64 .* give 1024 or more"):
        result = StruPrune(rounds=0).prune(problem_of(few, graph))
    assert graph.fits(result.channels, Budget(keep_params=0.8))


def test_what_it_cannot_serve_is_refused(llama: CausalLM, graph: StructureGraph) -> None:
    with pytest.raises(BudgetError, match=r"cuts neurons alone, heads with heads=true") as told:
        StruPrune().check(problem_of(llama, graph, keep=0.3))
    least = float(str(told.value).split()[-3])  # give 0.5 or more
    StruPrune().check(problem_of(llama, graph, keep=least))
    with pytest.raises(BudgetError, match="neurons and heads alone"):
        StruPrune(heads=True).check(problem_of(llama, graph, keep=0.1))
    neurons = [module.group for module in find_modules(graph, llama.model, heads=False)]
    others = dict.fromkeys(set(graph.free_groups.tolist()) - set(neurons), "they are few")
    with pytest.raises(ModelError, match=r"no heads of .* can leave \(.*they are few.*leave heads"):
        StruPrune(heads=True).check(problem_of(llama, restrict(graph, others, {})))
    for name in ("struprune", "maskprune"):
        with pytest.raises(
            BudgetError, match=f"{name} changes weights .*, depth removes some: leave depth"
        ):
            pg.prune(llama, name, Budget(keep_params=0.8, depth=True))
    with pytest.raises(ConfigError, match="allocation='even' is none of auto, uniform, softmax"):
        StruPrune(allocation="even")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature=0"):
        StruPrune(temperature=0.0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    ).eval()
    data = load_dataset("digits").train
    images = image_task(network, TrainSplit(data.source, data.index[:32]))
    with pytest.raises(ModelError, match=r"finds no linear layer .* choose another method"):
        pg.prune(images, "struprune", Budget(keep_macs=0.5))


@pytest.mark.data
@pytest.mark.parametrize(("share", "least_squares", "admm"), BARS)
def test_a_real_network(share: float, least_squares: float, admm: float, shared_dir: Path) -> None:
    """53 and 27 % of the neurons go, 40 and 20 % of the blocks' parameters; dense 4.56."""
    folder = shared_dir / "pack" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs ../shared/pack, which is absent")
    rows = np.load(folder / "stories-257.npy", allow_pickle=False)
    texts = {"calibration": rows[:64], "search": rows[152:170], "test": rows[65:152]}
    task = causal_lm(folder, calibration_tokens=None, **texts)
    graph = analyse(task.model, task.example_inputs)
    keep = np.ones(graph.num_units, dtype=bool)
    for module in find_modules(graph, task.model, heads=False):
        keep[module.units[: round(share * len(module.units))]] = False
    ratio = graph.cost(keep).params / graph.dense_cost.params
    problem = problem_of(task, graph, keep=ratio)
    shares = StruPrune(allocation="softmax")
    for method, bar in ((StruPrune(rounds=0), least_squares), (StruPrune(), admm), (shares, admm)):
        model = method.prune(problem).model
        assert model is not None
        assert 0.8 * bar < task.score(model, task.test).value < bar
