"""Uniform networks of transformers: only what a config can hold is cut, and it reads them back."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import BudgetError, ModelError
from prunegraph.graph import StructureGraph, call_forward
from prunegraph.graph.rounding import restrict
from prunegraph.models.configs import resized_config, resized_network, within_config
from support.language import tiny_llama

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
IDS = torch.randint(4, 64, (2, 8), generator=torch.Generator().manual_seed(0))

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", {**SIZES, **ENDS}),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": ("BertForSequenceClassification", {**SIZES, "intermediate_size": 48}),
    "mpnet": ("MPNetForSequenceClassification", {**SIZES, "intermediate_size": 48}),
    "vit": (
        "ViTForImageClassification",
        {
            **{name: SIZES[name] for name in ("hidden_size", "num_attention_heads")},
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **ENDS,
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "num_mel_bins": 8,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
HEADS_LEAVE = ("llama", "qwen2", "mistral", "vit")


def network(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    if family == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    if family == "whisper":
        return model, {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": IDS}
    return model, {"input_ids": IDS}


def uniform_mask(graph: StructureGraph, keep_params: float, seed: int = 0) -> pg.ChannelMask:
    scores = np.random.default_rng(seed).normal(size=graph.num_units).astype(np.float32)
    return graph.project(scores, pg.Budget(keep_params=keep_params, uniform=True))


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = call_forward(model, inputs).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_reads_a_uniform_network(family: str, tmp_path: Path) -> None:
    dense, inputs = network(family)
    graph = within_config(dense, pg.analyse(dense, inputs))
    mask = uniform_mask(graph, 0.8)
    widths = graph.group_widths(mask)
    small = pg.apply_mask(dense, graph, mask)
    resized = resized_network(small, inputs)
    resized.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(dense).from_pretrained(tmp_path, local_files_only=True)  # type: ignore[attr-defined]
    assert torch.equal(outputs(again, inputs), outputs(small, inputs))
    assert sum(p.numel() for p in again.parameters()) == graph.cost(mask).params
    assert graph.cost(mask).params < graph.dense_cost.params
    assert len({*widths.values()}) <= len({*graph.kinds[graph.free_groups]})
    heads = [g for g in graph.groups if len(g.units) <= 4]
    may_leave = {g.frozen is None for g in heads if g.frozen is None or "holds" in g.frozen}
    assert may_leave == {family in HEADS_LEAVE}
    if hasattr(small, "generate") and family != "whisper":
        told = [
            each.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True)
            for each in (again, small)
        ]
        assert torch.equal(*told)


def test_heads_that_config_validation_refuses_stay() -> None:
    dense = tiny_llama(hidden_size=48, num_attention_heads=8, num_key_value_heads=8)
    graph = within_config(dense, pg.analyse(dense, {"input_ids": IDS}))
    heads = next(number for number, group in enumerate(graph.groups) if len(group.units) == 8)
    assert graph.widths[heads] == (1, 2, 3, 4, 6, 8)  # which divide 48
    for seed in range(8):
        mask = uniform_mask(graph, 0.5 + 0.05 * seed, seed)
        small = pg.apply_mask(dense, graph, mask)
        config = resized_config(small)
        assert config.head_dim == 6
        assert config.hidden_size == 48
        assert set(graph.group_widths(mask).values()) == {
            config.num_key_value_heads,
            config.intermediate_size,
        }


def test_a_restricted_structure_keeps_its_fingerprint() -> None:
    dense = tiny_llama()
    graph = pg.analyse(dense, {"input_ids": IDS})
    less = within_config(dense, graph)
    assert less.fingerprint() == graph.fingerprint() == restrict(less, {}, {}).fingerprint()
    assert less.free.sum() < graph.free.sum()
    assert any("holds no other width" in str(group.frozen) for group in less.groups)


def test_a_network_of_other_makers_has_no_config() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = pg.analyse(model, torch.randn(2, 4))
    assert within_config(model, graph) is graph
    with pytest.raises(ModelError, match="Sequential is no network of transformers"):
        resized_config(model)


def test_what_a_config_cannot_hold_is_said() -> None:
    dense = tiny_llama()
    graph = pg.analyse(dense, {"input_ids": IDS})
    keep = np.ones(graph.num_units, dtype=bool)
    first = next(group for group in graph.groups if group.name.endswith("0.mlp.gate_proj"))
    keep[first.units[:5]] = False
    small = pg.apply_mask(dense, graph, graph.mask(keep))
    with pytest.raises(
        ModelError, match=r"LlamaConfig holds one width .*, not \[16, 27\] for .*layers\.0\.mlp"
    ):
        resized_config(small)


def test_a_config_that_holds_no_other_width_is_refused() -> None:
    dense, inputs = network("gpt2")
    graph = pg.analyse(dense, inputs)
    neurons = {i: "kept" for i, group in enumerate(graph.groups) if "mlp" in group.name}
    with pytest.raises(ModelError, match="GPT2Config holds no other width of any layer"):
        within_config(dense, restrict(graph, neurons, {}))


@pytest.mark.parametrize(("family", "heads"), [("llama", 1), ("gpt2", 4)])
def test_a_budget_below_one_unit_a_layer_and_the_heads_that_must_stay_is_refused(
    family: str, heads: int
) -> None:
    dense, inputs = network(family)
    graph = within_config(dense, pg.analyse(dense, inputs))
    keep = graph.frozen.copy()
    for group in (graph.groups[number] for number in graph.free_groups):
        keep[group.units[:1]] = True
    least = graph.cost(keep).params / graph.dense_cost.params
    with pytest.raises(BudgetError, match=r"keep_params=0\.\d+ cannot be met: the least"):
        uniform_mask(graph, 0.99 * least)
    small = pg.apply_mask(dense, graph, uniform_mask(graph, least))
    config: Any = resized_config(small)
    assert getattr(config, "num_key_value_heads", config.num_attention_heads) == heads


def test_shapes_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    other = tiny_llama(rms_norm_eps=0.5).config
    monkeypatch.setattr("prunegraph.models.configs.resized_config", lambda _: other)
    with pytest.raises(ModelError, match="with other outputs"):
        resized_network(dense, {"input_ids": IDS})


def test_uniform_needs_layers_of_a_kind() -> None:
    graph = pg.analyse(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(BudgetError, match="no two that may be pruned are of a kind"):
        graph.project(np.zeros(10, np.float32), pg.Budget(keep_macs=0.5, uniform=True))
