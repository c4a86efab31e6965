"""The task of causal language models: windows, perplexity, divergence, and what it refuses."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.errors import DataError, ModelError, PruneGraphError
from prunegraph.core.splits import SearchSplit, TestSplit, TrainSplit
from prunegraph.data.embedded_text import embedded_text
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.models.embedded_language import byte_tokenizer
from prunegraph.models.pretrained import load_pretrained, save_pretrained_layout
from prunegraph.tasks.causal_lm import CausalLM, logits_of
from prunegraph.training import embedded
from prunegraph.training.loop import FinetuneConfig, finetune
from support.language import TEXT, bos_tokenizer, encode, tiny_llama
from support.tasks import ToyLanguageModel, texts

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

MODULE = sys.modules[CausalLM.__module__]  # whose function has its name

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MAMBA = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "Qwen2": {**SIZES, "num_key_value_heads": 2},
    "Mistral": {**SIZES, "num_key_value_heads": 2},
    "GPT2": {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "Mamba": MAMBA,
    "Mamba2": {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
}


def make(model: Any = None, **given: Any) -> CausalLM:
    options = {"calibration": [TEXT], "window": 16, "calibration_tokens": 128, **given}
    return pg.tasks.causal_lm(model or tiny_llama(), options.pop("tokenizer", encode), **options)


@pytest.fixture
def sharp() -> Any:
    """Return a network whose probabilities differ more than those of fresh weights."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 20
    return model


def perplexity(model: Any, windows: Tensor) -> float:
    """Return the perplexity by the definition, one token after another."""
    losses = []
    for window in windows:
        for place in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :place]).logits[0, -1]
            losses.append(-logits.log_softmax(0)[window[place]].item())
    return math.exp(sum(losses) / len(losses))


def test_the_perplexity_is_that_of_all_tokens_but_the_first_of_each_window(sharp: Any) -> None:
    task = dataclasses.replace(make(sharp, test=[TEXT[:80]]), autocast=False)
    assert task.test is not None
    windows = torch.tensor(encode(TEXT[:80])).view(5, 16)
    score = task.score(task.model, task.test)
    assert score.value == pytest.approx(perplexity(sharp, windows), rel=1e-4)
    assert (score.name, score.higher_is_better) == ("perplexity", False)
    other = perplexity(sharp, windows.flip(0, 1))
    assert score.value != pytest.approx(other, rel=1e-3)


def test_a_stride_gives_tokens_more_context_and_scores_each_once(sharp: Any) -> None:
    tokens = torch.tensor(encode(TEXT[:64]))
    task = dataclasses.replace(make(sharp, test=tokens, stride=4), autocast=False)
    assert task.test is not None
    with torch.no_grad():
        losses = [
            -sharp(tokens[None, max(0, -(-(place - 15) // 4) * 4) : place])
            .logits[0, -1]
            .log_softmax(0)[tokens[place]]
            .item()
            for place in range(1, 64)
        ]
    score = task.score(task.model, task.test)
    assert score.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert len(task.test) == 13
    loss = task.loss(task.model, next(iter(task.test.batches(13))))
    assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_loss_is_the_logarithm_of_the_perplexity(sharp: Any) -> None:
    task = dataclasses.replace(make(sharp), autocast=False)
    batch = next(iter(task.search.batches(99)))
    loss = task.loss(task.model, batch)
    assert math.exp(loss.detach()) == pytest.approx(task.score(task.model).value, rel=1e-4)
    loss.backward()
    assert sharp.model.embed_tokens.weight.grad.abs().sum() > 0
    measured = task.measure(sharp, task.search.batches(3), autocast=False)
    assert measured.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert measured.accuracy == pytest.approx(1.0, rel=1e-4)
    assert measured.kl is None


def test_the_utility_falls_with_the_perplexity(sharp: Any) -> None:
    task = make(sharp)
    worse = tiny_llama(seed=1)
    scores = task.measure(worse, task.search.batches(4), autocast=True)
    ratio = task.score(sharp).value / task.score(worse).value
    assert scores.accuracy == pytest.approx(ratio if ratio < 1 else 2 - 1 / ratio, rel=0.02)


def full_divergence(model: Any, dense: Any, ids: Tensor) -> float:
    with torch.no_grad():
        own, other = (net(ids).logits[:, :-1].log_softmax(2) for net in (model, dense))
    return float((other.exp() * (other - own)).sum(2).mean())


@pytest.mark.parametrize("kept", [256, 8])
def test_the_divergence_is_exact_or_from_below(
    sharp: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "KEPT", kept)
    task = make(sharp)
    other = tiny_llama(seed=1)
    ids = next(iter(task.search.batches(99)))["input_ids"]
    dense = task.dense_outputs(sharp, task.search.batches(2), autocast=False)
    assert dense.shape == (len(ids), 15, kept, 2)

    def kl(model: Any) -> float:
        found = task.measure(model, task.search.batches(3), autocast=False, dense_outputs=dense).kl
        assert found is not None
        return found

    exact = full_divergence(other, sharp, ids)
    assert abs(kl(sharp)) < 1e-5
    if kept == 256:
        assert kl(other) == pytest.approx(exact, rel=1e-4)
    else:
        assert 0.3 * exact < kl(other) < exact


def test_the_divergence_of_outputs_has_a_temperature_and_a_gradient(sharp: Any) -> None:
    task = make(sharp)
    batch = next(iter(task.train.batches(2)))
    own, other = (net(batch["input_ids"]) for net in (tiny_llama(seed=1), sharp))
    value = task.divergence(own, other.logits.detach(), 2.0)
    expected = F.kl_div(
        (own.logits / 2).log_softmax(-1).flatten(0, 1),
        (other.logits / 2).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    assert float(value.detach()) == pytest.approx(4 * float(expected.detach()), rel=1e-5)
    value.backward()
    assert float(task.divergence(other, other).detach()) == 0.0


def test_splits_are_typed_and_fixed_by_the_seed() -> None:
    task = make(test=[TEXT])
    assert isinstance(task.train, TrainSplit)
    assert isinstance(task.search, SearchSplit)
    assert isinstance(task.test, TestSplit)
    assert len(task.train) == len(task.search) == 8
    assert not {*task.train.index.tolist()} & {*task.search.index.tolist()}
    assert make().train.fingerprint() == task.train.fingerprint()
    assert make(seed=1).train.fingerprint() != task.train.fingerprint()
    given = make(search=[TEXT], calibration_tokens=None)
    assert len(given.search) == len(given.train) == len(encode(TEXT)) // 16
    again = make(calibration=task.train, search=task.search, test=task.test)
    assert (again.train, again.search, again.test) == (task.train, task.search, task.test)


def test_without_texts_it_is_the_embedded_one() -> None:
    task = pg.tasks.causal_lm(tiny_llama(), byte_tokenizer())
    assert task.test is not None
    assert task.train.source.fingerprint() != task.test.source.fingerprint()
    assert task.example_inputs["input_ids"].shape == (1, 64)  # type: ignore[index, call-overload]
    assert len(task.train) == 256
    rows = torch.randint(0, 256, (6, 64))
    given = pg.tasks.causal_lm(tiny_llama(), byte_tokenizer(), search=rows, test=rows[:2])
    assert given.test is not None
    assert (len(given.search), len(given.test)) == (6, 2)


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    save_pretrained_layout(tiny_llama(), byte_tokenizer(), tmp_path / "small")
    task = pg.tasks.causal_lm(tmp_path / "small", calibration=[TEXT], window=16)
    assert (task.name, task.tokenizer_folder) == ("small", tmp_path / "small")
    assert task.train.source.fingerprint() == make().train.source.fingerprint()
    assert pg.tasks.causal_lm(tmp_path / "small", encode).tokenizer_folder is None
    beside = pg.tasks.causal_lm(tiny_llama(), tmp_path / "small", calibration=[TEXT])
    assert (beside.name, beside.tokenizer_folder) == ("LlamaForCausalLM", tmp_path / "small")


def windows(task: CausalLM) -> list[Tensor]:
    assert task.test is not None
    return [next(iter(s.batches(999)))["input_ids"] for s in (task.train, task.search, task.test)]


def test_each_window_begins_with_the_token_that_the_tokenizer_puts_before_texts(sharp: Any) -> None:
    tokenizer = bos_tokenizer()
    task = dataclasses.replace(make(sharp, tokenizer=tokenizer, test=[TEXT[:75]]), autocast=False)
    assert task.test is not None
    for found in windows(task):
        assert found.shape[1] == 16
        assert not found[:, 0].any()
        assert found[:, 1:].all()
    rows = torch.tensor(encode(TEXT[:75])).view(5, 15)
    expected = torch.cat([torch.zeros(5, 1, dtype=torch.int64), rows], 1)
    assert torch.equal(windows(task)[2], expected)
    score = task.score(sharp, task.test).value
    assert score == pytest.approx(perplexity(sharp, expected), rel=1e-4)
    function = make(tokenizer=tokenizer.encode, test=[TEXT[:75]])
    assert torch.equal(windows(function)[2], expected)
    tokens = np.array([0, *encode(TEXT[:75])])
    assert torch.equal(windows(make(tokenizer=tokenizer, test=tokens))[2], expected)
    assert torch.equal(windows(make(tokenizer=tokenizer, test=rows, window=None))[2], rows)


def test_bos_says_whether_windows_begin_with_it() -> None:
    without = make(tokenizer=bos_tokenizer(), test=[TEXT[:79]], bos=False)
    assert windows(without)[2].flatten().tolist() == [0, *encode(TEXT[:79])]
    plain = make(tokenizer=byte_tokenizer(), test=[TEXT])
    function = make(test=[TEXT])
    for name in ("train", "search", "test"):  # none is added where the tokenizer adds none
        prints = {getattr(task, name).fingerprint() for task in (plain, function)}
        assert len(prints) == 1
    wanted = make(tiny_llama(bos_token_id=3), test=[TEXT[:75]], bos=True)
    for found in windows(wanted):
        assert found[:, 0].unique().tolist() == [3]
    with pytest.raises(DataError, match="bos=True, and neither tokenizer nor config names one"):
        make(tiny_llama(bos_token_id=None), bos=True)
    with pytest.raises(DataError, match="calibration holds token 999, and the network knows"):
        make(tiny_llama(bos_token_id=999), bos=True)
    with pytest.raises(DataError, match="test is an array of rows"):
        make(tiny_llama(bos_token_id=3), test=torch.ones(3, 16, dtype=torch.int64), bos=True)


class Pair(nn.Module):
    """Gives its logits as a part of something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.words, self.head, self.wrap = nn.Embedding(256, 8), nn.Linear(8, 256), wrap

    def forward(self, tokens: Tensor) -> Any:
        return self.wrap(self.head(self.words(tokens)))


def test_any_module_of_tokens_will_do() -> None:
    for wrap in (lambda x: x, lambda x: (x, None), lambda x: {"logits": x}):
        task = make(Pair(wrap))
        assert 200 < task.score(task.model).value < 400
    rows = texts(40, seed=0)
    toy = pg.tasks.causal_lm(ToyLanguageModel(), calibration=rows, window=10)
    assert 8 < toy.score(toy.model).value < 20
    result = pg.prune(toy, "l1/uniform", pg.Budget(keep_params=0.8))
    assert result.report["pruned"]["score"] > 0


def broken() -> Any:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    return model


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (None, {"calibration": ["short"]}, DataError, "calibration: the text has 5 tokens"),
        (None, {"test": ["short"]}, DataError, "test: the text has 5 tokens, a window 16"),
        (None, {"calibration": [TEXT[:20]]}, DataError, "another is needed to search on"),
        (None, {"calibration_tokens": 15}, DataError, "less than one window of 16"),
        (None, {"window": 0}, DataError, "calibration: window=0 must be at least 2"),
        (None, {"window": 65}, DataError, "window=65 is more than the network takes, 64"),
        (
            None,
            {"tokenizer": lambda _: [*range(250, 300)]},
            DataError,
            "calibration holds token 299, and the network knows 0 to 255: give the tokenizer",
        ),
        (None, {"calibration": np.array([3, -1])}, DataError, "holds token -1"),
        (None, {"tokenizer": None}, DataError, "is no tokenizer: give a network's folder"),
        (None, {"tokenizer": 5}, DataError, "tokenizer is a int"),
        (None, {"tokenizer": Path("nowhere")}, ModelError, "nowhere holds no tokenizer"),
        (None, {"calibration": Path("nowhere")}, DataError, "no file or folder nowhere"),
        (None, {"tokenizer": lambda _: []}, DataError, "has no tokens"),
        (Path("nowhere"), {}, ModelError, "there is no folder nowhere"),
        (broken, {}, ModelError, "the logits of LlamaForCausalLM hold NaN"),
        (lambda: Pair(lambda x: x[0]), {}, ModelError, r"returns shape \[2, 256\], not logits"),
        (
            lambda: Pair(lambda x: x.new_zeros(1, 5, 256)),
            {},
            ModelError,
            r"logits for \[1, 5\] tokens where \[1, 2\]",
        ),
        (lambda: Pair(lambda _: {}), {}, ModelError, "returns NoneType, not logits"),
        (lambda: nn.Linear(4, 4), {}, ModelError, r"Linear fails on token numbers \[1, 2\]"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    model: Any, given: dict[str, Any], error: type[PruneGraphError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        make(model() if callable(model) else model, **given)
    assert "\n" not in str(raised.value)


def test_splits_of_another_kind_are_refused() -> None:
    task = make()
    with pytest.raises(DataError, match="calibration is a SearchSplit, not a TrainSplit"):
        make(calibration=task.search, search=task.search)
    with pytest.raises(DataError, match="test is a SearchSplit, not a TestSplit"):
        make(test=task.search)
    with pytest.raises(DataError, match="needs a SearchSplit beside it"):
        make(calibration=task.train)
    with pytest.raises(DataError, match="choose at least one window"):
        task.score(task.model, task.search.take(torch.arange(0)))


def test_networks_that_broke_score_worst_in_a_search_and_fail_in_a_report() -> None:
    task = make()
    dense = task.dense_outputs(task.model, task.search.batches(4), autocast=False)
    found = task.measure(broken(), task.search.batches(4), autocast=False, dense_outputs=dense)
    assert found == (-1.0, 1e6, 1e6, None)
    with pytest.raises(ModelError, match="hold NaN: check its weights"):
        task.score(broken())
    with pytest.raises(ModelError, match=r"returns shape \[3\]"):
        logits_of(torch.zeros(3))


@pytest.mark.parametrize("method", ["magnitude", "l1/uniform", "taylor/global"])
def test_methods_prune_it(sharp: Any, method: str) -> None:
    task = make(sharp)
    weights = method == "magnitude"
    budget = pg.Budget(sparsity=0.5) if weights else pg.Budget(keep_params=0.8)
    result = pg.prune(task, method, budget)
    assert result.report["score_name"] == "perplexity"
    assert result.report["dense"]["score"] == task.score(sharp).value
    assert math.isfinite(result.report["pruned"]["score"])
    if not weights:
        left = sum(item.numel() for item in result.model.parameters())
        assert left <= 0.8 * sum(item.numel() for item in sharp.parameters())
    batch = next(iter(task.train.batches(1)))
    assert task.forward(result.model, batch).shape == (1, 16, 256)


def test_an_evaluator_compares_masks(sharp: Any) -> None:
    task = make(sharp)
    graph = pg.analyse(sharp, task.example_inputs)
    evaluator = Evaluator(task, graph, metric="kl")
    whole = evaluator.evaluate(graph.dense_mask())
    cut = evaluator.evaluate(graph.project(np.arange(graph.num_units), pg.Budget(keep_params=0.7)))
    assert whole.kl == pytest.approx(0.0, abs=1e-4)
    assert cut.kl is not None
    assert cut.kl > whole.kl
    part = evaluator.evaluate(graph.dense_mask(), evaluator.draw_subset(3, seed=0))
    assert part.num_images == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_trained_distilled_and_resumed(optimizer: Any, tmp_path: Path) -> None:
    def train(
        checkpoint: Path | None = None, progress: Callable[..., None] | None = None
    ) -> tuple[Any, tuple[float, ...]]:
        model, teacher = tiny_llama(seed=1), tiny_llama()
        config = FinetuneConfig(
            epochs=3, batch_size=4, optimizer=optimizer, peak_lr=0.01, distill_weight=0.5
        )
        done = finetune(
            model,
            make(model),
            config,
            seed=0,
            teacher=teacher,
            checkpoint=checkpoint,
            progress=progress,
        )
        return model, done.losses

    def stop(done: int, *_: Any) -> None:
        if done == 1:
            raise KeyboardInterrupt

    model, losses = train()
    assert losses[-1] < losses[0]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state", stop)
    resumed, again = train(tmp_path / "state")
    assert again == losses
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_families_of_transformers_are_measured_pruned_and_saved(
    family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    task = make(getattr(transformers, kind)(config).eval())
    assert 200 < task.score(task.model).value < 400
    result = pg.prune(task, "magnitude", pg.Budget(sparsity=0.5))
    save_pretrained_layout(result.model, None, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    batch = next(iter(task.train.batches(2)))
    with torch.no_grad():
        assert torch.equal(task.forward(again, batch), task.forward(result.model, batch))


def test_the_embedded_network_learns_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = embedded_text()
    short = dataclasses.replace(short, train=short.train[:60])
    monkeypatch.setattr(MODULE, "embedded_text", lambda: short)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model, trained = embedded.train_embedded(epochs=2)
    assert trained.losses[1] < trained.losses[0] < math.log(256)
    with pytest.raises(KeyboardInterrupt):
        embedded.train_embedded(epochs=2, checkpoint=tmp_path / "state", progress=stop)
    again, resumed = embedded.train_embedded(epochs=2, checkpoint=tmp_path / "state")
    assert resumed.resumed_epochs == 1
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    task = embedded.embedded_task(model)
    assert task.score(model).value < 100


@pytest.mark.data
def test_a_network_of_stories_has_its_published_perplexity(shared_dir: Path) -> None:
    folder = shared_dir / "pack" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs ../shared/pack, which is absent")
    rows = np.load(folder / "stories-257.npy", allow_pickle=False)
    task = pg.tasks.causal_lm(folder, calibration=rows[:64], test=rows[65:152])
    assert (len(task.train), len(task.search)) == (52, 12)
    assert round(task.score(task.model, task.test).value, 2) == 4.56
    pruned = pg.prune(task, "magnitude", pg.Budget(sparsity=0.5))
    assert task.score(pruned.model, task.test).value == pytest.approx(45.3, abs=0.2)


@pytest.mark.slow
@pytest.mark.data
def test_smollm2_has_its_known_perplexity(shared_dir: Path) -> None:
    given = os.environ.get("PRUNEGRAPH_SMOLLM2", "")
    if not Path(given, "config.json").is_file():
        pytest.skip("needs the folder of SmolLM2-135M in PRUNEGRAPH_SMOLLM2")
    texts_at = shared_dir / "pack" / "text"
    task = pg.tasks.causal_lm(
        given,
        calibration=texts_at / "wikitext2-valid.txt.gz",
        test=texts_at / "wikitext2-test.txt.gz",
    )
    assert task.test is not None
    first = task.test.take(torch.arange(8))
    assert task.score(task.model, first).value == pytest.approx(23.60, abs=0.1)
