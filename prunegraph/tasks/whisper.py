"""Whisper of transformers as a recogniser of short utterances (Radford et al. 2022).

Its encoder takes 30 s. Here its window is as long as the utterances need, which takes time and
memory in proportion. Such a network repeats itself when it writes freely, so where a language has
few texts, the likeliest of them is taken.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ModelError
from prunegraph.core.splits import Batch
from prunegraph.data.speech import SpeechData
from prunegraph.data.text import IGNORED, tokenizing
from prunegraph.graph import unwrap
from prunegraph.models.pretrained import load_pretrained, load_tokenizer
from prunegraph.tasks.speech_recognition import SpeechRecognition, load_speech_data

FEW_TEXTS = 16
"""Texts of a language up to which it is a closed set."""

LOUD = 2.0
"""How far silence lies below the loudest number of Whisper's features."""

COVERED = 0.99
"""Share of the train utterances that fit into the window; longer ones are cut."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WhisperRecognition(SpeechRecognition):
    """Whisper as a ``Task``; its batches are those of ``data.speech``.

    Attributes:
        tokenizer: of transformers.
        tokenizer_folder: where its files lie.
        closed: the texts of each language, of which one is taken; empty = any is written.
    """

    tokenizer: Any
    tokenizer_folder: Path
    closed: Mapping[str, Sequence[str]]
    autocast: bool = True

    @property
    def window(self) -> int:
        """Frames that the encoder takes."""
        return 2 * int(_config(self.model).max_source_positions)

    @property
    def bands(self) -> int:
        """Numbers of a frame."""
        return int(_config(self.model).num_mel_bins)

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """The tokens that begin a text of each language."""
        config, known = _config(self.model), self.tokenizer.get_vocab()
        rest = [known[each] for each in ("<|transcribe|>", "<|notimestamps|>") if each in known]
        return {
            name: [
                config.decoder_start_token_id,
                *([known[f"<|{name}|>"]] if f"<|{name}|>" in known else []),
                *rest,
            ]
            for name in self.languages
        }

    def inputs(self, batch: Batch) -> Tensor:
        """Return the features ``[b, F, window]``, silent behind the end."""
        features, lengths = batch["features"], batch["lengths"]
        heard = torch.arange(features.shape[1], device=lengths.device) < lengths[:, None]
        peak = features.masked_fill(~heard[..., None], -torch.inf).amax((1, 2), keepdim=True)
        whole = torch.where(heard[..., None], features, peak - LOUD)
        whole = whole[:, : self.window].transpose(1, 2)  # [b, F, t]
        silent = (peak - LOUD).expand(-1, whole.shape[1], self.window - whole.shape[2])
        return torch.cat([whole, silent], 2)

    def labels(self, language: str, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the decoder reads ``[b, u]``, should say ``[b, u]``, and lengths ``[b]``."""
        prompt, end = self.prompts[language], _config(self.model).eos_token_id
        with tokenizing():
            rows = [
                [*prompt, *self.tokenizer(text, add_special_tokens=False)["input_ids"], end]
                for text in texts
            ]
        lengths = torch.tensor([len(row) - 1 for row in rows])
        longest = int(lengths.max())
        read = torch.tensor([row[:-1] + [end] * (longest + 1 - len(row)) for row in rows])
        told = torch.tensor([row[1:] + [IGNORED] * (longest + 1 - len(row)) for row in rows])
        told[:, : len(prompt) - 1] = IGNORED
        return read, told, lengths

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits ``[b, u, tokens]`` of the right texts, and their lengths ``[b]``."""
        batch = self.place(batch, model)
        read, _, lengths = self.labels(self.group_of(batch), self.references(batch))
        device = batch["features"].device
        options = {"input_features": self.inputs(batch), "decoder_input_ids": read.to(device)}
        outputs = self.call(model, batch, **options, use_cache=False)
        return outputs.logits, lengths.to(device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the tokens of the texts in nats, in float32."""
        logits, _ = self.forward(model, batch)
        _, told, _ = self.labels(self.group_of(batch), self.references(batch))
        return F.cross_entropy(logits.float().flatten(0, 1), told.flatten().to(logits.device))

    def transcribe(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return the likeliest text of each utterance: of few, or word piece by word piece."""
        batch, language = self.place(batch, model), self.group_of(batch)
        states: Tensor | None = None

        def logits(read: Tensor) -> Tensor:
            """Return the logits ``[b, u, tokens]``; the encoder runs once."""
            nonlocal states
            given: dict[str, Any] = {"input_features": self.inputs(batch)}
            if states is not None:
                given = {"encoder_outputs": (states,)}
            read = read.to(batch["features"].device)
            outputs = self.call(model, batch, **given, decoder_input_ids=read, use_cache=False)
            states = outputs.encoder_last_hidden_state
            return outputs.logits.float()  # type: ignore[no-any-return]

        count, texts = len(batch["features"]), self.closed.get(language, ())
        if not texts:
            return self._written(logits, language, count)
        losses = []
        for text in texts:
            read, told, _ = self.labels(language, [text] * count)
            likely = logits(read).transpose(1, 2)
            losses.append(F.cross_entropy(likely, told.to(likely.device), reduction="none").sum(1))
        return [texts[at] for at in torch.stack(losses).argmin(0).tolist()]

    def _written(self, logits: Any, language: str, count: int) -> list[str]:
        """Return texts, the likeliest token after another, up to the longest known one."""
        read = torch.tensor([self.prompts[language]] * count)
        first, end = read.shape[1], _config(self.model).eos_token_id
        ended = torch.zeros(count, dtype=torch.bool)
        for _ in range(self._longest):
            token = logits(read)[:, -1].argmax(1).cpu().masked_fill(ended, end)
            ended |= token == end
            read = torch.cat([read, token[:, None]], 1)
            if bool(ended.all()):
                break
        rows = [[token for token in row[first:] if token != end] for row in read.tolist()]
        with tokenizing():
            texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        return [" ".join(text.split()) for text in texts]

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest train text, and a few more."""
        source: Any = self.train.source
        texts = set(map(source.clips.text, source.parts))
        with tokenizing():
            ids = self.tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
        return max(map(len, ids)) + 2


def whisper_recognition(
    folder: Path | str,
    data: SpeechData | Path | str,
    *,
    languages: Sequence[str] | None = None,
    name: str | None = None,
) -> WhisperRecognition:
    """Return the task of a Whisper network on short utterances.

    Args:
        folder: what ``save_pretrained`` has written, with its tokenizer.
        data: recordings, a folder or read ones.
        languages: some of those of the data; None = all.
        name: of the network, in rows and errors; default: the folder's.

    Raises:
        ConfigError: transformers is not installed.
        PruneGraphError: the folder holds no Whisper, or data do not fit it.
    """
    folder = Path(folder)
    model = load_pretrained(folder, kind="AutoModelForSpeechSeq2Seq")
    config = _config(model)
    found = load_speech_data(data, languages)
    batch = next(iter(found.train.batches(1)))
    bands = batch["features"].shape[2]
    if getattr(config, "num_mel_bins", None) != bands:
        msg = f"{folder} takes {getattr(config, 'num_mel_bins', 'no')} bands of sound, not {bands}"
        raise ModelError(msg)
    source: Any = found.train.source
    lengths = [sum(len(source.clips.features[c]) for c in part) for part in source.parts]
    needed = int(torch.tensor(lengths, dtype=torch.float64).quantile(COVERED)) // 2 + 1
    shorten(model, min(needed, config.max_source_positions))
    task = WhisperRecognition(
        model=model,
        example_inputs={},
        train=found.train,
        search=found.search,
        test=found.test,
        languages=found.languages,
        alphabet=found.alphabet,
        name=name or folder.resolve().name,
        tokenizer=load_tokenizer(folder),
        tokenizer_folder=folder,
        closed=_closed(found),
    )
    start = torch.tensor([[config.decoder_start_token_id]])
    inputs = {"input_features": task.inputs(batch), "decoder_input_ids": start}
    return dataclasses.replace(task, example_inputs=inputs)


def shorten(model: nn.Module, positions: int) -> None:
    """Give Whisper an encoder window of so many positions of 20 ms, in place.

    Its positions are sinusoids, so the first ones are the right ones.
    """
    network: Any = model
    encoder = network.get_encoder()
    weight = encoder.embed_positions.weight[:positions].detach().clone()
    encoder.embed_positions = nn.Embedding(*weight.shape)
    encoder.embed_positions.weight = nn.Parameter(weight, requires_grad=False)
    encoder.config.max_source_positions = network.config.max_source_positions = positions
    encoder.max_source_positions = positions


def _closed(data: SpeechData) -> dict[str, tuple[str, ...]]:
    """Return the train texts of each language that has few."""
    source: Any = data.train.source
    found: dict[str, set[str]] = {}
    for part in source.parts:
        language = data.languages[source.clips.languages[part[0]]]
        found.setdefault(language, set()).add(source.clips.text(part))
    return {name: tuple(sorted(t)) for name, t in found.items() if len(t) <= FEW_TEXTS}


def _config(model: nn.Module) -> Any:
    return unwrap(model).config
