"""The task of speech recognition: its loss, its error rate, and what fits it."""

import dataclasses
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.errors import ConfigError, DataError, ModelError
from prunegraph.core.weight_mask import GroupedMask
from prunegraph.methods.obs.magnitude import magnitude_mask
from prunegraph.tasks.speech_recognition import word_error_rate
from prunegraph.training.loop import FinetuneConfig, finetune
from support.speech import WORDS, tiny_recogniser, tiny_speech, tiny_task


class Told(nn.Module):
    """Says the first word of its language, whatever it hears."""

    def __init__(self, tokens: int = 6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.tokens = tokens

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        said = torch.zeros(len(features), 8, dtype=torch.int64)
        said[:, 1:3] = 2  # a, twice the same token: one letter
        return 9.0 * self.scale * F.one_hot(said, self.tokens).float(), torch.full_like(lengths, 8)


def test_the_score_is_the_mean_of_the_languages_error_rates() -> None:
    task = pg.tasks.speech_recognition(Told(), tiny_speech())
    rates = task.group_scores(task.model, task.test)
    texts = {name: [] for name in WORDS}  # type: ignore[var-annotated]
    for batch in task.test.batches(64):  # type: ignore[union-attr]
        texts[task.group_of(batch)] += task.references(batch)
    for name, said in texts.items():
        words = sum(len(text.split()) for text in said)
        right = sum("a" in text.split() for text in said)
        assert rates[name] == pytest.approx((words - right) / words)
    assert 0.0 < rates["ab"] < 1.0 == rates["xy"]
    score = task.score(task.model, task.test)
    assert score.value == pytest.approx((rates["ab"] + rates["xy"]) / 2)
    assert (score.name, score.higher_is_better) == ("word error rate", False)


def test_words_are_counted_as_jiwer_does() -> None:
    assert word_error_rate(["one two", "three"], ["one", "three four"]) == pytest.approx(2 / 3)


def test_ctc_learns_two_languages() -> None:
    task = tiny_task()
    before = task.score(task.model).value
    recipe = FinetuneConfig(epochs=25, batch_size=16, optimizer="adamw", peak_lr=1e-2)
    finetune(task.model, task, recipe, seed=0)
    assert task.score(task.model).value < 0.5 * before
    assert task.divergence(*[task.forward(task.model, next(iter(task.test.batches(4))))] * 2) == 0.0


def test_padding_does_not_change_what_is_heard() -> None:
    model, lengths = tiny_recogniser(stride=2), torch.tensor([9, 5])
    features = torch.randn(2, 9, 6)
    whole, heard = model(features, lengths)
    alone, length = model(features[1:, :5], lengths[1:])
    assert heard.tolist() == [5, 3]
    assert length.tolist() == [3]
    assert torch.allclose(whole[1, :3], alone[0], atol=1e-5)


def test_a_batch_runs_with_the_weights_of_its_language() -> None:
    task = tiny_task()
    masks = {
        name: magnitude_mask(task.model, pg.Budget(sparsity=sparsity))
        for name, sparsity in (("ab", 0.3), ("xy", 0.8))
    }
    shared = GroupedMask.of(masks).apply(task.model)
    for batch in task.test.batches(64):  # type: ignore[union-attr]
        own = masks[task.group_of(batch)].apply(task.model)
        assert torch.allclose(task.forward(shared, batch)[0], task.forward(own, batch)[0])
        task.loss(shared, batch).backward()
    mixed = {name: torch.cat([item[:1]] * 2) for name, item in batch.items()}
    mixed["languages"] = torch.tensor([0, 1])
    with pytest.raises(DataError, match="a batch is of 2 languages"):
        task.forward(shared, mixed)


def test_a_library_that_is_missing_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ConfigError, match=r"need the library jiwer: pip install 'prunegraph\[spe"):
        tiny_task()


def test_networks_that_do_not_fit_are_refused() -> None:
    data = tiny_speech()
    with pytest.raises(ModelError, match="tells 4 tokens apart, the alphabet has 6"):
        pg.tasks.speech_recognition(Told(4), data)
    with pytest.raises(ModelError, match="fails on features"):
        pg.tasks.speech_recognition(nn.Linear(6, 6), data)

    class Single(Told):
        def forward(self, features: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(features, lengths)[0]

    with pytest.raises(ModelError, match="returns Tensor, not logits"):
        pg.tasks.speech_recognition(Single(), data)
    task = tiny_task()
    with pytest.raises(DataError, match="TestSplit is no SearchSplit: nothing is chosen on test"):
        dataclasses.replace(task, search=task.test)
    with pytest.raises(DataError, match="no utterances to score"):
        task.score(task.model, task.search.take(torch.arange(0)))


def test_networks_are_compared_by_their_error_rate() -> None:
    task = dataclasses.replace(tiny_task())
    found = task.measure(task.model, task.search.batches(8), autocast=False)
    assert found.accuracy == pytest.approx(task.dense_score.relative_to(task.dense_score))
    broken = tiny_recogniser()
    nn.init.constant_(broken.head.weight, torch.nan)
    assert task.measure(broken, task.search.batches(8), autocast=False).accuracy == -1.0


def test_the_embedded_proxy_has_a_recogniser_of_its_own() -> None:
    task = pg.tasks.speech_recognition(languages=["up", "down"])
    assert task.languages == ("down", "up")
    assert sum(p.numel() for p in task.model.parameters()) < 60_000
    assert (
        pg.tasks.speech_recognition(seed=1).model.head.weight[0, 0]
        != (task.model.head.weight[0, 0])
    )
