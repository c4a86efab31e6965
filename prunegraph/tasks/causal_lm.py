"""Causal language models: next-token loss, perplexity, and the divergence from the dense network.

Perplexity as in the literature (GPTQ, SparseGPT, Wanda): the text in windows that do not overlap;
in each, all tokens but the first are predicted from those before them. Where the tokenizer puts a
token before a text, that is the first of each window.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import DataError, ModelError, one_line
from prunegraph.core.precision import autocasting
from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit
from prunegraph.core.task import WORST_UTILITY, ExampleInputs, Score, Scores
from prunegraph.data.embedded_text import embedded_text
from prunegraph.data.text import IGNORED, Text
from prunegraph.graph import evaluation_mode, unwrap
from prunegraph.models.pretrained import has_tokenizer, load_pretrained, load_tokenizer
from prunegraph.tasks.base import SplitTask
from prunegraph.tasks.classification import model_device, soft_divergence
from prunegraph.tasks.texts import TextReader, begin_token, encoder

LOGITS_BYTES = 2**27
"""Of the float32 logits that are alive at once while a network is measured."""

KEPT = 256
"""Of a dense network's probabilities, the largest that are kept at each position; the others
count as one. The divergence of such coarser distributions is at most the full one."""

LARGEST = 700.0
"""Mean loss from which a perplexity is as good as infinite."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalLM(SplitTask):
    """A causal language model; a ``Task``. Its batches are ``{"input_ids": [b, t] int64}``.

    Attributes:
        model: the dense network; nothing changes it.
        example_inputs: what its forward takes.
        train: windows for gradients, calibration and training.
        search: windows that masks are scored on.
        test: windows that are measured once, at the end, or None.
        tokenizer: makes tokens of texts; None = texts came as tokens.
        tokenizer_folder: where the tokenizer's files lie, or None.
        autocast: whether the network may run in bfloat16.
        name: of the network, in rows and errors.
    """

    kind: ClassVar[str] = "causal_lm"
    score_name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    model: nn.Module
    example_inputs: ExampleInputs
    train: TrainSplit
    search: SearchSplit
    test: TestSplit | None = None
    tokenizer: Any = None
    tokenizer_folder: Path | None = None
    autocast: bool = True
    name: str = "language model"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits ``[b, t, vocabulary]`` of a batch.

        Raises:
            ModelError: the network returns something else.
        """
        ids = batch["input_ids"].to(model_device(model))
        return logits_of(model(ids, **self._options), model)

    @cached_property
    def _options(self) -> dict[str, bool]:
        """What keeps networks of transformers from filling a cache that nobody reads."""
        return {"use_cache": False} if _takes(self.model, "use_cache") else {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the predicted tokens in nats, computed in float32."""
        logits = self.forward(model, batch)
        targets = _targets(batch).to(logits.device)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean KL divergence a token from other logits times the squared temperature.

        Logits are ``[b, t, vocabulary]``.
        """
        own, other = logits_of(outputs).flatten(0, -2), logits_of(dense).flatten(0, -2)
        return soft_divergence(own, other, temperature)

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return the perplexity on a split; None = the search split.

        Raises:
            DataError: the split is empty.
            ModelError: the logits hold NaN.
        """
        batches = (self.search if split is None else split).batches(32)
        loss, _ = self._totals(model, batches, autocast=self.autocast)
        if math.isnan(loss):
            msg = f"the logits of {self.name} hold NaN: check its weights"
            raise ModelError(msg)
        return self._score(loss)

    def _score(self, loss: float) -> Score:
        value = math.exp(min(loss, LARGEST))
        return Score(name=self.score_name, value=value, higher_is_better=False)

    @cached_property
    def dense_score(self) -> Score:
        """The dense network's perplexity on the search split."""
        return self.score(self.model)

    def dense_outputs(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Tensor:
        """Return the largest probabilities of a network, on the CPU.

        Returns:
            ``[n, t - 1, min(KEPT, vocabulary), 2]`` float32: log-probability, token.
        """
        kept = []
        for logits, _ in self._logits(model, batches, autocast=autocast):
            values, tokens = logits.log_softmax(2).topk(min(KEPT, logits.shape[2]), dim=2)
            kept.append(torch.stack([values, tokens.float()], 3).cpu())
        return torch.cat(kept)

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return the perplexity's utility, the loss, and the divergence if it is asked for.

        The utility is relative to the dense network's perplexity on the search split.
        """
        loss, kl = self._totals(model, batches, autocast=autocast, dense=dense_outputs)
        if not math.isfinite(loss + kl):
            worst = None if dense_outputs is None else 1e6
            return Scores(accuracy=WORST_UTILITY, loss=1e6, kl=worst, soft_accuracy=None)
        return Scores(
            accuracy=self._score(loss).relative_to(self.dense_score),
            loss=loss,
            kl=None if dense_outputs is None else kl,
            soft_accuracy=None,
        )

    def _totals(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense: Tensor | None = None,
    ) -> tuple[float, float]:
        """Return the mean loss of the predicted tokens, and the mean divergence from dense ones."""
        loss, count, kl, first = 0.0, 0, 0.0, 0
        for logits, targets in self._logits(model, batches, autocast=autocast):
            likelihood = logits.log_softmax(2)  # [b, t - 1, vocabulary]
            chosen = likelihood.flatten(0, 1), targets.flatten()
            loss += float(F.nll_loss(*chosen, reduction="sum"))
            count += int((targets != IGNORED).sum())
            if dense is not None:
                part = dense[first : first + len(targets)].to(logits.device)
                kl += float(coarse_divergence(part, likelihood).sum()) / part.shape[1]
            first += len(targets)
        if not count:
            msg = f"there are no tokens to score {self.name} on: choose at least one window"
            raise DataError(msg)
        return loss / count, kl / first

    def _logits(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 logits ``[b, t - 1, vocabulary]`` and what they should predict."""
        device = model_device(model)
        most = 1
        with evaluation_mode(model), torch.inference_mode():
            for batch in batches:
                rows = 0
                while rows < len(batch["input_ids"]):
                    part = {name: item[rows : rows + most] for name, item in batch.items()}
                    with autocasting(device, wanted=autocast and self.autocast):
                        logits = self.forward(model, part)
                    rows += most
                    most = max(LOGITS_BYTES // (4 * logits[0].numel()), 1)
                    yield logits[:, :-1].float(), _targets(part).to(device)


def coarse_divergence(dense: Tensor, likelihood: Tensor) -> Tensor:
    """Return the KL divergence at each position, all tokens that are not kept counted as one.

    Args:
        dense: ``[b, t, kept, 2]``, see ``CausalLM.dense_outputs``.
        likelihood: ``[b, t, vocabulary]`` log-probabilities of the other network.

    Returns:
        ``[b, t]`` in nats.
    """
    expected, tokens = dense[..., 0], dense[..., 1].long()
    found = likelihood.gather(2, tokens)
    kl = (expected.exp() * (expected - found)).sum(2)
    if tokens.shape[2] < likelihood.shape[2]:
        tiny = torch.finfo(torch.float32).eps
        rest = (1.0 - expected.exp().sum(2)).clamp_min(tiny)
        kl += rest * (rest / (1.0 - found.exp().sum(2)).clamp_min(tiny)).log()
    return kl


def logits_of(outputs: object, model: nn.Module | None = None) -> Tensor:
    """Return the logits ``[b, t, vocabulary]`` in what a network returns.

    Raises:
        ModelError: there are none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    found = getattr(found, "logits", found)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if isinstance(found, Tensor) and found.ndim == 3 and found.is_floating_point():
        return found
    what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    name = "the network" if model is None else type(model).__name__
    msg = f"{name} returns {what}, not logits [windows, tokens, vocabulary]: give a causal LM"
    raise ModelError(msg)


def _targets(batch: Batch) -> Tensor:
    """Return ``[b, t - 1]`` the tokens to predict, ``IGNORED`` where none is scored."""
    targets: Tensor = batch.get("labels", batch["input_ids"])[:, 1:]
    return targets


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(unwrap(model).forward).parameters


def causal_lm(
    model: nn.Module | Path | str,
    tokenizer: Any = None,
    *,
    calibration: Text | TrainSplit | None = None,
    search: Text | SearchSplit | None = None,
    test: Text | TestSplit | None = None,
    window: int | None = None,
    stride: int | None = None,
    calibration_tokens: int | None = 16_384,
    bos: bool | None = None,
    seed: int = 0,
    name: str | None = None,
) -> CausalLM:
    """Return the task of a causal language model.

    A text is a file (UTF-8, ``.gz`` too), a folder of text files, a list of documents, an array of
    tokens ``[n]`` or ``[rows, tokens]`` (or its ``.npy`` file), a data set with a column ``text``,
    or ``datasets:NAME:CONFIG:SPLIT`` of the ``datasets`` library.

    Args:
        model: a network of token numbers ``[b, t]`` that returns logits ``[b, t, vocabulary]``, or
            the folder of one (``from_pretrained``). Nothing changes it.
        tokenizer: of transformers, the folder of one, or a function from text to token numbers;
            None = that of the network's folder.
        calibration: text for gradients, statistics and training, from which windows are drawn;
            None = the English text that comes with Python.
        search: text that masks are scored on; None = other windows of the calibration text.
        test: text that is measured once, at the end.
        window: tokens of a window; None = 1,024, less if the network takes fewer, the whole row of
            an array of rows.
        stride: tokens between the starts of test windows, and of those of a given search text;
            each token is scored once. None = windows do not overlap.
        calibration_tokens: how many are drawn; None = all.
        bos: whether the beginning-of-sequence token, as one of its tokens, begins each window of a
            text; None = where a tokenizer of transformers adds one. Rows of an array stay.
        seed: fixes the draw.
        name: of the network, in rows and errors; default: the folder's, or the class's.

    Raises:
        ConfigError: transformers is needed and not installed.
        PruneGraphError: a text is missing, too short, no text, or made by another tokenizer; the
            network cannot be loaded, or returns no finite logits.
    """
    folder = None if isinstance(model, nn.Module) else Path(model)
    network = model if isinstance(model, nn.Module) else load_pretrained(model)
    beside = folder if folder is not None and has_tokenizer(folder) else None
    kept = Path(tokenizer) if isinstance(tokenizer, str | Path) else beside
    if isinstance(tokenizer, str | Path | None):
        tokenizer = None if kept is None else load_tokenizer(kept)
    else:
        kept = None
    if calibration is None:
        text = embedded_text()
        calibration = text.train
        search = text.search if search is None else search
        test = text.test if test is None else test
    longest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    reader = TextReader(
        encode=encoder(tokenizer),
        vocabulary=_vocabulary(network),
        longest=longest if isinstance(longest, int) else None,
        window=window,
        stride=stride,
        bos=begin_token(tokenizer, network, bos),
        rows=not bos,
    )
    train, held_out = reader.calibration(calibration, calibration_tokens, seed, cut=search is None)
    if search is not None:
        held_out = reader.split(SearchSplit, search, "search")
    assert held_out is not None  # it is cut if it is not given
    ids = next(iter(train.batches(1)))["input_ids"].to(model_device(network))
    return CausalLM(
        model=network,
        example_inputs={"input_ids": ids} if _takes(network, "input_ids") else ids,
        train=train,
        search=held_out,
        test=None if test is None else reader.split(TestSplit, test, "test"),
        tokenizer=tokenizer,
        tokenizer_folder=kept,
        name=name or (type(unwrap(network)).__name__ if folder is None else folder.resolve().name),
    )


def _vocabulary(model: nn.Module) -> int:
    """Return how many tokens a network knows, as a forward on two of them shows.

    Raises:
        ModelError: it fails, or returns no finite logits for each of them.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model_device(model))
    try:
        with evaluation_mode(model):
            logits = logits_of(model(ids), model)
    except ModelError:
        raise
    except Exception as error:  # networks fail in any way
        msg = f"{type(model).__name__} fails on token numbers [1, 2]: {one_line(error, 200)}"
        raise ModelError(msg) from error
    if logits.shape[:2] != ids.shape:
        msg = (
            f"{type(model).__name__} returns logits for {list(logits.shape[:2])} tokens where "
            "[1, 2] are given: give a causal LM without a prompt of its own (peft)"
        )
        raise ModelError(msg)
    if not bool(logits.isfinite().all()):
        msg = f"the logits of {type(model).__name__} hold NaN or infinity: check its weights"
        raise ModelError(msg)
    return logits.shape[2]
