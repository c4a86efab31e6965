"""The trial finds faults in rules: each is planted, shown to do harm, and found."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ModelError, SurgeryError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.rules.table import RULES
from prunegraph.graph.trace.labels import varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall, Rule
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import random_mask

Fault = Callable[[Rule], Rule]


def rolled(rule: Rule) -> Rule:
    """What comes out is taken for its neighbour's."""

    def faulty(recorder: LabelRecorder, call: OpCall) -> None:
        rule(recorder, call)
        for out in call.outputs()[:1]:
            labels = recorder.labels_of(out)
            for axis in varying_axes(labels)[:1]:
                recorder.set_labels(out, labels.roll(1, axis))

    return faulty


def first_alone(rule: Rule) -> Rule:
    """What comes out belongs to the first input alone: nothing is tied."""

    def faulty(recorder: LabelRecorder, call: OpCall) -> None:
        for out in call.outputs()[:1]:
            recorder.set_labels(out, recorder.labels_of(call.tensors()[0]).expand(out.shape))

    return faulty


def fresh(rule: Rule) -> Rule:
    """What comes out is new."""

    def faulty(recorder: LabelRecorder, call: OpCall) -> None:
        rule(recorder, call)
        for out in call.outputs()[:1]:
            labels = recorder.labels_of(out)
            for axis in varying_axes(labels)[-1:]:
                shape = [-1 if a == axis else 1 for a in range(out.ndim)]
                own = recorder.store.fresh(out.shape[axis]).view(shape)
                recorder.set_labels(out, own.expand(out.shape))

    return faulty


class Images(nn.Module):
    """Residual, gated, concatenated, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.gate = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.last, self.head = nn.Conv2d(24, 8, 3, padding=1), nn.Linear(32, 5)
        self.pool = nn.MaxPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = (x + self.inner(x)) * self.gate(x).sigmoid()
        z = self.pool(self.last(torch.cat([x, y], 1)))
        out: Tensor = self.head(z.flatten(1))
        return out


class Tokens(nn.Module):
    """An embedding, attention of four heads, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 50)
        self.heads, self.width = 4, 6

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, n, _ = x.shape
        parts = self.qkv(self.norm(x)).view(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1)
        x = x + self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


IMAGES = (Images, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
TOKENS = (Tokens, torch.arange(14).view(2, 7))
PLANTED = [
    (IMAGES, "convolution", rolled),
    (IMAGES, "native_batch_norm", rolled),
    (IMAGES, "add", first_alone),
    (IMAGES, "mul", first_alone),
    (IMAGES, "mul", rolled),
    (IMAGES, "cat", rolled),
    (IMAGES, "max_pool2d_with_indices", rolled),
    (IMAGES, "relu", fresh),
    (IMAGES, "sigmoid", rolled),
    (TOKENS, "embedding", rolled),
    (TOKENS, "native_layer_norm", fresh),
    (TOKENS, "add", rolled),
    (TOKENS, "relu", rolled),
]


def _harm(model: nn.Module, graph: StructureGraph, example: Tensor) -> int:
    """Return for how many of five masks the pruned network is not the masked one."""
    wrong = 0
    for seed in range(5):
        mask = random_mask(graph, np.random.default_rng(seed))[0]
        try:
            assert_masked_equals_pruned(model, graph, mask, example)
        except (AssertionError, SurgeryError, RuntimeError, ValueError, IndexError):
            wrong += 1
    return wrong


@pytest.mark.parametrize(("case", "op", "fault"), PLANTED)
def test_a_planted_fault_is_found(
    case: tuple[type[nn.Module], Tensor], op: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kind, example = case
    model = kind().eval()
    monkeypatch.setitem(RULES, op, fault(RULES[op]))
    assert _harm(model, analyse(model, example, trial=False), example), "the fault does no harm"
    try:
        graph = analyse(model, example)
    except ModelError as error:
        assert "nothing to prune" in str(error)
    else:
        assert _harm(model, graph, example) == 0


def test_no_fault_does_no_harm() -> None:
    for kind, example in (IMAGES, TOKENS):
        torch.manual_seed(0)
        model = kind().eval()
        graph = analyse(model, example, trial=False)
        assert _harm(model, graph, example) == 0
        assert graph.free.sum() >= 20
