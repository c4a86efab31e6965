"""Which layers add to a stream, and what it held before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.graph import analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.residual import Place, Stream, held_at, residual_branches
from prunegraph.layerwise.sequential import LayerwiseReconstruction

CHANNELS, FACTORS = 6, torch.tensor([2.0, 0.5, 4.0, 1e-4, -1.0, 3.0])


def in_place(x: Tensor, branch: Tensor) -> Tensor:
    branch += x
    return branch


def into_the_stream(x: Tensor, branch: Tensor) -> Tensor:
    x = x.clone() if x.requires_grad else x
    x += branch
    return x


def after_relu_in_place(x: Tensor, branch: Tensor) -> Tensor:
    return F.relu_(branch) + x


def to_a_changed_stream(x: Tensor, branch: Tensor) -> Tensor:
    return branch + x.mul_(2.0)


class Block(nn.Module):
    """``x + f(x)`` in some way, after a layer that makes x."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], *, linear: bool = False) -> None:
        super().__init__()
        layer = nn.Linear if linear else lambda *sizes: nn.Conv2d(*sizes, 1)
        self.before, self.inner = layer(3, CHANNELS), layer(CHANNELS, 8)
        self.outer, self.join = layer(8, CHANNELS), join

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.join(x, self.outer(F.relu(self.inner(x))))


def followed(net: nn.Module, inputs: Tensor) -> dict[str, Stream]:
    """Return the streams, with every output sampled."""

    def sampled(name: str, module: nn.Module, outputs: Tensor) -> Tensor:
        axis = -1 if isinstance(module, nn.Linear) else 1
        return outputs.movedim(axis, -1).flatten(0, -2).clone()

    weights = ("before.weight", "inner.weight", "outer.weight")
    with torch.no_grad(), residual_branches(net, weights, sampled) as found:
        net(inputs)
    return found


@pytest.mark.parametrize(
    ("join", "scale"),
    [
        (lambda x, branch: x + branch, 1.0),
        (lambda x, branch: torch.add(branch, x), 1.0),
        (lambda x, branch: x + F.dropout(branch, 0.5, training=False), 1.0),
        (lambda x, branch: F.relu(FACTORS[:, None, None] * branch + 3.0 + x), 1.0 / FACTORS),
        (in_place, 1.0),
        (into_the_stream, 1.0),
    ],
)
def test_what_a_branch_is_added_to_is_found(join: Any, scale: Tensor | float) -> None:
    torch.manual_seed(0)
    net, images = Block(join).eval(), torch.randn(16, 3, 4, 4)
    found = followed(net, images)
    assert list(found) == ["outer.weight"]
    stream = found["outer.weight"]
    assert stream.place == Place("before", returned=True, call=0)
    scale = torch.ones(CHANNELS) * scale
    wanted = torch.where(scale.abs() > 1e3, 0.0, scale)  # a channel that is as good as not added
    torch.testing.assert_close(stream.scale, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        held = net.before(images).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(stream.values, held * wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "join",
    [
        lambda x, branch: x + F.relu(branch),
        lambda x, branch: torch.add(x, branch, alpha=2),
        lambda x, branch: x * branch,
        lambda x, branch: x + branch.flip(0),
        lambda x, branch: branch + branch,
        lambda x, branch: branch + 1.0,
        lambda x, branch: x + branch.mean((2, 3), keepdim=True),
        lambda x, branch: 2 * x + branch,  # which nothing has shown before
        after_relu_in_place,
        to_a_changed_stream,
    ],
)
def test_what_is_no_such_sum_is_left_alone(join: Any) -> None:
    torch.manual_seed(0)
    assert followed(Block(join).eval(), torch.randn(16, 3, 4, 4)) == {}


def test_channels_last_are_laid_as_the_outputs() -> None:
    class Moved(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x).movedim(-1, 1)
            x = F.relu(nn.Identity()(x))
            y = self.outer(F.relu(self.inner(self.norm(x).movedim(1, -1))))
            return self.norm(x) + y.movedim(-1, 1)

    torch.manual_seed(0)
    net = Moved(max, linear=True)
    net.norm = nn.GroupNorm(1, CHANNELS)
    inputs = torch.randn(16, 4, 5, 3)
    stream = followed(net.eval(), inputs).get("outer.weight")
    assert stream is None  # the norm runs again

    class Kept(Moved):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.before(x).movedim(-1, 1))
            return x + self.outer(F.relu(self.inner(x.movedim(1, -1)))).movedim(-1, 1)

    net.__class__ = Kept
    stream = followed(net, inputs)["outer.weight"]
    assert stream.moved
    assert stream.place == Place("norm", returned=True, call=0)
    held: list[Tensor] = []
    with torch.no_grad(), held_at(net, [stream.place], lambda _, tensor: held.append(tensor)):
        net(inputs)
    (only,) = held
    torch.testing.assert_close(stream.laid(only).flatten(0, -2), stream.values)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("dead", ["scale", "filter", "filter of a bias"])
def test_channels_that_do_not_vary_are_left_alone(dead: str) -> None:
    class Normed(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            return x + self.norm(self.outer(F.relu(self.inner(x))))

    torch.manual_seed(0)
    net, images = Normed(max), torch.randn(100, 3, 7, 7)
    net.norm = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        for values in (net.norm.bias, net.norm.running_mean, net.outer.bias):
            values.normal_()
        if dead == "scale":
            net.norm.weight[:2] = 0.0
        else:
            net.outer.weight[:2] = 0.0
        if dead == "filter":
            net.outer.bias[:2] = 0.0
    scale = followed(net.eval(), images)["outer.weight"].scale
    assert (scale == 0.0).tolist() == [True] * 2 + [False] * (CHANNELS - 2)


def test_a_stream_that_two_layers_add_to_is_kept_for_both() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(16, 16), nn.Linear(32, 4)
            self.first = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
            self.second = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            both = zip(self.first, self.second, strict=True)
            return self.after(
                torch.cat([x + second(F.relu(first(x))) for first, second in both], 1)
            )

    torch.manual_seed(0)
    net, rows = Two().eval(), torch.randn(512, 16)
    graph = analyse(net, rows[:1])
    fit = LayerwiseReconstruction(net, graph, lambda network: network(rows))
    places = {stream.place for stream in fit._branches.values()}
    assert len(fit._branches) == 2
    assert len(places) == 1
    held = dict.fromkeys(places, rows)
    assert fit._now("second.0.weight", held, {"second.0.weight"}) is rows
    assert fit._now("second.1.weight", held, {*fit._branches}) is rows
    assert held == {}


def test_the_callers_tensors_carry_nothing_and_are_known_anew() -> None:
    torch.manual_seed(0)
    net, images = Block(in_place).eval(), torch.randn(16, 3, 4, 4)
    followed(net.before, images)
    assert followed(net, images)["outer.weight"].place.path == "before"
    assert not vars(images)


class Residual(nn.Module):
    """Blocks of which each can make up for those before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(16, 24) for _ in range(4))
        self.second = nn.ModuleList(nn.Linear(24, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(F.relu(first(x)))
        return x


def test_branches_make_up_for_what_the_stream_has_lost() -> None:
    torch.manual_seed(0)
    net, rows, other = Residual().eval(), torch.randn(4096, 16), torch.randn(512, 16)
    graph = analyse(net, rows[:1])
    mask = graph.project(
        graph.group_of.astype(np.float32), Budget(keep_macs=0.5)
    )  # the first blocks go first
    fit = LayerwiseReconstruction(net, graph, lambda network: network(rows))
    assert len(fit._branches) == 4
    errors = []
    for known in (fit._branches, {}):
        fit._branches = known
        pruned = apply_mask(net, graph, mask)
        fit.apply(pruned, mask)
        with torch.no_grad():
            errors.append(float((net(other) - pruned(other)).square().mean()))
    assert errors[0] < 0.9 * errors[1]
