"""Copies that share what nothing writes into, and memory that is used again."""

from functools import partial

import torch
from torch import Tensor, nn

from prunegraph.graph import analyse, copy_network
from prunegraph.graph.analyse import call_forward
from prunegraph.graph.copying import SMALL, Workspace
from prunegraph.graph.proof.inputs import smaller_images
from prunegraph.graph.rules.table import RULES
from prunegraph.graph.trace.steps import StepRecorder


class Merging(nn.Linear):
    """Writes into its weight when its mode changes, as LoRA's layers do."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            self.weight.data += 1.0 if mode else -1.0
        return super().train(mode)


class Listening(nn.Linear):
    """Does something else then."""

    def train(self, mode: bool = True) -> "Listening":
        self.heard = mode
        return super().train(mode)


def _shares(model: nn.Module) -> bool:
    copied = copy_network(model, share=True)
    pairs = [*zip(model.parameters(), copied.parameters(), strict=True)]
    assert all(one is not other and torch.equal(one, other) for one, other in pairs)
    (large,) = (pair for pair in pairs if pair[0].numel() > SMALL)
    small = [pair for pair in pairs if pair[0].numel() <= SMALL]
    assert all(one.data_ptr() != other.data_ptr() for one, other in small)
    return large[0].data_ptr() == large[1].data_ptr()


def test_large_weights_are_shared_unless_a_change_of_mode_writes_into_them() -> None:
    for kind, shared in ((nn.Linear, True), (Listening, True), (Merging, False)):
        layer = kind(80, 60)
        before = layer.weight.detach().clone()
        assert _shares(layer) is shared
        assert torch.equal(layer.weight, before)


def test_a_copy_is_what_deepcopy_makes() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(inner, nn.ModuleList([inner]), nn.LSTM(3, 4))
    copied = copy_network(model)
    assert copied[0] is copied[1][0] is not inner
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert copied[0][1].num_features == 4
    hooks = copied[0]._forward_hooks
    copied[0].register_forward_hook(lambda *_: None)
    assert hooks
    assert not inner._forward_hooks


def test_a_workspace_gives_the_memory_of_a_tensor_again() -> None:
    workspace, tensor = Workspace(), torch.zeros(6, 4)
    first = workspace.place(tensor, (3, 4))
    assert first.shape == (3, 4)
    assert workspace.place(tensor, (2, 2)).data_ptr() == first.data_ptr() != tensor.data_ptr()


class Branching(nn.Module):
    """Does something else with small images, or not."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 6, 3, 2)
        self.head, self.least = nn.Linear(6, 4), least
        self.sides: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sides.append(x.shape[-1])
        x = self.second(self.first(x).relu())
        if x.shape[-1] < self.least:
            x = x.sigmoid()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_smaller_images_take_the_same_steps_or_are_not_used() -> None:
    example = torch.randn(1, 3, 200, 200)
    for least, same in ((0, [True, True]), (20, [False, True]), (40, [False, False])):
        model = Branching(least).eval()
        recorder = StepRecorder(RULES)
        with torch.no_grad():
            with recorder:
                model(example)
            inputs = [*smaller_images(model, example)]
            found = [recorder.takes_same_steps(partial(call_forward, model, x)) for x in inputs]
        assert found == same
        assert [x.shape[-1] for x in inputs] == [64, 128]


def test_the_choice_of_inputs_leaves_nothing_in_the_network() -> None:
    torch.manual_seed(0)
    model = Branching(40).eval()
    analyse(model, torch.randn(1, 3, 200, 200))
    assert model.sides == []
