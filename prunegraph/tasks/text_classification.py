"""Classes, or a number, of sentences and pairs of them: what the tasks of GLUE ask for."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ConfigError, DataError, ModelError, suggest
from prunegraph.core.extras import Late
from prunegraph.core.masks import Float64Array
from prunegraph.core.precision import autocasting
from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit
from prunegraph.core.task import WORST_UTILITY, ExampleInputs, Score, Scores
from prunegraph.data.sentences import EncodedSentences, SentenceTable, cut, read_table
from prunegraph.graph import evaluation_mode
from prunegraph.models.pretrained import load_encoder, load_tokenizer
from prunegraph.tasks.base import SplitTask, check_splits
from prunegraph.tasks.classification import model_device, soft_divergence
from prunegraph.tasks.outputs import class_logits

stats, metrics = Late("scipy.stats"), Late("sklearn.metrics")

BATCH_SIZE = 64
"""Rows of a forward that measures, of about equal length."""

WINDOW = 128
"""Most tokens of a row: longer ones are cut."""


def _pearson(wanted: Float64Array, given: Float64Array) -> float:
    constant = np.ptp(wanted) == 0 or np.ptp(given) == 0
    return 0.0 if constant else float(stats.pearsonr(wanted, given).statistic)


def _f1(wanted: Float64Array, given: Float64Array) -> float:
    average = "binary" if max(wanted.max(), given.max()) <= 1 else "macro"
    return float(metrics.f1_score(wanted, given, average=average, zero_division=0.0))


METRICS: Mapping[str, Callable[[Float64Array, Float64Array], float]] = {
    "accuracy": lambda wanted, given: float(metrics.accuracy_score(wanted, given)),
    "f1": _f1,
    "matthews": lambda wanted, given: float(metrics.matthews_corrcoef(wanted, given)),
    "pearson": _pearson,
}
"""Score of labels ``[n]`` and answers ``[n]``; of a constant answer the correlations are 0."""

METRIC_OF = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}
"""Of GLUE's tasks (Wang et al. 2019, arXiv 1804.07461, table 1); of others accuracy or Pearson."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TextClassification(SplitTask):
    """A classifier of sentences, or a regression on them; a ``Task``.

    Batches are what ``EncodedSentences`` gives.

    Attributes:
        model: the dense network, of transformers; nothing changes it.
        example_inputs: what its forward takes.
        train: rows for gradients, calibration and training.
        search: rows that masks are scored on.
        test: rows that are measured once, at the end, or None.
        num_outputs: classes, or one number of a regression.
        score_name: one of ``METRICS``.
        tokenizer: of transformers.
        untrained: whether the network's head has fresh weights.
        name: of the network, in rows and errors.
    """

    kind: ClassVar[str] = "text_classification"
    higher_is_better: ClassVar[bool] = True
    autocast: ClassVar[bool] = True

    model: nn.Module
    example_inputs: ExampleInputs
    train: TrainSplit
    search: SearchSplit
    test: TestSplit | None = None
    num_outputs: int = 2
    score_name: str = "accuracy"
    tokenizer: Any = None
    untrained: bool = False
    name: str = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.train, self.search, self.test, "nothing is chosen on test rows")
        if self.score_name not in METRICS:
            near = suggest(self.score_name, METRICS)
            msg = f"metric {self.score_name!r} is none{near}; there are: {', '.join(METRICS)}"
            raise ConfigError(msg)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits ``[b, outputs]`` of a batch.

        Raises:
            ModelError: the network returns something else.
        """
        inputs = {name: item for name, item in batch.items() if name != "labels"}
        return _logits(model(**self.place(inputs, model)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy, or squared error, of a batch in float32."""
        logits = self.forward(model, batch).float()
        return _loss(logits, batch["labels"].to(logits.device))

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean KL divergence from other logits times the squared temperature.

        Of a regression it is the mean squared distance.
        """
        own, other = _logits(outputs), _logits(dense)
        if own.shape[1] == 1:
            return F.mse_loss(own.float(), other.float())
        return soft_divergence(own, other, temperature)

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return the metric on a split; None = the search split.

        Raises:
            DataError: the split is empty.
            ModelError: the logits hold NaN.
        """
        split = self.search if split is None else split
        if not len(split):
            msg = f"there are no rows to score {self.name} on: give at least one"
            raise DataError(msg)
        if isinstance(split.source, EncodedSentences):  # rows of equal length need no padding
            split = split.take(split.source.lengths[split.index].argsort(stable=True))
        logits, labels = self._answers(model, split.batches(BATCH_SIZE), autocast=self.autocast)
        if bool(logits.isnan().any()):
            msg = f"the logits of {self.name} hold NaN: check its weights"
            raise ModelError(msg)
        return self._score(logits, labels)

    def _score(self, logits: Tensor, labels: Tensor) -> Score:
        answers = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
        value = METRICS[self.score_name](labels.double().numpy(), answers.double().numpy())
        return Score(name=self.score_name, value=value, higher_is_better=True)

    def dense_outputs(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Tensor:
        """Return the logits ``[n, outputs]`` as float32 on the CPU."""
        return self._answers(model, batches, autocast=autocast)[0]

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return the metric, the loss, the mean probability of the right class, the divergence."""
        logits, labels = self._answers(model, batches, autocast=autocast)
        loss = float(_loss(logits, labels))
        if not math.isfinite(loss):
            worst = None if dense_outputs is None else 1e6
            return Scores(accuracy=WORST_UTILITY, loss=1e6, kl=worst, soft_accuracy=None)
        kl = None if dense_outputs is None else float(self.divergence(logits, dense_outputs))
        right = None
        if not labels.is_floating_point():
            right = float(logits.softmax(1).gather(1, labels[:, None]).mean())
        best = Score(name=self.score_name, value=1.0, higher_is_better=True)
        utility = self._score(logits, labels).relative_to(best)
        return Scores(accuracy=utility, loss=loss, kl=kl, soft_accuracy=right)

    def _answers(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the float32 logits ``[n, outputs]`` of batches, and the labels ``[n]``."""
        device, found = model_device(model), []
        with evaluation_mode(model), torch.inference_mode():
            for batch in batches:
                with autocasting(device, wanted=autocast):
                    logits = self.forward(model, batch)
                found.append((logits.float().cpu(), batch["labels"].cpu()))
        logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return logits, labels


def _logits(outputs: Any) -> Tensor:
    return class_logits(outputs, "rows", ": give a classifier of sequences")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def text_classification(
    model: nn.Module | Path | str,
    table: SentenceTable | Path | str,
    tokenizer: Any = None,
    *,
    test: str | None = None,
    metric: str | None = None,
    window: int = WINDOW,
    seed: int = 0,
    name: str | None = None,
) -> TextClassification:
    """Return the task of labelled sentences, or pairs of them.

    Args:
        model: a classifier of sequences of transformers, or a folder of one or of its encoder
            (``from_pretrained``), which then gets a head with fresh weights: train it
            (``prunegraph.finetune``) before it is pruned.
        table: a file, see ``prunegraph.data.sentences``, or what ``read_table`` returned.
        tokenizer: of transformers, or the folder of one; None = that of the network's folder.
        test: the split that is reported on, ``"test"`` or ``"dev"``; None = the first that there
            is. The network is chosen on rows ``search``.
        metric: accuracy, f1, matthews or pearson; None = the table's own (``METRIC_OF``), else
            accuracy, of numbers pearson.
        window: most tokens of a row.
        seed: of fresh weights of a head, and of a cut of rows to search on where there are none.
        name: of the network, in rows and errors.

    Raises:
        ConfigError: transformers is not installed, or there is no such metric.
        PruneGraphError: the table or the network cannot be read, or do not fit each other.
    """
    table = table if isinstance(table, SentenceTable) else read_table(table)
    folder = None if isinstance(model, nn.Module) else Path(model)
    given = folder if tokenizer is None else tokenizer
    if given is None:
        msg = "a network without its folder needs tokenizer=, of transformers"
        raise DataError(msg)
    if isinstance(given, str | Path):
        given = load_tokenizer(given)
    if isinstance(model, nn.Module):
        network, untrained = model, False
    else:
        network, untrained = load_encoder(model, table.num_outputs, seed)
    longest = getattr(getattr(network, "config", None), "max_position_embeddings", window)
    source = EncodedSentences(table, given, min(window, longest))
    train, search, tested = cut(table, source, test, seed)
    example = source.load(train.index[:1])
    regression = table.labels.is_floating_point()
    usual = METRIC_OF.get(table.name, "pearson" if regression else "accuracy")
    if metric is not None and (metric == "pearson") != regression:
        msg = f"metric {metric} does not fit the labels of {table.name}: drop it"
        raise ConfigError(msg)
    task = TextClassification(
        model=network,
        example_inputs={
            k: v.to(model_device(network)) for k, v in example.items() if k != "labels"
        },
        train=train,
        search=search,
        test=tested,
        num_outputs=table.num_outputs,
        score_name=metric or usual,
        tokenizer=given,
        untrained=untrained,
        name=name or (type(network).__name__ if folder is None else folder.resolve().name),
    )
    _check_outputs(task, source.load(train.index[:2]))
    return task


def _check_outputs(task: TextClassification, example: Batch) -> None:
    """Raise ModelError unless the network gives finite logits, one a class, of padded rows."""
    try:
        with evaluation_mode(task.model), torch.inference_mode():
            logits = task.forward(task.model, example)
    except ValueError as error:
        msg = f"{task.name} fails on {len(example['labels'])} rows ({error}): give an encoder"
        raise ModelError(msg) from error
    if logits.shape[1] != task.num_outputs:
        given, wanted = logits.shape[1], task.num_outputs
        msg = f"{task.name} gives {given} logits, the labels need {wanted}: give its encoder"
        raise ModelError(msg)
    if not bool(logits.isfinite().all()):
        msg = f"the logits of {task.name} hold NaN or infinity: check its weights"
        raise ModelError(msg)
