"""The task of sentences: what it learns and measures, and what it refuses."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.errors import ConfigError, DataError, ModelError, PruneGraphError
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.models import load_encoder
from prunegraph.tasks.text_classification import METRICS, TextClassification
from prunegraph.training.loop import FinetuneConfig
from support.sentences import save_encoder, tiny_encoder, tiny_tokenizer, write_table

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

LEARN = FinetuneConfig(
    epochs=8, batch_size=16, peak_lr=5e-3, warmup_epochs=1, optimizer="adamw", autocast=False
)


def make(folder: Path, model: Any = None, **given: Any) -> TextClassification:
    shape = {name: given.pop(name) for name in ("pairs", "numbers") if name in given}
    table = write_table(folder / "toy.tsv", **shape)
    if model is None:
        model = tiny_encoder(outputs=1 if shape.get("numbers") else 2)
    return pg.tasks.text_classification(model, table, tiny_tokenizer(), **given)


def test_an_encoder_gets_a_head_and_learns(tmp_path: Path) -> None:
    folder, table = save_encoder(tmp_path / "enc"), write_table(tmp_path / "toy.tsv")
    task = pg.tasks.text_classification(folder, table)
    assert task.untrained
    assert (task.name, task.score_name, task.num_outputs) == ("enc", "accuracy", 2)
    before = task.score(task.model, task.test).value
    pg.finetune(task.model, task, LEARN, seed=0)
    assert task.score(task.model, task.test).value > 0.95 > before
    whole = save_encoder(tmp_path / "whole", task.model)
    again = pg.tasks.text_classification(whole, table)
    assert not again.untrained
    assert again.score(again.model, again.test) == task.score(task.model, task.test)


def test_fresh_heads_are_of_the_seed(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "enc")
    heads = [
        load_encoder(folder, 3, seed)[0].get_parameter("classifier.weight") for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_head_and_the_embeddings_are_not_pruned() -> None:
    names = prunable_weights(tiny_encoder(outputs=2))
    assert len(names) == 2 * 6 + 1  # with the pooler
    assert not any("classifier" in name or "embeddings" in name for name in names)
    alone = prunable_weights(tiny_encoder())
    assert {f"bert.{name}" for name in alone} == {*names}


def test_losses_and_scores_are_those_of_the_logits(tmp_path: Path) -> None:
    task = make(tmp_path)
    batch = task.search.source.load(task.search.index)
    with torch.no_grad():
        logits = torch.cat(  # one by one: padding changes nothing
            [task.forward(task.model, task.search.source.load(i[None])) for i in task.search.index]
        )
        assert torch.allclose(task.forward(task.model, batch), logits, atol=1e-5)
        assert float(task.loss(task.model, batch)) == pytest.approx(
            float(F.cross_entropy(logits, batch["labels"])), abs=1e-5
        )
    right = (logits.argmax(1) == batch["labels"]).float().mean()
    assert task.score(task.model).value == pytest.approx(float(right))
    dense = task.dense_outputs(task.model, task.search.batches(7), autocast=False)
    found = task.measure(task.model, [batch], autocast=False, dense_outputs=dense)
    assert found.kl == pytest.approx(0.0, abs=1e-5)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), abs=1e-5)
    assert found.soft_accuracy == pytest.approx(
        float(logits.softmax(1)[range(64), batch["labels"]].mean()), abs=1e-5
    )
    other = task.measure(tiny_encoder(1, 2), [batch], autocast=False, dense_outputs=dense)
    assert other.kl is not None
    assert other.kl > 1e-6


def test_pairs_and_numbers(tmp_path: Path) -> None:
    pairs = make(tmp_path, pairs=True)
    assert bool(pairs.train.source.load(torch.tensor([0]))["token_type_ids"].any())
    task = make(tmp_path, numbers=True)
    assert (task.score_name, task.num_outputs) == ("pearson", 1)
    pg.finetune(task.model, task, LEARN, seed=0)
    assert task.score(task.model, task.test).value > 0.9
    batch = task.search.source.load(task.search.index)
    found = task.measure(task.model, [batch], autocast=False)
    assert found.soft_accuracy is None
    assert found.loss < 0.1
    distance = task.divergence(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 4.0)
    assert float(distance) == 4.0


def test_metrics() -> None:
    wanted, given = np.array([0.0, 0, 1, 1, 1]), np.array([0.0, 1, 1, 1, 0])
    assert METRICS["accuracy"](wanted, given) == 0.6
    assert METRICS["f1"](wanted, given) == pytest.approx(2 / 3)
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert METRICS["matthews"](wanted, given) == pytest.approx(1 / 6)
    assert METRICS["pearson"](wanted, given) == pytest.approx(1 / 6)
    for name in ("matthews", "pearson"):
        assert METRICS[name](wanted, np.ones(5)) == 0.0
    assert METRICS["f1"](wanted, np.zeros(5)) == 0.0
    assert 0.0 < METRICS["f1"](np.array([0.0, 1, 2]), np.array([0.0, 1, 1])) < 1.0


@pytest.mark.parametrize(
    ("name", "metric"), [("cola", "matthews"), ("mrpc", "f1"), ("x", "accuracy")]
)
def test_the_metric_is_that_of_the_table(name: str, metric: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"{name}.tsv")
    task = pg.tasks.text_classification(tiny_encoder(outputs=2), table, tiny_tokenizer())
    assert task.score_name == metric
    assert -1.0 <= task.score(task.model).value <= 1.0
    assert math.isfinite(task.measure(task.model, task.search.batches(16), autocast=False).accuracy)


class OneRow(nn.Module):
    """Fails on several rows, as a Llama whose config names no padding token."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        if len(input_ids) > 1:
            msg = "Cannot handle batch sizes > 1"
            raise ValueError(msg)
        return torch.zeros(1, 2)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    cases: list[tuple[type[PruneGraphError], str, dict[str, Any]]] = [
        (ModelError, "gives 3 logits", {"model": tiny_encoder(outputs=3)}),
        (ModelError, "classifier of sequences", {"model": tiny_encoder()}),
        (ModelError, r"fails on 2 rows \(Cannot handle .*give an encoder", {"model": OneRow()}),
        (ConfigError, "'acuracy' is none", {"metric": "acuracy"}),
        (ConfigError, "pearson does not fit", {"metric": "pearson"}),
        (DataError, "nothing to report on", {"test": "search"}),
        (DataError, "no rows of split test", {"test": "test"}),
    ]
    for kind, message, given in cases:
        with pytest.raises(kind, match=message) as refused:
            make(tmp_path, **given)
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="tokenizer"):
        pg.tasks.text_classification(tiny_encoder(outputs=2), tmp_path / "toy.tsv")
    broken = tiny_encoder(outputs=2)
    nn.init.constant_(broken.classifier.weight, math.nan)
    with pytest.raises(ModelError, match="NaN"):
        make(tmp_path, broken)


def test_nothing_is_chosen_on_test_rows(tmp_path: Path) -> None:
    task = make(tmp_path)
    assert task.test is not None
    for name, split in (("search", task.test), ("train", task.test), ("test", task.search)):
        with pytest.raises(DataError, match="nothing is chosen on test rows"):
            replace(task, **{name: split})
    with pytest.raises(DataError, match="no rows to score"):
        task.score(task.model, SearchSplit(task.search.source, task.search.index[:0]))
    assert isinstance(task.train, TrainSplit)


def test_folders_of_other_networks(tmp_path: Path) -> None:
    table, folder = write_table(tmp_path / "toy.tsv"), save_encoder(tmp_path / "enc")
    with pytest.raises(ModelError, match="no folder"):
        pg.tasks.text_classification(tmp_path / "none", table, tiny_tokenizer())
    three = save_encoder(tmp_path / "three", tiny_encoder(outputs=3))
    with pytest.raises(ModelError, match="classifier of sequences"):
        pg.tasks.text_classification(three, table)
    state = tiny_encoder().state_dict()
    del state["encoder.layer.0.output.dense.weight"]
    tiny_encoder().save_pretrained(folder, state_dict=state)
    with pytest.raises(ModelError, match="missing_keys") as refused:
        pg.tasks.text_classification(folder, table)
    assert "\n" not in str(refused.value)
