"""Speech recognition in several languages: CTC, and the word error rate.

A batch is of one language. The score is the mean over languages of the word error rate: words that
were replaced, left out or put in, as a share of those that were said (Morris et al. 2004, jiwer).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from prunegraph.core.errors import DataError, ModelError, one_line
from prunegraph.core.extras import library
from prunegraph.core.precision import autocasting
from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit
from prunegraph.core.task import WORST_UTILITY, ExampleInputs, Score, Scores
from prunegraph.core.weight_mask import weights_for
from prunegraph.data.recordings import read_recordings
from prunegraph.data.speech import BLANK, Alphabet, SpeechData, proxy_speech
from prunegraph.graph import evaluation_mode, unwrap
from prunegraph.models.recogniser import PROXY_SIZES, SPEECH_SIZES, build_recogniser
from prunegraph.tasks.base import SplitTask, check_splits
from prunegraph.tasks.classification import model_device

BATCH_SIZE = 64
"""Utterances a forward."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SpeechRecognition(SplitTask):
    """A recogniser that CTC trains; a ``Task``. Its batches are those of ``data.speech``.

    Attributes:
        model: the dense network, of ``(features [b, t, F], lengths [b])``; it returns logits
            ``[b, t', tokens]`` and their lengths ``[b]``. Nothing changes it.
        example_inputs: what its forward takes.
        train: utterances for gradients, calibration and training.
        search: utterances that masks are scored on.
        test: utterances that are measured once, at the end.
        languages: their names, by number.
        alphabet: of the texts.
        name: of the network, in rows and errors.
        autocast: whether the network may run in bfloat16, which takes longer on small matrices.
    """

    kind: ClassVar[str] = "speech_recognition"
    score_name: ClassVar[str] = "word error rate"
    higher_is_better: ClassVar[bool] = False

    model: nn.Module
    example_inputs: ExampleInputs
    train: TrainSplit
    search: SearchSplit
    test: TestSplit | None
    languages: tuple[str, ...]
    alphabet: Alphabet
    name: str = "recogniser"
    autocast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.train, self.search, self.test, "nothing is chosen on test utterances")
        _jiwer()  # what is missing is told before any work

    def group_of(self, batch: Batch) -> str:
        """Return the language of a batch.

        Raises:
            DataError: it is of several.
        """
        numbers = batch["languages"].unique().tolist()
        if len(numbers) != 1:
            msg = f"a batch is of {len(numbers)} languages: load batches by Split.batches"
            raise DataError(msg)
        language: str = self.languages[numbers[0]]
        return language

    def call(self, model: nn.Module, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Run a network with the weights of the batch's language, if it has such."""
        weights = weights_for(unwrap(model), self.group_of(batch))
        if not weights:
            return model(*args, **kwargs)
        return functional_call(unwrap(model), weights, args, kwargs)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits ``[b, t', tokens]`` of a batch, and their lengths ``[b]``.

        Raises:
            ModelError: the network returns something else.
        """
        batch = self.place(batch, model)
        outputs = self.call(model, batch, batch["features"], batch["lengths"])
        return checked_outputs(outputs, len(self.alphabet), self.name)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean CTC loss a token in nats, in float32 (Graves et al. 2006)."""
        logits, lengths = self.forward(model, batch)
        batch = self.place(batch, model)
        likelihood = logits.float().log_softmax(2).transpose(0, 1)  # [t', b, tokens]
        loss: Tensor = F.ctc_loss(
            likelihood,
            batch["targets"],
            lengths,
            batch["target_lengths"],
            blank=BLANK,
            zero_infinity=True,
        )
        return loss

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean KL divergence a frame from another network times squared temperature."""
        other, lengths = dense
        own = outputs[0] if isinstance(outputs, tuple) else outputs.logits  # of transformers
        kl = F.kl_div(
            (own.float() / temperature).log_softmax(2),
            (other.float() / temperature).log_softmax(2),
            reduction="none",
            log_target=True,
        ).sum(2)  # [b, t']
        heard = torch.arange(kl.shape[1], device=kl.device) < lengths[:, None]
        distance: Tensor = (kl * heard).sum() / heard.sum()
        return temperature**2 * distance

    def transcribe(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the most likely text of each utterance, frame by frame."""
        logits, lengths = self.forward(model, batch)
        texts = []
        for row, length in zip(logits.argmax(2).tolist(), lengths.tolist(), strict=True):
            heard = row[:length]
            pairs = zip(heard, [None, *heard], strict=False)
            texts.append(self.alphabet.decode([token for token, last in pairs if token != last]))
        return texts

    def references(self, batch: Batch) -> list[str]:
        """Return the text of each utterance."""
        pairs = zip(batch["targets"].tolist(), batch["target_lengths"].tolist(), strict=True)
        return [self.alphabet.decode(tokens[:length]) for tokens, length in pairs]

    def group_scores(self, model: nn.Module, split: Split | None = None) -> dict[str, float]:
        """Return the word error rate of each language, a share; None = on the search split.

        Raises:
            DataError: the split is empty.
            ModelError: outputs hold NaN.
        """
        batches = (self.search if split is None else split).batches(BATCH_SIZE)
        return self._error_rates(model, batches, autocast=self.autocast)

    def _error_rates(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> dict[str, float]:
        said: dict[str, list[str]] = {}
        heard: dict[str, list[str]] = {}
        with evaluation_mode(model), torch.inference_mode():
            for batch in batches:
                language = self.group_of(batch)
                with autocasting(model_device(model), wanted=autocast):
                    heard.setdefault(language, []).extend(self.transcribe(model, batch))
                said.setdefault(language, []).extend(self.references(batch))
        if not said:
            msg = f"there are no utterances to score {self.name} on: choose at least one"
            raise DataError(msg)
        return {name: word_error_rate(said[name], heard[name]) for name in said}

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return the word error rate on a split, a share: the mean over languages."""
        return self._score(self.group_scores(model, split))

    def _score(self, rates: Mapping[str, float]) -> Score:
        mean = sum(rates.values()) / len(rates)
        return Score(name=self.score_name, value=mean, higher_is_better=False)

    @cached_property
    def dense_score(self) -> Score:
        """The dense network's word error rate on the search split."""
        return self.score(self.model)

    def dense_outputs(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Tensor | None:
        """Return None: networks are compared by what they score."""
        del model, batches, autocast
        return None  # of two kinds of values

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return the word error rate's utility and the loss; the worst if it is not finite."""
        del dense_outputs
        held = list(batches)
        with evaluation_mode(model), torch.inference_mode():
            losses = [float(self.loss(model, batch)) for batch in held]
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            return Scores(accuracy=WORST_UTILITY, loss=1e6, kl=None, soft_accuracy=None)
        rates = self._error_rates(model, held, autocast=autocast and self.autocast)
        utility = self._score(rates).relative_to(self.dense_score)
        return Scores(accuracy=utility, loss=loss, kl=None, soft_accuracy=None)


def checked_outputs(outputs: object, tokens: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the logits ``[b, t', tokens]`` and lengths ``[b]`` that a network returns.

    Raises:
        ModelError: it returns something else, or too few tokens for the alphabet.
    """
    pair = outputs if isinstance(outputs, tuple) and len(outputs) == 2 else (None, None)
    logits, lengths = pair
    if not (isinstance(logits, Tensor) and logits.ndim == 3 and isinstance(lengths, Tensor)):
        msg = f"{name} returns {type(outputs).__name__}, not logits [b, t, tokens] and lengths [b]"
        raise ModelError(msg)
    if logits.shape[2] != tokens:
        msg = f"{name} tells {logits.shape[2]} tokens apart, the alphabet has {tokens}: use its own"
        raise ModelError(msg)
    return logits, lengths


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Return the share of words that were replaced, left out or put in.

    Raises:
        ConfigError: jiwer is not installed.
    """
    return float(_jiwer().wer(list(said), list(heard)))


def _jiwer() -> Any:
    return library("word error rates need", "jiwer", "speech")


def speech_recognition(
    model: nn.Module | None = None,
    data: SpeechData | Path | str | None = None,
    *,
    languages: Sequence[str] | None = None,
    seed: int = 0,
    name: str | None = None,
) -> SpeechRecognition:
    """Return the task of a recogniser in several languages.

    Args:
        model: a network of ``(features [b, t, F], lengths [b])`` that returns logits ``[b, t',
            tokens]``, token 0 the blank, and their lengths; None = a small conformer-like one with
            fresh weights.
        data: utterances; a folder of recordings (``data.recordings.read_recordings``); None = the
            embedded proxy, rows of digits that stand for speech.
        languages: some of those of the data; None = all.
        seed: of fresh weights.
        name: of the network, in rows and errors.

    Raises:
        ConfigError: a library is needed and not installed.
        PruneGraphError: data are missing or damaged, a language is unknown, the network does not
            fit.
    """
    found = load_speech_data(data, languages)
    batch = next(iter(found.train.batches(1)))
    inputs = (batch["features"], batch["lengths"])
    if model is None:
        sizes = PROXY_SIZES if found.proxy else SPEECH_SIZES
        bands, tokens = inputs[0].shape[2], len(found.alphabet)
        model = build_recogniser(seed=seed, features=bands, tokens=tokens, **sizes)
    task = SpeechRecognition(
        model=model,
        example_inputs=inputs,
        train=found.train,
        search=found.search,
        test=found.test,
        languages=found.languages,
        alphabet=found.alphabet,
        name=name or type(unwrap(model)).__name__.lower(),
    )
    try:
        with evaluation_mode(model), torch.inference_mode():
            task.forward(model, batch)
    except ModelError:
        raise
    except Exception as error:  # networks fail in any way
        msg = f"{task.name} fails on features {list(inputs[0].shape)}: {one_line(error, 200)}"
        raise ModelError(msg) from error
    return task


def load_speech_data(
    data: SpeechData | Path | str | None, languages: Sequence[str] | None
) -> SpeechData:
    """Return utterances: those that are given, of a folder, or the embedded proxy."""
    if data is None:
        return proxy_speech(languages)
    return data if isinstance(data, SpeechData) else read_recordings(data, languages)
