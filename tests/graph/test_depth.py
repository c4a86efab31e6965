"""Sub-layers that leave wholly: masked = pruned, costs, caches, files, and what proposes depth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.artefacts.pruned import load_pruned
from prunegraph.core.errors import BudgetError, ModelError
from prunegraph.graph import StructureGraph, analyse, evaluation_mode
from prunegraph.graph.apply import apply_mask, zero_mask
from prunegraph.graph.depth import with_depth
from prunegraph.models import build_model
from support.language import TEXT, encode, tiny_llama

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "Qwen2": {**SIZES, "num_key_value_heads": 2},
    "GPT2": {"vocab_size": 256, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "OPT": {
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def build(family: str) -> Any:
    kind, head = ("LMHeadModel", "") if family == "GPT2" else ("ForCausalLM", "")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}{head}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():  # else the branches hardly matter
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def drawn(graph: StructureGraph, seed: int) -> Any:
    """Return a mask without about half of the sub-layers, and a third of some other groups."""
    rng = np.random.default_rng(seed)
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        if group.frozen is None and rng.random() < 0.5:
            units = rng.permutation(group.units)
            keep[units if not group.min_keep else units[: len(units) // 3]] = False
    return graph.mask(keep)


def without(graph: StructureGraph, *names: str) -> Any:
    """Return the mask without the groups of layers with these parts in their names."""
    gone = [
        group.units
        for group in graph.groups
        if not group.min_keep and any(name in group.name for name in names)
    ]
    keep = np.ones(graph.num_units, dtype=bool)
    keep[np.concatenate(gone)] = False
    return graph.mask(keep)


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with evaluation_mode(model):
        return model(inputs).logits if inputs.dtype == torch.int64 else model(inputs)


@pytest.mark.parametrize("family", [*FAMILIES, "resnet20"])
def test_a_network_without_sub_layers_computes_what_the_masked_one_does(family: str) -> None:
    images = family == "resnet20"
    inputs = torch.randn(2, 3, 32, 32) if images else TOKENS
    model = (
        build_model(family, num_classes=10, image_shape=(3, 32, 32)) if images else build(family)
    )
    graph = with_depth(model.eval(), analyse(model, inputs), inputs)
    assert graph.fingerprint() == analyse(model, inputs).fingerprint()
    assert (graph.min_keep == 0).sum() == (9 if images else 8)
    dense = outputs(model, inputs)
    for seed in range(3):
        mask = drawn(graph, seed)
        pruned = apply_mask(model, graph, mask)
        found, wanted = outputs(pruned, inputs), outputs(zero_mask(model, graph, mask), inputs)
        assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
        assert not torch.allclose(found, dense, atol=1e-2 * float(wanted.abs().max()))
        assert sum(item.numel() for item in pruned.parameters()) == graph.cost(mask).params
        if not images:
            given: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            one, other = (
                pruned.generate(TOKENS[:1], use_cache=cached, pad_token_id=0, **given)
                for cached in (True, False)
            )
            assert torch.equal(one, other)


def test_costs_of_each_unit_count_the_norm_with_the_last_one() -> None:
    model = build("Llama")
    graph = with_depth(model, analyse(model, TOKENS), TOKENS)
    keep = without(graph, "layers.1.mlp").keep.copy()
    last = int(np.flatnonzero(~keep)[0])
    before, added = graph.cost(keep).params, graph.cost_model.added_by_each(keep)[1][last]
    keep[last] = True
    assert graph.cost(keep).params == before + added == before + 3 * 32 + 32
    assert graph.cost_model.freed_by_each(keep)[1][last] == added
    shares = keep[None].astype(np.float64)
    assert graph.cost_model.expected(shares)[0, 1] == graph.cost(keep).params


def test_whole_blocks_leave_their_list_and_the_config(tmp_path: Path) -> None:
    model = build("Llama")
    task = pg.tasks.causal_lm(model, encode, calibration=[TEXT], window=16, calibration_tokens=64)
    graph = with_depth(model, analyse(model, task.example_inputs), task.example_inputs)
    mask = without(graph, "layers.0.", "layers.2.")
    pruned = apply_mask(model, graph, mask)
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    result = pg.prune(task, "prior", pg.Budget(keep_params=0.9, depth=True))
    result = type(result)(model=pruned, mask=mask, graph=graph, report=result.report, task=task)
    pg.save_pretrained(result, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(outputs(loaded.eval(), TOKENS), outputs(pruned, TOKENS))
    read = load_pruned(tmp_path, lambda: build("Llama"), task.example_inputs)
    assert torch.equal(outputs(read.model, TOKENS), outputs(pruned, TOKENS))


@pytest.mark.parametrize("method", ["prior", "random_search", "cem", "agent"])
def test_methods_meet_a_budget_with_depth(method: str) -> None:
    task = pg.tasks.causal_lm(
        tiny_llama(), encode, calibration=[TEXT], window=16, calibration_tokens=64
    )
    budget = pg.Budget(keep_params=0.6, depth=True)
    found = pg.prune(task, method, budget, networks=40 if method == "agent" else 12)
    assert found.report["pruned"]["params"] <= 0.6 * found.report["dense"]["params"]
    count = sum(item.numel() for item in found.model.parameters())
    assert count == found.report["pruned"]["params"]


def test_what_depth_refuses() -> None:
    with pytest.raises(BudgetError, match="uniform keeps one width for all layers, depth removes"):
        pg.Budget(keep_params=0.5, uniform=True, depth=True)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(2, 4)
    graph = analyse(plain, inputs)
    with pytest.raises(ModelError, match="no sub-layer of Sequential can leave wholly"):
        with_depth(plain, graph, inputs)
    with pytest.raises(BudgetError, match="depth=True needs a structure of with_depth"):
        graph.project(np.zeros(graph.num_units, np.float32), pg.Budget(keep_params=0.5, depth=True))
    task = pg.tasks.causal_lm(
        tiny_llama(), encode, calibration=[TEXT], window=16, calibration_tokens=64
    )
    with pytest.raises(BudgetError, match="struprune changes weights of layers that stay"):
        pg.prune(task, "struprune", pg.Budget(keep_params=0.6, depth=True))
