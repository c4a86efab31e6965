"""``Budget(uniform=True)`` with every kind of method, and ``pg.save_pretrained``."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prunegraph as pg
from prunegraph.agent.method import AgentSearch
from prunegraph.agent.options import AgentOptions
from prunegraph.artefacts.masked import load_masked
from prunegraph.methods.method import Method
from prunegraph.models.embedded_language import byte_tokenizer
from prunegraph.models.pretrained import load_tokenizer
from prunegraph.runs.result import PruneResult
from prunegraph.tasks.causal_lm import CausalLM
from support.language import TEXT, tiny_llama

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

UNIFORM = pg.Budget(keep_params=0.8, uniform=True)
SHORT = AgentOptions(update_size=4, surrogate_steps=2, swaps=4, metric="kl")


@pytest.fixture(scope="module")
def task() -> CausalLM:
    return pg.tasks.causal_lm(
        tiny_llama(), byte_tokenizer(), calibration=[TEXT], window=16, calibration_tokens=512
    )


@pytest.fixture(scope="module")
def uniform(task: CausalLM) -> Iterator[PruneResult]:
    yield pg.prune(task, "taylor/global", UNIFORM)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(24).reshape(2, 12)).logits
    return found


@pytest.mark.parametrize("name", ["l2/per_mac", "cem", "random_search", "netadapt", "agent"])
def test_every_method_keeps_layers_of_a_kind_equally_wide(task: CausalLM, name: str) -> None:
    method: str | Method = AgentSearch(options=SHORT) if name == "agent" else name
    result = pg.prune(task, method, UNIFORM, networks=24, reconstruct=False)
    widths = result.report["pruned"]["widths"]
    kinds: dict[str, set[int]] = {}
    for layer, width in widths.items():
        kinds.setdefault(layer.replace(".0.", ".*.").replace(".1.", ".*."), set()).add(width)
    assert len(kinds) == 2
    assert all(len(found) == 1 for found in kinds.values())
    assert result.report["pruned"]["params"] <= 0.8 * result.report["dense"]["params"]
    assert result.report["budget"] == {"keep_params": 0.8, "uniform": True}


def test_steps_keep_what_one_config_can_hold(task: CausalLM, tmp_path: Path) -> None:
    seen: list[int] = []
    result = pg.prune(
        task,
        "l2/per_mac",
        pg.Budget(keep_params=0.7, uniform=True),
        steps=3,
        between=lambda model, _: seen.append(sum(p.numel() for p in model.parameters())),
        reconstruct=False,
    )
    assert result.report["dense"]["params"] > seen[0] > seen[1] > result.report["pruned"]["params"]
    assert result.graph is not None
    assert result.graph.fits(result.mask, pg.Budget(keep_params=0.7, uniform=True))
    pg.save_pretrained(result, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    assert torch.equal(logits(again), logits(result.model))


def test_transformers_alone_opens_the_folder(uniform: PruneResult, tmp_path: Path) -> None:
    pg.save_pretrained(uniform, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    assert torch.equal(logits(again), logits(uniform.model))
    prompt = torch.arange(40, 48)[None]
    told = [
        each.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cache)
        for each in (again, uniform.model)
        for cache in (True, False)
    ]
    assert all(torch.equal(told[0], other) for other in told)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = uniform.task.model.config
    assert config["intermediate_size"] < dense.intermediate_size
    assert config["head_dim"] == dense.head_dim
    assert load_tokenizer(tmp_path / "out")("a")["input_ids"] == [97]
    card = (tmp_path / "out" / "README.md").read_text()
    params = uniform.report["dense"]["params"], uniform.report["pruned"]["params"]
    assert "| parameters | {:,} | {:,} |".format(*params) in card
    assert "`taylor/global`" in card
    assert "keep_params=0.8, uniform=True" in card
    assert f"{uniform.report['pruned']['score']:.4g}" in card
    assert "LlamaForCausalLM.from_pretrained" in card
    loaded = pg.load_pruned(tmp_path / "out", tiny_llama, uniform.task.example_inputs)
    assert torch.equal(logits(loaded.model), logits(uniform.model))


def test_without_uniform_the_folder_is_for_load_pruned_and_says_so(
    task: CausalLM, tmp_path: Path
) -> None:
    result = pg.prune(task, "taylor/global", pg.Budget(keep_params=0.7), reconstruct=False)
    with pytest.warns(UserWarning, match=r"LlamaConfig holds one width .* load_pruned"):
        pg.save_pretrained(result, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert (
        "This is a `load_pruned` folder: LlamaConfig"
        in (tmp_path / "out" / "README.md").read_text()
    )
    loaded = pg.load_pruned(tmp_path / "out", tiny_llama, task.example_inputs)
    assert torch.equal(logits(loaded.model), logits(result.model))


def test_zeros_in_place_need_no_other_config(task: CausalLM, tmp_path: Path) -> None:
    result = pg.prune(task, "magnitude", pg.Budget(sparsity=0.5))
    pg.save_pretrained(result, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    assert torch.equal(logits(again), logits(result.model))
    assert load_masked(tmp_path / "out", tiny_llama).mask == result.mask
    assert (
        "| zeros, prunable weights |  | 50.00 % |  |"
        in (tmp_path / "out" / "README.md").read_text()
    )
