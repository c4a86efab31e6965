"""Folders of transformers: written, read back, and refused in one line."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import prunegraph as pg
from prunegraph.core.errors import ArtefactError, ConfigError, ModelError
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.models.pretrained import (
    config_misfit,
    load_pretrained,
    load_tokenizer,
    save_pretrained_layout,
)
from support.language import tiny_llama

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "llama"
    save_pretrained_layout(tiny_llama(), byte_tokenizer(), where)
    return where


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_written(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    for _ in range(2):  # over an older one, too
        save_pretrained_layout(model, byte_tokenizer(), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_pretrained(tmp_path / "out")), logits(model))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_files_of_a_tokenizer_are_copied_as_they_are(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ words }}")
    save_pretrained_layout(load_pretrained(folder), folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    text = "Bytes: äß☃\n\n  \0"
    assert load_tokenizer(tmp_path / "out")(text)["input_ids"] == list(text.encode())
    save_pretrained_layout(load_pretrained(folder), None, tmp_path / "bare")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_a_network_in_shards_is_read_whole(folder: Path, tmp_path: Path) -> None:
    model = load_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")  # type: ignore[operator]
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(load_pretrained(tmp_path / "shards")), logits(model))
    shards[-1].unlink()
    with pytest.raises(ModelError, match=f"lacks the shard '{shards[-1].name}'"):
        load_pretrained(tmp_path / "shards")


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def test_a_config_may_hold_infinity(folder: Path) -> None:
    config_with(time_step_limit=[0.0, float("inf")])(folder)  # as transformers 4 writes Mamba2's
    assert torch.equal(logits(load_pretrained(folder)), logits(tiny_llama()))


def as_pickle(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-99])


def without_a_weight(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "there is no folder"),
        (as_pickle, r"a pickle \(.bin\), which is never read: convert it to safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "there is no file .*config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (config_with(quantization_config={"bits": 4}), "is of a quantised network"),
        (config_with(auto_map={"AutoModelForCausalLM": "own.Net"}), "auto_map"),
        (config_with(model_type="nonesuch"), "cannot be loaded as a causal language model"),
        (config_with(vocab_size=300), "llama"),
        (truncated, "cannot be loaded as a causal language model"),
        (without_a_weight, "of another network .*model.norm.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_folders_that_cannot_be_used_are_one_line(
    folder: Path, harm: Callable[[Path], Any], message: str
) -> None:
    harm(folder)
    with pytest.raises(ModelError, match=message) as raised:
        load_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_tokenizers_that_cannot_be_used_are_one_line(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {}}')
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer .*: copy its files there, or in Py"):
        load_tokenizer(folder)


def test_a_network_that_its_config_cannot_hold_is_not_written(tmp_path: Path) -> None:
    model = tiny_llama()
    assert config_misfit(model) is None
    graph = pg.analyse(model, {"input_ids": IDS})
    bits = graph.dense_mask().keep.copy()
    bits[graph.free.nonzero()[0][:1]] = False
    cut = pg.apply_mask(model, graph, graph.mask(bits))
    with pytest.raises(ArtefactError, match=r"has shape .*, config says"):
        save_pretrained_layout(cut, None, tmp_path / "out")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    with pytest.raises(ArtefactError, match="differs from the embedding"):
        save_pretrained_layout(model, None, tmp_path / "out")
    with pytest.raises(ArtefactError, match="Linear is no network of transformers"):
        save_pretrained_layout(torch.nn.Linear(2, 2), None, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        save_pretrained_layout(tiny_llama(), None, tmp_path / "file")


def test_without_transformers_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'prunegraph\[lm\]'"):
        load_pretrained(folder)


def test_the_seed_fixes_the_embedded_network() -> None:
    first, again, other = (build_embedded(seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert sum(value.numel() for value in build_embedded().parameters()) == 201_280
