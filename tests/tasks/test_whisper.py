"""A tiny Whisper with random weights: its window, its loss, closed texts and free ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.weight_mask import GroupedMask
from prunegraph.data.speech import SpeechData
from prunegraph.methods.context import Context
from prunegraph.methods.pathways import Pathways
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.models.pretrained import load_pretrained, save_pretrained_layout
from prunegraph.tasks.whisper import WhisperRecognition, whisper_recognition
from support.speech import FEATURES, save_whisper, tiny_speech


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper") / "tiny")


@pytest.fixture(scope="module")
def task(folder: Path) -> WhisperRecognition:
    return whisper_recognition(folder, tiny_speech())


def single(data: SpeechData) -> SpeechData:
    """Return the utterances of one word alone, of which there are four a language."""
    changed: dict[str, Any] = {}
    for name in ("train", "search", "test"):
        split: Any = getattr(data, name)
        parts = [part for part in split.source.parts if len(part) == 1]
        source = dataclasses.replace(split.source, parts=parts)
        changed[name] = type(split)(source, torch.arange(len(parts)))
    return dataclasses.replace(data, **changed)


def test_its_window_is_as_long_as_the_utterances(task: WhisperRecognition, folder: Path) -> None:
    assert task.window == 14  # two words of six frames, and one position more
    batch = next(iter(task.test.batches(5)))  # type: ignore[union-attr]
    inputs = task.inputs(batch)
    assert inputs.shape == (5, FEATURES, 14)
    short = int(batch["lengths"].argmin())
    end = int(batch["lengths"][short])
    heard = batch["features"][short, :end]
    assert torch.equal(inputs[short, :, :end], heard.T)
    assert torch.allclose(inputs[short, :, end:], heard.max() - 2.0)
    whole = load_pretrained(folder, kind="AutoModelForSpeechSeq2Seq")
    kept = whole.model.encoder.embed_positions.weight[:7]  # type: ignore[union-attr]
    assert torch.equal(task.model.model.encoder.embed_positions.weight, kept)  # type: ignore[union-attr]


def test_the_loss_counts_texts_and_ends_alone(task: WhisperRecognition) -> None:
    read, told, lengths = task.labels("ab", ["a", "ab"])
    assert read.tolist() == [[256, 97, 257], [256, 97, 98]]
    assert told.tolist() == [[97, 257, -100], [97, 98, 257]]
    assert lengths.tolist() == [2, 3]
    batch = next(iter(task.train.batches(4)))
    assert task.loss(task.model, batch).item() == pytest.approx(5.5, abs=0.5)  # log of 260
    outputs = task.forward(task.model, batch)
    assert task.divergence(outputs, outputs) == 0.0


def test_of_few_texts_the_likeliest_is_taken(folder: Path) -> None:
    own = whisper_recognition(folder, single(tiny_speech()))
    assert own.closed == {"ab": ("a", "ab", "b", "ba"), "xy": ("x", "xy", "y", "yx")}
    batch = next(iter(own.test.batches(3)))  # type: ignore[union-attr]
    texts = own.transcribe(own.model, batch)
    wanted = []
    for at in range(3):
        one = {name: item[at : at + 1] for name, item in batch.items()}
        likely = []
        for text in own.closed["ab"]:
            read, told, _ = own.labels("ab", [text])
            inputs = own.inputs(one)
            logits = own.model(input_features=inputs, decoder_input_ids=read).logits[0]
            likely.append(logits.log_softmax(1).gather(1, told[0, :, None]).sum().item())
        wanted.append(own.closed["ab"][likely.index(max(likely))])
    assert texts == wanted


def test_of_many_texts_any_is_written(task: WhisperRecognition) -> None:
    task = dataclasses.replace(task, closed={})
    scores = task.group_scores(task.model)
    assert set(scores) == {"ab", "xy"}
    assert all(score > 0.5 for score in scores.values())  # it knows nothing


def test_its_languages_get_masks_and_its_folder_stays_one(
    task: WhisperRecognition, tmp_path: Path
) -> None:
    context = Context(task=task, structure=None, seed=0, reconstruct=False)
    method = Pathways(epochs=1, batch_size=8, every=2, lr=1e-3)
    result = method.prune(context.problem(Budget(sparsity=0.7)))
    assert isinstance(result.mask, GroupedMask)
    assert result.model is not None
    assert result.mask.sparsity == pytest.approx(0.7, abs=1e-3)
    assert "proj_out.weight" not in result.mask.keep
    save_pretrained_layout(result.model, task.tokenizer_folder, tmp_path / "pruned")
    again = load_pretrained(tmp_path / "pruned", kind="AutoModelForSpeechSeq2Seq")
    result.mask.attach(again)
    assert task.group_scores(again) == task.group_scores(result.model)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes 8 bands of sound, not 6"):
        whisper_recognition(save_whisper(tmp_path / "other", bands=8), tiny_speech())
    save_pretrained_layout(build_embedded(), byte_tokenizer(), tmp_path / "llama")
    with pytest.raises(ModelError, match="cannot be loaded as a SpeechSeq2Seq"):
        whisper_recognition(tmp_path / "llama", tiny_speech())
